"""Signals: Tokens -> loss per token [N], to be minimised. Pure; gradient flows through `student_*` only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Literal

from opd.errors import ConfigError, nearest
from opd.maths import divergences
from opd.pieces.needs import Needs, Piece, Reads, Trait, needing, needs_of
from opd.pieces.packed import support_of
from opd.plugins import torch
from opd.types import Advantage, Signal, Tokens

if TYPE_CHECKING:
    from torch import Tensor

# Importance ratios are clamped at e^60, below the overflow of float32, so that a clipped token has a gradient of
# exactly 0, not 0 x inf. A larger ratio means a broken run.
LARGEST_LOG_RATIO = 60.0


# Two probabilities that differ by less than this share of the larger one count as equal: float32 rounding.
RANK_ROUNDING = 1e-5


IMITATES = Needs(traits=frozenset({Trait.MINIMISES_DIVERGENCE}))


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergencePiece(Piece[[Tokens], "Tensor"]):
    """A signal that is a divergence, so that the loss can use its closed-form gradient on the whole vocabulary."""

    divergence: divergences.Divergence
    # Adding a constant to a position's log-probs changes nothing, so unnormalised logits suffice.
    shift_invariant: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPiece(Piece[[Tokens], "Tensor"]):
    """A signal with metrics of its own: by name, values whose mean is logged, one for each of some tokens, [n]."""

    measure: Callable[[Tokens], Mapping[str, Tensor]]


def divergence_of(signal: Signal) -> divergences.Divergence | None:
    """The divergence of a `DivergencePiece`; None for any other signal, such as sums and multiples of divergences."""
    return signal.divergence if isinstance(signal, DivergencePiece) else None


def shift_invariant(signal: Signal) -> bool:
    """Whether a signal is known to be independent of the normaliser of the student's softmax."""
    return isinstance(signal, DivergencePiece) and signal.shift_invariant


def divergence(
    name: str | divergences.Divergence = "reverse_kl", *, form: str = "tail", **options: float | str
) -> DivergencePiece:
    """A divergence over the scored support, in one of the forms of `opd.maths.divergences`.

    The name gives the direction: `reverse_kl` = KL(student||teacher). On a full support every form is exact.
    """
    if form not in divergences.FORMS:
        raise ConfigError(
            f"There is no form {form!r}.{nearest(form, divergences.FORMS)} Known: {', '.join(divergences.FORMS)}."
        )
    function = divergences.named(name, **options)

    def signal(tokens: Tokens) -> Tensor:
        student, teacher = support_of(tokens)
        if tokens.support_mask is None:  # the whole vocabulary: every form is the exact divergence
            return function(student, teacher)
        return divergences.on_support(function, student, teacher, form, tokens.support_mask)

    return DivergencePiece(signal, IMITATES, divergence=function, shift_invariant=form == "renormalised")


def jsd_and_limits(beta: float, *, most: float | None = None) -> DivergencePiece:
    """The generalised JSD, and where it would vanish its limit divided by beta or 1 - beta.

    beta = 0 is KL(q||p), beta = 1 is KL(p||q) (GKD, arXiv 2306.13649). `most` bounds what a token adds
    (`divergences.clipped`).
    """
    limit = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta)
    if limit is None:
        divergences.check_beta(beta)  # not by a trial: `opd check` builds methods without torch
    function = partial(divergences.generalised_jsd, beta=beta) if limit is None else divergences.named(limit)
    return divergence(function if most is None else divergences.clipped(function, most))


def nll() -> Signal:
    """-log p(y_t): supervised fine-tuning on the responses of the source."""

    def signal(tokens: Tokens) -> Tensor:
        return -tokens.student_logp

    return needing(signal)


def credit(tokens: Tokens) -> Tensor:
    """The advantage that phase A computed, e.g. from rewards, [N]."""
    return tokens.advantage.detach()


def _log_ratio(tokens: Tokens) -> Tensor:
    """sg[log q(y_t) - log p(y_t)], [N]: the one-sample estimate of -KL(p||q) at this position.

    Its own gradient would have expectation zero (arXiv 2605.11182 Fig. 12), hence the sg.
    """
    return (tokens.teacher_logp - tokens.student_logp).detach()


log_ratio = needing(_log_ratio, Trait.MINIMISES_DIVERGENCE)


def policy_gradient(
    advantage: Advantage = credit,
    *,
    importance: bool = False,
    clip: tuple[float, float] | None = None,
    dual_clip: float | None = None,
) -> Signal:
    """-A log p(y_t), or -A r with the importance ratio r = p(y_t) / mu(y_t), optionally clipped as in PPO.

    `clip = (low, high)` clips r to [1 - low, 1 + high] where that lowers A r (arXiv 1707.06347 eq. 7; two bounds: DAPO,
    arXiv 2503.14476) and implies `importance`. On policy, with one update per batch, r = 1 and all three have the same
    gradient. `dual_clip` = c bounds the loss of a token with A < 0 by -c A, where r > c (arXiv 1912.09729 eq. 5; 3 in
    verl): such a token then has no gradient. Raises ConfigError for a negative distance, and unless c > 1 with `clip`.
    """
    if clip is not None and not (clip[0] >= 0 and clip[1] >= 0):
        raise ConfigError(f"clip is (low, high), two distances from 1 of at least 0; got {clip}.")
    if dual_clip is not None and (clip is None or not 1.0 < dual_clip < float("inf")):
        raise ConfigError(
            f"dual_clip bounds a clipped ratio and must be above 1 and finite; got dual_clip {dual_clip} with clip "
            f"{clip}. verl has 3; leave it out for no bound."
        )

    def signal(tokens: Tokens) -> Tensor:
        a = advantage(tokens).detach()
        if clip is None and not importance:
            return -a * tokens.student_logp
        ratio = (tokens.student_logp - tokens.sampler_logp).clamp(max=LARGEST_LOG_RATIO).exp()
        if clip is None:
            return -a * ratio
        gain = torch.minimum(a * ratio, a * ratio.clamp(1.0 - clip[0], 1.0 + clip[1]))
        if dual_clip is not None:
            gain = torch.where(a < 0, torch.maximum(gain, dual_clip * a), gain)
        return -gain

    reads = [Reads.SAMPLER_LOGP] if importance or clip is not None else []
    return Piece(signal, needing(signal, Trait.POLICY_GRADIENT, *reads).needs | needs_of(advantage))


@cache
def sampled_reverse_kl() -> Signal:
    """-sg[log q(y_t) - log p(y_t)] log p(y_t): plain on-policy distillation."""
    return policy_gradient(log_ratio)


def support_policy_gradient(
    weights: Literal["student", "teacher", "none"] = "student", *, normalised: bool = True
) -> Signal:
    """sum_S sg[w(v) (log p(v) - log q(v))] p(v)/sg[p(v)], [N, K] -> [N]: the released code of arXiv 2604.13016.

    w is p, q or 1 (`weights`), divided by its sum over S if `normalised`. The gradient is sum_S w l (1[v = j] - p_j).
    With student weights it is the gradient of the stop-gradient form, divided by P_S if normalised. Unlike the paper's
    eq. 5, `divergence("reverse_kl", form="renormalised")`, it also corrects the mass of the support, by
    (log P_S/Q_S + D) grad log P_S with D the renormalised divergence. An empty support gives 0.
    """

    def signal(tokens: Tokens) -> Tensor:
        """sum_S w (log p - log q), with the gradient through the last factor, which is 1: [N]."""
        s, t = support_of(tokens)
        exists = torch.ones_like(s, dtype=torch.bool) if tokens.support_mask is None else tokens.support_mask
        s, t = s.masked_fill(~exists, 0.0), t.masked_fill(~exists, 0.0)
        log_w = {"student": s.detach(), "teacher": t, "none": torch.zeros_like(t)}[weights]
        log_w = log_w.masked_fill(~exists, -torch.inf)
        w = log_w.softmax(-1).nan_to_num(0.0) if normalised else log_w.exp()  # an empty support has no weight
        return (w * (s.detach() - t) * (s - s.detach()).exp()).sum(-1)

    return Piece(signal, IMITATES)


def weighed_log_ratio(weights: Literal["teacher", "student"]) -> Signal:
    """The released teacher-context losses of arXiv 2605.09725 (BRTS), [N, K], [N, K] -> [N].

        teacher   sum_S q/Q_S (log q - log p)         gradient -sum_S q/Q_S grad log p
        student   sum_S sg[p/P_S] (log p - log q)     gradient grad log P_S

    The first is KL(q/Q_S || p) but for a constant: its minimum is the teacher cut off outside S, not the teacher. The
    second has a gradient in which no q occurs: whatever the teacher says, it moves mass out of S. An empty support
    gives 0.
    """

    def signal(tokens: Tokens) -> Tensor:
        s, t = support_of(tokens)
        exists = torch.ones_like(s, dtype=torch.bool) if tokens.support_mask is None else tokens.support_mask
        s, t = s.masked_fill(~exists, 0.0), t.masked_fill(~exists, 0.0)
        log_w = (t if weights == "teacher" else s.detach()).masked_fill(~exists, -torch.inf)
        w = log_w.softmax(-1).nan_to_num(0.0)
        return (w * (t - s if weights == "teacher" else s - t)).sum(-1)

    return Piece(signal, IMITATES if weights == "teacher" else Needs())


def reverse_kl_with_sampled_tail(ratio_bounds: tuple[float, float] | None = None) -> Signal:
    """sum_S p l + 1[y not in S] s p(y)/sg[p(y)] sg[l(y)], [N, K + 1] -> [N]: EMA-PG in arXiv 2603.25562 App. G.3.

    s = sg[p(y)/mu(y)], clipped to `ratio_bounds` = (low, high) if given: (1, 1) sets s = 1.
    The support is `with_sampled`: its last column is the sampled token, and exists where S does not list it.

    While the bounds do not bind, the mean over y ~ mu is KL(p||q) on S and on the tokens outside S that truncation
    kept: the value is unbiased. The gradient is biased: the head is differentiated in full, and its +1 has no
    counterpart in the tail. Its mean is the gradient of KL(p||q) plus grad P_S, which pushes mass out of S as in `raw`.
    Raises ConfigError for invalid bounds, and on the whole vocabulary, which has no tokens outside S.
    """
    if ratio_bounds is not None and not 0 <= ratio_bounds[0] <= ratio_bounds[1] < float("inf"):
        raise ConfigError(
            f"ratio_bounds of an importance ratio are (low, high) with 0 <= low <= high; got {ratio_bounds}."
        )

    def signal(tokens: Tokens) -> Tensor:
        """The head on all columns but the last, and the tail on the last: [N]."""
        s, t = support_of(tokens)
        if tokens.support_mask is None:
            raise ConfigError(
                "The sampled token represents the tokens outside the support, but the support is the whole vocabulary. "
                "Give the method support=top_k(k, with_sampled=True), or the signal divergence('reverse_kl')."
            )
        exists, outside = tokens.support_mask[:, :-1], tokens.support_mask[:, -1]
        head = divergences.on_support("reverse_kl", s[:, :-1], t[:, :-1], "raw", exists)
        log_p, log_q = s[:, -1].masked_fill(~outside, 0.0), t[:, -1].masked_fill(~outside, 0.0)
        log_ratio_to_sampler = (log_p - tokens.sampler_logp.masked_fill(~outside, 0.0)).detach()
        ratio = log_ratio_to_sampler.clamp(max=LARGEST_LOG_RATIO).exp()
        if ratio_bounds is not None:
            ratio = ratio.clamp(*ratio_bounds)
        one = (log_p - log_p.detach()).exp()  # with the gradient of log p
        return head + (ratio * one * (log_p - log_q).detach()).masked_fill(~outside, 0.0)

    needs = (Trait.POLICY_GRADIENT, Reads.SAMPLER_LOGP, Trait.SAMPLED_TOKEN_LAST, Trait.MINIMISES_DIVERGENCE)
    return needing(signal, *needs)


def by_rank(matched: str | divergences.Divergence | None = None) -> Signal:
    """sum_i |p_(i) - q_(i)|, both in falling order, [N, V], [N, V'] -> [N]: tokens are not matched by identity.

    Universal logit distillation (arXiv 2402.12030): the Wasserstein distance of two distributions, with all tokens
    equally far from each other. The shorter one is padded with zeros. Differences within rounding count as 0: where the
    student equals the teacher, their signs would be noise.

    With `matched`, tokens of both vocabularies are compared by that divergence, without renormalising, and only the
    others by rank: the hybrid of TRL's GOLD. The weights are the share of the teacher's tokens that the student has,
    and 1 minus that share. The support is `supports.units("product")`.
    """
    function = None if matched is None else divergences.named(matched)

    def signal(tokens: Tokens) -> Tensor:
        s, t = support_of(tokens)
        if function is None:
            return _ranked_distance(s.exp(), t.exp())
        if tokens.shared is None:
            raise ConfigError(
                "`matched` compares the tokens of two vocabularies, but this support has one vocabulary. Give the "
                "method support=units('product')."
            )
        k = tokens.shared
        share = k / t.shape[-1]
        return share * function(s[:, :k], t[:, :k]) + (1 - share) * _ranked_distance(s[:, k:].exp(), t[:, k:].exp())

    return needing(signal)


def _ranked_distance(p: Tensor, q: Tensor) -> Tensor:
    """sum_i |p_(i) - q_(i)|, [N, V], [N, V'] -> [N]."""
    p, q = (part.sort(-1, descending=True).values for part in (p, q))
    k = min(p.shape[-1], q.shape[-1])
    gap = (p[:, :k] - q[:, :k]).abs()
    gap = gap.masked_fill(gap <= RANK_ROUNDING * torch.maximum(p[:, :k], q[:, :k]), 0.0)
    return gap.sum(-1) + p[:, k:].sum(-1) + q[:, k:].sum(-1)


def add(*signals: Signal) -> Signal:
    """The sum of several signals."""

    def signal(tokens: Tokens) -> Tensor:
        return torch.stack([one(tokens) for one in signals]).sum(0)

    return Piece(signal, needs_of(*signals))


def scale(factor: float, signal: Signal) -> Signal:
    """`factor` times a signal."""

    def scaled(tokens: Tokens) -> Tensor:
        return factor * signal(tokens)

    needs = needs_of(signal)
    return Piece(scaled, needs.turned() if factor < 0 else needs)


def switch(predicate: Callable[[Tokens], Tensor], yes: Signal, no: Signal) -> Signal:
    """`yes` at tokens where `predicate` [N] bool holds, `no` elsewhere; only the chosen one has a gradient there."""

    def signal(tokens: Tokens) -> Tensor:
        return torch.where(predicate(tokens), yes(tokens), no(tokens))

    return Piece(signal, needs_of(yes, no))
