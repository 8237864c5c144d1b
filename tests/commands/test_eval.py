"""`opd eval --recipe`: a model is measured as a stage of the recipe measures its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from support.runs import EVALUATE, command, one_stage, prepare, sums, tiny_model, write_rows

import opd
from opd.recipe.load import load_recipe
from opd.runs.prepare import Given, prepare_held_out
from opd.runs.prepare import prepare as prepare_stage

GAME = "opd.environments.guessing:guessing"


def trained(folder: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """The evaluations of a run in `folder`, in order: before and after training."""
    prepare(folder, recipe)
    monkeypatch.chdir(folder)
    opd.run("recipe.yaml", quiet=True)
    lines = (folder / "run/distil/metrics.jsonl").read_text().splitlines()
    found: list[dict[str, float]] = []
    for line in map(json.loads, lines):
        measured = {key.removeprefix("eval/"): value for key, value in line.items() if key.startswith("eval/")}
        if measured:
            found.append(measured)
    return found


def measured(*arguments: str) -> dict[str, float]:
    ended = command("eval", *arguments, "--json")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)["metrics"]


def test_saved_model_has_the_numbers_of_the_runs_last_evaluation(tmp_path, monkeypatch):
    after = trained(tmp_path, one_stage(evaluate={**EVALUATE, "every": 0, "pass_at": [1, 2]}), monkeypatch)[-1]
    found = measured("run/distil/model", "--recipe", "recipe.yaml", "--responses", "rows.jsonl")
    assert {"greedy/reward", "drawn/reward", "drawn/pass@2", "drawn/length"} <= found.keys()
    assert found == {key: after[key] for key in found}
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [(row["setting"], row["prompt_id"], row["sample"]) for row in rows] == [
        *(("greedy", i, 0) for i in range(5)),
        *(("drawn", i, s) for i in range(5) for s in range(2)),
    ]
    mean = sum(row["metrics"]["reward"] for row in rows[5:]) / 10
    assert mean == pytest.approx(found["drawn/reward"])


def test_overrides_limit_seed_and_teacher(tmp_path, monkeypatch):
    trained(tmp_path, one_stage(evaluate={**EVALUATE, "every": 0}), monkeypatch)
    model = ("run/distil/model", "--recipe", "recipe.yaml")
    assert measured(*model, "--limit", "3")["greedy/responses"] == 3
    assert measured(*model, "--set", "stages.distil.evaluate.sampling.drawn.n=4")["drawn/responses"] == 20
    texts = {}
    for seed in ("0", "7"):
        measured(*model, "--seed", seed, "--responses", "rows.jsonl")
        rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
        texts[seed] = [row["response"] for row in rows]
    assert texts["0"][:5] == texts["7"][:5], "greedy, nothing is drawn"
    assert texts["0"][5:] != texts["7"][5:]
    own = measured(*model, "--teacher", "run/distil/model")
    assert own["reverse_kl"] == pytest.approx(0, abs=1e-9)


def test_training_data_are_not_read(tmp_path, monkeypatch):
    trained(tmp_path, one_stage(evaluate=EVALUATE), monkeypatch)
    (tmp_path / "train.jsonl").unlink()
    assert measured("run/distil/model", "--recipe", "recipe.yaml")["greedy/responses"] == 5


def test_parts_that_measure_nothing_are_not_read(tmp_path, monkeypatch):
    trained(tmp_path, one_stage(evaluate={**EVALUATE, "every": 0}), monkeypatch)
    alone = {**EVALUATE, "teacher": False, "kl": False}
    broken = one_stage(evaluate=alone, method="nowhere.mine:method", teacher=None, reward={"name": "nowhere:fn"})
    broken["models"]["student"] = {"path": "./nowhere"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(broken))
    assert measured("run/distil/model", "--recipe", "recipe.yaml")["greedy/responses"] == 5


def test_what_cannot_be_measured_is_refused_by_its_key(tmp_path, monkeypatch):
    prepare(tmp_path, one_stage(evaluate={**EVALUATE, "pass_at": [1, 3]}))
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    for more in (
        (),
        ("--set", "stages.distil.evaluate.pass_at=[1]", "--set", "models.student.device=meta"),
        ("--teacher", "--limit", "6"),
    ):
        ended = command("eval", "run/distil/model", "--recipe", "recipe.yaml", *more)
        assert ended.code == 2
        said.append(" ".join(ended.err.split()))
    assert "evaluate.pass_at has pass@3, and the settings sample at most 2 responses per prompt" in said[0]
    assert "models.student.device is 'meta', which cannot be used" in said[1]
    assert "got --recipe recipe.yaml and DATA (6)" in said[2], "--limit was read as the teacher"


CHAT = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}={% if plus is defined %}+{% endif %}{% endif %}"
)


def test_model_from_a_stage_reads_as_the_model_there(tmp_path, monkeypatch):
    """The template's options are of the model, whatever it is called; check, run and eval agree."""
    evaluate = {**EVALUATE, "data": {"path": "held_out.jsonl", "chat": True}, "every": 0}
    recipe = one_stage(evaluate=evaluate, data={"path": "train.jsonl", "chat": True})
    for model in recipe["models"].values():
        model |= {"chat_template": CHAT}
    recipe["models"]["student"]["template_options"] = {"plus": True}
    recipe["models"]["later"] = {"from_stage": "distil"}
    recipe["stages"].append({**recipe["stages"][0], "name": "again", "train": "later"})
    prepare(tmp_path, recipe)
    monkeypatch.chdir(tmp_path)
    assert "the student reads (6 tokens): '0+0==+'" in command("check", "recipe.yaml").out
    opd.run("recipe.yaml", quiet=True)
    for stage in ("distil", "again"):
        rows = pq.read_table(f"run/{stage}/held_out_before.parquet").to_pylist()
        assert rows[0]["student_reads"] == "2+2==+", stage
    last = json.loads((tmp_path / "run/again/metrics.jsonl").read_text().splitlines()[-1])
    found = measured("run/again/model", "--recipe", "recipe.yaml")
    assert found == {key: last[f"eval/{key}"] for key in found}


def test_peers_are_measured_with_the_ids_of_the_model_train():
    spec = load_recipe("copd", []).stage("copd")
    exams, _ = prepare_held_out(spec, 0)
    own = prepare_stage(spec.as_seen_by(spec.train), Given(), 0)
    for name, task in own.tasks.items():
        assert task.held_out is not None
        assert [p.id for p in exams[name].prompts] == [p.id for p in task.held_out.prompts]


def test_tasks_are_measured_by_name(tmp_path, monkeypatch):
    one = {"data": {"path": "train.jsonl"}, "teacher": "teacher", "evaluate": {**EVALUATE, "every": 0}}
    two = {**one, "evaluate": {**EVALUATE, "every": 0, "data": {"path": "other.jsonl"}}}
    write_rows(tmp_path / "other.jsonl", sums(17, 3))
    recipe = one_stage(tasks={"a": one, "b": two}, data=None, teacher=None)
    after = trained(tmp_path, recipe, monkeypatch)[-1]
    found = measured("run/distil/model", "--recipe", "recipe.yaml")
    assert (found["a/greedy/responses"], found["b/greedy/responses"]) == (5, 3)
    assert found == {key: after[key] for key in found}


def test_conversations_are_led_with_the_stages_environment(tmp_path, monkeypatch):
    student = tiny_model(2, characters="abcdefghijklmnopqrstuvwxyz01234;<>?")
    data = {"path": "opd.data.toy:guesses", "options": {"count": 8}}
    recipe = one_stage(
        method="grpo",
        teacher=None,
        data=data,
        environment={"name": GAME, "max_turns": 3},
        sampling={"n": 2, "max_completion_length": 9, "stop": [";"]},
        evaluate={"data": data, "sampling": {"drawn": {"n": 2, "max_completion_length": 9, "stop": [";"]}}},
    )
    recipe = {**recipe, "models": {"student": student}}
    after = trained(tmp_path, recipe, monkeypatch)[-1]
    found = measured("run/distil/model", "--recipe", "recipe.yaml", "--responses", "rows.jsonl")
    assert found["drawn/environment/turns"] > 1
    assert found == {key: after[key] for key in found}
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert sum(row["tokens"] for row in rows) / len(rows) == found["drawn/length"], "the student's alone"
    assert sum(len(row["turns"]) for row in rows) / len(rows) == found["drawn/environment/turns"]
    for row in rows:
        said = "".join(turn["environment"] + turn["student"] for turn in row["turns"])
        assert said.replace("<pad>", "").replace("<eos>", "") == row["response"]
        assert [turn["environment"] in ("<", ">", "?") for turn in row["turns"]] == [False] + [True] * (
            len(row["turns"]) - 1
        )
        assert sum(turn["reward"] or 0 for turn in row["turns"]) == row["metrics"]["reward"]


def test_stage_without_an_evaluation_is_refused(tmp_path, monkeypatch):
    prepare(tmp_path, one_stage())
    monkeypatch.chdir(tmp_path)
    ended = command("eval", "run/distil/model", "--recipe", "recipe.yaml")
    assert ended.code == 2
    assert "no stage of this one has an `evaluate` section. Add one, or give DATA" in ended.err
    first, last = one_stage(evaluate=EVALUATE), one_stage(name="later")
    both = {**first, "stages": [*first["stages"], *last["stages"]]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(both))
    ended = command("eval", "run/distil/model", "--recipe", "recipe.yaml", "--stage", "later")
    assert ended.code == 2
    assert "stage 'later' has no `evaluate` section. Stages with one: distil" in ended.err
