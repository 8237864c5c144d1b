"""What the doctor found before a run is in the folder of that run, and of no other."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
from support.runs import one_stage

from opd.recipe.load import parse_recipe
from opd.stage.doctor_file import keep
from opd.stage.folder import RunDir


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_findings_come_to_the_folder_of_their_recipe():
    recipe, other = parse_recipe(one_stage()), parse_recipe({**one_stage(), "seed": 1, "output_dir": "other"})
    keep(recipe, '{"verdict": "go"}')
    assert not Path("run").exists()
    for one in (recipe, other):
        with closing(RunDir.open(one.folder, one, {})):
            pass
    assert json.loads(Path("run/doctor.json").read_text()) == {"verdict": "go"}
    assert not Path("other/doctor.json").exists()
    keep(recipe, '{"verdict": "stop"}')
    assert json.loads(Path("run/doctor.json").read_text()) == {"verdict": "stop"}


def test_findings_go_with_the_run_that_is_replaced():
    recipe = parse_recipe(one_stage())
    keep(recipe, '{"verdict": "go"}')
    with closing(RunDir.open(recipe.folder, recipe, {})):
        pass
    changed = recipe.model_copy(update={"seed": 1})
    with closing(RunDir.open(recipe.folder, changed, {})) as run:
        assert "this run replaces it" in run.notes[0]
    assert not Path("run/doctor.json").exists()
