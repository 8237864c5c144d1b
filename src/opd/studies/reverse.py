"""Reverse distillation: a student that has become better is distilled from what it was before.

Li et al., arXiv 2604.13016 section 3.3: a student after reinforcement learning that is distilled from its own
checkpoint of before falls back to that checkpoint's level. Here the better student is one that a teacher has distilled,
and the weak teacher is the student of before; a control goes on with the strong teacher.
"""

from __future__ import annotations

from opd.studies import ablation
from opd.studies.ablation import MEASURED, START, TEACHER, Numbers, Setting, Size
from opd.studies.lab import Lab, Pair, held_out
from opd.studies.outcome import Check, Finding, Outcome, differences, finding

BACK = "then from its old self"
ON = "then from the teacher"
METHOD = Setting(method="reverse_kl")
# The rules, fixed before the run; shares of right answers, greedy.
LEVEL = 0.1
FELL = -0.2


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Up, then down again, for all seeds; see the file's docstring."""
    size = size or Size()
    numbers = measure(lab, size)
    return Outcome(
        setup=(
            f"Two-digit addition, full reverse KL, {len(size.seeds)} pairs of their own seeds, {size.steps} updates of "
            f"{size.prompts_per_step} responses in each direction; accuracy on 200 held-out sums."
        ),
        findings=judge(numbers),
        figure=ablation.draw(
            numbers,
            {"greedy accuracy": "greedy accuracy, share", "sampled accuracy": "sampled accuracy, share"},
            height=2.2,
        ),
        table=ablation.table(numbers, ("greedy accuracy", "sampled accuracy", "entropy", "length")),
    )


def measure(lab: Lab, size: Size) -> Numbers:
    """The student before, the teacher, the student distilled, and that one after each of two further stages."""
    numbers: Numbers = {}
    stage = {"steps": size.steps, "prompts_per_step": size.prompts_per_step}
    for seed in size.seeds:
        pair = lab.pair(seed, size.pair)
        lab.note(f"seed {seed}")
        up = lab.distil(pair, seed=seed, method=METHOD.method, evaluate=held_out(before=True, teacher=True), **stage)
        back = lab.distil(Pair(teacher=pair.student, student=up.model), seed=seed, method=METHOD.method, **stage)
        on = lab.distil(Pair(teacher=pair.teacher, student=up.model), seed=seed, method=METHOD.method, **stage)
        ablation.append(numbers, START, ablation.held_out_of(up.before, "eval/"))
        ablation.append(numbers, TEACHER, ablation.held_out_of(up.before, "eval/teacher/"))
        for name, one in (("distilled", up), (BACK, back), (ON, on)):
            measured = {what: read(one) for what, read in MEASURED.items()}
            ablation.append(numbers, name, {what: value for what, value in measured.items() if value is not None})
    return numbers


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The claims against the numbers."""

    def gap(first: str, second: str, what: str, **side: float) -> Check:
        accuracy = "greedy accuracy"
        return Check(what=what, interval=differences(numbers[first][accuracy], numbers[second][accuracy]), **side)

    return (
        finding(
            "A better student that is distilled from its own weaker self falls back to that level",
            "2604.13016 section 3.3",
            [
                gap(BACK, "distilled", "accuracy after minus before", below=FELL),
                gap(BACK, START, "after minus the weaker self", above=-LEVEL, below=LEVEL),
            ],
        ),
    )
