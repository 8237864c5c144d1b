"""A stage's evaluations on held-out prompts: of the student before, during and after training, and of the teachers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch import nn

from opd.errors import ConfigError, DataError, TeacherError, nearest
from opd.evaluation.divergence import exact_divergence
from opd.evaluation.evaluate import HeldOut, Sampled, kl_setting, measure, student_samplers
from opd.evaluation.goals import not_measured, remedy_of
from opd.evaluation.recovery import as_metrics, recovered
from opd.models.language_model import LanguageModel
from opd.parallel import World
from opd.recipe.schema import SamplesSection
from opd.rewards.base import extracted
from opd.stage.folder import StageDir
from opd.stage.kept_responses import KeptResponses
from opd.stage.looks import OnTheWay, columns_or_note
from opd.stage.progress import Progress
from opd.stage.samples import NOTHING, read_by, sample_rows
from opd.types import Context, Prompt, Rollout, Teacher, Writer

COMPARED = 64  # responses of which the pass of `evaluate.kl` gives the file's columns
BEFORE = ("teacher", "before")  # the evaluations before the first step, by the names of their files


def when_after(done: int) -> str:
    """The name of the evaluation after `done` updates."""
    return f"step_{done:06d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """One task's evaluation: what and when. A stage without tasks has a single exam with task None."""

    held_out: HeldOut
    every: int
    until: Mapping[str, Mapping[str, float]]  # by setting and metric, the numbers with which the stage may end
    measure_before: bool
    context: Context
    reader: LanguageModel | None = None  # the teacher's model, if it is in this process
    task: str | None = None
    teacher_writers: Mapping[str, Writer] = field(default_factory=dict[str, Writer])
    kl_teacher: Teacher | None = None
    scorer: Teacher | None = None  # of the files' columns, if the held-out prompts have what it reads
    reads_alone: bool = False  # `scorer` reads a prompt without rewards or other responses

    @property
    def prefix(self) -> str:
        """That of its metrics' names."""
        return "eval/" if self.task is None else f"eval/{self.task}/"

    def check_goals(self, metrics: Mapping[str, float]) -> None:
        """Refuse a goal that the evaluation does not have. Raises ConfigError."""
        for setting, goals in self.until.items():
            start = f"eval/{setting}/"
            found = {key.removeprefix(start): value for key, value in metrics.items() if key.startswith(start)}
            if (name := not_measured(goals, found)) is not None:
                raise ConfigError(
                    f"{'' if self.task is None else f'Task {self.task!r}: '}evaluate.until.{setting} names {name!r}, "
                    f"and the evaluation has no such number.{nearest(name, found)} It has {', '.join(found)}. "
                    f"{remedy_of(name)}"
                )

    def extracted(self, rollout: Rollout) -> str | None:
        """The part of a response that the reward compares, if it says."""
        return extracted(self.held_out.reward, rollout.prompt, rollout.last_text)

    def due(self, done: int) -> bool:
        """Whether to measure after `done` updates (the end of a stage is measured anyway)."""
        return self.every > 0 and done % self.every == 0


# Metrics, and the responses as rows of a file; no rows in processes that do not write.
Measured: TypeAlias = tuple[dict[str, float], list[dict[str, Any]]]
Known: TypeAlias = Mapping[int, Mapping[str, Any]]  # columns by the place of the row in its setting


@dataclass(slots=True, kw_only=True)
class Exams:
    """Measures the student, and the teachers once, on the held-out prompts.

    Metrics are named eval/..., with tasks eval/TASK/...; the teacher's eval/teacher/... or eval/TASK/teacher/....
    """

    exams: Sequence[Exam]
    student: LanguageModel
    world: World
    root: nn.Module  # the student's, for gathering its weights
    folder: StageDir
    micro_batch_tokens: int
    progress: Progress
    samples: SamplesSection = SamplesSection()

    @property
    def kept(self) -> KeptResponses:
        """The responses of an evaluation that was stopped; to be cleared once its metrics are written."""
        return KeptResponses(self.folder.path / "evaluating", self.world)

    def due(self, done: int) -> bool:
        """Whether any exam is due after `done` updates."""
        return any(exam.due(done) for exam in self.exams)

    def before(self) -> dict[str, float]:
        """Measure the teachers' responses, if configured, and the untrained student."""
        with self.world.gathered(self.root):
            out = self._measure("teacher", [exam for exam in self.exams if exam.teacher_writers], self._taught)
            return out | self._measure("before", [exam for exam in self.exams if exam.measure_before], self._student)

    def after(self, done: int, *, finished: bool) -> dict[str, float]:
        """Measure the student after `done` updates: the due exams, or all if `finished`.

        Also all if the due ones reach what ends the stage.
        """
        due = [exam for exam in self.exams if finished or exam.due(done)]
        rest = [exam for exam in self.exams if not (finished or exam.due(done))]
        when = when_after(done)
        with self.world.gathered(self.root):
            measured = self._measure(when, due, self._student, rest)
        return measured | self._recovered(when, [*due, *(rest if self.reached(measured) else ())])

    @property
    def goals(self) -> dict[str, float]:
        """`evaluate.until` of all tasks: what the metrics of these names have to reach."""
        return {
            f"{exam.prefix}{setting}/{metric}": goal
            for exam in self.exams
            for setting, goals in exam.until.items()
            for metric, goal in goals.items()
        }

    def reached(self, measured: Mapping[str, float]) -> bool:
        """Whether one evaluation reaches all goals; False without goals, and where one was not measured."""
        goals = self.goals
        return bool(goals) and all(measured.get(name, -math.inf) >= goal for name, goal in goals.items())

    def _recovered(self, when: str, exams: Sequence[Exam]) -> dict[str, float]:
        """The share of each teacher's lead that was recovered, for tasks with measurements before and of the teacher.

        Reads the files of responses, which survive an interruption; only in the process that writes them.
        """
        if not self.folder.writes:
            return {}
        before, teacher, after = map(self.folder.read_held_out, ("before", "teacher", when))
        out: dict[str, float] = {}
        for exam in exams:
            found = recovered(before, teacher, after, exam.task, exam.held_out.sampling)
            out |= as_metrics(found, exam.task)
        return out

    def _measure(
        self, when: str, exams: Sequence[Exam], how: Callable[[Exam, str], Measured], at_goal: Sequence[Exam] = ()
    ) -> dict[str, float]:
        """The metrics of some exams, and of `at_goal` if these reach the goals; writes all responses to one file."""
        out: dict[str, float] = {}
        rows: list[dict[str, Any]] = []

        def add(some: Sequence[Exam]) -> None:
            for exam in some:
                metrics, written = how(exam, when)
                out.update({exam.prefix + key.removeprefix("eval/"): value for key, value in metrics.items()})
                rows.extend({"when": when, **row} for row in written)

        add(exams)
        if self.reached(out):
            add(at_goal)
        if rows:
            self.folder.write_held_out(when, rows)
        return out

    def _around(self, exam: Exam, when: str) -> Callable[[str, Sampled], list[Rollout]]:
        """Shows a setting's evaluation, and samples only what is not kept."""
        settings, task = list(exam.held_out.sampling), "" if exam.task is None else f"{exam.task}, "

        def around(setting: str, sampled: Sampled) -> list[Rollout]:
            self.progress.phase(f"{self.folder.path.name}: held out ({when}), {task}{setting}")
            name = f"{when}.{exam.task or ''}.{settings.index(setting)}"
            found = self.kept.read(name, exam.held_out.prompts, exam.held_out.sampling[setting])
            if found is None:
                found = sampled()
                self.kept.write(name, found)
            return found

        return around

    def _taught(self, exam: Exam, when: str) -> Measured:
        taught = measure(exam.held_out, exam.teacher_writers, self.world, self._around(exam, when))
        metrics = {key.replace("eval/", "eval/teacher/", 1): v for key, v in taught.metrics.items()}
        known: dict[str, Known] = {name: {} for name in taught.rollouts}
        return metrics, self._rows(exam, when, taught.rollouts, known, by_teacher=True)

    def _student(self, exam: Exam, when: str) -> Measured:
        samplers = student_samplers(exam.held_out, self.student)
        measured = measure(exam.held_out, samplers, self.world, self._around(exam, when))
        exam.check_goals(measured.metrics)
        metrics = dict(measured.metrics)
        known: dict[str, Known] = {}
        if exam.kl_teacher is not None:
            compared = measured.rollouts[kl_setting(exam.held_out.sampling)]
            on_the_way = OnTheWay(k=self.samples.top_k, rows=COMPARED if self.samples.held_out else 0)
            self.progress.phase(f"{self.folder.path.name}: held out ({when}), divergence from the teacher")
            divergences = exact_divergence(
                self.student,
                exam.kl_teacher,
                compared,
                exam.context,
                micro_batch_tokens=self.micro_batch_tokens,
                world=self.world,
                look=on_the_way.look,
            )
            metrics |= {f"eval/{name}": value for name, value in divergences.items()}
            parts = self.world.gather(on_the_way.columns(compared, self.student.tokenizer))
            columns = {place: row for part in parts for place, row in part.items()}
            known = {name: columns for name, rollouts in measured.rollouts.items() if rollouts is compared}
        return metrics, self._rows(exam, when, measured.rollouts, known)

    def _rows(
        self,
        exam: Exam,
        when: str,
        written: Mapping[str, list[Rollout]],
        known: Mapping[str, Known],
        *,
        by_teacher: bool = False,
    ) -> list[dict[str, Any]]:
        """The responses by setting as rows.

        `known` has the settings whose responses the teacher read or wrote, with the columns that are known so.
        """
        rows: list[dict[str, Any]] = []
        for name, rollouts in written.items() if self.folder.writes else ():
            # The teacher wrote its own responses before there was a text or a reward.
            seen = [replace(one, text="", reward=None) for one in rollouts] if by_teacher else rollouts
            contexts = exam.context(seen) if name in known else self._context_or_note(exam, when, name, seen)
            read = [NOTHING] * len(rollouts)
            if contexts is not None and exam.reader is not None:
                read = read_by({one.prompt.teacher_id: exam.reader for one in rollouts}, rollouts, contexts)
            own = sample_rows(
                rollouts,
                self.student.tokenizer,
                teacher_reads=read,
                by_teacher=by_teacher,
                extract=exam.extracted,
                sampling=name,
            )
            self._add_columns(exam, f"held out ({when}), {name}", own, rollouts, contexts, known.get(name, {}))
            rows += own
        return rows

    def _context_or_note(
        self, exam: Exam, when: str, name: str, rollouts: Sequence[Rollout]
    ) -> Sequence[Prompt] | None:
        """What the teacher reads before responses that no measurement has it read; None if it cannot."""
        try:
            return None if exam.scorer is None else exam.context(rollouts)
        except (DataError, TeacherError) as error:
            self.progress.note(f"held out ({when}), {name}: the file has no columns of the teacher: {error}")
            return None

    def _add_columns(
        self,
        exam: Exam,
        what: str,
        rows: list[dict[str, Any]],
        rollouts: Sequence[Rollout],
        contexts: Sequence[Prompt] | None,
        known: Known,
    ) -> None:
        """Add the columns that are known, and those of the first `samples.held_out` responses of a setting.

        Both models score what is not known, in the process that writes.
        """
        for i, columns in known.items():
            rows[i] |= columns
        first = [i for i, one in enumerate(rollouts) if len(one.response_ids)][: self.samples.held_out]
        first = [i for i in first if i not in known]
        if not first:
            return
        self.progress.phase(f"{self.folder.path.name}: {what}, scored for the file")
        read = [rollouts[i].prompt if contexts is None else contexts[i] for i in first]
        columns = columns_or_note(
            what,
            self.progress,
            self.student,
            None if contexts is None else exam.scorer,
            [rollouts[i] for i in first],
            read,
            k=self.samples.top_k,
            micro_batch_tokens=self.micro_batch_tokens,
            exact=True,
        )
        for i, more in zip(first, columns, strict=True):
            rows[i] |= more
