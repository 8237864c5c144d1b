"""Rows of a file, an installed package, a task generator, a function, a folder or the hub."""

from __future__ import annotations

import csv
import io
import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from opd.data.gym import gym_task
from opd.errors import ConfigError, DataError, nearest
from opd.plugins import check_options, import_function, packaged

Row: TypeAlias = tuple[str, Any]  # the row's place, for messages; its content


FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def rows_of(source: str, *, split: str, options: Mapping[str, Any], limit: int | None) -> Iterator[Row]:
    """The rows of `source`, in the forms of `DataSection.path`. Raises ConfigError or DataError."""
    path = Path(source).expanduser()
    if source.startswith("package:"):
        return _file_rows(packaged(source))
    if source.startswith("reasoning_gym:"):
        return _gym_rows(source, {"size": limit or 500, "seed": 0, **options})
    if not path.is_dir() and (path.is_file() or nearest(path.suffix.lower(), READERS)):
        return _file_rows(path)
    if FUNCTION.fullmatch(source):
        return _function_rows(source, options)
    return _datasets_rows(source, path, split, options)


def _file_rows(path: Path) -> Iterator[Row]:
    ending = path.suffix.lower()
    if ending not in READERS:
        raise ConfigError(
            f"{path} ends with {ending!r}, which opd does not read.{nearest(ending, READERS)} "
            f"Files end with {', '.join(READERS)}; a function `package.module:function` can read any other file."
        )
    if not path.is_file():
        raise _missing(path)
    return READERS[ending](path)


def _missing(path: Path) -> DataError:
    there = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    listed = ", ".join(there[:10]) or ("nothing" if path.parent.is_dir() else "no such folder")
    near = nearest(path.name, there)
    return DataError(f"{path} does not exist.{near} In {path.parent.resolve()}: {listed}. Correct `path`.")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from error


def _jsonl_rows(path: Path) -> Iterator[Row]:
    # Not `splitlines`: it also splits at U+2028, which JSON strings may hold.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"Line {number} of {path} is not valid JSON: {error.msg} at column {error.colno}, got "
                f"{reprlib.repr(line)}. Every line of a .jsonl file is one JSON object; correct or remove the line."
            ) from error
        yield f"Line {number} of {path}", row


def _json_rows(path: Path) -> Iterator[Row]:
    text = _read_text(path)
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        hint = " One object per line is the format of a .jsonl file: rename it." if error.msg == "Extra data" else ""
        raise DataError(
            f"Line {error.lineno} of {path} is not valid JSON: {error.msg} at column {error.colno}.{hint} "
            "A .json file holds a list of objects."
        ) from error
    if not isinstance(rows, list):
        raise DataError(
            f"{path} holds a {type(rows).__name__}, but a .json file must hold a list of objects. Wrap it in []."
        )
    yield from ((f"Row {index} of {path}", row) for index, row in enumerate(rows))


def _csv_rows(path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        header = next(reader, [])
        for cells in filter(None, reader):
            if len(cells) != len(header) or len(set(header)) < len(header):
                raise csv.Error(f"{len(cells)} cells for the columns {', '.join(header)}; every column needs its own")
            row = {name: cell or None for name, cell in zip(header, cells, strict=True)}
            yield f"Line {reader.line_num} of {path}", row
    except csv.Error as error:
        raise DataError(
            f"Line {reader.line_num} of {path} is not valid CSV: {error}. "
            "Quote a cell that holds a comma or a line break."
        ) from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a readable Parquet file: {error}. Write it again, or correct `path`."
        ) from error
    rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
    yield from ((f"Row {index} of {path}", row) for index, row in enumerate(rows))


READERS = {".json": _json_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows, ".csv": _csv_rows}


def _gym_rows(source: str, options: Mapping[str, Any]) -> Iterator[Row]:
    task = source.removeprefix("reasoning_gym:")
    dataset = gym_task(task, options)
    for index in range(len(dataset)):
        entry = dataset[index]
        row = {"prompt": entry["question"], "answer": entry["answer"]}
        yield f"Row {index} of {source}", row | {"reasoning_gym": {"task": task, "options": options, "entry": entry}}


def _function_rows(source: str, options: Mapping[str, Any]) -> Iterator[Row]:
    function = import_function(source)
    check_options(source, function, options)
    try:
        rows = function(**options)
        if not isinstance(rows, Iterable) or isinstance(rows, (str, bytes, Mapping)):
            raise TypeError(f"it returned a {type(rows).__name__}, but must return an iterable of dicts")
        yield from ((f"Row {index} of {source}", row) for index, row in enumerate(rows))
    except Exception as error:  # any line of the user's function may raise
        why = str(error).removesuffix(".")
        raise DataError(f"{source} failed with {type(error).__name__}: {why}. Correct the function.") from error


def _datasets_rows(source: str, folder: Path, split: str, options: Mapping[str, Any]) -> Iterator[Row]:
    import datasets

    if not folder.is_dir() and not HUB_NAME.fullmatch(source):
        raise _missing(folder)
    saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if saved and options:
        raise ConfigError(
            f"{folder} was written by save_to_disk and takes no options, got {sorted(options)}. Remove `options`."
        )
    try:
        if saved:
            data = datasets.load_from_disk(str(folder))
            splits = data if isinstance(data, datasets.DatasetDict) else {"train": data, str(data.split): data}
            if split not in splits:
                raise KeyError(f"the splits are {', '.join(map(str, splits))}.{nearest(split, map(str, splits))}")
            data = splits[split]
        else:
            path = str(folder) if folder.is_dir() else source
            data = datasets.load_dataset(path, split=split, **options)
    except Exception as error:  # the library raises many undocumented types
        what = "folder" if folder.is_dir() else "hub name (there is no such local file or folder)"
        raise DataError(
            f"`datasets` could not load the split {split!r} of the {what} {source}: {type(error).__name__}: "
            f"{error}. Correct `path`, `split` or `options`, or give a file."
        ) from error
    yield from ((f"Row {index} of {source}", row) for index, row in enumerate(data))
