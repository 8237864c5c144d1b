"""Explanations of a recipe's mistakes: unknown keys with their nearest match, wrong values, names of other trainers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from opd.errors import nearest
from opd.recipe.other_names import BY_NAME
from opd.recipe.yaml_text import Source

_KNOWN = " Known here: "  # before the list of a section's keys
_NOT_OURS = ("RewardSection", "JudgeSection")  # sections in which these names mean something else


_EXAMPLES = {  # the shortest section, for a message about a plain value in its place
    "RewardSection": "{{name: {}}}",
    "DataSection": "{{path: {}}}",
    "ModelSpec": "{{path: {}}}",
    "JudgeSection": "{{url: http://localhost:8000/v1, model: NAME}}",
    "EnvironmentSection": "{{name: {}}}, or {{tools: [calculator]}}",
    "Lora": "{{rank: 16}}, or null for full weights",
}


def explain(
    error: ValidationError,
    source: Source,
    section: type[BaseModel],
    *,
    stage_keys: Collection[str] = (),
    overrides: Sequence[str] = (),
) -> str:
    """A validation error as lines with the place, the key, the value it got, and the nearest known key.

    An override may begin with a key of a stage (`stage_keys`), so an unknown key is compared with those too.
    """
    short = {text.partition("=")[0].partition(".")[0] for text in overrides}
    lines: list[str] = []
    for one in error.errors():
        path = ".".join(str(part) for part in one["loc"])
        if one["type"] == "extra_forbidden":
            key, top = str(one["loc"][-1]), len(one["loc"]) == 1
            line = _unknown(path, key, _section_at(one["loc"][:-1], section), stage_keys if top else (), short)
        elif one["type"] == "missing":
            line = f"`{path}` is missing"
        elif one["type"] == "model_type":
            line = _no_section(path, one["input"], _section_at(one["loc"], section))
        else:
            # Do not print a section that its own check refuses: it may hold secrets.
            own = one["type"] == "value_error" and isinstance(one["input"], Mapping)
            got = "" if own else f" (got {one['input']!r:.80})"
            named = _reference(one["input"]) if one["type"] == "string_type" else None
            line = (f"`{path}`: " if path else "") + f"{one['msg']}{got}" + (f". Write {named}" if named else "")
        where = source.where(one["loc"])
        lines.append(f"{where}: {line}" if where else line)
    return f"{source.name} is not valid:\n  " + "\n  ".join(_listed_once(lines))


def _listed_once(lines: Sequence[str]) -> list[str]:
    """The lines with each list of known keys on the last of those that have it: a flat config has twenty of them."""
    kept: list[str] = []
    seen: set[str] = set()
    for line in reversed(lines):
        says, mark, listed = line.rpartition(_KNOWN)
        kept.append(says if mark and listed in seen else line)
        seen.add(listed)
    return kept[::-1]


def _unknown(
    path: str, key: str, section: type[BaseModel] | None, stage_keys: Collection[str], short: Collection[str]
) -> str:
    """The line about an unknown key of `section`; `stage_keys` is empty except at the top of a recipe."""
    known = [] if section is None else list(section.model_fields)
    listed = ", ".join(known)
    if key in stage_keys:
        return f"unknown key `{path}`. It is a key of a stage.{_KNOWN}{listed}"
    if section is not None and (hint := _hint(key, section.__name__)):
        return f"unknown key `{path}`. {hint}{_KNOWN}{listed}"
    near, also = nearest(key, known), ""
    if key in short and stage_keys:
        top, near = near, nearest(key, [*known, *stage_keys])
        also = "" if near and near == top else f"; of a stage: {', '.join(stage_keys)}"
    return f"unknown key `{path}`.{near}{_KNOWN}{listed}{also}"


def _hint(key: str, section: str) -> str:
    """What to say of another trainer's name in a section; empty if it means something else there."""
    row = BY_NAME.get(key)
    if row is None or section in _NOT_OURS:
        return ""
    elsewhere = row.key is not None and row.key.partition(".")[0] != "optimizer"
    return "" if section == "OptimizerSection" and elsewhere else row.says


def _no_section(path: str, got: Any, section: type[BaseModel] | None) -> str:
    """The line about a plain value in place of a section."""
    line = f"{f'`{path}`: ' if path else ''}Input should be a valid dictionary (got {got!r:.80})"
    if section is None:
        return line
    example = _EXAMPLES.get(section.__name__)
    if example is None:
        return f"{line}. Its keys: {', '.join(section.model_fields)}"
    return f"{line}. Write {example.format(got if isinstance(got, str) else _reference(got) or '...')}"


def _section_at(loc: Sequence[int | str], top: type[BaseModel]) -> type[BaseModel] | None:
    """The section at a location below `top`."""
    section: Any = top
    for part in loc:
        if part == getattr(section, "__name__", None):  # pydantic names the branch of a union
            continue
        if isinstance(section, type) and issubclass(section, BaseModel):
            section = section.model_fields[str(part)].annotation if part in section.model_fields else None
        else:  # the value of a dict or an item of a list
            section = get_args(section)[-1] if get_args(section) else section
        section = _first_section(section)
    return section if isinstance(section, type) and issubclass(section, BaseModel) else None


def _first_section(annotation: Any) -> Any:
    """`X | None` -> X; containers and sections stay."""
    options = [a for a in get_args(annotation) if a is not type(None)]
    if options and not hasattr(annotation, "__origin__"):
        sections = [a for a in options if isinstance(a, type) and issubclass(a, BaseModel)]
        return sections[0] if sections else options[0]
    return annotation


def _reference(value: Any) -> str | None:
    """How a recipe names a function or class of the user, `my_module:NAME`; None for another value."""
    name, module = getattr(value, "__qualname__", None), getattr(value, "__module__", None)
    if not callable(value) or name is None or module is None:
        return None
    return f"{module}:{name}" if name.isidentifier() else "my_module:NAME, a function at the top of its file"
