"""`opd methods` and `opd describe`. Both parse the methods' source as text, so that neither imports torch."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from functools import cache
from pathlib import Path

from opd.errors import ConfigError, nearest

HERE = Path(__file__).parents[1]


@cache
def names() -> tuple[str, ...]:
    """Names of the methods, in the order of the registry `opd.methods.METHODS`."""
    tree = ast.parse((HERE / "methods" / "__init__.py").read_text())
    (registry,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "METHODS"
    ]
    assert isinstance(registry, ast.Dict), "the registry is a literal dict"
    return tuple(str(ast.literal_eval(key)) for key in registry.keys if key is not None)


def headline(name: str) -> str:
    """The first line of a method's page."""
    return (ast.get_docstring(_source(name)) or "").splitlines()[0].rstrip(".")


def description(name: str) -> str:
    """The page of a method: citation, formula, symbols, differences, and the options with their defaults.

    A name `my_package.mine:method` is imported. Raises ConfigError for an unknown method.
    """
    page, summary, options = _imported(name) if ":" in name else _read(name)
    lines = [name, "=" * len(name), "", page.strip(), "", summary, ""]
    return "\n".join([*lines, "Options:" if options else "No options.", *(f"  {option}" for option in options)])


def citations(name: str) -> str:
    """BibTeX of the papers that a method's page names by arXiv id, in the order of the page.

    Raises ConfigError for an unknown method, and for a page without an id.
    """
    page = (_imported(name) if ":" in name else _read(name))[0]
    ids = list(dict.fromkeys(re.findall(r"\b(\d{4}\.\d{5})\b", page)))
    if not ids:
        raise ConfigError(f"The page of method {name!r} names no arXiv id: there is nothing to cite.")
    known = papers()
    missing = [f"% {one}: https://arxiv.org/abs/{one}, no entry in opd's list" for one in ids if one not in known]
    return "\n\n".join([*(known[one] for one in ids if one in known), *missing])


@cache
def papers() -> dict[str, str]:
    """BibTeX entries by arXiv id."""
    entries = re.findall(r"^@misc\{.*?^\}", (HERE / "assets" / "papers.bib").read_text(), re.DOTALL | re.MULTILINE)
    found = [(re.search(r"eprint = \{(.+?)\}", entry), entry) for entry in entries]
    return {one.group(1): entry for one, entry in found if one is not None}


def _read(name: str) -> tuple[str, str, list[str]]:
    """(the file's docstring, the function's, its parameters) of a built-in method."""
    tree = _source(name)
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    arguments = function.args.args
    defaults = [None] * (len(arguments) - len(function.args.defaults)) + list(function.args.defaults)
    options = [_option(argument, default) for argument, default in zip(arguments, defaults, strict=True)]
    return ast.get_docstring(tree) or "", ast.get_docstring(function) or "", options


def _option(argument: ast.arg, default: ast.expr | None) -> str:
    kind = "" if argument.annotation is None else f": {ast.unparse(_ExpandAliases().visit(argument.annotation))}"
    return f"{argument.arg}{kind}" + ("" if default is None else f" = {ast.unparse(default)}")


class _ExpandAliases(ast.NodeTransformer):
    """Replaces the type aliases of `opd.types` by their definitions, so that users see the allowed values."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return _aliases().get(node.id, node)


@cache
def _aliases() -> dict[str, ast.expr]:
    return {
        node.target.id: node.value
        for node in ast.parse((HERE / "types.py").read_text()).body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(node.value, ast.Subscript)
        and ast.unparse(node.value.value) == "Literal"
    }


def _source(name: str) -> ast.Module:
    if name not in names():
        raise ConfigError(
            f"There is no method {name!r}.{nearest(name, names())} Known: {', '.join(names())}; your own is named "
            "my_package.mine:method."
        )
    return ast.parse((HERE / "methods" / f"{name}.py").read_text())


def _imported(name: str) -> tuple[str, str, list[str]]:
    """`_read` for a user's own method."""
    from opd.plugins import import_function

    function = import_function(name)
    page = sys.modules[function.__module__].__doc__ or "(no docstring)"
    options = [str(parameter) for parameter in inspect.signature(function).parameters.values()]
    return page, inspect.getdoc(function) or "", options
