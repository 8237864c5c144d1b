"""A row has the same values through every door: a file, its compressed form, a folder and its splits."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from opd.data.prompts import load_prompts
from opd.errors import DataError
from opd.recipe.load import parse_section
from opd.recipe.schema import DataSection
from opd.types import Prompt

ROWS = [
    {"prompt": "when?", "answer": "2024-01-05", "n": 3},
    {"prompt": "how many?", "answer": 3, "n": 3.5},
    {"prompt": "where?", "answer": "here", "n": None, "more": {"a": 1}},
]


def load(path: Path | str, **fields: Any) -> list[Prompt]:
    return load_prompts(parse_section(DataSection, {"path": str(path), **fields}, "data"))


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path):
    """Two files of training rows, one of test rows, named as `datasets` expects."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "train-00000-of-00002.jsonl").write_text(lines(ROWS[:2]))
    (data / "train-00001-of-00002.jsonl").write_text(lines(ROWS[2:]))
    (data / "test-00000-of-00001.jsonl").write_text(lines(ROWS[1:2]))
    return tmp_path


def test_folder_gives_rows_of_its_files(folder, tmp_path):
    (tmp_path / "one.jsonl").write_text(lines(ROWS))
    direct = load(tmp_path / "one.jsonl")
    (tmp_path / "one.jsonl").unlink()
    assert load(folder) == direct
    assert [(p.answer, p.metadata["n"]) for p in direct] == [("2024-01-05", 3), (3, 3.5), ("here", None)]
    assert type(direct[0].metadata["n"]) is int
    assert [p.content for p in load(folder, split="test")] == ["how many?"]


@pytest.mark.parametrize(
    ("split", "contents"),
    [
        ("train[1:]", ["how many?", "where?"]),
        ("test+train[:1]", ["how many?", "when?"]),
        ("train[:34%]", ["when?"]),
        ("all", ["when?", "how many?", "where?", "how many?"]),
    ],
)
def test_folder_reads_expressions_of_splits(folder, split, contents):
    assert [p.content for p in load(folder, split=split)] == contents


def test_folder_reads_options_that_choose_files(folder):
    assert [p.content for p in load(folder, options={"data_files": "data/test*"})] == ["how many?"]
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files: data/test*\n"
        "- config_name: big\n  data_files: data/train*\n---\n"
    )
    assert [p.content for p in load(folder, options={"name": "small"})] == ["how many?"]
    assert len(load(folder, options={"name": "big"})) == 3


def test_folder_refuses_unknown_split(folder):
    with pytest.raises(DataError, match=r"could not load the split 'tets' .*the splits are .*Did you mean 'test'\?"):
        load(folder, split="tets")


def test_folder_leaves_other_files_to_datasets(tmp_path):
    """A README.md that says how to read the files, and a format of `datasets` alone."""
    (tmp_path / "train.csv").write_text("prompt;answer\na;1\n")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: train.csv\n  sep: ';'\n---\n"
    )
    assert [(p.content, p.answer) for p in load(tmp_path)] == [("a", 1)]


def test_compressed_file_equals_file(tmp_path):
    forms = {
        ".jsonl": lines(ROWS[:2]),
        ".json": json.dumps(ROWS[:2]),
        ".csv": "prompt,answer\nwhen?,2024-01-05\nhow many?,3\n",
        ".tsv": "prompt\tanswer\nwhen?\t2024-01-05\nhow many?\t3\n",
    }
    for ending, content in forms.items():
        (tmp_path / f"rows{ending}").write_text(content)
        (tmp_path / f"rows{ending}.gz").write_bytes(gzip.compress(content.encode()))
        prompts = load(tmp_path / f"rows{ending}")
        assert [(p.content, str(p.answer)) for p in prompts] == [("when?", "2024-01-05"), ("how many?", "3")]
        assert load(tmp_path / f"rows{ending}.gz") == prompts


def test_folder_reads_compressed_files(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode()))
    assert [p.answer for p in load(tmp_path)] == ["2024-01-05", 3, "here"]


def test_compressed_file_refuses_damage(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode())[:-9])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz is not a readable gzip file: .*Compress it again"):
        load(tmp_path / "rows.jsonl.gz")
    (tmp_path / "rows.jsonl.gz").write_text("plain")
    with pytest.raises(DataError, match="is not a readable gzip file"):
        load(tmp_path / "rows.jsonl.gz")


def test_json_file_reads_an_object_per_line(tmp_path):
    (tmp_path / "rows.json").write_text(lines(ROWS))
    assert [p.answer for p in load(tmp_path / "rows.json")] == ["2024-01-05", 3, "here"]
    assert load(tmp_path) == load(tmp_path / "rows.json")
