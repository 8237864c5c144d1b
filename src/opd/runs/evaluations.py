"""The evaluations of a stage: their prompts, writers and scorers."""

from __future__ import annotations

from collections.abc import Mapping

from opd.data.prompts import column_of
from opd.environments.conversations import in_conversations
from opd.errors import ConfigError
from opd.evaluation.compare import check_comparable
from opd.evaluation.evaluate import HeldOut
from opd.evaluation.goals import goals_of
from opd.method import Method
from opd.models.language_model import LanguageModel
from opd.models.root import Root
from opd.parallel import World
from opd.pieces.needs import needs_of
from opd.recipe.schema import StageSpec, TaskSection
from opd.runs.prepare import PROMPT_COLUMNS, Prepared
from opd.samplers.writers import TeacherWriter
from opd.stage.exams import Exam, Exams
from opd.stage.folder import StageDir
from opd.stage.progress import Progress
from opd.teachers.local import LocalTeacher
from opd.types import Sampling, Teacher, Writer


def exams_of(
    spec: StageSpec,
    prepared: Prepared,
    student: LanguageModel,
    teacher: Teacher,
    externals: Mapping[str, LanguageModel],
    own: Mapping[str, Teacher],
) -> list[Exam]:
    """The stage's evaluations, with the teacher as writer or scorer where the recipe requests it."""
    exams: list[Exam] = []
    for name, part in spec.by_task.items():
        held_out = prepared.tasks[name].held_out
        if part.evaluate is None or held_out is None:
            continue
        scorer = scorer_of(spec, prepared.method, part, student, teacher, externals, own)
        writers: dict[str, Writer] = {}
        if part.evaluate.teacher and scorer is not None:
            writers = {
                setting: teacher_writer(spec, name, prepared, scorer, student, sampling)
                for setting, sampling in held_out.sampling.items()
            }
        reads, alone = read_by_teacher(prepared.method, held_out, part.evaluate.kl or part.evaluate.teacher)
        if part.evaluate.kl and scorer is not None:
            check_comparable(scorer, f"{spec.where(name)}: evaluate.kl")
        exams.append(
            Exam(
                task=name,
                held_out=held_out,
                every=part.evaluate.every,
                until=goals_of(part.evaluate),
                measure_before=part.evaluate.before,
                context=prepared.method.context,
                reader=None if scorer is None else scorer.lm,
                teacher_writers=writers,
                kl_teacher=scorer if part.evaluate.kl else None,
                scorer=scorer if reads and spec.samples.held_out else None,
                reads_alone=scorer is not None and alone,
            )
        )
    return exams


def read_by_teacher(method: Method, held_out: HeldOut, required: bool) -> tuple[bool, bool]:
    """Whether the method's teacher can read the held-out prompts, and whether without rewards or other responses.

    `required`: the evaluation requests it, so that the data have been checked.
    """
    needs = needs_of(method.context)
    columns = PROMPT_COLUMNS & needs.columns
    there = all(column_of(prompt, name) is not None for prompt in held_out.prompts for name in columns)
    alone = there and not needs.inputs and not needs.undeclared
    return required or alone, alone


def teacher_writer(
    spec: StageSpec, task: str | None, prepared: Prepared, teacher: Teacher, student: LanguageModel, sampling: Sampling
) -> Writer:
    """The writer of a teacher's own responses, or conversations. Raises ConfigError for one that only scores."""
    lm, rules, context = teacher.lm, prepared.tasks[task].rules, prepared.method.context
    if lm is not None:
        return TeacherWriter(
            led=lambda sampler: in_conversations(sampler, lm, sampling, rules, None),
            teacher=lm,
            student=student,
            sampling=sampling,
            context=context,
            base=teacher.base,
            max_prompt_length=spec.max_prompt_length,
        )
    if rules is not None:
        raise ConfigError(
            f"{spec.where(task)}: evaluate.teacher lets the teacher write, and {teacher.name} has no model in this "
            "process, which conversations with an environment need. Set evaluate.teacher to false."
        )
    found = teacher.writer(student, sampling, context, spec.max_prompt_length)
    if found is None:
        raise ConfigError(
            f"{spec.where(task)}: evaluate.teacher lets the teacher write responses, and {teacher.name} only "
            "scores: it has no model in this process. Set evaluate.teacher to false."
        )
    return found


def scorer_of(
    spec: StageSpec,
    method: Method,
    part: TaskSection,
    student: LanguageModel,
    teacher: Teacher,
    externals: Mapping[str, LanguageModel],
    own: Mapping[str, Teacher],
) -> Teacher | None:
    """The teacher of a task's evaluation: the method's, else the task's `teacher`, else None."""
    if method.teacher.kind != "none":
        return teacher.of(part.teacher)
    if part.teacher is not None and part.teacher in own:
        return own[part.teacher]
    if part.teacher is not None and part.teacher in externals:
        return LocalTeacher(
            lm=externals[part.teacher],
            micro_batch_tokens=spec.micro_batch_tokens,
            student_device=student.device,
        )
    return None


def exams_in(
    exams: list[Exam],
    spec: StageSpec,
    student: LanguageModel,
    root: Root,
    folder: StageDir,
    world: World,
    progress: Progress,
) -> Exams:
    """The stage's evaluations, with the folder for their results."""
    return Exams(
        exams=exams,
        student=student,
        world=world,
        root=root,
        folder=folder,
        progress=progress,
        samples=spec.samples,
        micro_batch_tokens=spec.micro_batch_tokens,
    )
