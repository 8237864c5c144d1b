"""The longest row that a model may read, from its transformers config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from opd.errors import DataError


def positions_of(config: Any) -> float:
    """The number of positions that this transformers config allows; infinite without a limit, as with ALiBi.

    Linear scaling multiplies `max_position_embeddings` by its factor, YaRN the length of the pretraining, which is
    `max_position_embeddings` if the config does not say. Some families store the product in `max_position_embeddings`
    (DeepSeek, gpt-oss, Llama 3; Gemma 3, whose scaling is by kind of layer): then it is the limit.

    Two kinds of scaling use other frequencies for a whole batch if one row of it is long, so cached keys no longer fit
    and a row's scores depend on its batch. The limit is where that begins: for dynamic scaling
    `max_position_embeddings`, for LongRoPE the length of the pretraining. Where an index selects the tokens to attend
    to, the selection depends on rounding, and so on the batch: the limit is the longest row of which it selects all.
    """
    text = config.get_text_config()
    return min(_positions(text), _selected(text))


def _positions(text: Any) -> float:
    limit = getattr(text, "max_position_embeddings", getattr(text, "max_seq_len", None))  # MPT, whose ALiBi is a table
    if not isinstance(limit, int) or limit <= 0 or getattr(text, "alibi", False):
        return math.inf
    rope: Mapping[str, Any] = getattr(text, "rope_parameters", None) or {}
    by_layer = [value for value in rope.values() if isinstance(value, Mapping)]
    found = [scaled(limit, one, by_layer=bool(by_layer)) for one in by_layer or [rope]]
    return min(found) if min(found) < limit else max(found)


def _selected(text: Any) -> float:
    """The tokens of the longest row in which sparse attention selects every token; infinite without an index."""
    if "indexed_attention" in (getattr(text, "layer_types", None) or ()):
        return text.index_topk
    if getattr(text, "index_topk_blocks", None):  # MiniMax M3
        return text.index_topk_blocks * text.index_block_size
    return getattr(text, "keep_window_size", None) or math.inf  # Doge


def scaled(limit: int, rope: Mapping[str, Any], *, by_layer: bool) -> int:
    """The positions of layers with this scaling, in the fields of transformers; `limit`: `max_position_embeddings`.

    `by_layer`: the model has a scaling for each kind of layer.
    """
    kind, factor = rope.get("rope_type"), rope.get("factor") or 1.0
    trained = rope.get("original_max_position_embeddings") or limit
    if kind == "linear" and not by_layer:
        return int(limit * factor)
    if kind == "yarn":
        return max(limit, int(trained * factor))
    return min(limit, trained) if kind == "longrope" else limit


def check_positions(name: str, tokens: int, positions: float, remedy: str) -> None:
    """Raise DataError for a sequence of more `tokens` than the model has `positions`."""
    if tokens > positions:
        raise DataError(f"{name} would read {tokens} tokens in all, but has only {positions} positions. {remedy}")
