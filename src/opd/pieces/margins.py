"""Order margins of a prompt's responses: right ones score above wrong ones, by the teacher (arXiv 2605.03677).

The score G of a response is the mean of log q(y_t) - log p(y_t) over its trained tokens, with log p as recorded during
sampling. A response is right if its reward is at least `passes`. Groups without a right or without a wrong response
have no gap and stay as they are. A response without a reward, because its judge failed, or without a trained token
takes no part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from opd.errors import ConfigError
from opd.maths import margins
from opd.maths.margins import Gap, Side
from opd.pieces.credit import log_ratio
from opd.pieces.filters import PASS
from opd.pieces.memory import SavedAttributes
from opd.pieces.needs import Input, Need, Reads, Trait, needing
from opd.plugins import torch
from opd.types import Batch, Credit, Gather, MakeMemory, Weight

if TYPE_CHECKING:
    from torch import Tensor

SCORED: tuple[Need, ...] = (Reads.TEACHER_LOGP, Reads.POLICY_LOGP)
JUDGED: tuple[Need, ...] = (*SCORED, Input.REWARD, Input.GROUP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The responses to one prompt that have an outcome: rows of the batch, and their scores G."""

    right: tuple[int, ...]
    wrong: tuple[int, ...]
    scores: Mapping[int, float]  # by row of the batch

    @property
    def of_right(self) -> list[float]:
        return [self.scores[row] for row in self.right]

    @property
    def of_wrong(self) -> list[float]:
        return [self.scores[row] for row in self.wrong]


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """The order that is wanted: a gap of at least `delta`. Raises ConfigError for numbers without meaning."""

    delta: float = 0.4  # nats per token
    gap: Gap = "mean"
    passes: float = PASS  # the least reward of a right response

    def __post_init__(self) -> None:
        if not 0.0 <= self.delta < math.inf:
            raise ConfigError(f"`delta`, the least gap in nats per token, must be at least 0 and finite: {self.delta}.")
        if not math.isfinite(self.passes):
            raise ConfigError(f"`passes`, the least reward of a right response, must be finite, got {self.passes}.")

    def groups(self, batch: Batch) -> list[Group]:
        """The groups of the batch, in their order, also those without a right or a wrong response."""
        ratios = log_ratio(batch).masked_fill(~batch.mask, 0.0).double()
        lengths = batch.mask.sum(1)
        scores = [float(score) for score in (ratios.sum(1) / lengths.clamp(min=1)).cpu()]
        counts, groups = [int(n) for n in lengths.cpu()], [int(n) for n in batch.group.cpu()]
        right: dict[int, list[int]] = {}
        wrong: dict[int, list[int]] = {}
        for row, (group, count, rollout) in enumerate(zip(groups, counts, batch.rollouts, strict=True)):
            of_group = right.setdefault(group, []), wrong.setdefault(group, [])
            if count and rollout.reward is not None:
                of_group[rollout.reward < self.passes].append(row)
        return [
            Group(right=tuple(right[group]), wrong=tuple(wrong[group]), scores=dict(enumerate(scores)))
            for group in right
        ]

    def mixed(self, batch: Batch) -> Iterator[tuple[Group, float]]:
        """The groups with both outcomes, and their gaps."""
        for group in self.groups(batch):
            if group.right and group.wrong:
                yield group, margins.gap(group.of_right, group.of_wrong, self.gap)


def shifted(margin: Margin, side: Side = "both") -> Credit:
    """A_t = log q(y_t) - log p(y_t) + s_i with s_i so that the group's gap is at least `delta`, [B, T].

    max(0, delta - gap) is split on right and wrong responses by `side`. s_i is the same for every token of a response,
    so its G moves by s_i, and its sum over tokens by its length times s_i: needs a mean per sequence.
    """

    def credit(batch: Batch) -> Tensor:
        moved = torch.zeros(len(batch.rollouts), dtype=batch.teacher_logp.dtype)
        for group, gap in margin.mixed(batch):
            up, down = margins.shares(margins.shift(gap, margin.delta), side)
            moved[list(group.right)], moved[list(group.wrong)] = up, down
        return (log_ratio(batch) + moved.to(batch.mask.device)[:, None]).masked_fill(~batch.mask, 0.0)

    return needing(credit, *JUDGED, Trait.MINIMISES_DIVERGENCE, Trait.SHIFTS_RESPONSES)


def in_order(margin: Margin, keep: float = 0.25) -> Weight:
    """0 on responses that are left out until the group's gap is at least `delta`, 1 on the others, [B, T].

    `keep` is the least share of right responses, and of wrong ones, that stays. A response that is left out counts in
    the denominator, as an advantage of 0 does. Raises ConfigError for a share outside [0, 1].
    """
    if not 0.0 <= keep <= 1.0:
        raise ConfigError(f"`keep` is a share of a group's responses, between 0 and 1, got {keep}.")

    def weight(batch: Batch) -> Tensor:
        out = torch.ones_like(batch.teacher_logp)
        for group, _ in margin.mixed(batch):
            right, wrong = margins.left_out(group.of_right, group.of_wrong, margin.gap, margin.delta, keep)
            out[[group.right[i] for i in right] + [group.wrong[i] for i in wrong]] = 0.0
        return out

    return needing(weight, *JUDGED, Trait.LOOKS_AT_SAMPLED_TOKEN)


def near(batch: Batch, bound: float) -> Tensor:
    """|log q(y_t) - log p(y_t)| < bound, [B, T] bool."""
    return log_ratio(batch).abs() < bound


def near_teacher(bound: float) -> Weight:
    """0 on tokens with |log q(y_t) - log p(y_t)| >= `bound`, 1 on the others, [B, T].

    Such tokens are often special tokens that one of the models never writes. They count in the denominator. Raises
    ConfigError for a bound that is not positive.
    """
    if not bound > 0.0:
        raise ConfigError(f"`bound`, of |log q - log p| in nats, must be above 0, got {bound}.")

    def weight(batch: Batch) -> Tensor:
        return near(batch, bound).to(batch.teacher_logp.dtype)

    return needing(weight, *SCORED, Trait.LOOKS_AT_SAMPLED_TOKEN)


class Order(SavedAttributes):
    """The order of right and wrong responses in a step, over all processes. Saves nothing.

    margin/mixed_share     share of groups with right and wrong responses
    margin/gap             mean over these of the gap before a shift, nats per token
    margin/short_share     share of these with a gap below delta: they are shifted, or responses are left out
    margin/shifted_share   share of the step's responses that are in such a group
    margin/far_share       share of trained tokens with |log q - log p| of at least the bound
    margin/balanced_out    responses without a trained token, such as those that the balance leaves out
    margin/unjudged        responses without a reward, which take no part
    """

    def __init__(self, margin: Margin, bound: float | None) -> None:
        self.margin, self.bound = margin, bound

    def observe(self, batch: Batch, gather: Gather) -> Mapping[str, float]:
        """The metrics of a step."""
        mixed = list(self.margin.mixed(batch))
        short = [group for group, gap in mixed if gap < self.margin.delta]
        far = 0 if self.bound is None else int((~near(batch, self.bound) & batch.mask).sum())
        parts = gather(
            (
                len(self.margin.groups(batch)),
                len(mixed),
                math.fsum(gap for _, gap in mixed),
                len(short),
                sum(len(group.right) + len(group.wrong) for group in short),
                len(batch.rollouts),
                far,
                int(batch.mask.sum()),
                sum(not bool(rollout.trained.any()) for rollout in batch.rollouts),
                sum(rollout.reward is None for rollout in batch.rollouts),
            )
        )
        groups, both, gaps, lacking, moved, rows, beyond, tokens, out, unjudged = (
            math.fsum(column) for column in zip(*parts, strict=True)
        )
        found = {
            "margin/mixed_share": both / groups,
            "margin/shifted_share": moved / rows,
            "margin/far_share": beyond / max(tokens, 1.0),
            "margin/balanced_out": out,
            "margin/unjudged": unjudged,
        }
        if both:
            found |= {"margin/gap": gaps / both, "margin/short_share": lacking / both}
        return found


def ordered(margin: Margin, bound: float | None) -> MakeMemory:
    """A maker of `Order`; a `bound` of None stands for no bound."""
    return needing(partial(Order, margin, bound), *JUDGED)
