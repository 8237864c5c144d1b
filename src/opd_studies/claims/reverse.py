"""Reverse distillation: a student after reinforcement learning, distilled from its older checkpoint or a larger model.

Li et al., arXiv 2604.13016 section 3.3: a student after reinforcement learning that is distilled from its older
checkpoint falls back to that level, and so it does with a larger teacher of the same pipeline, along nearly the same
curve. Two controls: itself as the teacher, and a larger teacher trained on right examples only.

Setting B: the larger teacher stopped earlier, only a little better than the student's older checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from opd_studies.lab.lab import Lab
from opd_studies.lab.rl_teachers import (
    BASE,
    BASE_RL,
    CLEAN,
    EARLY,
    FALLING,
    LARGER,
    FamilySize,
    Teaching,
    curve,
    family,
    teach,
    teacher_accuracy,
)
from opd_studies.page import report
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding, over_seeds, short

USE = (
    "Do not distil a student after reinforcement learning from its older checkpoint, nor from a larger model "
    "with the same bad habit: it falls towards the teacher's level. A teacher without the habit did no harm."
)


TEACHERS = (BASE, EARLY, LARGER, CLEAN, BASE_RL)


# Thresholds: shares of right answers, sampled at temperature 1.
FELL = -0.2


LEVEL = 0.1  # two accuracies this close are the same level


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds (one family of models each), and updates of the distillation."""

    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 60
    every: int = 15
    family: FamilySize = field(default_factory=FamilySize)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Held-out accuracies, shares, by teacher; lists hold one number per seed."""

    teacher: dict[str, list[float]]  # the teacher's own
    curve: dict[str, list[dict[int, float]]]  # the student's by update; the start is the student after GRPO
    greedy: dict[str, list[float]]  # the student's after the distillation
    teacher_greedy: dict[str, list[float]]

    @property
    def before(self) -> list[float]:
        """The student's accuracy after GRPO, before the distillation; the same for every teacher."""
        return [one[0] for one in self.curve[BASE]]

    def after(self, teacher: str) -> list[float]:
        """The student's accuracy after the last update."""
        return [one[max(one)] for one in self.curve[teacher]]

    def apart(self, first: str, second: str) -> list[float]:
        """Mean distance of two teachers' curves over the evaluations after the start."""
        pairs = zip(self.curve[first], self.curve[second], strict=True)
        return [sum(abs(a[step] - b[step]) for step in a if step) / (len(a) - 1) for a, b in pairs]


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Distil the student after GRPO from each teacher; see the file's docstring."""
    size = size or Size()
    numbers = measure(lab, size)
    return Outcome(
        setup=(
            f"Sorting five digits, {len(size.seeds)} families of their own seeds. Examples are in falling order, which "
            f"is wrong, in {FALLING:.0%} of the rows. The student imitated them and then learned from a reward (GRPO); "
            "its teachers are itself before GRPO (base), a larger imitator of the same kind of examples (larger), a "
            "larger imitator of right ones (larger, clean), and itself (base + GRPO). A: the larger imitator after "
            f"{size.family.mixed.teacher_steps} updates; B: after {size.family.early_steps} (larger, early). Exact "
            f"reverse KL, {size.steps} updates of 64 responses; 200 held-out rows, 4 samples each at temperature 1."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def measure(lab: Lab, size: Size) -> Numbers:
    """Run all seeds and teachers."""
    models = family(lab, size.seeds, size.family, TEACHERS)
    lessons = [
        Teaching(teacher=teacher, student=student, seed=seed, steps=size.steps, every=size.every)
        for name in TEACHERS
        for seed, teacher, student in zip(size.seeds, models[name], models[BASE_RL], strict=True)
    ]
    trained = iter(teach(lab, lessons))
    numbers = Numbers(teacher={}, curve={}, greedy={}, teacher_greedy={})
    for name in TEACHERS:
        runs = [next(trained) for _ in size.seeds]
        numbers.teacher[name] = [teacher_accuracy(one.before) for one in runs]
        numbers.teacher_greedy[name] = [teacher_accuracy(one.before, "greedy") for one in runs]
        numbers.curve[name] = [curve(one) for one in runs]
        numbers.greedy[name] = [one.after["eval/greedy/reward"] for one in runs]
    return numbers


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""
    before, weaker = numbers.before, numbers.teacher[BASE]

    def fell(name: str) -> list[Check]:
        after = numbers.after(name)
        return [
            Check(what="accuracy after minus before", interval=differences(after, before), below=FELL),
            Check(
                what="after minus the student before GRPO",
                interval=differences(after, weaker),
                above=-LEVEL,
                below=LEVEL,
            ),
        ]

    def better(name: str) -> Check:
        return Check(
            what="larger teacher minus the student before GRPO",
            interval=differences(numbers.teacher[name], weaker),
            above=0.0,
        )

    def apart(name: str) -> Check:
        return Check(
            what="mean distance of the two curves after the start",
            interval=over_seeds(numbers.apart(name, BASE)),
            below=LEVEL,
        )

    def kept(name: str) -> Check:
        return Check(
            what=f"after minus before, teacher {name}", interval=differences(numbers.after(name), before), above=-LEVEL
        )

    return (
        finding(
            "A student after reinforcement learning that is distilled from what it was before falls back to that level",
            "2604.13016 section 3.3",
            fell(BASE),
        ),
        finding(
            "A larger teacher of the same pipeline, better than what the student was before, drives it back to that "
            "level too",
            "2604.13016 section 3.3",
            *([better(name), *fell(name)] for name in (LARGER, EARLY)),
        ),
        finding(
            "Both teachers drive it down along nearly the same curve",
            "2604.13016 section 3.3",
            *([apart(name)] for name in (LARGER, EARLY)),
        ),
        finding(
            "It is what the teacher says and not the distillation: from itself, and from a larger teacher without the "
            "pipeline's habit, the student stays",
            "2604.13016 section 3.3, controls",
            [kept(BASE_RL), kept(CLEAN)],
        ),
    )


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """Means over seeds, one row per teacher."""
    rows: list[tuple[str, ...]] = [
        ("teacher", "its accuracy", "student before", "student after", "its greedy accuracy", "student after, greedy")
    ]
    for name in TEACHERS:
        columns = (
            numbers.teacher[name],
            numbers.before,
            numbers.after(name),
            numbers.teacher_greedy[name],
            numbers.greedy[name],
        )
        rows.append((name, *(short(over_seeds(values).mean) for values in columns)))
    return tuple(rows)


def draw(numbers: Numbers) -> report.Figure:
    """Accuracy by update, mean and range of the seeds; each teacher's own accuracy as a dotted line."""
    figure, axes = report.figure(1, width=5.6, height=3.4)
    panel = axes[0][0]
    for name, colour in zip(TEACHERS, report.COLOURS, strict=False):
        curves = numbers.curve[name]
        updates = sorted(curves[0])
        by_update = [[one[update] for one in curves] for update in updates]
        panel.plot(
            updates, [sum(v) / len(v) for v in by_update], "o-", color=colour, markersize=3, label=f"teacher: {name}"
        )
        panel.fill_between(updates, [min(v) for v in by_update], [max(v) for v in by_update], color=colour, alpha=0.15)
        panel.axhline(over_seeds(numbers.teacher[name]).mean, color=colour, linestyle=":", linewidth=1)
    panel.set(
        xlabel="updates of the student after GRPO",
        ylabel="accuracy at temperature 1, share",
        ylim=(0, 1.02),
        title="student: mean and range over seeds; dotted: the teacher itself",
    )
    panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
