"""Every form of `DataSection.path`, the shuffled order, and what each mistake in the data is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd.data.order import shuffled
from opd.data.prompts import load_prompts, prompts_of_rows
from opd.errors import ConfigError, DataError
from opd.recipe.load import parse_section
from opd.recipe.schema import DataSection
from opd.types import Prompt

ROWS = [
    {"prompt": "2 + 2 =", "answer": "4", "level": 1},
    {"prompt": "3 + 3 =", "answer": "6", "level": 2},
    {"prompt": "5 + 5 =", "answer": "10", "level": 3},
]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def write(folder: Path, ending: str, rows: list[dict]) -> Path:
    path = folder / f"rows{ending}"
    if ending == ".jsonl":
        write_jsonl(path, rows)
    elif ending == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = [",".join(rows[0]), *(",".join(str(cell) for cell in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    return path


def load(path: Path | str, *, require: tuple[str, ...] = (), **fields) -> list[Prompt]:
    return load_prompts(parse_section(DataSection, {"path": path, **fields}, "data"), require=require)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Writes a Python module that is importable for the length of one test, and returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(source: str, name: str = "opd_test_rows") -> str:
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    yield make
    sys.modules.pop("opd_test_rows", None)


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet", ".csv"])
def test_load_prompts_gives_equal_prompts_for_every_file_form(tmp_path, ending):
    prompts = load(write(tmp_path, ending, ROWS))
    assert [(p.id, p.content, p.answer) for p in prompts] == [
        (0, "2 + 2 =", "4"),
        (1, "3 + 3 =", "6"),
        (2, "5 + 5 =", "10"),
    ]
    assert [int(p.metadata["level"]) for p in prompts] == [1, 2, 3]
    assert set(prompts[0].metadata) == {"level"}


def test_jsonl_skips_blank_lines_and_keeps_unicode_separators(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"prompt": "a\u2028b"}\n\n{"prompt": "c"}', encoding="utf-8")
    assert [(p.id, p.content) for p in load(path)] == [(0, "a\u2028b"), (1, "c")]


def test_limit_stops_reading_after_last_needed_row(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    path.write_text(path.read_text() + "not json\n")
    assert [p.id for p in load(path, limit=2)] == [0, 1]


def test_columns_renames_fields_and_keeps_rest_as_metadata(tmp_path):
    row = {"question": "why?", "solution": 42, "hint": "because", "who": "big", "prompt": "unused", "tag": [1]}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    columns = {"prompt": "question", "answer": "solution", "privileged_context": "hint", "teacher_id": "who"}
    [prompt] = load(path, columns=columns)
    assert (prompt.content, prompt.answer) == ("why?", 42)
    assert (prompt.privileged_context, prompt.teacher_id) == ("because", "big")
    assert prompt.metadata == {"prompt": "unused", "tag": [1]}


def test_response_accepts_completion_as_text_or_message(tmp_path):
    rows = [
        {"prompt": "a", "response": "A"},
        {"prompt": "b", "completion": "B"},
        {"prompt": "c", "completion": [{"role": "assistant", "content": "C"}]},
        {"prompt": "d", "response": "D", "completion": "other"},
    ]
    prompts = load(write_jsonl(tmp_path / "rows.jsonl", rows), require=("response",))
    assert [p.response for p in prompts] == ["A", "B", "C", "D"]
    assert [dict(p.metadata) for p in prompts] == [{}, {}, {}, {"completion": "other"}]


def test_csv_reads_empty_cell_as_none_and_quoted_newline(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,answer\n"a, b\nc",\nd,1\n')
    assert [(p.content, p.answer) for p in load(path)] == [("a, b\nc", None), ("d", "1")]


def test_load_prompts_reads_package_file_without_import(tmp_path, monkeypatch):
    package = tmp_path / "opd_test_package"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    write_jsonl(package / "data" / "rows.jsonl", ROWS)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(load("package:opd_test_package/data/rows.jsonl")) == 3
    assert "opd_test_package" not in sys.modules


# --- messages ------------------------------------------------------------------------------------------------------


def test_chat_and_system_wrap_text(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "hi"}])
    assert load(path)[0].content == "hi"
    assert load(path, chat=True)[0].content == ({"role": "user", "content": "hi"},)
    assert load(path, system="Be brief.")[0].content == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    )


def test_parquet_messages_drop_nulls_added_by_arrow(tmp_path):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi", "name": "ann"}]
    path = write(tmp_path, ".parquet", [{"prompt": messages}])
    assert load(path)[0].content == tuple(messages)


# --- generators and data sets --------------------------------------------------------------------------------------


def test_reasoning_gym_rows_keep_entry_and_are_reproducible():
    gym = pytest.importorskip("reasoning_gym")
    options = {"size": 5, "seed": 3, "max_terms": 3}
    first = load("reasoning_gym:chain_sum", options=options, chat=True)
    assert first == load("reasoning_gym:chain_sum", options=options, chat=True)
    expected = gym.create_dataset("chain_sum", **options)
    assert [p.content[0]["content"] for p in first] == [expected[i]["question"] for i in range(5)]
    origin = first[2].metadata["reasoning_gym"]
    assert origin == {"task": "chain_sum", "options": options, "entry": expected[2]}
    assert expected.score_answer(answer=first[2].answer, entry=origin["entry"]) == 1.0


def test_skip_drops_first_rows_and_keeps_ids(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert [(p.id, p.answer) for p in load(path, skip=1)] == [(1, "6"), (2, "10")]
    first, rest = load(path, limit=2), load(path, skip=2, limit=2)
    assert [p.id for p in first + rest] == [0, 1, 2]
    assert [p.content for p in load("reasoning_gym:chain_sum", skip=2, limit=2)] == [
        p.content for p in load("reasoning_gym:chain_sum", options={"size": 4})[2:]
    ]
    write_jsonl(path, [*ROWS, {"prompt": "7 + 7 ="}])
    with pytest.raises(DataError, match=r"1 of 2 rows of .* have none \(rows 3\)"):
        load(path, skip=2, require=("answer",))


def test_skip_raises_error_when_too_large_or_negative(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match=r"`skip: 3` leaves no row of .*: it has no row 3 \(counted from 0\)\. Lower"):
        load(path, skip=3)
    with pytest.raises(ConfigError, match=r"data is not valid:\n  `skip`: .* greater than or equal to 0 \(got -1\)"):
        load(path, skip=-1)


def test_reasoning_gym_defaults_to_seed_0_and_size_500():
    pytest.importorskip("reasoning_gym")
    prompts = load("reasoning_gym:chain_sum", limit=4)
    assert len(prompts) == 4
    assert prompts[0].metadata["reasoning_gym"]["options"] == {"size": 500, "seed": 0}
    assert len(load("reasoning_gym:chain_sum")) == 500
    assert len(load("reasoning_gym:chain_sum", options={"size": 3}, limit=4)) == 3


def test_load_prompts_calls_function_with_options_up_to_limit(user_module):
    name = user_module(
        "import itertools\ndef rows(start, step=1):\n"
        "    return ({'prompt': str(i)} for i in itertools.count(start, step))"
    )
    assert [p.content for p in load(f"{name}:rows", options={"start": 3, "step": 2}, limit=3)] == ["3", "5", "7"]


def test_load_prompts_keeps_the_options_of_the_section(user_module):
    name = user_module("def rows(texts):\n    while texts:\n        yield {'prompt': texts.pop()}")
    section = DataSection(path=f"{name}:rows", options={"texts": ["a", "b"]})
    assert [p.content for p in load_prompts(section)] == ["b", "a"]
    assert load_prompts(section) == load_prompts(section)
    assert section.options == {"texts": ["a", "b"]}


def test_split_selects_part_of_saved_data_set(tmp_path):
    import datasets

    train, test = datasets.Dataset.from_list(ROWS[:2]), datasets.Dataset.from_list(ROWS[2:])
    train.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "two"))
    assert [p.answer for p in load(tmp_path / "one")] == ["4", "6"]
    assert [p.answer for p in load(tmp_path / "two", split="test")] == ["10"]
    with pytest.raises(
        DataError, match=r"split 'tests' of the folder .*the splits are train, test. Did you mean 'test'"
    ):
        load(tmp_path / "two", split="tests")
    with pytest.raises(DataError, match=r"split 'test' of the folder .*the splits are train"):
        load(tmp_path / "one", split="test")
    with pytest.raises(ConfigError, match=r"save_to_disk and takes no options, got \['name'\]"):
        load(tmp_path / "one", options={"name": "main"})


def test_load_dataset_gets_path_split_and_options(tmp_path, monkeypatch):
    import datasets

    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (tmp_path / "rows.txt").write_text("a")
    assert len(load("openai/gsm8k", split="test[:3]", options={"name": "main"})) == 3
    assert len(load(tmp_path)) == 3
    assert calls == [("openai/gsm8k", {"split": "test[:3]", "name": "main"}), (str(tmp_path), {"split": "train"})]


# --- what mistakes are told ----------------------------------------------------------------------------------------


def test_load_prompts_names_nearest_file_when_missing(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(
        DataError, match=r"trian\.jsonl does not exist\. Did you mean 'train\.jsonl'\? In .*Correct `path`"
    ):
        load(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"In .*absent: no such folder"):
        load(tmp_path / "absent" / "train.jsonl")
    with pytest.raises(DataError, match=r"absent.* does not exist.*train.jsonl"):
        load(tmp_path / "absent")


@pytest.mark.parametrize(("ending", "text"), [(".jsonl", "\n"), (".json", ""), (".json", "[]"), (".csv", "prompt\n")])
def test_load_prompts_refuses_empty_file(tmp_path, ending, text):
    path = tmp_path / f"rows{ending}"
    path.write_text(text)
    with pytest.raises(DataError, match=f"rows{ending} has no rows. Give data with at least one row"):
        load(path)


def test_load_prompts_names_line_of_broken_jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b"\n')
    with pytest.raises(
        DataError, match=r"Line 3 of .*rows\.jsonl is not valid JSON: Expecting ',' .*correct or remove"
    ):
        load(path)


def test_load_prompts_refuses_broken_json(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"prompt": "a"},\n {"prompt": }]')
    with pytest.raises(DataError, match=r"Line 2 of .*rows\.json is not valid JSON.*list of objects"):
        load(path)
    path.write_text('{"prompt": "a"}')
    with pytest.raises(DataError, match=r"holds a dict, but a .json file must hold a list of objects. Wrap it in"):
        load(path)


def test_load_prompts_refuses_row_that_is_no_object(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}, "b"])
    with pytest.raises(
        DataError, match=r"Line 2 of .*rows.jsonl is a str, got 'b'. A row must be an object with a `prompt`"
    ):
        load(path)


def test_load_prompts_refuses_broken_csv_parquet_and_encoding(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,answer\na,1\nb,c,2\n")
    with pytest.raises(
        DataError, match=r"Line 3 of .*rows.csv is not valid CSV: 3 cells for the columns prompt, answer"
    ):
        load(tmp_path / "rows.csv")
    (tmp_path / "rows.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"rows.parquet is not a readable Parquet file.*Write it again"):
        load(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match=r"rows.jsonl is not UTF-8 text.*Save it as UTF-8"):
        load(tmp_path / "rows.jsonl")


def test_load_prompts_suggests_columns_when_prompt_is_missing(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "a", "level": 1}])
    with pytest.raises(
        DataError, match=r"Line 1 .* no column 'prompt'.*question, level.*`columns: \{prompt: question\}`"
    ):
        load(path)
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompts": "a"}])
    with pytest.raises(DataError, match="Did you mean 'prompts'"):
        load(path)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (3, "`prompt` is a int, got 3. A prompt is text, or a list of messages"),
        (None, "`prompt` is a NoneType, got None"),
        ({"role": "user"}, "`prompt` is a dict"),
        ("", "`prompt` is empty"),
        (" \n", "`prompt` is empty"),
        ([], "`prompt` is empty"),
        (["hi"], "message 0 is a str, got 'hi'. It needs `role` and `content`"),
        ([{"from": "oracle", "value": "hi"}], r"is from 'oracle', which is no role. Its `from` is one of user, human"),
        (
            [{"role": "user", "content": [{"type": "video"}]}],
            "has a part of type 'video', and opd reads text and images",
        ),
        (
            [{"role": "assistant", "content": "a"}],
            "the conversation is one message of the assistant, so there is no pr",
        ),
        ([{"role": "user", "content": "a"}, {"role": "user"}], r"message 1 has the keys \['role'\], but needs"),
        ([{"role": 1, "content": "a"}], "has the role 1. A role is text such as 'user'"),
        ([{"role": "user", "content": 5}], "has a content of type int, got 5. Give text or parts"),
        ([{"role": "user", "content": None}], "has a content of type NoneType"),
    ],
)
def test_load_prompts_refuses_bad_prompt_value(tmp_path, prompt, message):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "fine"}, {"prompt": prompt}])
    with pytest.raises(DataError, match=r"Line 2 of .*rows\.jsonl: .*" + message):
        load(path)
    with pytest.raises(DataError, match=r"Line 2 of .*rows.jsonl: .*"):
        load(path, chat=True)


def test_system_refuses_second_system_message(tmp_path):
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": messages}])
    assert load(path)[0].content == tuple(messages)
    with pytest.raises(DataError, match="begins with a system message, but `system` adds a second one"):
        load(path, system="c")


def test_load_prompts_refuses_response_that_is_no_text(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "response": 7}])
    with pytest.raises(DataError, match=r"Line 1 .*`response` is a int, got 7. Give text"):
        load(path)


def test_load_prompts_names_rows_that_lack_required_column(tmp_path):
    rows = [{"prompt": "a", "response": "A"}, {"prompt": "b", "response": None}, {"prompt": "c", "response": ""}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        DataError, match=r"needs `response` in every row, but 2 of 3 rows of .* \(rows 1, 2\).*`columns:`"
    ):
        load(path, require=("response",))
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "privileged_contxt": "A"}] * 9)
    with pytest.raises(DataError, match=r"9 of 9 .*rows 0, 1, 2, 3, 4, \.\.\.\)\. Did you mean 'privileged_contxt'\?"):
        load(path, require=("privileged_context",))
    assert len(load(path, require=("prompt",))) == 9


def test_columns_refuses_unknown_field_or_column(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"but opd has no column 'anwser'. Did you mean 'answer'"):
        load(path, columns={"anwser": "level"})
    with pytest.raises(
        DataError, match=r"`columns: \{answer: leval\}` .* does not have. Did you mean 'level'.*prompt, "
    ):
        load(path, columns={"answer": "leval"})


def test_load_prompts_refuses_settings_without_effect(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"The file .* takes no options, got \['seed'\]"):
        load(path, options={"seed": 1})
    with pytest.raises(ConfigError, match=r"`split: test`: .*rows.jsonl has no splits"):
        load(path, split="test")
    with pytest.raises(ConfigError, match=r"data is not valid:\n  `limit`: .* greater than or equal to 1 \(got 0\)"):
        load(path, limit=0)


def test_prompts_of_rows_raises_when_chat_is_no_boolean():
    with pytest.raises(ConfigError, match=r"prompts is not valid:\n  `chat`: Input should be a valid boolean"):
        prompts_of_rows(["a"], chat="maybe")


def test_load_prompts_refuses_unknown_file_ending(tmp_path):
    (tmp_path / "rows.txt").write_text("hello")
    with pytest.raises(
        ConfigError, match=r"ends with '\.txt', which opd does not read.*\.json, \.jsonl, \.csv, \.tsv, \.parquet"
    ):
        load(tmp_path / "rows.txt")
    with pytest.raises(ConfigError, match=r"ends with '\.jsnl'.*Did you mean '\.jsonl'"):
        load("rows.jsnl")


def test_load_prompts_refuses_missing_package_or_file():
    with pytest.raises(DataError, match="the package 'opd_no_such_package' is not installed"):
        load("package:opd_no_such_package/rows.jsonl")
    with pytest.raises(DataError, match=r"the package 'opd' has no 'typs\.jsonl'"):
        load("package:opd/typs.jsonl")


def test_reasoning_gym_raises_config_error_when_misused(monkeypatch):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ConfigError, match=r"reasoning-gym has no task 'chain_sums'. Did you mean 'chain_sum'"):
        load("reasoning_gym:chain_sums")
    with pytest.raises(ConfigError, match=r"no option 'max_term'. Did you mean 'max_terms'.*It has: min_terms"):
        load("reasoning_gym:chain_sum", options={"max_term": 2})
    with pytest.raises(ConfigError, match=r"refuses the options .*min_terms must be positive"):
        load("reasoning_gym:chain_sum", options={"min_terms": -1})
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"reasoning_gym is not installed .*pip install 'opd\[gym\]'"):
        load("reasoning_gym:chain_sum")


def test_load_prompts_refuses_bad_row_function(user_module):
    name = user_module(
        "def rows(n):\n    yield {'prompt': 'a'}\n    raise KeyError('oops')\n"
        "def refuses():\n    from opd.errors import ConfigError\n    raise ConfigError('Give fewer rows.')\n"
        "def text():\n    return 'abc'\ndef bare():\n    return [1]\nnumber = 3\n"
    )
    with pytest.raises(
        ConfigError,
        match=r"importing 'opd_no_such_module' failed with ModuleNotFoundError.*run in the folder of its file",
    ):
        load("opd_no_such_module:rows")
    with pytest.raises(ConfigError, match=r"'row' does not exist in .*Did you mean 'rows'.*rows, refuses, text, bare"):
        load(f"{name}:row")
    with pytest.raises(ConfigError, match="'number' is not a function"):
        load(f"{name}:number")
    with pytest.raises(ConfigError, match=r"cannot be called with the options \['m'\].*Its options: n"):
        load(f"{name}:rows", options={"m": 1})
    with pytest.raises(
        DataError, match=r"opd_test_rows:rows failed with KeyError: 'oops'. Correct the function"
    ) as caught:
        load(f"{name}:rows", options={"n": 1})
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(ConfigError, match=r"^Give fewer rows\.$"):
        load(f"{name}:refuses")
    with pytest.raises(DataError, match="returned a str, but must return an iterable of dicts"):
        load(f"{name}:text")
    with pytest.raises(DataError, match="Row 0 of opd_test_rows:bare is a int, got 1"):
        load(f"{name}:bare")


def test_load_prompts_raises_config_error_when_import_fails(user_module):
    name = user_module("raise ValueError('no licence')")
    with pytest.raises(ConfigError, match="importing 'opd_test_rows' failed with ValueError: no licence"):
        load(f"{name}:rows")


def test_load_dataset_failure_raises_data_error(monkeypatch):
    import datasets

    def load_dataset(path, **options):
        raise ValueError("Unknown split")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"could not load the split 'train' of the hub name \(there is no such local file"
    ):
        load("some/name")


# --- the order -----------------------------------------------------------------------------------------------------


def prompts_of(count: int) -> list[Prompt]:
    return [Prompt(id=i, content=str(i)) for i in range(count)]


def walk(size: int, *, steps: int, count: int, seed: int = 0) -> list[int]:
    prompts = prompts_of(size)
    firsts = range(0, steps * count, count)
    return [p.id for first in firsts for p in shuffled(prompts, first=first, count=count, seed=seed)]


@pytest.mark.parametrize(("size", "count"), [(7, 3), (6, 3), (3, 7), (1, 2), (5, 5)])
def test_shuffled_steps_take_whole_permutations(size, count):
    ids = walk(size, steps=2 * size, count=count)
    epochs = [ids[i : i + size] for i in range(0, len(ids), size)]
    assert len(epochs) == 2 * count
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)


def test_shuffled_differs_by_epoch_and_seed():
    first, second = (walk(20, steps=2, count=20)[i : i + 20] for i in (0, 20))
    assert first != second
    assert first != list(range(20))
    assert first != walk(20, steps=1, count=20, seed=1)


def test_shuffled_depends_only_on_seed_and_position():
    prompts = prompts_of(10)
    late = [p.id for p in shuffled(prompts, first=28, count=4, seed=5)]
    assert late == walk(10, steps=8, count=4, seed=5)[-4:]


# --- the template ----------------------------------------------------------------------------------------------------

ALIGNED = "{prompt} Please reason step by step, and put your final answer within \\boxed{{}}."


def test_template_rewrites_text_and_last_user_message(tmp_path):
    turns = [
        {"role": "user", "content": "2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "3?"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "2 {x} 2?"}, {"prompt": turns}])
    text, messages = load(path, template=ALIGNED)
    end = "Please reason step by step, and put your final answer within \\boxed{}."
    assert text.content == f"2 {{x}} 2? {end}"
    assert messages.content == (*turns[:2], {"role": "user", "content": f"3? {end}"})
    chat = load(path, limit=1, template="Q: {prompt}", system="Be brief.")[0]
    assert [m["content"] for m in chat.content] == ["Be brief.", "Q: 2 {x} 2?"]


def test_template_refuses_unknown_fields_and_unmatched_braces(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    needed = r"The `template` of a data section has the fields \{prompt\} \(needed\); got "
    with pytest.raises(ConfigError, match=needed + r"\['question'\]\. Write a literal brace twice"):
        load(path, template="{question}")
    with pytest.raises(ConfigError, match=needed + r"\[\]"):
        load(path, template="What?")
    with pytest.raises(ConfigError, match=r"has braces that do not match: .* Write a literal brace twice"):
        load(path, template="{prompt} \\boxed{")


def test_template_refuses_prompt_without_user_text(tmp_path):
    parts = [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "what?"}]}]
    for prompt, roles in ((parts, "user"), ([{"role": "system", "content": "x"}], "system")):
        path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": prompt}])
        with pytest.raises(
            DataError, match=rf"Prompt 1 has no user message of text, .* \(roles: {roles}\)\. Leave the templ"
        ):
            load(path, template="Q: {prompt}")
