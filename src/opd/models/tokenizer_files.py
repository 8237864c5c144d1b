"""Loads the tokenizer of a folder or hub id."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from opd.errors import ConfigError
from opd.models.paths import near_path
from opd.models.processors import with_processor
from opd.models.remembered import keep, recall


def load_tokenizer(path: Path | str, *, trust_remote_code: bool, where: str) -> Any:
    """The tokenizer of a folder or hub id, with its processor of images if it has one.

    Raises ConfigError, which begins with `where`.
    """
    tokenizer = _loaded(path, trust_remote_code=trust_remote_code, where=where)
    return with_processor(tokenizer, path, trust_remote_code=trust_remote_code, where=where)


def _loaded(path: Path | str, *, trust_remote_code: bool, where: str) -> Any:
    try:
        if _is_whole(path):
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(path)
        return _chosen(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # `tokenizers` raises the bare type; of a damaged file transformers raises any
        taken = "a folder" if isinstance(path, Path) else "not a local folder and so used as a hub id"
        near = "" if isinstance(path, Path) else near_path(Path(path))
        raise ConfigError(
            f"{where}: no tokenizer could be loaded from {path}, which is {taken}.{near} {' '.join(str(error).split())}"
        ) from error


def _chosen(path: Path | str, *, trust_remote_code: bool) -> Any:
    """The tokenizer of the class that AutoTokenizer chooses.

    AutoTokenizer imports torch, and its choice reads the model's config. The choice is kept if the class alone then
    loads an equal tokenizer.
    """
    named = None if trust_remote_code else recall("tokenizer", path)
    if named is not None:
        return _class(named).from_pretrained(path)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    kind = type(tokenizer)
    named = [kind.__module__, kind.__qualname__]
    if isinstance(path, Path) and not trust_remote_code and _class(named) is kind:
        alone = kind.from_pretrained(path)
        if _state(alone) is not None and _state(alone) == _state(tokenizer):
            keep("tokenizer", path, named)
    return tokenizer


def _class(named: list[str]) -> Any:
    """The class of a module of transformers; None for one of another package, or inside of another class."""
    module, name = named
    return getattr(importlib.import_module(module), name, None) if module.startswith("transformers.") else None


def _state(tokenizer: Any) -> tuple[str, str] | None:
    """All that a tokenizer is: its program of `tokenizers`, and its settings. None without such a program."""
    program = getattr(tokenizer, "backend_tokenizer", None)
    if program is None:
        return None
    return program.to_str(), repr(
        sorted((name, value) for name, value in vars(tokenizer).items() if name != "_tokenizer")
    )


def _is_whole(path: Path | str) -> bool:
    """Whether the tokenizer of a folder is all in its tokenizer.json.

    For some kinds of model, such as qwen2 and phi3, AutoTokenizer of transformers 5.23 makes such a tokenizer into the
    class of that kind, which cuts text in its own way.
    """
    config = Path(path) / "tokenizer_config.json"
    if not (isinstance(path, Path) and config.exists() and (path / "tokenizer.json").exists()):
        return False
    settings = json.loads(config.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{config} holds a {type(settings).__name__}, and an object is needed")
    return settings.get("tokenizer_class") == "TokenizersBackend"
