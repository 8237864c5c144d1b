"""Jumps along the weights' own change: how many updates do they save, at which learning rate, and at what price?

EffOPD, arXiv 2605.11739: after 1, 2, 4, 8, ... updates the weights jump along their recent change, as far as a
validation on 50 training prompts improves; the paper reports a third of the updates. Here the cost is the number of
updates, and of responses including those of validations, until a tenth of the divergence from the teacher is gone.

Setting A is the paper's method in a fair comparison: the sampled token with and without jumps, validated by the reward,
each at the fastest of three learning rates on the first seed. Setting B should have the straightest change: the exact
reverse KL, validated by the teacher, both at the smallest rate.

There are five pairs, because three left B's saving open (log2 of updates between -1.43 and 4.42). The first seed runs
all rates, the others only those of the claims.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from opd_studies.lab import ablation
from opd_studies.lab.ablation import Setting
from opd_studies.lab.distilling import Trained, held_out
from opd_studies.lab.lab import SORTERS, Lab
from opd_studies.page import report
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding, short

USE = (
    "Tune the learning rate before you try `eff_opd`: at the best rate its jumps saved no updates and cost "
    "validation responses. Whether they save more at a small rate is undecided. They did no harm."
)


PROMPTS = 50  # per validation


GONE = 0.1  # of the divergence at the start


SAMPLED, EXACT = "sampled token", "exact reverse KL"


PAIRS: dict[str, dict[str, Setting]] = {  # pairs of methods, without and with jumps
    SAMPLED: {
        "opd": Setting(method="opd"),
        "eff_opd": Setting(method="eff_opd", options={"prompts": PROMPTS}),
    },
    EXACT: {
        "reverse_kl": Setting(method="reverse_kl"),
        "reverse_kl + eff_opd": Setting(
            method="reverse_kl+eff_opd", options={"eff_opd": {"prompts": PROMPTS, "validate_by": "teacher_kl"}}
        ),
    },
}


METHODS = {name: setting for pair in PAIRS.values() for name, setting in pair.items()}


# Thresholds.
SPEED_UP = math.log2(1.5)  # of updates: half of the three times that the paper reports


SAME = 0.0


NO_WORSE = 0.05  # nats per token


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Learning rates from small to large, updates, and updates between measurements."""

    learning_rates: Sequence[float] = (2e-5, 2e-4, 2e-3)
    every: int = 5
    training: ablation.Size = field(default_factory=lambda: ablation.Size(seeds=(0, 1, 2, 3, 4), steps=80))


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """One run. `kl`: held-out, by update including the start, in nats per token."""

    kl: Mapping[int, float]
    written: Sequence[int]  # responses by update, cumulative, validations included
    factors: Sequence[float]  # of the jumps tried, 0 for a rejected one

    @property
    def updates(self) -> float:
        """Updates until a tenth of the divergence is gone, interpolated linearly between measurements.

        The total number of updates if that is never reached, which favours the run.
        """
        goal = (1.0 - GONE) * self.kl[0]
        steps = sorted(self.kl)
        for before, after in itertools.pairwise(steps):
            high, low = self.kl[before], self.kl[after]
            if low <= goal:
                return before + (after - before) * (high - goal) / (high - low)
        return float(steps[-1])

    @property
    def responses(self) -> float:
        """Responses written up to `updates`."""
        return float(self.written[math.ceil(self.updates) - 1])

    @property
    def last(self) -> float:
        """The divergence at the end."""
        return self.kl[max(self.kl)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Runs by method and learning rate, on all seeds or the first; and the best rates on the first seed."""

    runs: dict[str, dict[float, list[Course]]]
    best: dict[str, float]


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Run both methods at all rates from the same pairs; see the file's docstring."""
    size = size or Size()
    numbers = measure(lab, size)
    best = ", ".join(f"{name} {rate:g}" for name, rate in numbers.best.items())
    training = size.training
    return Outcome(
        setup=(
            f"Sorting five digits, {len(training.seeds)} pairs of their own seeds, {training.steps} updates of "
            f"{training.prompts_per_step} responses at a constant learning rate; exact reverse KL on 200 held-out rows "
            f"every {size.every} updates. A validation is {PROMPTS} responses. Counted until a tenth of the divergence "
            "is gone; a run that does not reach this counts with its total. Five pairs, because with "
            "three the interval of B's saving was -1.43 to 4.42 in log2 of updates. All rates on seed "
            f"{training.seeds[0]}, those of the claims on all. A: the best rates on that seed: {best}. B: "
            f"exact reverse KL, {min(size.learning_rates):g} for both."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def measure(lab: Lab, size: Size) -> Numbers:
    """Run every method at every rate on the first seed, then those that the claims compare on the others."""
    task = SORTERS.task
    sampling = {"sampled": {"temperature": 1, "max_completion_length": task.longest}}
    settings = {
        (name, rate): replace(
            setting,
            stage={
                "optimizer": {"learning_rate": rate, "betas": [0.9, 0.99]},
                "reward": {"name": task.reward},
                "evaluate": held_out(task, before=True, every=size.every, sampling=sampling),
            },
        )
        for name, setting in METHODS.items()
        for rate in size.learning_rates
    }

    def courses(chosen: Sequence[tuple[str, float]], seeds: Sequence[int]) -> dict[tuple[str, float], list[Course]]:
        named = {f"{name} at {rate:g}": settings[name, rate] for name, rate in chosen}
        trained = ablation.train(lab, named, replace(size.training, seeds=seeds))
        return {
            key: [course(one, size.training.prompts_per_step) for one in runs]
            for key, runs in zip(chosen, trained.values(), strict=True)
        }

    seeds = size.training.seeds
    runs = courses(list(settings), seeds[:1])
    best = {name: min(size.learning_rates, key=lambda rate: runs[name, rate][0].updates) for name in PAIRS[SAMPLED]}
    gentle, fast = size.learning_rates[0], size.learning_rates[-1]
    chosen = [*best.items(), *((name, rate) for name in PAIRS[EXACT] for rate in (gentle, fast))]
    for key, more in courses(chosen, seeds[1:]).items():
        runs[key] += more
    by_rate = {name: {rate: runs[name, rate] for rate in size.learning_rates} for name in METHODS}
    return Numbers(runs=by_rate, best=best)


def course(one: Trained, responses: int) -> Course:
    """The numbers of a finished run."""
    tried = [row.get("extrapolation/tried") for row in one.rows]
    more = [0 if count is None else PROMPTS * (int(count) + 1) for count in tried]  # plus the unchanged weights
    return Course(
        kl={int(row["step"]): row["eval/reverse_kl"] for row in one.evaluations},
        written=[responses * (i + 1) + sum(more[: i + 1]) for i in range(len(more))],
        factors=[row["extrapolation/factor"] for row in one.rows if "extrapolation/factor" in row],
    )


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""
    rates = sorted(next(iter(numbers.runs.values())))
    fair = [numbers.runs[name][numbers.best[name]] for name in PAIRS[SAMPLED]]  # without jumps, with jumps
    exact = {rate: [numbers.runs[name][rate] for name in PAIRS[EXACT]] for rate in rates}
    gentle = exact[rates[0]]

    def log_ratio(runs: Sequence[Sequence[Course]], what: str) -> Check:
        interval = differences(*([math.log2(getattr(one, what)) for one in each] for each in runs))
        above = SPEED_UP if what == "updates" else SAME
        return Check(what=f"log2 of {what}, without jumps over with them", interval=interval, above=above)

    def not_worse(runs: Sequence[Sequence[Course]]) -> Check:
        plain, jumping = ([one.last for one in each] for each in runs)
        what = "KL at the end, with jumps minus without"
        return Check(what=what, interval=differences(jumping, plain), below=NO_WORSE)

    falls = differences(_saved(gentle), _saved(exact[rates[-1]]))
    return (
        finding(
            "Extrapolation reaches the teacher in far fewer updates",
            "2605.11739 abstract (three times)",
            [log_ratio(fair, "updates")],
            [log_ratio(gentle, "updates")],
        ),
        finding(
            "It still does when the responses of its validations are counted",
            "2605.11739, ablation of wall-clock time",
            [log_ratio(fair, "responses")],
            [log_ratio(gentle, "responses")],
        ),
        finding(
            "What it ends at is no worse",
            "2605.11739, results",
            [not_worse(fair)],
            [not_worse(gentle)],
        ),
        finding(
            "The saving shrinks as the learning rate grows",
            "2605.11739, baseline of a larger learning rate",
            [Check(what=f"exact, log2 saved at {rates[0]:g} minus at {rates[-1]:g}", interval=falls, above=SAME)],
        ),
    )


def _saved(runs: Sequence[Sequence[Course]]) -> list[float]:
    """log2 of updates without over with jumps, by seed."""
    return [math.log2(plain.updates / jumping.updates) for plain, jumping in zip(*runs, strict=True)]


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """One row per method and rate: means over seeds, and every jump of every seed."""
    rows: list[tuple[str, ...]] = [
        ("method", "learning rate", "seeds", "updates", "responses", "KL at the end", "factors by seed")
    ]
    for name, by_rate in numbers.runs.items():
        for rate, runs in by_rate.items():
            cells = [[one.updates for one in runs], [one.responses for one in runs], [one.last for one in runs]]
            factors = "; ".join(" ".join(f"{one:g}" for one in run.factors) for run in runs) if runs[0].factors else ""
            rows.append((name, f"{rate:g}", str(len(runs)), *(short(sum(cell) / len(cell)) for cell in cells), factors))
    return tuple(rows)


def draw(numbers: Numbers) -> report.Figure:
    """The divergence by update, for A at the best rates and for B; and updates by rate, as lines for the first seed."""
    figure, axes = report.figure(2, width=4.2, height=3.2)
    left, right = axes[0]
    for name, colour in zip(METHODS, report.COLOURS, strict=False):
        rates = sorted(numbers.runs[name])
        rate = numbers.best.get(name, rates[0])
        runs = numbers.runs[name][rate]
        steps = sorted(runs[0].kl)
        means = [sum(one.kl[step] for one in runs) / len(runs) for step in steps]
        left.plot(steps, means, color=colour, label=f"{name}, {rate:g}")
        by_rate = [[one.updates for one in numbers.runs[name][rate]] for rate in rates]
        right.plot(rates, [values[0] for values in by_rate], "o-", color=colour, label=name)
        for rate, values in zip(rates, by_rate, strict=True):
            right.plot([rate] * len(values), values, ".", color=colour, alpha=0.5)
    left.set(xlabel="update", ylabel="held-out reverse KL, nats a token", title="mean over the pairs")
    left.legend(fontsize=7)
    right.set(xscale="log", xlabel="learning rate", ylabel="updates until a tenth of it is gone", ylim=(0, None))
    right.set(title="line: the first pair, dots: all")
    right.legend(fontsize=7)
    return figure
