"""The study of responses of older weights: what the sampler draws and records, and the gradients of the signals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import tiny
from support.study_numbers import staling
from support.tiny_pair import TINY

from opd.errors import ConfigError, TrainingError
from opd.types import Prompt, Record, Rollout, Sampling, Tokens
from opd_studies.claims import stale as study
from opd_studies.lab.ablation import START, TEACHER
from opd_studies.lab.lab import SORTING, Lab
from opd_studies.page.outcome import state
from opd_studies.worlds import older_weights as world

PROMPTS = [Prompt(id=i, content="ab"[i]) for i in range(2)]
SAMPLING = Sampling(max_completion_length=5)


def moved(student: Any, step: int) -> None:
    """Change the weights as an update would."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def log_probs(student: Any, rollout: Rollout) -> torch.Tensor:
    """[T, V] of the student's weights now, by the model itself."""
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids.tolist()]])
    with torch.no_grad():
        logits = student.model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1, : student.vocabulary]
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize(("lag", "older"), [(0, [0, 1, 2, 3]), (2, [0, 0, 0, 1]), (None, [0, 0, 0, 0])])
def test_sampler_writes_with_weights_of_some_updates_ago(lag: int | None, older: list[int]):
    student = tiny()
    sampler = world.older_weights(student, SAMPLING, lag=lag, records=True)
    copies: list[Any] = []
    for step, version in enumerate(older):
        copies.append(tiny())
        copies[-1].model.load_state_dict(student.model.state_dict())
        sampler.sync(step)
        for rollout in sampler(PROMPTS, seed=(0, step), record=Record(top_k=3, entropy=True)):
            assert rollout.sampler_version == version
            assert isinstance(rollout, world.RecordedRollout)
            old, new = log_probs(copies[version], rollout), log_probs(student, rollout)
            drawn = rollout.response_ids[:, None]
            assert rollout.sampler_logp is not None
            assert rollout.policy_logp is not None
            torch.testing.assert_close(rollout.recorded_logp, old, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(rollout.sampler_logp, old.gather(1, drawn)[:, 0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(rollout.policy_logp, new.gather(1, drawn)[:, 0], atol=1e-5, rtol=1e-5)
            assert rollout.student_top_ids is not None
            assert rollout.student_entropy is not None
            assert torch.equal(rollout.student_top_ids.sort(1)[0], new.topk(3)[1].sort(1)[0])
            torch.testing.assert_close(rollout.student_entropy, -(new.exp() * new).sum(1), atol=1e-5, rtol=1e-5)
        moved(student, step)


def test_sampler_refuses_negative_lag_and_a_continued_run():
    with pytest.raises(ConfigError, match="0 or more, or null for the first step's weights; got -1"):
        world.older_weights(tiny(), SAMPLING, lag=-1)
    with pytest.raises(TrainingError, match="continues at step 3, and the weights of earlier updates"):
        world.older_weights(tiny(), SAMPLING, lag=1).sync(3)


def softmax(z: list[float]) -> list[float]:
    total = math.fsum(map(math.exp, z))
    return [math.exp(value) / total for value in z]


Z, M, Q = [0.3, -1.2, 0.9, 0.1], [0.0, -0.4, 1.6, -0.5], softmax([0.5, 1.0, -1.0, 0.2])


def gradient(**options: Any) -> list[float]:
    """Of the signal at one position, with respect to the student's logits `Z`; the writer's are `M`."""
    z = torch.tensor([Z], dtype=torch.float64, requires_grad=True)
    unused = torch.zeros(1, dtype=torch.float64)
    tokens = Tokens(
        student_logp=unused,
        sampler_logp=unused,
        teacher_logp=unused,
        weight=unused,
        advantage=torch.tensor([M], dtype=torch.float64).log_softmax(-1),
        student_support_logp=z.log_softmax(-1),
        teacher_support_logp=torch.tensor([Q], dtype=torch.float64).log(),
    )
    world.recorded_reverse_kl(**options).signal(tokens).sum().backward()
    assert z.grad is not None
    return z.grad[0].tolist()


def by_hand(coefficients: list[float]) -> list[float]:
    """The gradient of sum_v c_v log p_v with respect to the logits: c_j - p_j sum_v c_v."""
    p = softmax(Z)
    return [c - p[j] * math.fsum(coefficients) for j, c in enumerate(coefficients)]


def test_recorded_signals_have_the_gradients_of_their_table():
    p, m = softmax(Z), softmax(M)
    old = [math.log(a / b) for a, b in zip(m, Q, strict=True)]
    new = [math.log(a / b) for a, b in zip(p, Q, strict=True)]
    k = math.fsum(a * b for a, b in zip(m, old, strict=True))
    weighed = [a * b for a, b in zip(m, old, strict=True)]
    assert gradient() == pytest.approx(by_hand(weighed))
    assert gradient() == pytest.approx([w - a * k for w, a in zip(weighed, p, strict=True)])
    centred = [a * (b - k) for a, b in zip(m, old, strict=True)]
    assert gradient(centred=True) == pytest.approx(centred)  # it has no term in p
    amplified = [c + (a - b) * k for c, a, b in zip(centred, m, p, strict=True)]
    assert gradient() == pytest.approx(amplified)
    assert gradient(log_ratio="computed") == pytest.approx(by_hand([a * b for a, b in zip(m, new, strict=True)]))
    capped = [min(1.25 * a, b) * c for a, b, c in zip(m, p, old, strict=True)]
    assert min(b / a for a, b in zip(m, p, strict=True)) < 1.25 < max(b / a for a, b in zip(m, p, strict=True))
    assert gradient(ratio="token", cap=1.25) == pytest.approx(by_hand(capped))
    exact = [a * b for a, b in zip(p, new, strict=True)]
    assert gradient(log_ratio="computed", ratio="token", cap=99.0) == pytest.approx(by_hand(exact))


def test_clipped_signal_stops_tokens_outside_the_clip():
    p, m = softmax(Z), softmax(M)
    kept: list[float] = []
    for a, b, q in zip(p, m, Q, strict=True):
        ratio, loss = a / b, math.log(b / q)
        stopped = (ratio > 1.2 and loss < 0) or (ratio < 0.8 and loss > 0)
        kept.append(0.0 if stopped else a * loss)
    assert 0 < kept.count(0.0) < 4
    assert gradient(ratio="clip") == pytest.approx(by_hand(kept))


def test_recorded_signals_refuse_bad_options_and_other_samplers():
    with pytest.raises(ConfigError, match=r"`clip` its distance from 1; got 0\.5 and 0\.2"):
        world.recorded_reverse_kl(cap=0.5)
    batch: Any = type("Batch", (), {"rollouts": [object()]})()
    with pytest.raises(ConfigError, match="reads the log-probs of the weights that wrote a response"):
        world.recorded_logp(batch)


@pytest.mark.parametrize(
    ("arm", "value", "failing"),
    [
        (study.CENTRED, 0.58, [9]),
        (study.EIGHTH, 0.7, [7, 8]),
        (study.CLIPPED, 0.7, [5, 6]),
        (study.BY_TOKEN, 0.7, [12]),
        (study.HALF, 0.1, [4, 6]),
    ],
)
def test_stale_judge_rejects_what_a_control_does_as_well(arm: str, value: float, failing: list[int]):
    numbers = staling.numbers(True, True, True)
    assert [state(one.checks) for one in study.judge(numbers)] == ["holds"] * 13
    numbers[study.name_of(arm, 1)] = {"sampled accuracy": [value + 0.001 * i for i in range(3)]}
    assert [i for i, one in enumerate(study.judge(numbers)) if state(one.checks) != "holds"] == failing


def test_stale_study_runs_at_reduced_size(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    kept = [(study.REVERSE, 0), (study.RECORDED, 1), (study.BY_TOKEN, 1), (study.HALF_RATE, 1), (study.FORWARD, None)]
    monkeypatch.setattr(study, "settings", lambda: {study.name_of(*one): one for one in kept})
    pair = replace(TINY, task=SORTING)
    size = study.Size(seeds=(0,), steps=2, prompts_per_step=2, prompts_of_sampled=3, rates=(1e-3,), pair=pair)
    measured = study.measure(Lab(folder=tmp_path, workers=1), size)
    assert list(measured.end) == [START, TEACHER, *study.settings()]
    assert measured.rates == dict.fromkeys(study.FAMILIES, 1e-3)
