"""Arithmetic on logits [n, V], in plain torch for CPUs and as Triton kernels for GPUs.

On a GPU the cost is the memory traffic of [n, V]: plain torch reads the logits a dozen times, the kernels a few times.
A kernel runs one program per row, in blocks that stay in registers. On a CPU a tile stays in the cache. `on(device)`
returns the form for a device. Both forms compute the same in float32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from opd.maths import closed_forms
from opd.maths.closed_forms import ClosedForm
from opd.plugins import torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4096  # entries of a row that a program holds at once


WARPS = 8


def log_normaliser(logits: Tensor) -> Tensor:
    """[n, V] -> [n, 1]."""
    return logits.logsumexp(-1, keepdim=True)


def into_probabilities(logits: Tensor, log_z: Tensor, factor: Tensor) -> None:
    """logits [n, V] <- softmax times `factor` [n, 1], in place; `log_z` [n, 1] is the normaliser."""
    logits.sub_(log_z).exp_().mul_(factor)


def into_gradient(
    logits: Tensor, teacher_logits: Tensor, sampled: Tensor, weight: Tensor, closed: ClosedForm
) -> tuple[Tensor, Tensor, Tensor]:
    """A divergence with a closed form (`closed_forms.CLOSED`) at logits [n, V] of both models.

    Returns [n] each: the value, and the student's and the teacher's log-probs of the `sampled` tokens [n, 1].
    Overwrites `logits` with the gradient of sum_i weight_i value_i, `weight` [n]; `teacher_logits` may be lost.
    """
    logits.sub_(logits.amax(-1, keepdim=True))
    teacher_logits.sub_(teacher_logits.amax(-1, keepdim=True))
    student, teacher = logits.gather(-1, sampled)[:, 0], teacher_logits.gather(-1, sampled)[:, 0]
    found = closed(logits, teacher_logits, weight)
    return found.value, student - found.student_log_z, teacher - found.teacher_log_z


@dataclass(frozen=True, slots=True)
class Kernels:
    """The three functions in one form."""

    log_normaliser: Callable[[Tensor], Tensor]
    into_probabilities: Callable[[Tensor, Tensor, Tensor], None]
    into_gradient: Callable[[Tensor, Tensor, Tensor, Tensor, ClosedForm], tuple[Tensor, Tensor, Tensor]]


PLAIN = Kernels(log_normaliser, into_probabilities, into_gradient)


def on(device: torch.device) -> Kernels:
    """The form for tensors on `device`. Warns once for a GPU without Triton."""
    return PLAIN if device.type == "cpu" else _on_gpu()


@cache
def _on_gpu() -> Kernels:
    if find_spec("triton") is None:
        warnings.warn("Triton is not installed: losses on the GPU launch one kernel per operation.", stacklevel=3)
        return PLAIN
    return Kernels(fused_log_normaliser, fused_into_probabilities, fused_into_gradient)


def fused_log_normaliser(logits: Tensor) -> Tensor:
    """`log_normaliser` that reads the logits once."""
    from opd.maths import triton_kernels

    _check_rows(logits)
    out = logits.new_empty(len(logits), 1)
    triton_kernels.log_normaliser[(len(logits),)](logits, out, logits.shape[1], logits.stride(0), **_launch())
    return out


def fused_into_probabilities(logits: Tensor, log_z: Tensor, factor: Tensor) -> None:
    """`into_probabilities` that reads and writes the logits once."""
    from opd.maths import triton_kernels

    _check_rows(logits)
    triton_kernels.into_probabilities[(len(logits),)](
        logits, log_z.contiguous(), factor.contiguous(), logits.shape[1], logits.stride(0), **_launch()
    )


def fused_into_gradient(
    logits: Tensor, teacher_logits: Tensor, sampled: Tensor, weight: Tensor, closed: ClosedForm
) -> tuple[Tensor, Tensor, Tensor]:
    """`into_gradient` that reads both models' logits three times and writes once."""
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


def _form_of(closed: ClosedForm) -> tuple[int, float]:
    """The number of the divergence in the kernel, and beta (used by the generalised JSD only)."""
    if isinstance(closed, partial):
        return FORMS[closed.func], closed.keywords.get("beta", 0.5)
    return FORMS[closed], 0.5


def _launch(**constants: int) -> dict[str, Any]:
    return {"BLOCK": BLOCK, "num_warps": WARPS, **constants}


def _check_rows(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype == torch.float32, tensor.dtype
        assert tensor.stride(1) == 1, "the entries of a row must be adjacent"
