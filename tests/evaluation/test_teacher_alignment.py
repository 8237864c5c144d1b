"""Alignments against the oracle, groups and means by hand, and the choice of a teacher."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from torch import Tensor

from opd.evaluation.response_tree import Node, NodeKey, Visit
from opd.evaluation.teacher_alignment import NOISE, SHARPER, Alignment, alignment, choice, group_of
from opd.types import Prompt

STUDENT = [0.5, 0.3, 0.15]  # of the whole vocabulary: .05 is elsewhere
REWARDS = [0.9, 0.2, 0.1]


def logs(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


def visit(
    prompt: int, depth: int, teachers: dict[str, list[float]], *, right: bool = True, weight: float = 1.0
) -> Visit:
    node = Node(
        prompt=Prompt(id=prompt, content="a"),
        prompt_ids=(0,),
        prefix=(2,) * depth,
        ids=torch.arange(3),
        student_logp=logs(STUDENT),
        teacher_logp={name: logs(values) for name, values in teachers.items()},
    )
    return Visit(node=node, right=right, window=depth.bit_length(), weight=weight)


def constant(values: list[float], n: int = 10) -> Tensor:
    """[S, n]: every continuation has the mean."""
    return torch.tensor(values, dtype=torch.float64)[:, None].expand(-1, n)


def towards(values: list[float], by: float) -> list[float]:
    """A teacher with f = `by` Q."""
    return [p * math.exp(by * q) for p, q in zip(STUDENT, values, strict=True)]


def measured(visits: list[Visit], rewards: dict[NodeKey, Tensor] | None = None) -> Alignment:
    return alignment(visits, rewards or {one.node.key: constant(REWARDS) for one in visits}, 0)


def test_alignment_equals_oracle():
    teacher = [0.2, 0.5, 0.2]
    found = measured([visit(0, 0, {"t": teacher}), visit(1, 0, {"t": teacher})])
    p, q = ([value / sum(values) for value in values] for values in (STUDENT, teacher))
    ideal = oracle.node_gradient(p, REWARDS)
    for form, values in (
        ("reverse_kl", [math.log(b / a) for a, b in zip(p, q, strict=True)]),
        ("forward_kl", [b / a for a, b in zip(p, q, strict=True)]),
    ):
        row = found.row("t", form)
        wanted = oracle.cosine(ideal, oracle.node_gradient(p, values))
        assert row.cosine["all"].mean == pytest.approx(wanted)
        assert row.together is not None
        assert row.together.mean == pytest.approx(wanted)  # every node is the same
    sharper = oracle.cosine(ideal, oracle.node_gradient(p, [math.log(a) for a in p]))
    assert found.row(SHARPER, "").cosine["all"].mean == pytest.approx(sharper)
    assert found.ceiling["all"] == pytest.approx(1.0)


def test_alignment_is_one_for_teacher_by_rewards():
    teachers = {"with": towards(REWARDS, 2.0), "against": towards(REWARDS, -2.0)}
    found = measured([visit(0, 1, teachers), visit(1, 1, teachers)])
    assert found.row("with", "reverse_kl").cosine["all"].mean == pytest.approx(1.0)
    assert found.row("against", "reverse_kl").cosine["all"].mean == pytest.approx(-1.0)
    assert found.row("against", "forward_kl").cosine["all"].mean < -0.9


def test_means_are_over_visits_by_weight_and_then_prompts():
    good, bad = towards(REWARDS, 1.0), towards(REWARDS, -1.0)
    visits = [
        visit(0, 0, {"t": good}, weight=0.75),
        visit(0, 1, {"t": bad}, weight=0.25, right=False),
        visit(1, 2, {"t": bad}, right=False),
        visit(2, 3, {"t": good}, right=False),
    ]
    row = measured(visits).row("t", "reverse_kl")
    assert row.by_prompt == pytest.approx({0: 0.5, 1: -1.0, 2: 1.0})
    assert {name: one.mean for name, one in row.cosine.items()} == pytest.approx(
        {"all": 0.5 / 3, "right": 1.0, "wrong": -1 / 3, "depth 0": 1.0, "depth 1": -1.0, "depth 2 to 3": 0.0}
    )
    assert measured(visits).visits == {"all": 4, "right": 1, "wrong": 3, "depth 0": 1, "depth 1": 1, "depth 2 to 3": 2}


def test_flat_and_silent_visits_are_left_out_and_counted():
    same = visit(0, 0, {"t": STUDENT})
    flat = visit(1, 0, {"t": [0.2, 0.5, 0.2]})
    rewards = {same.node.key: constant(REWARDS), flat.node.key: constant([0.3] * 3)}
    found = measured([same, flat], rewards)
    row = found.row("t", "reverse_kl")
    assert (found.flat, row.silent, found.visits["all"]) == (1, 1, 1)
    assert not row.cosine
    assert row.together is not None
    assert row.together.mean == pytest.approx(0.0, abs=1e-9)
    assert choice(found, "reverse_kl") is None


def drawn(count: int, visits: int, seed: int = 0) -> Alignment:
    """A good and a null teacher at nodes whose rewards are drawn."""
    generator = torch.Generator().manual_seed(seed)
    made, rewards = list[Visit](), dict[NodeKey, Tensor]()
    for prompt in range(count):
        mean = torch.rand(3, generator=generator, dtype=torch.float64)
        null = (torch.randn(3, generator=generator, dtype=torch.float64) + logs(STUDENT)).exp().tolist()
        one = visit(prompt, 0, {"good": towards(mean.tolist(), 1.0), "null": null})
        rewards[one.node.key] = (
            torch.rand(3, visits, generator=generator, dtype=torch.float64) < mean[:, None]
        ).double()
        made.append(one)
    return alignment(made, rewards, seed)


def test_ceiling_predicts_what_noise_takes_from_true_alignment():
    """The good teacher's alignment is 1 at every node: what is measured is the ceiling, and `together` is 1."""
    found = drawn(2000, 10)
    row = found.row("good", "reverse_kl")
    assert row.cosine["all"].mean < 0.95
    assert found.ceiling["all"] == pytest.approx(row.cosine["all"].mean, abs=0.03)
    assert row.together is not None
    assert row.together.low < 1.0 < row.together.high
    for name in (NOISE, "null"):
        null = found.row(name, "" if name == NOISE else "reverse_kl")
        assert null.cosine["all"].low < 0 < null.cosine["all"].high
        assert null.together is not None
        assert null.together.low < 0 < null.together.high


def test_choice_takes_good_teacher_and_refuses_null():
    best = choice(drawn(60, 40), "reverse_kl")
    assert best is not None
    assert best.best == "good"
    assert not best.tied
    assert best.others["null"].low > 0
    alone = drawn(60, 40)
    without = Alignment(
        rows=tuple(row for row in alone.rows if row.of.name != "good"),
        visits=alone.visits,
        ceiling=alone.ceiling,
        flat=alone.flat,
    )
    none = choice(without, "reverse_kl")
    assert none is not None
    assert none.best is None


def test_choice_names_tied_teachers():
    teachers = {"first": towards(REWARDS, 1.0), "second": towards(REWARDS, 3.0)}
    best = choice(measured([visit(prompt, 0, teachers) for prompt in range(5)]), "reverse_kl")
    assert best is not None
    assert len(best.tied) == 1


@pytest.mark.parametrize(("window", "name"), [(0, "depth 0"), (1, "depth 1"), (4, "depth 8 to 15")])
def test_group_of_names_depths(window: int, name: str):
    assert group_of(window) == name


def test_together_is_unbiased_where_many_nodes_look_flat():
    """Right responses are rare: ten continuations show a difference at few nodes, and those are no fair sample."""
    generator = torch.Generator().manual_seed(5)
    visits, drawn_rewards, true = list[Visit](), dict[NodeKey, Tensor](), dict[NodeKey, Tensor]()
    for prompt in range(3000):
        mean = 0.1 * torch.rand(3, generator=generator, dtype=torch.float64)
        noisy = mean + 0.03 * torch.randn(3, generator=generator, dtype=torch.float64)
        one = visit(prompt, 0, {"t": towards(noisy.tolist(), 1.0)})
        visits.append(one)
        drawn_rewards[one.node.key] = (
            torch.rand(3, 10, generator=generator, dtype=torch.float64) < mean[:, None]
        ).double()
        true[one.node.key] = constant(mean.tolist(), 2)
    got, exact = (alignment(visits, rewards, 0) for rewards in (drawn_rewards, true))
    assert got.flat > 500
    estimate, wanted = (one.row("t", "reverse_kl").together for one in (got, exact))
    assert estimate is not None
    assert wanted is not None
    assert estimate.low < wanted.mean < estimate.high
    assert estimate.high - estimate.low < 0.5
