"""Fingerprints of what a run reads from outside its folder: rows, models and the user's code.

A resumed run compares them with those of its last start (`opd.stage.starting`).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from opd.environments.registry import TEXTARENA
from opd.files import expanded
from opd.models.paths import source_of
from opd.plugins import import_function
from opd.recipe.schema import Recipe, StageSpec, origin_of
from opd.runs.prepare import Given, Prepared
from opd.stage.starting import Inputs
from opd.types import Prompt

SAMPLES = 16  # places in a file of weights that are read, evenly spaced
BYTES = 1 << 16  # at each place
READ = frozenset({".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt", ".py"})  # endings of a model's files
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in the text of a Python object, another in every process


def inputs_of(recipe: Recipe, prepared: Mapping[str, Prepared], given: Given) -> Inputs:
    """The fingerprints by stage and name."""
    return {
        spec.name: {
            **{k: v for one in reversed(prepared[spec.name].views) for k, v in _rows(one)},
            **dict(_models(recipe, spec, given)),
            **dict(_code(recipe, spec, prepared[spec.name], given)),
        }
        for spec in recipe.stages
    }


def _rows(prepared: Prepared) -> Iterator[tuple[str, str]]:
    for name, task in prepared.tasks.items():
        of_task = "" if name is None else f" of task {name}"
        yield f"training rows{of_task}", rows_fingerprint(task.prompts)
        if task.held_out is not None:
            yield f"held-out rows{of_task}", rows_fingerprint(task.held_out.prompts)


def rows_fingerprint(prompts: Sequence[Prompt]) -> str:
    """The number of rows, and a hash of all their fields."""
    return f"{len(prompts)} rows, {_hash(_ADDRESS.sub('', repr(prompt)).encode() for prompt in prompts)}"


def _models(recipe: Recipe, spec: StageSpec, given: Given) -> Iterator[tuple[str, str]]:
    for name in spec.models:
        origin = origin_of(recipe, name)
        if name in given.models:
            continue
        if isinstance(origin.tokenizer, str) and (place := expanded(origin.tokenizer)).is_dir():
            yield f"tokenizer of model {name}", model_fingerprint(place)
        if origin.path is None:
            continue
        source = source_of(origin, name)
        for what, place in (("weights", source.weights), *(("adapter", one) for one in source.adapters)):
            if isinstance(place, Path):
                yield f"{what} of model {name}", model_fingerprint(place)


def model_fingerprint(place: Path) -> str:
    """The number of files of a model, and a hash of their names, sizes and contents; of weights, samples of them."""
    files = sorted(file for file in place.iterdir() if file.is_file()) if place.is_dir() else [place]
    files = [file for file in files if file.suffix in READ]
    return f"{len(files)} files, {_hash(part for file in files for part in _parts(file))}"


def _parts(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    yield f"{file.name} {size}".encode()
    with file.open("rb") as opened:
        if size <= SAMPLES * BYTES:
            yield opened.read()
            return
        for i in range(SAMPLES):
            opened.seek((size - BYTES) * i // (SAMPLES - 1))
            yield opened.read(BYTES)


def _code(recipe: Recipe, spec: StageSpec, prepared: Prepared, given: Given) -> Iterator[tuple[str, str]]:
    named = [spec.method, spec.sampler, *(recipe.models[name].scorer for name in spec.scoring)]
    for part in spec.by_task.values():
        judged = [] if part.reward is None else [one.function for one in part.reward.asks.values()]
        named += [part.reward and part.reward.name, *judged]
        if (talks := part.environment) is not None:
            named += [*talks.tools, *([] if talks.name.startswith(TEXTARENA) else [talks.name])]
        if part.evaluate is not None:
            named.append(part.evaluate.reward and part.evaluate.reward.name)
    own = [name for name in dict.fromkeys(named) if name and _is_own(name)]
    made = [given.reward, given.method, given.sampler, *given.teachers.values()]
    functions = [import_function(name) for name in own]
    functions += [getattr(one, "function", one) for one in made if one is not None]
    modules = {name.partition(":")[0] for name in own}.union(*map(modules_of, functions))
    for name, file in sorted(own_code(modules).items()):
        yield f"code {name}", _hash([file.read_bytes()])


def _is_own(name: str) -> bool:
    return ":" in name and not name.startswith(("opd.", "opd_studies."))


def own_code(modules: Iterable[str]) -> dict[str, Path]:
    """The user's files that some loaded modules are made of, by a name that no two of them share.

    These are the files of the modules, wherever they are, and those that they import, also in functions and through
    each other: outside of installed packages, or in the package of the module. An import by a text, as of `importlib`,
    and files that are read as data are not found.
    """
    found: dict[str, Path] = {}
    left = [(name, _file(sys.modules.get(name), name.partition(".")[0])) for name in modules]
    while left:
        name, file = left.pop()
        if file is None or (label := _label(name, file)) in found:
            continue
        found[label] = file
        top = name.partition(".")[0]
        for one in _imported(name, file):
            left.append((one, _file(sys.modules.get(one), top) if one in sys.modules else _unloaded(one, top)))
    return found


def modules_of(function: Any) -> set[str]:
    """The module of a function or of an object's class; of a `functools.partial` that of its function."""
    while isinstance(function, partial):
        function = function.func
    target = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    return {target.__module__} if isinstance(getattr(target, "__module__", None), str) else set()


def _label(name: str, file: Path) -> str:
    """A module's name as a path: unlike a file's name, no two modules share it."""
    if name == "__main__":
        return file.name
    return name.replace(".", "/") + ("/__init__.py" if file.name == "__init__.py" else ".py")


def _imported(name: str, file: Path) -> Iterator[str]:
    """The modules that a file's import statements name, and the packages that hold them; some names are no module's."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # of a module that a function imports, and may never
        return
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{one.name}" for one in node.names]
        for dotted in names:
            parts = dotted.split(".")
            yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


def _unloaded(name: str, top: str) -> Path | None:
    """The file of a module that is not loaded, if it is the user's. Loads nothing."""
    spec, where = None, None
    for i in range(name.count(".") + 1):
        part = ".".join(name.split(".")[: i + 1])
        spec = None if i == 0 and part in sys.stdlib_module_names else PathFinder.find_spec(part, where)
        if spec is None or (i < name.count(".") and spec.submodule_search_locations is None):
            return None
        where = spec.submodule_search_locations
    return _users(name, spec and spec.origin, top)


def _file(module: ModuleType | None, top: str) -> Path | None:
    return None if module is None else _users(module.__name__, getattr(module, "__file__", None), top)


def _users(name: str, file: str | None, top: str) -> Path | None:
    """A module's file, unless it is of opd, of Python, or of another installed package than `top`."""
    package = name.partition(".")[0]
    if file is None or package in ("opd", "opd_studies"):
        return None
    path = Path(file).resolve()
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    if not installed and path.is_relative_to(Path(sys.base_prefix) / "lib"):
        return None
    # A module of a notebook may have lost its file.
    return path if path.suffix == ".py" and (not installed or package == top) and path.is_file() else None


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]
