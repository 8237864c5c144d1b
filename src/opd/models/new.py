"""New models with random weights, and their tokenizers."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from opd.errors import ConfigError, nearest
from opd.recipe.schema import ModelSpec

# What a config's values raise when transformers reads them.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError)


def new_model(spec: ModelSpec, name: str, seed: int) -> tuple[Any, Any]:
    """A randomly initialised model from `init` (a transformers config, with `model_type`) and `tokenizer`.

    The tokenizer is {characters: "..."}, one token per character, or a path.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = new_tokenizer(spec, name)
    config = new_config(spec, name, tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(f"{seed}-{name}".encode()) if spec.seed is None else spec.seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer


def new_config(spec: ModelSpec, name: str, tokenizer: Any) -> Any:
    """The transformers config of a new model. Raises ConfigError for an unknown type or key."""
    from transformers import CONFIG_MAPPING, AutoConfig

    settings = dict(spec.init or {})
    model_type = settings.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        known = nearest(str(model_type), CONFIG_MAPPING.keys())
        raise ConfigError(f"models.{name}.init needs `model_type`, e.g. llama; got {model_type!r}.{known}")
    default = AutoConfig.for_model(model_type)
    for key in settings:
        if not hasattr(default, key):
            raise ConfigError(
                f"models.{name}.init: a {model_type} config has no {key!r}.{nearest(key, default.to_dict())}"
            )
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        config = AutoConfig.for_model(model_type, **{"vocab_size": len(tokenizer), **ids, **settings})
    except UNREADABLE as error:
        raise ConfigError(f"models.{name}.init is no {model_type} config: {' '.join(str(error).split())}.") from error
    check_kind(config, f"models.{name}.init")
    return config


def read_config(folder: Path, *, trust_remote_code: bool, where: str) -> Any:
    """The transformers config of a model's folder. Raises ConfigError, also if it is not one of a causal model."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{where}: {folder / 'config.json'} cannot be read: {why:.300}") from error
    check_kind(config, f"{where}: {folder}")
    return config


def check_kind(config: Any, where: str) -> None:
    """Raise ConfigError for a config of which AutoModelForCausalLM makes no model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    ):
        return
    raise ConfigError(
        f"{where} is a {config.model_type} model, of which transformers' AutoModelForCausalLM makes none: it writes no "
        "text, or reads the prompt with an encoder. Use a causal (decoder-only) language model."
    )


def new_tokenizer(spec: ModelSpec, name: str) -> Any:
    """The tokenizer of a new model. Raises ConfigError if the recipe names none."""
    from transformers import AutoTokenizer

    if spec.tokenizer is None:
        raise ConfigError(f"models.{name}: a new model needs `tokenizer: {{characters: ...}}` or a tokenizer's path.")
    if isinstance(spec.tokenizer, str):
        return AutoTokenizer.from_pretrained(spec.tokenizer)
    return character_tokenizer(spec.tokenizer.characters, spec.tokenizer.merges)


def character_tokenizer(characters: str, merges: Sequence[tuple[str, str]] = ()) -> Any:
    """<pad> (0), <eos> (1), then one token per character and one per merge of `merges` (byte-pair encoding).

    Raises ConfigError for a merge of unknown tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as token_models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *dict.fromkeys(characters)])}
    for left, right in merges:
        if missing := [part for part in (left, right) if part not in vocabulary]:
            raise ConfigError(
                f"The tokenizer's merge {left!r} + {right!r} joins {missing[0]!r}, which is neither a character nor "
                "the result of an earlier merge. Correct the order of `merges`, or add the characters."
            )
        vocabulary.setdefault(left + right, len(vocabulary))
    if merges:
        return PreTrainedTokenizerFast(
            tokenizer_object=_pairs(vocabulary, merges), pad_token="<pad>", eos_token="<eos>"
        )
    core = Tokenizer(token_models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    core.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def _pairs(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]]) -> Any:
    """Byte-pair encoding of characters. As without merges, an unknown character becomes padding."""
    from tokenizers import Tokenizer, decoders
    from tokenizers import models as token_models

    core = Tokenizer(token_models.BPE(vocab=vocabulary, merges=list(merges), unk_token="<pad>"))
    core.decoder = decoders.Fuse()  # type: ignore[assignment]
    return core
