"""What transformers said about a model's folder, kept in the cache, so that a second look at the folder needs no torch.

An answer is found by everything that it depends on: the contents of the folder's text files, the headers of its weight
files, the names and sizes of all files, the versions of the libraries, and the code of this room. Nothing is kept about
a folder with code of its own, or while a program has registered classes of its own with transformers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

from opd.files import cache_dir, write_atomically

TEXTS = (".json", ".jinja", ".model", ".txt", ".tiktoken")  # that transformers reads for a config or a tokenizer
LIBRARIES = ("transformers", "torch", "tokenizers", "safetensors")
# Registers of transformers to which a program may add its own classes.
REGISTERS = {
    "configuration_auto": "CONFIG_MAPPING",
    "modeling_auto": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "tokenization_auto": "TOKENIZER_MAPPING",
}


def recall(what: str, folder: Path | str) -> Any:
    """The answer that `keep` kept about this content; None if there is none."""
    file = _file(what, folder)
    try:
        return None if file is None else json.loads(file.read_bytes())
    except (OSError, ValueError):  # not there, or damaged: it is made again
        return None


def keep(what: str, folder: Path | str, answer: Any) -> None:
    """Keep an answer of JSON types. Without a cache that can be written, nothing is kept."""
    file = _file(what, folder)
    if file is not None:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(answer))


def _file(what: str, folder: Path | str) -> Path | None:
    """The file of an answer; None where none may be kept: for a hub id, own code, own classes, own versions."""
    versions = _versions()
    if not isinstance(folder, Path) or any("dev" in version for version in versions) or _extended():
        return None
    content = _content(folder)
    if content is None:
        return None
    key = hashlib.sha256(json.dumps([content, *versions, _code()]).encode()).hexdigest()
    return cache_dir() / "answers" / f"{what}-{key[:32]}.json"


def _content(folder: Path) -> str | None:
    """A hash of what transformers reads in a folder, without the weights; None with Python code, or if it cannot."""
    digest = hashlib.sha256()
    try:
        for file in sorted(folder.iterdir()):
            if file.suffix == ".py":
                return None
            if not file.is_file():
                continue
            digest.update(json.dumps([file.name, file.stat().st_size]).encode())
            if file.suffix in TEXTS:
                digest.update(hashlib.sha256(file.read_bytes()).digest())
            elif file.suffix == ".safetensors":
                digest.update(hashlib.sha256(_header(file)).digest())
    except OSError:
        return None
    return digest.hexdigest()


def _header(file: Path) -> bytes:
    """The names, shapes and places of a file's tensors, as bytes: a length of 8 bytes, and that many."""
    with file.open("rb") as stored:
        length = stored.read(8)
        return length + stored.read(min(int.from_bytes(length, "little"), 1 << 28))


def _extended() -> bool:
    """Whether a program has added classes to transformers."""
    modules = {name: sys.modules.get(f"transformers.models.auto.{name}") for name in REGISTERS}
    return any(
        module is not None and bool(getattr(module, REGISTERS[name])._extra_content) for name, module in modules.items()
    )


@functools.cache
def _versions() -> tuple[str, ...]:
    return (sys.version, *(importlib.metadata.version(name) for name in LIBRARIES))


@functools.cache
def _code() -> str:
    """A hash of the code that makes the answers: this room and its ground."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for file in (*sorted(here.glob("*.py")), here.parent / "errors.py", here.parent / "files.py"):
        digest.update(file.read_bytes())
    return digest.hexdigest()
