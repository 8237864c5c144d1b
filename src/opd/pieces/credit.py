"""Credit: Batch -> advantage [B, T], in phase A, where the whole batch is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Literal

from opd.errors import ConfigError
from opd.pieces.needs import Input, Need, Piece, Reads, Trait, needing, needs_of
from opd.pieces.solutions import Solutions, solved
from opd.plugins import torch
from opd.types import Batch, Credit

if TYPE_CHECKING:
    from torch import Tensor

# Log-ratios of two equal models differ by less, in nats: the rounding of float32 log-probs.
ROUNDING = 1e-5


@cache
def no_credit() -> Credit:
    """Zero everywhere, for a signal that does not read the advantage."""

    def credit(batch: Batch) -> Tensor:
        return torch.zeros_like(batch.teacher_logp)

    return needing(credit)


def group_reward(*, divide_by_std: bool = True, epsilon: float = 1e-4) -> Credit:
    """GRPO's advantage: the reward relative to the responses to the same prompt (arXiv 2402.03300 eq. 3).

    A = (r - mean) / (std + epsilon), the same for all tokens of a response. std has the unbiased divisor n - 1, as in
    the released implementations; epsilon is 1e-4 in TRL and 1e-6 in verl. `divide_by_std=False` is Dr.GRPO (arXiv
    2503.20783): A = r - mean. A = 0 in a group of one response, and in a group in which a response has no reward
    because a judge failed. Raises ConfigError for an epsilon that is not positive and finite.
    """
    if not 0.0 < epsilon < math.inf:
        raise ConfigError(
            f"`epsilon`, which is added to a group's standard deviation, must be positive and finite, got {epsilon}."
        )

    def credit(batch: Batch) -> Tensor:
        """[B, T], constant along a response."""
        advantage = torch.zeros_like(batch.reward)
        unjudged = torch.tensor([one.unjudged is not None for one in batch.rollouts], device=batch.group.device)
        for group in range(int(batch.group.max()) + 1):
            rows = batch.group == group
            if bool(unjudged[rows].any()):
                continue
            reward = batch.reward[rows]
            centred = reward - reward.mean()
            if divide_by_std and len(reward) > 1:
                centred = centred / (reward.std() + epsilon)
            advantage[rows] = centred
        return advantage[:, None].expand(batch.mask.shape).clone()

    return needing(credit, Input.REWARD, Input.GROUP)


def discounted(gamma: float, *, across_turns: bool = True) -> Credit:
    """A_t = sum_{t' >= t} gamma^(t' - t) (log q - log p)(y_t'): discounted future rewards (arXiv 2603.25562 eq. 3).

    log p is the log-prob recorded during sampling. gamma = 0 is the token-level estimator, with a variance of at most
    order T^2. gamma = 1 is the causal sequence-level estimator, with a variance of at most order T^4: the mean of
    sum_t A_t grad log p is the gradient of -KL(p||q) between whole responses.

    Untrained tokens, such as a tool's answer, add 0, and t' - t counts trained tokens. `across_turns` carries the sum
    over them, so that a token has credit for later turns. Without it the sum ends at the next untrained token, as in
    the released code: a token has credit for its own turn alone, and gamma = 1 no longer gives a gradient of the KL
    between whole responses. Without untrained tokens the two are equal. Raises ConfigError unless 0 <= gamma <= 1.
    """
    if not 0.0 <= gamma <= 1.0:
        raise ConfigError(f"The discount gamma lies between 0 (this token only) and 1 (all later tokens), got {gamma}.")

    def credit(batch: Batch) -> Tensor:
        reward = (batch.teacher_logp - batch.policy_logp).masked_fill(~batch.mask, 0.0)  # [B, T]
        advantage = torch.zeros_like(reward)
        following = torch.zeros_like(reward[:, 0])  # [B]
        for t in reversed(range(reward.shape[1])):
            skipped = following if across_turns else torch.zeros_like(following)
            following = torch.where(batch.mask[:, t], reward[:, t] + gamma * following, skipped)
            advantage[:, t] = following
        return advantage

    return needing(credit, Reads.TEACHER_LOGP, Reads.POLICY_LOGP, Trait.MINIMISES_DIVERGENCE)


def early(strength: float, epsilon: float = 1e-8) -> Credit:
    """w_t a_t, a_t = log q - log p, w_t = 1 + strength (1 - sum_{j < t} |a_j| / sum_j |a_j|): arXiv 2606.22600.

    Sums are over a response's trained tokens; the last one is at least `epsilon`. log p is the log-prob recorded during
    sampling. Raises ConfigError for a strength below 0 and an epsilon that is not positive.
    """
    if not (0.0 <= strength < math.inf and 0.0 < epsilon < math.inf):
        raise ConfigError(
            f"The weight of early tokens needs a gamma of at least 0 and an epsilon above 0, both finite; got "
            f"{strength} and {epsilon}. A gamma of 0 weighs all tokens alike."
        )

    def credit(batch: Batch) -> Tensor:
        ratio = log_ratio(batch).masked_fill(~batch.mask, 0.0)  # [B, T]
        size = ratio.abs()
        before = size.cumsum(1) - size
        share = before / size.sum(1, keepdim=True).clamp(min=epsilon)
        return (1.0 + strength * (1.0 - share)) * ratio

    return needing(credit, Reads.TEACHER_LOGP, Reads.POLICY_LOGP, Trait.MINIMISES_DIVERGENCE)


def proximal(alpha: float) -> Credit:
    """z-scores of R_t = r_t + mean_{t' > t} r_t', r = log(alpha q/p + 1 - alpha) >= log(1 - alpha): arXiv 2607.04751.

    log p is the log-prob recorded during sampling. The mean over a response's later trained tokens is 0 at the last
    one. z is over all trained tokens of the responses to a prompt, with the divisor n - 1. A group whose R differ by
    no more than rounding has A = 0: where student and teacher agree, z would be noise of variance 1. Raises
    ConfigError unless 0 < alpha <= 1.
    """
    if not 0.0 < alpha <= 1.0:
        raise ConfigError(
            f"alpha, the teacher's share in the proximal teacher alpha q + (1 - alpha) p, lies above 0 and at most at "
            f"1, got {alpha}. At 1 it is the teacher, and nothing bounds the log-ratio below."
        )
    own = math.log1p(-alpha) if alpha < 1.0 else -math.inf

    def credit(batch: Batch) -> Tensor:
        ratio = log_ratio(batch).masked_fill(~batch.mask, 0.0)
        reward = torch.logaddexp(ratio + math.log(alpha), torch.full_like(ratio, own)).masked_fill(~batch.mask, 0.0)
        later = reward.flip(1).cumsum(1).flip(1) - reward
        number = batch.mask.flip(1).cumsum(1).flip(1) - 1  # of the later trained tokens, at a trained one
        value = (reward + later / number.clamp(min=1)).masked_fill(~batch.mask, 0.0)
        advantage = torch.zeros_like(value)
        for group in range(int(batch.group.max()) + 1):
            tokens = (batch.group == group)[:, None] & batch.mask
            if int(tokens.sum()) > 1 and bool((deviation := value[tokens].std()) > ROUNDING):
                advantage = torch.where(tokens, (value - value[tokens].mean()) / deviation, advantage)
        return advantage

    return needing(credit, Reads.TEACHER_LOGP, Reads.POLICY_LOGP, Input.GROUP, Trait.MINIMISES_DIVERGENCE)


def log_ratio(batch: Batch) -> Tensor:
    """u = log q(y) - log p(y), [B, T]; log p is the log-prob recorded during sampling."""
    return batch.teacher_logp - batch.policy_logp


def diverge_from_teacher(
    strength: float,
    found: Solutions,
    *,
    shape: Literal["jsd", "reverse_kl"] = "jsd",
    ratio: Callable[[Batch], Tensor] = log_ratio,
    allow_sign_conflict: bool = False,
) -> Credit:
    """-strength phi(u), u = log q(y) - log p(y): ascent of a divergence from the teacher (arXiv 2605.11609 eq. 6).

    jsd         phi(u) = (softplus(u) - log 2) / 2: the mean of -phi(u) grad log p is the gradient of JSD(p||q). A is at
                most strength (log 2) / 2, as q(y) -> 0, and about -strength u / 2 at large u
    reverse_kl  phi(u) = u: the mean is the gradient of KL(p||q); A has no bound

    `ratio` gives u, e.g. `perplexity_gate.moderated`. A = 0 in a response without a solution (`found`): its teacher
    read only the student's prompt. `opd check` refuses a method that also moves the student towards its teacher, unless
    `allow_sign_conflict` is set. Raises ConfigError for a strength below 0, which would move the student towards the
    teacher.
    """
    if not 0 <= strength < math.inf:
        raise ConfigError(f"`strength` of diverge_from_teacher must be at least 0 and finite, got {strength}.")
    phis: dict[str, Callable[[Tensor], Tensor]] = {
        "jsd": lambda u: 0.5 * (torch.nn.functional.softplus(u) - math.log(2.0)),
        "reverse_kl": lambda u: u,
    }
    phi = phis[shape]

    def credit(batch: Batch) -> Tensor:
        advantage = -strength * phi(ratio(batch))
        return advantage.masked_fill(~(solved(found, batch)[:, None] & batch.mask), 0.0)

    both = {Reads.TEACHER_LOGP, Reads.POLICY_LOGP}
    allowed = {Trait.ALLOWS_SIGN_CONFLICT} if allow_sign_conflict else set[Need]()
    return needing(credit, *both, Input.REWARD, Input.GROUP, Trait.MAXIMISES_DIVERGENCE, *allowed)


def standardised(credit: Credit, bound: float) -> Credit:
    """A credit minus its mean over a response's trained tokens, by its deviation there, clamped to +-`bound`.

    The deviation has the divisor n and is at least 1e-6: the released code of arXiv 2605.11609. A response's credits
    then sum to 0 unless the bound binds, whatever their size: only differences between its tokens are left. Raises
    ConfigError for a bound that is not positive.
    """
    if not bound > 0.0:
        raise ConfigError(f"The bound of a standardised credit must be above 0, got {bound}.")

    def even(batch: Batch) -> Tensor:
        part, mask = credit(batch), batch.mask
        count = mask.sum(1, keepdim=True).clamp(min=1)
        part = part.masked_fill(~mask, 0.0)
        centred = (part - part.sum(1, keepdim=True) / count).masked_fill(~mask, 0.0)
        deviation = (centred.square().sum(1, keepdim=True) / count).sqrt().clamp(min=1e-6)
        return (centred / deviation).clamp(-bound, bound)

    return Piece(even, needs_of(credit))


def add(*parts: Credit) -> Credit:
    """The sum of several credits."""

    def credit(batch: Batch) -> Tensor:
        return torch.stack([one(batch) for one in parts]).sum(0)

    return Piece(credit, needs_of(*parts))


def scale(factor: float | Callable[[Batch], float | Tensor], credit: Credit) -> Credit:
    """`factor` times a credit.

    A factor that is a function of the batch, such as `gates.factor`, or `perplexity_gate.strengths` with a number per
    response [B, 1], must be at least 0.
    """

    def scaled(batch: Batch) -> Tensor:
        return (factor(batch) if callable(factor) else factor) * credit(batch)

    needs = needs_of(credit)
    return Piece(scaled, needs if callable(factor) or factor >= 0 else needs.turned())
