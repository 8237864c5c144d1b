"""The methods' part of docs/methods.md, from their own docstrings and signatures."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from opd.errors import ConfigError
from opd.methods import METHODS, build, function_of
from opd.methods.combine import conflict

# Rows of the table of pairs besides the defaults: required options, and settings that allow more combinations.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS},
    "context_distillation": ("context_distillation", {"system": "Answer briefly."}),
    "opd, masked tokens": ("opd", {"mask_tokens": ["<think>"]}),
    "prune_opd, loss sampled": ("prune_opd", {"loss": "sampled"}),
}


def headline(name: str) -> str:
    """The first line of the method file's docstring."""
    return _page(name).splitlines()[0].rstrip(".")


def markdown(folder: Path) -> str:
    """The text of docs/methods.md; `folder` holds the recipes. Raises ConfigError for a method without a recipe."""
    shown = recipes_of(folder)
    parts = [
        "# Methods",
        "",
        "Generated from the docstrings in `src/opd/methods` by `make docs`. A recipe's results are in its header.",
        "",
        "<!-- no block runs: the page is generated -->",
        "",
    ]
    parts += ["| method | what it is | file | recipe |", "|---|---|---|---|"]
    for n in METHODS:
        links = ", ".join(f"[`{recipe}`](../recipes/{recipe}.yaml)" for recipe in shown[n])
        parts.append(f"| [`{n}`](#{n}) | {headline(n)} | `src/opd/methods/{n}.py` | {links} |")
    parts += ["", *pairs()]
    for name, function in METHODS.items():
        parts += ["", f"## {name}", "", _fenced(_page(name).strip()), "", inspect.getdoc(function) or "", ""]
        parts += ["```python", f"{name}{inspect.signature(function)}", "```"]
    return "\n".join(parts) + "\n"


def pairs() -> list[str]:
    """The table of pairs: which methods combine as `method: a+b`, and why the others do not."""
    methods = {row: build(name, options) for row, (name, options) in ROWS.items()}
    reasons: dict[str, int] = {}

    def cell(one: str, other: str) -> str:
        if ROWS[one][0] == ROWS[other][0]:
            return ""
        why = conflict(methods[one], methods[other])
        return "yes" if why is None else str(reasons.setdefault(why, len(reasons) + 1))

    lines = ["| | " + " | ".join(f"`{row}`" for row in ROWS) + " |", "|---" * (len(ROWS) + 1) + "|"]
    for one in ROWS:
        lines.append(f"| `{one}` | " + " | ".join(cell(one, other) for other in ROWS) + " |")
    return [
        "## Two methods in one",
        "",
        "`method: vopd+eff_opd` with `options: {vopd: {...}, eff_opd: {...}}` combines two methods. A part that only",
        "one method sets is taken from it, weights multiply, and filters run one after another. Methods that set the",
        "same other part cannot be combined. Options can change that. With the defaults, or with the row's options:",
        "",
        *lines,
        "",
        *(f"{number}. {why}" for why, number in reasons.items()),
    ]


def recipes_of(folder: Path) -> dict[str, list[str]]:
    """By method, the recipe in `folder` of its name; without one, all recipes with a stage that uses the method.

    Raises ConfigError for a method that no recipe uses, and for a recipe that is not valid.
    """
    from opd.recipe.load import load_recipe

    used = {
        file.stem: {name for stage in load_recipe(file).stages for name in stage.method.split("+")}
        for file in sorted(folder.glob("*.yaml"))
    }
    found = {name: [recipe for recipe, methods in used.items() if name in methods] for name in METHODS}
    if missing := [name for name, recipes in found.items() if not recipes]:
        raise ConfigError(
            f"No recipe in {folder.resolve()} uses {', '.join(missing)}. Write recipes/{missing[0]}.yaml, or run this "
            "in the folder that holds `recipes`."
        )
    return {name: [name] if name in recipes else recipes for name, recipes in found.items()}


def _page(name: str) -> str:
    function = function_of(name)
    return sys.modules[function.__module__].__doc__ or "(no docstring)"


def _fenced(text: str) -> str:
    """The text with indented formulas as code blocks."""
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
