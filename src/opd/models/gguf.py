"""GGUF files -> safetensors folders in a cache, by the content of the file."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.metadata
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from opd.errors import ConfigError
from opd.files import cache_dir, follow_umask, fsync_path, write_atomically
from opd.models.gguf_file import read_gguf
from opd.models.gguf_tokenizer import end_ids, read_tokenizer
from opd.models.gguf_weights import load_model

CONVERTER = 2  # raise it when a change of this code changes what a file becomes
RECORD = "conversion.json"


def cached_gguf(file: Path) -> Path | None:
    """The folder of the conversion of a GGUF file; None if it has not been converted. Does not read the file.

    Raises ConfigError without the package gguf.
    """
    versions, known = _versions(file), _digest_file(file)
    if not known.exists():
        return None
    target = _target(file, known.read_text(), versions)
    return target if (target / "config.json").exists() else None


def convert_gguf(file: Path) -> Path:
    """A safetensors folder with the file's de-quantised weights (float32), written once into the cache.

    The folder's name follows from the file's content and from the versions of the converters. Another process that
    converts the same file is waited for; what a killed one left is removed. `notes_of` has what could not be converted.

    Raises ConfigError if the file cannot be converted, or changed meanwhile, or the package gguf is missing; OSError or
    RunError if the cache cannot be written.
    """
    versions, known = _versions(file), _digest_file(file)
    with _locked(known):
        if not known.exists():
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            _check_unchanged(file, known)
            write_atomically(known, digest)
    target = _target(file, known.read_text(), versions)
    with _locked(target) as exclusive:
        if not (target / "config.json").exists():
            _write(file, known, target, exclusive)
    return target


def notes_of(folder: Path) -> list[str]:
    """What the conversion to this folder could not take over; empty for a folder that is no conversion."""
    record = folder / RECORD
    return json.loads(record.read_text())["notes"] if record.exists() else []


def _digest_file(file: Path) -> Path:
    """The file of the cache that holds the content's SHA-256, under a name that any change of the file changes."""
    state = file.stat()
    parts = [str(file.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    return cache_dir() / "gguf-digests" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _target(file: Path, digest: str, versions: list[str]) -> Path:
    """The folder of a conversion, by content and converters."""
    key = hashlib.sha256(json.dumps([digest, CONVERTER, *versions]).encode()).hexdigest()[:16]
    return cache_dir() / f"{file.stem}-{key}"


def _versions(file: Path) -> list[str]:
    """The versions of the libraries that convert. Raises ConfigError without the package gguf."""
    try:
        return [importlib.metadata.version(name) for name in ("transformers", "gguf")]
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(f"{file.name} is a GGUF file; reading it needs `pip install 'opd[gguf]'`.") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Exclude other processes; False, with a warning, without a lock: then two may do the same work."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f"{path.name}.lock"), fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        warnings.warn(
            f"{path.parent} takes no lock ({error}), so another process may convert the same GGUF file meanwhile",
            stacklevel=4,
        )
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _write(file: Path, known: Path, target: Path, exclusive: bool) -> None:
    """Write the folder under another name, then rename it, so that it is whole whenever it exists."""
    unfinished = f"{target.name}.writing-"
    if exclusive:  # what is there was left by a process that was killed
        for old in target.parent.glob(f"{glob.escape(unfinished)}*"):
            shutil.rmtree(old)
    partial = target.with_name(f"{unfinished}{os.getpid()}")
    try:
        _convert(file, partial)
        follow_umask(partial)  # a cache may have several users
        _check_unchanged(file, known)
        for path in (*partial.iterdir(), partial):
            fsync_path(path)
        partial.rename(target)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        if not (target / "config.json").exists():  # without a lock, another process may have been first
            raise


def _convert(file: Path, folder: Path) -> None:
    read = read_gguf(file)
    model, notes = load_model(read)
    tokenizer, more = read_tokenizer(read)
    model.config._name_or_path = ""  # nothing can be loaded from the name in the file
    if ends := end_ids(read):
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / RECORD).write_text(json.dumps({"file": str(file.resolve()), "notes": notes + more}, indent=1))


def _check_unchanged(file: Path, known: Path) -> None:
    if _digest_file(file) != known:
        raise ConfigError(
            f"{file} changed while it was read. Wait until it is complete, then start the same command again."
        )
