"""Files of records: every value returns bit for bit, files of other programs are read, and what each refusal says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from opd.data import records
from opd.errors import ConfigError, DataError, RunError
from opd.pieces.supports import sampled, top_k
from opd.types import Prompt, Rollout, ScoreRequest, Scores

MESSAGES = ({"role": "system", "content": "é\u2028"}, {"role": "user", "content": "1+1="})
# Negative zero, the smallest number, infinity and a NaN with a payload, which a way through text would lose.
SPECIAL = torch.tensor([-(2**31), 1, 0x7F800000, 0x7FC12345, 0x3DCCCCCD], dtype=torch.int32).view(torch.float32)
SINGLE = pa.list_(pa.list_(pa.int64(), 1))  # lists of lists of one entry
INFO = {"models": {"student": "a"}, "seed": 3}


def rollout(number: int) -> Rollout:
    """Rows of several lengths; every third lacks the student's numbers."""
    n = 1 + number % 5
    known = number % 3 != 1
    return Rollout(
        prompt=Prompt(id=number // 2, content=MESSAGES if number % 2 else f"[{number}]"),
        sample=number % 2,
        prompt_ids=tuple(range(1, 2 + number % 4)),
        response_ids=torch.arange(n) + number,
        trained=torch.arange(n) % 2 == 0,
        turn=torch.zeros(n, dtype=torch.long),
        finished=number % 4 == 0,
        text=f"text\n{number}",
        sampler_logp=SPECIAL[:n].clone() if known else None,
        policy_logp=-SPECIAL[:n].clone() if known else None,
        student_top_ids=torch.arange(2 * n).reshape(n, 2) if known else None,
        sampler_version=number,
    )


def scores(one: Rollout, k: int = 3) -> Scores:
    n = len(one.response_ids)
    support = torch.randn(n, k, generator=torch.Generator().manual_seed(n))
    return Scores(
        teacher_logp=SPECIAL[:n].clone(),
        scored=one.trained,
        support_ids=torch.arange(n * k).reshape(n, k),
        support_mask=support > 0,
        teacher_support_logp=support,
        teacher_top_ids=torch.arange(n)[:, None],
        teacher_top_logp=-support[:, :1],
    )


def written(folder: Path, rollouts: list[Rollout]) -> Path:
    file = folder / "rows.parquet"
    schema = records.response_schema(INFO)
    parts = [rollouts[i : i + records.ROWS] for i in range(0, len(rollouts), records.ROWS)]
    records.write_records(file, schema, (records.response_batch(part, schema) for part in parts))
    return file


def plain(folder: Path, **columns: Any) -> Path:
    """A file that pyarrow alone writes; a column of None is left out."""
    given = {"prompt_ids": [[1, 2], [3]], "response_ids": [[4], [5, 6]], **columns}
    file = folder / "rows.parquet"
    pq.write_table(pa.table({name: values for name, values in given.items() if values is not None}), file)
    return file


def same(got: Any, wanted: Any) -> bool:
    if not isinstance(wanted, Tensor):
        return got == wanted
    bits = torch.int32 if wanted.dtype == torch.float32 else wanted.dtype
    return got.dtype == wanted.dtype and torch.equal(got.contiguous().view(bits), wanted.contiguous().view(bits))


def test_records_return_every_value_bit_for_bit(tmp_path):
    """More rows than are read at once, so that lists begin inside of Arrow's buffers."""
    rollouts = [rollout(i) for i in range(records.ROWS + 9)]
    file = written(tmp_path, rollouts)
    opened = records.open_records(file)
    request = ScoreRequest(support=top_k(3), top_k=1)
    schema = records.scored_schema(opened.schema, request, opened.info)
    scored = (
        records.scored_batch(batch, [scores(one) for one in opened.rollouts(first, batch)], schema)
        for first, batch in opened.batches()
    )
    records.write_records(file, schema, scored)
    found = list(records.read_records(file))
    assert len(found) == len(rollouts)
    for (response, score), wanted in zip(found, rollouts, strict=True):
        for field in fields(Rollout):
            assert same(getattr(response, field.name), getattr(wanted, field.name)), field.name
        for field in fields(Scores):
            assert same(getattr(score, field.name), getattr(scores(wanted), field.name)), field.name


def test_file_says_format_and_what_it_was_made_with(tmp_path):
    said = json.loads(pq.read_schema(written(tmp_path, [rollout(0)])).metadata[records.KEY])
    assert said == {"format": 1, **INFO}


def test_columns_have_documented_types(tmp_path):
    schema = pq.read_schema(written(tmp_path, [rollout(1)]))  # a row of nulls has the types of every other
    assert {column.name: column.type for column in schema} == records.RESPONSE
    page = (Path(__file__).parents[2] / "docs" / "records.md").read_text()
    for name, kind in {**records.RESPONSE, **records.SCORE}.items():
        short = str(kind).replace("element: ", "").replace("item: ", "")
        assert f"| `{name}` | `{short}` |" in page, (name, short)


def test_file_of_two_columns_has_defaults(tmp_path):
    (one, score), (two, _) = records.read_records(plain(tmp_path))
    assert score is None
    assert (one.prompt_ids, two.response_ids.tolist()) == ((1, 2), [5, 6])
    assert (one.prompt.id, two.prompt.id, one.sample, one.text, one.finished) == (0, 1, 0, "", True)
    assert two.trained.tolist() == [True, True]
    assert one.sampler_logp is one.student_top_ids is None


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"response_ids": pa.array([[4], [5, 6]], pa.large_list(pa.uint16()))}, {"response_ids": [5, 6]}),
        ({"response_ids": pa.array([[4, 4], [5, 6]], pa.list_(pa.int8(), 2))}, {"response_ids": [5, 6]}),
        ({"sampler_logp": pa.array([None, [0.5, 0.25]], pa.list_(pa.float64()))}, {"sampler_logp": [0.5, 0.25]}),
        ({"trained": [None, [True, False]]}, {"trained": [True, False]}),
        ({"student_top_ids": [None, [[1, 2], [3, 4]]]}, {"student_top_ids": [[1, 2], [3, 4]]}),
        ({"student_top_ids": pa.array([None, [[1], [3]]], SINGLE)}, {"student_top_ids": [[1], [3]]}),
    ],
    ids=["large lists", "fixed lists", "float64", "masks", "lists of lists", "fixed lists of lists"],
)
def test_other_widths_and_kinds_of_lists_are_read(tmp_path, columns, wanted):
    _, (row, _) = records.read_records(plain(tmp_path, **columns))
    assert {name: getattr(row, name).tolist() for name in wanted} == wanted


def test_prompt_of_structs_is_read_as_messages(tmp_path):
    messages = [{"role": "user", "content": "a", "name": None}, {"role": "user", "content": "b", "name": "n"}]
    (row, _), _ = records.read_records(plain(tmp_path, prompt=[messages, messages]))
    assert row.prompt.content == ({"role": "user", "content": "a"}, messages[1])


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"prompt_ids": None, "prompts_ids": [[1], [2]]}, r"no column `prompt_ids`\. Did you mean 'prompts_ids'\?"),
        ({"response_ids": [["a"], ["b"]]}, r"`response_ids` of .* has the type list<.*string>.* lists of integers"),
        ({"prompt_ids": [1, 2]}, r"`prompt_ids` of .* has the type int64, but it must hold lists of integers.*rename"),
        ({"trained": [[1], [1, 0]]}, r"`trained` .* must hold lists of booleans"),
        ({"sampler_logp": [[0], [0, 0]]}, r"`sampler_logp` .* must hold lists of floating-point numbers"),
        ({"text": [1, 2]}, r"`text` .* has the type int64, but it must hold texts"),
        ({"prompt_ids": [[1], None]}, r"Row 1 of .*: `prompt_ids` is null\. Leave the row out"),
        ({"response_ids": [[], [1]]}, r"Row 0 of .*: `response_ids` is empty\. Leave the row out"),
        ({"response_ids": [[1], [1, None]]}, r"Row 1 of .*: `response_ids` has a null at position 1\. Fill it"),
        ({"response_ids": [[1], [1, -100]]}, r"Row 1 of .*: `response_ids` holds -100, which is no token's id\. Leave"),
        ({"trained": [[True], [True]]}, r"Row 1 of .*: `trained` has 1 entries, and `response_ids` has 2\. Give one"),
        ({"policy_logp": [[0.5, 0.5], [0.5, 0.5]]}, r"Row 0 of .*: `policy_logp` has 2 entries"),
        ({"student_top_ids": [[[1]], [[1, 2], [3]]]}, r"Row 1 of .* has between 1 and 2 entries at a position.*Cut"),
        ({"student_top_ids": [[[1]], [[1], None]]}, r"Row 1 of .*: `student_top_ids` has a null at position 1"),
        ({"prompt": ["{", "b"], "prompt_is_json": [True, False]}, r"Row 0 of .* is not a list of messages in JSON"),
        ({"teacher_logp": [[0.5], [0.5]]}, r"Row 1 of .*: `teacher_logp` has 1 entries"),
        ({"prompt_ids": pa.array([], records.IDS), "response_ids": pa.array([], records.IDS)}, r"has no rows\. Give"),
    ],
)
def test_unusable_rows_are_refused_by_number(tmp_path, columns, said):
    with pytest.raises(DataError, match=said):
        list(records.read_records(plain(tmp_path, **columns)))


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (b"{", r"The metadata `opd` of .* is damaged.*Remove it"),
        (b'{"format": 1, "models": 3}', r"The metadata `opd` of .* is damaged"),
        (b"[]", r"The metadata `opd` of .* is damaged"),
        (b'{"format": 2}', r"has format 2 of records, and this version of opd reads formats up to 1\. Install"),
    ],
)
def test_metadata_of_other_formats_is_refused(tmp_path, metadata, said):
    table = pq.read_table(plain(tmp_path))
    pq.write_table(table.replace_schema_metadata({records.KEY: metadata}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=said):
        list(records.read_records(tmp_path / "rows.parquet"))


def test_file_that_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "rows.parquet").write_text("{}")
    with pytest.raises(DataError, match="is not a readable Parquet file"):
        records.open_records(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"row\.parquet does not exist\. Did you mean 'rows\.parquet'\?"):
        records.open_records(tmp_path / "row.parquet")


def test_columns_of_one_name_are_refused(tmp_path):
    ids = pa.array([[1]])
    pq.write_table(pa.table([ids, ids, ids], ["prompt_ids", "response_ids", "prompt_ids"]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"has more than one column `prompt_ids`\. Rename all but one\."):
        records.open_records(tmp_path / "rows.parquet")


def test_damage_inside_a_file_is_named(tmp_path):
    file = written(tmp_path, [rollout(i) for i in range(50)])
    content = bytearray(file.read_bytes())
    content[4:400] = bytes(396)  # the first column's page, behind the mark at the beginning
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.parquet is damaged after row 0: .* Write it again\."):
        list(records.read_records(file))


def test_scored_file_keeps_other_columns(tmp_path):
    """Those of another program, in their types and order; the scores of before are replaced."""
    extra = {"reward": pa.array([0.1, 0.2], pa.float64()), "info": pa.array([{"a": 1}, {"a": 2}])}
    old = {"teacher_logp": [[0.5], [0.5, 0.5]], "teacher_top_ids": [[[1]], [[1], [1]]]}
    file = plain(tmp_path, **old, **extra)
    opened = records.open_records(file)
    schema = records.scored_schema(opened.schema, ScoreRequest(support=sampled()), opened.info)
    assert schema.names == ["prompt_ids", "response_ids", "reward", "info", "teacher_logp", "scored"]
    ((first, batch),) = opened.batches()
    new = [Scores(teacher_logp=torch.full((len(r.response_ids),), -2.0)) for r in opened.rollouts(first, batch)]
    records.write_records(file, schema, iter([records.scored_batch(batch, new, schema)]))
    table = pq.read_table(file)
    assert table["reward"].chunk(0).equals(extra["reward"])
    assert table["info"].to_pylist() == extra["info"].to_pylist()
    assert table["teacher_logp"].to_pylist() == [[-2.0], [-2.0, -2.0]]
    assert table["scored"].to_pylist() == [[True], [True, True]]


def test_file_of_datasets_is_read_and_scored_for_datasets(tmp_path):
    """Its metadata describe columns without the scores; it reads those by their types."""
    from datasets import Dataset

    messages = [{"role": "user", "content": "a"}]
    given = {"prompt": [messages] * 2, "prompt_ids": [[1, 2], [3]], "response_ids": [[4], [5, 6]]}
    file = tmp_path / "rows.parquet"
    Dataset.from_dict(given).to_parquet(file)
    opened = records.open_records(file)
    schema = records.scored_schema(opened.schema, ScoreRequest(support=top_k(3), top_k=1), opened.info)
    ((first, batch),) = opened.batches()
    rollouts = opened.rollouts(first, batch)
    assert rollouts[0].prompt.content == tuple(messages)
    new = [scores(one) for one in rollouts]
    records.write_records(file, schema, iter([records.scored_batch(batch, new, schema)]))
    found = Dataset.from_parquet(str(file), cache_dir=str(tmp_path))
    assert found[1]["prompt"] == messages
    assert found[1]["support_ids"] == scores(rollouts[1]).support_ids.tolist()
    assert found[1]["teacher_support_logp"] == scores(rollouts[1]).teacher_support_logp.tolist()


def test_write_that_ends_early_leaves_the_old_file(tmp_path):
    file = written(tmp_path, [rollout(0)])
    before, schema = file.read_bytes(), records.response_schema(INFO)

    def ends(error: Exception) -> Iterator[Any]:
        yield records.response_batch([rollout(1)], schema)
        raise error

    for error, raised in ((ValueError("early"), ValueError), (OSError(28, "No space left on device"), RunError)):
        with pytest.raises(raised, match=r"early|cannot be written \(No space"):
            records.write_records(file, schema, ends(error))
        assert file.read_bytes() == before
        assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rows.jsonl", r"--out .*rows\.jsonl does not end with \.parquet.*Name it so"),
        ("none/rows.parquet", r"is in a folder that does not exist.*Give the path of a file in an existing folder"),
        ("", r"is a folder"),
    ],
)
def test_target_that_cannot_be_written_is_refused(tmp_path, name, said):
    with pytest.raises(ConfigError, match=said):
        records.target_of(str(tmp_path / name), "--out")
