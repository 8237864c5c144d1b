"""Node gradients against finite differences of the expected reward, autograd, the oracle; ceilings against draws."""

from __future__ import annotations

import itertools
import math

import oracle
import pytest
import torch

from opd.maths.node_gradients import ceiling, cosine, node_gradient, same_direction, symmetric_noise, teacher_values

TOKENS, DEPTH = 3, 3


@pytest.fixture
def tree() -> tuple[oracle.Tree, dict[tuple[int, ...], float]]:
    generator = torch.Generator().manual_seed(0)
    nodes = [node for d in range(DEPTH) for node in itertools.product(range(TOKENS), repeat=d)]
    leaves = list(itertools.product(range(TOKENS), repeat=DEPTH))
    logits = {node: torch.randn(TOKENS, generator=generator, dtype=torch.float64).tolist() for node in nodes}
    return logits, {leaf: float(torch.rand((), generator=generator) < 0.4) for leaf in leaves}


@pytest.mark.parametrize("node", [(), (1,), (0, 2)])
def test_ideal_gradient_equals_finite_differences(tree, node):
    logits, rewards = tree
    values = [oracle.success(logits, rewards, (*node, j)) for j in range(TOKENS)]
    probs = torch.tensor(oracle.softmax(logits[node]), dtype=torch.float64)
    got = node_gradient(probs, torch.tensor(values, dtype=torch.float64)) * oracle.reach(logits, node)
    step = 1e-5
    for j in range(TOKENS):
        ends = []
        for sign in (1, -1):
            moved = {**logits, node: [z + sign * step * (k == j) for k, z in enumerate(logits[node])]}
            ends.append(oracle.success(moved, rewards))
        assert got[j].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-9)


@pytest.mark.parametrize("form", ["reverse_kl", "forward_kl"])
def test_teacher_gradient_is_minus_that_of_divergence(form):
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(5, 7, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    first, second = (p, q) if form == "reverse_kl" else (q, p)
    (first.exp() * (first - second)).sum().backward()
    values = teacher_values(p.detach(), q)[form]
    got = node_gradient(p.detach().exp(), values)
    torch.testing.assert_close(got, -student.grad, atol=1e-12, rtol=0)
    wanted = oracle.node_gradient(p[0].exp().tolist(), values[0].tolist())
    assert got[0].tolist() == pytest.approx(wanted, abs=1e-12)


def test_teacher_values_renormalise_on_tokens():
    generator = torch.Generator().manual_seed(2)
    p, q = (torch.randn(2, 9, generator=generator, dtype=torch.float64).log_softmax(-1)).unbind()
    part = [1, 4, 6]
    got = teacher_values(p[part], q[part])
    ours, theirs = (oracle.softmax([float(x[i]) for i in part]) for x in (p, q))
    assert got["forward_kl"].tolist() == pytest.approx([b / a for a, b in zip(ours, theirs, strict=True)])
    assert got["reverse_kl"].tolist() == pytest.approx([math.log(b / a) for a, b in zip(ours, theirs, strict=True)])


def test_cosine_equals_oracle_and_is_none_without_direction():
    a, b = torch.tensor([0.3, -0.1, -0.2], dtype=torch.float64), torch.tensor([-0.5, 0.4, 0.1], dtype=torch.float64)
    assert cosine(a, b) == pytest.approx(oracle.cosine(a.tolist(), b.tolist()))
    probs = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    assert cosine(a, node_gradient(probs, torch.full((3,), 0.7, dtype=torch.float64))) is None
    assert cosine(a, node_gradient(probs, teacher_values(probs.log(), probs.log())["reverse_kl"])) is None


def test_ceiling_equals_cosine_with_truth_of_noisy_halves():
    """A long vector with noise of known size: cosine of its halves, and of their mean with the truth."""
    generator = torch.Generator().manual_seed(3)
    truth = torch.randn(200_000, generator=generator, dtype=torch.float64)
    halves = [truth + 1.5 * torch.randn(len(truth), generator=generator, dtype=torch.float64) for _ in range(2)]
    between, both = cosine(*halves), cosine(truth, (halves[0] + halves[1]) / 2)
    assert between is not None
    assert ceiling(between) == pytest.approx(both, abs=0.01)
    assert both == pytest.approx(1 / math.sqrt(1 + 1.5**2 / 2), abs=0.01)
    assert ceiling(0.0) == ceiling(-0.3) == 0.0
    assert ceiling(1.0) == 1.0


def test_same_direction_is_unbiased_at_four_visits():
    """Q of four right-or-wrong continuations: the plain cosine of all nodes is far too small, this one is not."""
    generator = torch.Generator().manual_seed(4)
    nodes, visits = 20_000, 4
    p = (torch.randn(nodes, 3, generator=generator, dtype=torch.float64)).softmax(-1)
    q = torch.rand(nodes, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(nodes, 3, generator=generator, dtype=torch.float64)
    teacher = node_gradient(p, q + 0.3 * noise)
    truth = float((node_gradient(p, q) * teacher).sum() / (node_gradient(p, q).norm() * teacher.norm()))
    drawn = (torch.rand(visits, nodes, 3, generator=generator, dtype=torch.float64) < q).double()
    first, second = (node_gradient(p, drawn[half].mean(0)) for half in (slice(0, 2), slice(2, 4)))
    measured = (first + second) / 2
    plain = float((measured * teacher).sum() / (measured.norm() * teacher.norm()))
    sums = {"product": measured * teacher, "halves": first * second, "teacher": teacher * teacher}
    got = same_direction({name: float(value.sum()) for name, value in sums.items()})
    assert plain < truth - 0.1
    assert got == pytest.approx(truth, abs=0.02)


@pytest.mark.parametrize("gone", ["halves", "teacher"])
def test_same_direction_is_none_without_length(gone):
    assert same_direction({"product": 1.0, "halves": 1.0, "teacher": 1.0, gone: 0.0}) is None


def test_symmetric_noise_has_no_alignment_on_average():
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    ideal = node_gradient(p, torch.tensor([0.9, 0.2, 0.0], dtype=torch.float64))
    found = [cosine(ideal, node_gradient(p, symmetric_noise((3,), (0, i)))) for i in range(4000)]
    assert sum(c for c in found if c is not None) / len(found) == pytest.approx(0.0, abs=0.05)
    assert symmetric_noise((3,), (0, 1)).tolist() == symmetric_noise((3,), (0, 1)).tolist()
    assert symmetric_noise((3,), (0, 1)).tolist() != symmetric_noise((3,), (0, 2)).tolist()
