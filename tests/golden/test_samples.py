"""What sample files show changes no number: three steps of every method with all of it, and with none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from golden.test_golden import OPTIONS, recipe_of

import opd
from opd.methods import METHODS

FULL = {"samples_every": 1, "samples": {"rows": 3, "top_k": 4, "follow": 2, "held_out": 3}}
NONE = {"samples_every": 0, "samples": {"rows": 0, "top_k": 0, "follow": 0, "held_out": 0}}


def trained(method: str, folder: Path, **more: Any) -> opd.Run:
    folder.mkdir()
    recipe = recipe_of(method, folder)
    (stage,) = recipe["stages"]
    columns = {"brts": "answer", "opsd": "privileged_context", "sdft": "privileged_context"}
    rows = [{"prompt": str(n), **({columns[method]: str(n % 9)} if method in columns else {})} for n in range(10, 20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate = {"data": {"path": str(folder / "prompts.jsonl"), "limit": 4}, "sampling": {"drawn": {"n": 2}}}
    evaluate["sampling"]["drawn"]["max_completion_length"] = 5
    for part in stage["tasks"].values() if "tasks" in stage else [stage]:
        part["evaluate"] = evaluate
    stage |= {"steps": 3, **more}
    return opd.run(recipe, quiet=True)


@pytest.mark.parametrize("method", METHODS)
def test_samples_change_no_byte_of_a_method(method: str, tmp_path: Path):
    one, other = trained(method, tmp_path / "one", **FULL), trained(method, tmp_path / "other", **NONE)
    lines, plain = ((run.folder / "distil/metrics.jsonl").read_bytes() for run in (one, other))
    assert lines == plain
    for file in (one.folder / "distil/model").glob("*.safetensors"):
        assert file.read_bytes() == (other.folder / "distil/model" / file.name).read_bytes()
    assert other.samples == []
    check(method, one)


def check(method: str, run: opd.Run) -> None:
    """The rows: those that were trained on have a signal, and each picked one says what both models would write."""
    assert set(OPTIONS) == set(METHODS)
    trained_on = run.samples
    (first,) = {len([row for row in run.followed if row["step"] == s]) for s in (1, 2, 3)}
    assert first == 2
    assert len([row for row in trained_on if row["step"] == 1 and row["pick"]]) == 3
    own = [row for row in trained_on if row["step"] == 1 and not row["part"]]
    metrics = next(row for row in run.metrics if row["step"] == 1 and "train/loss" in row)
    total = math.fsum(value for row in own for value in row["signal"] or () if value is not None)
    if metrics["train/tokens"]:
        assert total / metrics["train/tokens"] == pytest.approx(metrics["train/signal"], rel=1e-4, abs=1e-7)
    for row in [*run.samples, *run.followed]:
        if row["pick"] is None:
            assert row["student_top_ids"] is row["teacher_top_ids"] is None
            continue
        n = len(row["response_ids"])
        assert len(row["student_top_ids"]) == len(row["student_entropy"]) == n
        assert all(len(ids) == len(set(ids)) == 4 for ids in row["student_top_ids"])
        if row["pick"] == "follow":
            continue  # its teacher's scores: tests/stage/test_looks.py
        if method in ("sft", "grpo", "ropd"):  # whose teacher, if there is one, does not score the step's responses
            assert row["teacher_top_ids"] is None
        elif method != "copd":  # a row of its own task has no teacher there
            assert len(row["teacher_top_ids"]) == len(row["teacher_rank"]) == n
        if row["units"]:
            assert method in ("simct", "uld")
            for unit in row["units"]:
                own = row["response_tokens"][unit["student_start"] : unit["student_end"]]
                theirs = row["teacher_tokens"][unit["teacher_start"] : unit["teacher_end"]]
                assert "".join(own) == "".join(theirs) or "<eos>" in own
    for row in run.held_out("before")[:2]:
        assert len(row["policy_logp"]) == len(row["response_ids"])
