"""Rows of a file, a package, a task generator, a function or the hub -> `Prompt`s; and their shuffled order."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from opd.data.rows import FUNCTION, READERS, Row, rows_of
from opd.data.selection import Selected, Selection, check_selection, select
from opd.errors import ConfigError, DataError, nearest
from opd.messages import conversation, fields_of, question_of, text_or_none, with_question
from opd.types import Prompt

COLUMNS = ("prompt", "answer", "response", "privileged_context", "teacher_id")


PROMPT_LIKE = ("question", "problem", "instruction", "query", "input", "text", "messages", "conversations")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Where prompts come from. `path` is one of

    - a file that ends with .json (a list of objects), .jsonl, .parquet or .csv (an empty cell is no value)
    - `package:NAME/FILE`, such a file inside an installed package, which is not imported
    - `reasoning_gym:TASK`, rows of `create_dataset(TASK, **options)`; `size` defaults to `limit` or 500, `seed` to 0
    - `package.module:function`, rows of `function(**options)`, an iterable of dicts
    - a folder or a hub name: `datasets.load_from_disk(path)`, or `load_dataset(path, split=split, **options)`
    """

    path: str
    split: str = "train"  # of a folder or a hub name
    columns: Mapping[str, str] = field(default_factory=dict[str, str])  # our name -> the file's column
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    skip: int = 0  # rows left out at the beginning, e.g. those of an earlier stage
    limit: int | None = None  # rows, from the first that is not skipped
    chat: bool = False  # a text prompt becomes one user message
    system: str | None = None  # a system message before the messages; implies chat
    template: str | None = None  # rewrites the text, or the last user message: what stands there is {prompt}
    select: Selection | None = None  # which of these rows are kept


def spec_of(values: Mapping[str, Any]) -> DataSpec:
    """The spec of a recipe's data section, given as plain values."""
    select = values.get("select")
    if select is None:
        return DataSpec(**values)
    by = select.get("by")
    selection = Selection(**{**select, "by": None if by is None else spec_of(by)})
    return DataSpec(**{**values, "select": selection})


def load_prompts(spec: DataSpec, *, require: Collection[str] = ()) -> list[Prompt]:
    """All rows that are kept as prompts, with id = index of the row, skipped ones counted.

    `require` names columns to be filled.

    Read are `prompt` (text, or a list of messages {role, content}), `answer`, `response` (or, in a row without one,
    TRL's `completion`), `privileged_context` and `teacher_id`; other columns go to `metadata`. A reasoning-gym row
    keeps {task, options, entry} under metadata["reasoning_gym"], so that the reward of that name can score it. The same
    options give the same rows in every process, except for tasks that iterate over Python sets (word_ladder,
    knight_swap, ransom_note, isomorphic_strings, polynomial_multiplication): those also need a fixed PYTHONHASHSEED.

    Raises ConfigError when the spec cannot be meant so, DataError when a file or a row cannot be used.
    """
    return load_selected(spec, require=require)[0]


def load_selected(spec: DataSpec, *, require: Collection[str] = ()) -> tuple[list[Prompt], list[Selected]]:
    """`load_prompts`, and what became of the rows where some were selected. Raises as `load_prompts` does."""
    prompts, selected, seen = _asked(spec)
    require_columns(prompts, require, source=spec.path, seen=seen)
    if spec.template is not None:
        pattern = spec.template
        prompts = [
            replace(p, content=with_question(p.content, lambda text: pattern.format(prompt=text), f"Prompt {p.id}"))
            for p in prompts
        ]
    return prompts, selected


def _asked(spec: DataSpec) -> tuple[list[Prompt], list[Selected], list[str]]:
    """(the prompts that are kept, before the template; what was left out; the data's columns)."""
    _check_spec(spec)
    stop = None if spec.limit is None else spec.skip + spec.limit
    rows = list(islice(rows_of(spec.path, split=spec.split, options=spec.options, limit=stop), spec.skip, stop))
    prompts, seen = _prompts(rows, spec)
    if spec.select is None:
        return prompts, [], seen
    others, of_others = None, list[Selected]()
    if spec.select.by is not None:
        theirs, of_others, _ = _asked(spec.select.by)
        others = [question_of(prompt.content) for prompt in theirs]
    kept, selected = select([question_of(p.content) for p in prompts], others, spec.select, spec.path)
    return [prompts[i] for i in kept], [*of_others, selected], seen


def prompts_of_rows(rows: Iterable[str | Prompt | Mapping[str, Any]], *, chat: bool = False) -> list[Prompt]:
    """Rows that a Python caller has: strings, mappings with `prompt`, or Prompts (which keep their id).

    Raises DataError as `load_prompts` does.
    """
    given = list(rows)
    if given and all(isinstance(row, Prompt) for row in given):
        return [row for row in given if isinstance(row, Prompt)]
    mappings = [{"prompt": row} if isinstance(row, str) else row for row in given]
    spec = DataSpec(path="prompts", chat=chat)
    return _prompts([(f"Row {index} of prompts", row) for index, row in enumerate(mappings)], spec)[0]


def _prompts(rows: Sequence[Row], spec: DataSpec) -> tuple[list[Prompt], list[str]]:
    """All rows as prompts, and the names of their columns."""
    if not rows and spec.skip:
        raise DataError(
            f"`skip: {spec.skip}` leaves nothing of {spec.path}: it has no row {spec.skip} (counted from 0). "
            "Lower `skip`."
        )
    if not rows:
        raise DataError(f"{spec.path} is empty: it has no rows. Give data with at least one row.")
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise DataError(
                f"{where} is a {type(row).__name__}, got {reprlib.repr(row)}. "
                'A row is an object with a `prompt`, e.g. {"prompt": "..."}.'
            )
    seen = list(dict.fromkeys(str(column) for _, row in rows for column in row))
    for name, column in spec.columns.items():
        if column not in seen:
            raise DataError(
                f"`columns: {{{name}: {column}}}` names a column that {spec.path} does not have."
                f"{nearest(column, seen)} Its columns: {', '.join(seen)}."
            )
    return [_prompt(index, where, row, spec) for index, (where, row) in enumerate(rows, start=spec.skip)], seen


def _check_spec(spec: DataSpec) -> None:
    for name in spec.columns:
        if name not in COLUMNS:
            raise ConfigError(
                f"`columns` maps our names to the file's, and {name!r} is none of ours.{nearest(name, COLUMNS)} "
                f"Known: {', '.join(COLUMNS)}. Other columns go to the metadata under their own name."
            )
    if spec.skip < 0:
        raise ConfigError(f"`skip` is a number of rows, at least 0, got {spec.skip}.")
    if spec.limit is not None and spec.limit < 1:
        raise ConfigError(f"`limit` is a number of rows, at least 1, got {spec.limit}. Leave it out to read all.")
    if spec.template is not None:
        fields_of("The `template` of a data section", spec.template, ("prompt",), needed="prompt")
    if spec.select is not None:
        check_selection(spec.select)
    is_file = spec.path.startswith("package:") or Path(spec.path).suffix.lower() in READERS
    if is_file and spec.options:
        raise ConfigError(f"A file has no options, and {spec.path} got {sorted(spec.options)}. Remove `options`.")
    generated = spec.path.startswith("reasoning_gym:") or FUNCTION.fullmatch(spec.path)
    if spec.split != "train" and (is_file or generated):
        raise ConfigError(f"`split: {spec.split}`: {spec.path} has no splits. Give the path of that split's own data.")


def _prompt(index: int, where: str, row: Mapping[str, Any], spec: DataSpec) -> Prompt:
    source = {name: spec.columns.get(name, name) for name in COLUMNS}
    if "response" not in spec.columns and "response" not in row:
        source["response"] = "completion"
    if source["prompt"] not in row:
        guess = next((name for name in PROMPT_LIKE if name in row), "THE_COLUMN")
        raise DataError(
            f"{where} has no column {source['prompt']!r}.{nearest(source['prompt'], map(str, row))} Its columns: "
            f"{', '.join(map(str, row))}. Name the one that holds the prompt: `columns: {{prompt: {guess}}}`."
        )
    asked = (row[source["prompt"]], f"{where}: `{source['prompt']}`")
    text = {name: text_or_none(row.get(source[name]), f"{where}: `{source[name]}`") for name in COLUMNS[2:]}
    return Prompt(
        id=index,
        content=conversation(*asked, chat=spec.chat, system=spec.system),
        answer=row.get(source["answer"]),
        response=text["response"],
        privileged_context=text["privileged_context"],
        teacher_id=text["teacher_id"],
        metadata={str(key): value for key, value in row.items() if key not in source.values()},
    )


def require_columns(prompts: Sequence[Prompt], names: Iterable[str], *, source: str, seen: Sequence[str] = ()) -> None:
    """Raise DataError unless every prompt has all of the columns `names`, saying how many have not."""
    for name in names:
        values = (getattr(prompt, name) if name in COLUMNS[1:] else prompt.metadata.get(name) for prompt in prompts)
        empty = [p.id for p, value in zip(prompts, values, strict=True) if value is None or value == ""]
        if empty and name != "prompt":
            which = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
            columns = f" Its columns: {', '.join(seen)}." if seen else ""
            meant = "" if name in seen else nearest(name, seen)
            raise DataError(
                f"This run needs `{name}` in every row, and {len(empty)} of {len(prompts)} rows of {source} have none "
                f"(rows {which}).{meant}{columns} Fill it, or map it with `columns:`."
            )
