"""Who takes part in a stage: the teachers that score, everybody who writes, and who is examined on what."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from opd.contexts import same_prompt
from opd.group_rewards import GroupReward
from opd.held_out import Exam
from opd.method import Method
from opd.models import LanguageModel
from opd.parallel import World
from opd.prepare import Prepared, sampling_of
from opd.recipe import Recipe, StageSpec, TaskSection
from opd.rewards import AnyReward
from opd.samplers.by_task import by_task
from opd.samplers.hf import TransformersSampler
from opd.samplers.writers import ReferenceWriter, TeacherWriter
from opd.teachers.along import reading_along
from opd.teachers.cross_tokenizer import OneTeacher, by_rule, comparable
from opd.teachers.local import LocalTeacher, teacher_for
from opd.teachers.several import SeveralTeachers
from opd.types import Sampler, TeacherRule, Writers


def teacher_of(
    recipe: Recipe,
    spec: StageSpec,
    rule: TeacherRule,
    student: LanguageModel,
    externals: Mapping[str, LanguageModel],
    *,
    chat: bool = False,
) -> OneTeacher | SeveralTeachers | None:
    """Whom the method compares the student with; the teachers of all tasks as one. `externals` are by model name.

    `chat` says that prompts are conversations, for a teacher with a tokenizer of its own.
    """

    def one(name: str | None) -> OneTeacher | None:
        external = None if name is None else externals.get(name)
        offload = name is not None and recipe.models[name].offload
        teacher = teacher_for(rule, student, external, micro_batch_tokens=spec.micro_batch_tokens, offload=offload)
        return by_rule(rule, student, teacher, chat=chat)

    if not spec.tasks or rule.kind != "external":
        return one(spec.teacher)
    teachers = {name: teacher for name in spec.teachers if (teacher := one(name)) is not None}
    return SeveralTeachers(teachers=teachers)


def samplers_of(spec: StageSpec, student: LanguageModel) -> dict[str | None, TransformersSampler]:
    """The student as a writer, for each task with the task's own sampling settings."""
    return {
        name: TransformersSampler(
            lm=student, sampling=sampling_of(part.sampling), max_prompt_length=spec.max_prompt_length
        )
        for name, part in spec.parts.items()
    }


def writers_of(
    spec: StageSpec,
    method: Method,
    student: LanguageModel,
    teacher: OneTeacher | SeveralTeachers | None,
    externals: Mapping[str, LanguageModel],
    samplers: Mapping[str | None, TransformersSampler],
) -> Writers:
    """Everyone who can write a response in this stage, and who scores it meanwhile; a method's source picks."""
    teachers: dict[str | None, Sampler] = {}
    for name, part in spec.parts.items():
        if part.teacher is not None and part.teacher in externals:
            teachers[name] = TeacherWriter(
                teacher=externals[part.teacher],
                student=student,
                sampling=sampling_of(part.teacher_sampling or part.sampling),
                context=same_prompt(),
                max_prompt_length=spec.max_prompt_length,
            )
    reference = ReferenceWriter(student=student, max_prompt_length=spec.max_prompt_length)
    return Writers(
        student=by_task(samplers),
        reference=reference,
        teacher=by_task(teachers) if teachers else None,
        reader=None if teacher is None else reading_along(method, teacher),
    )


def rewards_of(
    recipe: Recipe, prepared: Prepared, judges: Mapping[str, LanguageModel], folder: Path, world: World
) -> dict[str | None, AnyReward | None]:
    """The rewards by task, ready for those that ask somebody: `judges` are the models asked, `folder` keeps answers.

    Raises RunError when what is kept cannot be read.
    """
    origins = {name: recipe.models[name].model_dump(mode="json") for name in judges}
    return {
        name: task.reward.bound(judges, origins, folder / "judges", world.rank)
        if isinstance(task.reward, GroupReward)
        else task.reward
        for name, task in prepared.tasks.items()
    }


def exams_of(
    spec: StageSpec,
    prepared: Prepared,
    student: LanguageModel,
    teacher: OneTeacher | SeveralTeachers | None,
    externals: Mapping[str, LanguageModel],
) -> list[Exam]:
    """The stage's evaluations, with the teacher as a writer and a scorer where the recipe asks for them."""
    exams: list[Exam] = []
    for name, part in spec.parts.items():
        held_out = prepared.tasks[name].held_out
        if part.evaluate is None or held_out is None:
            continue
        scorer = scorer_of(spec, part, student, teacher, externals)
        samplers: dict[str, Sampler] = {}
        if part.evaluate.teacher and scorer is not None:
            samplers = {
                setting: TeacherWriter(
                    teacher=scorer.lm,
                    student=student,
                    sampling=sampling,
                    context=prepared.method.context,
                    base=scorer.base,
                    max_prompt_length=spec.max_prompt_length,
                )
                for setting, sampling in held_out.sampling.items()
            }
        exams.append(
            Exam(
                task=name,
                held_out=held_out,
                every=part.evaluate.every,
                measure_before=part.evaluate.before,
                context=prepared.method.context,
                teacher_samplers=samplers,
                kl_teacher=comparable(scorer) if part.evaluate.kl and scorer is not None else None,
            )
        )
    return exams


def scorer_of(
    spec: StageSpec,
    part: TaskSection,
    student: LanguageModel,
    teacher: OneTeacher | SeveralTeachers | None,
    externals: Mapping[str, LanguageModel],
) -> OneTeacher | None:
    """With whom an evaluation compares the student: the task's teacher, also where the method asks none."""
    if isinstance(teacher, SeveralTeachers):
        return teacher.of(part.teacher)
    if teacher is None and part.teacher is not None and part.teacher in externals:
        return LocalTeacher(
            lm=externals[part.teacher],
            micro_batch_tokens=spec.micro_batch_tokens,
            student_device=student.device,
        )
    return teacher
