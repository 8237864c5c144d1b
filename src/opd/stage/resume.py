"""TODO: opd/stage/resume.py"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from opd.errors import TrainingError
from opd.stage import checkpoint
from opd.stage.samples import rows_of
from opd.stage.stage import Stage
from opd.types import Batch


def resume(stage: Stage) -> tuple[int, float]:
    """(first step to run, seconds of training so far), with the last checkpoint restored; (0, 0) without one.

    A stage that had finished, by its steps or its time, has no step left to run.
    """
    folder, world = stage.folder.checkpoints, stage.world
    if world.main:
        checkpoint.sweep(folder)
    world.wait()
    last = checkpoint.latest(folder)
    if last is None:
        stage.folder.rewind(-1)
        return 0, 0.0
    trained = stage.student.trainable()
    sharded = ["student", "adamw.exp_avg", "adamw.exp_avg_sq", *(f"method.{name}" for name in stage.memory)]
    saved = checkpoint.load(last, like=dict.fromkeys(sharded, trained))
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved.tensors["student"][name])
    if stage.teacher is not None:
        stage.teacher.load_state_dict(saved.tensors.get("teacher", {}))
    stage.moves.optimiser.restore(saved.tensors, saved.state["updates"])
    for name, memory in stage.memory.items():
        memory.load_state_dict(saved.state["method"].get(name, {}), saved.tensors.get(f"method.{name}", {}))
    stage.folder.rewind(saved.step)
    stage.progress.note(f"{stage.spec.name}: going on after step {saved.step} of {stage.spec.steps}")
    rows = stage.folder.read_metrics() if world.main else []
    if not world.any(any(row["step"] == saved.step and is_evaluation(row) for row in rows)):
        examine(stage, saved.step, saved.state["finished"])  # killed between the checkpoint and its evaluation
    return stage.spec.steps if saved.state["finished"] else saved.step, float(saved.state["seconds"])


def examine(stage: Stage, done: int, finished: bool) -> None:
    """Measure on the held-out prompts when it is due; the end of a stage always is."""
    if stage.examiner is not None and (finished or stage.examiner.due(done)):
        write(stage, done, stage.examiner.after(done, finished=finished))


def is_evaluation(row: Mapping[str, object]) -> bool:
    return any(key.startswith("eval/") for key in row)


def save(stage: Stage, step: int, seconds: float, finished: bool) -> None:
    """A checkpoint after `step` updates; the step's metrics are on disk before it, its evaluation comes after."""
    tensors = {"student": {name: p.detach() for name, p in stage.student.trainable().items()}}
    tensors |= stage.moves.optimiser.tensors()
    tensors |= {f"method.{name}": dict(memory.tensors()) for name, memory in stage.memory.items()}
    if stage.teacher is not None and (state := stage.teacher.state_dict()):
        tensors["teacher"] = state
    checkpoint.save(
        stage.folder.checkpoints,
        step,
        tensors=tensors,
        state={
            "seconds": seconds,
            "finished": finished,
            "updates": stage.moves.updates,
            "method": {name: state for name, memory in stage.memory.items() if (state := memory.state_dict())},
        },
        keep=stage.spec.checkpoint.keep,
        world=stage.world,
    )


def write(stage: Stage, step: int, metrics: dict[str, float]) -> None:
    stage.folder.append_metrics(step, metrics)
    stage.report.log(stage.spec.name, step, metrics)
    stage.progress.step(stage.spec.name, step, metrics)


def check_finite(stage: Stage, step: int, positions: list[int], batch: Batch, loss: float, grad_norm: float) -> None:
    """Stop before the update when the loss or the gradient is not a number: the weights are still good."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    last = checkpoint.latest(stage.folder.checkpoints)
    rows = stage.world.in_order(positions, rows_of(batch))
    responses = stage.folder.write_samples(step + 1, rows)
    raise TrainingError(
        f"Stage {stage.spec.name!r}, step {step + 1}: loss {loss}, gradient norm {grad_norm}. The update was not made. "
        f"Prompts of the step: {sorted({row['prompt_id'] for row in rows})}. "
        f"Last good checkpoint: {last or 'none yet'}. The step's responses: {responses}. "
        "Usual causes: too large a learning rate, bfloat16 weights, a teacher that gives NaN."
    )
