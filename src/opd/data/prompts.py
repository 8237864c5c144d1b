"""From a data section to `Prompt`s: reads, checks and selects its rows."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from opd.data.rows import FUNCTION, READERS, Row, rows_of
from opd.data.selection import Selected, check_selection, select
from opd.errors import ConfigError, DataError, nearest
from opd.messages import conversation, fields_of, question_of, text_or_none, with_question
from opd.recipe.load import parse_section
from opd.recipe.schema import DataSection
from opd.types import Prompt

COLUMNS = ("prompt", "answer", "response", "privileged_context", "teacher_id")


PROMPT_LIKE = ("question", "problem", "instruction", "query", "input", "text", "messages", "conversations")


def load_prompts(section: DataSection, *, require: Collection[str] = ()) -> list[Prompt]:
    """The selected rows as prompts; a prompt's id is the index of its row, skipped rows included.

    `require` names columns that must be filled.

    The columns read are `prompt` (text, or a list of messages {role, content}), `answer`, `response` (or, in a row
    without it, TRL's `completion`), `privileged_context` and `teacher_id`; other columns go to `metadata`. A
    reasoning-gym row keeps {task, options, entry} in metadata["reasoning_gym"], for the reward of that name. The same
    options give the same rows in every process, except for tasks that iterate over Python sets (word_ladder,
    knight_swap, ransom_note, isomorphic_strings, polynomial_multiplication): these also need a fixed PYTHONHASHSEED.

    Raises ConfigError for contradicting fields, DataError for an unusable file or row.
    """
    return load_selected(section, require=require)[0]


def load_selected(section: DataSection, *, require: Collection[str] = ()) -> tuple[list[Prompt], list[Selected]]:
    """`load_prompts`, and a report of each selection. Raises as `load_prompts`."""
    prompts, selected, columns = _selected_prompts(section)
    require_columns(prompts, require, source=section.path, seen=columns)
    if section.template is not None:
        pattern = section.template
        prompts = [
            replace(p, content=with_question(p.content, lambda text: pattern.format(prompt=text), f"Prompt {p.id}"))
            for p in prompts
        ]
    return prompts, selected


def _selected_prompts(section: DataSection) -> tuple[list[Prompt], list[Selected], list[str]]:
    """(the selected prompts, before the template; the selection's report; the data's columns)."""
    check_data(section)
    stop = None if section.limit is None else section.skip + section.limit
    options = deepcopy(section.options)  # a user's function may change its options
    rows = rows_of(section.path, split=section.split, options=options, limit=stop)
    prompts, columns = _prompts(list(islice(rows, section.skip, stop)), section)
    if section.select is None:
        return prompts, [], columns
    others, of_others = None, list[Selected]()
    if section.select.by is not None:
        theirs, of_others, _ = _selected_prompts(section.select.by)
        others = [question_of(prompt.content) for prompt in theirs]
    kept, selected = select([question_of(p.content) for p in prompts], others, section.select, section.path)
    return [prompts[i] for i in kept], [*of_others, selected], columns


def prompts_of_rows(rows: Iterable[str | Prompt | Mapping[str, Any]], *, chat: bool = False) -> list[Prompt]:
    """Rows given in Python as prompts: strings, mappings with `prompt`, or Prompts (which keep their id).

    Raises DataError as `load_prompts`, and ConfigError for a `chat` that is not a boolean.
    """
    given = list(rows)
    if given and all(isinstance(row, Prompt) for row in given):
        return [row for row in given if isinstance(row, Prompt)]
    mappings = [{"prompt": row} if isinstance(row, str) else row for row in given]
    section = parse_section(DataSection, {"path": "prompts", "chat": chat}, "prompts")
    return _prompts([(f"Row {index} of prompts", row) for index, row in enumerate(mappings)], section)[0]


def _prompts(rows: Sequence[Row], section: DataSection) -> tuple[list[Prompt], list[str]]:
    """All rows as prompts, and the names of their columns."""
    if not rows and section.skip:
        raise DataError(
            f"`skip: {section.skip}` leaves no row of {section.path}: it has no row {section.skip} (counted from 0). "
            "Lower `skip`."
        )
    if not rows:
        raise DataError(f"{section.path} has no rows. Give data with at least one row.")
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise DataError(
                f"{where} is a {type(row).__name__}, got {reprlib.repr(row)}. "
                'A row must be an object with a `prompt`, e.g. {"prompt": "..."}.'
            )
    seen = list(dict.fromkeys(str(column) for _, row in rows for column in row))
    for name, column in section.columns.items():
        if column not in seen:
            raise DataError(
                f"`columns: {{{name}: {column}}}` names a column that {section.path} does not have."
                f"{nearest(column, seen)} Its columns: {', '.join(seen)}."
            )
    return [_prompt(index, where, row, section) for index, (where, row) in enumerate(rows, start=section.skip)], seen


def check_data(section: DataSection) -> None:
    """Raise ConfigError for fields that contradict each other or have no effect."""
    for name in section.columns:
        if name not in COLUMNS:
            raise ConfigError(
                f"`columns` maps opd's column names to the file's, but opd has no column {name!r}."
                f"{nearest(name, COLUMNS)} Known: {', '.join(COLUMNS)}. "
                "Other columns go to the metadata under their own name."
            )
    if section.template is not None:
        fields_of("The `template` of a data section", section.template, ("prompt",), needed="prompt")
    if section.select is not None:
        check_selection(section.select)
    is_file = section.path.startswith("package:") or Path(section.path).suffix.lower() in READERS
    if is_file and section.options:
        raise ConfigError(f"The file {section.path} takes no options, got {sorted(section.options)}. Remove `options`.")
    generated = section.path.startswith("reasoning_gym:") or FUNCTION.fullmatch(section.path)
    if section.split != "train" and (is_file or generated):
        raise ConfigError(
            f"`split: {section.split}`: {section.path} has no splits. Give the path of that split's data."
        )


def _prompt(index: int, where: str, row: Mapping[str, Any], section: DataSection) -> Prompt:
    source = {name: section.columns.get(name, name) for name in COLUMNS}
    if "response" not in section.columns and "response" not in row:
        source["response"] = "completion"
    if source["prompt"] not in row:
        guess = next((name for name in PROMPT_LIKE if name in row), "THE_COLUMN")
        raise DataError(
            f"{where} has no column {source['prompt']!r}.{nearest(source['prompt'], map(str, row))} Its columns: "
            f"{', '.join(map(str, row))}. Name the one that holds the prompt: `columns: {{prompt: {guess}}}`."
        )
    prompt, where_prompt = row[source["prompt"]], f"{where}: `{source['prompt']}`"
    text = {name: text_or_none(row.get(source[name]), f"{where}: `{source[name]}`") for name in COLUMNS[2:]}
    return Prompt(
        id=index,
        content=conversation(prompt, where_prompt, chat=section.chat, system=section.system),
        answer=row.get(source["answer"]),
        response=text["response"],
        privileged_context=text["privileged_context"],
        teacher_id=text["teacher_id"],
        metadata={str(key): value for key, value in row.items() if key not in source.values()},
    )


def require_columns(prompts: Sequence[Prompt], names: Iterable[str], *, source: str, seen: Sequence[str] = ()) -> None:
    """Raise DataError, with the number of rows, if prompts lack one of the columns `names`."""
    for name in names:
        values = (getattr(prompt, name) if name in COLUMNS[1:] else prompt.metadata.get(name) for prompt in prompts)
        empty = [p.id for p, value in zip(prompts, values, strict=True) if value is None or value == ""]
        if empty and name != "prompt":
            which = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
            columns = f" Its columns: {', '.join(seen)}." if seen else ""
            meant = "" if name in seen else nearest(name, seen)
            raise DataError(
                f"This run needs `{name}` in every row, but {len(empty)} of {len(prompts)} rows of {source} have none "
                f"(rows {which}).{meant}{columns} Fill it, or map it with `columns:`."
            )
