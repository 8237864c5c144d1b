"""The JSON schema of a recipe, for editors: from the models of `schema`, whose comments are the descriptions."""

from __future__ import annotations

import inspect
import io
import json
import re
import tokenize
from functools import cache
from typing import Any

from pydantic import BaseModel

from opd.recipe import schema
from opd.recipe.other_names import ACCEPTED
from opd.recipe.schema import Recipe

_SEVERAL = re.compile(r"(?<!e\.g)(?<!i\.e)\. ")  # the end of a sentence before another
_FIELD = re.compile(r"    (\w+):")


@cache
def sections() -> dict[str, type[BaseModel]]:
    """The sections of a recipe by the name of their class, in the order of the file."""
    found = {name: one for name, one in vars(schema).items() if isinstance(one, type) and issubclass(one, BaseModel)}
    return {name: one for name, one in found.items() if _is_section(one)}


def _is_section(one: type[Any]) -> bool:
    return one.__module__.startswith(f"{schema.__package__}.") and one.__name__ != "Section"


@cache
def descriptions(section: type[BaseModel]) -> dict[str, str]:
    """Key -> the comments of its field: the lines directly above it, then the one behind it. Inherited keys too."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if _is_section(base):
            found |= _comments(inspect.getsource(base))
    return {key: found[key] for key in section.model_fields if key in found}


def _comments(source: str) -> dict[str, str]:
    """Field -> comment, of the text of one class."""
    lines = source.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    behind: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokens:
        if token.type == tokenize.COMMENT:
            row, column = token.start
            text = token.string.lstrip("# ").rstrip()
            (behind if lines[row - 1][:column].strip() else alone)[row] = text
    starts = [row for row, line in enumerate(lines, start=1) if _FIELD.match(line)]
    found: dict[str, str] = {}
    for row in starts:
        above = row
        while above - 1 in alone:
            above -= 1
        end = next((i for i in range(row, len(lines) + 1) if i == len(lines) or _ends(lines, row, i)), row)
        parts = [[alone[i] for i in range(above, row)], [behind[i] for i in range(row, end + 1) if i in behind]]
        match = _FIELD.match(lines[row - 1])
        if match and (text := _sentences([" ".join(part) for part in parts if part])):
            found[match[1]] = text
    return found


def _sentences(parts: list[str]) -> str:
    """The comment above a field and the one behind it as one text; a single sentence has no point at its end."""
    text = ". ".join(part.rstrip(".") for part in parts)
    return f"{text}." if _SEVERAL.search(text) else text.rstrip(".")


def _ends(lines: list[str], row: int, end: int) -> bool:
    """Whether the field that begins in line `row` has ended after line `end`: the next line is no deeper."""
    following = lines[end]
    return not following.startswith("     ") and not following.startswith("    )")


@cache
def recipe_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe's file.

    Looser than `Recipe` in one way: only `name` of a stage is required below the top, because `defaults` and the stage
    of a task may hold the rest. What this schema refuses, `opd check` refuses too.
    """
    whole = _in_words(Recipe.model_json_schema())
    kinds = whole.pop("$defs")
    for name, kind in {"Recipe": whole, **kinds}.items():
        kind.pop("title", None)
        for key, one in kind["properties"].items():
            one.pop("title", None)
            one["description"] = descriptions(sections()[name])[key]
        if name not in ("Recipe", "Characters"):
            kind.pop("required", None)
        for other, key in ACCEPTED.get(name, {}).items():
            own = kind["properties"][key]
            kind["properties"][other] = {**own, "deprecated": True, "description": f"here it is {key}"}
    stage = kinds["StageSpec"]
    stage["required"] = ["name"]
    shared = {"type": "object", "additionalProperties": False, "properties": stage["properties"]}
    whole["properties"]["defaults"] = {**shared, "description": "keys of a stage, for all stages"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of opd",
        "description": "See docs/recipes.md.",
        **{key: value for key, value in whole.items() if key not in ("title", "description")},
        "$defs": kinds,
    }


_WORDS = {"ge": "minimum", "le": "maximum", "gt": "exclusiveMinimum", "lt": "exclusiveMaximum"}


def _in_words(node: Any) -> Any:
    """The schema with the words of JSON schema for bounds, which pydantic leaves in its own behind a validator.

    The bound of 64 bits is left out: readers of JSON in double precision would round it.
    """
    if isinstance(node, list):
        return [_in_words(one) for one in node]
    if not isinstance(node, dict):
        return node
    return {_WORDS.get(key, key): _in_words(value) for key, value in node.items() if value != 2**63 - 1}


def schema_text() -> str:
    """The schema as JSON text, which `opd schema` prints and the package holds."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
