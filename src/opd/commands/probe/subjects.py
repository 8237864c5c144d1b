"""The teachers and contexts that are compared, from their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from opd.commands.doctor.subject import check_loadable, load
from opd.errors import ConfigError, nearest
from opd.method import Method
from opd.models.language_model import LanguageModel
from opd.models.vocabularies import on_common_tokens
from opd.pieces.contexts import INFORMATION, privileged, same_prompt
from opd.pieces.needs import Input, Trait, needs_of
from opd.pieces.teacher_rules import external, self_live
from opd.recipe.schema import Recipe, StageSpec
from opd.runs.prepare import Given
from opd.teachers.local import LocalTeacher, local_teacher
from opd.types import Context

PLAIN, STAGE = "plain", "stage"


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The student, and the teachers by name, all with one vocabulary."""

    student: LanguageModel
    teachers: Mapping[str, LocalTeacher]

    def scoring_student(self, micro_batch_tokens: int) -> LocalTeacher:
        """The student as a model that scores."""
        return local_teacher(self_live(), self.student, None, micro_batch_tokens=micro_batch_tokens)


def listed(given: Sequence[str]) -> list[str]:
    """The names of a repeated option, each a name, a list with commas, or a template, in which commas are text."""
    names = [name for one in given for name in ([one] if "{" in one else one.split(","))]
    return list(dict.fromkeys(name.strip() if "{" not in name else name for name in names if name.strip()))


def check_teachers(recipe: Recipe, spec: StageSpec, names: Sequence[str]) -> None:
    """Raise ConfigError for a teacher that is no model of the recipe, or none in this process."""
    for name in names:
        if name not in recipe.models:
            raise ConfigError(
                f"--teachers {name}: the recipe has no such model.{nearest(name, recipe.models)} Its models: "
                f"{', '.join(recipe.models)}. Add it under `models`; no stage has to name it."
            )
        check_loadable(recipe, spec.model_copy(update={"teacher": name}))


def contexts_of(names: Sequence[str], method: Method) -> dict[str, Context]:
    """The contexts by name. Raises ConfigError for an unknown one, and for one that differs between responses.

    `plain`: the student's prompt. `stage`: the context of the stage's method. A name of `INFORMATION`: privileged
    information in that form. A text with {prompt}: such a template.
    """
    known: dict[str, Context] = {PLAIN: same_prompt(), STAGE: method.context}
    known |= {
        name: privileged(template=texts.get("template"), prefill=texts.get("prefill"))
        for name, texts in INFORMATION.items()
    }
    found: dict[str, Context] = {}
    for name in names:
        if "{" in name:
            found[name] = privileged(template=name)
        elif name not in known:
            raise ConfigError(
                f"--contexts {name}: there is no such context.{nearest(name, known)} Known: {', '.join(known)}, or a "
                'template, e.g. --contexts "{answer};{prompt}".'
            )
        else:
            found[name] = known[name]
    for name, context in found.items():
        needs = needs_of(context)
        if needs.traits & {Trait.READS_ATTEMPT} or needs.inputs & {Input.GROUP, Input.REWARD}:
            raise ConfigError(
                f"--contexts {name}: this teacher reads the response that it scores, or others to the same prompt. A "
                "node of the tree belongs to many responses, so its teacher can only read what all of them share. Use "
                f"{PLAIN}, answer, solution, hint or history."
            )
    return found


def load_models(recipe: Recipe, spec: StageSpec, names: Sequence[str], given: Given) -> Models:
    """Student and teachers as they are when the stage begins.

    Raises ConfigError for a model of a stage that has not finished, AlignmentError for tokenizers that differ.
    """
    loaded = given
    externals: dict[str, LanguageModel] = {}
    for name in [spec.train, *(name for name in names if name != spec.train)]:
        student, others = load(recipe, spec.model_copy(update={"teacher": name}), loaded)
        loaded = replace(loaded, models={**loaded.models, spec.train: student})
        externals |= others
    student = loaded.models[spec.train]
    if externals:
        student, externals = on_common_tokens(student, externals)

    def teacher_of(name: str) -> LocalTeacher:
        other = externals.get(name)
        return local_teacher(
            self_live() if other is None else external(),
            student,
            other,
            micro_batch_tokens=spec.micro_batch_tokens,
            offload=name in recipe.models and recipe.models[name].offload,
        )

    return Models(student=student, teachers={name: teacher_of(name) for name in names})
