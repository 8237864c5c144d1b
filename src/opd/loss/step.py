"""The step in three parts: `written`, `scored`, `gradient`. All code that computes a step calls these.

`written` and `scored` are phase A: the whole batch, without gradient. `gradient` is phase B, in micro-batches. The
split does not change the result, because weights and denominator are already fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from opd.errors import TeacherError
from opd.loss.balance import ExpertLoad
from opd.loss.collate import MicroBatch, attach, check_responses, collate, has_trained, split
from opd.loss.token_loss import loss_of
from opd.maths.metrics import Metrics
from opd.method import Method
from opd.models.head import TeacherHead
from opd.models.language_model import LanguageModel
from opd.models.root import Root
from opd.models.ticks import counted
from opd.parallel import ALONE, World
from opd.pieces.memory import observed
from opd.types import Batch, Denominator, Memory, Prompt, Rollout, ScoreRequest, Scores, Teacher, Writers


def written(
    method: Method,
    prompts: Sequence[Prompt],
    writers: Writers,
    reward: Callable[[Sequence[Rollout]], list[Rollout]],
    seed: tuple[int, int],
) -> list[Rollout]:
    """The step's responses, rewarded and filtered, with all fields that `method.record()` names.

    First the method's own rows, in the order of the prompts, then those of `method.parts`: the filter sees none of
    these, and they keep the reward that the source gave them. `seed` is (seed of the run, step). Raises DataError for
    a response of zero tokens.
    """
    rollouts = method.source(prompts, replace(writers, reward=reward), seed, method.record())
    check_responses(rollouts)
    own = [rollout for rollout in rollouts if not rollout.part]
    others = [rollout for name in method.parts for rollout in rollouts if rollout.part == name]
    assert len(own) + len(others) == len(rollouts), f"parts are {', '.join(method.parts)}; got {rollouts[-1].part!r}"
    return writers.complete([*method.filter(reward(own)), *others], method.record())


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseA:
    """All values that are fixed before the student runs with gradient."""

    batch: Batch  # with credit and weight
    contexts: tuple[Prompt, ...]  # by rollout, which the teacher read
    denominator: Denominator  # of this process
    count: float  # the one denominator, over all processes
    trains: bool  # False: the filter left no token in the whole step, so no update is made
    learned: Mapping[str, float]  # metrics of the method's memory
    # [B, T] NaN; phase B writes the signal of each trained token here, before weight and denominator.
    signal: Tensor | None = None
    parts: Mapping[str, PhaseA] = field(default_factory=dict[str, "PhaseA"])  # of rows with a `Rollout.part`, if any

    @property
    def all(self) -> list[PhaseA]:
        """This one, and those of the parts."""
        return [self, *self.parts.values()]


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
    with its own rollouts; rows of `method.parts` may stand anywhere among them. Raises TrainingError on every rank if
    no token of the method's own rows is trained and the method does not filter; DataError and TeacherError as
    `collate`.
    """
    memory = method.make_memory() if memory is None else memory
    parts = _parts(method, teacher, rollouts, contexts, device, memory, world)
    own = [i for i, rollout in enumerate(rollouts) if not rollout.part]
    rollouts, contexts = [rollouts[i] for i in own], [contexts[i] for i in own]
    scores = _scores(teacher, rollouts, contexts, request)
    batch = replace(collate(rollouts, scores, device), memory=memory)
    trains = has_trained(batch, method, world) or (bool(method.parts) and world.any(bool(parts)))
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
        signal=torch.full_like(batch.teacher_logp, torch.nan),
        parts=parts,
    )


def _scores(
    teacher: Teacher, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], request: ScoreRequest
) -> list[Scores]:
    scores = teacher.score(rollouts, contexts, request)
    if request.base and any(one.base_logp is None for one in scores):
        raise TeacherError(
            f"The method reads the base model's log-probs, and the teacher {teacher.name!r} returned none. Name the "
            "stage's `base`; in Python, score with teachers.with_base.WithBase."
        )
    return scores


def _parts(
    method: Method,
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    contexts: Sequence[Prompt],
    device: torch.device,
    memory: Mapping[str, Memory],
    world: World,
) -> dict[str, PhaseA]:
    """Phase A of the parts that have rows in this process. The count is divided by the part's factor."""
    found: dict[str, PhaseA] = {}
    for name, part in method.parts.items():  # in this order on every process, with rows or without
        rows = [i for i, rollout in enumerate(rollouts) if rollout.part == name]
        chosen, read = [rollouts[i] for i in rows], [contexts[i] for i in rows]
        batch = denominator = None
        if rows:
            scores = _scores(teacher, chosen, read, part.method.request())
            batch = attach(replace(collate(chosen, scores, device), memory=memory), part.method)
            denominator = part.method.normalise(batch)
        count = world.sum(0.0 if denominator is None else denominator.count)
        if batch is None or denominator is None or count == 0:
            continue
        found[name] = PhaseA(
            batch=batch,
            contexts=tuple(read),
            denominator=denominator,
            count=count / part.factor,
            trains=True,
            learned={},
            signal=torch.full_like(batch.teacher_logp, torch.nan),
        )
    return found


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
    root = root or Root(student.model)
    loss, metrics = 0.0, Metrics()
    student.model.train(student.reading.training)
    try:
        jobs = even(list(_jobs(method, student, teacher, phase_a, micro_batch_tokens)), world)
        load = ExpertLoad.of(
            student, [None if job is None else job.micro for job in jobs], router_aux_loss, root, world
        )
        for job in counted("micro-batches", jobs):
            part, more = root(loss_part, student, teacher, job, load)
            part.backward()
            loss += part.item()
            metrics.merge(more)
            if job is not None:
                job.keep()
        metrics.merge(load.metrics())
    finally:
        student.model.eval()
    return loss, metrics


def heads_of(method: Method, teacher: Teacher, batch: Batch) -> dict[str | None, TeacherHead]:
    """The teachers' output layers by `teacher_id`, for a support that applies them in phase B.

    Empty if the student is its own teacher: sharded weights are whole only inside a forward.
    """
    if not method.support.reads_states or teacher.is_student:
        return {}
    return {name: teacher.head(name) for name in {rollout.prompt.teacher_id for rollout in batch.rollouts}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A micro-batch, all of one part, and what its loss needs."""

    method: Method
    micro: MicroBatch
    count: float  # the part's denominator
    heads: Mapping[str | None, TeacherHead]
    signal: Tensor | None = None  # [B, T], `PhaseA.signal` of the part
    prefix: str = ""  # of its metrics

    def keep(self) -> None:
        """Copy the signal of the micro-batch's tokens to their places in the batch."""
        micro = self.micro
        if self.signal is not None and micro.signal is not None and micro.chosen is not None:
            self.signal[micro.chosen[micro.row], micro.step] = micro.signal


def _jobs(
    method: Method, student: LanguageModel, teacher: Teacher, phase_a: PhaseA, micro_batch_tokens: int
) -> Iterator[Job]:
    """The micro-batches of this process: the method's own rows, then each part's."""
    parts = [(f"part/{name}/", method.parts[name].method, phase) for name, phase in phase_a.parts.items()]
    for prefix, pieces, phase in [("", method, phase_a), *parts]:
        heads = heads_of(pieces, teacher, phase.batch)
        for micro in split(student, phase.batch, phase.denominator, micro_batch_tokens):
            yield Job(method=pieces, micro=micro, count=phase.count, heads=heads, signal=phase.signal, prefix=prefix)


def even(jobs: list[Job], world: World) -> list[Job | None]:
    """The micro-batches, padded with None to the same number on every process."""
    return [*jobs, *[None] * (int(world.max(len(jobs))) - len(jobs))]


def loss_part(student: LanguageModel, teacher: Teacher, job: Job | None, load: ExpertLoad) -> tuple[Tensor, Metrics]:
    """One micro-batch's part of the step's loss, and its metrics. For None: exactly 0, without metrics."""
    if job is None:
        head, hidden = student.head(), student.hidden(torch.zeros(1, 1, dtype=torch.long, device=student.device))
        # Empty sums give zero gradients, so that this process joins the others' reductions.
        nothing = [t[:0].sum() for t in (hidden, head.weight, head.bias) if t is not None]
        return torch.stack(nothing).sum(), Metrics()
    micro = job.micro
    teacher_head = job.heads.get(micro.teacher_id)
    if micro.teacher_hidden is not None and teacher.is_student:
        teacher_head = teacher.head(micro.teacher_id)  # the student's weights, which are whole inside this forward
    with load.watched(student, micro) as balance:
        loss, metrics = loss_of(job.method, student, micro, job.count, teacher_head)
    metrics = metrics.under(job.prefix) if job.prefix else metrics
    return loss + balance.loss if balance.loss is not None else loss, metrics
