"""Blocks of a page: JSON and columns of numbers, compressed, which a browser opens when it shows them.

A block is gzip of: the length of the JSON (4 bytes, little endian), the JSON (UTF-8), then the columns in the order of
its `columns`. Each is split into planes, all lowest bytes first: the upper bytes of small numbers compress to nothing.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MISSING = -32768  # of hundredths: NaN and null
LARGEST = 32767
KINDS = {"hundredths": "<i2", "small": "u1", "index": "<u4"}  # as a browser reads them


@dataclass(slots=True)
class Packer:
    """Collects the columns of a block. A row notes how many numbers it gave to each column."""

    parts: dict[str, list[np.ndarray]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    vocabulary: dict[tuple[int, str], int] = field(default_factory=dict)

    def add(self, row: dict[str, int], name: str, kind: str, values: Any) -> None:
        """Append a row's numbers to a column; None adds nothing. `kind` is one of `KINDS`."""
        if values is None:
            return
        array = np.asarray(values)
        self.parts.setdefault(name, []).append(hundredths(array) if kind == "hundredths" else array.astype(KINDS[kind]))
        assert self.kinds.setdefault(name, kind) == kind
        row[name] = len(array)

    def token(self, i: int, text: str) -> int:
        """The place of a token in the block's vocabulary. An id that is part of a character has several texts."""
        return self.vocabulary.setdefault((i, text), len(self.vocabulary))

    def bytes(self, content: Mapping[str, Any]) -> bytes:
        """The block with its vocabulary and columns, and `content` beside them."""
        columns: list[list[Any]] = []
        planes: list[bytes] = []
        for name, parts in self.parts.items():
            whole = np.concatenate(parts)
            columns.append([name, self.kinds[name], len(whole)])
            planes.append(whole.view(np.uint8).reshape(len(whole), -1).T.tobytes())
        head = {**content, "columns": columns}
        if self.vocabulary:
            head["vocabulary"] = list(self.vocabulary)
        text = json.dumps(head, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        data = text.encode()
        return gzip.compress(len(data).to_bytes(4, "little") + data + b"".join(planes), 9, mtime=0)


def hundredths(values: np.ndarray) -> np.ndarray:
    """Numbers as hundredths in 16 bits, to 0.005; beyond 327.67 they are cut, NaN is `MISSING`."""
    numbers = np.asarray(values, dtype=np.float64)
    scaled = np.clip(
        np.nan_to_num(np.round(numbers * 100), nan=0.0, posinf=LARGEST, neginf=-LARGEST), -LARGEST, LARGEST
    )
    return np.where(np.isnan(numbers), MISSING, scaled).astype("<i2")


def plain(content: Mapping[str, Any]) -> bytes:
    """A block of JSON alone."""
    return Packer().bytes(content)


def text_of(block: bytes) -> str:
    """A block as text for a page."""
    return base64.b64encode(block).decode()


def rounded(value: float | None, digits: int = 5) -> float | None:
    """A number of so many digits; None for one that is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def script_json(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or a line."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def opened(block: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A block's JSON and its columns, as a browser reads them; hundredths as float64, NaN where a number is missing."""
    data = gzip.decompress(block)
    size = int.from_bytes(data[:4], "little")
    head = json.loads(data[4 : 4 + size].decode())
    at, columns = 4 + size, dict[str, np.ndarray]()
    for name, kind, count in head["columns"]:
        dtype = np.dtype(KINDS[kind])
        planes = np.frombuffer(data, np.uint8, count * dtype.itemsize, at).reshape(dtype.itemsize, count)
        at += count * dtype.itemsize
        values = np.ascontiguousarray(planes.T).view(dtype).ravel()
        if kind == "hundredths":
            columns[name] = np.where(values == MISSING, np.nan, values / 100)
        else:
            columns[name] = values
    return head, columns


def slices(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The numbers of each row by column, from the counts that it notes under `n`."""
    at = dict.fromkeys(columns, 0)
    out: list[dict[str, np.ndarray]] = []
    for row in rows:
        own: dict[str, np.ndarray] = {}
        for name, count in row["n"].items():
            own[name] = columns[name][at[name] : at[name] + count]
            at[name] += count
        out.append(own)
    return out
