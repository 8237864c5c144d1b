"""Bias and noise of every estimator of the reverse KL's gradient, on a trained pair at the student's own prefixes.

The estimators are those of arXiv 2605.11182 eq. 3-16 and of the released code of arXiv 2604.13016.
The exact gradient of a batch, with respect to the student's output layer, is G = sum_n g_n h_n' over its tokens n,
where g_n is the gradient at the logits and h_n the hidden state. The sampled token's estimator has a mean and a
variance over y ~ p, by enumeration of the vocabulary; the truncated forms have a bias and, given the prefixes, no
variance. Both are relative to ||G||:
noise sqrt(sum_n Var(g_n) ||h_n||^2) / ||G||, bias ||sum_n (g_n' - g_n) h_n'|| / ||G||.

Setting A: a student after warm-up, on sums, whose likely tokens differ from its teacher's. Setting B: a student on rows
of digits after distillation with the sampled token (the run of the study `losses`), so that the teacher's K tokens hold
nearly all mass of both models, as with the papers' language models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd.pieces import signals
from opd.types import Tokens
from opd_studies.lab import ablation
from opd_studies.lab.lab import ADDITION, Lab, PairSize
from opd_studies.lab.on_policy_batch import OnPolicyBatch, logit_gradient, output_norm, write_batch
from opd_studies.lab.truncated_losses import SAMPLED_TOKEN, SIZE
from opd_studies.page import report
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding, over_seeds, short
from opd_studies.worlds.truncated_forms import FORMS

USE = (
    "Take `form: tail`: in the table its gradient is nearest to the exact one in both settings. The sampled "
    "token is unbiased, and the noise of 64 responses is about as large as the gradient: give method `opd` more "
    "responses per step."
)


KS = (1, 2, 4, 8)


# Thresholds.
UNBIASED = 1e-4  # of ||G||, in float64 from float32 hidden states


NOISY = 0.1  # of ||G||, in a batch


FEWER = 0.0  # of ||G||


CLAIMS = (
    (
        "The sampled-token policy gradient is unbiased for the full reverse KL's gradient, and noisy",
        "2605.11182 eq. 4-5; 2604.13016 eq. 3",
    ),
    ("The same log-ratio as a plain loss has no expected gradient: all that it gives is noise", "2605.11182 Fig. 12"),
    ("Without stop-gradient, top-K reverse KL has the additional bias grad P_S, at every K", "2605.11182 eq. 6-9"),
    ("Renormalising loses the mass on the support: it is less faithful than stop-gradient", "2605.11182 eq. 14-16"),
    (
        "A few tokens a position beat one: the bias of stop-gradient top-4 is below the sampled token's noise",
        "2604.13016 section 6.3; 2603.25562 Table 1",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds (one pair each), responses of a batch, setting A's pairs, and the distillation of setting B."""

    seeds: Sequence[int] = (0, 1, 2)
    responses: int = 64
    pair: PairSize | None = None
    distilled: ablation.Size = SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Relative to ||G||; lists hold one number per seed."""

    bias: dict[str, dict[int, list[float]]]  # by form and K
    sampled_bias: list[float]
    sampled_noise: list[float]
    differentiated_mean: list[float]  # of the differentiated log-ratio: its expected gradient
    differentiated_noise: list[float]
    student_mass: dict[int, list[float]]  # P_S by K, mean over tokens
    teacher_mass: dict[int, list[float]]
    tokens: list[int]


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Train the pairs unless cached, sample a batch of responses from each, and measure all estimators on it."""
    size = size or Size()
    batches = {"A": warmed_up(lab, size), "B": distilled(lab, size)}
    numbers = {name: measure(one) for name, one in batches.items()}
    vocabularies = {name: one[0].teacher.shape[1] for name, one in batches.items()}
    return Outcome(
        setup=(
            f"{len(size.seeds)} pairs of their own seeds, {size.responses} responses of the student. A: two-digit "
            f"addition, V = {vocabularies['A']}, student after warm-up, {tokens_of(numbers['A'])} tokens. B: sorting "
            f"five digits, V = {vocabularies['B']}, student after {size.distilled.steps} updates with the sampled "
            f"token, {tokens_of(numbers['B'])} tokens. Supports are the teacher's K likeliest tokens; gradients of "
            "the output layer."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def judge(numbers: Mapping[str, Numbers]) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers of both settings."""
    checks = [_checks(one) for one in numbers.values()]
    return tuple(finding(*claim, *both) for claim, *both in zip(CLAIMS, *checks, strict=True))


def _checks(numbers: Numbers) -> tuple[list[Check], ...]:
    """The checks of each claim in one setting."""
    bias = numbers.bias
    return (
        [
            Check(what="bias / ||G||", interval=over_seeds(numbers.sampled_bias), below=UNBIASED),
            Check(what="noise of one batch / ||G||", interval=over_seeds(numbers.sampled_noise), above=NOISY),
        ],
        [
            Check(what="mean / ||G||", interval=over_seeds(numbers.differentiated_mean), below=UNBIASED),
            Check(what="noise / ||G||", interval=over_seeds(numbers.differentiated_noise), above=NOISY),
        ],
        more_biased("raw", bias),
        more_biased("renormalised", bias),
        [
            Check(
                what="noise of sampled minus bias of stop-gradient, K=4",
                interval=differences(numbers.sampled_noise, bias["stop_gradient"][4]),
                above=FEWER,
            )
        ],
    )


def more_biased(form: str, bias: Mapping[str, Mapping[int, list[float]]]) -> list[Check]:
    """Whether a form is further from the full gradient than the stop-gradient form, at every K."""
    return [
        Check(
            what=f"K={k}: bias of {form} minus stop-gradient",
            interval=differences(bias[form][k], bias["stop_gradient"][k]),
            above=FEWER,
        )
        for k in KS
    ]


def warmed_up(lab: Lab, size: Size) -> list[OnPolicyBatch]:
    """Setting A, one batch per seed."""
    pairs = lab.pairs(size.seeds, size.pair)
    task = ADDITION if size.pair is None else size.pair.task
    return [write_batch(pair, seed, task, size.responses) for seed, pair in zip(size.seeds, pairs, strict=True)]


def distilled(lab: Lab, size: Size) -> list[OnPolicyBatch]:
    """Setting B, one batch per seed."""
    one = replace(size.distilled, seeds=size.seeds)
    trained = ablation.train(lab, {"sampled": SAMPLED_TOKEN}, one)["sampled"]
    pairs = lab.pairs(size.seeds, one.pair)
    return [
        write_batch(replace(pair, student=run.model), seed, one.pair.task, size.responses)
        for seed, pair, run in zip(size.seeds, pairs, trained, strict=True)
    ]


def measure(batches: Sequence[OnPolicyBatch]) -> Numbers:
    """Measure all estimators on all batches."""
    numbers = Numbers(
        bias={form: {k: [] for k in KS} for form in FORMS},
        sampled_bias=[],
        sampled_noise=[],
        differentiated_mean=[],
        differentiated_noise=[],
        student_mass={k: [] for k in KS},
        teacher_mass={k: [] for k in KS},
        tokens=[len(batch.hidden) for batch in batches],
    )
    for batch in batches:
        everything = torch.ones_like(batch.teacher, dtype=torch.bool)
        exact = logit_gradient("tail", batch, everything)  # on the whole vocabulary: the exact reverse KL
        size = output_norm(exact, batch)
        right, wrong = sampled_gradients(batch)
        for mean, noise, (average, variance), target in (
            (numbers.sampled_bias, numbers.sampled_noise, right, exact),
            (numbers.differentiated_mean, numbers.differentiated_noise, wrong, torch.zeros_like(exact)),
        ):
            mean.append(output_norm(average - target, batch) / size)
            noise.append(float((variance * batch.hidden.square().sum(-1)).sum().sqrt()) / size)
        for k in KS:
            top = batch.teacher.topk(k, dim=-1).indices
            inside = torch.zeros_like(everything).scatter(-1, top, True)
            for form in FORMS:
                numbers.bias[form][k].append(output_norm(logit_gradient(form, batch, inside) - exact, batch) / size)
            p = batch.student.softmax(-1)
            numbers.student_mass[k].append(float(p.masked_fill(~inside, 0.0).sum(-1).mean()))
            numbers.teacher_mass[k].append(float(batch.teacher.exp().masked_fill(~inside, 0.0).sum(-1).mean()))
    return numbers


def sampled_gradients(batch: OnPolicyBatch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Mean [N, V] and summed variance [N] over y ~ p of the logits' gradient: policy gradient, differentiated ratio."""
    z = batch.student.clone().requires_grad_()
    chance = z.detach().softmax(-1)
    policy_gradient = signals.policy_gradient(signals.log_ratio)
    sums = [[torch.zeros_like(chance), torch.zeros_like(chance[:, 0])] for _ in range(2)]
    for y in range(chance.shape[1]):
        logp = z.log_softmax(-1)[:, y]
        nothing = torch.zeros_like(chance[:, y])
        tokens = Tokens(
            student_logp=logp,
            sampler_logp=logp.detach(),
            teacher_logp=batch.teacher[:, y],
            advantage=nothing,
            weight=nothing,
        )
        for total, loss in zip(sums, (policy_gradient(tokens), logp - batch.teacher[:, y]), strict=True):
            (grad,) = torch.autograd.grad(loss.sum(), z, retain_graph=True)
            total[0] += chance[:, y, None] * grad
            total[1] += chance[:, y] * grad.square().sum(-1)
    (a, a2), (b, b2) = sums
    return (a, a2 - a.square().sum(-1)), (b, b2 - b.square().sum(-1))


def tokens_of(numbers: Numbers) -> str:
    """The range over seeds as text."""
    return f"{min(numbers.tokens)} to {max(numbers.tokens)}"


def table(numbers: Mapping[str, Numbers]) -> tuple[tuple[str, ...], ...]:
    """Means over seeds: bias by form and K, masses, and numbers of the sampled token."""
    rows: list[tuple[str, ...]] = [("setting", "relative to the exact gradient", *(f"K={k}" for k in KS))]
    for name, one in numbers.items():
        for form in FORMS:
            rows.append((name, f"bias, {form}", *(short(over_seeds(one.bias[form][k]).mean) for k in KS)))
        for what, mass in (("P_S", one.student_mass), ("Q_S", one.teacher_mass)):
            rows.append((name, what, *(short(over_seeds(mass[k]).mean) for k in KS)))
        rows.append((name, "noise, sampled token", *[short(over_seeds(one.sampled_noise).mean)] * len(KS)))
    return tuple(rows)


def draw(numbers: Mapping[str, Numbers]) -> report.Figure:
    """Bias by K for each form, with the sampled token's noise as a line; one panel per setting."""
    figure, axes = report.figure(len(numbers), width=3.6, height=3.2)
    titles = {"A": "A: after warm-up", "B": "B: after distillation"}
    for panel, (name, one) in zip(axes[0], numbers.items(), strict=True):
        for form, colour in zip(FORMS, report.COLOURS, strict=False):
            means = [over_seeds(one.bias[form][k]).mean for k in KS]
            panel.plot(KS, means, "o-", color=colour, label=form.replace("_", " "), markersize=4)
            for seed in range(len(one.tokens)):
                panel.plot(KS, [one.bias[form][k][seed] for k in KS], color=colour, linewidth=0.4, alpha=0.5)
        noise = over_seeds(one.sampled_noise)
        panel.axhline(noise.mean, color="black", linestyle="--", label="sampled token: noise of the batch")
        panel.axhspan(max(noise.low, 1e-6), noise.high, color="black", alpha=0.08)
        panel.set(xscale="log", yscale="log", xlabel="K, tokens of the support", title=titles[name])
        panel.set_xticks(KS, [str(k) for k in KS])
        panel.set_xticks([], minor=True)
    axes[0][0].set_ylabel("error / norm of the exact gradient")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure
