"""The model of a GGUF file, with float32 weights.

For the architectures of `DIRECT` the weights are read here: the file is parsed once, and one map of names is built.
transformers 5.23 parses it for the config and again for the weights, and builds the map once per module. What the keys
and the layouts of an architecture mean is taken from transformers' own tables. Other architectures are loaded by
transformers.
"""

from __future__ import annotations

import math
from typing import Any

from opd.errors import ConfigError
from opd.models.gguf_file import GGUFFile
from opd.models.positions import scaled
from opd.models.ticks import counted
from opd.plugins import np, torch

DIRECT = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
# Keys that transformers' table lacks, and the field of the config that they set.
MORE_KEYS = {
    "attention.key_length": "head_dim",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Keys that state no more than the others do.
WITHOUT_EFFECT = ("attention.value_length", "rope.dimension_count", "attention.causal", "tensor_data_layout")
ROPE_FACTORS = "rope_freqs.weight"  # one divisor for each frequency


def load_model(file: GGUFFile) -> tuple[Any, list[str]]:
    """The model, and notes on what the file states and the model does not have. Raises ConfigError."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    architecture = str(file.get("general.architecture"))
    if architecture in DIRECT and architecture in GGUF_CONFIG_MAPPING:
        fields, notes = _fields(file, architecture, GGUF_CONFIG_MAPPING)
        config, weights = AutoConfig.for_model(**fields), None
    else:
        where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.path.parent), "gguf_file": file.path.name}
        loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        config, weights, notes = loaded.config, loaded.state_dict(), []
        # A model that transformers loads from GGUF keeps a quantizer, which prevents saving and training.
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
    rope = rope_scaling(file, architecture)
    if rope is not None:
        _set_rope(config, rope)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if weights is None:
        weights = _weights(file, architecture, model)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model, notes


def stated_positions(file: GGUFFile) -> float:
    """`positions_of` the model that `load_model` makes, from the header; infinite if it does not state them.

    Infinite also where transformers makes the model: what the header means is then transformers' matter. Raises
    ConfigError for scaled positions that cannot be converted.
    """
    architecture = str(file.get("general.architecture"))
    limit = file.get(f"{architecture}.context_length")
    if architecture not in DIRECT or not isinstance(limit, int) or limit <= 0:
        return math.inf
    # Llama 3's divisors leave the limit as it is, and comparing them reads a tensor.
    rope = None if ROPE_FACTORS in file.tensors else rope_scaling(file, architecture)
    return scaled(limit, rope or {}, by_layer=architecture == "gemma3")


def _fields(file: GGUFFile, architecture: str, table: Any) -> tuple[dict[str, Any], list[str]]:
    """The fields of the config, and a note on the architecture's keys that set none."""
    keys = {f"{prefix}.{key}": field for prefix in ("general", "tokenizer") for key, field in table[prefix].items()}
    keys |= {f"{architecture}.{key}": field for key, field in {**table[architecture], **MORE_KEYS}.items()}
    fields = {field: file.get(key) for key, field in keys.items() if field and key in file.metadata}
    fields["model_type"] = {"gemma3": "gemma3_text"}.get(architecture, architecture)  # a file has its text part
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    fields.setdefault("vocab_size", len(file.get("tokenizer.ggml.tokens") or ()))
    fields.pop("_model_name_or_path", None)
    turned = file.get(f"{architecture}.rope.dimension_count")
    head = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    if turned not in (None, head):
        raise ConfigError(
            f"{file.path} turns {turned} of the {head} dimensions of a head by position (rope.dimension_count), and "
            f"transformers' {architecture} turns all of them. Use the model's Hugging Face folder."
        )
    known = {*keys, *(f"{architecture}.{key}" for key in WITHOUT_EFFECT)}
    unused = [
        key
        for key in file.metadata
        if key.startswith(f"{architecture}.") and key not in known and ".rope.scaling." not in key
    ]
    note = f"{file.path.name} states {', '.join(unused)}, which the converted model does not have."
    return fields, [note] if unused else []


def _weights(file: GGUFFile, architecture: str, model: Any) -> dict[str, torch.Tensor]:
    """The values of the model's parameters. Raises ConfigError if the file's tensors are not the model's."""
    import gguf
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    kind = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    tied = set(model.all_tied_weights_keys)
    shapes = {name: value.shape for name, value in model.state_dict().items() if name not in tied}
    stored = {_stored_name(names, name): name for name in shapes}
    missing = sorted(name for name in stored if name not in file.tensors)
    extra = sorted(name for name in file.tensors if name not in stored and name != ROPE_FACTORS)
    if missing or extra:
        what = [f"has no {', '.join(missing[:4])}"] * bool(missing) + [f"has {', '.join(extra[:4])}"] * bool(extra)
        raise ConfigError(
            f"{file.path} {' and '.join(what)} ({len(missing)} tensors missing, {len(extra)} without a place in "
            f"{type(model).__name__}), so it is not a whole {architecture} model as transformers defines it. Use the "
            "model's Hugging Face folder."
        )
    weights: dict[str, torch.Tensor] = {}
    for name, target in counted("tensors converted", [*stored.items()]):
        value = processor.process(weights=file.tensor(name), name=name).weights
        weights[target] = torch.from_numpy(np.array(value, dtype=np.float32))
        if weights[target].shape != shapes[target]:
            raise ConfigError(
                f"{file.path}: {name} has the shape {tuple(weights[target].shape)}, and {target} needs "
                f"{tuple(shapes[target])}. Use the model's Hugging Face folder."
            )
    return weights


def _stored_name(names: Any, name: str) -> str:
    """The name in the file of a parameter of the model."""
    stem, _, suffix = name.rpartition(".")
    return f"{names.get_name(stem)}.{suffix}"


def _set_rope(config: Any, scaling: dict[str, Any]) -> None:
    """Scale the positions; for layers of several kinds, those of full attention."""
    rope = config.rope_parameters
    rope.get("full_attention", rope).update(scaling)


def rope_scaling(file: GGUFFile, architecture: str) -> dict[str, Any] | None:
    """How rotary positions are scaled, as fields of transformers; None for an unscaled model.

    Raises ConfigError for a kind of scaling that is not known.
    """

    def get(key: str) -> Any:
        return file.get(f"{architecture}.rope.scaling.{key}")

    if ROPE_FACTORS in file.tensors:
        return _llama3(file, architecture, file.tensor(ROPE_FACTORS))
    kind, factor = get("type"), get("factor")
    if any(name.startswith("rope_factors_") for name in file.tensors):  # Phi-3's, whose file states no type
        kind = "longrope"
    original = get("original_context_length")
    if kind in (None, "none"):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        options = {
            "original_max_position_embeddings": original,
            "attention_factor": get("yarn_attn_factor") or get("attn_factor"),
            "beta_fast": get("yarn_beta_fast"),
            "beta_slow": get("yarn_beta_slow"),
        }
        return {"rope_type": "yarn", "factor": factor, **{k: v for k, v in options.items() if v is not None}}
    raise ConfigError(
        f"{file.path} scales its positions in the way {kind!r} (rope.scaling.type), which cannot be converted; linear, "
        "yarn and llama3 can. Use the model's Hugging Face folder."
    )


def _llama3(file: GGUFFile, architecture: str, factors: np.ndarray) -> dict[str, Any]:
    """The fields that give the divisors of the frequencies of Llama 3.1 and later, which the file has as a tensor."""
    theta = file.get(f"{architecture}.rope.freq_base") or 10000.0
    low, high, original, factor = 1.0, 4.0, 8192, float(factors.max())
    expected: list[float] = []
    for i in range(len(factors)):
        turns = original / (2 * math.pi * theta ** (i / len(factors)))  # in the original context
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        expected.append(1 / ((1 - smooth) / factor + smooth))
    if not np.allclose(factors, expected, rtol=1e-3):
        raise ConfigError(
            f"{file.path} divides the frequencies of its positions by factors ({ROPE_FACTORS}) that are not those of "
            "Llama 3.1 and later, which cannot be converted. Use the model's Hugging Face folder."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
