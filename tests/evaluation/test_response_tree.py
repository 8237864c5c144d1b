"""The tree against sets of prefixes, its likely tokens against the models' own float64 logits, its visits by count."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from support.models import policy, prompts_of, rollout_of, sampler, tiny

from opd.evaluation.response_tree import (
    Node,
    Reader,
    Tree,
    chosen_visits,
    depths_of,
    likely_tokens,
    tree_of,
    window_of,
)
from opd.models.language_model import LanguageModel
from opd.pieces.teacher_rules import external
from opd.teachers.local import local_teacher
from opd.types import Prompt, Rollout

TAU = 0.15


def responses(lm: LanguageModel, count: int = 30) -> list[Rollout]:
    written = sampler(lm, n=count, max_completion_length=5)(prompts_of("ab"), seed=(0, 0))
    return [replace(one, reward=float(i % 3 == 0)) for i, one in enumerate(written)]


def reader(lm: LanguageModel, prompt: Prompt) -> Reader:
    return Reader(teacher=local_teacher(external(), lm, lm, micro_batch_tokens=64), context=prompt)


def test_tree_has_a_node_for_each_different_prefix():
    rollouts = responses(tiny())
    tree = tree_of(rollouts)
    prefixes = [[tuple(r.response_ids[:t].tolist()) for t in range(len(r.response_ids))] for r in rollouts]
    pairs = [pair for own, ours in zip(tree.nodes, prefixes, strict=True) for pair in zip(own, ours, strict=True)]
    by_node = dict(pairs)
    assert all(by_node[number] == one for number, one in pairs)
    assert len(by_node) == len(tree.first) == len({one for ours in prefixes for one in ours})
    assert [[by_node[number] for number in own] for own in tree.nodes] == prefixes
    for number, (i, t) in enumerate(tree.first):
        assert prefixes[i][t] == by_node[number]
    assert tree.nodes[0][0] == 0


@pytest.mark.parametrize("depth", range(40))
def test_window_of_contains_its_depth(depth: int):
    first, last = depths_of(window_of(depth))
    assert first <= depth <= last
    assert window_of(first) == window_of(last) != window_of(last + 1)


def test_likely_tokens_equal_both_models_logits():
    student, teacher = tiny(seed=1, name="student"), tiny(seed=2, name="teacher", hidden=24)
    tree = tree_of(responses(student))
    prompt, context = tree.rollouts[0].prompt, Prompt(id=0, content="dcab")
    found = likely_tokens(tree, reader(student, prompt), {"other": reader(teacher, context)}, tau=TAU, temperature=0.7)
    several = 0
    for number, (i, t) in enumerate(tree.first):
        rollout = tree.rollouts[i]
        ours = (policy(student, rollout)[t] / 0.7).log_softmax(-1)
        shown = rollout_of(teacher, context, rollout.response_ids.tolist(), sampling=rollout.sampling)
        theirs = (policy(teacher, shown)[t] / 0.7).log_softmax(-1)
        ids = ((ours.exp() > TAU) | (theirs.exp() > TAU)).nonzero()[:, 0]
        assert (number in found) == (len(ids) >= 2)
        if number not in found:
            continue
        several += 1
        node = found[number]
        assert node.ids.tolist() == ids.tolist()
        assert node.key == (0, tuple(rollout.response_ids[:t].tolist()))
        torch.testing.assert_close(node.student_logp, ours[ids], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(node.teacher_logp["other"], theirs[ids], atol=1e-4, rtol=1e-4)
    assert several > 5


def tree_with(lengths: list[int], rewards: list[float]) -> tuple[Tree, dict[int, Node]]:
    """Responses that share no token but the root's, with two tokens at every node."""
    lm = tiny()
    rollouts = [
        replace(
            rollout_of(lm, prompts_of("a")[0], [2 + i % 8] + [2 + (i // 8 + t) % 8 for t in range(n - 1)]), reward=r
        )
        for i, (n, r) in enumerate(zip(lengths, rewards, strict=True))
    ]
    tree = tree_of(rollouts)
    two = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    nodes = {
        number: Node(
            prompt=rollouts[i].prompt,
            prompt_ids=rollouts[i].prompt_ids,
            prefix=tuple(rollouts[i].response_ids[:t].tolist()),
            ids=torch.tensor([2, 3]),
            student_logp=two,
            teacher_logp={},
        )
        for number, (i, t) in enumerate(tree.first)
    }
    return tree, nodes


def test_chosen_visits_balance_outcomes_and_windows():
    tree, nodes = tree_with([8] * 6, [1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    visits = chosen_visits(tree, nodes, 4, (0, 1))
    assert Counter((one.right, one.window) for one in visits) == {(r, w): 1 for r in (True, False) for w in range(4)}
    assert {one.weight for one in visits if one.right} == {1 / 6 / 4}
    assert sum(one.weight for one in visits) == pytest.approx(1.0)
    assert [one.node.key for one in visits] == [one.node.key for one in chosen_visits(tree, nodes, 4, (0, 1))]
    assert [one.node.key for one in visits] != [one.node.key for one in chosen_visits(tree, nodes, 4, (0, 2))]


def test_chosen_visits_take_each_visit_once_and_no_other_node():
    tree, nodes = tree_with([3, 3, 1], [1.0, 0.0, 0.0])
    del nodes[tree.nodes[1][2]]
    visits = chosen_visits(tree, nodes, 100, (0,))
    assert Counter((one.right, one.node.key[1]) for one in visits) == {
        (True, ()): 1,
        (True, (2,)): 1,
        (True, (2, 2)): 1,
        (False, ()): 2,
        (False, (3,)): 1,
    }
    assert sum(one.weight for one in visits) == pytest.approx(1.0)


def test_chosen_visits_are_equally_often_in_every_window():
    """Fewer visits than windows: no window is preferred."""
    tree, nodes = tree_with([8] * 4, [0.0] * 4)
    drawn = Counter(one.window for seed in range(400) for one in chosen_visits(tree, nodes, 1, (seed,)))
    assert sorted(drawn) == [0, 1, 2, 3]
    assert max(drawn.values()) - min(drawn.values()) < 60
