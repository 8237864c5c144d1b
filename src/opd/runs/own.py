"""A user's own teacher (`models.NAME.scorer`) and sampler (`stages.NAME.sampler`), by name or as Python objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opd.errors import ConfigError, OPDError
from opd.models.language_model import LanguageModel
from opd.pieces.needs import Input, needs_of
from opd.plugins import RAISED, check_options, import_function
from opd.recipe.schema import ModelSpec, Recipe, StageSpec
from opd.runs.prepare import Given, Prepared
from opd.runs.served import check_served
from opd.types import Sampler, Sampling, Teacher


def check_own(recipe: Recipe, spec: StageSpec, prepared: Prepared, given: Given) -> list[str]:
    """Import the user's own teachers and sampler of a stage and check their options, before weights are loaded.

    Returns one line for each. Raises ConfigError.
    """
    lines: list[str] = []
    if spec.sampler is not None and given.sampler is None:
        function = import_function(spec.sampler)
        check_options(f"{spec.where(None)}: sampler {spec.sampler}", function, spec.sampler_options, given=2)
        lines.append(f"responses are sampled by {spec.sampler}")
    for name in (spec.train, *spec.scoring):
        section = recipe.models[name]
        if section.local:
            continue
        scorer, kind = section.scorer, f"models.{name}.{'server' if section.scorer is None else 'scorer'}"
        if name == spec.train:
            raise ConfigError(
                f"{spec.where(None)}: `train: {name}`, and {kind} makes a teacher, which has no weights "
                "to train. Train a model with `path` or `init`."
            )
        if name in spec.teachers and Input.TEACHER_MODEL in needs_of(prepared.method.source).inputs:
            raise ConfigError(
                f"{spec.where(None)}: in method {spec.method!r} the teacher writes responses, and {kind} "
                "makes one that only scores. Use a method in which the student writes, or a teacher with `path`."
            )
        if scorer is None:
            lines += check_served(spec, name, section, prepared.method)
            continue
        if name not in given.teachers:
            what = f"models.{name}.scorer {scorer}"
            check_options(what, import_function(scorer), recipe.models[name].options, given=1)
        role = "teacher" if name in spec.teachers else "base"
        lines.append(f"{role} {name}: scored by {scorer}, created when the stage begins")
    return lines


def own_teacher(name: str, section: ModelSpec, student: LanguageModel, given: Given) -> Teacher:
    """The teacher given in Python, else `scorer(student, **options)`. Raises ConfigError if it is not a Teacher."""
    assert section.scorer is not None
    found = given.teachers.get(name)
    if found is None:
        found = _made(f"models.{name}.scorer {section.scorer}", section.scorer, student, **section.options)
    return checked(found, Teacher, f"models.{name}.scorer {section.scorer}")


def own_sampler(spec: StageSpec, student: LanguageModel, sampling: Sampling, given: Given) -> Sampler:
    """The result of `sampler(student, sampling, **sampler_options)`. Raises ConfigError if it is not a Sampler."""
    assert spec.sampler is not None
    what = f"{spec.where(None)}: {spec.sampler}"
    return checked(_made(what, given.sampler or spec.sampler, student, sampling, **spec.sampler_options), Sampler, what)


def _made(what: str, maker: str | Callable[..., Any], *given: Any, **options: Any) -> Any:
    """The result of the user's `maker`. Raises ConfigError if it raises."""
    function = import_function(maker) if isinstance(maker, str) else maker
    try:
        return function(*given, **options)
    except OPDError:
        raise
    except RAISED as error:
        raise ConfigError(
            f"{what} raised {type(error).__name__}: {error}. Correct the function or its options."
        ) from error


def checked(found: Any, protocol: Any, what: str) -> Any:
    """`found`, if it has all members of `protocol`. Raises ConfigError."""
    missing = sorted(name for name in dir(protocol) if not name.startswith("_") and not hasattr(found, name))
    if "__call__" in vars(protocol) and not callable(found):
        missing.append("__call__")
    if missing:
        raise ConfigError(
            f"{what} returned a {type(found).__name__}, not a {protocol.__name__}: it lacks {', '.join(missing)}. "
            f"Derive its class from opd.types.{protocol.__name__}, which has defaults for all but "
            f"{'`score`' if protocol is Teacher else '`__call__`'}."
        )
    return found
