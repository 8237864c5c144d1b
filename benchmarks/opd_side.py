"""opd's side of a step: the parts of `opd.train`, in its order, without writing files and diagnostics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from common import Record, timed

from opd.loss.step import gradient, scored
from opd.method import Method
from opd.models.language_model import LanguageModel
from opd.models.root import Root
from opd.recipe.schema import OptimizerSection
from opd.samplers.hf import TransformersSampler
from opd.stage import optimisers
from opd.stage.optimisers import Optimiser
from opd.teachers.local import LocalTeacher
from opd.types import Prompt, Rollout, Sampling

MICRO_BATCH_TOKENS = 4096  # opd's default; the rows of a benchmark's step fit in one or two


@dataclass(slots=True, kw_only=True)
class Side:
    """The objects of opd's loop for one stage."""

    method: Method
    student: LanguageModel
    teacher: LocalTeacher
    sampler: TransformersSampler
    optimiser: Optimiser


def side(
    method: Method, student: LanguageModel, teacher: LanguageModel, sampling: Sampling, learning_rate: float = 1e-5
) -> Side:
    return Side(
        method=method,
        student=student,
        teacher=LocalTeacher(lm=teacher, micro_batch_tokens=MICRO_BATCH_TOKENS, student_device=student.device),
        sampler=TransformersSampler(lm=student, sampling=sampling),
        optimiser=optimisers.build(student.trainable(), OptimizerSection(learning_rate=learning_rate), steps=10_000),
    )


class TimedRoot(Root):
    """Runs the student's forward and adds its seconds to `parts["loss"]`."""

    def __init__(self, model: Any, parts: Record) -> None:
        super().__init__(model)
        self.parts = parts

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with timed(self.parts, "loss"):
            return super().forward(function, *arguments)


def training_part(s: Side, rollouts: Sequence[Rollout], parts: Record) -> float:
    """Phase A after generation, and phase B; returns the loss. Gradients are in the student, seconds in `parts`."""
    with timed(parts, "teacher"):
        contexts = s.method.context(rollouts)
        phase_a = scored(s.method, s.teacher, rollouts, contexts, s.method.request(), s.student.device)
    before, before_cpu = parts.get("loss", 0.0), parts.get("loss_cpu", 0.0)
    both: Record = {}
    with timed(both, "loss and backward"):
        root = TimedRoot(s.student.model, parts)
        loss, _ = gradient(s.method, s.student, s.teacher, phase_a, MICRO_BATCH_TOKENS, root)
    for name, whole, inside in (
        ("backward", both["loss and backward"], parts["loss"] - before),
        ("backward_cpu", both["loss and backward_cpu"], parts["loss_cpu"] - before_cpu),
    ):
        parts[name] = parts.get(name, 0.0) + whole - inside
    return loss


def step(s: Side, prompts: Sequence[Prompt], seed: tuple[int, int]) -> Record:
    """A whole step: its seconds by part, and its loss. Every response must have its full length."""
    parts: Record = {}
    with timed(parts, "total"):
        with timed(parts, "generate"):
            rollouts = s.sampler(prompts, seed=seed)
        parts["loss_value"] = training_part(s, rollouts, parts)
        with timed(parts, "optimiser"):
            s.optimiser.clip()
            s.method.update(s.optimiser)
    wanted = s.sampler.sampling.max_completion_length
    assert all(len(rollout.response_ids) == wanted for rollout in rollouts)
    return parts
