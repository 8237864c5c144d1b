"""Weights of a number's digits: the leading digit more than the last, and less where the teacher is not certain.

"GUI-SD", arXiv 2605.00642: a model that clicks learns from itself, shown the target as a box, with a weight of 3, 2, 1
for the digits of a coordinate (accuracy of the hundreds digit 77.0 to 79.7) and one that falls with the teacher's
entropy (a hard subset 17.5 to 21.1). The loss is divided by the number of tokens and not by the weights, so they are a
learning rate, too: the control has the same mean weight at every token.

Tables in a made-up world (`opd_studies.worlds.pointing`): numbers of three digits, a teacher whose numbers lie around
the target, and the exact probability of a number in the box. Plain gradient descent with momentum, since Adam divides
the weight of a table's entry out. In setting A the teacher is as vague as a box, in setting B half as vague. Arms are
compared at one learning rate, as in the paper, and at the rate that is best for each on seeds that are not reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from opd.method import Method
from opd.methods.gui_sd import gui_sd
from opd.pieces.needs import needing_tokenizer, needs_of
from opd.pieces.packed import valid
from opd.types import Batch, Weight
from opd_studies.lab.lab import Lab
from opd_studies.page import report
from opd_studies.page.outcome import Check, Finding, Outcome, chosen, differences, finding, over_seeds, ranged, short
from opd_studies.worlds.pointing import BOX, PROMPTS, Kind, train
from opd_studies.worlds.wrong_habits import GROUP, PER_STEP

USE = (
    "Begin `gui_sd` with `entropy: false`: certainty of the teacher weighed down what was still to learn. Weights of "
    "digits helped at one small learning rate and not at the best one: tune the rate with `digits: false` too."
)

BOTH, PLACES, CERTAIN, EVEN, LEVEL = (
    "GUI-SD",
    "digits alone",
    "certainty alone",
    "equal weights",
    "GUI-SD's mean weight",
)
KINDS = {"A": Kind(blur=12.0), "B": Kind(blur=6.0)}
TUNING_SEEDS = (1000, 1001)
SAME_RATE = 3.0

Courses: TypeAlias = list[dict[int, dict[str, float]]]  # by seed, by update: "inside" and "error"


def levelled() -> Method:
    """`gui_sd` with the mean of its weights over the step's tokens at every token."""
    method = gui_sd()

    def make(tokenizer: object) -> Weight:
        weigh = method.with_tokenizer(tokenizer).weight

        def weight(batch: Batch) -> Tensor:
            w = weigh(batch)
            return torch.full_like(w, float(valid(w, batch.mask).mean()))

        return weight

    return replace(method, weight=needing_tokenizer("levelled", make, *needs_of(method.weight).traits))


ARMS: Mapping[str, Callable[[], Method]] = {
    BOTH: gui_sd,
    PLACES: lambda: gui_sd(entropy=False),
    CERTAIN: lambda: gui_sd(digits=False),
    EVEN: lambda: gui_sd(digits=False, entropy=False),
    LEVEL: levelled,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds, updates, and the learning rates that are tried."""

    seeds: Sequence[int] = (1, 2, 3, 4, 5)
    steps: int = 40
    every: int = 10
    rates: Sequence[float] = (1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """By setting, then by arm: the best rate, and per seed the exams at it and at `SAME_RATE`."""

    rates: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    best: dict[str, dict[str, Courses]] = field(default_factory=dict[str, dict[str, Courses]])
    same: dict[str, dict[str, Courses]] = field(default_factory=dict[str, dict[str, Courses]])


def end(courses: Courses, what: str = "inside") -> list[float]:
    """A number after the last update, by seed."""
    return [course[max(course)][what] for course in courses]


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Tune each arm's rate, and run all arms in both settings."""
    size = size or Size()
    numbers = measure(lab, size)
    return Outcome(
        setup=(
            f"Tables, {len(size.seeds)} seeds: {PROMPTS} targets between 0 and 999, boxes of {2 * BOX + 1} numbers. "
            f"The teacher's numbers have a deviation of {KINDS['A'].blur:g} (A) or {KINDS['B'].blur:g} (B). "
            f"{size.steps} updates of {PER_STEP} targets with {GROUP} numbers each, gradient descent with momentum .9. "
            f"One rate: {SAME_RATE:g}; best rates of {', '.join(f'{r:g}' for r in size.rates)} by the mass in the box "
            f"at the end, mean of seeds {', '.join(map(str, TUNING_SEEDS))} ({chosen(numbers.rates)})."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def measure(lab: Lab, size: Size) -> Numbers:
    """Run all courses and collect their exams."""
    numbers = Numbers()

    def courses(made: Callable[[], Method], kind: Kind, seeds: Sequence[int], rate: float) -> Courses:
        return [train(made, kind, seed, rate, steps=size.steps, every=size.every) for seed in seeds]

    for setting, kind in KINDS.items():
        rates, best, same = dict[str, float](), dict[str, Courses](), dict[str, Courses]()
        for arm, made in ARMS.items():
            tried = {rate: sum(end(courses(made, kind, TUNING_SEEDS, rate))) for rate in size.rates}
            rates[arm] = max(tried, key=tried.__getitem__)
            best[arm] = courses(made, kind, size.seeds, rates[arm])
            same[arm] = courses(made, kind, size.seeds, SAME_RATE)
        numbers.rates[setting], numbers.best[setting], numbers.same[setting] = rates, best, same
        lab.note(f"setting {setting}")
    return numbers


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""

    def above(which: dict[str, dict[str, Courses]], first: str, second: str) -> list[list[Check]]:
        what = f"probability of a number in the box at the end, {first} minus {second}"
        return [
            [Check(what=what, interval=differences(end(which[kind][first]), end(which[kind][second])), above=0.0)]
            for kind in KINDS
        ]

    paper, control = "2605.00642 ablations", "2605.00642 ablations (control)"
    return (
        finding(
            "At one learning rate weights of digits end above equal ones", paper, *above(numbers.same, PLACES, EVEN)
        ),
        finding("At one learning rate weights of certainty do", paper, *above(numbers.same, CERTAIN, EVEN)),
        finding("At one learning rate both end above equal weights", paper, *above(numbers.same, BOTH, EVEN)),
        finding("At one learning rate both end above their mean weight", control, *above(numbers.same, BOTH, LEVEL)),
        finding(
            "At the best rates weights of digits end above equal ones", control, *above(numbers.best, PLACES, EVEN)
        ),
        finding("At the best rates both end above equal weights", control, *above(numbers.best, BOTH, EVEN)),
    )


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """One row per arm and setting: means over seeds."""
    rows: list[tuple[str, ...]] = [
        ("setting", "arm", "rate", "in the box, best rate", "distance", f"in the box, rate {SAME_RATE:g}")
    ]
    for setting, arms in numbers.best.items():
        for arm, courses in arms.items():
            inside = over_seeds(end(courses))
            rows.append(
                (
                    setting,
                    arm,
                    f"{numbers.rates[setting][arm]:g}",
                    ranged(inside),
                    short(over_seeds(end(courses, "error")).mean),
                    short(over_seeds(end(numbers.same[setting][arm])).mean),
                )
            )
    return tuple(rows)


def draw(numbers: Numbers) -> report.Figure:
    """The mass in the box by update at one learning rate, one panel per setting."""
    figure, axes = report.figure(len(numbers.same), width=3.6, height=3.0)
    for panel, (setting, arms) in zip(axes[0], numbers.same.items(), strict=True):
        report.courses(panel, arms, "inside")
        panel.set(xlabel="updates", title=f"setting {setting}, rate {SAME_RATE:g}", ylim=(0.0, 1.0))
    axes[0][0].set_ylabel("probability in the box")
    axes[0][-1].legend(fontsize=7, loc="lower right")
    return figure
