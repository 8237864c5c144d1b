"""From a data section to `Prompt`s: reads, checks and selects its rows."""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from opd.data.columns import (
    COLUMNS,
    Converted,
    check_unicode,
    each_turn,
    prompt_of,
    with_places,
    without_answer,
)
from opd.data.files import READERS, ArrowRow, Row, ending_of
from opd.data.images import images_in
from opd.data.rows import FUNCTION, rows_of
from opd.data.selection import Selected, check_selection, select
from opd.data.upsampling import Upsampled, check_upsampling, upsample
from opd.errors import ConfigError, DataError, nearest
from opd.messages import conversation, fields_of, question_of, with_question
from opd.recipe.load import parse_section
from opd.recipe.schema import DataSection
from opd.types import Prompt

Report: TypeAlias = Selected | Converted | Upsampled  # a line about a data section


def load_prompts(section: DataSection, *, require: Collection[str] = ()) -> list[Prompt]:
    """The selected rows as prompts; a prompt's id is the index of its row, skipped rows included.

    With `assistant_turns: each` a row becomes a prompt for each turn of the assistant; the id is the prompt's index.

    `require` names columns that must be filled.

    The columns read are `prompt` (text, or a list of messages {role, content}), `answer`, `response` (or, in a row
    without it, TRL's `completion`), `privileged_context`, `teacher_id`, and for the chat template `tools` and
    `chat_template_kwargs`; other columns go to `metadata`. A reasoning-gym row keeps {task, options, entry} in
    metadata["reasoning_gym"], for the reward of that name. The same options give the same rows in every process.

    Raises ConfigError for contradicting fields, DataError for an unusable file or row.
    """
    return load_selected(section, require=require)[0]


def load_selected(section: DataSection, *, require: Collection[str] = ()) -> tuple[list[Prompt], list[Report]]:
    """`load_prompts`, and a report of each conversion and selection. Raises as `load_prompts`."""
    prompts, reports, columns = _selected_prompts(section)
    require_columns(prompts, require, source=section.path, seen=columns)
    if section.upsample is not None:
        if section.assistant_turns == "each":  # copies get ids that are no rows
            prompts = [replace(p, metadata={"row": p.id, **p.metadata}) if p.turns else p for p in prompts]
        prompts, more = upsample(prompts, section.upsample, section.path)
        reports = [*reports, more]
    prompts = _turned(prompts, section)
    if section.template is not None:
        pattern = section.template
        prompts = [
            replace(p, content=with_question(p.content, lambda text: pattern.format(prompt=text), f"Prompt {p.id}"))
            for p in prompts
        ]
    return prompts, reports


def _selected_prompts(section: DataSection) -> tuple[list[Prompt], list[Report], list[str]]:
    """(the selected prompts, before the template; reports of conversions and selection; the data's columns)."""
    check_data(section)
    stop = None if section.limit is None else section.skip + section.limit
    options = deepcopy(section.options)  # a user's function may change its options
    rows = rows_of(section.path, split=section.split, options=options, limit=stop)
    prompts, columns, converted = _prompts(list(islice(rows, section.skip, stop)), section)
    if section.select is None:
        return prompts, [*converted], columns
    others, of_others = None, list[Report]()
    if section.select.by is not None:
        theirs, of_others, _ = _selected_prompts(section.select.by)
        others = [_compared(prompt) for prompt in theirs]
    kept, selected = select([_compared(prompt) for prompt in prompts], others, section.select, section.path)
    of_others = [one for one in of_others if isinstance(one, Selected)]  # only the questions of `by` are read
    return [prompts[i] for i in kept], [*converted, *of_others, selected], columns


def _compared(prompt: Prompt) -> str:
    """The text by which a selection compares rows: equal words about another image are another question.

    Of a row with several responses it is the question before the first, which all of them have.
    """
    return "\n".join([question_of(prompt.content), *(image.digest for image in prompt.images)])


def prompts_of_rows(rows: Iterable[str | Prompt | Mapping[str, Any]], **fields: Any) -> list[Prompt]:
    """Rows given in Python as prompts: strings, mappings with `prompt`, or Prompts (which keep their id).

    `fields` are those of a data section that say how to read a row: `chat`, `system`, `columns`, `last_assistant`,
    `assistant_turns`.
    Raises DataError as `load_prompts`, and ConfigError for wrong fields.
    """
    return read_rows(rows, **fields)[0]


def read_rows(rows: Iterable[str | Prompt | Mapping[str, Any]], **fields: Any) -> tuple[list[Prompt], list[Converted]]:
    """`prompts_of_rows`, and a report of each conversion."""
    through_arrow = type(rows).__module__.partition(".")[0] == "datasets"
    given = _listed(rows)
    section = parse_section(DataSection, {"path": "prompts", **fields}, "prompts")
    check_data(section)
    made = [row for row in given if isinstance(row, Prompt)]
    if made and len(made) == len(given):
        pairs = [without_answer(_checked(prompt), f"Prompt {prompt.id}", section) for prompt in made]
        return _turned([prompt for prompt, _ in pairs], section), _counted([said for _, said in pairs], section)
    mappings = [{"prompt": row} if isinstance(row, str) else row for row in given]
    if through_arrow:
        mappings = [ArrowRow(row) if isinstance(row, Mapping) else row for row in mappings]
    prompts, _, converted = _prompts([(f"Row {index} of prompts", row) for index, row in enumerate(mappings)], section)
    return _turned(prompts, section), converted


def _listed(rows: Any) -> list[Any]:
    """The rows of an iterable. Raises DataError for one that is iterated by the names of its columns or splits."""
    if isinstance(rows, Mapping):
        names = ", ".join(repr(name) for name in list(rows)[:8])
        raise DataError(
            f"prompts is a {type(rows).__name__} with the keys {names}, but must be a list of rows. Give one split "
            "of a DatasetDict, such as prompts['train'], or a list with one object per row."
        )
    if hasattr(rows, "columns"):
        raise DataError(
            f"prompts is a {type(rows).__name__}, a table that is iterated by its columns. Give its rows: "
            "to_dict('records') of pandas, to_dicts() of polars, to_pylist() of pyarrow."
        )
    if not isinstance(rows, Iterable):
        raise DataError(f"prompts is {rows!r:.80} ({type(rows).__name__}). Give a path, or a list of rows.")
    return list(rows)


def _checked(prompt: Prompt) -> Prompt:
    """A Prompt of the caller's, whose messages a row could have, too."""
    where = f"Prompt {prompt.id}"
    check_unicode(prompt, where)
    content = prompt.content if isinstance(prompt.content, str) else conversation(prompt.content, where)
    turns = conversation(prompt.turns, f"{where}: `turns`") if prompt.turns else ()
    assert not isinstance(turns, str)
    shown = {name: images_in(getattr(prompt, name), where, Path()) for name in ("images", "privileged_images")}
    return with_places(replace(prompt, content=content, turns=turns, **shown), where, Path())[0]


def _counted(said: Sequence[Sequence[str]], section: DataSection) -> list[Converted]:
    """The rows' conversions, counted."""
    counts = Counter(one for of_row in said for one in of_row)
    return [Converted(source=section.path, count=n, rows=len(said), what=what) for what, n in counts.items()]


def _prompts(rows: Sequence[Row], section: DataSection) -> tuple[list[Prompt], list[str], list[Converted]]:
    """All rows as prompts, the names of their columns, and the conversions."""
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
    pairs = [prompt_of(index, where, row, section) for index, (where, row) in enumerate(rows, start=section.skip)]
    for (where, _), (prompt, _) in zip(rows, pairs, strict=True):
        check_unicode(prompt, where)
    return [prompt for prompt, _ in pairs], seen, _counted([said for _, said in pairs], section)


def _turned(prompts: list[Prompt], section: DataSection) -> list[Prompt]:
    """The prompts; with `assistant_turns: each` one for each turn, numbered in order, as several are of one row."""
    if section.assistant_turns != "each":
        return prompts
    return [replace(one, id=i) for i, one in enumerate(one for prompt in prompts for one in each_turn(prompt))]


def check_data(section: DataSection) -> None:
    """Raise ConfigError for fields that contradict each other or have no effect."""
    for name in section.columns:
        if name not in COLUMNS:
            raise ConfigError(
                f"`columns` maps opd's column names to the file's, but opd has no column {name!r}."
                f"{nearest(name, COLUMNS)} Known: {', '.join(COLUMNS)}. "
                "Other columns go to the metadata under their own name."
            )
    if section.assistant_turns != "last" and section.last_assistant != "response":
        raise ConfigError(
            f"`assistant_turns: {section.assistant_turns}` makes every turn of the assistant a response, and "
            f"`last_assistant: {section.last_assistant}` takes the last one away. Remove one of them."
        )
    if section.template is not None:
        fields_of("The `template` of a data section", section.template, ("prompt",), needed="prompt")
    if section.select is not None:
        check_selection(section.select)
    if section.upsample is not None:
        check_upsampling(section.upsample)
    is_file = section.path.startswith("package:") or ending_of(Path(section.path)) in READERS
    if is_file and section.options:
        raise ConfigError(f"The file {section.path} takes no options, got {sorted(section.options)}. Remove `options`.")
    generated = section.path.startswith("reasoning_gym:") or FUNCTION.fullmatch(section.path)
    if section.split != "train" and (is_file or generated):
        raise ConfigError(
            f"`split: {section.split}`: {section.path} has no splits. Give the path of that split's data."
        )


def require_columns(prompts: Sequence[Prompt], names: Iterable[str], *, source: str, seen: Sequence[str] = ()) -> None:
    """Raise DataError, with the number of rows, if prompts lack one of the columns `names`."""
    for name in names:
        values = (column_of(prompt, name) for prompt in prompts)
        empty = [p.id for p, value in zip(prompts, values, strict=True) if _is_empty(value)]
        if empty and name != "prompt":
            which = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
            columns = f" Its columns: {', '.join(seen)}." if seen else ""
            meant = "" if name in seen else nearest(name, seen)
            raise DataError(
                f"This run needs `{name}` in every row, but {len(empty)} of {len(prompts)} rows of {source} have none "
                f"(rows {which}).{meant}{columns} Fill it, or map it with `columns:`."
            )


def column_of(prompt: Prompt, name: str) -> Any:
    """The value of a column: of opd's own, or of the metadata. None if the row has none."""
    if name == "response" and prompt.turns:  # the last of them may be a call, without a text
        return prompt.turns
    value = getattr(prompt, name) if name in COLUMNS[1:] else prompt.metadata.get(name)
    return None if isinstance(value, tuple) and not value else value


def _is_empty(value: Any) -> bool:
    """None, an empty text, or NaN, which tables hold in place of a missing value."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))
