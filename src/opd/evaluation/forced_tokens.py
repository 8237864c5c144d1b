"""The mean reward after each likely token of a node: the token is forced, and the student writes the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd.errors import ConfigError
from opd.evaluation.response_tree import Node
from opd.messages import text_after
from opd.models.language_model import LanguageModel
from opd.rewards.base import rewarded
from opd.samplers.hf import TransformersSampler
from opd.types import ReservedStep, Reward, Rollout, Sampling

TOGETHER = 4096  # continuations of one call: their responses are in memory until they have rewards


@dataclass(frozen=True, slots=True)
class _Forced:
    """One token of one node: its place in the result, and the response's tokens up to it, the token included."""

    node: int
    token: int
    ids: tuple[int, ...]


def continuations(nodes: Sequence[Node], visits: int) -> int:
    """The number of continuations for `visits` of each token; a token that ends the response needs none."""
    return visits * sum(len(node.ids) for node in nodes)


def rewards_after(
    student: LanguageModel,
    nodes: Sequence[Node],
    reward: Reward,
    *,
    sampling: Sampling,
    visits: int,
    seed: int,
    done: Callable[[int], None] = lambda count: None,
) -> list[Tensor]:
    """The rewards of `visits` continuations after each token of each node, a tensor [S, visits] float64 per node.

    `sampling` is that of whole responses: prefix, token and continuation together are at most
    `sampling.max_completion_length` long. After a token that ends the response every continuation is empty. Sample i of
    all tokens of a prompt's nodes at one depth uses the same random numbers, so their noise partly cancels in a node's
    differences; samples are independent. `done` receives the number of continuations so far.

    Raises ConfigError for a reward other than 0 and 1, and the reward's errors.
    """
    found = [torch.full((len(node.ids), visits), torch.nan, dtype=torch.float64) for node in nodes]
    count = 0
    by_depth: dict[int, list[_Forced]] = {}
    for one in _forced(nodes):
        if len(one.ids) == sampling.max_completion_length or _ends(student, one.ids, sampling):
            found[one.node][one.token] = right_of(reward, [_whole(student, nodes[one.node], one.ids)])[0]
            count += visits
        else:
            by_depth.setdefault(len(one.ids), []).append(one)
    step = max(1, TOGETHER // visits)
    for length, forced in sorted(by_depth.items()):
        left = sampling.max_completion_length - length
        sampler = TransformersSampler(lm=student, sampling=replace(sampling, n=visits, max_completion_length=left))
        for start in range(0, len(forced), step):
            part = forced[start : start + step]
            written = sampler(
                [nodes[one.node].prompt for one in part],
                seed=(seed, ReservedStep.PROBE + length),
                prefixes=[one.ids for one in part],
            )
            values = torch.tensor(right_of(reward, written), dtype=torch.float64).view(len(part), visits)
            for one, row in zip(part, values, strict=True):
                found[one.node][one.token] = row
            count += visits * len(part)
            done(count)
    return found


def right_of(reward: Reward, rollouts: Sequence[Rollout]) -> list[float]:
    """The rewards. Raises ConfigError for one that is not 0 or 1, or missing."""
    values: list[float] = []
    for one in rewarded(reward, rollouts):
        if one.reward not in (0.0, 1.0):
            got = f"gave {one.reward}" if one.reward is not None else f"failed ({one.unjudged})"
            raise ConfigError(
                f"opd probe estimates the probability of a right response, and the reward {reward.name!r} {got} on "
                f"prompt {one.prompt.id}. Use a reward that is 0 or 1."
            )
        values.append(float(one.reward))
    return values


def _forced(nodes: Sequence[Node]) -> Iterator[_Forced]:
    for i, node in enumerate(nodes):
        for k, token in enumerate(node.ids.tolist()):
            yield _Forced(node=i, token=k, ids=(*node.prefix, token))


def _ends(student: LanguageModel, ids: tuple[int, ...], sampling: Sampling) -> bool:
    """Whether a response ends with these tokens: by an end token, or by a stop string."""
    if ids[-1] in student.stop_ids:
        return True
    text = student.tokenizer.decode(ids) if sampling.stop else ""
    return any(stop in text for stop in sampling.stop)


def _whole(student: LanguageModel, node: Node, ids: tuple[int, ...]) -> Rollout:
    """The response that ends with these tokens, with its text as a sampler gives it."""
    ends = student.stop_ids & student.tokenizer.added_tokens_decoder.keys()
    spoken = ids[:-1] if ids[-1] in ends else ids
    return Rollout(
        prompt=node.prompt,
        sample=0,
        prompt_ids=node.prompt_ids,
        response_ids=torch.tensor(ids),
        trained=torch.zeros(len(ids), dtype=torch.bool),
        turn=torch.zeros(len(ids), dtype=torch.long),
        finished=True,
        text=text_after(node.prompt_ids, spoken, student.tokenizer),
    )
