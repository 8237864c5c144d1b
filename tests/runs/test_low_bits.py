"""Runs with 4-bit models and other optimisers: trained, resumed to the bit, saved as trained, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from support.models import LETTERS, build

import opd
from opd.errors import ConfigError
from opd.models.new import character_tokenizer
from opd.recipe.load import parse_recipe
from opd.runs.checks import check_stages
from opd.runs.prepare import Given

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

PROMPTS = [{"prompt": a + b} for a in LETTERS for b in LETTERS]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = character_tokenizer(LETTERS)
    for name, seed in (("student", 0), ("teacher", 1)):
        torch.manual_seed(seed)
        model: Any = build("llama_tied", tokenizer, hidden_size=64, intermediate_size=128)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return folder


def recipe(
    base: Path, folder: Path, *, stage: Mapping[str, Any] = MappingProxyType({}), **student: Any
) -> dict[str, Any]:
    return {
        "name": "low",
        "output_dir": str(folder),
        "models": {
            "student": {"path": str(base / "student"), "quantization": {}, "lora": {"rank": 4}, **student},
            "teacher": {"path": str(base / "teacher"), "quantization": {"double": False}},
        },
        "stages": [
            {
                "name": "distil",
                "train": "student",
                "teacher": "teacher",
                "method": "reverse_kl",
                "data": {"path": str(base / "prompts.jsonl")},
                "sampling": {"max_completion_length": 6},
                "optimizer": {"learning_rate": 1e-2},
                "prompts_per_step": 8,
                "steps": 6,
                "samples_every": 0,
                "checkpoint": {"every": 3},
                **stage,
            }
        ],
    }


def metrics(folder: Path) -> bytes:
    return (folder / "distil" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "muon"])
def test_4_bit_run_trains_resumes_and_is_saved(base: Path, tmp_path: Path, optimizer: str):
    stage = {"optimizer": {"learning_rate": 1e-2, "name": optimizer}}
    whole = opd.run(recipe(base, tmp_path / "whole", stage=stage), quiet=True)
    first, last = whole.metrics[0]["train/loss"], whole.metrics[-1]["train/loss"]
    assert last < first
    summary = json.loads((tmp_path / "whole" / "distil" / "done.json").read_text())
    assert summary["saved_kl"] < 1e-6
    opd.run(recipe(base, tmp_path / "parts", stage={**stage, "steps": 3}), quiet=True)
    opd.run(recipe(base, tmp_path / "parts", stage=stage), quiet=True)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def refused(base: Path, tmp_path: Path, match: str, processes: int = 1, **changes: Any) -> None:
    with pytest.raises(ConfigError, match=match):
        check_stages(parse_recipe(recipe(base, tmp_path, **changes), []), Given(), processes=processes)


def test_4_bit_student_without_adapter_is_refused(base: Path, tmp_path: Path):
    refused(base, tmp_path, "whose weights have 4 bits and get no gradient", lora=None)


def test_several_processes_are_refused(base: Path, tmp_path: Path):
    refused(base, tmp_path, r"models\.student\.quantization with 2 processes", processes=2)
    eight = {"optimizer": {"name": "adamw_8bit"}}
    plain = recipe(base, tmp_path, stage=eight, quantization=None)
    plain["models"]["teacher"]["quantization"] = None
    with pytest.raises(ConfigError, match=r"optimizer\.name: adamw_8bit with 2 processes"):
        check_stages(parse_recipe(plain, []), Given(), processes=2)


def test_later_stage_of_4_bit_student_is_refused(base: Path, tmp_path: Path):
    given = recipe(base, tmp_path)
    given["stages"].append({**given["stages"][0], "name": "again"})
    with pytest.raises(ConfigError, match="would be rounded to 4 bits again"):
        check_stages(parse_recipe(given, []), Given())


def test_missing_package_is_named_before_weights_load(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("opd.runs.low_bits.find_spec", lambda name: None if name == "bitsandbytes" else object())
    refused(base, tmp_path, r"models\.student\.quantization needs bitsandbytes\. Install with: pip install")
