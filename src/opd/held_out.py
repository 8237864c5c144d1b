"""The evaluations of a stage: before, during, after, and the teacher's own, from one set of held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from opd.evaluate import HeldOut, Measurement, exact_divergence, measure, sample_rows, student_samplers
from opd.models import LanguageModel
from opd.parallel import World
from opd.rundir import StageDir
from opd.teachers.local import LocalTeacher
from opd.types import Context, Rollout, Sampler


@dataclass(slots=True, kw_only=True)
class Examiner:
    """Measures the student (and once the teacher) on the held-out prompts; keeps the last measurements."""

    held_out: HeldOut
    student: LanguageModel
    world: World
    root: nn.Module  # the student's, by which its weights are gathered
    folder: StageDir
    every: int
    measure_before: bool
    micro_batch_tokens: int
    teacher_samplers: Mapping[str, Sampler] = field(default_factory=dict[str, Sampler])
    kl_teacher: LocalTeacher | None = None
    context: Context | None = None

    def due(self, done: int) -> bool:
        """Whether to measure after `done` updates (the end of a stage is measured anyway)."""
        return self.every > 0 and done % self.every == 0

    def before(self) -> dict[str, float]:
        """The teacher's own responses (if asked for) and the untrained student, under eval/teacher and eval/student."""
        out: dict[str, float] = {}
        with self.world.gathered(self.root):
            if self.teacher_samplers:
                taught = measure(self.held_out, self.teacher_samplers, self.world)
                out |= {key.replace("eval/", "eval/teacher/", 1): value for key, value in taught.metrics.items()}
                self._keep("teacher", taught)
            return out | (self._student("before") if self.measure_before else {})

    def after(self, done: int) -> dict[str, float]:
        """The student after `done` updates."""
        with self.world.gathered(self.root):
            return self._student(f"step_{done:06d}")

    def _student(self, when: str) -> dict[str, float]:
        measured = measure(self.held_out, student_samplers(self.held_out, self.student), self.world)
        self._keep(when, measured)
        metrics = dict(measured.metrics)
        if self.kl_teacher is not None and self.context is not None:
            divergences = exact_divergence(
                self.student,
                self.kl_teacher,
                self._drawn(measured.rollouts),
                self.context,
                micro_batch_tokens=self.micro_batch_tokens,
                world=self.world,
            )
            metrics |= {f"eval/{name}": value for name, value in divergences.items()}
        return metrics

    def _drawn(self, rollouts: Mapping[str, list[Rollout]]) -> list[Rollout]:
        """The responses of the first setting that samples: a divergence is an expectation over the student's own."""
        for name, sampling in self.held_out.sampling.items():
            if sampling.temperature > 0:
                return rollouts[name]
        return next(iter(rollouts.values()))

    def _keep(self, when: str, measured: Measurement) -> None:
        rows: list[dict[str, Any]] = []
        for name, rollouts in measured.rollouts.items():
            rows += sample_rows(rollouts, when=when, sampling=name)
        self.folder.write_held_out(when, rows)
