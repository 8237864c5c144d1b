"""Text that a tokenizer does not know: it is read as one unknown token, whatever it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def unknown_id(tokenizer: Any) -> int | None:
    """The id that stands for unknown text; None if the tokenizer knows every text, as one of bytes does.

    None also where this token begins or ends a text, as in GPT-2: there it does not show that text is unknown.
    """
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if hasattr(model, "unk_token"):
        return None if model.unk_token is None else tokenizer.convert_tokens_to_ids(model.unk_token)
    known = tokenizer.unk_token_id
    return None if known in (tokenizer.bos_token_id, tokenizer.eos_token_id) else known


def unknown_lines(
    name: str, tokenizer: Any, ids: Sequence[Sequence[int]], text: Callable[[int], str], what: str
) -> list[str]:
    """A line if some of `ids` hold the unknown token; `text` gives the text of a row, `what` names the rows.

    A row's text may be several words of a vocabulary: what is unknown is found by the tokenizer's offsets.
    """
    unknown = unknown_id(tokenizer)
    rows = [] if unknown is None else [i for i, row in enumerate(ids) if unknown in row]
    if not rows:
        return []
    shown = text(rows[0])
    found: list[str] = []
    if tokenizer.is_fast:
        read = tokenizer(shown, add_special_tokens=False, return_offsets_mapping=True)
        spans = zip(read["input_ids"], read["offset_mapping"], strict=True)
        found = list(dict.fromkeys(shown[a:b] for one, (a, b) in spans if one == unknown))
    such = f", in the first {', '.join(map(repr, found[:3]))}" if found else ""
    return [
        f"{name}: {len(rows)} of {len(ids)} {what} hold text that its tokenizer does not know{such}: it is read as "
        f"{tokenizer.convert_ids_to_tokens(unknown)!r}. Correct the data, or use a tokenizer that has it"
    ]
