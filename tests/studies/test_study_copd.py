"""The study of models that teach each other: its tasks, its recipes, the experts that it reads, and a small run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_pair import TINY

from opd.recipe.load import parse_recipe
from opd_studies.claims import copd as study
from opd_studies.lab import branches
from opd_studies.lab.ablation import START
from opd_studies.lab.branches import FIRST, SECOND, Size
from opd_studies.lab.lab import Lab
from opd_studies.worlds.two_signs import extremes

# Trained enough that some responses are right: without a reward the experts would stay equal to the start.
START_SIZE = replace(TINY, student_rows=200, student_steps=30, prompts_per_step=32)
SMALL = Size(seeds=(0,), updates=2, prompts=4, group=4, rows=20, held_out=10, start=START_SIZE, cycle=(1, 1))


@pytest.mark.parametrize("largest", [False, True])
def test_extremes_are_smallest_or_largest_digit(largest):
    rows = list(extremes(300, "<", largest=largest, wrong=0.4, seed=1))
    assert len({row["prompt"] for row in rows}) == 300
    others = 0
    for row in rows:
        digits = [int(digit) for digit in row["prompt"].removesuffix("<")]
        low, high = str(min(digits)), str(max(digits))
        answer, other = (high, low) if largest else (low, high)
        assert row["answer"] == answer
        assert row["response"] in (answer, other)
        others += row["response"] != answer
    assert others / 300 == pytest.approx(0.4, abs=0.1)


def test_extremes_have_the_same_rows_for_both_signs():
    one, other = (list(extremes(50, sign, part="held_out")) for sign in "><")
    assert [row["prompt"][:-1] for row in one] == [row["prompt"][:-1] for row in other]
    assert all(row["response"] == row["answer"] for row in one)


def responses_of(recipe: dict[str, Any]) -> int:
    """Responses that a recipe's first stage writes, counted from its settings: of `copd` in cycles."""
    stage = parse_recipe(recipe).stages[0]
    n = stage.prompts_per_step * stage.sampling.n
    if stage.method != "copd":
        return stage.steps * n * len(stage.trains)
    alone, together = stage.options["alone"], stage.options["together"]
    taught = sum(step % (alone + together) >= alone for step in range(stage.steps))
    return len(stage.trains) * (taught * n + (stage.steps - taught) * n // 2)


@pytest.mark.parametrize("setting", branches.PAIRS)
def test_arms_write_equally_many_responses(setting):
    size, there = Size(), Path("start")
    experts = {FIRST: Path("one"), SECOND: Path("other")}
    each = size.prompts * size.group
    total = responses_of(branches.together(setting, 0, there, size))
    assert total == size.total * each
    assert responses_of(branches.mixed(setting, 0, there, size)) == total
    assert responses_of(branches.apart(setting, 0, there, size)) == total
    for both in (True, False):
        taught = branches.static(setting, 0, there, experts, size, both=both)
        assert responses_of(taught) + 2 * size.updates * each == total


def test_copd_study_runs_at_reduced_size(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "PAIRS", {"A": branches.PAIRS["A"]})
    lab = Lab(folder=tmp_path, workers=1)
    numbers = study.measure(lab, SMALL)["A"]
    assert next(iter(numbers)) == START
    assert len(numbers) == 10
    assert {name for name in numbers if study.APART in numbers[name]} == {study.EXPERTS, study.COPD}
    for measured in numbers.values():
        assert measured[study.BOTH] == pytest.approx([(measured[FIRST][0] + measured[SECOND][0]) / 2])
    (start,) = branches.starts(lab, SMALL)
    run = lab.run(branches.apart("A", 0, start, SMALL))
    experts = branches.experts_of(run, start, SMALL.total // 2)
    weights = [load_file(folder / "model.safetensors") for folder in experts.values()]
    for name, mean in load_file(run / "apart" / "model" / "model.safetensors").items():
        torch.testing.assert_close(mean, (weights[0][name] + weights[1][name]) / 2)
