"""What is saved is what was trained: weights, config, tokenizer, adapter. A saved model that differs is refused."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import LETTERS, build, tiny

from opd.errors import ConfigError, RunError, TrainingError
from opd.models import adapters, saving, verifying, wrapping
from opd.models.language_model import LanguageModel
from opd.models.new import character_tokenizer

IDS = [3, 4, 5, 6, 7, 2]
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def moe(model_type: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"vocab_size": 10, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape, **heads, **MOE))


def wrapped(model: Any, **lora: Any) -> LanguageModel:
    if lora:
        model = adapters.add_lora(model, **{"rank": 2, "alpha": 4.0, "target_modules": "all-linear", **lora})
    return wrapping.wrap(model, character_tokenizer(LETTERS))


def moved(lm: LanguageModel, spread: float = 0.3) -> LanguageModel:
    """The model after a training, so to say: every trained parameter is another one."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in lm.trainable().values():
            parameter.add_(torch.randn_like(parameter), alpha=spread)
    return lm


def log_probs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([IDS])).logits[0].float().log_softmax(-1)


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def config_in(folder: Path, name: str = "config") -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


# --- tied embeddings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_add_lora_refuses_tied_embeddings(module: str):
    with pytest.raises(ConfigError, match=r"LoRA adapts .*(embed_tokens|lm_head), whose weight is also the weight of"):
        adapters.add_lora(build("llama_tied"), rank=2, alpha=4, target_modules=["q_proj", module])


@pytest.mark.parametrize("ensure", [False, True])
def test_wrap_refuses_adapter_of_tied_embeddings(ensure: bool):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=ensure)
    model: Any = get_peft_model(build("llama_tied"), config)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tied embeddings"):
        wrapping.wrap(model, character_tokenizer(LETTERS))


def test_add_lora_adapts_embeddings_that_are_not_tied(tmp_path: Path):
    lm = moved(wrapped(build("llama"), target_modules=["embed_tokens", "q_proj"]))
    saving.save(lm, tmp_path / "saved")
    torch.testing.assert_close(log_probs(loaded(tmp_path / "saved")), log_probs(lm.model), atol=1e-4, rtol=0)


# --- the share that is adapted ---------------------------------------------------------------------------------------


def test_coverage_names_experts_that_lora_leaves_out():
    line = adapters.coverage(wrapped(moe("gpt_oss"), rank=2).model)
    attention, router, experts = 4 * 16 * 16, 4 * 16, 4 * 16 * 64 + 4 * 32 * 16
    share = attention / (attention + router + experts)
    assert line is not None
    assert line.startswith(f"LoRA adapts 8 of 14 weight matrices, {share:.1%} of their parameters")
    assert "not adapted: mlp.experts.down_proj, mlp.experts.gate_up_proj, mlp.router.weight (experts" in line


@pytest.mark.parametrize(("targets", "matrices"), [("all-linear", 14), (["q_proj", "down_proj"], 4)])
def test_coverage_counts_linear_layers(targets: Any, matrices: int):
    line = adapters.coverage(wrapped(build("llama"), target_modules=targets).model)
    assert line is not None
    assert line.startswith(f"LoRA adapts {matrices} of 14 weight matrices")
    assert ("not adapted" in line) == (matrices < 14)
    assert adapters.coverage(build("llama")) is None


def test_coverage_counts_experts_and_router_of_qwen3_moe():
    line = adapters.coverage(wrapped(moe("qwen3_moe"), rank=2).model)
    assert line == "LoRA adapts 14 of 14 weight matrices, 100.0% of their parameters (without embeddings)"


# --- the comparison --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [{}, {"rank": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("make", [lambda: build("llama_tied"), lambda: build("gpt2"), lambda: moe("qwen3_moe")])
def test_check_saved_finds_no_difference(make: Any, lora: dict[str, Any], tmp_path: Path):
    lm = moved(wrapped(make(), **lora))
    saving.save(lm, tmp_path)
    before = torch.random.get_rng_state()
    assert verifying.check_saved(lm, tmp_path, IDS) < 1e-6
    assert torch.equal(before, torch.random.get_rng_state())


def test_check_saved_refuses_merge_that_moves_tied_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adapters, "check_tied", lambda model: None)
    lm = moved(wrapped(build("llama_tied"), target_modules=["embed_tokens"]))
    saving.save(lm, tmp_path)
    trained, saved = log_probs(lm.model), log_probs(loaded(tmp_path))
    distance = float((trained.exp() * (trained - saved)).sum(-1).mean())
    assert distance > 0.5
    with pytest.raises(TrainingError, match=f"is not the model that was trained: .* differ by {distance:.3g} nats"):
        verifying.check_saved(lm, tmp_path, IDS)


def test_check_saved_refuses_changed_weight(tmp_path: Path):
    """One weight that the compared tokens do not read: the embedding of another token."""
    lm = tiny()
    saving.save(lm, tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][9] += 1e-3
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(TrainingError, match=r"1 of \d+ weights are others, e\.g\. model\.embed_tokens\.weight"):
        verifying.check_saved(lm, tmp_path, IDS)


def test_check_saved_refuses_missing_weight(tmp_path: Path):
    lm = tiny()
    saving.save(lm, tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(TrainingError, match=r"has no weight model\.norm\.weight"):
        verifying.check_saved(lm, tmp_path, IDS)


def test_check_saved_refuses_nan(tmp_path: Path):
    lm = tiny()
    saving.save(lm, tmp_path)
    with torch.no_grad():
        lm.head().weight[4] = torch.nan
    with pytest.raises(TrainingError, match="differ by nan"):
        verifying.check_saved(lm, tmp_path, IDS)


# --- the dtype of the file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
@pytest.mark.parametrize("lora", [{}, {"rank": 2}], ids=["full", "lora"])
def test_save_rounds_to_dtype(family: str, lora: dict[str, Any], tmp_path: Path):
    lm = moved(wrapped(build(family), **lora))
    saving.save(lm, tmp_path / "whole")
    saving.save(lm, tmp_path / "half", torch.bfloat16)
    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    assert set(whole) == set(half)
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in whole.items())
    assert config_in(tmp_path / "half")["dtype"] == "bfloat16"
    assert {p.dtype for p in lm.model.parameters()} == {torch.float32}, "the trained model is not rounded"
    assert 0 < verifying.check_saved(lm, tmp_path / "half", IDS) < 0.05


# --- config, generation config, tokenizer ----------------------------------------------------------------------------


def test_save_restores_dropout_and_jitter_of_origin(tmp_path: Path):
    model: Any = build("llama", attention_dropout=0.25)
    lm = wrapped(model)
    assert model.config.attention_dropout == 0
    lm = wrapped(model)  # as in a second `distill` of the same object
    saving.save(lm, tmp_path / "llama")
    assert config_in(tmp_path / "llama")["attention_dropout"] == 0.25
    assert model.config.attention_dropout == 0, "the model that trains on has no dropout"

    mixtral = moe("mixtral")
    mixtral.config.router_jitter_noise = 0.125
    lm = wrapped(mixtral, rank=2)
    mixtral.config.router_jitter_noise = 0.0  # as a training without noise has it
    saving.save(lm, tmp_path / "mixtral")
    assert config_in(tmp_path / "mixtral")["router_jitter_noise"] == 0.125


def test_save_restores_default_dropout(tmp_path: Path):
    """GPT-2's dropout is 0.1, and files leave out values that are the default."""
    saving.save(wrapped(build("gpt2")), tmp_path)
    assert loaded(tmp_path).config.resid_pdrop == 0.1


@pytest.mark.parametrize(("also", "expected"), [([], 1), ([5, 3], [1, 3, 5])])
def test_save_writes_ids_that_end_a_response(also: list[int], expected: Any, tmp_path: Path):
    model: Any = build("llama")
    model.generation_config.eos_token_id = [1, *also]
    saving.save(wrapped(model), tmp_path)
    assert config_in(tmp_path, "generation_config")["eos_token_id"] == expected


def test_save_keeps_weights_when_generation_config_is_invalid(tmp_path: Path):
    lm = tiny()
    lm.causal_lm.generation_config.temperature = 0.7  # type: ignore[union-attr]
    with pytest.raises(RunError, match=r"has the weights, .*model\.generation_config cannot be saved .*do_sample=True"):
        saving.save(lm, tmp_path)
    assert torch.equal(log_probs(loaded(tmp_path)), log_probs(lm.model))
    assert (tmp_path / "tokenizer.json").exists()


def test_save_keeps_weights_when_config_is_invalid(tmp_path: Path):
    lm = tiny()
    lm.causal_lm.config.auto_map = {"AutoConfig": object()}  # type: ignore[union-attr]  # not JSON
    with pytest.raises(RunError, match=r"has the weights, and could not be completed: model\.config cannot be saved"):
        saving.save(lm, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], lm.head().weight)


def test_save_keeps_invalid_generation_config_of_origin(tmp_path: Path):
    """Published configs can have flags that nothing reads; they are no reason to refuse a training."""
    saving.save(tiny(), tmp_path / "origin")
    file = tmp_path / "origin/generation_config.json"
    file.write_text(json.dumps({"eos_token_id": 1, "temperature": 0.7}))
    lm = wrapping.wrap(loaded(tmp_path / "origin"), character_tokenizer(LETTERS))
    saving.try_to_describe(lm, tmp_path)
    saving.save(lm, tmp_path / "saved")
    assert config_in(tmp_path / "saved", "generation_config")["temperature"] == 0.7


def test_save_unties_config_of_two_weights(tmp_path: Path):
    """transformers keeps an output layer of its own that a file has beside `tie_word_embeddings`; others would not."""
    saving.save(wrapped(build("llama_tied")), tmp_path / "tied")
    assert config_in(tmp_path / "tied")["tie_word_embeddings"] is True
    tensors = load_file(tmp_path / "tied" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)
    save_file(tensors, tmp_path / "tied" / "model.safetensors", {"format": "pt"})
    lm = wrapped(loaded(tmp_path / "tied"))
    saving.save(lm, tmp_path / "saved")
    assert config_in(tmp_path / "saved")["tie_word_embeddings"] is False
    assert torch.equal(log_probs(loaded(tmp_path / "saved")), log_probs(lm.model))


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_save_follows_umask(mask: int, tmp_path: Path):
    before = os.umask(mask)
    try:
        saving.save(wrapped(build("llama"), rank=2), tmp_path / "merged")
        saving.save_adapter(wrapped(build("llama"), rank=2), tmp_path / "adapter", "owner/name")
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 6
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~mask}


# --- the adapter -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: build("llama"), lambda: moe("qwen3_moe")], ids=["llama", "qwen3_moe"])
def test_save_adapter_gives_equal_logits_when_loaded_by_peft(make: Any, tmp_path: Path):
    from peft import PeftModel

    base = tmp_path / "base"
    saving.save(wrapped(make()), base)
    lm = moved(wrapped(loaded(base), rank=2))
    saving.save_adapter(lm, tmp_path / "adapter", str(base))
    verifying.check_saved_adapter(lm, tmp_path / "adapter")
    described = config_in(tmp_path / "adapter", "adapter_config")
    assert described["base_model_name_or_path"] == str(base)
    assert described["r"] == 2
    again = PeftModel.from_pretrained(loaded(base), tmp_path / "adapter")
    torch.testing.assert_close(log_probs(again), log_probs(lm.model), atol=1e-5, rtol=0)
    assert float((log_probs(loaded(base)) - log_probs(lm.model)).abs().max()) > 0.1, "the adapter mattered"


def test_check_saved_adapter_refuses_other_adapter(tmp_path: Path):
    lm = wrapped(build("llama"), rank=2)
    saving.save_adapter(lm, tmp_path, "owner/name")
    with pytest.raises(TrainingError, match="is not the adapter that was trained"):
        verifying.check_saved_adapter(moved(lm), tmp_path)


def test_try_to_describe_refuses_what_save_would(tmp_path: Path):
    lm = tiny()
    lm.causal_lm.generation_config.temperature = 0.7  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"could not be saved after the training: model\.generation_config .*`do_sa"):
        saving.try_to_describe(lm, tmp_path)


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2", "mixtral", "lora"])
def test_tensors_of_are_those_of_the_file(tmp_path, kind):
    """Names, shapes and values: of experts one by one, without a shared output layer, merged."""
    lm = wrapped(moe(kind)) if kind == "mixtral" else tiny(kind.replace("lora", "llama_tied"))
    if kind == "lora":
        lm = wrapped(lm.model, rank=3)
    lm = moved(lm)
    saving.save(lm, tmp_path)
    written, found = load_file(tmp_path / "model.safetensors"), saving.tensors_of(lm)
    assert found.keys() == written.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in written.items())
