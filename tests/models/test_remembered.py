"""What is kept about a folder is what transformers says, for exactly that content."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file
from support.gguf_files import model_file
from support.models import LETTERS, build
from torch import Tensor, zeros
from transformers import AutoTokenizer

from opd.errors import ConfigError
from opd.models import preview, remembered, weights
from opd.models.new import character_tokenizer
from opd.models.preview import known_facts, known_positions, known_rows
from opd.models.tokenizer_files import load_tokenizer
from opd.models.weights import check_weights
from opd.recipe.schema import ModelSpec

NORM = "model.norm.weight"


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of each test's own, in place of none."""
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "answers"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = character_tokenizer(LETTERS)
    build("llama", tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewritten(folder: Path, **changes: Tensor | None) -> None:
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, file, {"format": "pt"})


def with_class(folder: Path, name: str | None, model_type: str) -> None:
    for file, key, value in (
        ("tokenizer_config.json", "tokenizer_class", name),
        ("config.json", "model_type", model_type),
    ):
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**settings, key: value}))


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("transformers looks at the folder again")


def checked(folder: Path) -> list[str]:
    return check_weights(folder, ModelSpec(path=str(folder)), "models.m.path")


def test_check_weights_says_the_same_without_a_second_look(folder: Path, monkeypatch: pytest.MonkeyPatch):
    rewritten(folder, more=zeros(2))
    first = checked(folder)
    assert first == [f"models.m.path: {folder} has 1 tensors that the model does not use (more)"]
    monkeypatch.setattr(weights, "_loading_info", never)
    assert checked(folder) == first
    other = folder.rename(folder.with_name("other"))  # the same content, named as it is now
    assert checked(other) == [f"models.m.path: {other} has 1 tensors that the model does not use (more)"]


def test_check_weights_refuses_tensor_that_is_missing_later(folder: Path):
    assert checked(folder) == []
    rewritten(folder, **{NORM: None})
    for _ in range(2):  # an error is not kept
        with pytest.raises(ConfigError, match=f"lack 1 tensors of the model .{NORM}"):
            checked(folder)


def test_check_weights_refuses_file_that_is_cut_later(folder: Path):
    assert checked(folder) == []
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="is not a whole safetensors file"):
        checked(folder)


def test_check_weights_refuses_config_that_is_changed_later(folder: Path):
    assert checked(folder) == []
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 9}))
    with pytest.raises(ConfigError, match="the weights lack"):
        checked(folder)


def test_known_facts_are_those_of_the_config(folder: Path, monkeypatch: pytest.MonkeyPatch):
    spec = ModelSpec(path=str(folder))
    config = transformers.AutoConfig.from_pretrained(folder)
    assert known_rows(spec, "m", None) == config.vocab_size
    monkeypatch.setattr(preview, "known_config", never)
    assert known_rows(spec, "m", None) == config.vocab_size
    assert known_positions(spec, "m", None) == config.max_position_embeddings


def test_known_facts_keep_infinity(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preview, "positions_of", lambda config: math.inf)
    first = known_facts(ModelSpec(path=str(folder)), "m", None)
    monkeypatch.setattr(preview, "known_config", never)
    assert known_facts(ModelSpec(path=str(folder)), "m", None) == first
    assert first is not None
    assert first.positions == math.inf


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "phi3"])
@pytest.mark.parametrize("name", [None, "PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer"])
def test_load_tokenizer_loads_the_class_of_autotokenizer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, answers: Path, name: str | None, model_type: str
):
    with_class(folder, name, model_type)
    expected = AutoTokenizer.from_pretrained(folder)
    load_tokenizer(folder, trust_remote_code=False, where="m")
    assert list(answers.glob("tokenizer-*.json"))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", never)
    again = load_tokenizer(folder, trust_remote_code=False, where="m")
    assert type(again) is type(expected)
    assert again.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert again.special_tokens_map == expected.special_tokens_map
    assert again("ab 12\tba").input_ids == expected("ab 12\tba").input_ids


def test_load_tokenizer_keeps_no_class_of_unequal_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch, answers):
    with_class(folder, "PreTrainedTokenizerFast", "llama")
    whole = AutoTokenizer.from_pretrained

    def with_other_end(*arguments: Any, **settings: Any) -> Any:
        tokenizer = whole(*arguments, **settings)
        tokenizer.eos_token = "a"
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", with_other_end)
    assert load_tokenizer(folder, trust_remote_code=False, where="m").eos_token == "a"
    assert not answers.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "chat_template.jinja", "other.txt"])
def test_recall_depends_on_content(folder: Path, file: str):
    remembered.keep("x", folder, [1])
    assert remembered.recall("x", folder) == [1]
    assert remembered.recall("y", folder) is None
    (folder / file).write_text("{}")
    assert remembered.recall("x", folder) is None


@pytest.mark.parametrize("why", ["hub", "code", "dev", "registered", "gone", "unwritable"])
def test_keep_keeps_nothing_when_answer_may_differ(
    folder: Path, monkeypatch: pytest.MonkeyPatch, answers: Path, why: str
):
    place: Path | str = folder
    if why == "hub":
        place = "owner/name"
    elif why == "code":
        (folder / "modeling.py").touch()
    elif why == "dev":
        monkeypatch.setattr(remembered, "_versions", lambda: ("5.24.0.dev0",))
    elif why == "registered":
        monkeypatch.setitem(transformers.CONFIG_MAPPING._extra_content, "own", transformers.LlamaConfig)
    elif why == "gone":
        place = folder / "gone"
    else:
        answers.parent.write_text("a file in the place of the cache")
    remembered.keep("x", place, [1])
    assert remembered.recall("x", place) is None
    assert not answers.is_dir()


def test_recall_knows_nothing_when_answer_is_damaged(folder: Path, answers: Path):
    remembered.keep("x", folder, [1])
    (file,) = answers.iterdir()
    file.write_text("[1")
    assert remembered.recall("x", folder) is None


def checks(work: Path, path: Path) -> tuple[str, set[str]]:
    """The output of `opd check` of a recipe with the model at `path`, and what it imported of the heavy libraries."""
    (work / "rows.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in ("ab", "ba")))
    stage = {"name": "s", "train": "m", "method": "grpo", "steps": 1, "prompts_per_step": 1}
    stage |= {"data": {"path": "rows.jsonl"}, "sampling": {"n": 2, "max_completion_length": 4}}
    stage |= {"reward": {"name": "exact"}}
    (work / "recipe.yaml").write_text(
        json.dumps({"name": "r", "models": {"m": {"path": str(path)}}, "stages": [stage]})
    )
    code = (
        "import atexit, sys; atexit.register(lambda: print(*{'torch', 'transformers'} & set(sys.modules))); "
        "sys.argv[1:] = ['check', 'recipe.yaml']; from opd.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *lines, imported = done.stdout.splitlines()
    return "\n".join(lines), set(imported.split())


def test_check_of_known_folder_loads_no_torch(folder: Path, tmp_path: Path):
    (first, loaded), (second, loads) = checks(tmp_path, folder), checks(tmp_path, folder)
    assert loaded == {"torch", "transformers"}
    assert loads == {"transformers"}
    assert first == second
    assert "the reward exact pays" in second


def test_check_of_new_gguf_file_loads_no_torch(tmp_path: Path):
    file, _ = model_file(tmp_path / "model.gguf")
    lines, loads = checks(tmp_path, file)
    assert "the student reads (1 token): 'a'" in lines
    assert loads == {"transformers"}
