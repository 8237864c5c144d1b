"""Can the reward tell right from wrong? The audit of `opd.rewards.audit` on the stage's rows; needs no model."""

from __future__ import annotations

from opd.commands.doctor.findings import Finding, skipped
from opd.recipe.schema import StageSpec
from opd.rewards.audit import audit
from opd.runs.prepare import Task

NAME = "reward/audit"
STUDY = "docs/rewards.md: of the tasks of reasoning-gym, those whose scorer pays for any text"


def reward_audit(spec: StageSpec, task: Task) -> Finding:
    """What the stage's reward, or else its evaluation's, pays for wrong texts and for forms of the right answer."""
    reward, prompts = task.reward, task.prompts
    if reward is None and task.held_out is not None:
        reward, prompts = task.held_out.reward, list(task.held_out.prompts)
    if reward is None:
        return skipped(NAME, "Neither the stage nor its evaluation has a reward.")
    found = audit(reward, prompts)
    if found is None:
        return skipped(NAME, f"The reward {reward.name!r} needs judges, or compares with no answer of the rows.")
    says = found.line[0].upper() + found.line[1:] + "."
    numbers: dict[str, object] = {"rows": found.rows, "failed": found.failed, "texts": found.texts}
    numbers |= {"right": dict(found.right), "wrong": dict(found.wrong)}
    if found.level == "ok":
        return Finding(name=NAME, level="ok", says=says, numbers=numbers)
    where = "reward" if task.reward is not None else "evaluate.reward"
    return Finding(
        name=NAME,
        level=found.level,
        says=f"{says} {found.verdict}",
        numbers=numbers,
        remedy=f"Change {where} of stage {spec.name!r}: another reward; for reasoning_gym "
        "`options: {full_only: true}`, another task, or your own function.",
        study=STUDY,
    )
