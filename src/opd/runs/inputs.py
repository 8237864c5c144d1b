"""Fingerprints of what a run reads from outside its folder: rows, models and the user's code.

A resumed run compares them with those of its last start (`opd.stage.starting`).
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from opd.models.paths import source_of
from opd.plugins import import_function
from opd.recipe.schema import Recipe, StageSpec, origin_of
from opd.runs.prepare import Given, Prepared
from opd.stage.starting import Inputs
from opd.types import Prompt

SAMPLES = 16  # places in a file of weights that are read, evenly spaced
BYTES = 1 << 16  # at each place
READ = frozenset({".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt"})  # endings of a model's files
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in the text of a Python object, another in every process


def inputs_of(recipe: Recipe, prepared: Mapping[str, Prepared], given: Given) -> Inputs:
    """The fingerprints by stage and name."""
    return {
        spec.name: {
            **dict(_rows(prepared[spec.name])),
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
    for name in dict.fromkeys((spec.train, *spec.teachers, *spec.judge_models)):
        origin = origin_of(recipe, name)
        if name in given.models or origin.path is None:
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
    named = [spec.method, spec.sampler, *(recipe.models[name].scorer for name in spec.teachers)]
    for part in spec.by_task.values():
        judged = [] if part.reward is None else [one.function for one in part.reward.asks.values()]
        named += [part.reward and part.reward.name, *judged]
        if part.evaluate is not None:
            named.append(part.evaluate.reward and part.evaluate.reward.name)
    functions = [import_function(name) for name in dict.fromkeys(named) if name and _is_own(name)]
    made = [given.reward, given.method, given.sampler, *given.teachers.values()]
    functions += [getattr(one, "function", one) for one in made if one is not None]
    for file in sorted({file for function in functions for file in files_of(function)}):
        yield f"code {file.name}", _hash([file.read_bytes()])


def _is_own(name: str) -> bool:
    return ":" in name and not name.startswith(("opd.", "opd_studies."))


def files_of(function: Any) -> set[Path]:
    """The file of the user's module that has the function or its class, and those that the module imports beside it."""
    target = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    module = sys.modules.get(getattr(target, "__module__", None) or "")
    own = _file(module)
    if module is None or own is None:
        return set()
    imported = [
        value if isinstance(value, ModuleType) else sys.modules.get(getattr(value, "__module__", None) or "")
        for value in vars(module).values()
    ]
    beside = {file for one in imported if (file := _file(one)) is not None and own.parent in file.parents}
    return {own, *beside}


def _file(module: ModuleType | None) -> Path | None:
    """A module's file, unless it is of Python, of an installed package, or of opd."""
    file = getattr(module, "__file__", None)
    if module is None or file is None or module.__name__.split(".")[0] in ("opd", "opd_studies"):
        return None
    path = Path(file).resolve()
    installed = {"site-packages", "dist-packages"} & set(path.parts) or path.is_relative_to(
        Path(sys.base_prefix) / "lib"
    )
    # A module of a notebook may have lost its file.
    return path if path.suffix == ".py" and not installed and path.is_file() else None


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]
