"""The study of advantages that a hint sizes: its tables and methods against plain Python."""

from __future__ import annotations

import math
from dataclasses import replace

import oracle
import pytest
import torch

from opd.method import Method
from opd.methods.visd import visd
from opd.pieces.memory import observed
from opd.types import Batch, Tokens
from opd_studies.claims import visd as study
from opd_studies.lab.lab import Lab
from opd_studies.worlds import methods, wrong_habits
from opd_studies.worlds.hinted_self import BONUS, HintedSelf
from opd_studies.worlds.wrong_habits import GROUP, LETTERS, PER_STEP, PROMPTS, Kind

KIND = Kind(tokens=5, head_start=0.3, separate=True)
OPTIONS = {"k": LETTERS, "fades": 10, "hint": "privileged_context"}
ROWS = PER_STEP * GROUP


def made(kind: Kind = KIND, wrong: float = 0.0) -> tuple[wrong_habits.World, torch.Tensor]:
    """A world whose teacher is a student with a hint, and the student's logits."""
    generator = torch.Generator().manual_seed(0)
    given = wrong_habits.world(kind, generator)
    z = wrong_habits.beginner(given, generator)
    return replace(given, teacher=HintedSelf(wrong=wrong, decay=0.9)(given, z, generator)(z)), z


def written(method: Method) -> tuple[Batch, torch.Tensor]:
    """Responses of the student, with the method's memory after its first step."""
    given, z = made()
    batch, student = wrong_habits.written(z.requires_grad_(), given, torch.Generator().manual_seed(5))
    batch = replace(batch, memory=method.make_memory())
    observed(batch, lambda value: [value])
    return batch, student


def tokens_of(method: Method) -> Tokens:
    """The tokens that its signal reads, [N] = [ROWS x KIND.tokens]."""
    batch, student = written(method)
    assert batch.teacher_support_logp is not None
    return Tokens(
        student_logp=batch.policy_logp.flatten(),
        sampler_logp=batch.policy_logp.flatten(),
        teacher_logp=batch.teacher_logp.flatten(),
        advantage=method.credit(batch).flatten(0, 1),
        weight=torch.ones(ROWS * KIND.tokens),
        student_support_logp=student.detach().flatten(0, 1),
        teacher_support_logp=batch.teacher_support_logp.flatten(0, 1),
    )


def sizes_of(method: Method) -> list[list[float]]:
    """A_t / A_i by response; 1 where A_i = 0."""
    tokens = tokens_of(method)
    direction = tokens.advantage[:, 0]
    ratio = torch.where(direction == 0.0, 1.0, -method.signal(tokens) / direction)
    return ratio.view(ROWS, KIND.tokens).tolist()


# --- tables ----------------------------------------------------------------------------------------------------------


def test_separate_table_rewards_each_token():
    given, z = made()
    assert z.shape == (PROMPTS, KIND.tokens, LETTERS)
    batch, student = wrong_habits.written(z, given, torch.Generator().manual_seed(1))
    probabilities = [[oracle.softmax(z[x, t].tolist()) for t in range(KIND.tokens)] for x in range(PROMPTS)]
    for i, rollout in enumerate(batch.rollouts):
        x, letters = rollout.prompt.id, batch.response_ids[i].tolist()
        right = [a == b for a, b in zip(letters, given.right[x].tolist(), strict=True)]
        assert rollout.reward == pytest.approx(sum(right) / KIND.tokens)
        for t, letter in enumerate(letters):
            assert math.exp(float(batch.policy_logp[i, t])) == pytest.approx(probabilities[x][t][letter], rel=1e-5)
            assert student[i, t].exp().tolist() == pytest.approx(probabilities[x][t], rel=1e-5)
    hits = [[probabilities[x][t][int(given.right[x, t])] for t in range(KIND.tokens)] for x in range(PROMPTS)]
    exam = wrong_habits.accuracy(z, given)
    assert exam["all"] == pytest.approx(math.fsum(map(math.prod, hits)) / PROMPTS, rel=1e-5)
    assert exam["tokens"] == pytest.approx(math.fsum(map(math.fsum, hits)) / PROMPTS / KIND.tokens, rel=1e-5)


@pytest.mark.parametrize("kind", [KIND, Kind(tokens=3, head_start=0.0)], ids=["separate", "prefixes"])
def test_hint_names_right_tokens_or_next_letter(kind: Kind):
    given, _ = made(kind)
    named = {}
    for wrong in (0.0, 0.3, 1.0):
        bonus = HintedSelf(wrong=wrong, decay=0.9).bonus(given, torch.Generator().manual_seed(2))
        assert int((bonus != 0).sum()) == PROMPTS * kind.tokens
        assert float(bonus.max()) == BONUS
        named[wrong] = bonus[torch.arange(PROMPTS)[:, None], given.prefixes].argmax(-1)
    assert torch.equal(named[0.0], given.right)
    assert torch.equal(named[1.0], (given.right + 1) % LETTERS)
    assert float((named[0.3] != given.right).float().mean()) == pytest.approx(0.3, abs=0.1)


def test_hinted_self_scores_moving_average_with_bonus():
    given, z = made()
    generator = torch.Generator().manual_seed(2)
    scores = HintedSelf(wrong=0.0, decay=0.75)(given, z, generator)
    one, two = z + torch.randn(z.shape, generator=generator), z + torch.randn(z.shape, generator=generator)
    for now in (z, one, two):
        got = scores(now)
    right = int(given.right[3, 1])
    mean = [
        0.75 * (0.75 * a + 0.25 * b) + 0.25 * c + BONUS * (v == right)
        for v, (a, b, c) in enumerate(zip(*(logits[3, 1].tolist() for logits in (z, one, two)), strict=True))
    ]
    assert got[3, 1].tolist() == pytest.approx(oracle.log_softmax(mean), abs=1e-5)


# --- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [{}, study.WIDE_OPTIONS], ids=["paper", "wide"])
def test_update_equals_formula_of_visd(wide: dict[str, float]):
    method = visd(**OPTIONS, **wide)
    given, z = made()
    batch, student = wrong_habits.written(z.requires_grad_(), given, torch.Generator().manual_seed(5))
    wrong_habits.update(method, replace(batch, memory=method.make_memory()), student)
    rows = z.detach().clone().double().requires_grad_()
    logp, loss = rows.log_softmax(-1), torch.zeros((), dtype=torch.float64)
    share, bound = wide.get("share", 0.5), wide.get("bound", 0.2)
    for first in range(0, ROWS, GROUP):
        advantages = oracle.group_advantage(batch.reward[first : first + GROUP].tolist())
        for i, advantage in enumerate(advantages, first):
            x = batch.rollouts[i].prompt.id
            for t, letter in enumerate(batch.response_ids[i].tolist()):
                p, q = logp[x, t].tolist(), given.teacher[x, t].tolist()
                size = oracle.sized_advantage(p, q, LETTERS, letter, advantage, share, bound)
                loss = loss - size * logp[x, t, letter] / KIND.tokens / ROWS
    loss.backward()
    assert z.grad is not None
    assert rows.grad is not None
    torch.testing.assert_close(z.grad.double(), rows.grad, atol=1e-6, rtol=1e-4)


def test_shuffled_visd_moves_sizes_within_response():
    plain, shuffled = sizes_of(visd(**OPTIONS)), sizes_of(methods.shuffled_visd(**OPTIONS))
    for one, other in zip(plain, shuffled, strict=True):
        assert sorted(one) == pytest.approx(sorted(other), abs=1e-5)
    moved = sum(one != pytest.approx(other, abs=1e-5) for one, other in zip(plain, shuffled, strict=True))
    assert moved > ROWS / 2
    assert sizes_of(methods.shuffled_visd(**OPTIONS)) == shuffled


def test_shuffled_rewards_stay_in_their_group():
    method = visd(**OPTIONS)
    batch, _ = written(method)
    plain, shuffled = (
        made.credit(batch)[:, 0, 0].split(GROUP) for made in (method, methods.with_shuffled_rewards(method))
    )
    for one, other in zip(plain, shuffled, strict=True):
        assert sorted(one.tolist()) == pytest.approx(sorted(other.tolist()), abs=1e-5)
    assert sum(not torch.allclose(one, other) for one, other in zip(plain, shuffled, strict=True)) > PER_STEP / 2


def test_measured_size_is_change_of_advantage():
    method = methods.with_measured_size(visd(**OPTIONS))
    tokens = tokens_of(method)
    measured = {name: values.tolist() for name, values in method.signal.measure(tokens).items()}
    active = (tokens.advantage[:, 0] != 0).view(ROWS, KIND.tokens).tolist()
    changes = [
        abs(ratio - 1)
        for ratios, mask in zip(sizes_of(visd(**OPTIONS)), active, strict=True)
        for ratio, counts in zip(ratios, mask, strict=True)
        if counts
    ]
    assert measured["size/change"] == pytest.approx(changes, abs=1e-6)
    assert measured["size/largest_change"] == pytest.approx([max(changes)], abs=1e-6)
    assert max(changes) == pytest.approx(0.1)  # l = .5 of a bound of .2
    clipped = sum(change > 0.1 - 1e-6 for change in changes) / len(changes)
    assert sum(measured["size/clipped_share"]) / len(changes) == pytest.approx(clipped)
    faded = replace(tokens, advantage=tokens.advantage * torch.tensor([1.0, 0.0]))
    assert method.signal.measure(faded)["size/largest_change"].tolist() == []


# --- the study -------------------------------------------------------------------------------------------------------


def test_updates_to_is_on_line_between_measurements():
    course = {0: {"all": 0.1}, 2: {"all": 0.3}, 6: {"all": 0.7}, 8: {"all": 0.6}}
    assert study.updates_to(0.5, course) == pytest.approx(4.0)
    assert study.updates_to(0.3, course) == pytest.approx(2.0)
    assert study.updates_to(0.1, course) == pytest.approx(0.0)
    assert math.isnan(study.updates_to(0.8, course))


def test_visd_study_runs_at_reduced_size(tmp_path, monkeypatch):
    small = {name: replace(one, kind=replace(one.kind, tokens=2)) for name, one in study.SETTINGS.items()}
    monkeypatch.setattr(study, "SETTINGS", small)
    size = study.Size(seeds=(0, 1, 2), tuning=(1000,), steps=12, every=6, rates=(0.2, 0.3))
    outcome = study.run(Lab(folder=tmp_path, workers=1), size)
    assert len(outcome.findings) == 8
    assert len(outcome.table) == 1 + 3 * len(study.methods(size))
    rates = {(row[0], row[1]): row[2] for row in outcome.table}
    for name, other in study.OTHER_REWARDS.items():
        assert rates["A", other] == rates["A", name]
