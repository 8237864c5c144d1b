"""The made-up world of the study of AntiSD: exact accuracies, the teacher's scores, and one update against autograd."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import oracle
import pytest
import torch

from opd.methods.anti_sd import anti_sd
from opd_studies.claims import anti_sd as study
from opd_studies.lab.lab import Lab
from opd_studies.worlds import waiting_world
from opd_studies.worlds.waiting_world import ANSWERS, GROUP, LONGEST, PROBLEMS, WAIT, Problems


def given(count: int, seed: int = 0) -> Problems:
    made = waiting_world.problems(count, torch.Generator().manual_seed(seed))
    return Problems(evidence=made.evidence.double(), right=made.right)


def model(shared: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    start = waiting_world.beginner(shared).double()
    return start + 0.3 * torch.rand(start.shape, generator=generator, dtype=torch.float64)


def token_logps(made: torch.Tensor, world: Problems, x: int, n: int, knows: bool = False) -> list[float]:
    """Straight from the docstring."""
    sharpness, patience = (made[0], made[1] - made[2] * n) if made.dim() == 1 else (made[0, n], made[1, n])
    answers = [float(sharpness * world.evidence[x, n, k]) for k in range(ANSWERS)]
    if knows:
        answers[int(world.right[x])] += waiting_world.KNOWLEDGE
    return oracle.log_softmax([*answers, float(patience)])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("knows", [False, True])
def test_log_probs_equal_docstring(shared: bool, knows: bool):
    made, world = model(shared), given(3)
    got = waiting_world.log_probs(made, world, knows=knows)
    for x, n in itertools.product(range(3), range(LONGEST)):
        assert got[x, n].tolist() == pytest.approx(token_logps(made, world, x, n, knows))


@pytest.mark.parametrize("shared", [False, True])
def test_examined_equals_sum_over_all_responses(shared: bool):
    made, world = model(shared), given(4)
    accuracy = length = 0.0
    for x in range(4):
        waited = 1.0
        for n in range(LONGEST):
            p = [math.exp(value) for value in token_logps(made, world, x, n)]
            accuracy += waited * p[int(world.right[x])] / 4
            length += waited / 4
            waited *= p[WAIT]
    got = waiting_world.examined(made, world)
    assert (got.accuracy, got.length) == (pytest.approx(accuracy), pytest.approx(length))


def test_log_probs_favour_right_answer_when_solution_is_known():
    made, world = waiting_world.beginner(False), given(50)
    gap = waiting_world.log_probs(made, world, knows=True) - waiting_world.log_probs(made, world)
    assert bool((gap[..., WAIT] < 0).all())
    assert bool((gap.gather(2, world.right[:, None, None].expand(-1, LONGEST, 1)) > 0).all())


def test_written_draws_by_model_and_rewards_right_answer():
    made, world = (
        waiting_world.beginner(True).requires_grad_(),
        waiting_world.problems(PROBLEMS, torch.Generator().manual_seed(1)),
    )
    generator = torch.Generator().manual_seed(2)
    rewards, lengths = [], []
    for _ in range(60):
        batch, student_logp = waiting_world.written(made, world, generator)
        assert student_logp.requires_grad
        assert len(batch.rollouts) == PROBLEMS * GROUP
        rewards += batch.reward.tolist()
        lengths += batch.mask.sum(1).tolist()
        assert [r.reward for r in batch.rollouts] == batch.reward.tolist()
    for row in range(len(batch.mask)):
        n = int(batch.mask[row].sum())
        tokens = batch.response_ids[row, :n].tolist()
        assert all(token == WAIT for token in tokens[:-1])
        assert float(batch.reward[row]) == float(tokens[-1] == int(world.right[row // GROUP]))
    exact = waiting_world.examined(made.detach(), world)
    spread = (exact.accuracy * (1 - exact.accuracy) / len(rewards)) ** 0.5
    assert sum(rewards) / len(rewards) == pytest.approx(exact.accuracy, abs=4 * spread)
    assert sum(lengths) / len(lengths) == pytest.approx(exact.length, rel=0.05)


def test_update_equals_formula_of_anti_sd():
    made = model(False).float().requires_grad_()
    world = waiting_world.problems(PROBLEMS, torch.Generator().manual_seed(4))
    batch, student_logp = waiting_world.written(made, world, torch.Generator().manual_seed(5))
    waiting_world.update(anti_sd(gate=False), batch, student_logp)
    assert made.grad is not None
    loss = torch.zeros(())
    shown = world.repeated(GROUP)
    logp = waiting_world.log_probs(fresh := made.detach().clone().requires_grad_(), shown)
    for row in range(len(batch.mask)):
        first = row // GROUP * GROUP
        advantage = oracle.group_advantage(batch.reward[first : first + GROUP].tolist())[row - first]
        n = int(batch.mask[row].sum())
        for t in range(n):
            u = float(batch.teacher_logp[row, t] - batch.policy_logp[row, t])
            weight = oracle.anti_advantage(u, advantage, 0.5) / n / len(batch.mask)
            loss = loss - weight * logp[row, t, int(batch.response_ids[row, t])]
    loss.backward()
    torch.testing.assert_close(made.grad, fresh.grad, atol=1e-6, rtol=1e-4)


def test_train_is_deterministic_and_shares_problems():
    settings = {"seed": 3, "rate": 0.1, "shared": False, "steps": 3, "every": 2}
    one, again = (waiting_world.train(study.METHODS[study.AWAY], **settings) for _ in range(2))
    other = waiting_world.train(study.METHODS[study.TOWARDS], **settings)
    assert one == again
    assert list(one.exams) == [0, 2, 3]
    assert one.exams[0] == other.exams[0]
    assert one.exams[3] != other.exams[3]


def test_first_at_counts_updates_until_level():
    assert study.first_at({0: 0.1, 10: 0.5, 20: 0.4, 30: 0.6}, 0.5) == 10.0
    assert study.first_at({0: 0.1, 10: 0.2}, 0.5) == math.inf
    course = waiting_world.Course(
        exams={}, logged=[{"gate/teacher_entropy": v, "gate/warm_entropy": 2.0} for v in range(20)]
    )
    assert study.entropy_left(course) == pytest.approx(14.5 / 2)


def test_anti_sd_study_runs_at_reduced_size(tmp_path):
    size = replace(study.SIZE, seeds=(0, 1, 2), steps=6, every=3, tried=(0.1, 0.2))
    numbers = study.measure(Lab(folder=tmp_path, workers=1), size)
    assert list(numbers.accuracy) == list(numbers.rate) == [study.A, study.TUNED, study.B]
    assert set(numbers.rate[study.TUNED].values()) <= {0.1, 0.2}
    assert len(numbers.share_of_updates(study.A, study.AWAY)) == 3
    assert len(study.judge(numbers)) == 4
