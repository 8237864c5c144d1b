"""Whether two models of a stage have the same weights, so that their difference says nothing."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING

from opd.errors import ConfigError
from opd.method import Method
from opd.models.paths import source_of
from opd.pieces.contexts import same_prompt
from opd.pieces.needs import Input, needs_of
from opd.plugins import torch
from opd.recipe.schema import Recipe, StageSpec, origin_of
from opd.runs.prepare import Given
from opd.types import teachers_in

if TYPE_CHECKING:
    from torch import nn

# Methods whose teacher is the student, with more in its prompt.
SELF_TAUGHT = ("context_distillation", "opsd", "sdft", "sdpo", "anti_sd", "visd", "gui_sd")

REMEDY = (
    f"Name another model as the teacher, or use a method in which the student teaches itself with more information: "
    f"{' or '.join(SELF_TAUGHT)}."
)


FROZEN = (
    "Name a frozen copy as the base: another entry in `models` with the same `path` or `from_stage`; or train with "
    "`lora`, whose base is the student without its adapter."
)


def check_other_weights(recipe: Recipe, spec: StageSpec, method: Method, given: Given) -> list[str]:
    """Refuse teachers that all have the student's weights when the stage begins. Returns notes.

    Student and teacher that read the same prompt then agree everywhere, so the loss and its gradient are zero, now and
    after every step. A teacher that reads another prompt, one of several teachers, and a method that also learns from
    rewards get a note. A teacher that is the student's own Python object would change with it. Raises ConfigError.
    """
    if method.teacher.kind != "external":
        return []
    names = {name for part in spec.by_task.values() for name in teachers_in(part.teacher)}
    same = sorted(name for name in names if _same_start(recipe, spec, name, given))
    if not same:
        return []
    what = f"{spec.where(None)}: the teacher {same[0]!r} has the weights of the student {spec.train!r}"
    objects = [given.models[name].model for name in (*same, spec.train) if name in given.models]
    if spec.train in given.models and any(one is objects[-1] for one in objects[:-1]):
        raise ConfigError(f"{what}: it is the same Python object, which training changes. {REMEDY}")
    if len(same) == len(names) and _same_prompt(recipe, spec, same[0], method, given) and not _rewarded(method):
        raise ConfigError(
            f"{what}, and reads the same prompt, so every loss of method {spec.method!r} would be 0 and no step would "
            f"change the student. {REMEDY}"
        )
    return [f"teacher {name} has the weights of the student {spec.train} when the stage begins" for name in same]


def untrained_teachers(recipe: Recipe, spec: StageSpec) -> list[str]:
    """Lines about teachers that no earlier stage trains, though one trains another model from the same folder."""
    names = [stage.name for stage in recipe.stages]
    before = recipe.stages[: names.index(spec.name)]
    trained = {stage.train: stage.name for stage in before}
    lines: list[str] = []
    for name in spec.teachers:
        own = recipe.models[name]
        if own.path is None or name in trained:
            continue
        twins = [
            other for other in trained if other not in (name, spec.train) and origin_of(recipe, other).path == own.path
        ]
        lines += [
            f"the teacher {name} is {own.path} as it was, and stage {trained[other]} has trained {other} from the same "
            f"weights: name {other} as the teacher, or give {name} `from_stage: {trained[other]}`, if that one should "
            "teach"
            for other in twins
        ]
    return lines


def check_base_weights(recipe: Recipe, spec: StageSpec, method: Method, given: Given) -> None:
    """Refuse a base that changes with the student, and one that is the teacher reading the same prompt.

    The student without its adapter is a base; the student itself is none. A base with the weights that the student has
    when the stage begins is the usual one. Raises ConfigError.
    """
    base = spec.base
    if base is None:
        return
    objects = [given.models[name].model for name in (base, spec.train) if name in given.models]
    if base != spec.train and len(objects) == 2 and objects[0] is objects[1]:
        raise ConfigError(
            f"{spec.where(None)}: the base {base!r} is the same Python object as the student, which training changes. "
            f"{FROZEN}"
        )
    if base == spec.train and not _has_adapter(recipe, base, given):
        raise ConfigError(
            f"{spec.where(None)}: the base is the model {base!r} that the stage trains. With p as its own base, lambda "
            f"log q - log p - (lambda - 1) log p is lambda (log q - log p): no extrapolation, only longer steps. "
            f"{FROZEN}"
        )
    if method.context is not same_prompt() or method.teacher.kind != "external" or base == spec.train:
        return
    teachers = {part.teacher for part in spec.by_task.values() if part.teacher is not None}
    if same := sorted(name for name in teachers if _same_start(recipe, spec, name, given, base)):
        raise ConfigError(
            f"{spec.where(None)}: the base {base!r} has the weights of the teacher {same[0]!r} and reads the same "
            "prompt, so their ratio is 1 and the base changes nothing. Name the model that the teacher was trained "
            "from, or the student as it was before the stage."
        )


def _has_adapter(recipe: Recipe, name: str, given: Given) -> bool:
    """Whether a model that the stage trains has an adapter that can be switched off."""
    if name in given.models:
        return given.models[name].adapters
    origin = origin_of(recipe, name)
    return recipe.models[name].lora is not None or (origin.path is not None and bool(source_of(origin, name).adapters))


def _same_start(recipe: Recipe, spec: StageSpec, name: str, given: Given, other: str | None = None) -> bool:
    """Whether a model begins the stage with the weights of `other`, by default the student's."""
    other = other or spec.train
    both = [given.models.get(one) for one in (name, other)]
    if name == other:
        return True
    if both[0] is not None and both[1] is not None:
        return equal_weights(both[0].model, both[1].model)
    return both == [None, None] and start_of(recipe, spec, name) == start_of(recipe, spec, other)


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same parameters, by name and value."""
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(
        p.shape == theirs[name].shape and torch.equal(p, theirs[name].to(p)) for name, p in ours.items()
    )


def start_of(recipe: Recipe, spec: StageSpec, name: str) -> Hashable:
    """What determines a model's weights when the stage begins; equal for equal weights, whatever the path's spelling.

    New adapters have no effect, because they start at zero.
    """
    before = recipe.stages[: [stage.name for stage in recipe.stages].index(spec.name)]
    trained = [stage.name for stage in before if name in stage.trains]
    if trained or recipe.models[name].from_stage is not None:
        return trained[-1] if trained else recipe.models[name].from_stage
    model = origin_of(recipe, name)
    if model.path is not None:
        source = source_of(model, name)
        return tuple(p.resolve() if isinstance(p, Path) else p for p in (source.weights, *source.adapters))
    if model.init is None or model.seed is None:  # other names give other weights
        return (name,)
    return json.dumps([model.init, model.seed, model.model_dump(mode="json")["tokenizer"]], sort_keys=True, default=str)


def check_common_start(recipe: Recipe, spec: StageSpec, given: Given) -> None:
    """Refuse several models that do not go back to the same weights: their mean would be noise.

    Models in `given` are not asked where they come from: they must have the same shapes, which is all that is known,
    unless the recipe describes them. Raises ConfigError.
    """
    for name in spec.peers:
        both = [given.models[one].model for one in (spec.train, name) if one in given.models]
        shapes = [{key: tuple(p.shape) for key, p in model.named_parameters()} for model in both]
        if len(both) == 2 and shapes[0] != shapes[1]:
            raise ConfigError(
                f"{spec.where(None)}: {spec.train!r} and {name!r} have weights of other names or shapes, so they have "
                "no mean. Train models of one architecture, with the same `lora`."
            )
    described = [name for name in spec.trains if name in recipe.models]
    starts = {name: _root_of(recipe, name) for name in described}
    for name, start in starts.items():
        if start != starts[described[0]]:
            raise ConfigError(
                f"{spec.where(None)}: {described[0]!r} and {name!r} do not begin with the same weights, and the mean "
                "of models from different starts is no model. Give both the same `path`, the same `from_stage`, or "
                "stages that began with the same model."
            )


def _root_of(recipe: Recipe, name: str) -> Hashable:
    """What determines the weights that all training of a model began with."""
    while (stage := recipe.models[name].from_stage) is not None:
        name = recipe.stage(stage).train
    return start_of(recipe, recipe.stages[0], name)


def _same_prompt(recipe: Recipe, spec: StageSpec, teacher: str, method: Method, given: Given) -> bool:
    names = (spec.train, teacher)
    origins = [origin_of(recipe, name) for name in names]
    reads = [(one.chat_template, one.template_options) for one in origins]
    templates = [given.models[name].tokenizer.chat_template for name in names if name in given.models]
    return method.context is same_prompt() and reads[0] == reads[1] and len({str(one) for one in templates}) < 2


def _rewarded(method: Method) -> bool:
    return Input.REWARD in needs_of(method.credit, method.signal).inputs
