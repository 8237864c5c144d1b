"""Bias and noise of every estimator of the reverse KL's gradient, on a trained pair at the student's own prefixes.

The estimators are those of arXiv 2605.11182 eq. 3-16 and of the released code of arXiv 2604.13016.
The exact gradient of a batch, with respect to the student's output layer, is G = sum_n g_n h_n' over its tokens n,
where g_n is the gradient at the logits and h_n the hidden state. The sampled token's estimator has a mean and a
variance over y ~ p, by enumeration of the vocabulary; the truncated forms have a bias and, given the prefixes, no
variance. Both are relative to ||G||:
noise sqrt(sum_n Var(g_n) ||h_n||^2) / ||G||, bias ||sum_n (g_n' - g_n) h_n'|| / ||G||.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd import signals
from opd.studies import report
from opd.studies.forms import FORMS, on_support
from opd.studies.lab import LONGEST, Lab, PairSize
from opd.studies.outcome import Check, Finding, Outcome, differences, finding, over_seeds, short
from opd.types import Tokens

KS = (1, 2, 4, 8)
# The rules.
UNBIASED = 1e-4  # of ||G||, in float64 from float32 hidden states
NOISY = 0.1  # of ||G||, in a batch
FEWER = 0.0  # of ||G||


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds (a pair each) and responses of a batch."""

    seeds: Sequence[int] = (0, 1, 2)
    responses: int = 64
    pair: PairSize | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Relative to ||G||; lists hold one number a seed."""

    bias: dict[str, dict[int, list[float]]]  # by form and K
    sampled_bias: list[float]
    sampled_noise: list[float]
    differentiated_mean: list[float]  # of the differentiated log-ratio: its expected gradient
    differentiated_noise: list[float]
    student_mass: dict[int, list[float]]  # P_S by K, mean over tokens
    teacher_mass: dict[int, list[float]]
    tokens: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One pair at the student's own prefixes, float64."""

    student: Tensor  # [N, V] logits
    teacher: Tensor  # [N, V] log-probs
    hidden: Tensor  # [N, H] of the student


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Train the pairs (or find them), write a batch of responses each, and measure all estimators on it."""
    size = size or Size()
    batches = [batch_of(lab, seed, size) for seed in size.seeds]
    numbers = measure(batches)
    return Outcome(
        setup=(
            f"Two-digit addition, V = {batches[0].teacher.shape[1]}, {len(size.seeds)} pairs of their own seeds; "
            f"{size.responses} responses of the student after warm-up, {min(numbers.tokens)} to {max(numbers.tokens)} "
            "tokens. Supports are the teacher's K likeliest tokens; gradients of the output layer."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The claims against the numbers."""
    bias = numbers.bias
    return (
        finding(
            "The sampled-token policy gradient is unbiased for the full reverse KL's gradient, and noisy",
            "2605.11182 eq. 4-5; 2604.13016 eq. 3",
            [
                Check(what="bias / ||G||", interval=over_seeds(numbers.sampled_bias), below=UNBIASED),
                Check(what="noise of one batch / ||G||", interval=over_seeds(numbers.sampled_noise), above=NOISY),
            ],
        ),
        finding(
            "The same log-ratio as a plain loss has no expected gradient: all that it gives is noise",
            "2605.11182 Fig. 12",
            [
                Check(what="mean / ||G||", interval=over_seeds(numbers.differentiated_mean), below=UNBIASED),
                Check(what="noise / ||G||", interval=over_seeds(numbers.differentiated_noise), above=NOISY),
            ],
        ),
        finding(
            "Without stop-gradient, top-K reverse KL has the additional bias grad P_S, at every K",
            "2605.11182 eq. 6-9",
            more_biased("raw", bias),
        ),
        finding(
            "Renormalising loses the mass on the support: it is less faithful than stop-gradient",
            "2605.11182 eq. 14-16",
            more_biased("renormalised", bias),
        ),
        finding(
            "A few tokens a position beat one: the bias of stop-gradient top-4 is below the sampled token's noise",
            "2604.13016 section 6.3; 2603.25562 Table 1",
            [
                Check(
                    what="noise of sampled minus bias of stop-gradient, K=4",
                    interval=differences(numbers.sampled_noise, bias["stop_gradient"][4]),
                    above=FEWER,
                )
            ],
        ),
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


def batch_of(lab: Lab, seed: int, size: Size) -> Batch:
    """Responses of a pair's student, and both models' distributions at every token of them."""
    from opd.data import DataSpec, load_prompts
    from opd.loading import load_model
    from opd.reading import read
    from opd.recipe import ModelSpec
    from opd.samplers.hf import TransformersSampler
    from opd.studies.lab import sums
    from opd.types import Sampling

    pair = lab.pair(seed, size.pair)
    student = load_model(ModelSpec(path=str(pair.student), device="cpu"), name="student")
    teacher = load_model(ModelSpec(path=str(pair.teacher), device="cpu"), name="teacher")
    prompts = load_prompts(DataSpec(**sums(size.responses, seed=3)))
    sampler = TransformersSampler(lm=student, sampling=Sampling(max_completion_length=LONGEST))
    rollouts = sampler(prompts, seed=(seed, 0))
    states: list[Tensor] = []
    with torch.no_grad():
        for lm in (student, teacher):
            ids = [rollout.response_ids for rollout in rollouts]
            found = read(lm, [rollout.prompt_ids for rollout in rollouts], [one.tolist() for one in ids])
            states.append(torch.cat([found.of(i, len(one)) for i, one in enumerate(ids)]))
        return Batch(
            student=student.head().logits(states[0]).double(),
            teacher=teacher.head().logits(states[1]).double().log_softmax(-1),
            hidden=states[0].double(),
        )


def measure(batches: Sequence[Batch]) -> Numbers:
    """All estimators on all batches."""
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


def logit_gradient(form: str, batch: Batch, inside: Tensor) -> Tensor:
    """d loss / d logits [N, V] of a form on the support `inside` [N, V] bool."""
    z = batch.student.clone().requires_grad_()
    (grad,) = torch.autograd.grad(on_support(form, z.log_softmax(-1), batch.teacher, inside).sum(), z)
    return grad


def sampled_gradients(batch: Batch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
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


def output_norm(grad: Tensor, batch: Batch) -> float:
    """Norm of sum_n g_n h_n', the gradient of the output layer, from that of the logits [N, V]."""
    return float((grad.T @ batch.hidden).norm())


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """Means over seeds: bias by form and K, the masses, and the sampled token."""
    rows: list[tuple[str, ...]] = [("relative to the exact gradient", *(f"K={k}" for k in KS))]
    for form in FORMS:
        rows.append((f"bias, {form}", *(short(over_seeds(numbers.bias[form][k]).mean) for k in KS)))
    for name, mass in (("P_S", numbers.student_mass), ("Q_S", numbers.teacher_mass)):
        rows.append((name, *(short(over_seeds(mass[k]).mean) for k in KS)))
    rows.append(("noise, sampled token", *[short(over_seeds(numbers.sampled_noise).mean)] * len(KS)))
    return tuple(rows)


def draw(numbers: Numbers) -> report.Figure:
    """Bias by K for each form, with the sampled token's noise as a line."""
    figure, axes = report.figure(1, width=5.0, height=3.2)
    panel = axes[0][0]
    for form, colour in zip(FORMS, report.COLOURS, strict=False):
        intervals = [over_seeds(numbers.bias[form][k]) for k in KS]
        panel.plot(KS, [one.mean for one in intervals], "o-", color=colour, label=form.replace("_", " "), markersize=4)
        for seed in range(len(numbers.tokens)):
            panel.plot(KS, [numbers.bias[form][k][seed] for k in KS], color=colour, linewidth=0.4, alpha=0.5)
    noise = over_seeds(numbers.sampled_noise)
    panel.axhline(noise.mean, color="black", linestyle="--", label="sampled token: noise of the batch")
    panel.axhspan(max(noise.low, 1e-6), noise.high, color="black", alpha=0.08)
    panel.set(
        xscale="log", yscale="log", xlabel="K, tokens of the support", ylabel="error / norm of the exact gradient"
    )
    panel.set_xticks(KS, [str(k) for k in KS])
    panel.minorticks_off()
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
