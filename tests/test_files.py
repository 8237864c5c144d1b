"""Paths of a user, and the lines of metrics.jsonl: written whole, numbers finite, a damaged file named."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

import opd
from opd.errors import ConfigError, RunError, TrainingError
from opd.files import append_line, check_finite, expanded, read_lines


def test_append_line_writes_json_with_step_first(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    append_line(file, 0, {"b/x": 1, "a/y": 0.1})
    append_line(file, 1, {})
    assert file.read_text() == '{"step": 0, "a/y": 0.1, "b/x": 1}\n{"step": 1}\n'
    assert [row for _, row in read_lines(file)] == [{"step": 0, "a/y": 0.1, "b/x": 1}, {"step": 1}]


def test_read_lines_skips_partial_last_line_and_names_damaged(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    assert read_lines(file) == []
    append_line(file, 0, {"a/b": 1.0})
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:-3])
    assert [row["step"] for _, row in read_lines(file)] == [0]
    for damage in (b'{"step": 1, "a/', b"[1]", b'{"a/b": 2}', b"\0\0\0"):
        file.write_bytes(whole + damage + b"\n" + whole)
        with pytest.raises(RunError, match=r"metrics\.jsonl, line 2 is damaged .* Remove that line to continue"):
            read_lines(file)


def test_append_line_leaves_partial_line_of_its_own(tmp_path: Path):
    file = tmp_path / "m.jsonl"
    file.write_text('{"step": 0}\n{"ste')
    append_line(file, 1, {})
    append_line(file, 2, {})
    assert file.read_text().splitlines() == ['{"step": 0}', '{"ste', '{"step": 1}', '{"step": 2}']


def test_append_line_raises_run_error_when_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RunError, match=r"missing/m\.jsonl could not be written \(No such file or directory\)\. Free"):
        append_line(tmp_path / "missing" / "m.jsonl", 0, {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match=r"folder cannot be read \(Is a directory\)"):
        read_lines(tmp_path / "folder")
    monkeypatch.setattr("opd.files.os.write", lambda descriptor, line: len(line) - 1)
    with pytest.raises(RunError, match=r"took only 11 of the 12 bytes of step 3 \(disk full\?\)\. Free space"):
        append_line(tmp_path / "m.jsonl", 3, {})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_append_line_refuses_non_finite_numbers(tmp_path: Path, value: float):
    with pytest.raises(TrainingError, match=f"In step 4, 'train/loss' is {value}.*checkpoints are untouched"):
        append_line(tmp_path / "m.jsonl", 4, {"a/b": 1.0, "train/loss": value})
    assert not (tmp_path / "m.jsonl").exists()
    with pytest.raises(TrainingError, match=re.escape(f"In the summary, 'eval.scores[1]' is {value}")):
        check_finite("the summary", {"eval": {"name": "x", "scores": [1.0, value]}})


def test_expanded_is_the_only_place_that_expands_paths():
    """Each path of a user goes through one helper, so that `~` is the home folder in all of them."""
    found = [file.name for file in (Path(opd.__file__).parent).rglob("*.py") if "expanduser(" in file.read_text()]
    assert found == ["files.py"]


def test_expanded_refuses_paths_that_cannot_be(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert [str(expanded(one)) for one in ("~", "~/a", "a/~", "./~", Path("b"))] == [
        *("/home/me", "/home/me/a", "a/~", "~", "b")
    ]
    for path, said in (("a\0b", "holds a character"), ("a\ud83d", "holds a character"), ("~nouser/x", "home folder")):
        with pytest.raises(ConfigError, match=said):
            expanded(path)
