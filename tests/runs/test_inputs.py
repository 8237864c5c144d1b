"""Fingerprints of rows, models and code, and how a resumed run reads them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from support.runs import CHARACTERS, Forks, Strike, command, one_stage, prepare, sums, tiny_model, write_rows

from opd.files import read_table
from opd.models import saving
from opd.models.loading import load_model
from opd.models.new import character_tokenizer
from opd.recipe.schema import ModelSpec
from opd.runs.inputs import SAMPLES, model_fingerprint, modules_of, own_code, rows_fingerprint
from opd.types import Prompt

TRAIN = ("train", "recipe.yaml")
ROW = Prompt(id=0, content="1+1=", answer=2)


def test_rows_fingerprint_reads_every_field():
    changed = [replace(ROW, content="x"), replace(ROW, answer=3), replace(ROW, metadata={"a": 1}), replace(ROW, id=1)]
    found = {rows_fingerprint([row]) for row in (ROW, *changed)}
    assert len(found) == 5
    assert all(one.startswith("1 rows, ") for one in found)
    assert rows_fingerprint([ROW, changed[0]]) != rows_fingerprint([changed[0], ROW])


def test_rows_fingerprint_ignores_addresses_of_objects():
    rows = [replace(ROW, metadata={"image": object()}) for _ in range(2)]
    assert rows_fingerprint(rows[:1]) == rows_fingerprint(rows[1:])


def test_model_fingerprint_reads_small_files_and_samples_of_large_ones(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.md").write_text("mine")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(8 << 20))
    first = model_fingerprint(tmp_path)
    assert first.startswith("2 files, ")
    (tmp_path / "notes.md").write_text("other")
    assert model_fingerprint(tmp_path) == first
    found = {first}
    for place in (0, (8 << 20) - 1, (8 << 20) // (SAMPLES - 1)):
        content = bytearray(8 << 20)
        content[place] = 1
        weights.write_bytes(content)
        found.add(model_fingerprint(tmp_path))
    (tmp_path / "config.json").write_text('{"a": 1}')
    found.add(model_fingerprint(tmp_path))
    assert len(found) == 5


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    before = set(sys.modules)
    (tmp_path / "my_tables.py").write_text(
        "SCORES = {'a': 1.0}\n\n\ndef score(text):\n    return SCORES.get(text, 0.0)\n"
    )
    (tmp_path / "my_reward.py").write_text(
        "import json\n\nfrom my_tables import score\n\n\ndef reward(prompt, text):\n    return score(text)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def names(module: str) -> list[str]:
    return sorted(own_code({module}))


def test_own_code_is_a_module_and_what_it_imports(modules: Path):
    import my_reward  # pyright: ignore[reportMissingImports]

    assert modules_of(my_reward.reward) == modules_of(partial(my_reward.reward, None)) == {"my_reward"}
    assert own_code({"my_reward"}) == {name: modules / name for name in ("my_reward.py", "my_tables.py")}
    assert own_code(modules_of(len)) == {}
    (modules / "my_tables.py").unlink()  # as of a notebook whose file was moved
    assert names("my_reward") == ["my_reward.py"]


def test_own_code_follows_every_import_statement(modules: Path):
    package = modules / "my_package"
    (package / "inner").mkdir(parents=True)
    files = {
        "__init__.py": "from .inner import reward\n",
        "inner/__init__.py": "from my_package.weights import W\n\n\ndef reward(prompt, text):\n    return W\n",
        "weights.py": "import torch\n\nW = 1.0\n\n\ndef late():\n    from . import more\n",
        "more.py": "import my_tables\nimport nowhere.at_all\n",
        "unused.py": "",
    }
    for name, text in files.items():
        (package / name).write_text(text)
    import my_package  # pyright: ignore[reportMissingImports]

    assert modules_of(my_package.reward) == {"my_package.inner"}
    used = [f"my_package/{name}" for name in sorted(files) if name != "unused.py"]
    assert names("my_package") == [*used, "my_tables.py"]
    assert not {"my_package.more", "my_tables"} & set(sys.modules)  # nothing is imported to look
    (package / "more.py").write_text("def broken(:\n")
    assert names("my_package") == used


def test_own_code_of_installed_package_is_that_package(modules: Path, monkeypatch: pytest.MonkeyPatch):
    site = modules / "site-packages"
    (site / "my_installed").mkdir(parents=True)
    (site / "my_installed/__init__.py").write_text("from my_other import x\nfrom my_installed.part import y\n")
    (site / "my_installed/part.py").write_text("y = 1\n")
    (site / "my_other.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(site)
    import my_installed  # noqa: F401  # pyright: ignore[reportMissingImports]

    assert names("my_installed") == ["my_installed/__init__.py", "my_installed/part.py"]


REWARD = "def reward(prompt, text):\n    return float({answer} in text)\n"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("rows", "distil, training rows: 12 rows, "),
        ("held_out", "distil, held-out rows: 5 rows, "),
        ("model", "distil, weights of model teacher: "),
        ("tokenizer", "distil, tokenizer of model student: "),
        ("code", "distil, code mine.py: "),
    ],
)
def test_train_refuses_changed_inputs(tmp_path: Path, change: str, named: str, forks: Forks):
    evaluate = {"data": {"path": "held_out.jsonl"}, "sampling": {"greedy": {"max_completion_length": 2}}}
    recipe = one_stage(reward={"name": "mine:reward"}, steps=2, evaluate=evaluate)
    folder = prepare(tmp_path / "work", recipe)
    if change == "model":
        saving.save(load_model(ModelSpec(**tiny_model(5)), name="teacher"), folder / "teacher")
        recipe["models"]["teacher"] = {"path": "teacher"}
        prepare(folder, recipe)
    if change == "tokenizer":
        character_tokenizer(CHARACTERS).save_pretrained(folder / "characters")
        recipe["models"]["student"]["tokenizer"] = "characters"
        prepare(folder, recipe)
    (folder / "mine.py").write_text(REWARD.format(answer="'1'"))
    assert forks.start(folder, *TRAIN, "steps=1").code == 0
    before = (folder / "run/recipe.yaml").read_text()
    weights = folder / "teacher/model.safetensors"
    if change == "rows":
        write_rows(folder / "train.jsonl", sums(0, 3))
    elif change == "held_out":
        write_rows(folder / "held_out.jsonl", sums(7, 5))
    elif change == "tokenizer":
        with (folder / "characters/tokenizer_config.json").open("a") as settings:
            settings.write("\n")
    elif change == "code":
        (folder / "mine.py").write_text(REWARD.format(answer="'2'"))
    else:
        weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    refused = forks.start(folder, *TRAIN)
    assert refused.code == 1
    assert f"  {named}" in refused.err
    assert "--accept-changes" in refused.err
    assert (folder / "run/recipe.yaml").read_text() == before
    accepted = forks.start(folder, *TRAIN, "--accept-changes")
    assert accepted.code == 0, accepted.err
    assert f"changed since the last start: {named}" in accepted.out
    assert "distil: continuing after step 1 of 2" in accepted.out
    assert named.split(":")[0] in (folder / "run/changes.jsonl").read_text()


KEPT = Strike(call="opd.stage.kept_responses.KeptResponses.write", when="after", signals=("SIGTERM",))


@pytest.mark.parametrize(("change", "kept"), [("nothing", True), ("rows", False), ("recipe", False)])
def test_responses_kept_before_step_one_are_of_the_same_run(tmp_path: Path, change: str, kept: bool, forks: Forks):
    """A stop in the evaluation "before", then fewer held-out rows or another student: all is sampled again."""
    sampling = {name: {"max_completion_length": 2} for name in ("first", "second")}
    recipe = one_stage(evaluate={"data": {"path": "held_out.jsonl"}, "sampling": sampling}, steps=1)
    folder = prepare(tmp_path / "work", recipe)
    assert forks.start(folder, *TRAIN, strike=KEPT).code == 143
    file = folder / "run/distil/evaluating/before..0.json"
    file.write_text(file.read_text().replace('"text": "', '"text": "kept'))
    if change == "recipe":
        prepare(folder, recipe | {"models": recipe["models"] | {"student": tiny_model(9)}})
    elif change == "rows":
        write_rows(folder / "held_out.jsonl", sums(12, 3))
    again = forks.start(folder, *TRAIN)
    assert again.code == 0, again.err
    rows = read_table(folder / "run/distil/held_out_before.parquet")
    assert len(rows) == 2 * (3 if change == "rows" else 5)
    assert any(row["response"].startswith("kept") for row in rows) == kept
    assert ("this run replaces it" in again.out) != kept


def test_train_makes_finished_run_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = one_stage(steps=4, checkpoint={"every": 1}, samples_every=0)
    whole = prepare(tmp_path / "whole", recipe)
    longer = prepare(tmp_path / "longer", recipe)
    monkeypatch.chdir(whole)
    assert command(*TRAIN).code == 0
    monkeypatch.chdir(longer)
    assert command(*TRAIN, "steps=2").code == 0
    again = command(*TRAIN)
    assert again.code == 0, again.err
    assert "changed since the last start: stages.distil.steps: 2 -> 4" in again.out
    assert "distil: continuing after step 2 of 4" in again.out
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (longer / "run/distil" / name).read_bytes() == (whole / "run/distil" / name).read_bytes()
