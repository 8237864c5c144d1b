"""THE LOOP. One stage: prompts -> responses -> scores -> one batch; then student, loss, gradient, update.

Phase A (lines 1 to 6) has the whole optimiser batch and no gradient. Phase B (7 and 8) runs in micro-batches. Their
split does not change the result, because weights and denominator are already fixed.
"""

from __future__ import annotations

from opd.loss.step import gradient, scored, written
from opd.stage.stage import Outcome, Stage
from opd.stage.stopwatch import Stopwatch


def train(stage: Stage) -> Outcome:
    """Run or resume a stage.

    Raises TrainingError (what, step, prompts), and Stopped after a signal, with a checkpoint saved.
    """
    method, student, teacher, world = stage.method, stage.student, stage.teacher, stage.world
    for step in stage.steps():  # resumes; after each step saves, evaluates and stops when due
        time = Stopwatch()
        prompts = stage.prompts(step)  # 1 list[Prompt], of this process
        with stage.whole_weights():
            rollouts = written(method, prompts, stage.writers, stage.reward, (stage.seed, step))  # 2 list[Rollout]
            time.lap("generate")
            contexts = method.context(rollouts)  # 3 list[Prompt], which the teacher reads
            phase_a = scored(  # 4, 5, 6 Batch [B, T], credit and weight, the one denominator
                method, teacher, rollouts, contexts, stage.request(step), student.device, stage.memory, world
            )
            time.lap("score")
            compared = stage.compare(step, rollouts, contexts)
            time.lap("diagnose")
        loss, observed = gradient(  # 7, 8 the formula, by micro-batches
            method, student, teacher, phase_a, stage.spec.micro_batch_tokens, stage.root, world, stage.router_aux_loss
        )
        metrics = stage.update(step, phase_a, loss, [compared, observed])  # 9, 10 clip, update, sync, EMA
        time.lap("train")
        stage.log(step, phase_a, metrics, time)  # 11 metrics, timings, samples
    return stage.outcome
