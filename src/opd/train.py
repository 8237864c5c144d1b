"""THE LOOP. One stage: prompts -> responses -> scores -> one batch; then student, loss, gradient, update.

Phase A (lines 1 to 6) sees the whole optimiser batch and has no gradient. Phase B (7 and 8) runs over micro-batches and
cannot change what a step computes: weights and denominator are fixed before it starts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.evaluation import diagnostics
from opd.loss.collate import MicroBatch, attach, check_responses, collate, has_trained, split
from opd.loss.token_loss import loss_of
from opd.maths.metrics import Metrics, merged
from opd.method import Method
from opd.models.head import Head
from opd.parallel import World
from opd.stage.interrupt import Interrupt, stopped_after
from opd.stage.resume import check_finite, examine, resume, save, write
from opd.stage.samples import rows_of
from opd.stage.stage import Stage
from opd.teachers.local import with_record
from opd.teachers.routed import heads_of, teaches_itself
from opd.types import Prompt, Rollout, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`seconds` of training, evaluations apart; `asked_to_stop` in the last step, with nothing left to do."""

    seconds: float
    asked_to_stop: bool


def train(stage: Stage) -> Outcome:
    """Run (or go on with) a stage.

    Raises TrainingError (what, step, prompts, last good checkpoint), and Stopped after SIGINT, with all saved.
    """
    spec, method, student, teacher, world = stage.spec, stage.method, stage.student, stage.teacher, stage.world
    first, seconds = resume(stage)
    if stage.examiner is not None and first == 0 and (measured := stage.examiner.before()):
        write(stage, 0, measured)
    with Interrupt(speaks=world.main) as interrupt:
        for step in range(first, spec.steps):
            started, worked = time.perf_counter(), time.process_time()
            for sampler in stage.samplers.values():
                sampler.version = step
            step_prompts = stage.order.take(step)
            mine = world.positions(sharing_keys(method, step_prompts))
            prompts = [step_prompts[i] for i in mine]  # 1 list[Prompt], of this process
            shown = bool(spec.samples_every) and (step % spec.samples_every == 0 or step + 1 == spec.steps)
            with world.gathered(stage.root):
                rollouts = method.source(prompts, stage.writers, (stage.seed, step), method.record())  # 2 list[Rollout]
                check_responses(rollouts)
                rollouts = method.keep(stage.reward(rollouts))
                rollouts = with_record(
                    student,
                    rollouts,
                    method.record(),
                    temperature=lambda rollout: stage.samplers[rollout.prompt.task].sampling.temperature or 1.0,
                    micro_batch_tokens=spec.micro_batch_tokens,
                )
                wrote = time.perf_counter()
                contexts = method.context(rollouts)  # 3 what the teacher reads
                scores = unscored(rollouts)
                if teacher is not None:
                    scores = teacher.score(
                        rollouts,
                        contexts,
                        method.support,
                        method.temperature,
                        sampled=shown or method.reads("teacher_logp"),
                        entropy=method.reads("teacher_entropy"),
                        top_k=method.top_k,
                    )
                looked = time.perf_counter()
                compared = diagnostics.compared(spec, method, student, teacher, rollouts, contexts, step)
                diagnosed = time.perf_counter() - looked  # counted apart: it is no part of training
            batch = collate(rollouts, scores, student.device)  # 4 Batch [B, T]
            trains = has_trained(batch, method, world)  # False: a filter left nothing, and no update is made
            learned = method.observe(batch, world.gather)  # 5 what a method remembers; then credit and weight
            batch = attach(batch, method)
            denominator = method.normalise(batch)
            count = world.sum(denominator.count)  # 6 the one denominator: the end of phase A
            heads = heads_of(teacher, student, method.support, rollouts)
            metrics = diagnostics.of(batch, method, step, buckets=diagnostics.buckets_of(spec))
            metrics.merge(compared)
            scored = time.perf_counter()
            loss = 0.0
            student.model.train()
            micros = split(batch, denominator, spec.micro_batch_tokens, shares=student.caches)
            for micro in even(micros, world):
                part, observed = stage.root(loss_part, stage, micro, count, heads)  # 7, 8 the formula
                part.backward()
                loss += part.item()
                metrics.merge(observed)
            student.model.eval()
            grad_norm = stage.moves.optimiser.clip()
            loss, metrics = world.sum(loss), merged(world.gather(metrics))
            check_finite(stage, step, mine, batch, loss, grad_norm)
            rates = method.update(stage.moves) if trains else {}  # 9 step, schedule
            if teacher is not None and trains:
                teacher.after_step()  # 10 an EMA teacher follows
            ended = time.perf_counter()
            seconds = world.max(seconds + (ended - started - diagnosed))
            metrics.value("train/loss", loss)
            metrics.value("optim/grad_norm", grad_norm)
            if "filtered" in method.needs():
                metrics.value("train/update_skipped", float(not trains))
            for name, value in {**learned, **rates}.items():
                metrics.value(name, value)
            done = step + 1  # updates so far
            finished = done == spec.steps or seconds >= stage.seconds_limit
            write(stage, done, metrics.reduce())  # 11
            stage.folder.append_timings(
                done,
                {
                    "generate": wrote - started,
                    "score": scored - wrote - diagnosed,
                    "diagnose": diagnosed,
                    "train": ended - scored,
                    "total": ended - started,
                    **stage.reward.pop_requests(),
                    "cpu": time.process_time() - worked,
                },
            )
            if shown or (spec.samples_every and finished):
                stage.folder.write_samples(done, world.in_order(mine, rows_of(batch)))
            asked = world.any(interrupt.asked)
            saved = done % spec.checkpoint.every == 0 or finished or asked
            if saved:
                save(stage, done, seconds, finished)
            if finished or not asked:
                examine(stage, done, finished)  # 12
            asked = world.any(interrupt.asked)
            if finished:
                break
            if asked:  # a resumed run makes up for an evaluation that was left out
                if not saved:
                    save(stage, done, seconds, finished)
                raise stopped_after(spec.name, done, spec.steps)
    return Outcome(seconds=seconds, asked_to_stop=world.any(interrupt.asked))


def sharing_keys(method: Method, prompts: list[Prompt]) -> list[int]:
    """What has to stay in one process: a prompt that a step takes twice is one group to a method that needs groups."""
    return [prompt.id if "group" in method.needs() else i for i, prompt in enumerate(prompts)]


def even(micros: list[MicroBatch], world: World) -> list[MicroBatch | None]:
    """As many in every process, filled up with None: each forward and backward is one of all processes."""
    return [*micros, *[None] * (int(world.max(len(micros))) - len(micros))]


def loss_part(
    stage: Stage, micro: MicroBatch | None, count: float, heads: Mapping[str | None, Head]
) -> tuple[Tensor, Metrics]:
    """One micro-batch's part of the step's loss; `heads` by teacher. None is worth exactly 0, and is not counted."""
    student, teacher = stage.student, stage.teacher
    if micro is None:
        head, hidden = student.head(), student.hidden(torch.zeros(1, 1, dtype=torch.long, device=student.device))
        # Sums over nothing: gradients of zeros for all that other processes have gradients for, whatever the values.
        nothing = [t[:0].sum() for t in (hidden, head.weight, head.bias) if t is not None]
        return torch.stack(nothing).sum(), Metrics()
    teacher_head = heads.get(micro.teacher_id)
    if teacher is not None and micro.teacher_hidden is not None and teaches_itself(teacher, student):
        teacher_head = teacher.head(micro.teacher_id)  # the student's own weights: whole in here, sharded outside
    return loss_of(stage.method, student, micro, count, teacher_head)


def unscored(rollouts: list[Rollout]) -> list[Scores]:
    """Scores of a method without a teacher: nothing reads them, so they are NaN."""
    return [Scores(teacher_logp=torch.full((len(rollout.response_ids),), torch.nan)) for rollout in rollouts]
