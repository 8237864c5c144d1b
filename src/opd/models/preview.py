"""The tokenizer and the number of positions of a recipe's model, before its weights are loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from opd.models.language_model import positions_of
from opd.recipe.schema import ModelSpec


def tokenizer_of(spec: ModelSpec, name: str) -> Any | None:
    """The tokenizer of a folder or a new model; None if it comes with weights that do not exist yet.

    Also None for a user's scorer.
    """
    from opd.models.loading import load_tokenizer
    from opd.models.new import new_config, new_tokenizer

    if spec.scorer is not None:
        return None
    if spec.init is not None:
        tokenizer = new_tokenizer(spec, name)
        new_config(spec, name, tokenizer)
    else:
        path = _folder(spec, name)
        if path is None:
            return None
        tokenizer = load_tokenizer(path, spec, name)
    if spec.chat_template is not None:
        tokenizer.chat_template = spec.chat_template
    return tokenizer


def known_positions(spec: ModelSpec, name: str, tokenizer: Any) -> float:
    """The number of positions of a recipe's model; infinite if its config does not say, or cannot be read yet."""
    from transformers import AutoConfig

    from opd.models.new import new_config

    if spec.init is not None:
        return positions_of(new_config(spec, name, tokenizer))
    path = _folder(spec, name)
    if path is None:
        return math.inf
    try:
        return positions_of(AutoConfig.from_pretrained(path, trust_remote_code=spec.trust_remote_code))
    except (OSError, ValueError, KeyError):  # loading the model will report the error
        return math.inf


def _folder(spec: ModelSpec, name: str) -> Path | str | None:
    """The folder or hub id of a model with a path; None for a GGUF file that has not been converted."""
    from opd.models.gguf import cached_gguf
    from opd.models.paths import resolved_path

    path = resolved_path(spec, name)
    if isinstance(path, Path) and path.suffix == ".gguf":
        return cached_gguf(path)
    return path
