"""Small GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from opd.models.vocabularies import BYTE_OF

CONTROL, USER_DEFINED = 3, 4
SPELLING = {byte: char for char, byte in BYTE_OF.items()}
BYTES = [SPELLING[byte] for byte in range(256)]
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def spelled(text: str) -> str:
    """A text in the alphabet of a byte-level vocabulary."""
    return "".join(SPELLING[byte] for byte in text.encode())


def byte_level(words: Sequence[str], **special: int) -> dict[str, Any]:
    """Metadata of a vocabulary of bytes, of `words` with the merges that make them, and of `special` tokens' types."""
    tokens, merges = list(BYTES), list[str]()
    special = special or {"<eos>": CONTROL}
    for word in map(spelled, words):
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*tokens, *special],
        "tokenizer.ggml.token_type": [1] * len(tokens) + list(special.values()),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": len(tokens) + len(special) - 1,
    }


def write_file(file: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> Path:
    """A GGUF file. Whole numbers are written as uint32; a tensor is an array, or (array, quantization)."""
    architecture = metadata.get("general.architecture", "llama")
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    for name, value in (tensors or {}).items():
        array, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, array if kind is None else gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def model_file(
    file: Path, architecture: str = "llama", *, add: Mapping[str, Any] | None = None, **options: Any
) -> tuple[Path, PreTrainedModel]:
    """The GGUF file of `parts_of_model`, and the model. `add` are further metadata and tensors (arrays)."""
    metadata, tensors, model = parts_of_model(architecture, **options)
    extra = dict(add or {})
    metadata |= {key: value for key, value in extra.items() if not isinstance(value, np.ndarray)}
    tensors |= {key: value for key, value in extra.items() if isinstance(value, np.ndarray)}
    return write_file(file, metadata, tensors), model


def parts_of_model(
    architecture: str = "llama", *, seed: int = 0, vocabulary: Mapping[str, Any] | None = None, **settings: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray], PreTrainedModel]:
    """The metadata and tensors of a new small model of random weights, and the model."""
    vocabulary = dict(vocabulary or byte_level(["  ", "ab"], **{"<|im_end|>": CONTROL, "<eos>": CONTROL}))
    kind = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    head = {"head_dim": 128 if architecture == "qwen3" else 8} if architecture != "qwen2" else {}
    shape = {**SHAPE, **head, "vocab_size": len(vocabulary["tokenizer.ggml.tokens"]), **settings}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        "general.name": "tiny",
        f"{architecture}.context_length": config.max_position_embeddings,
        f"{architecture}.block_count": config.num_hidden_layers,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.attention.head_count": config.num_attention_heads,
        f"{architecture}.attention.head_count_kv": config.num_key_value_heads,
        f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{architecture}.rope.freq_base": 10000.0,
        f"{architecture}.rope.dimension_count": head.get("head_dim", 8),
        **vocabulary,
    }
    if head:
        metadata[f"{architecture}.attention.key_length"] = head["head_dim"]
    if architecture.startswith("gemma"):
        metadata[f"{architecture}.attention.sliding_window"] = config.sliding_window
    return metadata, dict(_stored(architecture, model)), model


def _stored(architecture: str, model: Any) -> Any:
    kind = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    for name, value in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if stem == "lm_head" and model.config.tie_word_embeddings:
            continue
        array = value.numpy().copy()
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = model.config.num_attention_heads if stem.endswith("q_proj") else model.config.num_key_value_heads
            # The halves of a head's rows, which transformers keeps apart, alternate in the file.
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if architecture.startswith("gemma") and stem.endswith("norm"):
            array = array + 1
        yield f"{names.get_name(stem)}.{suffix}", array
