"""`opd check --json`: the same lines and the same errors, for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.runs import command, one_stage, prepare, two_stages


@pytest.mark.parametrize("recipe", [one_stage(), two_stages()], ids=["one stage", "two stages"])
def test_check_json_holds_the_lines_of_check(recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(prepare(tmp_path, recipe))
    text, ended = command("check", "recipe.yaml"), command("check", "recipe.yaml", "--json")
    found = json.loads(ended.out)
    assert ended.code == 0
    assert (found["recipe"], found["ok"]) == ("recipe.yaml", True)
    assert [stage["name"] for stage in found["stages"]] == [stage["name"] for stage in recipe["stages"]]
    assert found["stages"][-1]["method"] == recipe["stages"][-1]["method"]
    lines = [*found["notes"], *(line for stage in found["stages"] for line in stage["lines"])]
    assert [*lines, "recipe.yaml: nothing wrong found."] == text.out.splitlines()


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"stepps": 3}, "ConfigError", "unknown key `stages.0.stepps`. Did you mean 'steps'?"),
        ({"data": {"path": "none.jsonl"}}, "DataError", "none.jsonl"),
    ],
)
def test_check_json_holds_the_error_of_check(change, kind, said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(prepare(tmp_path, one_stage(**change)))
    text, ended = command("check", "recipe.yaml"), command("check", "recipe.yaml", "--json")
    found = json.loads(ended.out)
    assert ended.code == text.code == 2
    assert (found["ok"], found["error"]["type"]) == (False, kind)
    assert said in found["error"]["message"]
    assert text.err == f"{kind}: {found['error']['message']}\n"


def test_check_json_has_status_1_for_an_error_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(prepare(tmp_path, {**one_stage(), "output_dir": "recipe.yaml"}))
    ended = command("check", "recipe.yaml", "--json")
    assert ended.code == 1
    assert json.loads(ended.out)["error"]["type"] == "RunError"
