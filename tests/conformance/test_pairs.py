"""Every pair of methods: those that go together train, the others are refused with what keeps them apart."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from support.runs import CHARACTERS, sums, tiny_model, write_rows

import opd
from opd import methods
from opd.errors import ConfigError
from opd.methods.combine import PLAIN, combined, conflict
from opd.methods.describe import ROWS
from opd.models.loading import load_model
from opd.models.new import character_tokenizer
from opd.pieces.needs import Input, Needs, Reads
from opd.recipe.schema import ModelSpec

# What tiny vocabularies and a few prompts ask for, beside the row's own options.
SMALL: dict[str, dict[str, Any]] = {
    "topk_reverse_kl": {"k": 4},
    "rethinking_opd": {"k": 4},
    "local_support_matching": {"k": 4},
    "context_distillation": {"k": 4, "system": "5"},
    "vopd": {"k": 4},
    "eff_opd": {"prompts": 2, "candidates": 1},
    "copd": {"alone": 1, "together": 1},
    "brts": {"k": 4, "n": 2, "hint": "{answer}+{prompt}", "marker": "+"},
    "mad_opd": {"opening": "{prompt}", "reply": "{prompt}{debate}", "reads": "{prompt}{debate}"}
    | {"turn": "{text}", "tag": r"2(\d)"},
    "anti_sd": {"template": "{privileged_context}{prompt}"},
    "uni_opd": {"balance": 1.0},
    "topk_forward_kl": {"k": 4},
    "opsd": {"template": "{privileged_context}{prompt}"},
    "sdft": {"template": "{privileged_context}{prompt}"},
    "sdpo": {"k": 4, "otherwise": "privileged_context", "template": "{privileged_context}{prompt}"},
    "visd": {"k": 4, "hint": "privileged_context", "template": "{privileged_context}{prompt}"},
    "gui_sd": {"hint": "none"},
    "prune_opd": {"k": 4, "budget": 3, "budget_min": 2, "budget_max": 4, "budget_step": 1, "margin": 1},
}
PAIRS = [(one, other) for one, other in combinations(ROWS, 2) if ROWS[one][0] != ROWS[other][0]]


def options_of(row: str) -> dict[str, Any]:
    name, options = ROWS[row]
    masks = {"mask_tokens": ["1"]} if "mask_tokens" in options else options
    return {**SMALL.get(name, {}), **masks}


JUDGED = {"name": "rubric", "judge": {"function": "support.named:judge"}}


def reward_of(needs: Needs) -> Any:
    if Input.JUDGE in needs:
        return JUDGED
    return "exact" if needs.inputs & {Input.REWARD, Input.GROUP} else None


def tiny(seed: int) -> Any:
    return load_model(ModelSpec(**tiny_model(seed)), name="tiny").model


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=[f"{one} + {other}" for one, other in PAIRS])
def test_combined_trains_pair_or_refuses_with_reason(one: str, other: str, tmp_path: Path):
    names = (ROWS[one][0], ROWS[other][0])
    given = {names[0]: options_of(one), names[1]: options_of(other)}
    built = [methods.build(name, options) for name, options in given.items()]
    why = conflict(*built)
    if why is not None:
        with pytest.raises(ConfigError) as refused:
            methods.build("+".join(names), given)
        assert str(refused.value) == f"Methods {names[0]} and {names[1]} cannot be combined: {why}."
        return
    method = combined(*built)
    rows = [
        {**row, "answer": "2", "response": "2", "privileged_context": "7", "teacher_answers": ["12"]}
        for row in sums(0, 4)
    ]
    if Input.PEERS in method.needs:
        train_peers("+".join(names), given, rows, tmp_path)
        return
    run = opd.distill(
        student=tiny(2),
        teacher=tiny(1) if method.teacher.kind == "external" else None,
        base=tiny(3) if Reads.BASE_LOGP in method.needs else None,
        tokenizer=character_tokenizer(CHARACTERS),
        prompts=rows,
        method="+".join(names),
        options=given,
        reward=reward_of(method.needs),
        sampling={"n": 2, "max_completion_length": 4},
        steps=2,
        output_dir=tmp_path / "run",
        quiet=True,
    )
    assert [row["step"] for row in run.metrics if "train/loss" in row] == [1, 2]


def train_peers(method: str, options: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> None:
    """Two steps of two models that teach each other."""
    own = {"data": {"path": str(write_rows(folder / "rows.jsonl", rows))}, "reward": {"name": "exact"}}
    stage = {
        "name": "together",
        "train": "one",
        "peers": ["two"],
        "method": method,
        "options": options,
        "tasks": {name: {**own, "train": name} for name in ("one", "two")},
        "task_order": "mixed",
        "sampling": {"n": 2, "max_completion_length": 4},
        "steps": 2,
    }
    models = {name: tiny_model(2) for name in ("one", "two")}
    run = opd.run({"name": "pair", "output_dir": str(folder / "run"), "models": models, "stages": [stage]}, quiet=True)
    assert [row["step"] for row in run.metrics if "train/loss" in row] == [1, 2]


def test_combined_equals_method_when_other_is_plain():
    for name in ("vopd", "grpo", "reverse_kl"):
        method = methods.build(name, {})
        both = combined(PLAIN, method)
        assert all(getattr(both, field) == getattr(method, field) for field in type(method).__slots__)


def test_build_refuses_flat_options_of_several_methods():
    with pytest.raises(ConfigError, match=r"several methods.*options by method; got k\..*options: \{vopd: "):
        methods.build("vopd+eff_opd", {"k": 4})
    with pytest.raises(ConfigError, match=r"no method 'vopt'.*Did you mean 'vopd'"):
        methods.build("eff_opd+vopt", {})


def test_build_combines_three_methods():
    method = methods.build("opd+vopd+eff_opd", {"vopd": {"k": 3}})
    assert method.support.k == 3
    assert "extrapolation" in method.memory
