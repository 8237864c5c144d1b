"""Rows of plain values to Parquet and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opd.errors import DataError
from opd.files import write_atomically


def write_table(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows, which all have the same keys, atomically.

    Raises:
        DataError: a column holds values that have no common type.
        RunError: the file could not be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(rows[0]) if rows else []
    assert all(row.keys() == set(names) for row in rows), "rows with different keys"
    columns: dict[str, Any] = {}
    for name in names:
        try:
            columns[name] = pa.array([row[name] for row in rows])
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"{file.name}: column {name!r} mixes types ({error}). Use one type there in every row."
            ) from error
    table = pa.table(columns)
    write_atomically(file, lambda part: pq.write_table(table, part))
    return file


def read_table(file: Path) -> list[dict[str, Any]]:
    """All rows of a file that `write_table` wrote."""
    import pyarrow.parquet as pq

    return pq.read_table(file).to_pylist()
