"""What a method remembers: made once a run, so that a Method is a value; named, so that each piece finds its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import CHARACTERS, sums, tiny_model

import opd
from opd import methods
from opd.errors import ConfigError
from opd.method import Method
from opd.methods.combine import combined
from opd.models.loading import load_model
from opd.models.new import character_tokenizer
from opd.pieces import drift, gates, signals, sources
from opd.pieces.memory import SavedAttributes, observed, recalled
from opd.recipe.schema import ModelSpec
from opd.types import Batch, Gather

METHODS: dict[str, dict[str, Any]] = {
    "eff_opd": {"options": {"prompts": 3, "candidates": 2}, "reward": "final_number"},
    "prune_opd": {"options": {"k": 4, "budget": 6, "budget_min": 2, "budget_max": 8, "budget_step": 1, "margin": 1}},
    "visd": {
        "options": {"template": "{privileged_context}{prompt}", "hint": "privileged_context", "k": 4, "fades": 3},
        "reward": "final_number",
        "sampling": {"max_completion_length": 8, "n": 2},
    },
    "anti_sd": {
        "options": {"template": "{privileged_context}{prompt}", "warm_up": 2},
        "reward": "final_number",
        "sampling": {"max_completion_length": 8, "n": 2},
    },
}


def model(seed: int) -> Any:
    return load_model(ModelSpec(**tiny_model(seed)), name="tiny").model


def run(folder: Path, method: Method, options: Any = None, **settings: Any) -> opd.Run:
    return opd.distill(
        student=model(2),
        teacher=model(1) if method.teacher.kind == "external" else None,
        tokenizer=character_tokenizer(CHARACTERS),
        prompts=[{**row, "privileged_context": "7"} for row in sums(0, 8)],
        method=method,
        output_dir=folder,
        quiet=True,
        **{"steps": 5, "prompts_per_step": 4, "sampling": {"max_completion_length": 8}, **settings},
    )


@pytest.mark.parametrize("name", [*METHODS, "anti_sd released"])
def test_distill_gives_equal_runs_when_method_is_reused(tmp_path: Path, name: str):
    name, *form = name.split()
    settings = METHODS[name]
    if form:
        settings = {**settings, "options": {**settings["options"], "form": form[0], "solution": "answer"}}
    method = methods.build(name, settings["options"])
    runs = [run(tmp_path / which, method, **settings) for which in ("first", "second")]
    rows = [(tmp_path / which / "distill/metrics.jsonl").read_bytes() for which in ("first", "second")]
    assert rows[0] == rows[1]
    if name == "eff_opd":
        for one in runs:
            assert [row["step"] for row in one.metrics if "extrapolation/tried" in row] == [1, 2, 4]


class Steps(SavedAttributes):
    """Counts the steps."""

    saved = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def observe(self, batch: Batch, gather: Gather) -> dict[str, float]:
        self.count += 1
        return {"steps/count": float(self.count)}


class Silent(SavedAttributes):
    """Remembers nothing, and learns nothing."""


def batch_with(**memory: Any) -> Batch:
    nothing = torch.zeros(1, 1)
    return Batch(
        rollouts=(),
        response_ids=nothing.long(),
        mask=nothing.bool(),
        sampler_logp=nothing,
        policy_logp=nothing,
        teacher_logp=nothing,
        reward=nothing[0],
        group=nothing[0].long(),
        memory=memory,
    )


def test_make_memory_gives_new_objects_in_the_order_of_names():
    method = Method(signal=signals.nll(), memory={"b": Steps, "a": Silent, "c": Steps})
    first, second = method.make_memory(), method.make_memory()
    assert list(first) == ["b", "a", "c"]
    assert not {id(one) for one in first.values()} & {id(one) for one in second.values()}


def test_observed_calls_each_memory_once_in_order():
    steps = Steps()
    batch = batch_with(steps=steps, silent=Silent())
    assert observed(batch, lambda value: [value]) == {"steps/count": 1.0}
    assert list(observed(batch_with(a=Other(), steps=steps), lambda value: [value])) == ["other/x", "steps/count"]
    assert steps.count == 2


class Other(SavedAttributes):
    """One more metric."""

    def observe(self, batch: Batch, gather: Gather) -> dict[str, float]:
        return {"other/x": 1.0}


def test_saved_attributes_restore_state():
    steps, again = Steps(), Steps()
    steps.count = 3
    again.load_state_dict(steps.state_dict(), steps.tensors())
    assert again.count == 3
    assert (Silent().state_dict(), Silent().tensors()) == ({}, {})
    with pytest.raises(KeyError, match="count"):
        again.load_state_dict({}, {})


def test_recalled_names_missing_memory():
    steps = Steps()
    assert recalled({"steps": steps}, "steps", Steps) is steps
    with pytest.raises(ConfigError, match=r"reads the memory 'steps', a Steps, but the method has no memory of that"):
        recalled({}, "steps", Steps)
    with pytest.raises(ConfigError, match=r"'steps', a Steps, but the method has a Silent of that name\. Give its"):
        recalled({"steps": Silent()}, "steps", Steps)


def test_pieces_raise_config_error_when_memory_is_missing(tmp_path: Path):
    with pytest.raises(ConfigError, match="reads the memory 'gate', a EntropyGate, but the method has no memory"):
        gates.factor(batch_with())
    method = Method(signal=signals.nll(), source=sources.on_policy(drift.within_budget(4)))
    with pytest.raises(ConfigError, match="reads the memory 'budget', a Budget, but the method has no memory"):
        run(tmp_path, method, steps=1)


def test_combined_refuses_equal_memory_names():
    one, other = (Method(signal=signals.sampled_reverse_kl(), memory={"steps": Steps}) for _ in range(2))
    with pytest.raises(ConfigError, match="cannot be combined: both set memory 'steps'"):
        combined(one, other)
    both = combined(one, Method(signal=signals.sampled_reverse_kl(), memory={"more": Silent}))
    assert list(both.memory) == ["steps", "more"]
