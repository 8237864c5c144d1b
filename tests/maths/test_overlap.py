"""Overlap, ranks, entropies and buckets of positions against sets and loops in plain Python."""

from __future__ import annotations

import oracle
import pytest
import torch

from opd.evaluation.buckets import MOST, Buckets
from opd.maths.metrics import Metrics
from opd.maths.overlap import entropy, overlap_advantage, overlap_mass, overlap_of_support, overlap_ratio, rank, shared
from opd.pieces import supports
from opd.pieces.supports import support_tokens

N, V = 40, 12


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(N, V, dtype=torch.float64, generator=generator) * 2
    teacher = student * 0.3 + torch.randn(N, V, dtype=torch.float64, generator=generator) * 2
    return student.log_softmax(-1), teacher.log_softmax(-1)


@pytest.mark.parametrize("k", [1, 3, V])
def test_overlap_functions_equal_oracle(pair: tuple[torch.Tensor, torch.Tensor], k: int):
    student, teacher = pair
    student_top, teacher_top = student.topk(k).indices, teacher.topk(k).indices
    in_both = shared(student_top, teacher_top)
    p, q = student.gather(1, student_top), teacher.gather(1, student_top)
    advantage = overlap_advantage(p, q, in_both)
    empty = 0
    for i in range(N):
        s, t = student[i].tolist(), teacher[i].tolist()
        both = set(oracle.top(s, k)) & set(oracle.top(t, k))
        assert overlap_ratio(in_both)[i].item() == pytest.approx(oracle.overlap_ratio(s, t, k))
        assert overlap_mass(p, in_both)[i].item() == pytest.approx(oracle.mass([s[v] for v in both]))
        assert overlap_mass(q, in_both)[i].item() == pytest.approx(oracle.mass([t[v] for v in both]))
        wanted = oracle.overlap_advantage(s, t, k)
        assert advantage[i].item() == pytest.approx(0.0 if wanted is None else wanted, abs=1e-12)
        empty += wanted is None
    assert (empty > 0) == (k < V)  # both kinds of position were there
    assert bool((advantage <= 0).all())


def test_overlap_advantage_ignores_mass_outside_overlap():
    """Why it is read beside the overlap mass: 2604.13016 App. C.2."""
    student = torch.tensor([[0.5, 0.4, 0.05, 0.05]]).log()
    teacher = torch.tensor([[0.05, 0.04, 0.9, 0.01]]).log()
    in_both = torch.tensor([[True, True]])
    assert overlap_advantage(student[:, :2], teacher[:, :2], in_both).item() == pytest.approx(0, abs=1e-7)
    assert overlap_mass(teacher[:, :2], in_both).item() == pytest.approx(0.09)


def test_entropy_equals_oracle_and_accepts_minus_infinity(pair: tuple[torch.Tensor, torch.Tensor]):
    student, _ = pair
    assert entropy(student).tolist() == pytest.approx([oracle.entropy(row.tolist()) for row in student])
    assert entropy(torch.tensor([[0.0, -torch.inf]])).item() == 0.0


def test_rank_counts_from_one_and_is_k_plus_one_outside():
    top = torch.tensor([[5, 3, 9], [5, 3, 9], [5, 3, 9]])
    assert rank(torch.tensor([5, 9, 7]), top).tolist() == [1, 3, 4]


@pytest.mark.parametrize("with_sampled", [False, True])
@pytest.mark.parametrize("by", ["intersection", "union", "symmetric_difference"])
def test_overlap_of_support_equals_oracle(pair: tuple[torch.Tensor, torch.Tensor], by: str, with_sampled: bool):
    student, teacher = pair
    k = 4
    support = supports.top_k(k, by=by, with_sampled=with_sampled)  # type: ignore[arg-type]
    _, exists = support_tokens(
        support,
        student_top=student.topk(k).indices,
        teacher_top=teacher.topk(k).indices,
        sampled=torch.arange(N)[:, None] % V,
    )
    found = overlap_of_support(support, exists)
    assert found is not None
    wanted = [oracle.overlap_ratio(s.tolist(), t.tolist(), k) for s, t in zip(student, teacher, strict=True)]
    assert found.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("support", [supports.top_k(3), supports.top_k(3, by="student"), supports.full()])
def test_overlap_of_support_is_none_when_one_model_chooses(support):
    assert overlap_of_support(support, torch.ones(2, 3, dtype=torch.bool)) is None


# --- buckets of positions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("smallest", "longest", "width", "count"),
    [(64, 16_384, 1024, 16), (64, 16_385, 2048, 9), (64, 64, 64, 1), (64, 65, 64, 2), (1, 5, 1, 5), (64, 1024, 64, 16)],
)
def test_buckets_double_width_until_sixteen_suffice(smallest: int, longest: int, width: int, count: int):
    buckets = Buckets.over(smallest, longest)
    assert (buckets.width, buckets.count) == (width, count)
    assert buckets.count <= MOST
    assert buckets.width * buckets.count >= longest


def test_add_means_puts_late_steps_in_last_bucket():
    buckets, metrics = Buckets.over(2, 6), Metrics()
    assert buckets.count == 3
    step = torch.tensor([0, 1, 1, 4, 9])  # none in the second bucket; 9 is longer than was said
    buckets.add_means(metrics, "a/b", torch.tensor([1.0, 2.0, 6.0, 5.0, 7.0]), step)
    assert metrics.reduce() == {"a/b/from_00000": 3.0, "a/b/from_00004": 6.0}


def test_add_means_is_empty_when_bucket_is_single():
    metrics = Metrics()
    Buckets.over(64, 12).add_means(metrics, "a/b", torch.ones(3), torch.arange(3))
    assert metrics.reduce() == {}
