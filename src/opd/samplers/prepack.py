"""Faster linear layers for decoding on a CPU: weights in oneDNN's blocked layout.

A decode step has few rows, so its time is that of reading the weights. torch's float32 BLAS reads them in their plain
layout; oneDNN reads its own blocked layout two to four times faster (benchmarks/limits.py). The layout is computed once
per sampling call, from the weights of the step, and needs memory for a copy of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from opd.models.head import Head
from opd.models.language_model import LanguageModel

SMALLEST = 2**17  # entries of a weight; for smaller weights the call costs more than the layout saves


@contextlib.contextmanager
def prepacked(lm: LanguageModel) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside the block `lm` uses prepacked weights and must not train; yields its output layer, [b, H] -> [b, V].

    No effect on a model that does not compute in float32 on a CPU, or has sharded layers.
    """
    head = lm.head()
    linear = [module for module in lm.model.modules() if type(module) is nn.Linear]
    layers = [layer for layer in linear if _gains(layer.weight, lm) and layer.weight is not head.weight]
    for layer in layers:
        layer.forward = partial(_product, _layout(layer.weight), layer.bias)  # type: ignore[assignment]
    try:
        gains = _gains(head.weight, lm)
        yield partial(_logits, head, _layout(head.weight[: head.vocabulary])) if gains else head.logits
    finally:
        for layer in layers:
            del layer.forward  # restores the class's forward


def _gains(weight: Tensor, lm: LanguageModel) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and weight.numel() >= SMALLEST and not lm.autocast and torch.backends.mkldnn.is_available()


def _layout(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def _product(packed: Tensor, bias: Tensor | None, hidden: Tensor) -> Tensor:
    """[..., H] -> [..., V]."""
    return torch.ops.mkldnn._linear_pointwise(hidden, packed, bias, "none", [], "")


def _logits(head: Head, packed: Tensor, hidden: Tensor) -> Tensor:
    bias = None if head.bias is None else head.bias[: head.vocabulary]
    logits = _product(packed, bias, hidden)
    head.finish_(logits, temperature=1.0)
    return logits
