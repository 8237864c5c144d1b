"""The learning rate of every update, clipping, and a run that goes on as if it had not stopped."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import prompts_of, tiny
from torch import Tensor, nn

from opd.errors import ConfigError
from opd.parallel import ALONE
from opd.pieces.contexts import same_prompt
from opd.recipe.schema import OptimizerSection
from opd.samplers.hf import TransformersSampler
from opd.stage import checkpoint, optimisation, optimisers
from opd.stage.optimisers import Optimiser, factor
from opd.types import NoTeacher, Reward, Rollout, Sampling


def section(**settings: Any) -> OptimizerSection:
    return OptimizerSection(**{"learning_rate": 0.1, **settings})


def parameters(*shape: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape or (4, 3), generator=generator)) for name in ("a", "b")}


def needs_bitsandbytes(name: str) -> None:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def assert_equal(mine: dict[str, dict[str, Tensor]], theirs: dict[str, dict[str, Tensor]]) -> None:
    assert mine.keys() == theirs.keys()
    for group, named in theirs.items():
        assert all(torch.equal(mine[group][name], tensor) for name, tensor in named.items())


def update(optimiser: Optimiser, i: int) -> float:
    """One update with a gradient of its own; returns the rate that was used."""
    generator = torch.Generator().manual_seed(100 + i)
    for parameter in optimiser.parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimiser.clip()
    return optimiser.step()["optim/learning_rate"]


# --- schedules ------------------------------------------------------------------------------------------------------


def test_factor_follows_schedule():
    constant = [factor(section(), 4)(i) for i in range(4)]
    linear = [factor(section(schedule="linear"), 4)(i) for i in range(4)]
    cosine = [factor(section(schedule="cosine"), 4)(i) for i in range(5)]
    assert constant == [1.0] * 4
    assert linear == [1.0, 0.75, 0.5, 0.25]
    assert cosine == pytest.approx([1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0.0], abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_factor_warms_up_in_equal_parts_above_zero(schedule: str):
    at = factor(section(schedule=schedule, warmup_steps=4), 12)
    assert [at(i) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    after = [at(i) for i in range(4, 12)]
    assert after == sorted(after, reverse=True)
    assert all(0.0 < value <= 1.0 for value in after)
    assert schedule == "constant" or after[-1] < 0.2


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 1), (5, 5), (9, 5), (0, 3)])
def test_factor_is_positive_in_short_stages(schedule: str, warmup: int, steps: int):
    at = factor(section(schedule=schedule, warmup_steps=warmup), steps)
    assert all(0.0 < at(i) <= 1.0 for i in range(steps))
    assert 0.0 <= at(steps) <= 1.0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_step_reports_scheduled_learning_rate(schedule: str):
    settings = section(schedule=schedule, warmup_steps=3)
    optimiser = optimisers.build(parameters(), settings, 10)
    expected = [settings.learning_rate * factor(settings, 10)(i) for i in range(10)]
    assert [update(optimiser, i) for i in range(10)] == pytest.approx(expected, rel=1e-12)


def test_step_moves_by_learning_rate_when_first():
    """Adam's first step is rate x sign(gradient), whatever the gradient's size."""
    optimiser = optimisers.build(parameters(), section(warmup_steps=4, eps=1e-12, max_grad_norm=1e9), 10)
    before = optimiser.parameters["a"].detach().clone()
    assert update(optimiser, 0) == pytest.approx(0.025)
    moved = optimiser.parameters["a"].detach() - before
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.025), atol=1e-6, rtol=0)


def test_build_passes_settings_to_adamw():
    settings = section(betas=(0.8, 0.95), eps=1e-5, weight_decay=0.3, learning_rate=0.2)
    group = optimisers.build(parameters(), settings, 10).parts["adamw"].param_groups[0]
    assert group["betas"] == (0.8, 0.95)
    assert group["eps"] == 1e-5
    assert group["weight_decay"] == 0.3
    assert group["initial_lr"] == 0.2


def adamw_by_hand(weight: Tensor, gradients: Sequence[Tensor], settings: OptimizerSection) -> Tensor:
    """The published formula in float64; the learning rate is constant."""
    w, m, v = weight.double(), torch.zeros(weight.shape).double(), torch.zeros(weight.shape).double()
    (one, two), rate = settings.betas, settings.learning_rate
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        m, v = one * m + (1 - one) * g, two * v + (1 - two) * g.square()
        w = w - rate * settings.weight_decay * w
        w = w - rate * (m / (1 - one**t)) / ((v / (1 - two**t)).sqrt() + settings.eps)
    return w


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 0.05)]
)  # six roundings of a weight below 4
def test_step_follows_formula_of_adamw(dtype: torch.dtype, close: float):
    settings = section(learning_rate=0.01, weight_decay=0.1, schedule="constant", warmup_steps=0)
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(37, 5, generator=generator).to(dtype)
    gradients = [torch.randn(37, 5, generator=generator).to(dtype) for _ in range(6)]
    optimiser = optimisers.build({"w": nn.Parameter(start.clone())}, settings, 10)
    for gradient in gradients:
        optimiser.parameters["w"].grad = gradient.clone()
        optimiser.step()
    expected = adamw_by_hand(start, gradients, settings)
    torch.testing.assert_close(optimiser.parameters["w"].detach().double(), expected, atol=close, rtol=0)


# --- clipping -------------------------------------------------------------------------------------------------------


def test_clip_scales_by_global_norm_and_returns_norm():
    optimiser = optimisers.build(parameters(), section(max_grad_norm=1.0), 10)
    for parameter in optimiser.parameters.values():
        parameter.grad = torch.full_like(parameter, 2.0)
    norm = math.sqrt(2 * 12 * 4.0)
    assert optimiser.clip() == pytest.approx(norm)
    for parameter in optimiser.parameters.values():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, torch.full_like(parameter, 2.0 / norm))
    assert optimiser.clip() == pytest.approx(1.0, rel=1e-4)


def test_clip_keeps_small_gradient():
    optimiser = optimisers.build(parameters(), section(max_grad_norm=1.0), 10)
    for parameter in optimiser.parameters.values():
        parameter.grad = torch.full_like(parameter, 0.01)
    optimiser.clip()
    assert all(
        torch.equal(p.grad, torch.full_like(p, 0.01)) for p in optimiser.parameters.values() if p.grad is not None
    )


def test_clip_writes_no_gradient_that_is_small():
    """A product with 1 would read and write every gradient."""
    optimiser = optimisers.build(parameters(), section(max_grad_norm=1.0), 10)
    for parameter in optimiser.parameters.values():
        parameter.grad = torch.full_like(parameter, 0.01)
    before = [p.grad._version for p in optimiser.parameters.values() if p.grad is not None]
    optimiser.clip()
    assert [p.grad._version for p in optimiser.parameters.values() if p.grad is not None] == before


def test_clip_returns_nan_when_gradient_is_nan():
    optimiser = optimisers.build(parameters(), section(), 10)
    for parameter in optimiser.parameters.values():
        parameter.grad = torch.full_like(parameter, torch.nan)
    assert math.isnan(optimiser.clip())


def test_step_clears_gradient():
    optimiser = optimisers.build(parameters(), section(), 10)
    update(optimiser, 0)
    assert all(parameter.grad is None for parameter in optimiser.parameters.values())


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("stop", [0, 1, 3, 5, 9])
def test_restore_gives_byte_equal_steps(tmp_path: Path, name: str, schedule: str, stop: int):
    needs_bitsandbytes(name)
    settings = section(name=name, schedule=schedule, warmup_steps=4, weight_decay=0.01)
    whole = optimisers.build(parameters(64, 80), settings, 10)
    rates = [update(whole, i) for i in range(10)]

    first = optimisers.build(parameters(64, 80), settings, 10)
    assert [update(first, i) for i in range(stop)] == rates[:stop]
    saved = checkpoint.save(tmp_path, stop, tensors=first.tensors(), state={"updates": first.updates})
    weights = {name: p.detach().clone() for name, p in first.parameters.items()}
    update(first, 99)  # what happens after the checkpoint is lost

    second = optimisers.build({name: nn.Parameter(value) for name, value in weights.items()}, settings, 10)
    loaded = checkpoint.load(saved)
    second.restore(loaded.tensors, loaded.state["updates"])
    assert [update(second, i) for i in range(stop, 10)] == rates[stop:]
    for name, parameter in whole.parameters.items():
        assert torch.equal(second.parameters[name], parameter)
    assert_equal(second.tensors(), whole.tensors())
    assert second.updates == whole.updates == 10


def test_restore_continues_run_of_unfused_adamw(tmp_path: Path):
    """Checkpoints of a plain AdamW have the same names, shapes and types."""
    settings = section(schedule="linear", weight_decay=0.01)
    plain = optimisers.build(parameters(), settings, 10)
    plain.parts["adamw"].param_groups[0]["fused"] = False
    for i in range(3):
        update(plain, i)
    saved = checkpoint.save(tmp_path, 3, tensors=plain.tensors(), state={"updates": plain.updates})
    weights = {name: nn.Parameter(p.detach().clone()) for name, p in plain.parameters.items()}

    fused = optimisers.build(weights, settings, 10)
    assert fused.parts["adamw"].param_groups[0]["fused"]
    loaded = checkpoint.load(saved)
    fused.restore(loaded.tensors, loaded.state["updates"])
    assert [update(fused, i) for i in range(3, 10)] == [update(plain, i) for i in range(3, 10)]
    for name, parameter in plain.parameters.items():
        torch.testing.assert_close(fused.parameters[name], parameter, atol=1e-6, rtol=1e-6)
    for group, named in plain.tensors().items():
        for name, tensor in named.items():
            got = fused.tensors()[group][name]
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            torch.testing.assert_close(got, tensor, atol=1e-6, rtol=1e-6)


# --- other optimisers -----------------------------------------------------------------------------------------------


def orthogonal(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz iterations with the coefficients of Muon, in float64."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_step_follows_formula_of_muon(shape: tuple[int, int]):
    """Nesterov momentum, its nearest orthogonal matrix, 0.2 sqrt(max(A, B)); bfloat16 rounds the iterations."""
    settings = section(name="muon", learning_rate=0.01, weight_decay=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) for _ in range(4)]
    optimiser = optimisers.build({"w": nn.Parameter(start.clone())}, settings, 10)
    w, m = start.double(), torch.zeros(shape).double()
    for gradient in gradients:
        optimiser.parameters["w"].grad = gradient.clone()
        optimiser.step()
        g = gradient.double()
        m = 0.9 * m + 0.1 * g
        w = w - 0.01 * 0.1 * w
        w = w - 0.01 * 0.2 * math.sqrt(max(shape)) * orthogonal(0.1 * g + 0.9 * m)
    moved = (w - start.double()).abs().max()
    assert (optimiser.parameters["w"].double() - w).abs().max() < 0.03 * moved


def test_muon_leaves_tables_and_vectors_to_adamw():
    student = tiny()
    named = student.trainable()
    optimiser = optimisers.build(named, section(name="muon"), 10, student.tables)
    assert set(optimiser.parts) == {"muon", "adamw"}
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    groups = optimiser.tensors()
    tables = {name for name, p in named.items() if any(p is table for table in student.tables)}
    vectors = {name for name, p in named.items() if p.dim() != 2}
    assert tables
    assert vectors
    assert set(groups["adamw.exp_avg"]) == tables | vectors
    assert set(groups["muon.momentum_buffer"]) == set(named) - tables - vectors


def test_adamw_8bit_follows_adamw_with_small_moments():
    needs_bitsandbytes("adamw_8bit")
    made = {name: optimisers.build(parameters(64, 80), section(name=name), 10) for name in ("adamw", "adamw_8bit")}
    start = {name: p.detach().clone() for name, p in made["adamw"].parameters.items()}
    for i in range(6):
        for optimiser in made.values():
            update(optimiser, i)
    for name, exact in made["adamw"].parameters.items():
        moved = exact - start[name]
        apart = made["adamw_8bit"].parameters[name] - exact
        assert 0 < apart.norm() < 0.1 * moved.norm()
    groups = made["adamw_8bit"].tensors()
    assert groups["adamw_8bit.state1"]["a"].dtype == groups["adamw_8bit.state2"]["a"].dtype == torch.uint8


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
def test_state_bytes_are_those_of_the_moments(name: str):
    """Against the tensors after an update, without counts and the quantiles that bitsandbytes shares."""
    needs_bitsandbytes(name)
    named = {**parameters(64, 80), "small": nn.Parameter(torch.ones(40))}
    settings = section(name=name)
    expected = optimisers.state_bytes(named, settings, [named["b"]])
    optimiser = optimisers.build(named, settings, 10, [named["b"]])
    update(optimiser, 0)
    groups = {key: value for key, value in optimiser.tensors().items() if not key.endswith(("step", "qmap1", "qmap2"))}
    kept = sum(tensor.numel() * tensor.element_size() for one in groups.values() for tensor in one.values())
    assert kept == expected


def test_adamw_8bit_is_refused_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(ConfigError, match=r"bitsandbytes cannot be imported.*opd\[quantization\]"):
        optimisers.build(parameters(), section(name="adamw_8bit"), 10)


def test_momentum_is_refused_without_muon():
    with pytest.raises(ValueError, match="`momentum` is of `name: muon`, and adamw does not read it"):
        section(momentum=0.5)


def test_tensors_are_named_by_parameter():
    optimiser = optimisers.build(parameters(), section(schedule="linear"), 10)
    assert (optimiser.tensors(), optimiser.updates) == ({}, 0)
    update(optimiser, 0)
    assert {group: sorted(named) for group, named in optimiser.tensors().items()} == {
        f"adamw.{key}": ["a", "b"] for key in ("step", "exp_avg", "exp_avg_sq")
    }
    assert optimiser.updates == 1


# --- validation -----------------------------------------------------------------------------------------------------


class Judged(Reward):
    """Rewards of 1 for the first `count` responses; the others are unjudged."""

    name = "judged"

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        return [
            replace(one, reward=1.0) if i < self.count else replace(one, unjudged="no answer")
            for i, one in enumerate(rollouts)
        ]


@pytest.mark.parametrize(("judged", "expected"), [(4, 1.0), (1, 1.0), (0, -math.inf)])
def test_validate_averages_over_judged_responses(judged: int, expected: float):
    """An unjudged response counts in neither the sum nor the number; it is no reward of 0."""
    student = tiny()
    made = optimisation.StageOptimisation(
        optimiser=optimisers.build(student.trainable(), section(), 1),
        student=student,
        root=student.model,
        teacher=NoTeacher(),
        sampler=TransformersSampler(lm=student, sampling=Sampling(max_completion_length=3)),
        prompts=prompts_of(*"abcd"),
        reward=Judged(judged),
        context=same_prompt(),
        memory={},
        world=ALONE,
        seed=0,
        micro_batch_tokens=100,
    )
    assert made.validate("reward", 4) == expected
