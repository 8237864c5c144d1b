"""Loads the tokenizer of a folder or hub id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opd.errors import ConfigError
from opd.models.paths import near_path


def load_tokenizer(path: Path | str, *, trust_remote_code: bool, where: str) -> Any:
    """The tokenizer of a folder or hub id. Raises ConfigError, which begins with `where`."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if _is_whole(path):
            return PreTrainedTokenizerFast.from_pretrained(path)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # `tokenizers` raises the bare type; of a damaged file transformers raises any
        taken = "a folder" if isinstance(path, Path) else "not a local folder and so used as a hub id"
        near = "" if isinstance(path, Path) else near_path(Path(path))
        raise ConfigError(
            f"{where}: no tokenizer could be loaded from {path}, which is {taken}.{near} {' '.join(str(error).split())}"
        ) from error


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
