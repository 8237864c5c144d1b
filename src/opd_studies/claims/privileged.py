"""Privileged information: a rule shared by all prompts is learned, facts of single prompts are averaged away.

Zhu et al., arXiv 2605.11182 eq. 10-11: the student does not see the information I, so its optimum against teachers
p_T(. | x, I) is p(y | x) proportional to exp E_I log p_T(y | x, I), their geometric mean. The loss that remains is
-log Z(x), the disagreement of the teachers.

Teachers are tables, softmax(b_x + s u): b_x is the model without information, u the effect of the information. Two
designs:

    shared    one u for all prompts and all I, a rule
    instance  a separate u for every prompt and every I, a fact

*Several I*: eight teachers per prompt, a tabular student that descends the exact mean over I. *Held out*: one I per
prompt (like one answer per problem), a student that is linear in the prompt's features, measured on new prompts. The
share of information that it keeps is (E_p u - E_b u) / (E_teacher u - E_b u): 1 equals the teacher, 0 the model without
information.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.maths import divergences
from opd_studies.lab.lab import Lab
from opd_studies.page import report
from opd_studies.page.outcome import Check, Finding, Outcome, finding, over_seeds, short

USE = (
    "Distil a rule that all prompts share; facts of single prompts are averaged away or do not carry over. `opd "
    "doctor` tells them apart by -log Z (`information/disagreement`): confirm on held-out prompts."
)


DESIGNS = ("shared", "instance")


VOCABULARY = 50


STRENGTH = 3.0  # s


FEATURES = 16


# Thresholds.
SAME = 1e-3  # nats: distributions and values that agree


DIFFERENT = 0.1  # nats: distributions that differ


DISAGREE = 0.5  # nats: -log Z of teachers that disagree


KEPT, LOST = 0.9, 0.5  # share of the information


NOTHING = 0.25  # share of the information that counts as none


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds, prompts and steps of Adam."""

    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    prompts: int = 32
    teachers: int = 8
    train_prompts: int = 64
    held_out_prompts: int = 256
    steps: int = 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Lists hold one number per seed; nats unless said otherwise."""

    to_geometric: list[float]  # KL(learned || normalised geometric mean), instance design
    to_arithmetic: list[float]  # KL(learned || arithmetic mean), instance design
    value_error: list[float]  # |loss - (-log Z)|, instance design
    disagreement: dict[str, list[float]]  # -log Z by design
    kept: dict[str, list[float]]  # share, by design: several I, tabular student
    kept_train: dict[str, list[float]]  # share, by design: one I, linear student
    kept_held_out: dict[str, list[float]]
    curve: dict[str, Tensor]  # [steps] mean loss over seeds, by design: several I


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Run both designs, several I and held out; see the file's docstring."""
    size = size or Size()
    lab.note("tables and linear students")
    numbers = measure(size)
    return Outcome(
        setup=(
            f"{len(size.seeds)} seeds, V = {VOCABULARY}, s = {STRENGTH:g}. Several I: {size.prompts} prompts, "
            f"{size.teachers} teachers each. Held out: {size.train_prompts} prompts of {FEATURES} features to train, "
            f"{size.held_out_prompts} to measure. {size.steps} steps of Adam on exact reverse KL, float64."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""
    return (
        finding(
            "Distilling from teachers with different information ends at their normalised geometric mean, and the loss "
            "at -log Z",
            "2605.11182 eq. 10-11",
            [
                Check(
                    what="KL(student || geometric mean), nats", interval=over_seeds(numbers.to_geometric), below=SAME
                ),
                Check(
                    what="KL(student || arithmetic mean)", interval=over_seeds(numbers.to_arithmetic), above=DIFFERENT
                ),
                Check(what="|loss + log Z|", interval=over_seeds(numbers.value_error), below=SAME),
            ],
        ),
        finding(
            "A shared rule is internalised, instance-specific information averaged away, and -log Z tells them apart",
            "2605.11182 eq. 10-11, Fig. 3 and 6",
            [
                Check(what="kept, shared", interval=over_seeds(numbers.kept["shared"]), above=KEPT),
                Check(what="kept, instance", interval=over_seeds(numbers.kept["instance"]), below=LOST),
                Check(what="-log Z, shared, nats", interval=over_seeds(numbers.disagreement["shared"]), below=SAME),
                Check(what="-log Z, instance", interval=over_seeds(numbers.disagreement["instance"]), above=DISAGREE),
            ],
        ),
        finding(
            "With one answer a problem, what is learned from it does not carry over to new problems; a rule does",
            "2605.11182 Fig. 3, 6 and 7",
            [
                Check(
                    what="kept on held-out prompts, shared",
                    interval=over_seeds(numbers.kept_held_out["shared"]),
                    above=KEPT,
                ),
                Check(what="instance", interval=over_seeds(numbers.kept_held_out["instance"]), below=NOTHING),
            ],
        ),
    )


def measure(size: Size) -> Numbers:
    """Measure all seeds, both designs."""
    kept: dict[str, list[float]] = {}
    train: dict[str, list[float]] = {}
    held_out: dict[str, list[float]] = {}
    disagreement: dict[str, list[float]] = {}
    curves: dict[str, list[Tensor]] = {design: [] for design in DESIGNS}
    geometric: list[float] = []
    arithmetic: list[float] = []
    value: list[float] = []
    for design in DESIGNS:
        for seed in size.seeds:
            base, added = several(design, seed, size)
            teacher = (base + STRENGTH * added).log_softmax(-1)  # [M, X, V]
            logits, losses = descend(base[0].clone(), lambda z: z, teacher, size.steps)
            log_z = teacher.mean(0).logsumexp(-1)  # [X]
            student = logits.log_softmax(-1)
            kept.setdefault(design, []).append(share_kept(student, teacher, base, added))
            disagreement.setdefault(design, []).append(float(-log_z.mean()))
            curves[design].append(losses)
            if design == "instance":
                middle = teacher.mean(0).log_softmax(-1)
                mixture = teacher.logsumexp(0) - torch.tensor(float(len(teacher))).log()
                geometric.append(float(divergences.reverse_kl(student, middle).mean()))
                arithmetic.append(float(divergences.reverse_kl(student, mixture).mean()))
                value.append(abs(float(losses[-1] + log_z.mean())))
            for into, share in zip((train, held_out), linear(design, seed, size), strict=True):
                into.setdefault(design, []).append(share)
    return Numbers(
        to_geometric=geometric,
        to_arithmetic=arithmetic,
        value_error=value,
        disagreement=disagreement,
        kept=kept,
        kept_train=train,
        kept_held_out=held_out,
        curve={design: torch.stack(losses).mean(0) for design, losses in curves.items()},
    )


def several(design: str, seed: int, size: Size) -> tuple[Tensor, Tensor]:
    """b_x [1, X, V] and the additions u of M teachers [M, X, V]."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(1, size.prompts, VOCABULARY, generator=generator, dtype=torch.float64)
    shape = (size.teachers, size.prompts) if design == "instance" else (1, 1)
    added = torch.randn(*shape, VOCABULARY, generator=generator, dtype=torch.float64)
    return base, added.expand(size.teachers, size.prompts, VOCABULARY)


def linear(design: str, seed: int, size: Size) -> tuple[float, float]:
    """The shares of information that a linear student keeps, on its own prompts and on new ones."""
    generator = torch.Generator().manual_seed(seed)
    n = size.train_prompts + size.held_out_prompts
    x = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
    weight = torch.randn(FEATURES, VOCABULARY, generator=generator, dtype=torch.float64) / FEATURES**0.5
    base = x @ weight  # [X, V]: the student can represent this model exactly, and starts there
    rows = n if design == "instance" else 1
    added = torch.randn(rows, VOCABULARY, generator=generator, dtype=torch.float64).expand(n, VOCABULARY)
    teacher = (base + STRENGTH * added).log_softmax(-1)
    seen = torch.cat([x, torch.ones(n, 1, dtype=torch.float64)], 1)
    start = torch.cat([weight, torch.zeros(1, VOCABULARY, dtype=torch.float64)])
    train, new = slice(size.train_prompts), slice(size.train_prompts, None)
    end, _ = descend(start, lambda w: seen[train] @ w, teacher[None, train], size.steps)
    student = (seen @ end).log_softmax(-1)
    on_train, on_new = (
        share_kept(student[at], teacher[None, at], base[None, at], added[None, at]) for at in (train, new)
    )
    return on_train, on_new


def descend(start: Tensor, logits_of: Callable[[Tensor], Tensor], teacher: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Adam on the mean reverse KL over teachers [M, X, V] and prompts; the rate falls to 0 as a cosine.

    Returns the parameters at the end, and the loss before each step and at the end, [steps + 1].
    """
    parameters = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([parameters], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    def loss() -> Tensor:
        student = logits_of(parameters).log_softmax(-1).expand(teacher.shape)
        return divergences.reverse_kl(student, teacher).mean()

    losses: list[Tensor] = []
    for _ in range(steps):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
        schedule.step()
        losses.append(value.detach())
    return parameters.detach(), torch.stack([*losses, loss().detach()])


def share_kept(student: Tensor, teacher: Tensor, base: Tensor, added: Tensor) -> float:
    """(E_p u - E_b u) / (E_teacher u - E_b u), means over all; `student` [X, V], the others [M, X, V]."""
    ours, theirs, none = ((p.exp() * added).sum(-1).mean() for p in (student, teacher, base.log_softmax(-1)))
    return float((ours - none) / (theirs - none))


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """Means over seeds by design."""
    rows: list[tuple[str, ...]] = [
        ("design", "-log Z, nats", "kept: several I", "kept: one I, trained prompts", "kept: one I, held out")
    ]
    columns = (numbers.disagreement, numbers.kept, numbers.kept_train, numbers.kept_held_out)
    for design in DESIGNS:
        rows.append((design, *(short(over_seeds(column[design]).mean) for column in columns)))
    return tuple(rows)


def draw(numbers: Numbers) -> report.Figure:
    """The loss against -log Z, and the share of information kept."""
    figure, axes = report.figure(2, width=4.0, height=3.0)
    left, right = axes[0]
    for design, colour in zip(DESIGNS, report.COLOURS, strict=False):
        left.plot(
            range(1, len(numbers.curve[design]) + 1), numbers.curve[design], color=colour, label=f"{design}: loss"
        )
        left.axhline(
            over_seeds(numbers.disagreement[design]).mean, color=colour, linestyle=":", label=f"{design}: -log Z"
        )
    left.set(xscale="log", xlabel="step of Adam + 1", ylabel="reverse KL, nats", title="several I a prompt")
    left.legend(fontsize=7)
    groups = {
        "several I": numbers.kept,
        "one I,\ntrained on": numbers.kept_train,
        "one I,\nheld out": numbers.kept_held_out,
    }
    for i, (design, colour) in enumerate(zip(DESIGNS, report.COLOURS, strict=False)):
        intervals = [over_seeds(values[design]) for values in groups.values()]
        right.bar(
            [place + 0.4 * i for place in range(len(groups))],
            [one.mean for one in intervals],
            0.38,
            yerr=[[one.mean - one.low for one in intervals], [one.high - one.mean for one in intervals]],
            color=colour,
            label=design,
            capsize=2,
        )
    right.set_xticks([place + 0.2 for place in range(len(groups))], list(groups))
    right.axhline(0, color="black", linewidth=0.7)
    right.set(ylabel="share of the information kept", title="mean and 95 % interval over seeds", ylim=(-0.1, 1.3))
    right.legend(fontsize=7, loc="upper right")
    return figure
