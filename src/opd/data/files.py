"""Rows of files: .jsonl, .json, .csv, .tsv (also as .gz) and .parquet. Values keep the types of the file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import reprlib
import sys
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from opd.errors import ConfigError, DataError, nearest

Row: TypeAlias = tuple[str, Any]  # the row's place, for messages; its content


class ArrowRow(dict[str, Any]):
    """A row that came through Arrow, which gives each object of a column the keys of all of them, with nulls."""


def ending_of(path: Path) -> str:
    """The ending that names a file's format, with that of the compressed file: `.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])


def file_rows(path: Path) -> Iterator[Row]:
    """The rows of one file. Raises ConfigError for an unknown ending, DataError for an unusable file."""
    ending = ending_of(path)
    if ending not in READERS:
        raise ConfigError(
            f"{path} ends with {ending!r}, which opd does not read.{nearest(ending, READERS)} "
            f"Files end with {', '.join(READERS)}; a function `package.module:function` can read any other file."
        )
    if not path.is_file():
        raise missing(path)
    return READERS[ending](path)


def missing(path: Path) -> DataError:
    """The error for a path without a file, with the files that are there."""
    there = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    listed = ", ".join(there[:10]) or ("nothing" if path.parent.is_dir() else "no such folder")
    near = nearest(path.name, there)
    return DataError(f"{path} does not exist.{near} In {path.parent.resolve()}: {listed}. Correct `path`.")


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix.lower() == ".gz" else content
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a readable gzip file: {error}. Compress it again.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from error


def _jsonl_rows(path: Path) -> Iterator[Row]:
    # Not `splitlines`: it also splits at U+2028, which JSON strings may hold.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"Line {number} of {path} is not valid JSON: {_why(error)}, got {reprlib.repr(line)}. Every line of a "
                ".jsonl file is one JSON object; correct or remove the line."
            ) from error
        yield f"Line {number} of {path}", row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a key given twice, of which json would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _why(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "its lists and objects are nested too deeply"
    return f"an integer has more than {sys.get_int_max_str_digits()} digits" if "digits" in str(error) else str(error)


def _json_rows(path: Path) -> Iterator[Row]:
    text = _read_text(path)
    try:
        rows = json.loads(text, object_pairs_hook=_object) if text.strip() else []
    except (ValueError, RecursionError) as error:
        damaged = isinstance(error, json.JSONDecodeError)
        if damaged and error.msg == "Extra data" and not text.lstrip().startswith("["):  # one object per line
            yield from _jsonl_rows(path)
            return
        where = f"Line {error.lineno} of {path}" if damaged else str(path)
        raise DataError(f"{where} is not valid JSON: {_why(error)}. A .json file holds a list of objects.") from error
    if not isinstance(rows, list):
        raise DataError(
            f"{path} holds a {type(rows).__name__}, but a .json file must hold a list of objects. Wrap it in []."
        )
    yield from ((f"Row {index} of {path}", row) for index, row in enumerate(rows))


def _csv_rows(path: Path, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a prompt may be longer than the default, 131,072 characters
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True, delimiter=delimiter)
    try:
        header = next(reader, [])
        for cells in filter(None, reader):
            if len(cells) != len(header) or len(set(header)) < len(header):
                raise csv.Error(f"{len(cells)} cells for the columns {', '.join(header)}; every column needs its own")
            row = {name: cell or None for name, cell in zip(header, cells, strict=True)}
            yield f"Line {reader.line_num} of {path}", row
    except csv.Error as error:
        raise DataError(
            f"Line {reader.line_num} of {path} is not valid {'CSV' if delimiter == ',' else 'TSV'}: {error}. "
            f"Quote a cell that holds a {'tab' if delimiter != ',' else 'comma'} or a line break."
        ) from error


def parquet_file(path: Path) -> Any:
    """An open pyarrow ParquetFile. Raises DataError for a file that is not one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a readable Parquet file: {error}. Write it again, or correct `path`."
        ) from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    rows = (ArrowRow(row) for batch in parquet_file(path).iter_batches() for row in batch.to_pylist())
    yield from ((f"Row {index} of {path}", row) for index, row in enumerate(rows))


_TEXTS = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows, ".tsv": partial(_csv_rows, delimiter="\t")}


READERS = {**_TEXTS, ".parquet": _parquet_rows, **{f"{ending}.gz": read for ending, read in _TEXTS.items()}}
