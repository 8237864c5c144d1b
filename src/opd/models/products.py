"""Float32 products on a CPU, by the faster of the two libraries inside torch.

torch computes them with MKL. On processors with AVX-512 that are not Intel's, MKL takes more than twice the time of
oneDNN, which the same wheel has: products of 1,024 x 576 with 576 x 1,536 ran at 206 GFLOP/s against 481 on two cores
of an AMD EPYC. `linear` computes a product with oneDNN there, forward and backward, and `faster_products` does so for
the linear layers inside a block. Elsewhere both are torch's own. `torch.backends.mkldnn.flags(enabled=False)` turns
oneDNN off. The choice depends on the processor and the sizes alone, so that a run repeats to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

CPU_INFO = Path("/proc/cpuinfo")
SMALLEST = 2**22  # multiplications of a product; for smaller ones the calls differ by less than their own time
FEWEST = 256  # tokens of a forward; a decode step has fewer
NARROWEST = 256  # rows and columns of a weight's gradient: narrower ones are as fast or faster with MKL


@cache
def slow_mkl() -> bool:
    """Whether this processor has AVX-512 and is not Intel's. False where that cannot be read, outside Linux."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "GenuineIntel" not in CPU_INFO.read_text()
    except OSError:
        return False


def prefers_onednn() -> bool:
    """Whether large float32 products are computed with oneDNN."""
    return slow_mkl() and bool(torch.backends.mkldnn.enabled)


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs [..., H] times weight [V, H], transposed, plus bias [V]: [..., V]. Either may have any strides."""
    if _gains(inputs, weight, bias):
        return _Linear.apply(inputs, weight, bias)  # type: ignore[no-any-return]
    return nn.functional.linear(inputs, weight, bias)


def to_float32(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` in float32, from weights and inputs of one type.

    On CUDA a product of bfloat16 or float16 is summed in float32 and stays float32. On a CPU torch 2.13 has no such
    product: there the result is rounded to the weights' type first, 4.5e-3 nats per log-prob in bfloat16
    (benchmarks/limits.py).
    """
    half = weight.dtype in (torch.bfloat16, torch.float16) and weight.device.type == "cuda"
    if half and not (torch.is_grad_enabled() and (inputs.requires_grad or weight.requires_grad)):
        out = torch.mm(inputs.flatten(0, -2), weight.t(), out_dtype=torch.float32)
        return (out if bias is None else out + bias).unflatten(0, inputs.shape[:-1])
    return linear(inputs, weight, bias).float()


def faster_products(tokens: int) -> AbstractContextManager[Any]:
    """A block in which linear layers compute with `linear`, where that can gain for so many tokens.

    A decode step is left out: the block costs Python time at each call of a function of torch.
    """
    return _Products() if tokens >= FEWEST and prefers_onednn() else contextlib.nullcontext()


class _Products(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is nn.functional.linear:
            return linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _gains(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN computes this product, and in less time. Sharded weights and autocast are left to torch."""
    return (
        prefers_onednn()
        and inputs.numel() * len(weight) >= SMALLEST
        and all(_plain(tensor) for tensor in (inputs, weight, bias) if tensor is not None)
        and not torch.is_autocast_enabled("cpu")
    )


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # A weight with other strides than these takes 1,000 times as long (torch 2.13).
    return torch.ops.mkldnn._linear_pointwise(_dense(inputs), _dense(weight), bias, "none", [], "")  # type: ignore[no-any-return]


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, if its memory is dense or, of a matrix, that of its transpose; else a copy."""
    transposed = tensor.dim() == 2 and tensor.t().is_contiguous()
    return tensor if transposed else tensor.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return _product(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        inputs, weight = ctx.saved_tensors
        of_inputs, of_weight, of_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        return (
            _product(grad, weight.t()) if of_inputs else None,
            _weight_gradient(flat, inputs.flatten(0, -2)) if of_weight else None,
            flat.sum(0) if of_bias else None,
        )


def _weight_gradient(grad: Tensor, inputs: Tensor) -> Tensor:
    """[V, H] from grad [N, V] and inputs [N, H]."""
    wide = min(grad.shape[1], inputs.shape[1]) >= NARROWEST
    return _product(grad.t(), inputs.t()) if wide else grad.t() @ inputs
