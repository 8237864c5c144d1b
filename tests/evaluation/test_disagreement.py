"""-log Z is the least expected reverse KL, found again by descent; through the library's own scores."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import oracle
import pytest
import torch
from support.models import double, full_logits, prompts_of, rollout_of, tiny

import opd.models.head
from opd.errors import ConfigError
from opd.evaluation.disagreement import disagreement, mean_disagreement, pi_disagreement
from opd.models.language_model import LanguageModel
from opd.models.render import render
from opd.pieces.teacher_rules import external
from opd.teachers.local import LocalTeacher, local_teacher
from opd.types import Prompt, Rollout


def random_teachers(m: int, v: int, seed: int) -> list[list[float]]:
    draw = random.Random(seed)
    return [oracle.log_softmax([draw.gauss(0, 2) for _ in range(v)]) for _ in range(m)]


@pytest.mark.parametrize(("m", "v"), [(2, 2), (3, 7), (5, 4)])
def test_pi_disagreement_is_least_expected_reverse_kl(m: int, v: int):
    teachers = random_teachers(m, v, seed=m)
    value = pi_disagreement(torch.tensor(teachers, dtype=torch.float64)).item()
    logits = torch.zeros(v, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        p = logits.log_softmax(-1)
        out = torch.stack([(p.exp() * (p - torch.tensor(q, dtype=torch.float64))).sum() for q in teachers]).mean()
        out.backward()
        return out

    optimiser.step(loss)  # type: ignore[arg-type]
    found = logits.log_softmax(-1).tolist()
    assert oracle.expected_reverse_kl(found, teachers) == pytest.approx(value, abs=1e-9)
    draw = random.Random(0)
    for _ in range(50):  # and nothing is below it
        other = oracle.log_softmax([x + draw.gauss(0, 0.5) for x in found])
        assert oracle.expected_reverse_kl(other, teachers) > value


def test_pi_disagreement_is_zero_when_contexts_agree():
    same = torch.tensor(random_teachers(1, 6, seed=1), dtype=torch.float64).expand(4, 6)
    assert pi_disagreement(same).item() == pytest.approx(0.0, abs=1e-12)
    assert pi_disagreement(same[:1]).item() == pytest.approx(0.0, abs=1e-12)
    # Two sure teachers of different tokens: half of the mass of each is lost in the geometric mean, twice over.
    p = 0.99
    sure = torch.tensor([[p, 1 - p], [1 - p, p]]).log()
    assert pi_disagreement(sure).item() == pytest.approx(-math.log(2 * math.sqrt(p * (1 - p))), rel=1e-5)


@pytest.fixture
def judge() -> LanguageModel:
    return tiny(seed=1, hidden=24, padding_rows=5)


def teacher_of(judge: LanguageModel) -> LocalTeacher:
    made = local_teacher(external(), tiny(), judge, micro_batch_tokens=64)
    assert made is not None
    return made


def wanted(judge: LanguageModel, rollout: Rollout, contexts: list[Prompt], temperature: float) -> list[float]:
    """By the models themselves in float64 and the oracle's loop at the geometric mean."""
    logs = []
    for context in contexts:
        with torch.no_grad():
            logits = full_logits(
                double(judge), render(context, judge.tokenizer), rollout.response_ids, judge.vocabulary
            )
        logs.append((logits / temperature).log_softmax(-1))
    out = []
    for t in rollout.trained.nonzero()[:, 0].tolist():
        teachers = [log[t].tolist() for log in logs]
        geometric = oracle.log_softmax([sum(column) / len(column) for column in zip(*teachers, strict=True)])
        out.append(oracle.expected_reverse_kl(geometric, teachers))
    return out


@pytest.mark.parametrize("entries", [10**6, 30])  # all at once, and in several chunks and tiles
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_disagreement_equals_oracle(
    judge: LanguageModel, entries: int, temperature: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(opd.models.head, "CHUNK_ENTRIES", entries)
    monkeypatch.setattr(opd.models.head, "TILE_ENTRIES", entries // 2)
    contexts = prompts_of("ab", "hgfe", "c")
    rollout = rollout_of(judge, Prompt(id=0, content="ab"), [3, 4, 2, 5, 6], trained=[True, False, True, True, True])
    found = disagreement(teacher_of(judge), rollout, contexts, temperature=temperature)
    assert found.contexts == 3
    assert found.step.tolist() == [0, 2, 3, 4]
    assert found.values.tolist() == pytest.approx(wanted(judge, rollout, contexts, temperature), abs=1e-5)
    assert found.mean > 0.05
    same = disagreement(teacher_of(judge), rollout, [contexts[0]] * 3, temperature=temperature)
    assert same.mean == pytest.approx(0.0, abs=1e-6)


def test_mean_disagreement_averages_over_tokens(judge: LanguageModel):
    teacher, contexts = teacher_of(judge), prompts_of("ab", "hgfe")
    rollouts = [rollout_of(judge, contexts[0], [3, 4, 2, 5, 6]), rollout_of(judge, contexts[0], [7])]
    values = [disagreement(teacher, rollout, contexts).values for rollout in rollouts]
    assert mean_disagreement(teacher, rollouts, [contexts] * 2) == pytest.approx(torch.cat(values).mean().item())


def test_disagreement_refuses_bad_contexts_and_rollouts(judge: LanguageModel):
    teacher, (prompt, other) = teacher_of(judge), prompts_of("ab", "c")
    rollout = rollout_of(judge, prompt, [3, 4])
    with pytest.raises(ConfigError, match=r"contexts of one prompt, and prompt 0 has 1:.*at least two"):
        disagreement(teacher, rollout, [prompt])
    masked = replace(rollout, trained=torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ConfigError, match=r"response to prompt 0 has no trained token"):
        disagreement(teacher, masked, [prompt, other])
    with pytest.raises(ConfigError, match=r"needs at least one response, and got none"):
        mean_disagreement(teacher, [], [])
