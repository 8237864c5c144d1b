"""A run as Python has it: read again from its folder, short in a terminal, and escaped in a notebook."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.runs import EVALUATE, command, one_stage, prepare, two_stages

import opd
from opd.errors import ConfigError, RunError
from opd.stage.columns import COLUMNS, FORMAT, markdown, schema

PAGE = Path(__file__).parents[2] / "docs" / "run_folder.md"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(prepare(tmp_path / "work", one_stage(evaluate=EVALUATE, samples_every=1)))
    return tmp_path


def test_load_run_gives_what_the_run_returned(work: Path):
    run = opd.run("recipe.yaml", quiet=True)
    again = opd.load_run("run")
    assert again.recipe == run.recipe
    assert again.metrics == run.metrics
    assert again.samples == run.samples
    assert again.held_out("before") == run.held_out("before")
    weights = dict(run.student.named_parameters())
    assert all(value.equal(weights[name]) for name, value in again.student.named_parameters())
    assert again.tokenizer.get_vocab() == run.tokenizer.get_vocab()


def test_load_run_reads_a_run_that_has_stopped(work: Path):
    (Path("recipe.yaml")).write_text(yaml.safe_dump(one_stage(steps=3, samples_every=1)))
    opd.run("recipe.yaml", quiet=True)
    Path("run/distil/done.json").unlink()
    before = sorted(path.name for path in Path("run").rglob("*"))
    run = opd.load_run("run")
    assert [row["step"] for row in run.metrics] == [1, 2, 3]
    assert "3 of 3 steps, not finished" in repr(run)
    with pytest.raises(RunError, match=r"stage 'distil' is not finished, so it has no model\. `opd train run/recipe"):
        _ = run.student
    assert sorted(path.name for path in Path("run").rglob("*")) == before
    copied = shutil.copytree("run", "copied")  # whose recipe writes to `run`
    with pytest.raises(RunError, match=r"`opd train copied/recipe\.yaml output_dir=copied` continues the run\."):
        _ = opd.load_run(copied).student
    ended = command("train", "copied/recipe.yaml", "output_dir=copied")
    assert ended.code == 0, ended.err
    assert opd.load_run("copied").student is not None


def test_load_run_refuses_folder_without_recipe(work: Path):
    with pytest.raises(RunError, match=r"nothing holds no run: it has no recipe\.yaml\. Give the folder of a run"):
        opd.load_run("nothing")


def test_load_run_says_what_a_partial_copy_lacks(work: Path):
    """A missing model ended in a FileNotFoundError of an adapter, a cut file in an ArrowInvalid."""
    opd.run("recipe.yaml", quiet=True)
    shutil.rmtree("run/distil/model")
    with pytest.raises(RunError, match=r"run/distil: the stage has finished, and model/ is not there any more\."):
        _ = opd.load_run("run").student
    for cut, read in (
        (Path("run/distil/held_out_before.parquet"), lambda run: run.held_out("before")),
        (Path("run/distil/samples/step_000001.parquet"), lambda run: run.samples),
    ):
        cut.write_bytes(cut.read_bytes()[:500])
        with pytest.raises(RunError, match=rf"{cut} cannot be read \(.*\)\. Copy it again, or remove it to go on"):
            read(opd.load_run("run"))


def test_held_out_names_the_evaluations_of_the_run(work: Path):
    """A name that the run does not have gave no rows, and no word."""
    run = opd.run("recipe.yaml", quiet=True)
    there = "before, step_000002, teacher"
    with pytest.raises(RunError, match=rf"run/distil has no evaluation 'after'; it has {there}\.$"):
        run.held_out("after")
    with pytest.raises(RunError, match=rf"no evaluation 'step_2'; it has {there}\. Did you mean 'step_000002'\?"):
        run.held_out("step_2")
    with pytest.raises(ConfigError, match=r"The run has no stage 'distill'; it has distil\. Did you mean 'distil'\?"):
        run.held_out("before", "distill")


def test_repr_of_run_has_about_five_lines(work: Path):
    run = opd.run("recipe.yaml", quiet=True)
    lines = repr(run).splitlines()
    assert lines[:2] == ["Run 'tiny' in run", "  distil (reverse_kl): 2 of 2 steps, finished"]
    assert lines[2] == "  held out, greedy: reward 0% before, 0% teacher, 0% after"
    assert lines[-1] == "  .student, .tokenizer, .metrics, .samples, .held_out(when)"
    assert len(lines) == 5
    assert str(run) == repr(run)
    recipe = two_stages()
    recipe["output_dir"] = "two"
    assert len(repr(opd.run(recipe, quiet=True)).splitlines()) <= 7


def test_html_of_run_is_a_table_and_escapes_names(work: Path):
    greedy = {"temperature": 0, "max_completion_length": 3}
    recipe = one_stage(evaluate={**EVALUATE, "sampling": {"plain": greedy}})
    recipe["output_dir"] = "run <i>&amp;"
    html = opd.run(recipe, quiet=True)._repr_html_()
    assert "<code>run &lt;i&gt;&amp;amp;</code>" in html
    assert "<tr><th>stage</th><th>held-out reward</th><th>before</th><th>teacher</th><th>after</th></tr>" in html
    assert "<tr><td>distil</td><td>plain</td><td>0%</td><td>0%</td><td>0%</td></tr>" in html
    assert set(re.findall(r"<(\w+)", html)) <= {"div", "b", "code", "br", "table", "tr", "th", "td"}


# --- docs/run_folder.md ----------------------------------------------------------------------------------------------


def keys_in(value: Any) -> set[str]:
    return set(value) if isinstance(value, dict) else set()


def test_page_names_every_file_and_key_of_a_run(work: Path):
    ended = command("train", "recipe.yaml")
    assert ended.code == 0, ended.err
    page = PAGE.read_text()
    named = set(re.findall(r"`([^`\n]+)`", page))
    run = Path("run")
    for file in (path for path in run.rglob("*") if path.is_file()):
        parts = file.relative_to(run).parts
        inside = parts[1:] if parts[0] == "distil" else parts
        top = inside[0] if len(inside) == 1 else f"{inside[0]}/"
        name = re.sub(r"step_\d+", "step_000050", top)
        assert name in named, f"{file}: docs/run_folder.md has no `{name}`"
    lines = [json.loads(line) for line in (run / "distil/timings.jsonl").read_text().splitlines()]
    files = ("environment.json", "distil/keys.json", "distil/progress.json", "distil/done.json")
    keys = set().union(*(keys_in(row) for row in lines), *(keys_in(json.loads((run / f).read_text())) for f in files))
    assert keys - {"seconds"} <= named | {"training"}, keys - named


def test_page_has_table_of_columns_and_format():
    page = PAGE.read_text()
    assert markdown() in page
    assert f"`format` ({FORMAT})" in page
    assert schema().names == [column.name for column in COLUMNS]
    assert all(column.since <= FORMAT for column in COLUMNS)
