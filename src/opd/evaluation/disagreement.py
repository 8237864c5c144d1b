"""How much the privileged contexts of one prompt disagree about the next token: the loss that no student can remove.

A student that reads the prompt alone and minimises E_I KL(p || p_I) over contexts I converges to the normalised
geometric mean of the teachers p_I. The loss -log Z remains, Z = sum_y exp(E_I log p_I(y)) (arXiv 2605.11182 eq. 10-11).
It is 0 if all contexts agree (a shared rule) and large if each differs (the answer of an instance).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.errors import ConfigError
from opd.evaluation.compare import whole
from opd.models.head import Head, chunks, tempered, tiles
from opd.types import Prompt, Rollout, Teacher


def pi_disagreement(log_probs: Tensor) -> Tensor:
    """-log Z = min_p E_I KL(p || p_I) of M distributions, [M, ..., V] log-probs -> [...] nats, at least 0.

    The expectation weighs the M contexts equally. The minimum is at p = exp(E_I log p_I) / Z; for M = 1 it is 0.
    arXiv 2605.11182 eq. 10-11 gives the minimiser, and inserting it gives the value.
    """
    return -log_probs.mean(0).logsumexp(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """-log Z of every trained token of one response, over M contexts."""

    contexts: int  # M
    step: Tensor  # [N] positions in the response
    values: Tensor  # [N] nats

    @property
    def mean(self) -> float:
        """Mean in nats per token."""
        return self.values.mean().item()


@torch.no_grad()
def disagreement(
    teacher: Teacher, rollout: Rollout, contexts: Sequence[Prompt], *, temperature: float = 1.0
) -> Disagreement:
    """-log Z of the teacher at each trained token of one response, under several contexts of its prompt.

    Contexts of one prompt are e.g. several solutions of it, or the same rule in several phrasings. Raises ConfigError
    for fewer than two contexts or a response without a trained token.
    """
    if len(contexts) < 2:
        raise ConfigError(
            f"Disagreement needs several contexts of one prompt, and prompt {rollout.prompt.id} has {len(contexts)}: "
            "the result would always be 0. Give at least two."
        )
    steps = rollout.trained.nonzero()[:, 0].cpu()
    if not len(steps):
        raise ConfigError(f"The response to prompt {rollout.prompt.id} has no trained token to measure. Leave it out.")
    scores = teacher.score([rollout] * len(contexts), contexts, whole(temperature))
    hidden: list[Tensor] = []
    for score in scores:
        assert score.teacher_hidden is not None
        hidden.append(score.teacher_hidden[steps.to(score.teacher_hidden.device)])
    values = _by_tile(teacher.head(), torch.stack(hidden), temperature)
    return Disagreement(contexts=len(contexts), step=steps, values=values.cpu())


def mean_disagreement(
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    contexts: Sequence[Sequence[Prompt]],
    *,
    temperature: float = 1.0,
) -> float:
    """The mean of -log Z over all trained tokens of some responses, in nats; `contexts` are several for each response.

    Raises as `disagreement` does, and ConfigError without responses.
    """
    if not rollouts:
        raise ConfigError("A mean disagreement needs at least one response, and got none.")
    found = [
        disagreement(teacher, rollout, several, temperature=temperature)
        for rollout, several in zip(rollouts, contexts, strict=True)
    ]
    return math.fsum(math.fsum(one.values.tolist()) for one in found) / sum(len(one.values) for one in found)


def _by_tile(head: Head, hidden: Tensor, temperature: float) -> Tensor:
    """`pi_disagreement` [N] from hidden states [M, N, H], one tile of all contexts' logits at a time."""
    several, n, _ = hidden.shape
    parts: list[Tensor] = []
    for rows in chunks(n, several * head.vocabulary, hidden.device):
        logits = head.logits(hidden[:, rows])  # [M, n, V]
        for tile in tiles(logits[0]):
            parts.append(pi_disagreement(tempered(logits[:, tile], temperature).log_softmax(-1)))
    return torch.cat(parts)
