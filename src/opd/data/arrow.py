"""Between tensors and the columns of Arrow: numbers, and lists of them, keep every bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from opd.errors import DataError
from opd.plugins import torch

if TYPE_CHECKING:
    from torch import Tensor

NUMBERS = {"integers": np.int64, "floating-point numbers": np.float32, "booleans": np.bool_}


def shape_of(kind: Any) -> tuple[int, str]:
    """(the depth of lists in a type, what they hold), the same for every width of number and kind of list."""
    depth = 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    for what, holds in (
        ("integers", pa.types.is_integer),
        ("floating-point numbers", pa.types.is_floating),
        ("booleans", pa.types.is_boolean),
        ("texts", lambda one: pa.types.is_string(one) or pa.types.is_large_string(one)),
    ):
        if holds(kind):
            return depth, what
    return depth, str(kind)


def holds_messages(kind: Any) -> bool:
    """Whether a type is that of a list of messages, as `datasets` writes them: a list of structs."""
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type)


def described(kind: Any) -> str:
    """What a column of a type of `records` holds, in words."""
    depth, what = shape_of(kind)
    return (what, f"lists of {what}", f"lists of lists of {what}")[depth]


def column_values(batch: Any, name: str, kind: Any, rows: Sequence[str]) -> list[Any]:
    """The values of a column by row, None for null: a Python value, or a tensor [T] or [T, K].

    `kind` is the type in which `records` writes the column; the batch's own has the same `shape_of`. `rows` are the
    places of the rows for messages. Raises DataError for a null inside a list, and for a ragged list of lists.
    """
    column = batch.column(name)
    depth, what = shape_of(kind)
    if not depth:
        return column.to_pylist()
    scalars = [column[i] for i in range(len(column))]
    return [
        None if not one.is_valid else _tensor(one.values, depth, NUMBERS[what], f"{row}: `{name}`")
        for one, row in zip(scalars, rows, strict=True)
    ]


def _tensor(values: Any, depth: int, dtype: Any, where: str) -> Tensor:
    """One row's list as a tensor. Raises DataError, which begins with `where`, for a null or a ragged list."""
    if values.null_count:
        place = values.is_null().to_pylist().index(True)
        raise DataError(f"{where} has a null at position {place}. Fill it, or make the whole value null.")
    if depth == 1:
        return torch.from_numpy(np.array(values.to_numpy(zero_copy_only=False), dtype=dtype))
    lengths = set(values.value_lengths().to_pylist()) if not pa.types.is_fixed_size_list(values.type) else {0}
    if len(lengths) > 1:
        raise DataError(
            f"{where} has between {min(lengths)} and {max(lengths)} entries at a position, but needs equally many at "
            "all positions of a row. Cut or fill them."
        )
    flat = _tensor(values.flatten(), depth - 1, dtype, where)
    return flat.reshape(len(values), len(flat) // max(1, len(values)))


def lists(values: Sequence[Tensor | None], kind: Any) -> Any:
    """Tensors [T] or [T, K] as lists of a type, None as null."""
    if all(value is None for value in values):
        return pa.nulls(len(values), kind)
    held = [None if value is None else value.cpu() for value in values]
    depth, _ = shape_of(kind)
    inner = kind.value_type
    number = (inner.value_type if depth == 2 else inner).to_pandas_dtype()
    flat: Any = pa.array(np.concatenate([value.numpy().astype(number).ravel() for value in held if value is not None]))
    if depth == 2:
        widths = np.concatenate([np.repeat(value.shape[1], len(value)) for value in held if value is not None])
        flat = pa.ListArray.from_arrays(_offsets(widths), flat, type=inner)
    lengths = np.array([0 if value is None else len(value) for value in held])
    absent = pa.array([value is None for value in held])
    return pa.ListArray.from_arrays(_offsets(lengths), flat, type=kind, mask=absent)


def _offsets(lengths: Any) -> Any:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
