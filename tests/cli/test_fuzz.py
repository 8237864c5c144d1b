"""`benchmarks/fuzz.py`: a few of its recipes train, and each kind of fault is seen."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opd.errors import TrainingError
from opd.methods import METHODS


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    import fuzz

    yield fuzz
    for name in ("fuzz", "common", "fuzz_judge"):
        sys.modules.pop(name, None)


def test_random_recipes_train_or_are_refused(fuzz: Any):
    outcomes = [fuzz.one(11, number)[1:] for number in range(12)]
    assert [why for ended, why in outcomes if ended == "FAULT"] == []
    assert sum(ended == "trained" for ended, _ in outcomes) >= 6


def test_drawn_recipe_is_function_of_its_number(fuzz: Any):
    assert fuzz.drawn(random.Random("3-5")) == fuzz.drawn(random.Random("3-5"))
    methods = {fuzz.drawn(random.Random(f"0-{n}"))["stages"][0]["method"] for n in range(300)}
    assert len(methods) == len(METHODS) + len(fuzz.COMBINED)


@pytest.mark.parametrize(
    ("where", "error", "ended"),
    [
        ("opd.commands.check.checked_recipe", ValueError("a bug"), "FAULT"),
        ("opd.runs.stages.run_recipe", ValueError("a bug"), "FAULT"),
        ("opd.runs.stages.run_recipe", TrainingError("In step 1"), "FAULT"),
        ("opd.runs.stages.run_recipe", TrainingError("Stage 'fuzz' made no update"), "no update"),
    ],
)
def test_error_after_check_is_fault(
    fuzz: Any, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception, ended: str
):
    def fails(*_: object, **__: object) -> None:
        raise error

    number = next(n for n in range(50) if fuzz.one(11, n)[1] == "trained")
    monkeypatch.setattr(where, fails)
    assert fuzz.one(11, number)[1] == ended
