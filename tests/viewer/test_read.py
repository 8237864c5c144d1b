"""A run's folder is read as it is: at work, of an earlier version, with damaged lines."""

import json
import os

import numpy as np
import pyarrow as pa
import pytest
from support.run_folders import write

from opd.errors import RunError
from opd.viewer.read import LineReader, as_numbers, read_again, read_columns, read_run


def test_line_reader_returns_new_complete_lines(tmp_path):
    file = tmp_path / "metrics.jsonl"
    reader = LineReader(file)
    assert reader.read() == []
    file.write_bytes(b'{"step": 1}\n{"step": 2')
    assert reader.read() == [{"step": 1}]
    assert reader.read() == []
    with file.open("ab") as more:
        more.write(b'2}\n{"step": 3}\n')
    assert reader.read() == [{"step": 22}, {"step": 3}]
    assert (reader.starts, reader.damaged) == (1, 0)


def test_line_reader_starts_again_when_file_is_replaced(tmp_path):
    file, other = tmp_path / "metrics.jsonl", tmp_path / "new"
    reader = LineReader(file)
    file.write_text('{"step": 1}\n{"step": 2}\n')
    assert len(reader.read()) == 2
    other.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')  # longer, but another file
    os.replace(other, file)
    assert [row["step"] for row in reader.read()] == [1, 2, 3]
    assert reader.starts == 2


def test_line_reader_counts_damaged_lines(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n\xff\xfe\n[1]\n{"step": 2}\n')
    reader = LineReader(file)
    assert [row["step"] for row in reader.read()] == [1, 2]
    assert reader.damaged == 2


def test_read_run_has_stages_files_and_numbers(tmp_path):
    run = read_run(write(tmp_path / "run", stages=("first", "second"), steps=10, every=5))
    assert run.name == "fake"
    assert list(run.stages) == ["first", "second"]
    stage = run.stages["second"]
    assert stage.sample_steps == [5, 10]
    assert stage.whens == ["before", "teacher", "step_000010"]
    assert (stage.steps_done, len(stage.metrics), len(stage.timings)) == (10, 11, 10)
    assert stage.done is not None
    assert stage.keys is not None
    assert stage.keys["settings"] == ["greedy", "sampled"]
    assert stage.keys["reward"] == {"name": "max_words", "correctness": False}


def test_samples_read_only_columns_and_rows_of_choice(tmp_path):
    stage = read_run(write(tmp_path / "run")).stages["distil"]
    whole = stage.samples(5)
    some = stage.samples(5, ["prompt_id", "policy_logp"], [2, 0])
    assert len(whole) == 10
    assert len(some) == 2
    assert some.values("prompt_id") == [1002, 1000]
    assert some.table.column_names == ["prompt_id", "policy_logp"]
    assert np.array_equal(some.numbers("policy_logp", 0), whole.numbers("policy_logp", 2))
    assert some.metadata["reward"] == {"name": "max_words", "correctness": False}
    assert stage.samples(6) is None


@pytest.mark.parametrize("kind", [pa.float32(), pa.int32(), pa.int64(), pa.bool_()])
def test_as_numbers_has_nan_for_null(kind):
    whole = [0, 1, None, 1, 0, 0, 1, None, 1, 1]
    for start in (0, 1, 3, 9, 10):
        expected = [np.nan if one is None else one for one in whole[start:]]
        given = [one if one is None or kind != pa.bool_() else bool(one) for one in whole]
        assert np.array_equal(as_numbers(pa.array(given, kind)[start:]), expected, equal_nan=True)


def test_columns_of_old_files_are_none(tmp_path):
    stage = read_run(write(tmp_path / "run", old=True)).stages["distil"]
    rows = stage.held_out("before")
    assert rows.numbers("signal", 0) is None
    assert rows.value("pick", 0) is None
    assert rows.values("turn") == [None] * len(rows)
    assert not rows.has("signal")
    assert rows.lengths("signal").tolist() == [0] * len(rows)
    assert rows.metadata == {}
    assert stage.keys is None


def test_refresh_reads_what_is_new(tmp_path):
    folder = write(tmp_path / "run", planned=40)
    stage = read_run(folder).stages["distil"]
    assert stage.done is None
    with (folder / "distil" / "metrics.jsonl").open("a") as more:
        more.write(json.dumps({"step": 21, "train/loss": 1.0}) + '\n{"step": 22, "tra')
    assert stage.refresh() is False
    assert stage.steps_done == 21
    kept = (folder / "distil" / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:11]
    (folder / "distil" / "metrics.jsonl").write_bytes(b"".join(kept))  # as `rewind` after a resume
    assert stage.refresh() is True
    assert stage.steps_done == 10


def test_read_run_refuses_folder_without_run(tmp_path):
    with pytest.raises(RunError, match=r"has no recipe.yaml. Give the folder that `opd train` wrote"):
        read_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text("[1, 2]")
    with pytest.raises(RunError, match="is no recipe: it holds list"):
        read_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text("a: [")
    with pytest.raises(RunError, match="cannot be read"):
        read_run(tmp_path)


def test_read_columns_refuses_damaged_file(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(RunError, match="cannot be read"):
        read_columns(tmp_path / "x.parquet")


def test_read_again_leaves_stages_that_another_thread_reads(tmp_path):
    run = read_run(write(tmp_path / "run"))
    before = run.stages
    again = read_again(run)
    assert list(before) == list(again.stages) == ["distil"]
    assert again.stages is not before
    assert again.stages["distil"] is before["distil"]
