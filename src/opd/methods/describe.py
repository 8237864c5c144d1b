"""A method's documentation, from its own file: the docstring is the page."""

from __future__ import annotations

import inspect
import sys

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


def markdown() -> str:
    """docs/methods.md, whole."""
    parts = [
        "# Methods",
        "",
        "Generated from the docstrings in `src/opd/methods` by `python -m opd.methods.describe`.",
        "",
    ]
    parts += ["| method | what it is | file |", "|---|---|---|"]
    parts += [f"| [`{n}`](#{n}) | {headline(n)} | `src/opd/methods/{n}.py` |" for n in METHODS]
    for name, function in METHODS.items():
        parts += ["", f"## {name}", "", _fenced(_page(name).strip()), "", inspect.getdoc(function) or "", ""]
        parts += ["```python", f"{name}{inspect.signature(function)}", "```"]
    return "\n".join(parts) + "\n"


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
    print(markdown(), end="")
