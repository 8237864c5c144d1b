"""Rows of reasoning-gym: the same whatever else is read, in every process."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest

from opd.data.gym import BLOCK, HASHED, gym_rows
from opd.data.prompts import load_prompts
from opd.errors import ConfigError, DataError
from opd.recipe.schema import DataSection

gym = pytest.importorskip("reasoning_gym")


def questions(task: str, stop: int, **options: object) -> list[str]:
    return [entry["question"] for entry in gym_rows(task, options, stop)]


@pytest.mark.parametrize("task", ["acre", "list_functions", "gsm_symbolic", "chain_sum"])
def test_limit_changes_no_row(task):
    assert questions(task, 3) == questions(task, 9)[:3] == questions(task, 3)


def test_skip_leaves_out_what_an_earlier_stage_used():
    used = load_prompts(DataSection(path="reasoning_gym:acre", limit=4))
    others = load_prompts(DataSection(path="reasoning_gym:acre", skip=4, limit=4))
    both = load_prompts(DataSection(path="reasoning_gym:acre", limit=8))
    assert [p.content for p in (*used, *others)] == [p.content for p in both]
    assert [p.id for p in others] == [4, 5, 6, 7]


def test_rows_of_later_blocks_are_those_of_a_larger_data_set():
    """True of every task whose row i is drawn from the seed plus i."""
    larger = gym.create_dataset("chain_sum", seed=3, size=BLOCK + 2)
    rows = list(islice(gym_rows("chain_sum", {"seed": 3}, BLOCK + 2), BLOCK - 1, None))
    assert [row["question"] for row in rows] == [larger[i]["question"] for i in range(BLOCK - 1, BLOCK + 2)]


def test_size_of_the_options_is_the_size_of_the_data_set():
    own = gym.create_dataset("acre", seed=0, size=12)
    assert questions("acre", 20, size=12) == [own[i]["question"] for i in range(12)]


def test_row_i_of_a_seed_is_row_i_plus_1_of_the_seed_before():
    """Why `opd check` counts held-out prompts that are training prompts."""
    assert questions("chain_sum", 5, seed=1)[:4] == questions("chain_sum", 5, seed=0)[1:]


def test_rows_do_not_touch_global_random_numbers():
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    rows = gym_rows("list_functions", {}, 2)
    next(rows)
    assert (random.random(), np.random.random()) == expected


def test_rows_do_not_depend_on_the_hash_seed():
    task = "isomorphic_strings"
    code = (
        "import json; from opd.data.gym import gym_rows; "
        f"print(json.dumps([e['question'] + e['answer'] for e in gym_rows({task!r}, {{}}, 4)]))"
    )
    found = []
    for seed in ("0", "1"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[0] == found[1]
    assert task in HASHED


def test_other_process_reports_errors_and_wrong_options(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    with pytest.raises(ConfigError, match="no option 'min_lettrs'"):
        list(gym_rows("isomorphic_strings", {"min_lettrs": 3}, 2))
    monkeypatch.setattr("opd.data.gym.CHILD", "raise SystemExit(7)")
    with pytest.raises(DataError, match=r"of reasoning_gym:word_ladder with PYTHONHASHSEED=0 ended with status 7"):
        list(gym_rows("word_ladder", {}, 2))


def test_row_that_cannot_be_made_is_named(monkeypatch):
    def fails(self: object, index: int) -> None:
        raise IndexError("no word")

    monkeypatch.setattr(type(gym.create_dataset("chain_sum")), "__getitem__", fails)
    message = r"Row 0 of reasoning_gym:chain_sum cannot be made with the options \{\}: IndexError: no word\. Change"
    with pytest.raises(DataError, match=message):
        list(gym_rows("chain_sum", {}, 2))


@pytest.mark.parametrize(("options", "got"), [({"size": "ten"}, "size: 'ten'"), ({"seed": -1}, "seed: -1")])
def test_size_and_seed_are_whole_numbers(options, got):
    with pytest.raises(ConfigError, match=f"reasoning_gym:chain_sum got `{got}`. Give a whole number, at least"):
        list(gym_rows("chain_sum", options, 2))
