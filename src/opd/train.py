"""THE LOOP. One stage: prompts -> responses -> scores -> one batch; then student, loss, gradient, update.

Phase A (lines 1 to 6) sees the whole optimiser batch and has no gradient. Phase B (7 and 8) runs over micro-batches and
cannot change what a step computes: weights and denominator are fixed before it starts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from opd import checkpoint, diagnostics
from opd.collate import attach, check_responses, collate, split
from opd.data import take
from opd.errors import TrainingError
from opd.evaluate import rewarded, sample_rows
from opd.held_out import Examiner
from opd.interrupt import Interrupt, stopped_after
from opd.loss import loss_of
from opd.method import Method
from opd.metrics import ReportWriter
from opd.models import LanguageModel
from opd.optim import Optimiser
from opd.progress import Progress
from opd.recipe import StageSpec
from opd.rewards import RewardFn
from opd.rundir import StageDir
from opd.samplers.hf import TransformersSampler
from opd.supports import sampled, top_k
from opd.teachers.local import LocalTeacher
from opd.types import Batch, Prompt, Record, Rollout, Scores, Writers


@dataclass(slots=True, kw_only=True)
class Stage:
    """Everything that a stage needs, built."""

    spec: StageSpec
    seed: int
    method: Method
    student: LanguageModel
    teacher: LocalTeacher | None
    sampler: TransformersSampler
    writers: Writers
    prompts: list[Prompt]
    reward: RewardFn | None
    optimiser: Optimiser
    examiner: Examiner | None
    folder: StageDir
    progress: Progress
    report: ReportWriter
    seconds_limit: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`seconds` of training, evaluations apart; `asked_to_stop` in the last step, with nothing left to do."""

    seconds: float
    asked_to_stop: bool


def train(stage: Stage) -> Outcome:
    """Run (or go on with) a stage.

    Raises TrainingError (what, step, prompts, last good checkpoint), and Stopped after SIGINT, with all saved.
    """
    spec, method, student, teacher = stage.spec, stage.method, stage.student, stage.teacher
    first, seconds = resume(stage)
    if stage.examiner is not None and first == 0 and (measured := stage.examiner.before()):
        write(stage, 0, measured)
    with Interrupt() as interrupt:
        for step in range(first, spec.steps):
            started = time.perf_counter()
            stage.sampler.version = step
            prompts = take(stage.prompts, step=step, count=spec.prompts_per_step, seed=stage.seed)  # 1 list[Prompt]
            rollouts = method.source(prompts, stage.writers, (stage.seed, step), method.record())  # 2 list[Rollout]
            check_responses(rollouts)
            rollouts = with_record(stage, rewarded(stage.reward, rollouts), method.record())
            wrote = time.perf_counter()
            shown = bool(spec.samples_every) and (step % spec.samples_every == 0 or step + 1 == spec.steps)
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
                )
            batch = collate(rollouts, scores, student.device)  # 4 Batch [B, T]
            batch = attach(batch, method)  # 5 credit and weight
            denominator = method.normalise(batch)  # 6 the one denominator: the end of phase A
            head = teacher.head() if teacher is not None and method.support.kind == "full" else None
            metrics = diagnostics.of(batch, method, version=step)
            scored = time.perf_counter()
            loss = 0.0
            student.model.train()
            for micro in split(batch, denominator, spec.micro_batch_tokens, shares=student.caches):
                part, observed = loss_of(method, student, micro, denominator.count, head)  # 7, 8 the formula
                part.backward()
                loss += part.item()
                metrics.merge(observed)
            student.model.eval()
            grad_norm = stage.optimiser.clip()
            check_finite(stage, step, batch, loss, grad_norm)
            rates = method.update(stage.optimiser)  # 9 step, schedule
            if teacher is not None:
                teacher.after_step()  # 10 an EMA teacher follows
            ended = time.perf_counter()
            seconds += ended - started
            metrics.value("train/loss", loss)
            metrics.value("optim/grad_norm", grad_norm)
            for name, value in rates.items():
                metrics.value(name, value)
            done = step + 1  # updates so far
            finished = done == spec.steps or seconds >= stage.seconds_limit
            write(stage, done, metrics.reduce())  # 11
            stage.folder.append_timings(
                done,
                {
                    "generate": wrote - started,
                    "score": scored - wrote,
                    "train": ended - scored,
                    "total": ended - started,
                },
            )
            if shown or (spec.samples_every and finished):
                stage.folder.write_samples(done, rows_of(batch))
            saved = done % spec.checkpoint.every == 0 or finished or interrupt.asked
            if saved:
                save(stage, done, seconds, finished)
            if finished or not interrupt.asked:
                examine(stage, done, finished)  # 12
            if finished:
                break
            if interrupt.asked:  # a resumed run makes up for an evaluation that was left out
                if not saved:
                    save(stage, done, seconds, finished)
                raise stopped_after(spec.name, done, spec.steps)
    return Outcome(seconds=seconds, asked_to_stop=interrupt.asked)


def resume(stage: Stage) -> tuple[int, float]:
    """(first step to run, seconds of training so far), with the last checkpoint restored; (0, 0) without one.

    A stage that had finished, by its steps or its time, has no step left to run.
    """
    folder = stage.folder.checkpoints
    checkpoint.sweep(folder)
    last = checkpoint.latest(folder)
    if last is None:
        stage.folder.rewind(-1)
        return 0, 0.0
    saved = checkpoint.load(last)
    with torch.no_grad():
        for name, parameter in stage.student.trainable().items():
            parameter.copy_(saved.tensors["student"][name])
    if stage.teacher is not None:
        stage.teacher.load_state_dict(saved.tensors.get("teacher", {}))
    stage.optimiser.load_state_dict(saved.objects["optimiser"])
    stage.folder.rewind(saved.step)
    stage.progress.note(f"{stage.spec.name}: going on after step {saved.step} of {stage.spec.steps}")
    if not any(row["step"] == saved.step and is_evaluation(row) for row in stage.folder.read_metrics()):
        examine(stage, saved.step, saved.state["finished"])  # killed between the checkpoint and its evaluation
    return stage.spec.steps if saved.state["finished"] else saved.step, float(saved.state["seconds"])


def examine(stage: Stage, done: int, finished: bool) -> None:
    """Measure on the held-out prompts when it is due; the end of a stage always is."""
    if stage.examiner is not None and (finished or stage.examiner.due(done)):
        write(stage, done, stage.examiner.after(done))


def is_evaluation(row: Mapping[str, object]) -> bool:
    return any(key.startswith("eval/") for key in row)


def save(stage: Stage, step: int, seconds: float, finished: bool) -> None:
    """A checkpoint after `step` updates; the step's metrics are on disk before it, its evaluation comes after."""
    tensors = {"student": {name: p.detach() for name, p in stage.student.trainable().items()}}
    if stage.teacher is not None and (state := stage.teacher.state_dict()):
        tensors["teacher"] = state
    checkpoint.save(
        stage.folder.checkpoints,
        step,
        tensors=tensors,
        objects={"optimiser": stage.optimiser.state_dict()},
        state={"seconds": seconds, "finished": finished},
        keep=stage.spec.checkpoint.keep,
    )


def write(stage: Stage, step: int, metrics: dict[str, float]) -> None:
    stage.folder.append_metrics(step, metrics)
    stage.report.log(stage.spec.name, step, metrics)
    stage.progress.step(stage.spec.name, step, metrics)


def unscored(rollouts: list[Rollout]) -> list[Scores]:
    """Scores of a method without a teacher: nothing reads them, so they are NaN."""
    return [Scores(teacher_logp=torch.full((len(rollout.response_ids),), torch.nan)) for rollout in rollouts]


def with_record(stage: Stage, rollouts: list[Rollout], record: Record) -> list[Rollout]:
    """What the method reads of the student at each token, for responses that it did not write itself."""
    missing = [
        i
        for i, rollout in enumerate(rollouts)
        if (record.top_k and rollout.student_top_ids is None) or (record.entropy and rollout.student_entropy is None)
    ]
    if not missing:
        return rollouts
    view = LocalTeacher(
        lm=stage.student, micro_batch_tokens=stage.spec.micro_batch_tokens, student_device=stage.student.device
    )
    absent = [rollouts[i] for i in missing]
    support = top_k(record.top_k, by="teacher") if record.top_k else sampled()
    scores = view.score(absent, [r.prompt for r in absent], support, stage.method.temperature, entropy=record.entropy)
    out = list(rollouts)
    for i, score in zip(missing, scores, strict=True):
        out[i] = replace(out[i], student_top_ids=score.support_ids, student_entropy=score.teacher_entropy)
    return out


def rows_of(batch: Batch) -> list[dict[str, object]]:
    """The step's responses with their per-token numbers."""
    rows = sample_rows(batch.rollouts)
    for i, row in enumerate(rows):
        t = len(batch.rollouts[i].response_ids)
        teacher_logp = batch.teacher_logp[i, :t]
        row["teacher_logp"] = None if bool(teacher_logp.isnan().any()) else teacher_logp.tolist()
        row["weight"] = None if batch.weight is None else batch.weight[i, :t].tolist()
        row["advantage"] = None if batch.advantage is None else batch.advantage[i, :t].tolist()
    return rows


def check_finite(stage: Stage, step: int, batch: Batch, loss: float, grad_norm: float) -> None:
    """Stop before the update when the loss or the gradient is not a number: the weights are still good."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    last = checkpoint.latest(stage.folder.checkpoints)
    responses = stage.folder.write_samples(step + 1, rows_of(batch))
    raise TrainingError(
        f"Stage {stage.spec.name!r}, step {step + 1}: loss {loss}, gradient norm {grad_norm}. The update was not made. "
        f"Prompts of the step: {sorted({r.prompt.id for r in batch.rollouts})}. "
        f"Last good checkpoint: {last or 'none yet'}. The step's responses: {responses}. "
        "Usual causes: too large a learning rate, bfloat16 weights, a teacher that gives NaN."
    )
