"""Rows of a file, an installed package, a task generator, a function, a folder or the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

from opd.data.files import READERS, ArrowRow, Row, ending_of, file_rows, missing
from opd.data.gym import BLOCK, gym_rows
from opd.errors import ConfigError, DataError, OPDError, nearest
from opd.files import expanded
from opd.plugins import RAISED, check_options, import_function, packaged

FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def rows_of(source: str, *, split: str, options: Mapping[str, Any], limit: int | None) -> Iterator[Row]:
    """The rows of `source`, in the forms of `DataSection.path`. Raises ConfigError or DataError."""
    path = expanded(source)
    if source.startswith("package:"):
        return file_rows(packaged(source))
    if source.startswith("reasoning_gym:"):
        return _gym_rows(source, options, limit)
    if not path.is_dir() and (path.is_file() or nearest(ending_of(path), READERS)):
        return file_rows(path)
    if FUNCTION.fullmatch(source):
        return _function_rows(source, options)
    return _datasets_rows(source, path, split, options)


def _gym_rows(source: str, options: Mapping[str, Any], limit: int | None) -> Iterator[Row]:
    task = source.removeprefix("reasoning_gym:")
    of_scorer = {"size": BLOCK, "seed": 0, **options}
    for index, entry in enumerate(gym_rows(task, options, limit)):
        row = {"prompt": entry["question"], "answer": entry["answer"]}
        yield f"Row {index} of {source}", row | {"reasoning_gym": {"task": task, "options": of_scorer, "entry": entry}}


def _function_rows(source: str, options: Mapping[str, Any]) -> Iterator[Row]:
    function = import_function(source)
    check_options(source, function, options)
    try:
        rows = function(**options)
        if not isinstance(rows, Iterable) or isinstance(rows, (str, bytes, Mapping)):
            raise TypeError(f"it returned a {type(rows).__name__}, but must return an iterable of dicts")
        yield from ((f"Row {index} of {source}", row) for index, row in enumerate(rows))
    except OPDError:  # it says what, why and the remedy
        raise
    except RAISED as error:  # any line of the user's function may raise or exit
        why = str(error).removesuffix(".")
        raise DataError(f"{source} failed with {type(error).__name__}: {why}. Correct the function.") from error


def _datasets_rows(source: str, folder: Path, split: str, options: Mapping[str, Any]) -> Iterator[Row]:
    import datasets

    if not folder.is_dir() and not HUB_NAME.fullmatch(source):
        raise missing(folder)
    saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if saved and options:
        raise ConfigError(
            f"{folder} was written by save_to_disk and takes no options, got {sorted(options)}. Remove `options`."
        )
    try:
        if saved:
            data = datasets.load_from_disk(str(folder))
            splits = data if isinstance(data, datasets.DatasetDict) else {"train": data, str(data.split): data}
            data = _split_of(splits, split)
        elif folder.is_dir() and (files := _own_files(folder, options)) is not None:
            yield from _rows_of_split(files, split)
            return
        else:
            path = str(folder) if folder.is_dir() else source
            data = datasets.load_dataset(path, split=split, **options)
    except OPDError:
        raise
    except Exception as error:  # the library raises many undocumented types
        what = "folder" if folder.is_dir() else "hub name (there is no such local file or folder)"
        raise DataError(
            f"`datasets` could not load the split {split!r} of the {what} {source}: {type(error).__name__}: "
            f"{error}. Correct `path`, `split` or `options`, or give a file."
        ) from error
    yield from ((f"Row {index} of {source}", ArrowRow(row)) for index, row in enumerate(data))


def _split_of(splits: Mapping[Any, Any], split: str) -> Any:
    if split not in splits:
        raise KeyError(f"the splits are {', '.join(map(str, splits))}.{nearest(split, map(str, splits))}")
    return splits[split]


def _own_files(folder: Path, options: Mapping[str, Any]) -> dict[str, list[Path]] | None:
    """The files of a folder by split, as `datasets` finds and orders them; None if opd cannot read all of them.

    Read by `datasets`, the rows of a file would have other values than the file: in JSON the text "2024-01-05" becomes
    a datetime, and 3 beside 3.5 becomes 3.0. None also for options, in the call or in the folder's README.md, that say
    how to read the files.
    """
    import datasets

    if set(options) - {"name", "data_dir", "data_files"}:
        return None
    config = datasets.load_dataset_builder(str(folder), **options).config
    found = {str(split): list(map(Path, files)) for split, files in (config.data_files or {}).items()}
    endings = {ending_of(path) for files in found.values() for path in files}
    where = {"name", "version", "data_dir", "data_files", "description"}
    if any(ending.startswith(".tsv") for ending in endings):
        where.add("sep")
    usual = type(config)()
    told = [one.name for one in fields(config) if getattr(config, one.name) != getattr(usual, one.name)]
    readable = endings <= set(READERS) and all(path.is_file() for files in found.values() for path in files)
    return found if found and readable and set(told) <= where else None


def _rows_of_split(files: Mapping[str, list[Path]], split: str) -> Iterator[Row]:
    """The rows of a split: a name, or an expression of `datasets` such as `train[:100]+test`."""
    import datasets

    if split in files:
        yield from chain.from_iterable(map(file_rows, files[split]))
        return
    wanted = datasets.ReadInstruction.from_spec("+".join(files) if split == "all" else split)
    named = [name for name in files if re.search(rf"\b{re.escape(name)}\b", split) or split == "all"]
    rows = {name: list(chain.from_iterable(map(file_rows, files[name]))) for name in named}
    if not rows:
        _split_of(files, split)
    for part in wanted.to_absolute({name: len(every) for name, every in rows.items()}):
        yield from _split_of(rows, part.splitname)[part.from_ : part.to]
