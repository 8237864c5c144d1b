"""THE LOOP. One stage: prompts -> responses -> scores -> one batch; then student, loss, gradient, update.

Phase A (lines 1 to 6) has the whole optimiser batch and no gradient. Phase B (7 and 8) runs in micro-batches. Their
split does not change the result, because weights and denominator are already fixed.
"""

from __future__ import annotations

from opd.loss.step import PhaseA, gradient, scored, written
from opd.maths.metrics import Metrics
from opd.stage.stage import Outcome, Stage
from opd.stage.stopwatch import Stopwatch


def train(stage: Stage) -> Outcome:
    """Run or resume a stage.

    Raises TrainingError (what, step, prompts), and Stopped after a signal, with a checkpoint saved.
    """
    world = stage.world
    for step in stage.steps():  # resumes; after each step saves, evaluates and stops when due
        time = Stopwatch()
        stage.sync(step)  # an engine gets the weights, and proves it
        time.lap("sync")
        taken: list[tuple[Stage, PhaseA, float, list[Metrics]]] = []
        for one in stage.models:  # of several models, each has its gradient before any is updated
            method, student, teacher = one.method, one.student, one.teacher
            prompts = one.prompts(step)  # 1 list[Prompt], of this process
            with stage.whole_weights():
                rollouts = written(method, prompts, one.writers, one.reward, (one.seed, step))  # 2 list[Rollout]
                one.write_ahead(step + 1)  # in the background, if the stage says so
                time.lap("generate")
                contexts = method.context(rollouts)  # 3 list[Prompt], which the teacher reads
                phase_a = scored(  # 4, 5, 6 Batch [B, T], credit and weight, the one denominator
                    method, teacher, rollouts, contexts, one.request(step), student.device, one.memory, world
                )
                time.lap("score")
                compared = one.compare(step, phase_a)
                time.lap("diagnose")
            loss, observed = gradient(  # 7, 8 the formula, by micro-batches
                method, student, teacher, phase_a, one.spec.micro_batch_tokens, one.root, world, one.router_aux_loss
            )
            taken.append((one, phase_a, loss, [compared, observed]))
            time.lap("train")
        for one, phase_a, loss, observed in taken:
            metrics = one.update(step, phase_a, loss, observed)  # 9, 10 clip, update, EMA
            time.lap("train")
            one.log(step, phase_a, metrics, time)  # 11 metrics, timings, samples
    return stage.outcome
