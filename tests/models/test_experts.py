"""Routers of mixtures: which modules they are, and the choices that hooks on them record."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.architectures import small_model
from support.models import tiny
from torch import Tensor, nn

from opd.errors import ConfigError
from opd.loss.balance import add_choices
from opd.models.adapters import add_lora
from opd.models.experts import coefficient_in, coefficient_of, left_out, recorded, routers_of
from opd.models.forward import reads_of, response_states
from opd.models.language_model import EXACT, LanguageModel, Reading

# The routers of two layers, of which the first is dense in some architectures.
ROUTERS = {
    "mixtral": ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
    "qwen3_moe": ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
    "gpt_oss": ["model.layers.0.mlp.router", "model.layers.1.mlp.router"],
    "deepseek_v3": ["model.layers.1.mlp.gate"],
    "olmoe": ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
    "granitemoe": ["model.layers.0.block_sparse_moe.router", "model.layers.1.block_sparse_moe.router"],
    "phimoe": ["model.layers.0.mlp.router", "model.layers.1.mlp.router"],
    "qwen3_next": ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
    "llama4_text": ["model.layers.0.feed_forward.router", "model.layers.1.feed_forward.router"],
    "jetmoe": [
        *("model.layers.0.mlp.router", "model.layers.0.self_attention.experts.router"),
        *("model.layers.1.mlp.router", "model.layers.1.self_attention.experts.router"),
    ],
    "llama": [],
}
SYSTEM = [2, 3, 4, 5, 6, 7, 8, 9] * 3
PROMPTS = {
    "groups": [[*SYSTEM, 3], [*SYSTEM, 3], [*SYSTEM[::-1], 5, 6], [*SYSTEM[::-1], 5, 6]],
    "system prompt": [[*SYSTEM, 3], [*SYSTEM, 7, 8], [*SYSTEM, 5, 6, 2], [*SYSTEM, 4]],
    "nothing shared": [[3], [7, 8], [5, 6, 2], [4]],
}
RESPONSES = [[2, 3, 4], [5], [6, 7, 8, 9, 2, 3], [4, 4]]


def wrapped(model: nn.Module, **reading: Any) -> LanguageModel:
    return LanguageModel(
        model=model,
        tokenizer=None,
        vocabulary=61,
        stop_ids=frozenset({1}),
        reading=Reading(**reading) if reading else EXACT,
    )


def choices_of(lm: LanguageModel, prompts: list[list[int]]) -> dict[str, list[int]]:
    """What one training forward records."""
    choices: dict[str, Tensor] = {}
    with torch.no_grad(), recorded(routers_of(lm.model), reads_of(lm, prompts, RESPONSES)) as recording:
        response_states(lm, prompts, RESPONSES)
    add_choices(choices, recording)
    assert not recording.unread
    return {name: counts.tolist() for name, counts in choices.items()}


def choices_alone(lm: LanguageModel, prompts: list[list[int]]) -> dict[str, list[int]]:
    """The same from each whole sequence alone, counted where the experts get their tokens (`Experts.forward`)."""
    found: dict[str, list[int]] = {}
    handles: list[Any] = []
    for name, module in lm.model.named_modules():
        if type(module).__name__.endswith("Experts"):

            def hook(_: nn.Module, given: Any, where: str = name, module: Any = module) -> None:
                counts = found.setdefault(where, [0] * module.num_experts)
                for expert in given[1].reshape(-1).tolist():
                    counts[expert] += 1

            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for prompt, response in zip(prompts, RESPONSES, strict=True):
            lm.model(input_ids=torch.tensor([[*prompt, *response[:-1]]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", ROUTERS)
def test_routers_of_finds_the_router_of_each_layer(kind: str):
    assert [router.name for router in routers_of(small_model(kind))] == ROUTERS[kind]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe"])
@pytest.mark.parametrize("prompts", PROMPTS)
def test_recorded_counts_what_each_sequence_alone_chooses(kind: str, prompts: str):
    lm = wrapped(small_model(kind))
    for router in routers_of(lm.model):
        if hasattr(router.module, "e_score_correction_bias"):  # the choice then differs from the largest logits
            router.module.e_score_correction_bias.copy_(torch.tensor([0.5, -0.5, 0.2, 0.0]))  # type: ignore[union-attr]
    expected = choices_alone(lm, PROMPTS[prompts])
    tokens = sum(len(p) + len(r) - 1 for p, r in zip(PROMPTS[prompts], RESPONSES, strict=True))
    assert {sum(counts) for counts in expected.values()} == {2 * tokens}
    for training in (False, True):
        lm.model.train(training)
        assert list(choices_of(lm, PROMPTS[prompts]).values()) == list(expected.values())


def test_recorded_counts_the_same_when_rows_are_read_alone():
    model = small_model("qwen3_moe")
    alone = choices_of(wrapped(model, together=False), PROMPTS["groups"])
    assert alone == choices_of(wrapped(model), PROMPTS["groups"])


@pytest.mark.parametrize("kind", ["llama4_text", "jetmoe"])
def test_recorded_takes_largest_logits_without_indices(kind: str):
    lm = wrapped(small_model(kind))
    routers = routers_of(lm.model)
    ids = torch.arange(2, 14).reshape(2, 6)
    with torch.no_grad(), recorded(routers, [torch.ones(12, dtype=torch.long)], logits=True) as recording:
        lm.model(input_ids=ids)
    assert len(recording.decisions) == len(routers)
    for one in recording.decisions:
        assert one.logits is not None
        expected = [0] * 4
        for row in one.logits.tolist():
            for expert in sorted(range(4), key=lambda e: -row[e])[: one.chosen.shape[1]]:
                expected[expert] += 1
        assert one.counts.tolist() == expected


def test_recorded_names_router_whose_result_has_other_rows():
    lm = wrapped(small_model("mixtral"))
    with torch.no_grad(), recorded(routers_of(lm.model), [torch.ones(5, dtype=torch.long)]) as recording:
        lm.hidden(torch.arange(2, 8)[None])
    assert not recording.decisions
    assert recording.unread == set(ROUTERS["mixtral"])


def test_recorded_names_routers_that_do_not_say_who_runs():
    zaya = wrapped(small_model("zaya"))
    with torch.no_grad(), recorded(routers_of(zaya.model), [torch.ones(6, dtype=torch.long)]) as recording:
        zaya.hidden(torch.arange(2, 8)[None])
    assert (len(recording.decisions), len(recording.unread)) == (0, 2)
    with pytest.raises(ConfigError, match="has no router that opd can read"):
        coefficient_of(zaya.model, 0.1, "Stage 's'")


def test_routers_of_are_the_same_with_lora():
    from peft import LoraConfig, get_peft_model

    model: Any = small_model("qwen3_moe")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    lm = wrapped(adapted)
    assert sorted(sum(counts) for counts in choices_of(lm, PROMPTS["groups"]).values()) == [2 * 110, 2 * 110]


@pytest.mark.parametrize("kind", ["phimoe", "llama4_text"])
def test_add_lora_leaves_out_routers_that_return_tuples(kind: str):
    model = small_model(kind)
    with torch.no_grad():
        expected = model(input_ids=torch.arange(2, 8)[None]).logits
        adapted: Any = add_lora(model, rank=2, alpha=4.0, target_modules="all-linear")
        assert torch.equal(adapted(input_ids=torch.arange(2, 8)[None]).logits, expected)  # new adapters add 0
    names = {name.rpartition(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert any(name.endswith("q_proj") for name in names)
    assert not any("router" in name for name in names)


def test_coefficient_of_reads_number_and_config():
    olmoe = small_model("olmoe", router_aux_loss_coef=0.02)
    found = [coefficient_of(olmoe, setting, "Stage 's'") for setting in (False, 0.0, 0.5, 1.0, True)]
    assert found == [0.0, 0.0, 0.5, 1.0, 0.02]
    assert coefficient_of(small_model("jetmoe"), True, "Stage 's'") == 0.01  # its config calls it aux_loss_coef


def test_coefficient_of_refuses_dense_models_and_true_without_one():
    with pytest.raises(ConfigError, match=r"router_aux_loss is 0\.1, and the model \(LlamaForCausalLM\) has no router"):
        coefficient_of(tiny().model, 0.1, "Stage 's'")
    with pytest.raises(ConfigError, match=r"no router_aux_loss_coef above 0\. Set router_aux_loss to a number"):
        coefficient_of(small_model("deepseek_v3"), True, "Stage 's'")


def test_left_out_names_the_loss_of_the_config():
    olmoe = small_model("olmoe", router_aux_loss_coef=0.02)
    line = left_out(olmoe, False)
    assert line is not None
    assert "a load-balancing loss of its routers with the coefficient 0.02" in line
    assert "output_router_logits" not in line
    assert "output_router_logits" in (left_out(small_model("mixtral", output_router_logits=True), 0.0) or "")
    dense = small_model("granitemoehybrid", num_local_experts=0)  # its config has the coefficient, its layers no router
    assert coefficient_in(dense.config) > 0
    assert [left_out(olmoe, True), left_out(olmoe, 0.1), left_out(dense, False), left_out(tiny().model, False)] == [
        None
    ] * 4


@pytest.mark.parametrize(
    "kind",
    [
        *("afmoe", "axk1", "bailing_hybrid", "cohere2_moe", "deepseek_v2", "deepseek_v32", "dots1", "ernie4_5_moe"),
        *("exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "granitemoe_swa", "granitemoehybrid"),
        *("granitemoeshared", "hunyuan_v1_moe", "hy_v3", "inkling_text", "jamba", "kimi_linear", "laguna", "lfm2_moe"),
        *("longcat_flash", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl_text", "nemotron_h"),
        *("phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_next", "solar_open"),
    ],
)
def test_recorded_reads_the_routers_of_other_mixtures(kind: str):
    lm = wrapped(small_model(kind))
    routers = routers_of(lm.model)
    with torch.no_grad(), recorded(routers, [torch.ones(12, dtype=torch.long)], logits=True) as recording:
        lm.hidden(torch.arange(2, 14).reshape(2, 6))
    assert [one.router for one in recording.decisions] == [router.name for router in routers]
    assert routers
    for one in recording.decisions:
        assert int(one.counts.sum()) == 12 * one.chosen.shape[1]
        assert one.mass.sum().item() == pytest.approx(12, rel=1e-5)


def test_mass_takes_probabilities_of_gemma4_as_they_are():
    settings = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    lm = wrapped(small_model("gemma4_text", **settings))
    routers = routers_of(lm.model)
    with torch.no_grad(), recorded(routers, [torch.ones(6, dtype=torch.long)], logits=True) as recording:
        lm.hidden(torch.arange(2, 8)[None])
    for one in recording.decisions:
        assert one.logits is not None
        torch.testing.assert_close(one.mass, one.logits.sum(0))
        assert one.mass.sum().item() == pytest.approx(6, rel=1e-5)
    assert len(recording.decisions) == 2


def test_reads_of_counts_each_token_of_a_packed_row_once():
    lm = wrapped(small_model("qwen3_moe"))
    lm.model.config._attn_implementation = "flash_attention_2"  # type: ignore[union-attr]
    assert lm.packs
    assert [reads.tolist() for reads in reads_of(lm, PROMPTS["nothing shared"], RESPONSES)] == [[1] * 15]
