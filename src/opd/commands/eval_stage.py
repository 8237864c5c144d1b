"""A model measured as a stage of a recipe measures its student: `opd eval --recipe` and `opd.evaluate(recipe=...)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from opd.commands.eval import Evaluated, Subject, add, silent, tell
from opd.errors import ConfigError, nearest
from opd.models.language_model import LanguageModel
from opd.models.loading import device_of
from opd.models.vocabularies import on_common_tokens
from opd.recipe.schema import ModelSpec, Recipe, StageSpec, section_of
from opd.runs.measured import Reads, check_measured
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
    read = [Read(model, {name: getattr(student, name) for name in OF_STUDENT}, key_of_template(spec.train))]
    if teacher is not None:
        read.append(Read(teacher, {}, "the chat template of its tokenizer"))
    for one in read:
        one.subject.check()
    objects = {one.subject.name: one.load() for one in read if one.subject.path is None}
    known = [one.before(objects.get(one.subject.name)) for one in read]
    early = [one for one in known if one is not None]
    if len(early) == len(read):
        notes += check_measured(early[0], early[1:], spec, exams)
    lm, *rest = [objects.get(one.subject.name) or one.load() for one in read]
    if len(early) < len(read):  # a tokenizer came with its weights
        late = [Reads.of(loaded, one.template) for loaded, one in zip((lm, *rest), read, strict=True)]
        notes += check_measured(late[0], late[1:], spec, exams)
    lm, others = on_common_tokens(lm, {one.name: one for one in rest}) if rest else (lm, {})
    tell(say, notes, lm, others)
    found = Evaluated(metrics={}, rows=[])
    for task, held_out in exams.items():
        add(held_out, lm, others, spec.micro_batch_tokens, found, task=task)
    return found


@dataclass(frozen=True, slots=True)
class Read:
    """A model, the settings that it is read with, and the name of its chat template in remedies."""

    subject: Subject
    settings: Mapping[str, Any]
    template: str

    def load(self) -> LanguageModel:
        return self.subject.load(**self.settings)

    def before(self, loaded: LanguageModel | None) -> Reads | None:
        """How the model reads; None for one that is not `loaded` and has its tokenizer with its weights."""
        if loaded is not None:
            return Reads.of(loaded, self.template)
        spec = ModelSpec(path=self.subject.path, **self.settings)
        return Reads.before(spec, self.subject.name, self.subject.where, self.template)


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
