"""A method's documentation, from its own file: the docstring is the page."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from opd.errors import ConfigError
from opd.methods import METHODS, function_of


def headline(name: str) -> str:
    """The first line of the method file's docstring."""
    return _page(name).splitlines()[0].rstrip(".")


def description(name: str) -> str:
    """The page of a method: citation, formula, symbols, differences, and the options with their defaults."""
    function = function_of(name)
    options = [f"  {parameter}" for parameter in inspect.signature(function).parameters.values()]
    lines = [f"{name}", "=" * len(name), "", _page(name).strip(), "", inspect.getdoc(function) or "", ""]
    return "\n".join([*lines, "Options:" if options else "No options.", *options])


def markdown(folder: Path) -> str:
    """docs/methods.md, whole; `folder` holds the recipes. Raises ConfigError for a method that none of them uses."""
    shown = recipes_of(folder)
    parts = [
        "# Methods",
        "",
        "Generated from the docstrings in `src/opd/methods` by `python -m opd.methods.describe`. What a recipe gave",
        "stands in its header.",
        "",
    ]
    parts += ["| method | what it is | file | recipe |", "|---|---|---|---|"]
    for n in METHODS:
        links = ", ".join(f"[`{recipe}`](../recipes/{recipe}.yaml)" for recipe in shown[n])
        parts.append(f"| [`{n}`](#{n}) | {headline(n)} | `src/opd/methods/{n}.py` | {links} |")
    for name, function in METHODS.items():
        parts += ["", f"## {name}", "", _fenced(_page(name).strip()), "", inspect.getdoc(function) or "", ""]
        parts += ["```python", f"{name}{inspect.signature(function)}", "```"]
    return "\n".join(parts) + "\n"


def recipes_of(folder: Path) -> dict[str, list[str]]:
    """By method, the recipe in `folder` that has its name; where there is none, those with a stage that uses it.

    Raises ConfigError for a method that no recipe uses, and for a recipe that is not valid.
    """
    from opd.recipe import load_recipe

    used = {file.stem: {stage.method for stage in load_recipe(file).stages} for file in sorted(folder.glob("*.yaml"))}
    found = {name: [recipe for recipe, methods in used.items() if name in methods] for name in METHODS}
    if missing := [name for name, recipes in found.items() if not recipes]:
        raise ConfigError(
            f"No recipe in {folder.resolve()} uses {', '.join(missing)}. Write one, recipes/{missing[0]}.yaml, or run "
            "this where the folder `recipes` is."
        )
    return {name: [name] if name in recipes else recipes for name, recipes in found.items()}


def _page(name: str) -> str:
    function = function_of(name)
    return sys.modules[function.__module__].__doc__ or "(no docstring)"


def _fenced(text: str) -> str:
    """Indented formulas as code blocks, tables and prose as they are."""
    out: list[str] = []
    inside = False
    for line in text.splitlines():
        formula = line.startswith("    ")
        if inside and line.strip() and not formula:
            while not out[-1]:
                out.pop()
            out += ["```", ""]
            inside = False
        elif formula and not inside:
            out.append("```")
            inside = True
        out.append(line[4:] if formula else line)
    return "\n".join([*out, "```"] if inside else out)


if __name__ == "__main__":
    print(markdown(Path("recipes")), end="")
