"""A teacher that is sure of wrong answers: log-ratios in the order of the outcomes, against a reward beside them.

"Uni-OPD", arXiv 2605.03677: where a teacher prefers wrong responses, shifting log-ratios until right ones score higher
by a margin (44.6 to 48.1 in its single-teacher mathematics), or leaving disordered responses out (47.7), beats plain
on-policy distillation. The shift is a reward in disguise, so the control is the same reward beside the log-ratio, at
its best weight, and the reward alone, on as many responses.

Tables in a made-up world (`opd_studies.worlds.wrong_habits`): on 30 % of the prompts the teacher is sure of a wrong
last token. The methods are the library's: `uni_opd` with its shift, its mask, or neither; `grpo`; and the log-ratio
plus a multiple of GRPO's advantage. Accuracy is exact. In setting A the student is sometimes right from the beginning;
in setting B almost never, so that the reward alone has little to start from. The balance is off, so that all methods
train the same responses. The best margin and weight are chosen on a seed that is not reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from opd.method import Method
from opd.methods.grpo import grpo
from opd.methods.uni_opd import uni_opd
from opd_studies.lab.lab import Lab
from opd_studies.page import report
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding, over_seeds, ranged, short
from opd_studies.worlds.methods import opd_with_reward
from opd_studies.worlds.wrong_habits import GROUP, HABIT, PER_STEP, PROMPTS, WRONG, Course, Kind, train

USE = (
    "If you have a teacher and a reward, try the reward beside the log-ratio at a tuned weight first: it ended above "
    "the shift of `uni_opd` at its best `delta`. The shift beats plain distillation from a teacher that is sure of "
    "wrong answers; the paper's `delta` is small here."
)


OPD, SHIFT, MASK, GRPO = "OPD", "shift", "mask", "GRPO"
BEST_SHIFT, BEST_SUM = "shift, best delta", "OPD + GRPO, best weight"


KINDS = {"A": Kind(tokens=3, head_start=0.8), "B": Kind(tokens=5, head_start=0.0)}


TUNING_SEED = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds, updates, the learning rate, and the margins and weights that are tried."""

    seeds: Sequence[int] = (1, 2, 3, 4, 5)
    steps: int = 100
    every: int = 20
    rate: float = 0.1
    deltas: Sequence[float] = (0.4, 1.6, 6.4)
    weights: Sequence[float] = (1.0, 4.0, 16.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """By setting, then by method: one course of accuracies by update and part of the prompts, per seed."""

    accuracy: dict[str, dict[str, list[dict[int, dict[str, float]]]]]
    best: dict[str, tuple[float, float]]  # by setting: delta of the shift, weight of the reward

    def end(self, setting: str, method: str, part: str = "all") -> list[float]:
        """Accuracy after the last update."""
        return [course[max(course)][part] for course in self.accuracy[setting][method]]


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Tune the margin and the weight, and run all methods in both settings."""
    size = size or Size()
    numbers = measure(lab, size)
    chosen = "; ".join(f"{name}: delta {delta:g}, weight {weight:g}" for name, (delta, weight) in numbers.best.items())
    return Outcome(
        setup=(
            f"Tables, {len(size.seeds)} seeds: {PROMPTS} prompts with one right response each; on {WRONG:.0%} of them "
            f"the teacher gives a wrong last token {HABIT:g}. {size.steps} updates of {PER_STEP} prompts with {GROUP} "
            f"responses each, Adam at {size.rate:g}; accuracy is the exact mass of right responses. A: responses of "
            f"{KINDS['A'].tokens} tokens, which the student sometimes gets right from the start; B: of "
            f"{KINDS['B'].tokens} tokens, almost never. Delta of {', '.join(f'{d:g}' for d in size.deltas)} and weight "
            f"of {', '.join(f'{w:g}' for w in size.weights)} by the accuracy on seed {TUNING_SEED} ({chosen}); the "
            "paper's delta is 0.4."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def shifted(delta: float) -> Callable[[], Method]:
    """`uni_opd` with a shift, without balance."""
    return lambda: uni_opd(delta=delta, balance=None)


def summed(weight: float) -> Callable[[], Method]:
    """The log-ratio plus `weight` times GRPO's advantage."""
    return lambda: opd_with_reward(weight)


def measure(lab: Lab, size: Size) -> Numbers:
    """Run all courses and collect their accuracies."""
    numbers = Numbers(accuracy={}, best={})
    for setting, kind in KINDS.items():
        tried = {d: _end(shifted(d), kind, size) for d in size.deltas}
        weighed = {w: _end(summed(w), kind, size) for w in size.weights}
        delta, weight = max(tried, key=tried.__getitem__), max(weighed, key=weighed.__getitem__)
        numbers.best[setting] = delta, weight
        lab.note(f"setting {setting} tuned")
        methods: Mapping[str, Callable[[], Method]] = {
            OPD: lambda: uni_opd(margin="none", balance=None),
            SHIFT: shifted(size.deltas[0]),
            MASK: lambda: uni_opd(margin="mask", balance=None),
            BEST_SHIFT: shifted(delta),
            BEST_SUM: summed(weight),
            GRPO: grpo,
        }
        numbers.accuracy[setting] = {
            name: [_course(made, kind, seed, size).exams for seed in size.seeds] for name, made in methods.items()
        }
        lab.note(f"setting {setting} trained")
    return numbers


def _course(made: Callable[[], Method], kind: Kind, seed: int, size: Size) -> Course:
    return train(made, kind, seed, size.rate, steps=size.steps, every=size.every)


def _end(made: Callable[[], Method], kind: Kind, size: Size) -> float:
    return _course(made, kind, TUNING_SEED, size).exams[size.steps]["all"]


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""

    def above(first: str, second: str, part: str = "all") -> list[list[Check]]:
        what = "accuracy" if part == "all" else "accuracy where the teacher is wrong"
        return [
            [
                Check(
                    what=f"{what} at the end, {first} minus {second}",
                    interval=differences(numbers.end(setting, first, part), numbers.end(setting, second, part)),
                    above=0.0,
                )
            ]
            for setting in KINDS
        ]

    return (
        finding(
            "The margin shift with the paper's margin ends above plain OPD",
            "2605.03677 ablations",
            *above(SHIFT, OPD),
        ),
        finding(
            "It does so on the prompts on which the teacher is wrong",
            "2605.03677 eq. 9-11",
            *above(SHIFT, OPD, "habit"),
        ),
        finding("The margin mask ends above plain OPD", "2605.03677 ablations", *above(MASK, OPD)),
        finding(
            "With its best margin the shift ends above OPD plus GRPO's advantage at its best weight",
            "2605.03677 ablations (control)",
            *above(BEST_SHIFT, BEST_SUM),
        ),
        finding(
            "With its best margin the shift ends above the reward alone, on as many responses",
            "2605.03677 ablations (control)",
            *above(BEST_SHIFT, GRPO),
        ),
    )


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """One row per method and setting: means over seeds."""
    rows: list[tuple[str, ...]] = [
        ("setting", "method", "accuracy at the end", "where the teacher is wrong", "where it is right")
    ]
    for setting, methods in numbers.accuracy.items():
        for name in methods:
            end = over_seeds(numbers.end(setting, name))
            rows.append(
                (
                    setting,
                    name,
                    ranged(end),
                    short(over_seeds(numbers.end(setting, name, "habit")).mean),
                    short(over_seeds(numbers.end(setting, name, "others")).mean),
                )
            )
    return tuple(rows)


def draw(numbers: Numbers) -> report.Figure:
    """Accuracy by update, mean and range of seeds, one panel per setting."""
    figure, axes = report.figure(len(numbers.accuracy), width=3.6, height=3.0)
    for panel, (setting, methods) in zip(axes[0], numbers.accuracy.items(), strict=True):
        report.courses(panel, methods, "all")
        panel.set(xlabel="updates", title=f"{setting}: {KINDS[setting].tokens} tokens", ylim=(0.0, 1.0))
    axes[0][0].set_ylabel("accuracy, share")
    axes[0][-1].legend(fontsize=7, loc="upper left")
    return figure
