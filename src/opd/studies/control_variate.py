"""A baseline in closed form for the sampled token: does it keep the mean, how much variance does it take, does it help?

vOPD, arXiv 2605.07865: the reverse KL of a prefix as the baseline of its sampled token, on the whole vocabulary or on
the student's top-k.

*Tables*: random pairs in four regimes, V = 200; the mean and the variance of the logits' gradient over y ~ p by
enumeration. *Pair*: the same numbers at the prefixes that a trained student writes. *Training*: the sampled token with
and without the baseline, the top-k loss whose baseline it uses, and full reverse KL, from the same pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opd import baselines, signals
from opd.studies import ablation, estimators, report
from opd.studies.ablation import START, Setting
from opd.studies.lab import SORTERS, Lab, PairSize
from opd.studies.outcome import Check, Finding, Outcome, differences, finding, over_seeds, short
from opd.types import Tokens

VOCABULARY, PAIRS = 200, 200
REGIMES = ("mild gap", "large gap", "peaked student", "confident and wrong")
BASELINES = ("none", "value", "top-20", "optimal")
TOP = 20
K = 4  # of the trained pair's 20 tokens
SETTINGS = {
    "sampled token": Setting(method="opd", options={"average": "token"}),
    "baseline, whole vocabulary": Setting(method="vopd", options={"baseline": "full"}),
    f"baseline, top-{K}": Setting(method="vopd", options={"k": K}),
    "baseline of least variance": Setting(method="vopd", options={"baseline": "optimal"}),
    f"top-{K} loss": Setting(
        method="topk_reverse_kl",
        options={"k": K, "by": "student", "form": "stop_gradient", "average": "token"},
    ),
    "full reverse KL": Setting(method="reverse_kl", options={"average": "token"}),
}
# The rules.
UNBIASED = 1e-10  # of the exact gradient's norm
BIASED = 0.1
SAME = 0.05  # of the variance without a baseline
WORSE = 1.5  # times the variance without a baseline


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds of tables and pairs, and what the trained part does."""

    seeds: Sequence[int] = (0, 1, 2)
    pairs: int = PAIRS
    responses: int = 64
    training: ablation.Size = field(default_factory=ablation.Size)
    pair: PairSize = SORTERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Lists hold one number a seed."""

    variance: dict[str, dict[str, list[float]]]  # by regime and baseline, over that of no baseline
    bias: dict[str, dict[str, list[float]]]  # the largest one, over the exact gradient's norm
    loss_bias: dict[str, list[float]]  # of the top-20 loss, by regime
    trained: dict[str, list[float]]  # variance by baseline at a trained student's prefixes, over that of none
    training: ablation.Numbers


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Tables, then trained pairs; see the file's docstring."""
    size = size or Size()
    numbers = measure(lab, size)
    return Outcome(
        setup=(
            f"{len(size.seeds)} seeds. Tables: {size.pairs} pairs of softmax distributions a regime, V = {VOCABULARY}. "
            f"Pair: sorting, {size.responses} responses of the student after warm-up. Training: "
            f"{size.training.steps} updates of {size.training.prompts_per_step} responses, one learning rate for all; "
            "accuracy and exact reverse KL on 200 held-out rows."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The claims against the numbers."""
    biased = [
        Check(what=f"{regime}: largest bias, {name}", interval=over_seeds(numbers.bias[regime][name]), below=UNBIASED)
        for regime in REGIMES
        for name in BASELINES
        if name != "none"
    ]
    variance = numbers.variance

    def lower(regime: str, name: str = "value") -> Check:
        what = f"{regime}: variance with {name} over without"
        return Check(what=what, interval=over_seeds(variance[regime][name]), below=1.0)

    def trained(first: str, second: str, what: str, **side: float) -> Check:
        return Check(
            what=what, interval=differences(numbers.training[first]["KL"], numbers.training[second]["KL"]), **side
        )

    return (
        finding(
            "No baseline that depends on the prefix alone changes the mean gradient; the top-k loss does",
            "2605.07865 eq. 9-15",
            [
                *biased,
                Check(
                    what="mild gap: bias of the top-20 loss",
                    interval=over_seeds(numbers.loss_bias["mild gap"]),
                    above=BIASED,
                ),
            ],
        ),
        finding(
            "The reverse KL as a baseline lowers the variance, most where the models differ much",
            "2605.07865 eq. 9-15",
            [
                lower("mild gap"),
                lower("large gap"),
                Check(
                    what="large gap minus mild gap",
                    interval=differences(variance["large gap"]["value"], variance["mild gap"]["value"]),
                    below=0.0,
                ),
            ],
        ),
        finding(
            "Renormalised on the student's top-20 of 200 it does nearly as much",
            "2605.07865 eq. 15",
            [
                Check(
                    what=f"{regime}: top-20 minus whole vocabulary",
                    interval=differences(variance[regime]["top-20"], variance[regime]["value"]),
                    above=-SAME,
                    below=SAME,
                )
                for regime in ("mild gap", "large gap", "peaked student")
            ],
        ),
        finding(
            "The value is not the scalar of least variance: where a confident student is wrong it is worse than none",
            "2605.07865 eq. 9-15 (the scalar is derived here)",
            [
                Check(
                    what="confident and wrong: value over none",
                    interval=over_seeds(variance["confident and wrong"]["value"]),
                    above=WORSE,
                ),
                lower("confident and wrong", "optimal"),
                lower("peaked student", "optimal"),
            ],
        ),
        finding(
            "At a trained student's prefixes the baseline lowers the variance",
            "2605.07865 eq. 9-15",
            [Check(what="variance with value over without", interval=over_seeds(numbers.trained["value"]), below=1.0)],
        ),
        finding(
            "Training with the baseline is better than without",
            "2605.07865 abstract, eq. 9-15",
            [
                trained(f"baseline, top-{K}", "sampled token", f"reverse KL, baseline top-{K} minus none", below=0.0),
                trained(f"baseline, top-{K}", START, "baseline minus start", below=0.0),
            ],
        ),
        finding(
            "The top-k tokens are better used as a baseline than as a loss",
            "2605.07865 eq. 15, released code",
            [trained(f"baseline, top-{K}", f"top-{K} loss", f"reverse KL, baseline minus loss, top-{K}", below=0.0)],
        ),
    )


def measure(lab: Lab, size: Size) -> Numbers:
    """All regimes, all pairs, all trainings."""
    numbers = Numbers(
        variance={regime: {name: [] for name in BASELINES} for regime in REGIMES},
        bias={regime: {name: [] for name in BASELINES} for regime in REGIMES},
        loss_bias={regime: [] for regime in REGIMES},
        trained={name: [] for name in BASELINES if name != "top-20"},
        training=ablation.measure(lab, SETTINGS, size.training),
    )
    for seed in size.seeds:
        for regime in REGIMES:
            student, teacher = table_of(regime, seed, size.pairs)
            variance, bias = moments(student, teacher, numbers.variance[regime])
            plain = variance["none"]
            for name in BASELINES:
                numbers.variance[regime][name].append(float((variance[name] / plain).mean()))
                numbers.bias[regime][name].append(float(bias[name].max()))
            numbers.loss_bias[regime].append(float(loss_bias(student, teacher).mean()))
        batch = estimators.batch_of(lab, seed, estimators.Size(responses=size.responses, pair=size.pair))
        found, _ = moments(batch.student.log_softmax(-1), batch.teacher, numbers.trained)
        total = {name: float(one.sum()) for name, one in found.items()}
        for name in numbers.trained:
            numbers.trained[name].append(total[name] / total["none"])
    return numbers


def table_of(regime: str, seed: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Log-probs [pairs, V] of student and teacher, float64."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(pairs, VOCABULARY, generator=generator, dtype=torch.float64)

    if regime == "confident and wrong":
        first = torch.zeros(pairs, VOCABULARY, dtype=torch.float64)
        first[:, 0] = 1.0
        rest = (0.1 * noise()).masked_fill(first.bool(), -math.inf).softmax(-1)
        return (0.99 * first + 0.01 * rest).log(), (0.007 * first + 0.993 * rest).log()
    scale, gap = {"mild gap": (2.0, 0.5), "large gap": (2.0, 3.0), "peaked student": (6.0, 1.0)}[regime]
    student = scale * noise()
    return student.log_softmax(-1), (student + gap * noise()).log_softmax(-1)


def moments(
    student: Tensor, teacher: Tensor, names: Mapping[str, object]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of log-probs [N, V]: variance over y ~ p of the logits' gradient, and its mean's distance from the exact one over
    the latter's norm; [N] each, by baseline."""
    p = student.exp()
    log_ratio = teacher - student
    exact = p * (-log_ratio - (p * -log_ratio).sum(-1, keepdim=True))  # p (l - KL)
    squares = 1.0 - 2.0 * p + p.square().sum(-1, keepdim=True)  # ||e_y - p||^2
    variance: dict[str, Tensor] = {}
    bias: dict[str, Tensor] = {}
    for name in names:
        advantage = log_ratio - baseline_of(name, student, teacher)[:, None]
        mean = -(p * advantage - p * (p * advantage).sum(-1, keepdim=True))  # E_y[-A (e_y - p)]
        variance[name] = (p * advantage.square() * squares).sum(-1) - mean.square().sum(-1)
        bias[name] = (mean - exact).norm(dim=-1) / exact.norm(dim=-1)
    return variance, bias


def baseline_of(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    """The baseline [N] of that name, as the library makes it."""
    if name == "none":
        return torch.zeros_like(student[:, 0])
    ids = student.topk(TOP, dim=-1).indices if name == "top-20" else None
    nothing = torch.zeros_like(student[:, 0])
    tokens = Tokens(
        student_logp=nothing,
        sampler_logp=nothing,
        teacher_logp=nothing,
        advantage=nothing,
        weight=nothing,
        student_support_logp=student if ids is None else student.gather(-1, ids),
        teacher_support_logp=teacher if ids is None else teacher.gather(-1, ids),
        support_mask=None if ids is None else torch.ones_like(ids, dtype=torch.bool),
    )
    return baselines.least_variance(tokens) if name == "optimal" else baselines.expected_log_ratio(tokens)


def loss_bias(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance [N] of the renormalised top-20 loss' gradient from the exact one, over the latter's norm."""
    z = student.clone().requires_grad_()
    p = z.log_softmax(-1)
    ids = student.topk(TOP, dim=-1).indices
    nothing = torch.zeros_like(student[:, 0])
    tokens = Tokens(
        student_logp=nothing,
        sampler_logp=nothing,
        teacher_logp=nothing,
        advantage=nothing,
        weight=nothing,
        student_support_logp=p.gather(-1, ids),
        teacher_support_logp=teacher.gather(-1, ids),
        support_mask=torch.ones_like(ids, dtype=torch.bool),
    )
    (grad,) = torch.autograd.grad(signals.divergence("reverse_kl", form="renormalised")(tokens).sum(), z)
    q = student.exp()
    ratio = student - teacher
    exact = q * (ratio - (q * ratio).sum(-1, keepdim=True))
    return (grad - exact).norm(dim=-1) / exact.norm(dim=-1)


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """Variances by regime and baseline, then the trainings."""
    rows: list[tuple[str, ...]] = [("variance over that of none, or training", *BASELINES, "bias of the top-20 loss")]
    for regime in REGIMES:
        cells = [short(over_seeds(numbers.variance[regime][name]).mean) for name in BASELINES]
        rows.append((regime, *cells, short(over_seeds(numbers.loss_bias[regime]).mean)))
    trained = [short(over_seeds(numbers.trained[n]).mean) if n in numbers.trained else "" for n in BASELINES]
    rows.append(("trained student's prefixes", *trained, ""))
    for name, measured in numbers.training.items():
        cells = [f"{what} {short(over_seeds(measured[what]).mean)}" if what in measured else "" for what in SHOWN]
        rows.append((name, *cells))
    return tuple(rows)


SHOWN = ("KL", "sampled accuracy", "greedy accuracy", "entropy", "gradient norm")


def draw(numbers: Numbers) -> report.Figure:
    """Variance by regime, and the divergence that training leaves."""
    figure, axes = report.figure(2, width=4.6, height=3.2)
    left, right = axes[0]
    for i, (name, colour) in enumerate(zip(BASELINES, report.COLOURS, strict=False)):
        intervals = [over_seeds(numbers.variance[regime][name]) for regime in REGIMES]
        left.bar(
            [place + 0.2 * i for place in range(len(REGIMES))],
            [one.mean for one in intervals],
            0.18,
            color=colour,
            label=name,
        )
    left.set_xticks([place + 0.3 for place in range(len(REGIMES))], [name.replace(" ", "\n", 1) for name in REGIMES])
    left.set(yscale="log", ylabel="gradient variance / without a baseline")
    left.axhline(1.0, color="black", linewidth=0.7)
    left.legend(fontsize=7, ncols=2)
    names = [name for name in numbers.training if "KL" in numbers.training[name]]
    for place, name in enumerate(names):
        values = numbers.training[name]["KL"]
        right.barh(place, sum(values) / len(values), color=report.COLOURS[5 if name == START else 0], alpha=0.6)
        right.plot(values, [place] * len(values), "o", color="black", markersize=2.5)
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set(xscale="log", xlabel="held-out reverse KL, nats a token")
    return figure
