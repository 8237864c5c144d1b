"""The tree of several responses to one prompt: its nodes, the tokens that are likely there, and a choice of nodes.

A node is a prompt with the first tokens of a response, the root none of them. Each token of a response was drawn at a
node; response and token are a visit of it. arXiv 2605.10889 chooses nodes in windows of depth that double in width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from opd.evaluation.compare import whole
from opd.models.head import chunks, tempered
from opd.plugins import np
from opd.types import Prompt, Rollout, Teacher

NodeKey: TypeAlias = tuple[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node and the tokens that are compared at it, with log-probs over the whole vocabulary."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    prefix: tuple[int, ...]  # the response's tokens before the node
    ids: Tensor  # [S] int64, rising
    student_logp: Tensor  # [S] float64
    teacher_logp: Mapping[str, Tensor]  # by teacher and context, [S] float64

    @property
    def key(self) -> NodeKey:
        """The node's identity: its prompt's id, and its prefix."""
        return self.prompt.id, self.prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """A token of a response, drawn at a node. `weight`: its share in a mean over the prompt's visits."""

    node: Node
    right: bool  # the response's reward is 1
    window: int  # of the node's depth
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """Responses to one prompt, and for each of their tokens the number of the node at which it was drawn."""

    rollouts: tuple[Rollout, ...]
    nodes: tuple[tuple[int, ...], ...]  # by response and token; the root is 0
    first: tuple[tuple[int, int], ...]  # by node: the first response and token that visit it


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A model that scores the responses of a tree, and the prompt that it reads before them."""

    teacher: Teacher
    context: Prompt


def window_of(depth: int) -> int:
    """The number of the window of a depth: of 0; of 1; of 2 and 3; of 4 to 7; and so on."""
    return depth.bit_length()


def depths_of(window: int) -> tuple[int, int]:
    """The first and the last depth of a window."""
    return (2 ** (window - 1), 2**window - 1) if window else (0, 0)


def tree_of(rollouts: Sequence[Rollout]) -> Tree:
    """The tree of responses to one prompt."""
    number: dict[tuple[int, int], int] = {}  # by parent (-1 of the root) and token
    first: list[tuple[int, int]] = []
    nodes: list[tuple[int, ...]] = []
    for i, rollout in enumerate(rollouts):
        parent, before, own = -1, -1, list[int]()
        for t, token in enumerate(rollout.response_ids.tolist()):
            parent = number.setdefault((parent, before), len(first))
            if parent == len(first):
                first.append((i, t))
            own.append(parent)
            before = token
        nodes.append(tuple(own))
    return Tree(rollouts=tuple(rollouts), nodes=tuple(nodes), first=tuple(first))


@torch.no_grad()
def likely_tokens(
    tree: Tree, student: Reader, teachers: Mapping[str, Reader], *, tau: float, temperature: float
) -> dict[int, Node]:
    """The nodes with at least two tokens whose probability is above `tau` for the student or for a teacher, by number.

    These tokens are the node's. `temperature` divides the logits of all models. Every model reads each different
    response once; a chunk of all models' log-probs is in memory at a time.
    """
    rows = sorted({i for i, _ in tree.first})
    rollouts = [tree.rollouts[i] for i in rows]
    place = {i: k for k, i in enumerate(rows)}
    readers = [student, *teachers.values()]
    states: list[Tensor] = []
    for reader in readers:
        scores = reader.teacher.score(rollouts, [reader.context] * len(rollouts), whole(temperature))
        hidden = [score.teacher_hidden for score in scores]
        states.append(torch.stack([_state(hidden[place[i]], t) for i, t in tree.first]))
    heads = [reader.teacher.head() for reader in readers]
    found: dict[int, Node] = {}
    for part in chunks(len(tree.first), len(readers) * heads[0].vocabulary, states[0].device):
        logp = torch.stack(
            [
                tempered(head.logits(hidden[part]), temperature).log_softmax(-1)
                for head, hidden in zip(heads, states, strict=True)
            ]
        )  # [1 + M, n, V]
        likely = (logp > math.log(tau)).any(0)
        for row in (likely.sum(-1) >= 2).nonzero()[:, 0].tolist():
            number = part.start + row
            ids = likely[row].nonzero()[:, 0]
            values = logp[:, row, ids].double().cpu()
            i, t = tree.first[number]
            rollout = tree.rollouts[i]
            found[number] = Node(
                prompt=rollout.prompt,
                prompt_ids=rollout.prompt_ids,
                prefix=tuple(rollout.response_ids[:t].tolist()),
                ids=ids.cpu(),
                student_logp=values[0],
                teacher_logp=dict(zip(teachers, values[1:], strict=True)),
            )
    return found


def _state(hidden: Tensor | None, t: int) -> Tensor:
    assert hidden is not None, "a request for the whole distribution returns hidden states"
    return hidden[t]


def chosen_visits(tree: Tree, nodes: Mapping[int, Node], each: int, seed: tuple[int, ...]) -> list[Visit]:
    """At most `each` visits of `nodes` by right responses, and as many by wrong ones, drawn with `seed`.

    Windows take turns, in random order, so that each has equally many where it has enough; within one every visit is
    equally likely, and none is drawn twice. The weights of the visits of one outcome are equal, and sum to the share of
    responses with that outcome: a weighted mean estimates the mean over all responses, with equal weight to windows.
    """
    rng = np.random.default_rng(seed)
    chosen: list[Visit] = []
    for right in (True, False):
        of_outcome = [i for i, rollout in enumerate(tree.rollouts) if (rollout.reward == 1.0) is right]
        windows: dict[int, list[int]] = {}  # numbers of the nodes, once per visit
        for i in of_outcome:
            for t, number in enumerate(tree.nodes[i]):
                if number in nodes:
                    windows.setdefault(window_of(t), []).append(number)
        drawn: list[tuple[int, int]] = []
        while windows and len(drawn) < each:
            for window in rng.permutation(sorted(windows)).tolist()[: each - len(drawn)]:
                left = windows[window]
                drawn.append((window, left.pop(int(rng.integers(len(left))))))
                if not left:
                    del windows[window]
        share = len(of_outcome) / len(tree.rollouts)
        chosen += [
            Visit(node=nodes[number], right=right, window=window, weight=share / len(drawn)) for window, number in drawn
        ]
    return chosen
