"""Twenty steps of every method on a tiny pair, against recorded numbers: a change that should not compute differently
must not. A change that should is recorded with `python tests/golden/test_golden.py` and named in CHANGELOG.md under
Numerics.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

import opd

pytestmark = pytest.mark.numeric

VALUES = Path(__file__).with_name("values.json")
STEPS = 20
RECORDED = ("train/loss", "optim/grad_norm", "rollout/length")
OPTIONS = {
    "topk_reverse_kl": {"k": 3, "by": "union", "form": "tail"},
    "context_distillation": {"template": "9{prompt}", "k": None},
    "sft": {"source": "teacher"},
    "grpo": {},
    "opd": {},
    "vopd": {"k": 3},
    "iw_opd": {},
    "sod": {},
    "tcod": {},
    "top_d": {},
    "mopd": {"reward": 0.5},
    "topk_forward_kl": {"k": 3},
    "opsd": {"template": "{privileged_context}9{prompt}", "clip": 0.05},
    "sdft": {"template": "{privileged_context}9{prompt}"},
    "sdpo": {"template": "{privileged_context}9{prompt}", "k": 3, "decay": 0.8},
    "eff_opd": {"prompts": 4},
    "extrapolated_opd": {"strength": 1.3, "bound": 1.5},
    "anti_sd": {"template": "{privileged_context}9{prompt}", "warm_up": 2},
    "uni_opd": {"delta": 1.0},
    "visd": {"template": "{privileged_context}9{prompt}", "k": 3, "fades": 30},
    "gui_sd": {"hint": "none"},
    "prune_opd": {"k": 3, "drop": 0.3, "budget": 4, "budget_min": 2, "budget_max": 6, "budget_step": 1, "margin": 1},
    "ropd": {},
    "brts": {"k": 3, "n": 2, "weight": 2.0, "hint": "{answer}9{prompt}", "marker": "9"},
    "copd": {"alone": 2, "together": 2, "beta": 2.0},
    "simct": {},
    "uld": {"matched": "generalised_jsd"},
    "gkd": {"beta": 0.3},
    "mad_opd": {"beta": 0.5, "opening": "{prompt}", "reply": "{prompt}{debate}", "reads": "{prompt}{debate}"}
    | {"turn": "{text}", "tag": r"9(\d\d)"},
    "reverse_kl": {},
    "forward_kl": {},
    "rethinking_opd": {"k": 3, "form": "released"},
    "local_support_matching": {"k": 3, "mask_tokens": ["7"]},
}


def regex(pattern: str) -> dict:
    return {"name": "regex", "options": {"pattern": pattern}}


def recipe_of(method: str, folder: Path) -> dict:
    shape = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 64}
    tokenizer = {"characters": "0123456789"}
    if method in ("simct", "uld"):
        other = {"characters": "9876543210", "merges": [["7", "7"], ["1", "2"], ["12", "3"]]}
    else:
        other = tokenizer
    stage = {
        "name": "distil",
        "train": "student",
        "method": method,
        "options": OPTIONS[method],
        "data": {"path": str(folder / "prompts.jsonl")},
        "sampling": {"max_completion_length": 6, "n": 2},
        "prompts_per_step": 4,
        "micro_batch_tokens": 32,
        "steps": STEPS,
        "optimizer": {"learning_rate": 1e-2},
        "reward": regex("7"),
    }
    if method == "ropd":
        author = {"lm": "teacher", "max_tokens": 40}  # an answer that was cut is none
        stage["reward"] = {
            "name": "rubric",
            "author": author,
            "judge": {"function": "opd_studies.worlds.graders:grader"},
        }
    elif method == "visd":
        judge = {"function": "opd_studies.worlds.graders:adviser"}
        stage["reward"] = {"name": "feedback", "options": {"by": "regex", "options": {"pattern": "7"}}, "judge": judge}
    elif method == "copd":
        own = {"data": stage.pop("data")}
        del stage["reward"]
        stage |= {"peers": ["teacher"], "task_order": "mixed", "prompts_per_step": 8}
        rewards = {"student": "7", "teacher": "1"}
        stage["tasks"] = {name: {**own, "train": name, "reward": regex(one)} for name, one in rewards.items()}
    elif method not in ("context_distillation", "opsd", "sdft", "sdpo", "grpo", "anti_sd", "gui_sd"):
        stage["teacher"] = "teacher"
    if method == "extrapolated_opd":
        stage["base"] = "base"
    models = {
        "base": {"init": {**shape, "initializer_range": 0.3}, "tokenizer": tokenizer, "seed": 3},
        "student": {"init": shape, "tokenizer": tokenizer, "seed": 1},
        "teacher": {"init": {**shape, "initializer_range": 0.5}, "tokenizer": other, "seed": 2},
    }
    if method == "mad_opd":
        stage["teacher"] = "teacher+other"
        models["other"] = {"init": {**shape, "hidden_size": 8}, "tokenizer": tokenizer, "seed": 3}
    if method == "copd":
        models["teacher"] = models["student"]  # they begin as one model
    return {"name": "golden", "output_dir": str(folder / "run"), "models": models, "stages": [stage]}


def measure(method: str) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        columns = {"brts": "answer", "opsd": "privileged_context", "sdft": "privileged_context"}
        answers = [{columns[method]: str(n % 9)} if method in columns else {} for n in range(10, 20)]
        rows = [{"prompt": str(n), **answer} for n, answer in zip(range(10, 20), answers, strict=True)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = opd.run(recipe_of(method, folder), quiet=True).metrics
    return {key: [row[key] for row in rows] for key in RECORDED}


@pytest.mark.parametrize("method", OPTIONS)
def test_run_metrics_equal_recorded_values(method):
    expected = json.loads(VALUES.read_text())[method]
    got = measure(method)
    for key in RECORDED:
        assert len(got[key]) == STEPS
        assert got[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), key


def test_methods_all_have_recorded_values():
    from opd.methods import METHODS

    assert set(OPTIONS) == set(METHODS)


if __name__ == "__main__":
    VALUES.write_text(json.dumps({method: measure(method) for method in OPTIONS}, indent=1) + "\n")
    sys.exit(0)
