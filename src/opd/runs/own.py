"""A user's own teacher (`models.NAME.scorer`) and sampler (`stages.NAME.sampler`), by name or as Python objects."""

from __future__ import annotations

from opd.errors import ConfigError
from opd.models.language_model import LanguageModel
from opd.pieces.needs import Input, needs_of
from opd.plugins import check_options, checked, import_function, result_of
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
        found = result_of(f"models.{name}.scorer {section.scorer}", section.scorer, student, **section.options)
    return checked(found, Teacher, f"models.{name}.scorer {section.scorer}", "score")


def own_sampler(spec: StageSpec, student: LanguageModel, sampling: Sampling, given: Given) -> Sampler:
    """The result of `sampler(student, sampling, **sampler_options)`. Raises ConfigError if it is not a Sampler."""
    assert spec.sampler is not None
    what = f"{spec.where(None)}: {spec.sampler}"
    found = result_of(what, given.sampler or spec.sampler, student, sampling, **spec.sampler_options)
    return checked(found, Sampler, what, "__call__")
