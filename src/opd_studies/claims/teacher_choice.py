"""Which teacher: a larger model of the same pipeline, or the student's own version after reinforcement learning?

Zhu et al., arXiv 2605.11182 Fig. 13: of two teachers with the same score, the student's own RLVR version teaches better
than a larger model, and its top-k tokens overlap more with the student's. Li et al., arXiv 2604.13016 section 3.2: a
larger teacher after reinforcement learning closes more of its gap to the student than before it, although it overlaps
less: a high overlap is not sufficient.

Settings B: for teaching better, a quarter of the updates with their own learning rates, because the distance of the
teacher matters most with few updates; for the overlap, the larger teacher after GRPO; for gap recovery, the larger
teacher stopped early, which has the least to teach.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opd_studies.lab.distilling import Trained
from opd_studies.lab.lab import Lab
from opd_studies.lab.rl_teachers import (
    BASE,
    BASE_RL,
    CLEAN,
    EARLY,
    FALLING,
    LARGER,
    LARGER_RL,
    TOP,
    FamilySize,
    Teaching,
    curve,
    family,
    teach,
    teacher_accuracy,
)
from opd_studies.page import report
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding, over_seeds, ranged, short

USE = (
    "Choose a teacher by its own score on your prompts; whether more overlap makes up for less skill is "
    "undecided. Between an RLVR version of the student and a larger model of about the same score no difference "
    "showed."
)


TEACHERS = (BASE_RL, CLEAN, LARGER_RL, LARGER, EARLY)


# Thresholds.
SAME_SCORE = 0.1  # share of right answers, sampled at temperature 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds (one family of models each), updates, and candidate learning rates for each teacher."""

    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 60
    few_steps: int = 15  # of setting B
    every: int = 15
    learning_rates: Sequence[float] = (2e-3, 5e-3)
    family: FamilySize = field(default_factory=FamilySize)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """By teacher; lists hold one number per seed. Accuracies are held-out shares, sampled at temperature 1."""

    learning_rate: dict[str, float]  # the best on the first seed
    teacher: dict[str, list[float]]  # accuracy of the teacher
    overlap: dict[str, list[float]]  # of the top tokens of student and teacher at the first update, a share
    curve: dict[str, list[dict[int, float]]]  # accuracy of the student by update; the start is the base
    few: dict[str, list[float]]  # accuracy of the student after the few updates of setting B

    def before(self, teacher: str) -> list[float]:
        """The student's accuracy before; the same for every teacher."""
        return [one[0] for one in self.curve[teacher]]

    def after(self, teacher: str) -> list[float]:
        """The student's accuracy after the last update."""
        return [one[max(one)] for one in self.curve[teacher]]

    def recovery(self, teacher: str) -> list[float]:
        """(after - before) / (teacher - before), arXiv 2604.13016; NaN if the teacher is not better than the start.

        A check on NaN is undecided.
        """
        triples = zip(self.before(teacher), self.teacher[teacher], self.after(teacher), strict=True)
        return [(after - start) / (top - start) if top > start else float("nan") for start, top, after in triples]

    def shortfall(self, teacher: str, other: str) -> list[float]:
        """The student's gain from `teacher`, minus the gain that the gap recovery of `other` would give.

        Below 0 if the recovery from `teacher` is lower. Unlike the difference of recoveries, it stays finite when the
        gap to `teacher` is small.
        """
        rows = zip(self.before(teacher), self.teacher[teacher], self.after(teacher), self.recovery(other), strict=True)
        return [after - start - share * (top - start) for start, top, after, share in rows]


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Distil the base from each teacher; see the file's docstring."""
    size = size or Size()
    numbers = measure(lab, size)
    rates = ", ".join(f"{name} {rate:g}" for name, rate in numbers.learning_rate.items())
    return Outcome(
        setup=(
            f"Sorting five digits, {len(size.seeds)} families of their own seeds. Examples are in falling order, which "
            f"is wrong, in {FALLING:.0%} of the rows. The student is a small imitator of them (base); teachers are "
            "itself after GRPO (base + GRPO), a larger imitator of right examples that is as good (larger, clean), a "
            "larger imitator of the student's kind of examples (larger), the same stopped early (larger, early), and "
            f"`larger` after GRPO (larger + GRPO). Exact reverse KL, {size.steps} updates of 64 responses; 200 "
            f"held-out rows, 4 samples each at temperature 1; overlap of the top {TOP} tokens at the first update. "
            f"Learning rate: the best on seed {size.seeds[0]} of "
            f"{', '.join(f'{rate:g}' for rate in size.learning_rates)}, chosen: {rates}. "
            f"B: {size.few_steps} updates with rates chosen likewise (teaching better); larger + GRPO in place of "
            "larger, clean (overlap); "
            "larger, early in place of larger (gap recovery)."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def measure(lab: Lab, size: Size) -> Numbers:
    """Run both settings, all seeds and teachers."""
    models = family(lab, size.seeds, size.family, (BASE, *TEACHERS))
    rates, runs = tuned(lab, size, models, TEACHERS, size.steps)
    _, few = tuned(lab, size, models, (BASE_RL, CLEAN), size.few_steps)
    return Numbers(
        learning_rate=rates,
        teacher={name: [teacher_accuracy(one.before) for one in ones] for name, ones in runs.items()},
        overlap={name: [one.rows[0]["compare/overlap_ratio"] for one in ones] for name, ones in runs.items()},
        curve={name: [curve(one) for one in ones] for name, ones in runs.items()},
        few={name: [one.after["eval/sampled/reward"] for one in ones] for name, ones in few.items()},
    )


def tuned(
    lab: Lab, size: Size, models: Mapping[str, Sequence[Path]], teachers: Sequence[str], steps: int
) -> tuple[dict[str, float], dict[str, list[Trained]]]:
    """By teacher, the best learning rate on the first seed, and the runs of all seeds with it."""

    def lesson(name: str, place: int, rate: float) -> Teaching:
        return Teaching(
            teacher=models[name][place],
            student=models[BASE][place],
            seed=size.seeds[place],
            learning_rate=rate,
            steps=steps,
            every=size.every,
        )

    tried = [(name, rate) for name in teachers for rate in size.learning_rates]
    first = teach(lab, [lesson(name, 0, rate) for name, rate in tried])
    rates = best_rates({key: one.after["eval/sampled/reward"] for key, one in zip(tried, first, strict=True)})
    chosen = [lesson(name, place, rates[name]) for name in teachers for place in range(len(size.seeds))]
    trained = iter(teach(lab, chosen))
    return rates, {name: [next(trained) for _ in size.seeds] for name in teachers}


def best_rates(accuracy: dict[tuple[str, float], float]) -> dict[str, float]:
    """For each teacher the learning rate with the highest accuracy."""
    names = {name: None for name, _ in accuracy}
    return {
        name: max((rate for one, rate in accuracy if one == name), key=lambda rate: accuracy[name, rate])
        for name in names
    }


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""

    def same_score(larger: str) -> Check:
        return Check(
            what="accuracy of the RLVR teacher minus the larger one's",
            interval=differences(numbers.teacher[BASE_RL], numbers.teacher[larger]),
            above=-SAME_SCORE,
            below=SAME_SCORE,
        )

    def less_recovered(larger: str) -> list[Check]:
        return [
            more("larger teacher before it minus the student", numbers.teacher[larger], numbers.before(larger)),
            Check(
                what="gain from that teacher minus what the recovery from the other one would give",
                interval=over_seeds(numbers.shortfall(larger, LARGER_RL)),
                below=0.0,
            ),
        ]

    better = "student's accuracy after the RLVR teacher minus after the larger one"

    def more(what: str, first: Sequence[float], second: Sequence[float]) -> Check:
        return Check(what=what, interval=differences(first, second), above=0.0)

    return (
        finding(
            "Of two teachers of the same score, the student's own RLVR version teaches it better than a larger model",
            "2605.11182 Fig. 13",
            [same_score(CLEAN), more(better, numbers.after(BASE_RL), numbers.after(CLEAN))],
            [same_score(CLEAN), more(better, numbers.few[BASE_RL], numbers.few[CLEAN])],
        ),
        finding(
            "At the same score the RLVR teacher's top tokens overlap more with the student's from the start",
            "2605.11182 Fig. 13",
            *(
                [same_score(one), more("difference of overlap ratios", numbers.overlap[BASE_RL], numbers.overlap[one])]
                for one in (CLEAN, LARGER_RL)
            ),
        ),
        finding(
            "A larger teacher after reinforcement learning closes more of its gap to the student than before it",
            "2604.13016 section 3.2",
            *(less_recovered(one) for one in (LARGER, EARLY)),
        ),
        finding(
            "A high overlap is not sufficient: the larger teacher overlaps more before reinforcement learning than "
            "after it, and the student gains less from it",
            "2604.13016 section 3.2",
            [
                more("difference of overlap ratios", numbers.overlap[LARGER], numbers.overlap[LARGER_RL]),
                more("gain after it minus gain before it", numbers.after(LARGER_RL), numbers.after(LARGER)),
            ],
        ),
    )


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """One row per teacher: means over seeds, gap recovery with its 95 % interval."""
    rows: list[tuple[str, ...]] = [
        ("teacher", "its accuracy", "student before", "student after", "gap recovery", "overlap at the start")
    ]
    for name in TEACHERS:
        recovery = over_seeds(numbers.recovery(name))
        rows.append(
            (
                name,
                *(
                    short(over_seeds(v).mean)
                    for v in (numbers.teacher[name], numbers.before(name), numbers.after(name))
                ),
                ranged(recovery),
                short(over_seeds(numbers.overlap[name]).mean),
            )
        )
    return tuple(rows)


def draw(numbers: Numbers) -> report.Figure:
    """Accuracy by update with the teachers' own dotted, and accuracy gained against the overlap at the start."""
    figure, axes = report.figure(2, width=3.9, height=3.2)
    left, right = axes[0]
    for name, colour in zip(TEACHERS, report.COLOURS, strict=False):
        curves = numbers.curve[name]
        updates = sorted(curves[0])
        by_update = [[one[update] for one in curves] for update in updates]
        left.plot(updates, [sum(v) / len(v) for v in by_update], "o-", color=colour, markersize=3)
        left.fill_between(updates, [min(v) for v in by_update], [max(v) for v in by_update], color=colour, alpha=0.15)
        left.axhline(over_seeds(numbers.teacher[name]).mean, color=colour, linestyle=":", linewidth=1)
        gain = [after - before for after, before in zip(numbers.after(name), numbers.before(name), strict=True)]
        right.plot(numbers.overlap[name], gain, "o", color=colour, markersize=5, label=name)
    left.set(
        xlabel="updates",
        ylabel="student's accuracy at temperature 1, share",
        ylim=(0, 1.02),
        title="mean and range of seeds; dotted: the teacher",
    )
    right.set(
        xlabel=f"overlap of the top {TOP} tokens at the start, share",
        ylabel="accuracy gained, share",
        title="a point a seed",
    )
    right.legend(fontsize=7, title="teacher", title_fontsize=7)
    return figure
