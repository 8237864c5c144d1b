"""Data and model folders that are damaged: `opd check` refuses each with the file, the reason and the remedy."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.runs import command, one_stage, prepare, tiny_model

from opd.models import saving
from opd.models.loading import load_model
from opd.recipe.schema import ModelSpec

MINE = """
import sys


def number():
    return 5


def leaves():
    sys.exit(3)


def method(k: "nope" = 3):
    return k
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    saving.save(load_model(ModelSpec(**tiny_model(2)), name="student"), folder)
    return folder


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(prepare(tmp_path / "work", one_stage()))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("mine.py").write_text(MINE)
    Path("leaving.py").write_text("import sys\n\nsys.exit(4)\n")
    for name in ("mine", "leaving"):
        sys.modules.pop(name, None)
    yield
    for name in ("mine", "leaving"):
        sys.modules.pop(name, None)


def refused(recipe: dict[str, Any]) -> str:
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    ended = command("check", "recipe.yaml")
    assert ended.code == 2, ended
    return ended.err


ROW = '{"prompt": "1+1=", "answer": 2, "response": "2"}\n'
DATA: dict[str, tuple[str, bytes, str]] = {
    "half a surrogate pair": (
        "x.jsonl",
        (ROW + '{"prompt": "1+1=\\ud83d"}\n').encode(),
        "Line 2 of x.jsonl: the text '1+1=\\ud83d' holds half of a surrogate pair, most often of a cut emoji",
    ),
    "half in an answer": ("x.jsonl", b'{"prompt": "1+1=", "answer": ["2\\udc00"]}\n', "Line 1 of x.jsonl: the text '2"),
    "half in a message": (
        "x.jsonl",
        b'{"prompt": [{"role": "user", "content": "1\\ud83d"}]}\n',
        "Line 1 of x.jsonl: the text '1\\ud83d' holds half",
    ),
    "half in a list": ("x.json", b'[{"prompt": "1+1=\\ud83d"}]', "Row 0 of x.json: the text '1+1=\\ud83d' holds half"),
    "huge integer": (
        "x.jsonl",
        b'{"prompt": "1+1=", "answer": ' + b"1" * 5000 + b"}\n",
        "Line 1 of x.jsonl is not valid JSON: an integer has more than 4300 digits",
    ),
    "deep line": ("x.jsonl", b'{"prompt": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n", "are nested too deeply"),
    "deep list": ("x.json", b"[" * 10**5 + b"]" * 10**5, "x.json is not valid JSON: its lists and objects are nested"),
    "key twice": (
        "x.jsonl",
        b'{"prompt": "1", "prompt": "2"}\n',
        "Line 1 of x.jsonl is not valid JSON: the key 'prompt'",
    ),
    "latin-1": (
        "x.csv",
        b"prompt,answer\n1+1=\xe9,2\n",
        "x.csv is not UTF-8 text: 'utf-8' codec can't decode byte 0xe9",
    ),
    "column twice": ("x.csv", b"prompt,prompt\n1,2\n", "every column needs its own"),
    "no Parquet": ("x.parquet", b"PAR1xxxxPAR1", "x.parquet is not a readable Parquet file"),
    "no gzip": ("x.jsonl.gz", b"{}", "x.jsonl.gz is not a readable gzip file"),
}


@pytest.mark.parametrize("case", DATA)
def test_check_refuses_damaged_data(case: str):
    name, content, said = DATA[case]
    Path(name).write_bytes(content)
    err = refused(one_stage(data={"path": name}))
    assert err.startswith("DataError: ")
    assert said in err, err


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("mine:number", "mine:number failed with TypeError: it returned a int, but must return an iterable of dicts"),
        ("mine:leaves", "mine:leaves failed with SystemExit: 3. Correct the function"),
        ("leaving:rows", "leaving:rows: importing 'leaving' failed with SystemExit: 4"),
    ],
)
def test_check_reports_function_that_leaves(path: str, said: str):
    """`sys.exit` in a user's module does not end the command without a message."""
    assert said in refused(one_stage(data={"path": path}))


def test_check_refuses_method_with_unknown_type():
    said = "Method 'mine:method': a type in its signature cannot be read: name 'nope' is not defined"
    assert said in refused(one_stage(method="mine:method"))
    assert "importing 'leaving' failed with SystemExit: 4" in refused(one_stage(method="leaving:method"))
    assert "importing 'leaving' failed with SystemExit: 4" in refused(one_stage(reward={"name": "leaving:reward"}))


def test_rows_hold_long_cells_and_emoji():
    """A cell longer than the default of `csv`, and a pair of surrogates, which is one character."""
    from opd.data.prompts import load_prompts
    from opd.recipe.schema import DataSection

    Path("long.csv").write_text(f"prompt,answer\n{'1' * 200_000},2\n")
    assert len(load_prompts(DataSection(path="long.csv"))[0].content) == 200_000
    Path("emoji.jsonl").write_text('{"prompt": "\\ud83d\\ude00"}\n')
    assert load_prompts(DataSection(path="emoji.jsonl"))[0].content == "😀"


def test_missing_answer_may_be_nan():
    Path("x.jsonl").write_text(ROW + '{"prompt": "1+2=", "answer": NaN}\n')
    said = refused(one_stage(data={"path": "x.jsonl"}, reward={"name": "exact"}))
    assert "This run needs `answer` in every row, but 1 of 2 rows of x.jsonl have none (rows 1)" in said


def cut(file: str, keep: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:keep])


def put(file: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_bytes(text.encode("latin-1"))


def configured(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def indexed(text: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return change


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights cut": (cut("model.safetensors", 4000), "(4,000 bytes) is not a whole safetensors file"),
    "weights cut in the header": (cut("model.safetensors", 20), "(20 bytes) is not a whole safetensors file"),
    "weights empty": (cut("model.safetensors", 0), "(0 bytes) is not a whole safetensors file"),
    "config is a list": (put("config.json", "[]"), "config.json"),
    "config is a text": (put("config.json", '"llama"'), "config.json"),
    "config is latin-1": (put("config.json", '{"model_type": "\xe9"}'), "config.json"),
    "config without a kind": (put("config.json", "{}"), "config.json"),
    "config with a wrong type": (configured(num_attention_heads="two"), "Field 'num_attention_heads' expected int"),
    "config with no head": (configured(num_attention_heads=0), "config.json cannot be read: integer"),
    "tokenizer settings are a list": (put("tokenizer_config.json", "[]"), "holds a list, and an object is needed"),
    "tokenizer settings cut": (put("tokenizer_config.json", "{"), "no tokenizer could be loaded from model"),
    "tokenizer cut": (put("tokenizer.json", "{"), "no tokenizer could be loaded from model, which is a folder"),
    "tokenizer is a list": (put("tokenizer.json", "[]"), "no tokenizer could be loaded from model, which is a folder"),
    "endings are a list": (put("generation_config.json", "[]"), "generation_config.json holds a list, not an object"),
    "endings cut": (put("generation_config.json", "{"), "generation_config.json cannot be read: Expecting property"),
    "index is a list": (indexed("[]"), "model.safetensors.index.json is damaged"),
    "index names a number": (indexed('{"weight_map": {"a": 5}}'), "model.safetensors.index.json is damaged"),
    "adapter is a list": (put("adapter_config.json", "[]"), "adapter_config.json is not the configuration of an adap"),
    "unknown activation": (configured(hidden_act="nope"), ""),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_damaged_model_folder_is_refused(good: Path, case: str):
    """By `opd check`; what only loading shows, by `opd train` before a step."""
    change, said = FOLDERS[case]
    shutil.copytree(good, "model")
    change(Path("model"))
    recipe = one_stage() | {"models": {"teacher": tiny_model(1), "student": {"path": "./model"}}}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    ended = command("check" if said else "train", "recipe.yaml")
    assert ended.code == 2, ended
    assert ended.err.startswith("ConfigError: models.student")
    assert said in ended.err, ended.err
    assert not Path("run/distil/metrics.jsonl").exists()


@pytest.mark.parametrize(("content", "said"), [(b"", "cannot mmap an empty file"), (b"GGUF....", "8 bytes")])
def test_check_refuses_damaged_gguf(content: bytes, said: str):
    Path("x.gguf").write_bytes(content)
    err = refused(one_stage() | {"models": {"teacher": tiny_model(1), "student": {"path": "./x.gguf"}}})
    assert "x.gguf cannot be read as a GGUF file" in err
    assert said in err
