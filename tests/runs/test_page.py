"""A run writes its page at the end of a stage; a page that fails is a note."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.runs import EVALUATE, command, one_stage, prepare

from opd.viewer.content import stage_content
from opd.viewer.pack import opened, slices
from opd.viewer.read import read_run


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    folder = prepare(tmp_path / "work", one_stage(evaluate=EVALUATE, samples_every=1))
    monkeypatch.chdir(folder)
    return folder / "run"


def test_opd_train_writes_page_of_what_it_measured(work: Path):
    ended = command("train", "recipe.yaml")
    assert ended.code == 0, ended.err
    assert "report.html: 0." in ended.out + ended.err
    text = (work / "report.html").read_text()
    assert "final_number" in text
    assert "written by an earlier version" not in text
    run = read_run(work)
    stage = run.stages["distil"]
    content = stage_content(run, stage)
    assert content.data["steps"][0]["step"] == 1
    head, columns = opened(content.blocks["s1"])
    rows = stage.samples(1)
    assert rows is not None
    for row, own in zip(head["rows"], slices(head["rows"], columns), strict=True):
        assert row["pick"] in ("least", "most", "longest", "shortest", "chance")
        i = next(
            i
            for i, key in enumerate(
                zip(rows.values("prompt_id"), rows.values("sample"), rows.values("pick"), strict=True)
            )
            if key == (row["id"], row["sample"], row["pick"])
        )
        assert np.abs(own["q"] - rows.numbers("teacher_logp", i)).max() <= 0.0051
        assert own["teacher_k"].tolist() == [len(one) for one in rows.value("teacher_top_ids", i)]
    assert set(content.blocks) >= {"curves", "held", "follow"}


def test_page_that_cannot_be_written_is_a_note(work: Path):
    (work / "report.html").mkdir(parents=True)
    (work / "recipe.yaml").write_text("")  # so that the folder counts as a run's
    ended = command("train", "recipe.yaml")
    assert ended.code == 0, ended.err
    assert "report: not written (ConfigError: " in ended.out + ended.err
    assert (work / "distil" / "model").is_dir()
