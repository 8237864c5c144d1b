"""GGUF files -> safetensors folders in a cache."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from opd.errors import ConfigError
from opd.files import follow_umask


def cache_dir() -> Path:
    return Path(os.environ.get("OPD_CACHE", Path.home() / ".cache" / "opd"))


def cached_gguf(file: Path) -> Path:
    """The folder for the conversion of a GGUF file, which may not exist yet."""
    key = hashlib.sha256(f"{file.name}-{file.stat().st_size}".encode()).hexdigest()[:12]
    return cache_dir() / f"{file.stem}-{key}"


def convert_gguf(file: Path) -> Path:
    """A safetensors folder with the file's de-quantised weights (float32), written once into the cache.

    A model that transformers loads from GGUF keeps a quantizer, which prevents `save_pretrained` and training. So its
    weights are copied into a new model without quantization in its config.
    """
    target = cached_gguf(file)
    if (target / "config.json").exists():
        return target
    try:
        import gguf  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ConfigError(f"{file.name} is a GGUF file; reading it needs `pip install 'opd[gguf]'`.") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    with torch.device("meta"):
        clean = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    clean.to_empty(device="cpu").load_state_dict(loaded.state_dict())
    clean.tie_weights()
    # Remove the name of the file's origin: nothing can be loaded from it.
    clean.config._name_or_path = str(target)
    clean.generation_config = loaded.generation_config
    partial = target.with_name(f"{target.name}.writing-{os.getpid()}")
    clean.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    follow_umask(partial)  # a cache may have several users
    if target.exists():
        shutil.rmtree(partial)
    else:
        partial.rename(target)
    return target
