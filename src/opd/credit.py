"""Credit: Batch -> advantage [B, T], in phase A, from numbers that need the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from opd.types import Batch, Credit, needing


def no_credit() -> Credit:
    """Zero everywhere: the signal does not look at it."""
    return needing(lambda batch: torch.zeros_like(batch.teacher_logp))


def group_reward(*, divide_by_std: bool = True, epsilon: float = 1e-4) -> Credit:
    """GRPO's advantage: the reward against its group of responses to the same prompt (arXiv 2402.03300 eq. 3).

    A = (r - mean) / (std + epsilon), one number for all tokens of a response; std has the unbiased divisor n - 1, as in
    the released implementations. `divide_by_std=False` is Dr.GRPO (arXiv 2503.20783): A = r - mean. A group of one has
    A = 0: nothing to compare with.
    """

    def credit(batch: Batch) -> Tensor:
        advantage = torch.zeros_like(batch.reward)
        for group in range(int(batch.group.max()) + 1):
            rows = batch.group == group
            reward = batch.reward[rows]
            centred = reward - reward.mean()
            if divide_by_std and len(reward) > 1:
                centred = centred / (reward.std() + epsilon)
            advantage[rows] = centred
        return advantage[:, None].expand(batch.mask.shape).clone()

    return needing(credit, "reward", "group")
