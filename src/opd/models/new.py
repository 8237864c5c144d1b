"""New models with random weights, and their tokenizers."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from opd.errors import ConfigError, nearest
from opd.files import expanded
from opd.messages import IMAGE
from opd.models.paths import looks_local, near_path
from opd.models.processors import sees
from opd.models.tokenizer_files import load_tokenizer
from opd.plugins import torch
from opd.recipe.schema import ModelSpec

# Sizes of a transformers config, which it also takes below 1.
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "num_experts", "num_local_experts"),
    *("n_embd", "n_layer", "n_head", "n_positions", "n_inner", "d_model"),
)


def new_model(spec: ModelSpec, name: str, seed: int) -> tuple[Any, Any]:
    """A randomly initialised model from `init` (a transformers config, with `model_type`) and `tokenizer`.

    The tokenizer is {characters: "..."}, one token per character, or a path. Raises ConfigError if transformers refuses
    the config.
    """
    tokenizer = new_tokenizer(spec, name)
    config = new_config(spec, name, tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(f"{seed}-{name}".encode()) if spec.seed is None else spec.seed)
        try:
            return auto_class(config).from_config(config, dtype=torch.float32, **attention_of(spec)), tokenizer
        except Exception as error:  # of sizes that do not fit, transformers and torch raise any type
            raise ConfigError(_no_model(name, config.model_type, error)) from error


def attention_of(spec: ModelSpec) -> dict[str, Any]:
    """The argument of transformers that chooses the implementation of attention."""
    return {} if spec.attn_implementation is None else {"attn_implementation": spec.attn_implementation}


def _no_model(name: str, model_type: str, error: Exception) -> str:
    why = " ".join(str(error).split()).removesuffix(".") or "no reason given"
    return (
        f"models.{name}: transformers makes no {model_type} model of `init`: {type(error).__name__}: {why:.300}. "
        f"Correct models.{name}.init."
    )


def new_config(spec: ModelSpec, name: str, tokenizer: Any) -> Any:
    """The transformers config of a new model. Raises ConfigError for an unknown type or key."""
    from transformers import CONFIG_MAPPING, AutoConfig

    settings = dict(spec.init or {})
    model_type = settings.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        known = nearest(str(model_type), CONFIG_MAPPING.keys())
        raise ConfigError(f"models.{name}.init needs `model_type`, e.g. llama; got {model_type!r}.{known}")
    default = AutoConfig.for_model(model_type)
    for key in settings:
        if not hasattr(default, key) or callable(getattr(type(default), key, None)):
            raise ConfigError(
                f"models.{name}.init: a {model_type} config has no {key!r}.{nearest(key, default.to_dict())}"
            )
    for key, value in settings.items():
        if key in SIZES and isinstance(value, int) and value < 1:
            raise ConfigError(f"models.{name}.init: `{key}` is {value}, and a model needs at least 1.")
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    given = {"vocab_size": len(tokenizer), **ids}
    parts: Any = type(default).sub_configs
    if reads_images({"model_type": model_type}) and "text_config" in parts:
        settings["text_config"] = {**given, **settings.get("text_config", {})}
        placeholder = "image_token_index" if "image_token_id" in type(default).attribute_map else "image_token_id"
        given = {placeholder: tokenizer.pictures.placeholder} if sees(tokenizer) else {}
    try:
        config = AutoConfig.for_model(model_type, **{**given, **settings})
    except Exception as error:  # of values that do not fit, transformers raises any type
        raise ConfigError(_no_model(name, model_type, error)) from error
    _check_ids(config, settings, name)
    check_kind(config, f"models.{name}.init")
    return config


def _check_ids(config: Any, settings: Mapping[str, Any], name: str) -> None:
    """Refuse the id of a special token beyond the vocabulary. Raises ConfigError."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(rows, int):
        return
    for key, value in settings.items():
        given = value if isinstance(value, list) else [value]
        if key.endswith("_token_id") and any(isinstance(one, int) and not 0 <= one < rows for one in given):
            raise ConfigError(
                f"models.{name}.init: `{key}` is {value}, and the vocabulary has the ids 0 to {rows - 1}."
            )


def read_config(folder: Path, *, trust_remote_code: bool, where: str) -> Any:
    """The transformers config of a model's folder. Raises ConfigError, also if it is not one of a causal model."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of a damaged file transformers raises any type
        why = " ".join(str(error).split())
        raise ConfigError(f"{where}: {folder / 'config.json'} cannot be read: {why:.300}") from error
    check_kind(config, f"{where}: {folder}")
    _check_generation_config(folder, where)
    return config


def _check_generation_config(folder: Path, where: str) -> None:
    """Refuse a damaged generation_config.json, which transformers leaves out without a word. Raises ConfigError."""
    file = folder / "generation_config.json"
    try:
        settings = json.loads(file.read_bytes()) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {file} cannot be read: {error}. Correct or remove it.") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{where}: {file} holds a {type(settings).__name__}, not an object. Correct or remove it.")


def auto_class(config: Any) -> Any:
    """The class of transformers that makes a model of this config: of text, else of text and images.

    Of a family with both, AutoModelForCausalLM makes the model with images, or the model of text alone.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if _writes(config) or not _shown(config) else AutoModelForImageTextToText


def _writes(config: Any) -> bool:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    own = getattr(config, "auto_map", None) or {}
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in own


def _shown(config: Any) -> bool:
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    text = config.get_text_config()
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not getattr(text, "is_encoder_decoder", False)


def check_kind(config: Any, where: str) -> None:
    """Raise ConfigError for a config of which `auto_class` makes no model."""
    if _writes(config) or _shown(config):
        return
    raise ConfigError(
        f"{where} is a {config.model_type} model, of which transformers' AutoModelForCausalLM makes none: it writes no "
        "text, or reads the prompt with an encoder. Use a causal (decoder-only) language model."
    )


def new_tokenizer(spec: ModelSpec, name: str) -> Any:
    """The tokenizer of a new model. Raises ConfigError if the recipe names none, or it cannot be loaded."""
    if spec.tokenizer is None:
        raise ConfigError(f"models.{name}: a new model needs `tokenizer: {{characters: ...}}` or a tokenizer's path.")
    if isinstance(spec.tokenizer, str):
        local, where = expanded(spec.tokenizer), f"models.{name}.tokenizer"
        if not local.is_dir() and (looks_local(spec.tokenizer) or local.exists()):
            problem = "is not a folder" if local.exists() else "does not exist"
            raise ConfigError(f"{where}: {local} {problem}.{near_path(local)} Give a tokenizer's folder or hub id.")
        return load_tokenizer(local if local.is_dir() else spec.tokenizer, trust_remote_code=False, where=where)
    made = partial(character_tokenizer, spec.tokenizer.characters, spec.tokenizer.merges, words=spec.tokenizer.words)
    if not reads_images(spec.init or {}):
        if spec.image_processor:
            raise ConfigError(
                f"models.{name}: `image_processor` is of a model that reads images, and `init` is of none. Remove it."
            )
        return made()
    from opd.models.processors import new_processor

    return new_processor(spec, name, made(special=(IMAGE,)))


def reads_images(init: Mapping[str, Any]) -> bool:
    """Whether a config of these settings is of a model that reads images."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    kind = str(init.get("model_type"))
    return kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def character_tokenizer(
    characters: str, merges: Sequence[tuple[str, str]] = (), special: Sequence[str] = (), words: Sequence[str] = ()
) -> Any:
    """<pad> (0), <eos> (1), the `special` tokens, then one per character, word and merge (byte-pair encoding).

    `words` are whole texts, the longest of them first. Raises ConfigError for a merge of unknown tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as token_models
    from transformers import PreTrainedTokenizerFast

    known = dict.fromkeys([*characters, *words])
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *special, *known])}
    for left, right in merges:
        if missing := [part for part in (left, right) if part not in vocabulary]:
            raise ConfigError(
                f"The tokenizer's merge {left!r} + {right!r} joins {missing[0]!r}, which is neither a character nor "
                "the result of an earlier merge. Correct the order of `merges`, or add the characters."
            )
        vocabulary.setdefault(left + right, len(vocabulary))
    whole = [re.escape(word) for word in sorted(words, key=len, reverse=True)]
    if merges:
        core = _pairs(vocabulary, merges, whole)
    else:
        core = Tokenizer(token_models.WordLevel(vocabulary, unk_token="<pad>"))
        core.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*whole, r"[\s\S]"])), "isolated")  # type: ignore[assignment]
        core.decoder = decoders.Fuse()  # type: ignore[assignment]
    core.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def _pairs(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], whole: Sequence[str]) -> Any:
    """Byte-pair encoding of characters. As without merges, an unknown character becomes padding.

    Texts of the patterns `whole` are tokens without merging.
    """
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as token_models

    pairs = token_models.BPE(vocab=vocabulary, merges=list(merges), unk_token="<pad>", ignore_merges=bool(whole))
    core = Tokenizer(pairs)
    if whole:
        core.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(whole)), "isolated")  # type: ignore[assignment]
    core.decoder = decoders.Fuse()  # type: ignore[assignment]
    return core
