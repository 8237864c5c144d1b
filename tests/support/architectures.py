"""Tiny models of every decoder architecture in the installed transformers, from its config with small numbers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import nn

VOCABULARY = 61
LARGEST = 2_000_000  # parameters; a config that stays larger is left out

# Wherever a config has a field of this name. Widths are those of four heads of 8; windows are shorter than the rows.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "n_embed", "embed_dim", "embedding_size", "lru_width"), 32),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"), 2
    ),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_head_kv", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "head_size", "attention_head_size"), 8),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff", "dff", "n_inner"), 64
    ),
    **dict.fromkeys(("ffn_hidden_size", "expert_ffn_hidden_size", "moe_intermediate_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("sliding_window", "window_size", "local_attention", "attention_window_size"), 8),
    "attention_chunk_size": 8,
    # recurrent layers
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "conv_state_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_headdim", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_dt_rank", "time_step_rank", "conv_kernel"), 4),
    **dict.fromkeys(("mamba_ngroups", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("linear_num_key_heads", "n_mamba_heads", "mamba_expand"), 2),
    "linear_num_value_heads": 4,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_chunk_size"), 8),
    **dict.fromkeys(("mamba_d_ssm", "attention_hidden_size"), 64),
    "index_topk": 64,  # a row of more tokens is refused
    "index_n_heads": 4,
    "index_head_dim": 16,
    "pad_token_id": 0,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"), 1),
}
SMALL["attention_hidden_size"] = 32

# Latent attention: the heads' parts, and one key for each query head.
LATENT = {
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
GEMMA4 = {
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "layer_types": ["sliding_attention", "full_attention"],
}

BERT_LIKE = [
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
]

# What a config needs beside; None removes a field of SMALL.
ALSO: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "bailing_hybrid", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), LATENT),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "youtu", "hy_v4", "dots3_note_text"), LATENT),
    "deepseek_v2": {**LATENT, "topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "num_experts_per_tok": 2, "n_routed_experts": 4},
    "minicpm3": {**LATENT, "dim_model_base": 32},
    "kimi_linear": {**LATENT, "linear_head_dim": 8, "linear_num_heads": 4},
    "xlstm": {"chunk_size": 8},
    "hyperclovax": {"logits_scaling": 0.5},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "bamba": {"attn_layer_indices": [1], "layer_types": None},
    "falcon": {"head_dim": None},
    "falcon_h1": {"layer_types": None},
    "falcon_mamba": {"layer_types": None},
    "mamba": {"layer_types": None},
    "mamba2": {"layer_types": None, "head_dim": 16},
    "jamba": {
        "layer_types": None,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
    },
    "recurrent_gemma": {"layer_types": None, "num_hidden_layers": 3},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 8, "layer_types": ["full_attention", "sliding_attention"]},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
    "gemma3n_text": {
        **GEMMA4,
        "laurel_rank": 4,
        "intermediate_size": [64, 64],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "xlnet": {"max_position_embeddings": None},
    **{name: {"is_decoder": True} for name in BERT_LIKE},
}


def decoder_types() -> list[str]:
    """The types of all configs that `AutoModelForCausalLM` knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(model_type: str, **settings: Any) -> Any:
    """The config of `model_type` with small numbers, and one layer of every kind that its default names.

    The parts of a model of several kinds of data become small too.
    """
    from transformers import CONFIG_MAPPING

    return _small(CONFIG_MAPPING[model_type], ALSO.get(model_type, {}) | settings)


def _small(kind: Any, settings: dict[str, Any]) -> Any:
    names = {field.name for field in fields(kind)} | set(kind.attribute_map)
    default = vars(kind())
    small = {
        name: value
        for name, value in SMALL.items()
        if name in names and (name not in default or default[name] is not None)
    }
    if "vocab_size" in names:
        small["vocab_size"] = VOCABULARY
    if isinstance(layers := default.get("layer_types"), (list, tuple)):
        layer_kinds = list(dict.fromkeys(layers))
        small["layer_types"] = layer_kinds * 2 if len(layer_kinds) == 1 else layer_kinds
    for part, part_kind in kind.sub_configs.items():
        part_kind = type(default[part]) if default.get(part) is not None else part_kind
        if part_kind.model_type:
            small[part] = _small(part_kind, ALSO.get(part_kind.model_type, {}))
    small |= settings
    if small.get("layer_types"):
        small["num_hidden_layers"] = len(small["layer_types"])
    return kind(**{name: value for name, value in small.items() if value is not None})


def small_model(model_type: str, *, seed: int = 0, spread: float = 0.2, **settings: Any) -> nn.Module:
    """The model of `small_config` with random weights of standard deviation `spread`, so that its distributions differ.

    Raises ValueError if it has more than LARGEST parameters, and whatever transformers raises.
    """
    from transformers import AutoModelForCausalLM

    config = small_config(model_type, **settings)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters: the config of a part keeps its size")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=spread)
    return model.eval()
