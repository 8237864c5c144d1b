"""Weights of 4 bits by bitsandbytes (QLoRA, arXiv 2305.14314): loaded, always read alike, and merged exactly."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from opd.errors import ConfigError
from opd.recipe.schema import Quantization

BLOCK, SECOND_BLOCK = 64, 256  # weights that share a scale; scales that share a scale of their own


def config_of(section: Quantization, dtype: torch.dtype, where: str) -> Any:
    """transformers' config of a model that is quantised while it is loaded; products are computed in `dtype`.

    The output layer and the embeddings stay as they are. Raises ConfigError where bitsandbytes cannot be imported.
    """
    try:
        import accelerate  # noqa: F401
        import bitsandbytes  # pyright: ignore[reportMissingImports] # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{where}.quantization needs bitsandbytes and accelerate ({error}). Install them with: "
            "pip install 'opd[quantization]', or leave `quantization` out."
        ) from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.type,
        bnb_4bit_use_double_quant=section.double,
        bnb_4bit_compute_dtype=dtype,
    )


def is_quantised(model: nn.Module) -> bool:
    """Whether layers of the model have weights of 4 bits."""
    return any(hasattr(parameter, "quant_state") for parameter in model.parameters())


def keep_layout(model: nn.Module) -> None:
    """Keep every 4-bit weight in the layout in which it was quantised.

    On a CPU with bfloat16 products of AVX-512, bitsandbytes (0.50) stores a layer's weight anew in its first forward
    without gradient, and rounds its scales to bfloat16. From then on the model gives other numbers (7e-5 in the logits
    of a small model), and a copy of the weight is read in the wrong layout when an adapter is merged. The attribute
    turns that off, as on a processor without these products.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def merged(model: Any) -> nn.Module:
    """A copy of an adapted 4-bit model in which every layer is plain: its dequantised weight plus the adapters' change.

    It computes what the adapted model computes, up to the rounding of the model's dtype. Merged into 4-bit weights, as
    PEFT does, the sum would be quantised again, with a rounding that is often larger than the adapter's change.
    """
    copied = copy.deepcopy(model)
    for name, layer in list(copied.named_modules()):
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        if not isinstance(base, nn.Linear) or not hasattr(base.weight, "quant_state"):
            continue
        if hasattr(layer, "get_base_layer"):
            changes = [layer.get_delta_weight(adapter) for adapter in layer.active_adapters]
        elif name.endswith("base_layer"):  # of an adapter's layer, which is replaced as a whole
            continue
        else:
            changes = []
        copied.set_submodule(name, _plain(base, changes))
    inner: Any = copied.get_base_model()
    inner.hf_quantizer.remove_quantization_config(inner)
    return copied.merge_and_unload().cpu()


def _plain(layer: nn.Linear, changes: list[Tensor]) -> nn.Linear:
    """A linear layer of the dequantised weight and its changes, [out, in]."""
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

    quantised: Any = layer.weight
    weight = dequantize_4bit(quantised.data, quantised.quant_state)
    total = weight.float()
    for change in changes:
        total = total + change.float()
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(total.to(weight.dtype), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return plain


def bytes_per_weight(section: Quantization) -> float:
    """Bytes of a quantised weight: half a byte and its share of the scales.

    A scale of float32 for 64 weights, or with `double` a scale of one byte, and one of float32 for 256 of those.
    """
    return 0.5 + ((1 + 4 / SECOND_BLOCK) / BLOCK if section.double else 4 / BLOCK)
