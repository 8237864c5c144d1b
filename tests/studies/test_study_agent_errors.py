"""The made-up world of the study of agents' mistakes: exact success, what is trained, and the controls' weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from opd.methods.sod import sod
from opd.pieces import turns
from opd_studies.claims import agent_errors as study
from opd_studies.lab.lab import Lab
from opd_studies.worlds import tool_chains as chains
from opd_studies.worlds.methods import OtherTurnWeights, sod_with
from opd_studies.worlds.tool_chains import CALL, LOST, STEPS, TASKS, TOKENS, TURNS


def made(carries: bool = False, seed: int = 0) -> tuple[chains.World, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    given = chains.world(generator)
    return given, chains.beginner(given, carries, generator)


@pytest.mark.parametrize("carries", [True, False])
def test_success_equals_the_sum_over_all_courses(carries: bool):
    """Of every order of right and wrong calls, the product of its probabilities."""
    given, z = made(carries)
    logp = chains.whole(z).log_softmax(-1).double()
    whole = clean = 0.0
    for x in range(TASKS):

        def right(step: int, mistakes: int, x: int = x) -> float:
            place = min(mistakes, len(LOST) - 1)
            return math.exp(sum(float(logp[x, step, place, i, given.right[x, step, i]]) for i in range(CALL)))

        for course in itertools.product([True, False], repeat=TURNS):
            p, step, mistakes = 1.0, 0, 0
            for good in course:
                if step == STEPS:  # ended: the rest of the course counts once
                    p *= float(good)
                    continue
                p *= right(step, mistakes) if good else 1.0 - right(step, mistakes)
                step, mistakes = step + good, mistakes + (not good)
            whole += p * (step == STEPS) / TASKS
            clean += p * (step == STEPS and mistakes == 0) / TASKS
    got = chains.success(z, given)
    assert got["all"] == pytest.approx(whole, rel=1e-5)
    assert got["without"] == pytest.approx(clean, rel=1e-5)


def test_teacher_is_lost_after_mistakes_alone():
    given, _ = made()
    right = given.right[:, :, None].expand(TASKS, STEPS, len(LOST), CALL)
    wrong = (given.teacher.argmax(-1) != right).float().mean((0, 1, 3))
    assert wrong.tolist() == pytest.approx(list(LOST), abs=0.12)
    assert wrong[0] == 0.0


def test_batch_trains_the_agents_tokens_until_the_end():
    given, z = made()
    batch, _ = chains.written(z, given, torch.Generator().manual_seed(1))
    answers = batch.response_ids[:, CALL :: CALL + 1]
    assert not bool(batch.mask[:, CALL :: CALL + 1].any())
    for row in range(len(answers)):
        done = answers[row].cumsum(0)
        own = [bool(batch.mask[row, t * (CALL + 1)]) for t in range(TURNS)]
        assert own == [t == 0 or int(done[t - 1]) < STEPS for t in range(TURNS)]
        assert float(batch.reward[row]) == float(int(answers[row][torch.tensor(own)].sum()) == STEPS)
        first = next((t for t in range(TURNS) if not answers[row, t]), TURNS)
        after = chains.turns_after_a_mistake(batch)[row]
        assert after.tolist() == [bool(batch.mask[row, i]) and i // (CALL + 1) > first for i in range(TOKENS)]


@pytest.mark.parametrize("kind", ["even", "shuffled", "level"])
def test_controls_keep_the_weights_of_sod_in_part(kind):
    given, z = made()
    batch, _ = chains.written(z, given, torch.Generator().manual_seed(1))
    apart = turns.divergences(batch)
    plain, other = turns.TurnWeights("first", 1e-6, 0.2).of(apart), OtherTurnWeights(kind, 0.2).of(apart)
    known = ~plain.isnan()
    assert torch.equal(known, ~other.isnan())
    if kind == "even":
        assert bool((other[known] == 1.0).all())
    elif kind == "level":
        torch.testing.assert_close(other[known], plain[known].mean().expand(int(known.sum())))
    else:
        assert not torch.equal(other[known], plain[known])
        for row, (one, moved) in enumerate(zip(plain, other, strict=True)):
            assert sorted(one[known[row]].tolist()) == sorted(moved[known[row]].tolist())


def test_train_is_deterministic_and_shares_world():
    one, again = (chains.train(sod, True, 3, 0.1, steps=3, every=2) for _ in range(2))
    other = chains.train(lambda: sod_with("even"), True, 3, 0.1, steps=3, every=2)
    assert one == again
    assert list(one.exams) == [0, 2, 3]
    assert one.exams[0] == other.exams[0]
    assert one.exams[3] != other.exams[3]


def test_agent_errors_study_runs_at_reduced_size(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "TUNING_SEEDS", (1000,))
    numbers = study.measure(
        Lab(folder=tmp_path, workers=1), study.Size(seeds=(0, 1, 2), steps=2, every=1, rates=(0.1,))
    )
    assert list(numbers.success) == ["A", "B"]
    assert len(study.judge(numbers)) == 6
