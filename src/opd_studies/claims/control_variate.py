"""A closed-form baseline for the sampled token: does it keep the mean, reduce variance, and improve training?

vOPD, arXiv 2605.07865: the reverse KL of a prefix as the baseline of its sampled token, on the whole vocabulary or on
the student's top-k.

*Tables*: random pairs in four regimes, V = 200; mean and variance of the logits' gradient over y ~ p by enumeration.
*Pair*: the same numbers at prefixes from a student after warm-up. *Training*: the sampled token with and without the
baseline, the loss on the baseline's top-k tokens, and full reverse KL, from the same pairs, each at its best learning
rate on the first seed. Setting B trains with a quarter of the responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from opd_studies.lab import ablation, variances
from opd_studies.lab.ablation import START, Setting
from opd_studies.lab.lab import SORTERS, Lab, PairSize, optimizer
from opd_studies.lab.on_policy_batch import write_batch
from opd_studies.lab.variances import BASELINES, REGIMES
from opd_studies.page import comparison, report
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding, over_seeds, short

USE = (
    "If top-k log-probs are available, use them as the loss (`topk_reverse_kl`): as the baseline of `vopd` "
    "they lowered the variance, and the student ended farther from the teacher than with the loss."
)


K = 4  # of the trained pair's 17 tokens


NONE, VALUE, TOP_K, OPTIMAL = "sampled token", "baseline, whole vocabulary", f"baseline, top-{K}", "baseline, optimal"


LOSS, FULL = f"top-{K} loss", "full reverse KL"


FEWER = ", few responses"  # setting B


METHODS = {
    NONE: ("opd", {"average": "token"}),
    VALUE: ("vopd", {"baseline": "full"}),
    TOP_K: ("vopd", {"k": K}),
    OPTIMAL: ("vopd", {"baseline": "optimal"}),
    LOSS: ("topk_reverse_kl", {"k": K, "by": "student", "form": "renormalised", "average": "token"}),
    FULL: ("reverse_kl", {"average": "token"}),
}


# Thresholds.
UNBIASED = 1e-10  # of the exact gradient's norm


BIASED = 0.1


SAME = 0.05  # of the variance without a baseline


WORSE = 1.5  # times the variance without a baseline


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds of tables and pairs, and sizes of the training."""

    seeds: Sequence[int] = (0, 1, 2)
    tables: int = 200  # pairs of distributions per regime
    responses: int = 64  # responses at which a pair is measured
    learning_rates: Sequence[float] = (1e-3, 2e-3, 5e-3)
    few: int = 8  # responses per update in setting B
    training: ablation.Size = field(default_factory=lambda: ablation.Size(steps=100, prompts_per_step=32))
    pair: PairSize = SORTERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Lists hold one number per seed."""

    variance: dict[str, dict[str, list[float]]]  # by regime and baseline, relative to no baseline, mean over pairs
    bias: dict[str, dict[str, list[float]]]  # largest, relative to the exact gradient's norm
    loss_bias: dict[str, list[float]]  # of the top-20 loss, by regime
    warmed_up: dict[str, list[float]]  # variance by baseline at a student's prefixes, relative to none
    learning_rate: dict[str, float]  # by setting, the best on the first seed
    training: ablation.Numbers


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Measure tables, then pairs; see the file's docstring."""
    size = size or Size()
    numbers = measure(lab, size)
    rates = ", ".join(f"{name} {rate:g}" for name, rate in numbers.learning_rate.items())
    return Outcome(
        setup=(
            f"{len(size.seeds)} seeds. Tables: {size.tables} pairs of softmax distributions per regime, "
            f"V = {variances.VOCABULARY}. Pair: sorting five digits, {size.responses} responses of the student after "
            f"warm-up. Training: {size.training.steps} updates of {size.training.prompts_per_step} responses, in "
            f"setting B of {size.few}; accuracy and exact reverse KL on 200 held-out rows. Learning rates, the best of "
            f"{', '.join(f'{rate:g}' for rate in size.learning_rates)} on seed {size.seeds[0]} by that KL: {rates}."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def measure(lab: Lab, size: Size) -> Numbers:
    """Measure all regimes, all pairs, all trainings."""
    rates, training = trained(lab, size)
    numbers = Numbers(
        variance={regime: {name: [] for name in BASELINES} for regime in REGIMES},
        bias={regime: {name: [] for name in BASELINES} for regime in REGIMES},
        loss_bias={regime: [] for regime in REGIMES},
        warmed_up={name: [] for name in BASELINES if name != "top-20"},
        learning_rate=rates,
        training=training,
    )
    for seed, pair in zip(size.seeds, lab.pairs(size.seeds, size.pair), strict=True):
        for regime in REGIMES:
            student, teacher = variances.table_of(regime, seed, size.tables)
            variance, bias = variances.moments(student, teacher, BASELINES)
            for name in BASELINES:
                numbers.variance[regime][name].append(float((variance[name] / variance["none"]).mean()))
                numbers.bias[regime][name].append(float(bias[name].max()))
            numbers.loss_bias[regime].append(float(variances.loss_bias(student, teacher).mean()))
        batch = write_batch(pair, seed, size.pair.task, size.responses)
        found, _ = variances.moments(batch.student.log_softmax(-1), batch.teacher, list(numbers.warmed_up))
        for name, values in numbers.warmed_up.items():
            values.append(float(found[name].sum() / found["none"].sum()))
    return numbers


def trained(lab: Lab, size: Size) -> tuple[dict[str, float], ablation.Numbers]:
    """The best learning rates on the first seed, and the numbers of all settings with them on all seeds."""

    def setting(name: str, rate: float, **stage: object) -> Setting:
        method, options = METHODS[name]
        return Setting(method=method, options=options, stage={"optimizer": optimizer(rate, 10), **stage})

    base = replace(size.training, seeds=size.seeds, pair=size.pair)
    tried = {f"{name} at {rate:g}": setting(name, rate) for name in METHODS for rate in size.learning_rates}
    first = ablation.measure(lab, tried, replace(base, seeds=size.seeds[:1]))
    rates = {name: min(size.learning_rates, key=lambda rate: first[f"{name} at {rate:g}"]["KL"][0]) for name in METHODS}
    chosen = {name: setting(name, rate) for name, rate in rates.items()}
    few = {name + FEWER: setting(name, rates[name], prompts_per_step=size.few) for name in (NONE, TOP_K, LOSS)}
    return rates, ablation.measure(lab, chosen | few, base)


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""
    return (*_in_tables(numbers), *_in_training(numbers))


def _in_tables(numbers: Numbers) -> list[Finding]:
    variance = numbers.variance
    biased = [
        Check(what=f"{regime}: largest bias, {name}", interval=over_seeds(numbers.bias[regime][name]), below=UNBIASED)
        for regime in REGIMES
        for name in BASELINES
        if name != "none"
    ]
    loss = Check(what="mild gap: bias of top-20 loss", interval=over_seeds(numbers.loss_bias["mild gap"]), above=BIASED)

    def ratio(regime: str, name: str = "value", **side: float) -> Check:
        return Check(what=f"{regime}: variance, {name} over none", interval=over_seeds(variance[regime][name]), **side)

    growth = differences(variance["large gap"]["value"], variance["mild gap"]["value"])
    close = [
        Check(
            what=f"{regime}: top-20 minus whole vocabulary",
            interval=differences(variance[regime]["top-20"], variance[regime]["value"]),
            above=-SAME,
            below=SAME,
        )
        for regime in REGIMES[:3]
    ]
    eq = "2605.07865 eq. 9-15"
    return [
        finding(
            "A baseline that looks at the prefix alone keeps the mean; the top-k loss does not", eq, [*biased, loss]
        ),
        finding(
            "The reverse KL as a baseline lowers the variance, most where the models differ much",
            eq,
            [
                ratio("mild gap", below=1.0),
                ratio("large gap", below=1.0),
                Check(what="large gap minus mild gap", interval=growth, below=0.0),
            ],
        ),
        finding("Renormalised on the student's top-20 of 200 it does nearly as much", eq, close),
        finding(
            "The value is not the scalar of least variance: where a confident student is wrong it is worse than none",
            f"{eq} (the scalar is derived here)",
            [
                ratio("confident and wrong", above=WORSE),
                ratio("confident and wrong", "optimal", below=1.0),
                ratio("peaked student", "optimal", below=1.0),
            ],
        ),
        finding(
            "At the prefixes of a student after warm-up the baseline lowers the variance",
            eq,
            [Check(what="variance, value over none", interval=over_seeds(numbers.warmed_up["value"]), below=1.0)],
        ),
    ]


def _in_training(numbers: Numbers) -> list[Finding]:
    def less(first: str, second: str) -> Check:
        return comparison.gap(numbers.training, first, second, "KL", below=0.0)

    return [
        finding(
            "Training with the baseline ends closer to the teacher than without",
            "2605.07865 abstract",
            [less(TOP_K, NONE), less(TOP_K, START)],
            [less(TOP_K + FEWER, NONE + FEWER), less(TOP_K + FEWER, START)],
        ),
        finding(
            "The top-k tokens are better used in a baseline than as the loss",
            "2605.07865 abstract, released code",
            [less(TOP_K, LOSS)],
            [less(TOP_K + FEWER, LOSS + FEWER)],
        ),
    ]


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """Variances by regime and baseline, then the trainings."""
    rows: list[tuple[str, ...]] = [("variance over that of none", *BASELINES, "bias of the top-20 loss")]
    for regime in REGIMES:
        cells = [short(over_seeds(numbers.variance[regime][name]).mean) for name in BASELINES]
        rows.append((regime, *cells, short(over_seeds(numbers.loss_bias[regime]).mean)))
    found = [short(over_seeds(numbers.warmed_up[n]).mean) if n in numbers.warmed_up else "" for n in BASELINES]
    rows.append(("student after warm-up", *found, ""))
    for name, measured in numbers.training.items():
        cells = [f"{what} {short(over_seeds(measured[what]).mean)}" for what in SHOWN if what in measured]
        rows.append((name, *cells, *[""] * (len(rows[0]) - 1 - len(cells))))
    return tuple(rows)


SHOWN = ("KL", "sampled accuracy", "greedy accuracy", "gradient norm")


def draw(numbers: Numbers) -> report.Figure:
    """Variance by regime, and the final divergence of the trainings."""
    figure, axes = report.figure(2, width=4.6, height=3.4)
    left, right = axes[0]
    for i, (name, colour) in enumerate(zip(BASELINES, report.COLOURS, strict=False)):
        means = [over_seeds(numbers.variance[regime][name]).mean for regime in REGIMES]
        left.bar([place + 0.2 * i for place in range(len(REGIMES))], means, 0.18, color=colour, label=name)
    left.set_xticks([place + 0.3 for place in range(len(REGIMES))], [name.replace(" ", "\n", 1) for name in REGIMES])
    left.set(yscale="log", ylabel="gradient variance / without a baseline")
    left.axhline(1.0, color="black", linewidth=0.7)
    left.legend(fontsize=7, ncols=2)
    names = [name for name, measured in numbers.training.items() if "KL" in measured]
    for place, name in enumerate(names):
        values = numbers.training[name]["KL"]
        right.barh(place, sum(values) / len(values), color=report.COLOURS[5 if name == START else 0], alpha=0.6)
        right.plot(values, [place] * len(values), "o", color="black", markersize=2.5)
    right.set_yticks(range(len(names)), names, fontsize=7)
    right.invert_yaxis()
    right.set(xlabel="held-out reverse KL, nats a token", xlim=(0, None))
    return figure
