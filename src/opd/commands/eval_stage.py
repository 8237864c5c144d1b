"""A model measured as a stage of a recipe measures its student: `opd eval --recipe` and `opd.evaluate(recipe=...)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from opd.commands.eval import Evaluated, Read, Subject, add, loaded_models, silent, tell
from opd.errors import ConfigError, nearest
from opd.models.loading import device_of
from opd.recipe.schema import Recipe, StageSpec, section_of
from opd.runs.prepare import prepare_held_out
from opd.runs.tokenizers import key_of_template

OF_STUDENT = (
    *("dtype", "autocast", "device", "attn_implementation", "trust_remote_code", "chat_template"),
    "template_options",
)


def evaluate_as_stage(
    model: Subject,
    recipe: Recipe,
    *,
    stage: str | None = None,
    limit: int | None = None,
    teacher: Subject | None = None,
    seed: int | None = None,
    say: Callable[[str], None] = silent,
) -> Evaluated:
    """Measure a model as a stage of a recipe measures its student: `evaluate` of that stage.

    Prompts, environment, reward, sampling settings and random numbers are the stage's, so a model that the stage saved
    has the numbers of its last evaluation. The model has the template, data type and device of the recipe's student.
    Metrics are named SETTING/WHAT, with tasks TASK/SETTING/WHAT. `limit`: of the prompts of each task. `seed`: the
    default is the recipe's. With `teacher`, also the exact divergence from it, both models reading the same prompt.
    What both read is checked before weights are loaded, as far as their tokenizers are known; `say` receives the
    warnings. Raises the errors of `opd.errors`.
    """
    spec = measured_stage(recipe, stage)
    exams, notes = prepare_held_out(spec, recipe.seed if seed is None else seed)
    exams = {task: replace(held_out, prompts=held_out.prompts[:limit]) for task, held_out in exams.items()}
    student = section_of(recipe, spec.train)
    if model.path is not None:
        device_of(student, f"models.{spec.train}")  # a wrong one is named by its key
    settings = {name: getattr(student, name) for name in OF_STUDENT}
    read = Read(subject=model, settings=settings, template=key_of_template(spec.train))
    by_place = {spec.where(task): held_out for task, held_out in exams.items()}
    chat = "set evaluate.data.chat: true"
    lm, others, more = loaded_models(read, None if teacher is None else Read(subject=teacher), by_place, chat=chat)
    notes += more
    tell(say, notes, lm, others)
    found = Evaluated(metrics={}, rows=[])
    for task, held_out in exams.items():
        add(held_out, lm, others, spec.micro_batch_tokens, found, task=task)
    return found


def measured_stage(recipe: Recipe, name: str | None) -> StageSpec:
    """The stage of this name; default: the last that evaluates. Raises ConfigError."""
    known = {stage.name: stage for stage in recipe.stages}
    able = [stage.name for stage in recipe.stages if any(part.evaluate for part in stage.by_task.values())]
    if name is not None and name not in known:
        raise ConfigError(
            f"The recipe has no stage {name!r} to measure a model by.{nearest(name, known)} It has {', '.join(known)}."
        )
    if not able or (name is not None and name not in able):
        what = "no stage of this one has an" if name is None else f"stage {name!r} has no"
        raise ConfigError(
            f"A model is measured as a stage of the recipe measures its student, and {what} `evaluate` section. "
            + (f"Stages with one: {', '.join(able)}." if able else "Add one, or give prompts and a reward instead.")
        )
    return known[able[-1] if name is None else name]
