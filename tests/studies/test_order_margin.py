"""The made-up world of the study of order margins: exact accuracies, prefixes, and one update against autograd."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import oracle
import pytest
import torch

from opd.methods.uni_opd import uni_opd
from opd_studies.claims import order_margin as study
from opd_studies.lab.lab import Lab
from opd_studies.worlds import wrong_habits as habits
from opd_studies.worlds.wrong_habits import GROUP, LETTERS, PER_STEP, PROMPTS, Kind

KIND = Kind(tokens=3, head_start=0.8)


def made(seed: int = 0) -> tuple[habits.World, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    given = habits.world(KIND, generator)
    return given, habits.beginner(given, generator)


def test_prefixes_of_numbers_every_prefix_once():
    every = torch.tensor(list(itertools.product(range(LETTERS), repeat=3)))
    places = habits.prefixes_of(every)
    for t in range(3):
        numbers = {tuple(row[:t].tolist()): int(place[t]) for row, place in zip(every, places, strict=True)}
        assert len(set(numbers.values())) == LETTERS**t
    assert int(places.max()) == KIND.prefixes - 1
    assert not set(places[:, 1].tolist()) & set(places[:, 2].tolist())


def test_accuracy_equals_sum_over_all_responses():
    given, z = made()
    logp = z.log_softmax(-1)
    mass = 0.0
    for x in range(PROMPTS):
        for row in itertools.product(range(LETTERS), repeat=3):
            places = habits.prefixes_of(torch.tensor([row]))[0]
            p = math.exp(math.fsum(float(logp[x, places[t], row[t]]) for t in range(3)))
            mass += p * (list(row) == given.right[x].tolist()) / PROMPTS
    assert habits.accuracy(z, given)["all"] == pytest.approx(mass)


def test_teacher_is_sure_of_wrong_last_token_on_share_of_prompts():
    given, _ = made()
    assert torch.allclose(given.teacher.exp().sum(-1), torch.ones(()))
    assert int(given.habit.sum()) == habits.WRONG * PROMPTS
    last = given.teacher[torch.arange(PROMPTS), given.prefixes[:, -1]]
    assert torch.equal(last.argmax(-1) != given.right[:, -1], given.habit)
    assert last.exp().max(-1).values[given.habit].tolist() == pytest.approx([habits.HABIT] * int(given.habit.sum()))


def test_update_equals_formula_of_uni_opd():
    given, z = made()
    z.requires_grad_()
    batch, logp = habits.written(z, given, torch.Generator().manual_seed(5))
    assert len(batch.rollouts) == GROUP * PER_STEP
    habits.update(uni_opd(balance=None), replace(batch, memory=uni_opd(balance=None).make_memory()), logp)
    assert z.grad is not None
    ratios = (batch.teacher_logp - batch.policy_logp).double()
    loss = torch.zeros((), dtype=torch.float64)
    rows = z.detach().clone().double().requires_grad_()
    fresh = rows.log_softmax(-1)
    places = habits.prefixes_of(batch.response_ids)
    for first in range(0, len(batch.rollouts), GROUP):
        group = range(first, first + GROUP)
        right = [bool(batch.reward[i]) for i in group]
        shifts = oracle.order_shifts([float(ratios[i].mean()) for i in group], right, 0.4)
        for i, shift in zip(group, shifts, strict=True):
            x = batch.rollouts[i].prompt.id
            for t in range(KIND.tokens):
                taken = fresh[x, places[i, t], batch.response_ids[i, t]]
                loss = loss - (float(ratios[i, t]) + shift) * taken / KIND.tokens / len(batch.rollouts)
    loss.backward()
    assert rows.grad is not None
    torch.testing.assert_close(z.grad.double(), rows.grad, atol=1e-6, rtol=1e-4)


def test_train_is_deterministic_and_shares_world():
    settings = {"kind": KIND, "seed": 3, "rate": 0.1, "steps": 3, "every": 2}
    one, again = (habits.train(study.shifted(0.4), **settings) for _ in range(2))
    other = habits.train(study.summed(1.0), **settings)
    assert one == again
    assert list(one.exams) == [0, 2, 3]
    assert one.exams[0] == other.exams[0]
    assert one.exams[3] != other.exams[3]


def test_order_margin_study_runs_at_reduced_size(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "KINDS", {"A": KIND, "B": Kind(tokens=2, head_start=0.0)})
    size = study.Size(seeds=(0, 1, 2), steps=2, every=1, deltas=(0.4,), weights=(1.0,))
    numbers = study.measure(Lab(folder=tmp_path, workers=1), size)
    assert list(numbers.accuracy) == ["A", "B"]
    assert len(study.judge(numbers)) == 5
