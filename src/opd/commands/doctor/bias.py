"""Bias of the method's gradient: compared with the exact gradient, on the distributions of this student and teacher.

At some positions of the student's responses, the method's signal and the exact divergence over the whole vocabulary are
both differentiated with respect to the student's logits. Weights and credit are left out of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd.commands.doctor.findings import Finding, skipped
from opd.commands.doctor.subject import Subject
from opd.evaluation.compare import whole
from opd.loss.collate import MicroBatch, split
from opd.loss.step import scored
from opd.loss.token_loss import hidden_of
from opd.maths.divergences import Divergence, reverse_kl
from opd.method import Method
from opd.models.language_model import evaluating
from opd.pieces.needs import Input, Reads, Trait, needs_of
from opd.pieces.signals import divergence_of
from opd.types import Rollout, Signal, Tokens

POSITIONS = 64


TILE = 16  # positions differentiated at once, in float64


# Cosine and length ratio between the step's gradient on logits and the exact one. Our thresholds: the papers give
# identities only. At .9 the direction is 26 degrees off.
LOWEST_COSINE = 0.9


LENGTHS = (0.5, 2.0)


ROUNDING = 1e-4  # up to this norm, a gradient on logits is float32 rounding of two equal distributions


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """Some positions of the responses: the inputs of the method's signal there, and both models' logits, [n, V]."""

    micro: MicroBatch
    rows: Tensor  # [n] of the micro-batch's tokens
    student: Tensor
    teacher: Tensor


def truncation(subject: Subject) -> Finding:
    """Cosine and relative length of the method's gradient against the exact one, pooled and as means over positions.

    On a top-k support, the exact gradient is that of the method's divergence (reverse KL if it names none). For the
    sampled token it is that of reverse KL, and the method's gradient is its exact expectation over the token.
    """
    name, method = "signal/bias", subject.method
    if subject.maximises_divergence:
        return skipped(name, "The method maximises the divergence from its teacher: there is none to minimise.")
    if Reads.BASE_LOGP in method.needs:
        return skipped(name, "The method's target is not its teacher: its gradient should differ from that of the KL.")
    if method.support.kind == "full":
        return Finding(name=name, level="ok", says="The method reads the whole vocabulary: nothing is truncated.")
    rollouts, micros = phase_a(subject)
    unjudged = subject.has_judge_reward and Input.REWARD in needs_of(method.credit)
    if in_expectation(method) and (unjudged or any(bool((micro.advantage != 0).any()) for micro in micros)):
        return skipped(name, "The signal of a token depends on the whole response (a credit), not on the token alone.")
    exact = divergence_of(method.signal) or reverse_kl
    pairs: list[tuple[Tensor, Tensor]] = []
    for at in positions(subject, rollouts, micros):
        gradient = expected_gradient if in_expectation(method) else support_gradient
        pairs.append((gradient(method.signal, at), exact_gradient(exact, at)))
    return judge(subject, torch.cat([ours for ours, _ in pairs]), torch.cat([theirs for _, theirs in pairs]))


def in_expectation(method: Method) -> bool:
    """Whether the signal reads the sampled token; then a support, if any, serves its baseline."""
    return method.support.kind == "sampled" or Trait.UNBIASED_BASELINE in needs_of(method.signal)


def judge(subject: Subject, ours: Tensor, exact: Tensor) -> Finding:
    """The finding from the method's gradients `ours` and the exact ones, [n, V] each."""
    name, support = "signal/bias", subject.method.support
    lengths = exact.norm(dim=1)
    if not bool((lengths > ROUNDING).any()):
        return skipped(name, "The exact gradient is zero at every sampled position: student and teacher agree.")
    some = lengths > ROUNDING
    cosines = torch.nn.functional.cosine_similarity(ours[some], exact[some], dim=1)
    numbers = {
        "positions": len(exact),
        "cosine": float((ours * exact).sum() / (ours.norm() * exact.norm()).clamp(min=1e-300)),
        "length": float(ours.norm() / exact.norm()),
        "cosine_mean": float(cosines.mean()),
        "length_mean": float((ours[some].norm(dim=1) / lengths[some]).mean()),
    }
    sampled = in_expectation(subject.method)
    form = "the sampled token, in expectation" if sampled else f"top {support.k} by {support.by}"
    says = (
        f"Gradient of {subject.spec.method} ({form}) against the exact one at {len(exact)} positions: cosine "
        f"{numbers['cosine']:.3f}, length {numbers['length']:.3f} (means {numbers['cosine_mean']:.3f} and "
        f"{numbers['length_mean']:.3f})."
    )
    if numbers["cosine"] >= LOWEST_COSINE and LENGTHS[0] <= numbers["length"] <= LENGTHS[1]:
        return Finding(name=name, level="ok", says=says, numbers=numbers)
    remedy = "Use method: opd" if sampled else "Set options.form: tail or a larger options.k"
    return Finding(
        name=name,
        level="change",
        says=says,
        numbers=numbers,
        remedy=f"{remedy}, or method: reverse_kl, which is exact.",
        study="`opd study estimators` and `losses`; arXiv 2605.11182 eq. 6-16: each form's bias; docs/numerics.md has "
        "the identities",
    )


def phase_a(subject: Subject) -> tuple[list[Rollout], list[MicroBatch]]:
    """`Subject.scored` after phase A of a step, in micro-batches."""
    method, spec = subject.method, subject.spec
    rollouts = subject.writers().complete(method.filter(subject.scored), method.record())
    request = method.request(shown=True)
    phase = scored(
        method, subject.teacher, rollouts, subject.contexts(rollouts), request, device=subject.student.device
    )
    return rollouts, split(subject.student, phase.batch, phase.denominator, spec.micro_batch_tokens)


@torch.no_grad()
def positions(subject: Subject, rollouts: list[Rollout], micros: list[MicroBatch]) -> Iterator[Positions]:
    """`POSITIONS` trained tokens, chosen by the seed, `TILE` at a time."""
    teacher, temperature = subject.teacher, subject.method.temperature
    contexts = subject.contexts(rollouts)
    scores = teacher.score(rollouts, contexts, whole(temperature))
    hidden = {key_of(rollout): score.teacher_hidden for rollout, score in zip(rollouts, scores, strict=True)}
    heads = subject.student.head().detached(), teacher.head()
    total = sum(len(micro.token_ids) for micro in micros)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(subject.seed))[:POSITIONS].sort().values
    start = 0
    with evaluating(subject.student.model):
        for micro in micros:
            here = order[(order >= start) & (order < start + len(micro.token_ids))] - start
            start += len(micro.token_ids)
            student_NH = hidden_of(subject.student, micro) if len(here) else None
            for rows in here.split(TILE):
                if student_NH is None or not len(rows):
                    continue
                theirs: list[Tensor] = []
                for i in rows.tolist():
                    states = hidden[key_of(micro.rollouts[int(micro.row[i])])]
                    assert states is not None
                    theirs.append(states[int(micro.step[i])])
                at = rows.to(student_NH.device)
                yield Positions(
                    micro=micro,
                    rows=at,
                    student=heads[0].logits(student_NH[at]).double() / temperature,
                    teacher=heads[1].logits(torch.stack(theirs)).double() / temperature,
                )


def key_of(rollout: Rollout) -> tuple[int, int]:
    """A response's key: the id of its prompt, and the number of its sample."""
    return rollout.prompt.id, rollout.sample


def exact_gradient(divergence: Divergence, at: Positions) -> Tensor:
    """d/dz of the divergence over the whole vocabulary, [n, V]."""
    with torch.enable_grad():
        z = at.student.requires_grad_()
        value = divergence(z.log_softmax(-1), at.teacher.log_softmax(-1)).sum()
        return torch.autograd.grad(value, z)[0]


def support_gradient(signal: Signal, at: Positions) -> Tensor:
    """d/dz of the signal on its scored support, with the sampled token, [n, V]."""
    micro, rows = at.micro, at.rows
    assert micro.support_ids is not None
    assert micro.support_mask is not None
    ids, y, t = micro.support_ids[rows], micro.token_ids[rows, None], at.teacher.log_softmax(-1)
    with torch.enable_grad():
        z = at.student.requires_grad_()
        s = z.log_softmax(-1)
        tokens = Tokens(
            student_logp=s.gather(1, y)[:, 0],
            sampler_logp=micro.sampler_logp[rows].double(),
            teacher_logp=t.gather(1, y)[:, 0],
            advantage=micro.advantage[rows].double(),
            weight=micro.weight[rows].double(),
            student_support_logp=s.gather(1, ids),
            teacher_support_logp=t.gather(1, ids),
            support_mask=micro.support_mask[rows],
        )
        return torch.autograd.grad(signal(tokens).sum(), z)[0]


def expected_gradient(signal: Signal, at: Positions) -> Tensor:
    """E_{y~p} d/dz of the signal of the sampled token y, exactly, [n, V].

    With c(y) = d signal / d log p(y) it is p_j (c_j - sum_v p c): one number per token, no sampling. Assumes y ~ p, on
    policy. The support, which a baseline reads, is the same for every y.
    """
    s, t = at.student.detach().log_softmax(-1), at.teacher.log_softmax(-1)
    c = torch.stack([_slopes(signal, at, i, s[i], t[i]) for i in range(len(s))])
    p = s.exp()
    return p * (c - (p * c).sum(1, keepdim=True))


def _slopes(signal: Signal, at: Positions, i: int, s: Tensor, t: Tensor) -> Tensor:
    """d signal / d log p(y) at position `i` for every token y, [V]. `s`, `t`: log-probs of both models there."""
    micro, row = at.micro, at.rows[i]
    support: dict[str, Any] = {}
    if micro.support_ids is not None and micro.support_mask is not None:
        ids, exists = micro.support_ids[row], micro.support_mask[row]
        columns = {"student_support_logp": s[ids], "teacher_support_logp": t[ids], "support_mask": exists}
        support = {name: column.expand(len(s), -1) for name, column in columns.items()}
    with torch.enable_grad():
        leaf = s.clone().requires_grad_()
        tokens = Tokens(
            student_logp=leaf,
            sampler_logp=leaf.detach(),
            teacher_logp=t,
            advantage=torch.zeros_like(s),
            weight=micro.weight[row].double().expand(len(s)),
            **support,
        )
        return torch.autograd.grad(signal(tokens).sum(), leaf)[0]
