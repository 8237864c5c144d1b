"""Formulas of `opd plan` against models counted by hand and by torch; units, sharding, devices."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from opd.commands.plan import flow, formulas, step
from opd.commands.plan.devices import DEVICES, NETWORK_GBS, device_of
from opd.commands.plan.formulas import Shape
from opd.commands.plan.recipe import shape_of
from opd.commands.plan.step import Part, Student, TeacherModel, Work
from opd.engines.vllm import completion_fields, positions_fields
from opd.errors import ConfigError
from opd.models.adapters import add_lora

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 16},
    "qwen3_moe": {
        "tie_word_embeddings": False,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
}
SMALL = Shape(
    layers=2, hidden=8, heads=4, key_value_heads=2, head_dim=2, intermediate=16, vocabulary=100, tied=False
)  # hand-counted below


def config_of(family: str) -> Any:
    return AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})


def work(**changes: Any) -> Work:
    shape = changes.pop("shape", SMALL)
    student = Student(shape=shape, width=4, trained=shape.parameters)
    given: dict[str, Any] = {
        "student": student,
        "teachers": (TeacherModel(name="teacher", place="here", shape=shape, width=2),),
        "support": "full",
        "k": 0,
        "by_position": False,
        "prompts": 8,
        "n": 1,
        "prompt_tokens": 5,
        "context_tokens": 5,
        "response_tokens": 10,
        "micro_batch_tokens": 1000,
        "devices": 1,
    }
    return Work(**{**given, **changes})


def part(parts: list[Part], name: str) -> Part:
    return next(one for one in parts if one.name == name)


def test_parameters_counted_by_hand():
    attention = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8  # q, k, v, o
    mlp = 3 * 8 * 16
    assert SMALL.layer == attention + mlp + 8 + 8
    assert SMALL.parameters == 2 * (attention + mlp + 16) + 2 * 100 * 8 + 8
    assert replace(SMALL, tied=True).parameters == SMALL.parameters - 800


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_equal_those_of_the_model(family):
    model = AutoModelForCausalLM.from_config(config_of(family))
    known = shape_of(model.config, model)
    assert known.shape.extra == 0
    assert known.note is None
    assert known.shape.parameters == sum(p.numel() for p in model.parameters())


def test_parameters_outside_of_the_formulas_are_counted():
    config = AutoConfig.for_model("gemma2", **{**SIZES, "head_dim": 8})
    model = AutoModelForCausalLM.from_config(config)
    known = shape_of(model.config, model)
    assert known.shape.parameters == sum(p.numel() for p in model.parameters())
    assert known.shape.extra == 3 * 2 * 32  # two more norms in each layer
    assert known.note is not None


def kept_by_autograd(model: Any, ids: torch.Tensor, autocast: bool) -> int:
    """Bytes of the storages that a plain forward keeps for its backward, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    block = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), block:
        out = model.model(input_ids=ids, use_cache=False).last_hidden_state
    del out
    return sum(kept.values())


@pytest.mark.parametrize(
    ("width", "autocast"), [(4, False), (2, False), (4, True)], ids=["float32", "bfloat16", "autocast"]
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_activations_equal_what_autograd_keeps(family, width, autocast):
    config = config_of(family)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16 if width == 2 else torch.float32).train()
    shape = shape_of(config, model).shape
    counted = formulas.saved_activations(shape, 4 * 50, width=width, autocast=autocast, checkpointing=False)
    if autocast:
        counted += formulas.cast_weights(shape, checkpointing=False)
    assert counted == pytest.approx(kept_by_autograd(model, torch.randint(60, (4, 50)), autocast), rel=0.03)


def test_checkpointing_keeps_a_layer_and_the_inputs():
    whole = formulas.saved_activations(SMALL, 10, width=4, autocast=False, checkpointing=False)
    less = formulas.saved_activations(SMALL, 10, width=4, autocast=False, checkpointing=True)
    last = 3 * 4 * 8 * 10
    assert less == (whole - last) / 2 + 2 * 4 * 8 * 10 + last


def test_cache_size_is_that_of_the_tensors():
    keys = torch.zeros(3, SMALL.key_value_heads, 20, SMALL.head_dim)
    assert formulas.cache_size(SMALL, 3, 20, 4) == SMALL.layers * 2 * keys.nbytes


def test_experts_that_many_tokens_read():
    shape = replace(SMALL, experts=8, experts_per_token=2)
    one = shape.attention + 16 + 2 * shape.mlp + 8 * 8  # two of eight experts, the whole router
    assert shape.read(1) == pytest.approx(2 * one + 800)
    assert shape.read(10_000) == pytest.approx(2 * shape.layer + 800)
    assert shape.active == 2 * (shape.attention + 2 * shape.mlp + 8 * 8)


def test_lora_parameters_equal_those_of_peft():
    model = AutoModelForCausalLM.from_config(config_of("llama"))
    matrices = [(rows, columns) for _, rows, columns in shape_of(model.config, model).matrices]
    adapted = add_lora(model, rank=3, alpha=1.0, target_modules="all-linear")
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert formulas.lora_parameters(matrices, 3) == trained


def test_bytes_by_position_are_those_of_a_request():
    tokens, k, vocabulary = 400, 16, 10_000
    wanted = np.random.default_rng(0).integers(1000, vocabulary, (tokens, k + 1))
    request, answer = formulas.by_position_bytes(k, vocabulary)
    fields = positions_fields("teacher", [1] * (tokens + 5), 5, wanted, cached=True)
    text = json.dumps(fields["sampling_params"]["prompt_logprob_token_ids"], separators=(",", ":"))
    assert len(text) / tokens == pytest.approx(request, rel=0.03)  # brackets of a row
    file = io.BytesIO()
    np.save(file, np.zeros((tokens, k + 1), dtype=np.float32))
    assert len(base64.b64encode(file.getvalue())) / tokens == pytest.approx(answer, rel=0.01)
    assert completion_fields("teacher", [1], 20)["prompt_logprobs"] == 20
    assert formulas.top_k_bytes(20) == 1500


def test_flops_of_a_forward_counted_by_loops():
    length, pairs = 7, 0
    for position in range(length):
        pairs += position + 1
    attention = SMALL.layers * pairs * SMALL.heads * (2 * SMALL.head_dim + 2 * SMALL.head_dim)
    assert formulas.attention_flops(SMALL, length) == attention
    assert formulas.layers_flops(SMALL, 3, length) == 3 * (attention + 2 * SMALL.active * length)


def test_memory_is_sharded_in_training_and_whole_in_phase_a():
    deep = replace(SMALL, layers=6)
    one, four = (step.memory(work(shape=deep, devices=devices)) for devices in (1, 4))
    size = deep.parameters * 4
    assert part(one, "weights") == Part("weights", size, size, size, size)
    assert part(four, "weights").sampling == size + size / 4
    assert part(four, "weights").loss == size / 4 + (deep.outside + 2 * deep.layer) * 4
    assert part(four, "moments").loss == 2 * size / 4
    assert part(four, "teacher's weights").sampling == deep.parameters * 2
    on_paper = step.memory(work(shape=deep, devices=4, gathers=False, writer="engine"))
    assert part(on_paper, "weights").sampling == size / 4
    assert not any(one.name == "KV cache" for one in on_paper)


def test_memory_of_places_of_a_teacher():
    teacher = TeacherModel(name="teacher", place="offloaded", shape=SMALL, width=2)
    moved = part(step.memory(work(teachers=(teacher,))), "teacher's weights")
    assert (moved.sampling, moved.scoring, moved.loss) == (0, SMALL.parameters * 2, SMALL.output * 2)
    average = replace(teacher, place="average", width=4)
    kept = part(step.memory(work(teachers=(average,))), "teacher's weights")
    assert kept.sampling == SMALL.parameters * (4 + 4)
    served = replace(teacher, place="servers", shape=None)
    assert not any(one.name == "teacher's weights" for one in step.memory(work(teachers=(served,))))


def test_memory_of_hidden_states_and_of_gradients():
    parts = step.memory(work())
    assert part(parts, "teacher's hidden states").loss == 8 * 10 * 8 * 2
    assert (part(parts, "gradients").loss, part(parts, "gradients").backward) == (0, SMALL.parameters * 4)
    several = step.memory(work(micro_batch_tokens=28))
    assert work(micro_batch_tokens=28).micros == (4, 2)
    assert part(several, "gradients").loss == SMALL.parameters * 4
    phase, most = step.peak(parts)
    assert most == sum(getattr(one, phase) for one in parts)


def test_traffic_of_a_served_teacher_and_an_engine():
    served = TeacherModel(name="big", place="servers", shape=None, width=2)
    flows = flow.traffic(work(teachers=(served,), support="top_k", k=20, writer="engine", servers=3))
    assert [one.per_step for one in flows] == [SMALL.parameters * 4 * 3, 75 * 20 * 80]
    lora = replace(work().student, width=2, trained=1000, lora=True)
    (adapter,) = flow.traffic(work(student=lora, writer="engine", servers=3, adapter_alone=True))
    assert adapter.per_step == 1000 * 4 * 3
    flows = flow.traffic(work(teachers=(served,), support="top_k", k=20, by_position=True))
    assert [one.per_token for one in flows] == [21 * 3, 21 * 16 / 3]
    assert [one.per_token for one in flow.traffic(work(teachers=(served,), support="sampled"))] == [81]
    gathered, trained = flow.traffic(work(devices=2))
    assert gathered.per_step == SMALL.parameters * 4
    assert trained.per_step == 3 * SMALL.parameters * 4


def test_seconds_name_what_limits():
    device = DEVICES["h100"]
    wide = Shape(
        layers=2, hidden=1024, heads=16, key_value_heads=8, head_dim=64, intermediate=4096, vocabulary=1000, tied=True
    )
    large = work(shape=wide, response_tokens=500, micro_batch_tokens=50_000)
    times = {one.name: one for one in flow.seconds(large, device)}
    assert list(times) == ["sampling", "scoring", "training"]
    assert (times["sampling"].limit, times["training"].limit) == ("memory", "arithmetic")
    faster = flow.seconds(large, replace(device, bandwidth_gbs=33_500))
    assert faster[0].seconds < times["sampling"].seconds
    network = flow.seconds(replace(large, devices=64), device)
    assert network[-1].limit == "link"


def test_weights_of_4_bits_move_as_they_are_or_made_whole():
    """By hand: 2 layers of 8 x 2 x 2 x 6 + 3 x 8 x 16 + 16 = 592 weights, and 100 x 8 x 2 + 8 outside of them."""
    assert (SMALL.layers * SMALL.layer, SMALL.outside) == (1184, 1608)
    traffic = partial(formulas.weight_traffic, SMALL.parameters, SMALL.outside, 2)
    assert traffic(None, 64) == traffic(None, 5000) == 2 * (1184 + 1608)
    assert traffic(0.5, 64) == 0.5 * 1184 + 2 * 1608
    assert traffic(0.5, 5000) == (0.5 + 2 + 2) * 1184 + 2 * 1608


def test_seconds_of_a_step_count_weights_of_4_bits():
    """Sampling is limited by the weights, which it reads a quarter of; long scoring and training make them whole."""
    device = replace(DEVICES["h100"], bandwidth_gbs=10)  # so that memory limits all three
    wide = Shape(
        layers=8, hidden=1024, heads=16, key_value_heads=8, head_dim=64, intermediate=4096, vocabulary=1000, tied=True
    )

    def moved(layer_width: float | None) -> dict[str, float]:
        student = Student(shape=wide, width=2, trained=1000, lora=True, layer_width=layer_width)
        teacher = TeacherModel(name="teacher", place="here", shape=wide, width=2, layer_width=layer_width)
        one = work(student=student, teachers=(teacher,), n=1, prompt_tokens=1500, context_tokens=1500)
        times = flow.seconds(replace(one, micro_batch_tokens=4000), device)
        assert {time.limit for time in times} == {"memory"}
        return {time.name: time.seconds * 0.6 * 10e9 for time in times}  # BANDWIDTH, and bytes per second

    plain, packed = moved(None), moved(0.5)
    layers = wide.layers * wide.layer
    assert plain["sampling"] - packed["sampling"] == pytest.approx(10 * layers * (2 - 0.5))  # 10 tokens, all rows
    micros = 4  # 8 rows of 1,509 tokens in parts of 4,000
    assert packed["scoring"] - plain["scoring"] == pytest.approx(micros * layers * (0.5 + 2))
    assert packed["training"] - plain["training"] == pytest.approx(2 * micros * layers * (0.5 + 2))


def test_link_between_nodes_is_the_network():
    assert DEVICES["h100"].link(8) == 450e9
    assert DEVICES["h100"].link(9) == NETWORK_GBS * 1e9
    assert DEVICES["l40s"].link(9) == 32e9


def test_device_with_other_numbers_keeps_the_rest():
    own = device_of("h100", memory_gib=10.0, tflops=100.0, bandwidth_gbs=500.0)
    assert own.memory == pytest.approx(10 * 2**30)
    assert (own.bfloat16_tflops, own.float32_tflops, own.bandwidth_gbs, own.link_gbs) == (100.0, 100.0, 500.0, 450)


def test_unknown_device_names_the_nearest():
    with pytest.raises(ConfigError, match=r"--gpu is 'h10'.*h200, h100.* Did you mean 'h100'\?.*--memory-gib"):
        device_of("h10")
    with pytest.raises(ConfigError, match="--tflops is -1, and a device has more than 0"):
        device_of("h100", tflops=-1)


def test_formulas_import_no_torch():
    code = "import sys, opd.commands.plan.flow, opd.commands.plan.devices; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
