"""Reads the metadata and the tensors of a GGUF file.

`gguf.GGUFReader` makes several numpy objects for each token of the vocabulary, which takes seconds. This reader makes
one Python object for each, and leaves the tensors on the disk until they are needed.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.errors import ConfigError
from opd.plugins import np

VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
# The numbers among the types of a value: u8, i8, u16, i16, u32, i32, f32, bool, u64, i64, f64.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Where a tensor is in the file; `kind` is its ggml type."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFFile:
    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    def get(self, key: str) -> Any:
        """The value of a metadata key; None for an absent one."""
        return self.metadata.get(key)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor's values, as float32. Needs the package `gguf`."""
        import gguf
        from gguf.quants import quant_shape_to_byte_shape

        stored = self.tensors[name]
        kind = gguf.GGMLQuantizationType(stored.kind)
        shape = quant_shape_to_byte_shape(stored.shape, kind)
        packed = np.memmap(self.path, dtype=np.uint8, mode="r", offset=stored.offset, shape=shape)
        return gguf.dequantize(packed, kind)


def read_gguf(path: Path) -> GGUFFile:
    """Read the header of a GGUF file. Raises ConfigError if it cannot be read."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _parse(path, content)
    except (OSError, ValueError, struct.error) as error:
        raise ConfigError(
            f"{path} cannot be read as a GGUF file: {error}. If it was copied or downloaded, compare its size with "
            f"the original's; it has {path.stat().st_size if path.exists() else 0} bytes."
        ) from error


def _parse(path: Path, content: mmap.mmap) -> GGUFFile:
    if content[:4] != b"GGUF":
        raise ValueError("it does not begin with the letters GGUF")
    version, tensor_count, value_count = struct.unpack_from("<IQQ", content, 4)
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}, and the versions that can be read are 2 and 3 (little-endian)")
    at = 24
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key, at = _string(content, at)
        (kind,) = struct.unpack_from("<I", content, at)
        metadata[key], at = _value(content, at + 4, kind)
    placed: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(tensor_count):
        name, at = _string(content, at)
        (dimensions,) = struct.unpack_from("<I", content, at)
        sizes = struct.unpack_from(f"<{dimensions}Q", content, at + 4)
        kind, offset = struct.unpack_from("<IQ", content, at + 4 + 8 * dimensions)
        at += 16 + 8 * dimensions
        placed.append((name, sizes[::-1], kind, offset))  # ggml states the fastest dimension first
    alignment = metadata.get("general.alignment", 32)
    start = -(-at // alignment) * alignment
    tensors = {name: Stored(shape=shape, kind=kind, offset=start + offset) for name, shape, kind, offset in placed}
    return GGUFFile(path=path, metadata=metadata, tensors=tensors)


def _string(content: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", content, at)
    end = at + 8 + length
    if end > len(content):
        raise ValueError(f"a text at byte {at} ends after the file")
    return content[at + 8 : end].decode("utf-8", errors="replace"), end


def _value(content: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """A value and the place after it."""
    if kind in NUMBERS:
        form = f"<{NUMBERS[kind]}"
        return struct.unpack_from(form, content, at)[0], at + struct.calcsize(form)
    if kind == STRING:
        return _string(content, at)
    if kind != ARRAY:
        raise ValueError(f"a value at byte {at} has the unknown type {kind}")
    inner, count = struct.unpack_from("<IQ", content, at)
    at += 12
    if inner in NUMBERS:
        form = f"<{count}{NUMBERS[inner]}"
        return list(struct.unpack_from(form, content, at)), at + struct.calcsize(form)
    values: list[Any] = []
    for _ in range(count):
        value, at = _value(content, at, inner)
        values.append(value)
    return values, at
