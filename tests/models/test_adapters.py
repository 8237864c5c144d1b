"""Adapter folders: a teacher is merged, a student goes on training; adapters outside the layers are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import LETTERS, build
from torch import Tensor, nn

import opd
from opd.errors import ConfigError
from opd.models import wrapping
from opd.models.language_model import LanguageModel
from opd.models.loading import load_model
from opd.models.new import character_tokenizer
from opd.models.preview import known_positions, tokenizer_of
from opd.recipe.schema import ModelSpec
from opd.teachers.local import local_teacher
from opd.types import TeacherRule

IDS = torch.tensor([[2, 5, 3, 9, 4, 6]])
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
SETTINGS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=2, lora_alpha=8, target_modules=PROJECTIONS, task_type="CAUSAL_LM"),
    "rslora": peft.LoraConfig(r=4, use_rslora=True, target_modules=PROJECTIONS, task_type="CAUSAL_LM"),
    "dora": peft.LoraConfig(r=2, use_dora=True, target_modules=PROJECTIONS, task_type="CAUSAL_LM"),
    "whole layers": peft.LoraConfig(
        r=2, target_modules=PROJECTIONS, modules_to_save=["lm_head", "embed_tokens"], task_type="CAUSAL_LM"
    ),
    "ia3": peft.IA3Config(target_modules=PROJECTIONS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "loha": peft.LoHaConfig(r=2, target_modules=PROJECTIONS, task_type="CAUSAL_LM"),
}
VIRTUAL: dict[str, Any] = {
    "PROMPT_TUNING": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "P_TUNING": peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tokenizer = character_tokenizer(LETTERS)
    build("llama", tokenizer).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained(base: Path, folder: Path, config: Any) -> Tensor:
    """Write an adapter whose weights are random, not zero; the logits of peft's own model."""
    from transformers import AutoModelForCausalLM

    model: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), copy.deepcopy(config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.empty_like(parameter).normal_(std=0.3, generator=generator))
        model.save_pretrained(folder)
        return model.eval()(input_ids=IDS).logits


def spec_of(path: Path, **settings: Any) -> ModelSpec:
    return ModelSpec(path=str(path), **settings)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", SETTINGS)
def test_load_model_merges_adapter_of_teacher(base: Path, tmp_path: Path, kind: str):
    expected = trained(base, tmp_path / "adapter", SETTINGS[kind])
    lm = load_model(spec_of(tmp_path / "adapter"), name="teacher")
    assert not lm.adapters
    assert not torch.allclose(logits(load_model(spec_of(base), name="b").model), expected, atol=1e-2)
    torch.testing.assert_close(logits(lm.model), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(lm.head().logits(lm.hidden(IDS)), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", SETTINGS)
def test_load_model_goes_on_training_adapter_of_student(base: Path, tmp_path: Path, kind: str):
    expected = trained(base, tmp_path / "adapter", SETTINGS[kind])
    lm = load_model(spec_of(tmp_path / "adapter"), name="student", trains=True)
    assert lm.adapters
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(p.numel() for p in lm.trainable().values()) == sum(t.numel() for t in saved.values())
    torch.testing.assert_close(lm.head().logits(lm.hidden(IDS)), expected, atol=2e-5, rtol=1e-4)


def test_load_model_merges_adapter_before_new_lora(base: Path, tmp_path: Path):
    expected = trained(base, tmp_path / "adapter", SETTINGS["lora"])
    lm = load_model(spec_of(tmp_path / "adapter", lora={"rank": 3}), name="student", trains=True)
    assert {p.shape[0] for name, p in lm.trainable().items() if "lora_A" in name} == {3}
    torch.testing.assert_close(logits(lm.model), expected, atol=2e-5, rtol=1e-4)
    with lm.model.disable_adapter():  # type: ignore[operator]
        torch.testing.assert_close(logits(lm.model), expected, atol=2e-5, rtol=1e-4)


def test_load_model_uses_tokenizer_of_adapter_else_of_base(base: Path, tmp_path: Path):
    trained(base, tmp_path / "adapter", SETTINGS["lora"])
    spec = spec_of(tmp_path / "adapter")
    found: Any = tokenizer_of(spec, "m")
    assert found.get_vocab() == character_tokenizer(LETTERS).get_vocab()
    assert known_positions(spec, "m", None) == 256
    own = character_tokenizer(LETTERS)
    own.chat_template = "{{ messages[0].content }}"
    own.save_pretrained(tmp_path / "adapter")
    found = tokenizer_of(spec, "m")
    assert load_model(spec, name="m").tokenizer.chat_template == found.chat_template == own.chat_template


def test_load_model_loads_adapter_of_adapter(base: Path, tmp_path: Path):
    trained(base, tmp_path / "first", SETTINGS["lora"])
    merged = load_model(spec_of(tmp_path / "first"), name="m")
    merged.causal_lm.save_pretrained(tmp_path / "merged")  # type: ignore[operator]
    expected = trained(tmp_path / "merged", tmp_path / "second", SETTINGS["dora"])
    file = tmp_path / "second" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "first")}))
    torch.testing.assert_close(
        logits(load_model(spec_of(tmp_path / "second"), name="m").model), expected, atol=5e-5, rtol=1e-4
    )


@pytest.mark.parametrize("kind", VIRTUAL)
def test_load_model_refuses_virtual_tokens(base: Path, tmp_path: Path, kind: str):
    trained(base, tmp_path / "adapter", VIRTUAL[kind])
    for load in (load_model, tokenizer_of):
        with pytest.raises(ConfigError, match=rf"{tmp_path}/adapter is an adapter of the type {kind}, which changes"):
            load(spec_of(tmp_path / "adapter"), name="teacher")


@pytest.mark.parametrize("kind", VIRTUAL)
def test_wrap_refuses_model_with_virtual_tokens(kind: str):
    tokenizer = character_tokenizer(LETTERS)
    model: Any = peft.get_peft_model(build("llama", tokenizer), copy.deepcopy(VIRTUAL[kind]))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"teacher is an adapter of the type {kind}"):
        wrapping.wrap(model, tokenizer, name="teacher")


def test_load_model_refuses_adapter_without_some_tensors(base: Path, tmp_path: Path):
    trained(base, tmp_path / "adapter", SETTINGS["lora"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop("base_model.model.model.layers.0.mlp.down_proj.lora_B.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks tensors of its adapter.*layers\.0\.mlp\.down_proj\.lora_B"):
        load_model(spec_of(tmp_path / "adapter"), name="teacher")


@pytest.mark.parametrize("base_path", [None, "./nowhere"])
def test_load_model_refuses_adapter_without_base(base: Path, tmp_path: Path, base_path: str | None):
    trained(base, tmp_path / "adapter", SETTINGS["lora"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base_path}))
    message = (
        "does not name the model" if base_path is None else r"base_model_name_or_path in .* nowhere does not exist"
    )
    with pytest.raises(ConfigError, match=message):
        load_model(spec_of(tmp_path / "adapter"), name="teacher")


def test_load_model_refuses_pickled_adapter(base: Path, tmp_path: Path):
    trained(base, tmp_path / "adapter", SETTINGS["lora"])
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"has no adapter_model\.safetensors\. opd loads only safetensors"):
        load_model(spec_of(tmp_path / "adapter"), name="teacher")


@pytest.mark.parametrize("fresh", [True, False])
def test_local_teacher_freezes_trained_adapter(base: Path, tmp_path: Path, fresh: bool):
    """The frozen student is the student at its start: with its adapter, unless the adapter still adds nothing."""
    student: LanguageModel
    if fresh:
        student = load_model(spec_of(base, lora={"rank": 2}), name="student", trains=True)
    else:
        trained(base, tmp_path / "adapter", SETTINGS["lora"])
        student = load_model(spec_of(tmp_path / "adapter"), name="student", trains=True)
    expected = logits(student.model).clone()
    teacher = local_teacher(TeacherRule(kind="self_frozen"), student, None, micro_batch_tokens=64)
    with torch.no_grad():
        for parameter in student.trainable().values():
            parameter.add_(0.1)
    with teacher.at_work() as head, torch.no_grad():
        torch.testing.assert_close(head.logits(teacher.lm.hidden(IDS)), expected, atol=2e-5, rtol=1e-4)


def test_run_continues_adapter_and_saves_whole_model(base: Path, tmp_path: Path):
    trained(base, tmp_path / "adapter", SETTINGS["lora"])
    run = opd.distill(
        student=tmp_path / "adapter",
        teacher=base,
        prompts=["abc", "hgf"],
        steps=2,
        sampling={"max_completion_length": 4},
        optimizer={"learning_rate": 1e-2},
        output_dir=tmp_path / "run",
        quiet=True,
    )
    saved = load_model(spec_of(tmp_path / "run" / "distill" / "model"), name="m")
    torch.testing.assert_close(logits(saved.model), logits(run.student), atol=2e-5, rtol=1e-4)
    before = load_model(spec_of(tmp_path / "adapter"), name="m")
    assert not torch.allclose(logits(saved.model), logits(before.model), atol=1e-3)


@pytest.mark.parametrize("kind", SETTINGS)
def test_load_model_begins_new_adapter_after_a_stage(base: Path, tmp_path: Path, kind: str):
    """The stage's model has its adapter merged; the next stage trains an adapter of the same settings, from zero."""
    trained(base, tmp_path / "adapter", SETTINGS[kind])
    first = load_model(spec_of(tmp_path / "adapter"), name="student", trains=True)
    again = load_model(spec_of(tmp_path / "adapter"), name="student", trains=True, folder=base)
    assert {n: p.shape for n, p in again.trainable().items()} == {n: p.shape for n, p in first.trainable().items()}
    expected = load_model(spec_of(base), name="student")
    torch.testing.assert_close(logits(again.model), logits(expected.model), atol=2e-5, rtol=1e-4)


def test_run_trains_adapter_in_two_stages(base: Path, tmp_path: Path):
    trained(base, tmp_path / "adapter", SETTINGS["lora"])
    (tmp_path / "train.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "hgf"}\n')
    stage: dict[str, Any] = {
        "train": "student",
        "teacher": "teacher",
        "method": "reverse_kl",
        "data": {"path": str(tmp_path / "train.jsonl")},
        "sampling": {"max_completion_length": 4},
        "optimizer": {"learning_rate": 1e-2},
        "steps": 1,
        "save": "both",
    }
    models = {"student": {"path": str(tmp_path / "adapter")}, "teacher": {"path": str(base)}}
    stages = [{"name": "one", **stage}, {"name": "two", **stage}]
    run = opd.run({"name": "r", "output_dir": str(tmp_path / "run"), "models": models, "stages": stages}, quiet=True)
    adapted = load_model(spec_of(tmp_path / "run" / "two" / "adapter"), name="m")
    torch.testing.assert_close(logits(adapted.model), logits(run.student), atol=2e-5, rtol=1e-4)
    first = load_model(spec_of(tmp_path / "run" / "one" / "model"), name="m")
    for name in ("model.layers.0.self_attn.k_proj.weight", "lm_head.weight"):  # outside the adapter
        assert torch.equal(adapted.model.state_dict()[name], first.model.state_dict()[name])
