"""opd's side of a step: the pieces of `opd.train`, in its order, without the writing of files and the diagnostics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common import Record, timed

from opd.loss.collate import attach, collate, split
from opd.loss.token_loss import loss_of
from opd.method import Method
from opd.models.language_model import LanguageModel
from opd.pieces.needs import Reads
from opd.recipe.schema import OptimizerSection
from opd.samplers.hf import TransformersSampler
from opd.stage import optimisation
from opd.stage.optimisation import Optimiser
from opd.teachers.local import LocalTeacher
from opd.types import Prompt, Rollout, Sampling

MICRO_BATCH_TOKENS = 4096  # opd's default; the rows of a benchmark's step fit in one or two


@dataclass(slots=True, kw_only=True)
class Side:
    """What opd's loop holds for one stage."""

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
        optimiser=optimisation.build(student.trainable(), OptimizerSection(learning_rate=learning_rate), steps=10_000),
    )


def training_part(s: Side, rollouts: Sequence[Rollout], parts: Record) -> float:
    """Phase A after generation, and phase B: the loss. Gradients are left in the student, seconds in `parts`."""
    with timed(parts, "teacher"):
        scores = s.teacher.score(
            rollouts,
            s.method.context(rollouts),
            s.method.support,
            s.method.temperature,
            sampled=s.method.reads(Reads.TEACHER_LOGP),
        )
        batch = attach(collate(rollouts, scores, s.student.device), s.method)
        denominator = s.method.normalise(batch)
        head = s.teacher.head() if s.method.support.kind == "full" else None
    total = 0.0
    s.student.model.train()
    for micro in split(batch, denominator, MICRO_BATCH_TOKENS, shares=s.student.caches):
        with timed(parts, "loss"):
            loss, _ = loss_of(s.method, s.student, micro, denominator.count, head)
        with timed(parts, "backward"):
            loss.backward()
        total += loss.item()
    s.student.model.eval()
    return total


def step(s: Side, prompts: Sequence[Prompt], seed: tuple[int, int]) -> Record:
    """A whole step: its seconds, part by part, and its loss. Every response must have its full length."""
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
