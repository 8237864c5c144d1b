"""The losses of a stage that writes one step ahead, by a plain loop in one thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opd.data.order import PromptOrder
from opd.data.prompts import load_selected
from opd.loss.step import gradient, scored
from opd.method import Method
from opd.methods import build
from opd.models.language_model import LanguageModel
from opd.recipe.schema import StageSpec
from opd.runs.prepare import assigned
from opd.runs.served import engine_samplers
from opd.runs.stale import with_importance
from opd.stage import optimisers
from opd.teachers.local import LocalTeacher


def in_order(stage: dict[str, Any], student: LanguageModel, teacher: LanguageModel, folder: Path) -> list[float]:
    """The responses of step s + 1 are drawn before the update of step s. `folder`: for the engine's weights."""
    spec = StageSpec.model_validate(stage | {"ahead": 0})
    assert spec.data is not None
    assert spec.engine is not None
    method: Method = with_importance(spec, build(spec.method, spec.options))
    local = LocalTeacher(lm=teacher, micro_batch_tokens=4096, student_device=student.device)
    prompts = assigned(load_selected(spec.data, require=[])[0], spec, None, spec.by_task[None], 0)
    order = PromptOrder(prompts=(prompts,), shares=(1.0,), count=spec.prompts_per_step, seed=0, mixed=False)
    sampler = engine_samplers(spec, spec.engine, student, folder)[None]
    optimiser = optimisers.build(student.trainable(), spec.optimizer, spec.steps)
    memory = method.make_memory()
    sampler.sync(0)
    coming = sampler.begin(order.take(0), seed=(0, 0)).wait()
    losses: list[float] = []
    for step in range(spec.steps):
        sampler.sync(step)
        taken, coming = coming, sampler.begin(order.take(step + 1), seed=(0, step + 1)).wait()
        rollouts = sampler.complete(taken, method.record())
        contexts = method.context(rollouts)
        phase = scored(method, local, rollouts, contexts, method.request(), student.device, memory)
        losses.append(gradient(method, student, local, phase, 4096)[0])
        optimiser.clip()
        optimiser.step()
    return losses
