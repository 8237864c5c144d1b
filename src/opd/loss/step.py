"""The step in three parts: `written`, `scored`, `gradient`. All code that computes a step calls these.

`written` and `scored` are phase A: the whole batch, without gradient. `gradient` is phase B, in micro-batches. The
split does not change the result, because weights and denominator are already fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd.errors import TeacherError
from opd.loss.balance import ExpertLoad
from opd.loss.collate import MicroBatch, attach, check_responses, collate, has_trained, split
from opd.loss.token_loss import loss_of
from opd.maths.metrics import Metrics
from opd.method import Method
from opd.models.head import Head
from opd.models.language_model import LanguageModel
from opd.models.root import Root
from opd.models.ticks import counted
from opd.parallel import ALONE, World
from opd.pieces.memory import observed
from opd.types import Batch, Denominator, Memory, Prompt, Rollout, ScoreRequest, Teacher, Writers


def written(
    method: Method,
    prompts: Sequence[Prompt],
    writers: Writers,
    reward: Callable[[Sequence[Rollout]], list[Rollout]],
    seed: tuple[int, int],
) -> list[Rollout]:
    """The step's responses, rewarded and filtered, with all fields that `method.record()` names.

    `seed` is (seed of the run, step). Raises DataError for a response of zero tokens.
    """
    rollouts = method.source(prompts, writers, seed, method.record())
    check_responses(rollouts)
    return writers.complete(method.filter(reward(rollouts)), method.record())


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseA:
    """All values that are fixed before the student runs with gradient."""

    batch: Batch  # with credit and weight
    contexts: tuple[Prompt, ...]  # by rollout, which the teacher read
    denominator: Denominator  # of this process
    count: float  # the one denominator, over all processes
    trains: bool  # False: the filter left no token in the whole step, so no update is made
    learned: Mapping[str, float]  # metrics of the method's memory


def scored(
    method: Method,
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    contexts: Sequence[Prompt],
    request: ScoreRequest,
    device: torch.device,
    memory: Mapping[str, Memory] | None = None,
    world: World = ALONE,
) -> PhaseA:
    """The teacher's scores, the batch with credit and weight, and the denominator: the end of phase A.

    `device` is the student's. `memory` is the run's memory; default: a new one. Every process of `world` calls this
    with its own rollouts. Raises TrainingError on every rank if no token of the step is trained and the method does not
    filter; DataError and TeacherError as `collate`.
    """
    memory = method.make_memory() if memory is None else memory
    scores = teacher.score(rollouts, contexts, request)
    if request.base and any(one.base_logp is None for one in scores):
        raise TeacherError(
            f"The method reads the base model's log-probs, and the teacher {teacher.name!r} returned none. Name the "
            "stage's `base`; in Python, score with teachers.with_base.WithBase."
        )
    batch = replace(collate(rollouts, scores, device), memory=memory)
    trains = has_trained(batch, method, world)
    learned = observed(batch, world.gather)  # before credit and weight, which read the memory
    batch = attach(batch, method)
    denominator = method.normalise(batch)
    count = world.sum(denominator.count)
    return PhaseA(
        batch=batch,
        contexts=tuple(contexts),
        denominator=denominator,
        count=count,
        trains=trains,
        learned=learned,
    )


@torch.enable_grad()  # a user's module may have switched gradients off for its own model
def gradient(
    method: Method,
    student: LanguageModel,
    teacher: Teacher,
    phase_a: PhaseA,
    micro_batch_tokens: int,
    root: Root | None = None,
    world: World = ALONE,
    router_aux_loss: float = 0.0,
) -> tuple[float, Metrics]:
    """Add the step's gradient to the student's parameters; returns (this process's part of the loss, phase B metrics).

    `root` runs the forward of a sharded student. All processes of `world` run equally many micro-batches, because each
    forward and backward is collective. `router_aux_loss`: the factor of the load-balancing loss (`loss/balance.py`).
    """
    heads = heads_of(method, teacher, phase_a.batch)
    root = root or Root(student.model)
    loss, metrics = 0.0, Metrics()
    student.model.train(student.reading.training)
    try:
        split_up = split(phase_a.batch, phase_a.denominator, micro_batch_tokens, shares=student.caches)
        micros = even(split_up, world)
        load = ExpertLoad.of(student, micros, router_aux_loss, root, world)
        for micro in counted("micro-batches", micros):
            part, more = root(loss_part, method, student, teacher, micro, phase_a.count, heads, load)
            part.backward()
            loss += part.item()
            metrics.merge(more)
        metrics.merge(load.metrics())
    finally:
        student.model.eval()
    return loss, metrics


def heads_of(method: Method, teacher: Teacher, batch: Batch) -> dict[str | None, Head]:
    """The teachers' output layers by `teacher_id`, for a support that applies them in phase B.

    Empty if the student is its own teacher: sharded weights are whole only inside a forward.
    """
    if not method.support.reads_states or teacher.is_student:
        return {}
    return {name: teacher.head(name) for name in {rollout.prompt.teacher_id for rollout in batch.rollouts}}


def even(micros: list[MicroBatch], world: World) -> list[MicroBatch | None]:
    """The micro-batches, padded with None to the same number on every process."""
    return [*micros, *[None] * (int(world.max(len(micros))) - len(micros))]


def loss_part(
    method: Method,
    student: LanguageModel,
    teacher: Teacher,
    micro: MicroBatch | None,
    count: float,
    heads: Mapping[str | None, Head],
    load: ExpertLoad,
) -> tuple[Tensor, Metrics]:
    """One micro-batch's part of the step's loss, and its metrics. For None: exactly 0, without metrics."""
    if micro is None:
        head, hidden = student.head(), student.hidden(torch.zeros(1, 1, dtype=torch.long, device=student.device))
        # Empty sums give zero gradients, so that this process joins the others' reductions.
        nothing = [t[:0].sum() for t in (hidden, head.weight, head.bias) if t is not None]
        return torch.stack(nothing).sum(), Metrics()
    teacher_head = heads.get(micro.teacher_id)
    if micro.teacher_hidden is not None and teacher.is_student:
        teacher_head = teacher.head(micro.teacher_id)  # the student's weights, which are whole inside this forward
    with load.watched(student, micro) as balance:
        loss, metrics = loss_of(method, student, micro, count, teacher_head)
    return loss + balance.loss if balance.loss is not None else loss, metrics
