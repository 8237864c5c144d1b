"""Jumps along the weights' own change: how many updates do they save, at which learning rate, and at what price?

EffOPD, arXiv 2605.11739: after 1, 2, 4, 8, ... updates the weights jump along what has changed since, as far as a
validation on 50 training prompts gets better; the paper reports a third of the updates. Here an update counts, and so
do the responses that a run has written, those of the validations included, until half of the divergence from the
teacher is gone.

Setting A is the fair one: each method with the learning rate of four at which it gets there first on the first seed.
Setting B is the paper's, a small rate for both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from opd.studies import ablation, report
from opd.studies.ablation import Setting
from opd.studies.distilling import Trained, held_out
from opd.studies.lab import SORTERS, Lab
from opd.studies.outcome import Check, Finding, Outcome, differences, finding, over_seeds, short

METHODS = ("opd", "eff_opd")
PROMPTS = 50  # of a validation
# The rules.
SPEED_UP = math.log2(1.5)  # of updates: half of the three times that the paper reports
SAME = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Learning rates from small to large, updates, and how often is measured."""

    learning_rates: Sequence[float] = (2e-4, 5e-4, 1e-3, 2e-3)
    every: int = 4
    training: ablation.Size = field(default_factory=lambda: ablation.Size(steps=80))


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """One run; `kl` by update, the start included, in nats a token, held out."""

    kl: Mapping[int, float]
    written: Sequence[int]  # responses by update, cumulative, validations included
    factors: Sequence[float]  # of the jumps that were tried, 0 for one that was taken back

    @property
    def updates(self) -> float:
        """Updates until half of the divergence is gone, between two measurements on the line through them.

        All of them if it is not gone by then, which is in favour of the run.
        """
        half = self.kl[0] / 2
        steps = sorted(self.kl)
        for before, after in itertools.pairwise(steps):
            high, low = self.kl[before], self.kl[after]
            if low <= half:
                return before + (after - before) * (high - half) / (high - low)
        return float(steps[-1])

    @property
    def responses(self) -> float:
        """Responses written until then."""
        return float(self.written[math.ceil(self.updates) - 1])

    @property
    def last(self) -> float:
        """The divergence at the end."""
        return self.kl[max(self.kl)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """By method and learning rate, a run a seed; the rates that are best on the first seed."""

    runs: dict[str, dict[float, list[Course]]]
    best: dict[str, float]


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Both methods at all rates from the same pairs; see the file's docstring."""
    size = size or Size()
    numbers = measure(lab, size)
    best = ", ".join(f"{name} {rate:g}" for name, rate in numbers.best.items())
    training = size.training
    return Outcome(
        setup=(
            f"Sorting five digits, {len(training.seeds)} pairs of their own seeds, {training.steps} updates of "
            f"{training.prompts_per_step} responses at a constant learning rate; exact reverse KL on 200 held-out rows "
            f"every {size.every} updates. A validation is {PROMPTS} responses, judged by the reward. Until half of the "
            "divergence is gone; a run that does not get there counts as if it did at its end. A: the best rates on "
            f"seed {training.seeds[0]}: {best}. B: {min(size.learning_rates):g} for both."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def measure(lab: Lab, size: Size) -> Numbers:
    """All runs."""
    task = SORTERS.task
    sampling = {"sampled": {"temperature": 1, "max_completion_length": task.longest}}
    settings = {
        f"{name} at {rate:g}": Setting(
            method=name,
            options={"prompts": PROMPTS} if name == "eff_opd" else {},
            stage={
                "optimizer": {"learning_rate": rate, "betas": [0.9, 0.99]},
                "reward": {"name": task.reward},
                "evaluate": held_out(task, before=True, every=size.every, sampling=sampling),
            },
        )
        for name in METHODS
        for rate in size.learning_rates
    }
    trained = ablation.train(lab, settings, size.training)
    runs = {
        name: {
            rate: [course(one, size.training.prompts_per_step) for one in trained[f"{name} at {rate:g}"]]
            for rate in size.learning_rates
        }
        for name in METHODS
    }
    best = {name: min(by_rate, key=lambda rate: by_rate[rate][0].updates) for name, by_rate in runs.items()}
    return Numbers(runs=runs, best=best)


def course(one: Trained, responses: int) -> Course:
    """What a finished run says of itself."""
    tried = [row.get("extrapolation/tried") for row in one.rows]
    more = [0 if count is None else PROMPTS * (int(count) + 1) for count in tried]  # the weights as they are, too
    return Course(
        kl={int(row["step"]): row["eval/reverse_kl"] for row in one.evaluations},
        written=[responses * (i + 1) + sum(more[: i + 1]) for i in range(len(more))],
        factors=[row["extrapolation/factor"] for row in one.rows if "extrapolation/factor" in row],
    )


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The claims against the numbers."""
    small = min(numbers.runs["opd"])
    fair = {name: numbers.runs[name][numbers.best[name]] for name in METHODS}
    gentle = {name: numbers.runs[name][small] for name in METHODS}

    def log_ratio(runs: Mapping[str, Sequence[Course]], what: str) -> Check:
        counts = {name: [math.log2(getattr(one, what)) for one in runs[name]] for name in METHODS}
        interval = differences(counts["opd"], counts["eff_opd"])
        above = SPEED_UP if what == "updates" else SAME
        return Check(what=f"log2 of {what}, without jumps over with them", interval=interval, above=above)

    def not_worse(runs: Mapping[str, Sequence[Course]]) -> Check:
        last = {name: [one.last for one in runs[name]] for name in METHODS}
        what = "KL at the end, with jumps minus without"
        return Check(what=what, interval=differences(last["eff_opd"], last["opd"]), below=0.05)

    saving = {rate: _saved(numbers, rate) for rate in numbers.runs["opd"]}
    falls = differences(saving[min(saving)], saving[max(saving)])
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
            [Check(what=f"log2 saved at {min(saving):g} minus at {max(saving):g}", interval=falls, above=SAME)],
        ),
    )


def _saved(numbers: Numbers, rate: float) -> list[float]:
    """log2 of updates without over with jumps at one rate, by seed."""
    both = zip(numbers.runs["opd"][rate], numbers.runs["eff_opd"][rate], strict=True)
    return [math.log2(plain.updates / jumping.updates) for plain, jumping in both]


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """A row a method and rate: means over seeds, and every jump of every seed."""
    rows = [("method", "learning rate", "updates to half", "responses to half", "KL at the end", "factors by seed")]
    for name, by_rate in numbers.runs.items():
        for rate, runs in by_rate.items():
            cells = [[one.updates for one in runs], [one.responses for one in runs], [one.last for one in runs]]
            factors = "; ".join(" ".join(f"{one:g}" for one in run.factors) for run in runs) if runs[0].factors else ""
            rows.append((name, f"{rate:g}", *(short(over_seeds(cell).mean) for cell in cells), factors))
    return tuple(rows)


def draw(numbers: Numbers) -> report.Figure:
    """The divergence by update at the small and the best rates, and the updates by rate."""
    figure, axes = report.figure(2, width=3.9, height=3.1)
    left, right = axes[0]
    small = min(numbers.runs["opd"])
    for name, colour in zip(METHODS, report.COLOURS, strict=False):
        for rate, line in ((numbers.best[name], "-"), (small, ":")):
            runs = numbers.runs[name][rate]
            steps = sorted(runs[0].kl)
            means = [sum(one.kl[step] for one in runs) / len(runs) for step in steps]
            left.plot(steps, means, line, color=colour, label=f"{name}, {rate:g}")
        rates = sorted(numbers.runs[name])
        by_rate = [[one.updates for one in numbers.runs[name][rate]] for rate in rates]
        right.plot(rates, [sum(values) / len(values) for values in by_rate], "o-", color=colour, label=name)
        for rate, values in zip(rates, by_rate, strict=True):
            right.plot([rate] * len(values), values, ".", color=colour, alpha=0.5)
    left.set(xlabel="update", ylabel="held-out reverse KL, nats a token", ylim=(0, None))
    left.legend(fontsize=7, title="method, learning rate", title_fontsize=7)
    right.set(xscale="log", xlabel="learning rate", ylabel="updates until half of it is gone", ylim=(0, None))
    right.legend(fontsize=7)
    return figure
