"""Runs with conversations: killed in the middle of one and started again, they are the run that was not stopped."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.runs import Forks, Strike, assert_same, one_stage, prepare

from opd.environments.conversations import FAILED

TRAIN = ("train", "recipe.yaml")
ENDS = {"max_completion_length": 14, "stop": ["=", ";", "7"]}


def talking(**stage: Any) -> dict[str, Any]:
    described = {
        "environment": {"name": "talking:talker", "options": {"longest": 4}, "max_turns": 3},
        "method": "grpo",
        "teacher": None,
        "steps": 4,
        "prompts_per_step": 3,
        "sampling": {**ENDS, "n": 3},
        "optimizer": {"learning_rate": 0.01},
        "checkpoint": {"every": 2},
        "samples_every": 1,
        "evaluate": {
            "data": {"path": "held_out.jsonl"},
            "sampling": {"drawn": ENDS, "greedy": {**ENDS, "temperature": 0}},
        },
    }
    made = one_stage(**described | stage)
    if (described | stage)["teacher"] is None:
        del made["models"]["teacher"]
    return made


RECIPES = {
    "grpo": talking(),
    "opd": talking(teacher="teacher", method="opd", options={"gamma": 0.9}, sampling=ENDS),
    "prune_opd": talking(
        teacher="teacher",
        method="prune_opd",
        options={"k": 4, "threshold": 0.7, "drop": 0.4, "stop": "rollout", "every": 2},
        sampling=ENDS,
    ),
}


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks()
    yield made
    made.close()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for name, recipe in RECIPES.items():
        folders[name] = prepare(tmp_path_factory.mktemp(name) / "work", recipe)
        ended = forks.start(folders[name], *TRAIN)
        assert ended.code == 0, ended.err
    return folders


# A step has 9 or 3 conversations of up to 3 turns, an evaluation 10 of them before the first step.
@pytest.mark.parametrize(
    ("name", "strike"),
    [
        ("grpo", Strike(call="opd.environments.workers.acted", nth=5)),
        ("grpo", Strike(call="opd.environments.workers.acted", nth=45, when="after")),
        ("grpo", Strike(call="opd.stage.exams.KeptResponses.write", nth=1, when="after")),
        ("grpo", Strike(call="opd.environments.workers.acted", nth=70)),
        ("opd", Strike(call="opd.environments.workers.acted", nth=33)),
        ("prune_opd", Strike(call="opd.environments.workers.acted", nth=30)),
    ],
)
def test_killed_in_a_conversation_and_resumed_is_equal(
    tmp_path: Path, forks: Forks, uninterrupted: dict[str, Path], name: str, strike: Strike
):
    folder = prepare(tmp_path / "work", RECIPES[name])
    assert forks.start(folder, *TRAIN, strike=strike).code == -signal.SIGKILL
    again = forks.start(folder, *TRAIN)
    assert again.code == 0, again.err
    assert_same(folder / "run", uninterrupted[name] / "run")


@pytest.mark.parametrize("name", RECIPES)
def test_run_folder_shows_turns(uninterrupted: dict[str, Path], name: str):
    stage = uninterrupted[name] / "run/distil"
    rows = pq.read_table(stage / "samples/step_000001.parquet").to_pylist()
    assert {max(row["turn"]) for row in rows} >= {0, 1}
    for row in rows:
        own = [logp is not None and logp == logp for logp in row["policy_logp"]]
        assert row["trained"] == own or row["pick"] == "follow"
        if row["teacher_logp"] is not None:
            assert [value is not None for value in row["teacher_logp"]] == row["trained"]
        counts = json.loads(row["conversation"])
        assert len(row["turn_rewards"]) == len(row["turn_errors"]) == counts["turns"] == max(row["turn"]) + 1
        assert sum(row["turn_errors"]) == sum(counts.get(name, 0) for name in FAILED)
        assert all(counts.values())
    first, *_ = (json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines())
    assert first["eval/drawn/environment/turns"] > 1
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "train/loss" in line]
    for line in trained:
        assert line["environment/turns"] > 1
        assert line["environment/own_tokens"] == line["rollout/length"]
        own = sum(sum(row["trained"]) for row in rows_of(stage, line["step"]))
        assert line["train/tokens"] == own
    assert (uninterrupted[name] / "run/report.html").exists()


def rows_of(stage: Path, step: int) -> list[dict[str, Any]]:
    rows = pq.read_table(stage / f"samples/step_{step:06d}.parquet").to_pylist()
    return [row for row in rows if row["pick"] != "follow"]


@pytest.mark.parametrize(
    "stage", [{"method": "opd", "teacher": "teacher"}, {"method": "sft", "teacher": None}], ids=["teacher", "sft"]
)
def test_teacher_and_students_of_sft_are_evaluated_in_conversations(
    tmp_path: Path, forks: Forks, stage: dict[str, Any]
):
    evaluate = {
        "data": {"path": "held_out.jsonl"},
        "sampling": {"drawn": {**ENDS, "n": 2}},
        "teacher": stage["teacher"] is not None,
    }
    folder = prepare(tmp_path, talking(**stage, evaluate=evaluate, steps=1))
    ended = forks.start(folder, *TRAIN)
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in (folder / "run/distil/metrics.jsonl").read_text().splitlines()]
    names = ["eval/drawn", *(["eval/teacher/drawn"] if stage["teacher"] else [])]
    for name in names:
        turns = [row[f"{name}/environment/turns"] for row in rows if f"{name}/environment/turns" in row]
        assert turns, name
        assert all(1 <= one <= 3 for one in turns)
        assert any(one > 1 for one in turns), "a single response has one turn"
