"""docs/recipe_reference.md: every key of a recipe, from the models of `schema`.

`python -m opd.recipe.reference` prints it.
"""

from __future__ import annotations

import inspect
import json
from typing import Any

from opd.recipe.json_schema import descriptions, recipe_schema, sections

INTRODUCTION = """# Recipe reference

Every key of a recipe, generated from the models that validate it by `python -m opd.recipe.reference`.
[recipes.md](recipes.md) says how the keys work together, `opd schema` prints the same for editors, and
`opd describe METHOD` has the options of a method.

A dotted path is a place in the file: `stages[].data.path` is the `path` in the `data` of a stage. NAME stands for a
name of yours. `defaults` at the top of a recipe holds keys of a stage, for all stages. On the command line a stage is
given by its name or number: `stages.distil.steps=5`. A key whose default is "required" has to be given; an empty
default is null, or of a section all its own defaults.
"""

SHOWN = 4  # places of a section that a line lists
WORDS = {"minimum": ">=", "maximum": "<=", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}


def markdown() -> str:
    """The text of docs/recipe_reference.md."""
    places = _places()
    parts = [INTRODUCTION]
    parts += [f"- [{_title(found)}](#{_anchor(found)}): {_first(name)}" for name, found in places.items()]
    for name, found in places.items():
        parts += ["", f"## {_title(found)}", "", *_table(name, found, places)]
    return "\n".join(parts) + "\n"


def _places() -> dict[str, list[str]]:
    """The paths at which each section may stand, nearest to the top first, by the section's name; sorted."""
    kinds = _kinds()
    found: dict[str, list[str]] = {"Recipe": [""]}
    queue: list[tuple[str, str, tuple[str, ...]]] = [("Recipe", "", ("Recipe",))]
    while queue:
        name, path, above = queue.pop(0)
        for key, one in kinds[name]["properties"].items():
            for inner, step in _references(one):
                place = f"{path}.{key}{step}".lstrip(".")
                if inner not in above:  # `select.by` is a data section with its own `select`
                    found.setdefault(inner, []).append(place)
                    queue.append((inner, place, (*above, inner)))
    return {name: found[name] for name in sorted(found, key=lambda name: found[name][0])}


def _kinds() -> dict[str, Any]:
    whole = recipe_schema()
    return {"Recipe": whole, **whole["$defs"]}


def _references(node: Any, step: str = "") -> list[tuple[str, str]]:
    """The sections that a value may be, with the step to each: "[]" in a list, ".NAME" in a mapping."""
    if not isinstance(node, dict):
        return []
    if "$ref" in node:
        return [(node["$ref"].rpartition("/")[2], step)]
    inside = [(one, step) for word in ("anyOf", "allOf") for one in node.get(word, [])]
    inside += [(node.get("items"), f"{step}[]"), (_values(node), f"{step}.NAME")]
    return [found for one, at in inside for found in _references(one, at)]


def _values(node: dict[str, Any]) -> Any:
    """The kind of a mapping's values, if the schema says one."""
    return node.get("additionalProperties") or next(iter(node.get("patternProperties", {}).values()), None)


def _title(places: list[str]) -> str:
    """The heading of a section: the place nearest to the top, such as `models.NAME.lora`."""
    return places[0] or "recipe"


def _anchor(places: list[str]) -> str:
    """The heading's anchor, as GitHub makes it."""
    return "".join(c for c in _title(places).lower() if c.isalnum() or c in "-_")


def _first(name: str) -> str:
    """The first sentence of a section's docstring, or the number of its keys."""
    text = inspect.cleandoc(sections()[name].__doc__ or "")
    sentence = " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")
    return f"{sentence[:1].lower()}{sentence[1:]}" if sentence else f"{len(sections()[name].model_fields)} keys"


def _table(name: str, found: list[str], places: dict[str, list[str]]) -> list[str]:
    section, kind = sections()[name], _kinds()[name]
    more = f" and {len(found) - SHOWN - 1} more places" if len(found) > SHOWN + 1 else ""
    also = ", ".join(f"`{place}`" for place in found[1 : SHOWN + 1])
    lines = [f"Also at {also}{more}.", ""] if also else []
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in section.model_fields.items():
        one = kind["properties"][key]
        default = "required" if field.is_required() else _shown(one.get("default"))
        cells = (f"`{key}`", _type(one, places), default, descriptions(section)[key].replace("|", "\\|"))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _shown(value: Any) -> str:
    """A default as it would be written in YAML; nothing for null, and for a section with all its own defaults."""
    if value is None or (isinstance(value, dict) and value):
        return ""
    return f"`{json.dumps(value)}`"


def _type(node: dict[str, Any], places: dict[str, list[str]]) -> str:
    """A value's type in words, with its bounds, and links to sections."""
    if "$ref" in node:
        inner = places[node["$ref"].rpartition("/")[2]]
        return f"[{_title(inner)}](#{_anchor(inner)})"
    for word in ("anyOf", "allOf"):
        if word in node:
            return " or ".join(dict.fromkeys(_type(one, places) for one in node[word] if one.get("type") != "null"))
    if "enum" in node:
        return ", ".join(f"`{json.dumps(one).strip(chr(34))}`" for one in node["enum"])
    if "const" in node:
        return f"`{json.dumps(node['const']).strip(chr(34))}`"
    if node.get("type") == "array":
        inner = node.get("items") or (node.get("prefixItems") or [{}])[0]
        return f"list of {_type(inner, places)}"
    if node.get("type") == "object":
        inner = _values(node)
        return f"names to {_type(inner, places)}" if isinstance(inner, dict) and inner else "mapping"
    bounds = " and ".join(f"{sign} {node[word]:g}" for word, sign in WORDS.items() if word in node)
    simple = {"integer": "integer", "number": "number", "boolean": "true or false", "string": "text"}
    return " ".join(filter(None, (simple.get(node.get("type", ""), "any"), bounds)))


if __name__ == "__main__":
    print(markdown(), end="")
