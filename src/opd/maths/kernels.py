"""Arithmetic on logits [n, V] that a GPU would read a dozen times, as Triton kernels that read them a few times.

On a GPU a loss over the vocabulary costs what reading and writing [n, V] costs, so each function here has two forms:
as it is written, for CPUs, where a tile stays in the cache; and one program a row, which goes over it in blocks that
stay in registers. `on(device)` gives the form for a device; both compute the same in float32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from opd.maths import closed_forms

WithGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


BLOCK = 4096  # entries of a row that a program holds at once


WARPS = 8


def log_normaliser(logits: Tensor) -> Tensor:
    """[n, V] -> [n, 1]."""
    return logits.logsumexp(-1, keepdim=True)


def into_probabilities(logits: Tensor, log_z: Tensor, factor: Tensor) -> None:
    """logits [n, V] <- softmax times `factor` [n, 1], in place; `log_z` [n, 1] is the normaliser."""
    logits.sub_(log_z).exp_().mul_(factor)


def into_gradient(
    logits: Tensor, teacher_logits: Tensor, sampled: Tensor, weight: Tensor, closed: WithGradient
) -> tuple[Tensor, Tensor, Tensor]:
    """A divergence with a closed form (`gradients.CLOSED`) at logits [n, V] of both models.

    Returns its value and both models' log-probs of the `sampled` tokens [n, 1], student's first: [n] each. `logits`
    are overwritten with the gradient of the values' sum, each weighted by `weight` [n].
    """
    student, teacher = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    student_logp, teacher_logp = student.gather(-1, sampled)[:, 0], teacher.gather(-1, sampled)[:, 0]
    per_token, grad = closed(student, teacher)
    torch.mul(grad, weight[:, None], out=logits)
    return per_token, student_logp, teacher_logp


@dataclass(frozen=True, slots=True)
class Kernels:
    """The three functions in one form."""

    log_normaliser: Callable[[Tensor], Tensor]
    into_probabilities: Callable[[Tensor, Tensor, Tensor], None]
    into_gradient: Callable[[Tensor, Tensor, Tensor, Tensor, WithGradient], tuple[Tensor, Tensor, Tensor]]


PLAIN = Kernels(log_normaliser, into_probabilities, into_gradient)


def on(device: torch.device) -> Kernels:
    """The form for tensors on `device`. Warns, once, where a GPU has to do without Triton."""
    return PLAIN if device.type == "cpu" else _on_gpu()


@cache
def _on_gpu() -> Kernels:
    if find_spec("triton") is None:
        warnings.warn("Triton is not installed: losses on the GPU take a kernel for every operation.", stacklevel=3)
        return PLAIN
    return Kernels(fused_log_normaliser, fused_into_probabilities, fused_into_gradient)


def fused_log_normaliser(logits: Tensor) -> Tensor:
    """`log_normaliser` in one reading of the logits."""
    from opd.maths import triton_kernels

    _check_rows(logits)
    out = logits.new_empty(len(logits), 1)
    triton_kernels.log_normaliser[(len(logits),)](logits, out, logits.shape[1], logits.stride(0), **_launch())
    return out


def fused_into_probabilities(logits: Tensor, log_z: Tensor, factor: Tensor) -> None:
    """`into_probabilities` in one reading and one writing."""
    from opd.maths import triton_kernels

    _check_rows(logits)
    triton_kernels.into_probabilities[(len(logits),)](
        logits, log_z.contiguous(), factor.contiguous(), logits.shape[1], logits.stride(0), **_launch()
    )


def fused_into_gradient(
    logits: Tensor, teacher_logits: Tensor, sampled: Tensor, weight: Tensor, closed: WithGradient
) -> tuple[Tensor, Tensor, Tensor]:
    """`into_gradient` in three readings of both models' logits and one writing."""
    from opd.maths import triton_kernels

    form, beta = _form_of(closed)
    _check_rows(logits, teacher_logits)
    n, width = logits.shape
    value, student_logp, teacher_logp = logits.new_empty(3, n).unbind()
    triton_kernels.into_gradient[(n,)](
        logits,
        teacher_logits,
        sampled.contiguous(),
        weight.float().contiguous(),
        value,
        student_logp,
        teacher_logp,
        width,
        logits.stride(0),
        teacher_logits.stride(0),
        math.log(beta),
        math.log1p(-beta),
        **_launch(FORM=form),
    )
    return value, student_logp, teacher_logp


FORMS = {closed_forms.reverse_kl: 0, closed_forms.forward_kl: 1, closed_forms.generalised_jsd: 2}


def _form_of(closed: WithGradient) -> tuple[int, float]:
    """Which divergence the kernel computes, and beta, which only the generalised JSD reads."""
    if isinstance(closed, partial):
        return FORMS[closed.func], closed.keywords.get("beta", 0.5)
    return FORMS[closed], 0.5


def _launch(**constants: int) -> dict[str, Any]:
    return {"BLOCK": BLOCK, "num_warps": WARPS, **constants}


def _check_rows(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype == torch.float32, tensor.dtype
        assert tensor.stride(1) == 1, "a row is read as it lies"
