"""An agent's mistakes, after which the teacher knows no way: weights by turn, against plain ones and a mask.

"SOD", arXiv 2605.07725: after a wrong tool call the teacher's targets get unreliable, so each turn is distilled with a
weight that falls with the distance of student and teacher in it (0.6B: 24.2 against 20.0 for plain distillation and
11.3 for GRPO; 1.7B: 43.0, with equal weights 34.7, with no distillation after a wrong step 31.9). The weights have a
mean below 1, so one control has the same mean in every turn; and they are uneven, so another shuffles them among a
response's turns.

Tables in a made-up world (`opd_studies.worlds.tool_chains`): four calls of a tool must be right, with two mistakes at
most. After a mistake the teacher is sure of a wrong token in 30 % of the places, after two in 60 %. In setting A what
the student learns after a mistake changes what it does without one; in setting B it does not. The probability of
success is exact. All arms have the same reward beside the log-ratio, and the learning rate that is best for them on
seeds that are not reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from opd.method import Method
from opd.methods.grpo import grpo
from opd.methods.sod import sod
from opd_studies.lab.lab import Lab
from opd_studies.page import report
from opd_studies.page.outcome import (
    Check,
    Finding,
    Outcome,
    SeedInterval,
    chosen,
    differences,
    finding,
    over_seeds,
    ranged,
    short,
)
from opd_studies.worlds.methods import sod_with, sod_without
from opd_studies.worlds.tool_chains import (
    CALL,
    LETTERS,
    LOST,
    STEPS,
    TASKS,
    TURNS,
    Course,
    train,
    turns_after_a_mistake,
)
from opd_studies.worlds.wrong_habits import GROUP, PER_STEP

USE = (
    "Compare the reward alone, and a filter of yours that leaves out the turns after a failed call: in A both ended "
    "above `sod`. `sod` beats plain distillation from a teacher that is lost after mistakes, and not because its "
    "weights are small or uneven; `reference: batch` was better in A."
)

SOD, EVEN, LEVEL, SHUFFLED = "SOD", "equal weights", "SOD's mean weight", "shuffled weights"
MASK, GRPO, BATCH = "none after a mistake", "GRPO alone", "SOD, mean reference"

ARMS: Mapping[str, Callable[[], Method]] = {
    SOD: sod,
    EVEN: lambda: sod_with("even"),
    LEVEL: lambda: sod_with("level"),
    SHUFFLED: lambda: sod_with("shuffled"),
    MASK: lambda: sod_without(turns_after_a_mistake),
    GRPO: lambda: grpo(clip_high=0.28, epsilon=1e-6),
    BATCH: lambda: sod(reference="batch"),
}
CARRIES = {"A": True, "B": False}

TUNING_SEEDS = (1000, 1001)

Courses: TypeAlias = list[dict[int, dict[str, float]]]  # by seed, by update: "all" and "without"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds, updates, and the learning rates that are tried."""

    seeds: Sequence[int] = (1, 2, 3, 4, 5)
    steps: int = 60
    every: int = 10
    rates: Sequence[float] = (0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """By setting, then by arm: the chosen rate, and per seed probabilities of success by update.

    `apart`: by setting, of equal weights, |log q - log p| after the first mistake minus before, per seed.
    """

    rates: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    success: dict[str, dict[str, Courses]] = field(default_factory=dict[str, "dict[str, Courses]"])
    apart: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    def end(self, setting: str, arm: str, part: str = "all") -> list[float]:
        """The probability of success after the last update."""
        return [course[max(course)][part] for course in self.success[setting][arm]]


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Tune each arm's rate, and run all arms in both settings."""
    size = size or Size()
    numbers = measure(lab, size)
    return Outcome(
        setup=(
            f"Tables, {len(size.seeds)} seeds: {TASKS} tasks of {STEPS} calls of {CALL} tokens out of {LETTERS}, at "
            f"most {TURNS} turns. The teacher's share of wrong places is {LOST[1]:g} after one mistake and "
            f"{LOST[2]:g} after more. {size.steps} updates of {PER_STEP} tasks with {GROUP} responses each, Adam; the "
            "probability of success is exact. A: the student's logits are the same whatever went wrong before; B: "
            f"they are its own for each number of mistakes. Rates of {', '.join(f'{r:g}' for r in size.rates)} by the "
            f"success at the end, mean of seeds {', '.join(map(str, TUNING_SEEDS))} ({chosen(numbers.rates)})."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def measure(lab: Lab, size: Size) -> Numbers:
    """Run all courses and collect their probabilities of success."""
    numbers = Numbers()
    for setting, carries in CARRIES.items():
        rates: dict[str, float] = {}
        courses: dict[str, list[Course]] = {}
        for arm, made in ARMS.items():
            tried = {rate: _tuned(made, carries, rate, size) for rate in size.rates}
            rates[arm] = max(tried, key=tried.__getitem__)
            courses[arm] = [_course(made, carries, seed, rates[arm], size) for seed in size.seeds]
            lab.note(f"setting {setting}: {arm}")
        numbers.rates[setting] = rates
        numbers.success[setting] = {arm: [one.exams for one in found] for arm, found in courses.items()}
        numbers.apart[setting] = [after - before for before, after in (one.apart for one in courses[EVEN])]
    return numbers


def _course(made: Callable[[], Method], carries: bool, seed: int, rate: float, size: Size) -> Course:
    return train(made, carries, seed, rate, steps=size.steps, every=size.every)


def _tuned(made: Callable[[], Method], carries: bool, rate: float, size: Size) -> float:
    ends = [_course(made, carries, seed, rate, size).exams[size.steps]["all"] for seed in TUNING_SEEDS]
    return sum(ends) / len(ends)


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""

    def above(first: str, second: str) -> list[list[Check]]:
        def check(setting: str) -> Check:
            interval = differences(numbers.end(setting, first), numbers.end(setting, second))
            return Check(what=f"success at the end, {first} minus {second}", interval=interval, above=0.0)

        return [[check(setting)] for setting in CARRIES]

    def farther(setting: str) -> list[Check]:
        interval: SeedInterval = over_seeds(numbers.apart[setting])
        what = "|log q - log p| in nats per token, after the first mistake minus before, in the middle of the training"
        return [Check(what=what, interval=interval, above=0.0)]

    return (
        finding(
            "After a mistake student and teacher are farther apart", "2605.07725 abstract", farther("A"), farther("B")
        ),
        finding("SOD ends above equal weights", "2605.07725 ablations", *above(SOD, EVEN)),
        finding("SOD ends above GRPO alone", "2605.07725 results", *above(SOD, GRPO)),
        finding("SOD ends above no distillation after a mistake", "2605.07725 ablations", *above(SOD, MASK)),
        finding("SOD ends above its mean weight in every turn", "2605.07725 ablations (control)", *above(SOD, LEVEL)),
        finding(
            "SOD ends above its weights, shuffled among a response's turns",
            "2605.07725 ablations (control)",
            *above(SOD, SHUFFLED),
        ),
    )


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """One row per arm and setting: means over seeds."""
    rows: list[tuple[str, ...]] = [("setting", "arm", "rate", "success at the end", "without a mistake")]
    for setting, arms in numbers.success.items():
        for arm in arms:
            end = over_seeds(numbers.end(setting, arm))
            rows.append(
                (
                    setting,
                    arm,
                    f"{numbers.rates[setting][arm]:g}",
                    ranged(end),
                    short(over_seeds(numbers.end(setting, arm, "without")).mean),
                )
            )
    return tuple(rows)


def draw(numbers: Numbers) -> report.Figure:
    """Probability of success by update, mean and range of seeds, one panel per setting."""
    figure, axes = report.figure(len(numbers.success), width=3.6, height=3.0)
    for panel, (setting, arms) in zip(axes[0], numbers.success.items(), strict=True):
        report.courses(panel, arms, "all")
        panel.set(xlabel="updates", title=f"setting {setting}", ylim=(0.0, 1.0))
    axes[0][0].set_ylabel("probability of success")
    axes[0][-1].legend(fontsize=7, loc="lower right")
    return figure
