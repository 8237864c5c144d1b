"""Presets: their new pieces against the oracle and autograd, what their self-teachers read, and what is refused."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from support.models import batch_of, prompts_of, rollout_of, said, teacher_of, tiny
from support.runs import one_stage, prepare
from torch import Tensor

import opd
from opd import methods
from opd.commands.check import check_recipe
from opd.errors import ConfigError, TrainingError
from opd.maths import divergences
from opd.pieces import contexts, credit, importance, signals, solutions
from opd.recipe.load import load_recipe
from opd.types import Batch, Prompt, Rollout, Tokens

LM = tiny()
V = 8


def logits_of(rng: random.Random, spread: float = 1.5) -> list[float]:
    return [rng.gauss(0, spread) for _ in range(V)]


# --- the forward KL with its tail -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, V - 1])
def test_forward_tail_equals_oracle_and_has_gradient_p_minus_q(k: int):
    rng = random.Random(k)
    for _ in range(50):
        student, teacher = logits_of(rng), logits_of(rng)
        ids = sorted(range(V), key=lambda v: -teacher[v])[:k]
        z = torch.tensor(student, dtype=torch.float64, requires_grad=True)
        q = torch.tensor(teacher, dtype=torch.float64).log_softmax(-1)
        value = divergences.on_support("forward_kl", z.log_softmax(-1)[ids], q[ids], "tail")
        value.backward()
        s, t = oracle.log_softmax(student), oracle.log_softmax(teacher)
        assert value.item() == pytest.approx(oracle.tail(oracle.forward_kl, [s[v] for v in ids], [t[v] for v in ids]))
        assert known(z.grad).tolist() == pytest.approx(oracle.grad_forward_kl_tail(student, teacher, ids), abs=1e-12)
        p = oracle.softmax(student)
        assert [float(known(z.grad)[v]) for v in ids] == pytest.approx([p[v] - math.exp(t[v]) for v in ids], abs=1e-12)
        assert 0.0 <= value.item() <= oracle.forward_kl(s, t) + 1e-12


def test_forward_raw_is_negative_where_support_has_too_much_mass():
    student, teacher = [3.0, 3.0, *[0.0] * 6], [2.0, 2.0, *[1.0] * 6]
    s, t = oracle.log_softmax(student)[:2], oracle.log_softmax(teacher)[:2]
    got = {
        form: divergences.on_support(
            "forward_kl", torch.tensor(s, dtype=torch.float64), torch.tensor(t, dtype=torch.float64), form
        ).item()
        for form in ("raw", "tail")
    }
    assert got["raw"] == pytest.approx(oracle.raw(oracle.forward_kl, s, t))
    assert got["raw"] < 0 < got["tail"]


def known(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


# --- a bound on each token's contribution ---------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "most"), [(0.0, 0.05), (0.5, 0.02), (1.0, 0.1), (0.3, 100.0)])
def test_clipped_divergence_equals_oracle_value_and_gradient(beta: float, most: float):
    value, slope = {
        0.0: (oracle.forward_kl, oracle.forward_kl_slope),
        1.0: (oracle.reverse_kl, oracle.reverse_kl_slope),
    }.get(beta, (jsd(beta), jsd_slope(beta)))
    function = signals.jsd_and_limits(beta, most=most).divergence
    rng = random.Random(5)
    for _ in range(20):
        student, teacher = logits_of(rng), logits_of(rng)
        z = torch.tensor(student, dtype=torch.float64, requires_grad=True)
        got = function(z.log_softmax(-1), torch.tensor(teacher, dtype=torch.float64).log_softmax(-1))
        got.backward()
        s, t = oracle.log_softmax(student), oracle.log_softmax(teacher)
        assert got.item() == pytest.approx(oracle.clipped(value, most)(s, t))
        expected = oracle.grad_on_support(oracle.clipped_slope(value, slope, most), "raw", student, teacher, range(V))
        assert known(z.grad).tolist() == pytest.approx(expected, abs=1e-12)


def jsd(beta: float) -> oracle.Divergence:
    return lambda student, teacher: oracle.generalised_jsd(student, teacher, beta)


def jsd_slope(beta: float) -> oracle.Slope:
    return lambda p, q: oracle.generalised_jsd_slope(p, q, beta)


@pytest.mark.parametrize("clip", [0.0, -1.0])
def test_opsd_refuses_bound_that_is_not_positive(clip: float):
    with pytest.raises(ConfigError, match="contribution to a divergence must be positive and finite, got"):
        methods.build("opsd", {"clip": clip})


# --- the importance weight of mopd ----------------------------------------------------------------------------------


def tokens_of(logp: Tensor, sampler: Tensor, teacher: Tensor, advantage: Tensor) -> Tokens:
    return Tokens(
        student_logp=logp,
        sampler_logp=sampler,
        teacher_logp=teacher,
        advantage=advantage,
        weight=torch.ones_like(sampler),
    )


def test_within_bounds_equals_oracle_and_is_zero_outside():
    sampler = torch.full((7,), -2.0, dtype=torch.float64)
    logp = (sampler + torch.tensor([-3.0, -1.5, -0.5, 0.0, 0.5, 1.5, 3.0])).requires_grad_()
    advantage = torch.linspace(-1.0, 1.0, 7, dtype=torch.float64)
    signal = importance.within_bounds(signals.credit, 0.3, 2.0)
    tokens = tokens_of(logp, sampler, sampler, advantage)
    value = signal(tokens)
    value.sum().backward()
    rows = [oracle.within_bounds(p, -2.0, a, 0.3, 2.0) for p, a in zip(logp.tolist(), advantage.tolist(), strict=True)]
    assert value.tolist() == pytest.approx([loss for loss, _ in rows])
    assert known(logp.grad).tolist() == pytest.approx([slope for _, slope in rows])
    assert signal.measure(tokens)["importance/outside"].tolist() == [1, 1, 0, 0, 0, 1, 1]


def test_within_bounds_is_finite_when_ratio_overflows():
    logp = torch.tensor([-1e4, -1.0, 0.0], requires_grad=True)
    tokens = tokens_of(logp, torch.tensor([0.0, -1.0, -1e4]), torch.zeros(3), torch.ones(3))
    value = importance.within_bounds(signals.credit, 0.0, 5.0)(tokens)
    value.sum().backward()
    assert value.tolist() == [0.0, 1.0, 0.0]
    assert bool(known(logp.grad).isfinite().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": -0.5}, "the factor of the task's reward beside the log-ratio"),
        ({"least_ratio": 1.5}, "must include 1, its value on policy"),
        ({"most_ratio": 0.9}, "must include 1, its value on policy"),
    ],
)
def test_mopd_refuses_options(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        methods.build("mopd", options)


def test_mopd_needs_reward_unless_its_factor_is_zero():
    assert {"reward", "group"} <= said(methods.build("mopd", {}).credit)
    assert not said(methods.build("mopd", {"reward": 0.0}).credit)


# --- the credit of top_d --------------------------------------------------------------------------------------------

TRAINED = [[True, False, True, True], [True], [False, True, True], [True, True]]


def scored(shift: Sequence[float] | None = None) -> Batch:
    """Two groups of two responses; `shift` sets the log-ratio, by row, in place of the teacher's."""
    method = methods.build("top_d", {})
    student, external = tiny(name="student"), tiny(seed=1, hidden=24, name="teacher")
    rollouts = [
        rollout_of(
            student,
            Prompt(id=i // 2, content="ab"),
            [2 + (3 * i + t) % 8 for t in range(len(trained))],
            trained=trained,
            sample=i % 2,
            policy_logp=torch.linspace(-3, -1, len(trained)),
        )
        for i, trained in enumerate(TRAINED)
    ]
    batch = batch_of(method, student, teacher_of(method, student, external), rollouts)
    if shift is None:
        return batch
    return replace(batch, teacher_logp=batch.policy_logp + torch.tensor(shift)[:, None])


@pytest.mark.parametrize("alpha", [0.1, 0.6, 1.0])
def test_proximal_equals_oracle_on_trained_tokens(alpha: float):
    batch = scored()
    got = credit.proximal(alpha)(batch)
    kept = [[t for t, one in enumerate(trained) if one] for trained in TRAINED]
    ratios = [
        [float(batch.teacher_logp[i, t] - batch.policy_logp[i, t]) for t in places] for i, places in enumerate(kept)
    ]
    expected = oracle.proximal([ratios[:2], ratios[2:]], alpha)
    for i, places in enumerate(kept):
        assert got[i, places].tolist() == pytest.approx(expected[i // 2][i % 2], abs=1e-4)
    assert bool((got[~batch.mask] == 0).all())


def test_proximal_is_zero_when_differences_are_rounding():
    assert bool((credit.proximal(0.2)(scored([0.0, 1e-6, -1e-6, 0.0])) == 0).all())
    assert bool((credit.proximal(0.2)(scored([0.0, 1e-2, -1e-2, 0.0])) != 0).any())


def test_proximal_reward_is_bounded_below():
    """A token that the teacher rules out moves its response by a finite amount."""
    assert bool(credit.proximal(0.2)(scored([-1e4, 0.0, 1.0, 1e4])).isfinite().all())


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_top_d_refuses_alpha(alpha: float):
    with pytest.raises(ConfigError, match="alpha, the teacher's share in the proximal teacher"):
        methods.build("top_d", {"alpha": alpha})


# --- what the self-teachers read ------------------------------------------------------------------------------------


def group(rewards: Sequence[float], **columns: Any) -> list[Rollout]:
    (prompt,) = prompts_of("ab", **columns)
    return [replace(rollout_of(LM, prompt, [2 + i], sample=i), reward=reward) for i, reward in enumerate(rewards)]


def test_sdpo_trains_only_responses_with_a_right_peer():
    method = methods.build("sdpo", {"template": "{privileged_context}{prompt}"})
    kept = method.filter(group([0.0, 1.0, 0.0]))
    assert [bool(one.trained.any()) for one in kept] == [True, False, True]  # the right one has no right peer
    read = method.context(kept)
    assert [one.content for one in read] == [f"{kept[1].text}ab", "ab", f"{kept[1].text}ab"]
    assert not any(bool(one.trained.any()) for one in method.filter(group([0.0, 0.0])))


def test_sdpo_reads_feedback_or_column_where_no_peer_is_right():
    advised = [replace(one, feedback=f"say {i}") for i, one in enumerate(group([0.0, 1.0]))]
    method = methods.build("sdpo", {"otherwise": "feedback", "template": "{privileged_context}{prompt}"})
    assert [one.content for one in method.context(advised)] == [f"{advised[1].text}ab", "say 1ab"]
    assert "feedback" in said(method.context, method.filter)
    method = methods.build("sdpo", {"otherwise": "privileged_context", "template": "{privileged_context}{prompt}"})
    assert [one.content for one in method.context(group([0.0, 0.0], privileged_context="c"))] == ["cab", "cab"]
    assert "feedback" not in said(method.context)


def test_first_of_takes_the_first_text_of_each_response():
    rollouts = group([0.0, 0.0, 0.0])
    found = solutions.first_of(lambda _: ["a", None, None], lambda _: ["b", "c", None])
    assert found(rollouts) == ["a", "c", None]


@pytest.mark.parametrize("name", ["sdpo", "sdft", "opsd"])
def test_self_taught_templates_show_prompt_and_context(name: str):
    assert {"prompt", "privileged_context"} == set(fields_shown(contexts.SELF_TAUGHT[name]))
    method = methods.build(name, {"otherwise": "privileged_context"} if name == "sdpo" else {})
    (read, *_) = method.context(group([0.0, 0.0], privileged_context="worked out"))
    assert "worked out" in str(read.content)
    assert str(read.content).startswith("ab\n\n")


def fields_shown(template: str) -> list[str]:
    import string

    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


def test_check_refuses_sdpo_without_reward_or_group(tmp_path: Path):
    options: dict[str, Any] = {"method": "sdpo", "options": {"k": 4}, "teacher": None}
    folder = prepare(tmp_path, one_stage(**options))
    with pytest.raises(ConfigError, match=r"'sdpo' needs several responses per prompt.*; a reward"):
        check_recipe(load_recipe(folder / "recipe.yaml"))


def test_sdpo_says_so_when_no_response_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stage = {
        "method": "sdpo",
        "options": {"k": 4, "template": "{privileged_context}{prompt}"},
        "teacher": None,
        "reward": {"name": "regex", "options": {"pattern": "never"}},
        "sampling": {"max_completion_length": 3, "n": 2},
    }
    monkeypatch.chdir(prepare(tmp_path, one_stage(**stage)))
    with pytest.raises(TrainingError, match="no response passed the method's filter"):
        opd.run("recipe.yaml", quiet=True)
    rows = map(json.loads, Path("run/distil/metrics.jsonl").read_text().splitlines())
    assert [row["context/unsolved"] for row in rows if "context/unsolved" in row] == [4.0, 4.0]


def test_context_distillation_external_equals_frozen_copy(tmp_path, monkeypatch):
    """A teacher of the student's own weights that reads the information: the same steps as of the frozen student."""
    monkeypatch.chdir(tmp_path)
    found = []
    for which in ("frozen", "external"):
        stage = {"method": "context_distillation", "options": {"template": "1{prompt}", "k": 4, "teacher": which}}
        named = "teacher" if which == "external" else None
        made = one_stage(**stage, teacher=named, steps=3, optimizer={"learning_rate": 0.01})
        made["models"] = {"teacher": made["models"]["student"], "student": made["models"]["student"]}
        prepare(tmp_path, made | {"output_dir": which})
        opd.run("recipe.yaml", quiet=True)
        rows = (tmp_path / which / "distil" / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(row)["train/loss"] for row in rows])
    assert found[0] == found[1]
    assert min(found[0]) > 0
