"""Truncated reverse KL, exactly: identities of its gradients, the fixed point of each form, and the crash of `raw`.

Tables without a network: softmax students descend the exact gradient of each form on a fixed support, the teacher's K
most likely of V = 200 tokens. They start *near* the teacher (plateau and crash, arXiv 2605.11182 Fig. 4 and 15; setting
A), *nearer*, where the plateau should be longest (setting B), or *far* from it (where the mass on the support has to
move).

Symbols: P_S and Q_S are the masses of student p and teacher q on the support S, e is Euler's number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opd_studies.lab.lab import Lab
from opd_studies.page import report
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding, over_seeds, short
from opd_studies.worlds.truncated_forms import FORMS, identity_errors, on_support

USE = (
    "On a truncated support take `form: tail` or `stop_gradient`. `raw` drives the student's mass off the "
    "support at every k, and `renormalised` leaves that mass uncontrolled: watch `support/student_mass`."
)


VOCABULARY = 200


# Thresholds.
EXACT = 1e-9  # largest error of an identity in float64


AT_REST = 0.01  # probability: this close to a fixed point counts as there


UNMOVED = 0.05  # probability: this far from Q_S counts as uncontrolled


PLATEAU = 0.9  # P_S / Q_S on the plateau


CRASHED = 0.5  # P_S / Q_S after the crash


DELAY = 1.0  # log2 of the plateau's length: at least twice as long


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds and steps of gradient descent."""

    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    steps: int = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Initial students. Logits are `scale` (base + noise), with independent noise for student and teacher."""

    name: str
    k: int  # tokens of the support
    rate: float  # of gradient descent on logits
    scale: float
    noise: float  # standard deviation; that of base is 1


STARTS = (
    Start(name="near, K=5", k=5, rate=0.5, scale=4.0, noise=0.3),
    Start(name="near, K=20", k=20, rate=0.5, scale=4.0, noise=0.3),
    Start(name="nearer, K=5", k=5, rate=0.5, scale=4.0, noise=0.1),
    Start(name="nearer, K=20", k=20, rate=0.5, scale=4.0, noise=0.1),
    Start(name="far, K=5", k=5, rate=2.0, scale=2.0, noise=1.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """The measurements; lists hold one number per seed."""

    identities: dict[str, list[float]]  # largest error of each identity
    teacher_mass: dict[str, list[float]]  # Q_S by start
    mass: dict[str, dict[str, Tensor]]  # P_S [steps + 1, seeds] by start and form
    shape_error: dict[str, list[float]] = field(default_factory=dict)  # far start: largest |p/P_S - q/Q_S| by form


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Measure identities on random distributions, then descend from three starts; see the file's docstring."""
    size = size or Size()
    lab.note(f"{len(STARTS)} starts, {len(FORMS)} forms, {size.steps} steps each")
    numbers = measure(size)
    return Outcome(
        setup=(
            f"Exact gradients in float64, V = {VOCABULARY}, {len(size.seeds)} seeds, {size.steps} steps of gradient "
            "descent on logits. Identities on random distributions with V = 50 and K = 8: "
            f"{'; '.join(numbers.identities)}."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def measure(size: Size) -> Numbers:
    """Measure everything, for all seeds."""
    errors: dict[str, list[float]] = {}
    for seed in size.seeds:
        for name, error in identity_errors(seed).items():
            errors.setdefault(name, []).append(error)
    student, teacher, support, rate = _tables(size.seeds)
    mass: dict[str, dict[str, Tensor]] = {start.name: {} for start in STARTS}
    shape: dict[str, list[float]] = {}
    n = len(size.seeds)
    q = teacher.softmax(-1).masked_fill(~support, 0.0)
    teacher_mass = {s.name: q[i * n : (i + 1) * n].sum(-1).tolist() for i, s in enumerate(STARTS)}
    far = slice((len(STARTS) - 1) * n, len(STARTS) * n)
    for form in FORMS:
        masses, end = descend(form, student, teacher, support, rate, size.steps)
        for i, start in enumerate(STARTS):
            mass[start.name][form] = masses[:, i * n : (i + 1) * n]
        p = end.softmax(-1).masked_fill(~support, 0.0)
        gap = (p / p.sum(-1, keepdim=True) - q / q.sum(-1, keepdim=True)).abs().amax(-1)
        shape[form] = gap[far].tolist()
    return Numbers(identities=errors, teacher_mass=teacher_mass, mass=mass, shape_error=shape)


def descend(
    form: str, student: Tensor, teacher: Tensor, support: Tensor, rate: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Gradient descent on logits: `student`, `teacher` [R, V], `support` [R, V] bool, `rate` [R, 1].

    Returns P_S before each step and after the last, [steps + 1, R], and the logits at the end [R, V].
    """
    teacher_logp = teacher.log_softmax(-1)
    z = student.clone()
    masses: list[Tensor] = []
    for _ in range(steps):
        z.requires_grad_()
        logp = z.log_softmax(-1)
        (grad,) = torch.autograd.grad(on_support(form, logp, teacher_logp, support).sum(), z)
        masses.append(logp.detach().exp().masked_fill(~support, 0.0).sum(-1))
        z = z.detach() - rate * grad
    masses.append(z.softmax(-1).masked_fill(~support, 0.0).sum(-1))
    return torch.stack(masses), z


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""
    far = STARTS[-1].name

    def end(start: str, form: str) -> list[float]:
        return numbers.mass[start][form][-1].tolist()

    at_rest = {"above": -AT_REST, "below": AT_REST}
    raw_end = [mass / math.e for mass in numbers.teacher_mass[far]]
    uncontrolled = [abs(a - b) for a, b in zip(end(far, "renormalised"), numbers.teacher_mass[far], strict=True)]
    return (
        finding(
            "Gradients of the raw, stop-gradient, renormalised and released forms differ exactly as derived, and the "
            "sampled policy gradient is unbiased while the differentiated log-ratio has no expected gradient",
            "2605.11182 eq. 3-16, Fig. 12; 2604.13016 eq. 5 and code",
            [
                Check(
                    what=f"largest error of {len(numbers.identities)} identities",
                    interval=over_seeds([max(errors) for errors in zip(*numbers.identities.values(), strict=True)]),
                    below=EXACT,
                )
            ],
        ),
        finding(
            "Raw top-K reverse KL does not rest at the teacher: it drives the student's mass on the support to Q_S/e",
            "2605.11182 eq. 6-9",
            [Check(what="far start: P_S - Q_S/e", interval=differences(end(far, "raw"), raw_end), **at_rest)],
        ),
        finding(
            "The stop-gradient removes the drift: the mass on the support goes to Q_S (so does the tail form)",
            "2605.11182 eq. 12-13; 2604.13016 code",
            [
                Check(
                    what=f"far start, {form}: P_S - Q_S",
                    interval=differences(end(far, form), numbers.teacher_mass[far]),
                    **at_rest,
                )
                for form in ("stop_gradient", "tail", "released_code")
            ],
        ),
        finding(
            "The renormalised form learns the shape on the support and leaves its mass uncontrolled",
            "2605.11182 eq. 14-16",
            [
                Check(
                    what="far start: largest |p/P_S - q/Q_S|",
                    interval=over_seeds(numbers.shape_error["renormalised"]),
                    below=AT_REST,
                ),
                Check(what="|P_S - Q_S|", interval=over_seeds(uncontrolled), above=UNMOVED),
            ],
        ),
        finding(
            "Raw first looks healthy, then crashes, and a larger K only delays the crash",
            "2605.11182 Fig. 4, 11, 15",
            _crash_checks(numbers, *(start.name for start in STARTS[:2])),
            _crash_checks(numbers, *(start.name for start in STARTS[2:4])),
        ),
    )


def _crash_checks(numbers: Numbers, small: str, large: str) -> list[Check]:
    """Checks on two starts that differ in K: plateau and crash at the larger K, a shorter plateau at the smaller."""
    share = shares(numbers, large, "raw")
    early = min(100, len(share) - 1)
    delay = [math.log2(a / b) for a, b in zip(lengths(numbers, large), lengths(numbers, small), strict=True)]
    return [
        Check(what=f"{large}: P_S/Q_S at step {early}", interval=over_seeds(share[early].tolist()), above=PLATEAU),
        Check(what="P_S/Q_S at the end", interval=over_seeds(share[-1].tolist()), below=CRASHED),
        Check(what=f"log2 of the plateau's length over that of {small}", interval=over_seeds(delay), above=DELAY),
    ]


def shares(numbers: Numbers, start: str, form: str) -> Tensor:
    """P_S / Q_S before each step and after the last, [steps + 1, seeds]."""
    return numbers.mass[start][form] / torch.tensor(numbers.teacher_mass[start], dtype=torch.float64)


def lengths(numbers: Numbers, start: str) -> list[float]:
    """Steps until raw's P_S falls below PLATEAU x Q_S, by seed, at least 1; all steps if it never does."""
    share = shares(numbers, start, "raw")
    fallen = share < PLATEAU
    first = torch.where(fallen.any(0), fallen.int().argmax(0), len(share) - 1)
    return [float(max(1, step)) for step in first.tolist()]


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """Masses at the end, means over seeds."""
    rows: list[tuple[str, ...]] = [
        ("form", *(f"{start.name}: P_S (Q_S)" for start in STARTS), "far: largest shape error")
    ]
    for form in FORMS:
        cells = [
            f"{short(float(numbers.mass[s.name][form][-1].mean()))} ({short(_mean(numbers.teacher_mass[s.name]))})"
            for s in STARTS
        ]
        rows.append((form, *cells, short(_mean(numbers.shape_error[form]))))
    return tuple(rows)


def draw(numbers: Numbers) -> report.Figure:
    """P_S / Q_S by step for each start, seeds as thin lines, their mean as a thick one."""
    figure, axes = report.figure(len(STARTS), width=2.6)
    for panel, start in zip(axes[0], STARTS, strict=True):
        for colour, form in zip(report.COLOURS, FORMS, strict=False):
            share = shares(numbers, start.name, form)
            steps = range(1, len(share) + 1)
            panel.plot(steps, share.numpy(), color=colour, linewidth=0.5, alpha=0.4)
            panel.plot(steps, share.mean(1).numpy(), color=colour, label=form.replace("_", " "))
        panel.axhline(1 / math.e, color="black", linewidth=0.7, linestyle=":")
        panel.annotate("1/e", (1, 1 / math.e), textcoords="offset points", xytext=(2, 3), fontsize=8)
        panel.set(title=start.name, xlabel="gradient step + 1", xscale="log")
    axes[0][0].set_ylabel("P_S / Q_S, share")
    figure.legend(*axes[0][0].get_legend_handles_labels(), ncols=len(FORMS), loc="outside lower center")
    return figure


def _tables(seeds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher logits [R, V], support [R, V] bool and rate [R, 1], R = starts x seeds."""
    rows: list[tuple[Tensor, Tensor, Tensor, float]] = []
    for start in STARTS:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            base, ours, theirs = torch.randn(3, VOCABULARY, generator=generator, dtype=torch.float64)
            student, teacher = start.scale * (base + start.noise * ours), start.scale * (base + start.noise * theirs)
            inside = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, teacher.topk(start.k).indices, True)
            rows.append((student, teacher, inside, start.rate))
    student, teacher, support, rates = zip(*rows, strict=True)
    return torch.stack(student), torch.stack(teacher), torch.stack(support), torch.tensor(rates).double()[:, None]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
