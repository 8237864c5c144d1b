"""Extrapolation: when it jumps, how far, what it accepts, how it goes back, and what it remembers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from support.runs import tiny_model
from torch import Tensor

from opd.api import distill
from opd.errors import ConfigError
from opd.models.loading import load_model
from opd.models.new import character_tokenizer
from opd.pieces import updates
from opd.pieces.updates import KeptWeights
from opd.recipe.schema import ModelSpec
from opd.types import Memory, Update

CHARACTERS = "0123456789+coretinwg"
WEIGHT, EMBEDDING, NORM = "layers.0.weight", "embed_tokens.weight", "norm.weight"


@dataclass
class Walk:
    """An `Optimisation` that goes one step of `stride` at a time, judged by a function of where it is."""

    judge: Callable[[float], float]
    stride: float = 1.0
    weights: dict[str, Tensor] = field(
        default_factory=lambda: {WEIGHT: torch.zeros(1, 2), EMBEDDING: torch.zeros(2, 2), NORM: torch.zeros(2)}
    )
    updates: int = 0
    asked: list[float] = field(default_factory=list[float])  # where it was judged
    jumps: list[dict[str, Tensor]] = field(default_factory=list[dict[str, Tensor]])
    memory: Mapping[str, Memory] = field(default_factory=lambda: {"extrapolation": KeptWeights()})

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self.weights

    @property
    def place(self) -> float:
        return float(self.weights[WEIGHT][0, 0])

    def step(self) -> dict[str, float]:
        self.updates += 1
        for weight in self.weights.values():
            weight.add_(self.stride)
        return {"optim/learning_rate": 0.1}

    def set(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in weights.items():
            self.weights[name].copy_(value)

    def jumped(self, by: Mapping[str, Tensor]) -> None:
        self.jumps.append(dict(by))

    def validate(self, by: Literal["reward", "teacher_kl"], prompts: int) -> float:
        assert (by, prompts) == ("reward", 7)
        self.asked.append(self.place)
        return self.judge(self.place)


def extrapolation(**settings: Any) -> Update:
    return updates.extrapolation(**{"by": "reward", "prompts": 7, "candidates": 5, "ties": False, **settings})


def test_extrapolation_tries_rising_factors_at_powers_of_two():
    walk, jump = Walk(judge=lambda place: place), extrapolation()
    for _ in range(3):
        assert jump(walk)["optim/learning_rate"] == 0.1
    # Update 1 at 1, change 1: all of 3, 5, 7, 9, 11 are better. Update 2 at 12, change 12 - 11 = 1 since then: to 22.
    # Update 3 is no power of two.
    assert walk.asked == [1, 3, 5, 7, 9, 11, 12, 14, 16, 18, 20, 22]
    assert walk.place == 23
    metrics = jump(walk)  # update 4 at 24, change 2 since 22
    assert walk.asked[12:] == [24, 28, 32, 36, 40, 44]
    assert metrics["extrapolation/factor"] == 10
    assert metrics["extrapolation/tried"] == 5
    assert (metrics["extrapolation/value_before"], metrics["extrapolation/value_after"]) == (24, 44)
    assert [float(one[WEIGHT][0, 0]) for one in walk.jumps] == [10, 10, 20]


def test_extrapolation_stops_at_first_worse_candidate():
    walk, jump = Walk(judge=lambda place: -abs(place - 5.5)), extrapolation()
    metrics = jump(walk)
    assert walk.asked == [1, 3, 5, 7]
    assert walk.place == 5
    assert (metrics["extrapolation/factor"], metrics["extrapolation/tried"]) == (4, 3)
    jump(walk)  # update 2 at 6: 8 is worse
    assert walk.asked[4:] == [6, 8]
    assert walk.place == 6
    assert len(walk.jumps) == 1


def test_extrapolation_restores_weights_when_rejected():
    generator = torch.Generator().manual_seed(0)
    walk = Walk(judge=lambda place: -place, stride=1 / 3)
    for name in walk.weights:
        walk.weights[name] = torch.randn(3, 3, generator=generator)
    plain = {name: value + 1 / 3 for name, value in walk.weights.items()}
    metrics = extrapolation()(walk)
    assert len(walk.asked) == 2, "a candidate was tried"
    assert all(torch.equal(walk.weights[name], value) for name, value in plain.items())
    assert metrics["extrapolation/factor"] == 0
    assert walk.jumps == []


@pytest.mark.parametrize(("ties", "place"), [(False, 1), (True, 11)])
def test_extrapolation_takes_equal_candidate_only_with_ties(ties: bool, place: float):
    walk = Walk(judge=lambda place: 0.5)
    extrapolation(ties=ties)(walk)
    assert walk.place == place


def test_extrapolation_rejects_nan():
    walk = Walk(judge=lambda place: math.nan if place > 1 else 0.0)
    extrapolation(ties=True)(walk)
    assert walk.place == 1


def test_extrapolation_moves_only_matrices_when_set():
    walk = Walk(judge=lambda place: place)
    extrapolation(move="matrices")(walk)
    assert [float(walk.weights[name].flatten()[0]) for name in (WEIGHT, EMBEDDING, NORM)] == [11, 1, 1]


@pytest.mark.parametrize(
    ("name", "shape", "place"),
    [
        ("transformer.wte.weight", (2, 2), 1),
        ("transformer.wpe.weight", (2, 2), 1),
        ("lm_head.weight", (2, 2), 1),
        ("layers.0.mlp.experts.gate_up_proj", (3, 2, 2), 11),
    ],
)
def test_extrapolation_moves_experts_and_no_embeddings(name: str, shape: tuple[int, ...], place: int):
    walk = Walk(judge=lambda place: place, weights={WEIGHT: torch.zeros(1, 2), name: torch.zeros(shape)})
    extrapolation(move="matrices")(walk)
    assert float(walk.weights[name].flatten()[0]) == place


# Names of parameters in transformers models, and whether the released keyword list chooses them.
RELEASED = {
    "model.embed_tokens.weight": False,
    "lm_head.weight": False,
    "model.norm.weight": False,
    "model.layers.0.input_layernorm.weight": False,
    "model.layers.0.post_attention_layernorm.weight": True,
    "model.layers.0.pre_feedforward_layernorm.weight": False,
    "model.layers.0.self_attn.q_proj.weight": True,
    "model.layers.0.self_attn.q_proj.bias": True,
    "model.layers.0.self_attn.k_norm.weight": True,
    "model.layers.0.mlp.gate.weight": True,
    "model.layers.0.mlp.experts.down_proj": True,
    "model.layers.0.self_attn.o_proj.lora_A.default.weight": True,
    "transformer.h.0.attn.c_attn.weight": True,
    "transformer.h.0.ln_1.weight": False,
    "decoder.FFN.w1": True,
}


@pytest.mark.parametrize("name", RELEASED)
def test_extrapolation_moves_released_names(name: str):
    weights = {WEIGHT: torch.zeros(1, 2), "layers.0.mlp.weight": torch.zeros(1, 2), name: torch.zeros(2)}
    walk = Walk(judge=lambda place: 0.0, weights=weights)
    extrapolation(move="released", ties=True)(walk)
    moved = {one: float(weight.flatten()[0]) == 11 for one, weight in walk.weights.items()}
    assert moved == {WEIGHT: False, "layers.0.mlp.weight": True, name: RELEASED[name]}


def test_extrapolation_refuses_choice_without_weights():
    walk = Walk(judge=lambda place: place)
    with pytest.raises(ConfigError, match=r"move='released' chooses none of the 3 trained weights \(layers.0.w"):
        extrapolation(move="released")(walk)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("anti_sd", {"template": "{privileged_context}{prompt}{verdict}"}),
        ("context_distillation", {"template": "{prompt}{verdict}", "k": 4}),
    ],
)
def test_eff_opd_validates_by_teacher_kl_when_verdict_is_read(method: str, options: dict[str, Any]):
    rows = [{"prompt": f"{n}+", "answer": str(n), "privileged_context": "7"} for n in range(4)]
    run = distill(
        student=load_model(ModelSpec(**tiny_model(0, characters=CHARACTERS)), name="tiny").model,
        tokenizer=character_tokenizer(CHARACTERS),
        prompts=rows,
        method=f"{method}+eff_opd",
        options={method: options, "eff_opd": {"validate_by": "teacher_kl", "prompts": 2}},
        reward="exact",
        sampling={"n": 2, "max_completion_length": 3},
        steps=1,
        quiet=True,
    )
    assert math.isfinite(run.metrics[-1]["extrapolation/value_before"])


@pytest.mark.parametrize("by", ["reward", "teacher_kl"])
def test_eff_opd_rejects_overflowing_candidate(by: str):
    run = distill(
        student=load_model(ModelSpec(**tiny_model(0, characters=CHARACTERS)), name="tiny").model,
        tokenizer=character_tokenizer(CHARACTERS),
        teacher=load_model(ModelSpec(**tiny_model(1, characters=CHARACTERS)), name="other").model,
        prompts=[{"prompt": f"{n}+", "answer": str(n)} for n in range(4)],
        method="reverse_kl+eff_opd",
        options={"eff_opd": {"validate_by": by, "prompts": 2, "ties": True}},
        reward="exact",
        sampling={"max_completion_length": 3},
        optimizer={"learning_rate": 3e8},
        steps=1,
        quiet=True,
    )
    (row,) = run.metrics
    assert (row["extrapolation/factor"], row["extrapolation/tried"]) == (2.0, 2.0)
    assert math.isfinite(row["extrapolation/value_after"])
    assert all(bool(weight.isfinite().all()) for weight in run.student.parameters())


@pytest.mark.parametrize("stop", range(1, 9))
def test_extrapolation_continues_equally_when_restored(stop: int):
    jump, walk, again = extrapolation(candidates=1), Walk(judge=lambda place: place), Walk(judge=lambda place: place)
    for _ in range(9):
        jump(walk)
    for _ in range(stop):
        jump(again)
    first, second = again.memory["extrapolation"], KeptWeights()
    second.load_state_dict(first.state_dict(), {name: value.clone() for name, value in first.tensors().items()})
    again.memory = {"extrapolation": second}
    for _ in range(stop, 9):
        jump(again)
    assert again.asked == walk.asked
    assert again.place == walk.place


@pytest.mark.parametrize("settings", [{"candidates": 0}, {"prompts": 0}])
def test_extrapolation_refuses_zero_candidates_or_prompts(settings: dict[str, int]):
    with pytest.raises(ConfigError, match="needs at least one candidate and one prompt, got candidates"):
        extrapolation(**settings)


def test_eff_opd_raises_config_error_without_reward():
    with pytest.raises(ConfigError, match="method 'eff_opd' needs a reward"):
        distill(student="nowhere", teacher="nowhere", prompts=["1"], method="eff_opd", steps=1)
