"""Credit: Batch -> advantage [B, T], in phase A, from numbers that need the whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from opd.errors import ConfigError
from opd.pieces.needs import Input, Need, Piece, Reads, Trait, needing, needs_of
from opd.pieces.solutions import Solutions, solved
from opd.types import Batch, Credit


@cache
def no_credit() -> Credit:
    """Zero everywhere: the signal does not look at it."""
    return needing(lambda batch: torch.zeros_like(batch.teacher_logp))


def group_reward(*, divide_by_std: bool = True, epsilon: float = 1e-4) -> Credit:
    """GRPO's advantage: the reward against its group of responses to the same prompt (arXiv 2402.03300 eq. 3).

    A = (r - mean) / (std + epsilon), one number for all tokens of a response; std has the unbiased divisor n - 1, as in
    the released implementations. `divide_by_std=False` is Dr.GRPO (arXiv 2503.20783): A = r - mean. A group of one has
    A = 0: nothing to compare with; so has one of which a response has no reward, because a judge failed.
    """

    def credit(batch: Batch) -> Tensor:
        """[B, T], the same along a response."""
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


def discounted(gamma: float) -> Credit:
    """A_t = sum_{t' >= t} gamma^(t' - t) (log q - log p)(y_t'): future rewards coupled in (arXiv 2603.25562 eq. 3).

    p is the policy that wrote the response, as recorded. gamma = 0 is the token-level estimator, with a variance of at
    most order T^2; gamma = 1 is the causal sequence-level one, of at most order T^4: the mean of sum_t A_t grad log p
    is then the gradient of -KL(p||q) between whole responses. Tokens that are not trained are skipped: they add
    nothing, and t' - t counts trained tokens. Raises ConfigError unless 0 <= gamma <= 1.
    """
    if not 0.0 <= gamma <= 1.0:
        raise ConfigError(f"The discount gamma lies between 0 (this token alone) and 1 (all that follow), got {gamma}.")

    def credit(batch: Batch) -> Tensor:
        reward = (batch.teacher_logp - batch.policy_logp).masked_fill(~batch.mask, 0.0)  # [B, T]
        advantage = torch.zeros_like(reward)
        following = torch.zeros_like(reward[:, 0])  # [B]
        for t in reversed(range(reward.shape[1])):
            following = torch.where(batch.mask[:, t], reward[:, t] + gamma * following, following)
            advantage[:, t] = following
        return advantage

    return needing(credit, Reads.TEACHER_LOGP, Reads.POLICY_LOGP, Trait.MINIMISES_DIVERGENCE)


def diverge_from_teacher(
    strength: float, found: Solutions, *, shape: Literal["jsd", "reverse_kl"] = "jsd", allow_sign_conflict: bool = False
) -> Credit:
    """-strength phi(u), u = log q(y) - log p(y): the ascent of a divergence from the teacher (arXiv 2605.11609 eq. 6).

    jsd         phi(u) = (softplus(u) - log 2) / 2: the mean of -phi(u) grad log p is the gradient of JSD(p||q); A is at
                most strength (log 2) / 2, for tokens of which the teacher thinks nothing, and about -u/2 at large u
    reverse_kl  phi(u) = u: that of KL(p||q), without a bound

    p is the policy that wrote the response, as recorded. 0 in a response without a solution (`found`), whose
    teacher has read nothing that the student has not. A method that also draws the student towards its teacher is
    refused by `opd check` unless `allow_sign_conflict` says that this is meant. Raises ConfigError for a strength below
    0, which would draw it there too.
    """
    if not 0 <= strength < math.inf:
        raise ConfigError(f"The strength of the way from the teacher is at least 0 and finite, got {strength}.")
    phis: dict[str, Callable[[Tensor], Tensor]] = {
        "jsd": lambda u: 0.5 * (softplus(u) - math.log(2.0)),
        "reverse_kl": lambda u: u,
    }
    phi = phis[shape]

    def credit(batch: Batch) -> Tensor:
        advantage = -strength * phi(batch.teacher_logp - batch.policy_logp)
        return advantage.masked_fill(~(solved(found, batch)[:, None] & batch.mask), 0.0)

    both = {Reads.TEACHER_LOGP, Reads.POLICY_LOGP}
    allowed = {Trait.ALLOWS_SIGN_CONFLICT} if allow_sign_conflict else set[Need]()
    return needing(credit, *both, Input.REWARD, Input.GROUP, Trait.MAXIMISES_DIVERGENCE, *allowed)


def add(*parts: Credit) -> Credit:
    """The sum of several credits."""

    def credit(batch: Batch) -> Tensor:
        return torch.stack([one(batch) for one in parts]).sum(0)

    return Piece(credit, needs_of(*parts))


def scale(factor: float | Callable[[Batch], float], credit: Credit) -> Credit:
    """`factor` times a credit; one that is a function of the batch, such as `gates.factor`, is at least 0."""
    needs = needs_of(credit)
    if callable(factor):
        return Piece(lambda batch: factor(batch) * credit(batch), needs)
    return Piece(lambda batch: factor * credit(batch), needs.turned() if factor < 0 else needs)
