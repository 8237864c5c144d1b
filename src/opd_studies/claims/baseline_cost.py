"""What a baseline on the top-k tokens costs: is it cheaper than the full reverse KL, and than the top-k loss?

vOPD, arXiv 2605.07865: the sampled token with a baseline matches the full reverse KL at lower cost. Whether it matches
is a claim of `control_variate`; here it is the cost of one update's signal: the teacher's scores, the loss and its
gradients from both models' last hidden states, for 512 tokens. The rest of an update is the same for all.

Setting A: all logits of both models in memory and autograd, as in released code. Setting B: this library, which never
holds all logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from opd_studies.lab import loss_costs
from opd_studies.lab.lab import Lab
from opd_studies.lab.loss_costs import BASELINE, FULL, FUSED, LOSS, PLAIN, SAMPLED, Shape
from opd_studies.page import report
from opd_studies.page.outcome import Check, Finding, Outcome, finding, over_seeds, short

USE = (
    "Choose `vopd` over the full reverse KL for its memory, half as much; that it takes less time is undecided. The "
    "loss on the same top-k tokens took less time in both implementations (`topk_reverse_kl`)."
)


METHODS = (SAMPLED, BASELINE, LOSS, FULL)


# Thresholds.
CHEAPER = 1.0  # of the other's cost


NOTHING = 1.1  # of the sampled token's cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds (random states each), rounds of the timing, and the shape."""

    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    rounds: int = 5
    shape: Shape = field(default_factory=Shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """By method; one number per seed."""

    seconds: Mapping[str, Sequence[float]]  # of CPU time on one thread
    mib: Mapping[str, Sequence[float]]  # peak above states and the head's gradient


Numbers = Mapping[str, Cost]  # by implementation


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Measure all methods in both implementations; see the file's docstring."""
    size = size or Size()
    numbers = measure(lab, size)
    shape = size.shape
    return Outcome(
        setup=(
            f"Random hidden states and output layers, N = {shape.tokens} tokens, V = {shape.vocabulary:,}, "
            f"H = {shape.hidden}, k = {shape.k}, float32; {len(size.seeds)} seeds. CPU seconds on one thread, the "
            f"median of {size.rounds} rounds in which the methods take turns; peak resident memory above the states "
            "and the head's gradient, each in a process of its own. The student's top-k tokens come from the logits "
            "of sampling: finding them counts, those logits do not."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def measure(lab: Lab, size: Size) -> Numbers:
    """Time and memory of every method in both implementations."""
    numbers: dict[str, Cost] = {}
    for implementation in (PLAIN, FUSED):
        lab.note(f"timing the {implementation} implementation")
        times = [loss_costs.seconds(implementation, METHODS, seed, size.shape, size.rounds) for seed in size.seeds]
        runs = [(implementation, name, seed, size.shape) for name in METHODS for seed in size.seeds]
        peaks = iter(loss_costs.peak_mib(runs))
        numbers[implementation] = Cost(
            seconds={name: [one[name] for one in times] for name in METHODS},
            mib={name: [next(peaks) for _ in size.seeds] for name in METHODS},
        )
    return numbers


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""

    def cost(implementation: str, other: str, below: float) -> list[Check]:
        measured = numbers[implementation]
        return [
            Check(what=f"{what}, {BASELINE} over {other}", interval=over_seeds(ratios(each, other)), below=below)
            for what, each in (("CPU time", measured.seconds), ("peak memory", measured.mib))
        ]

    def ratios(each: Mapping[str, Sequence[float]], other: str) -> list[float]:
        return [one / base for one, base in zip(each[BASELINE], each[other], strict=True)]

    def both(other: str, below: float) -> tuple[list[Check], list[Check]]:
        return cost(PLAIN, other, below), cost(FUSED, other, below)

    abstract = "2605.07865 abstract"
    return (
        finding("The baseline on the top-k tokens costs less than the full reverse KL", abstract, *both(FULL, CHEAPER)),
        finding("It costs hardly more than the sampled token alone", abstract, *both(SAMPLED, NOTHING)),
        finding(
            "It costs less than the loss on the same top-k tokens",
            f"{abstract} (the control is ours)",
            *both(LOSS, CHEAPER),
        ),
    )


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """One row per implementation and method: means over seeds, and over those of the sampled token."""
    header = ("implementation", "method", "CPU seconds", "over the sampled token", "peak MiB", "over the sampled token")
    rows: list[tuple[str, ...]] = [header]
    mean: Callable[[Sequence[float]], float] = lambda values: sum(values) / len(values)  # noqa: E731
    for implementation, cost in numbers.items():
        for name in METHODS:
            cells = [
                value
                for each in (cost.seconds, cost.mib)
                for value in (mean(each[name]), mean(each[name]) / mean(each[SAMPLED]))
            ]
            rows.append((implementation, name, *map(short, cells)))
    return tuple(rows)


def draw(numbers: Numbers) -> report.Figure:
    """CPU seconds and peak memory by method, one colour per implementation."""
    figure, axes = report.figure(2, width=4.2, height=3.0)
    for panel, what, label in (
        (axes[0][0], "seconds", "CPU seconds"),
        (axes[0][1], "mib", "peak MiB above states and gradient"),
    ):
        for shift, (implementation, cost) in enumerate(numbers.items()):
            for place, name in enumerate(METHODS):
                values = getattr(cost, what)[name]
                at = place + 0.38 * shift
                legend = implementation if place == 0 else None
                panel.barh(at, sum(values) / len(values), 0.34, color=report.COLOURS[shift], alpha=0.6, label=legend)
                panel.plot(values, [at] * len(values), "o", color="black", markersize=2.5)
        panel.set_yticks([place + 0.19 for place in range(len(METHODS))], METHODS, fontsize=8)
        panel.invert_yaxis()
        panel.set(xlabel=label, xlim=(0, None))
    axes[0][0].legend(fontsize=7)
    return figure
