"""What a GPU runs is what a CPU runs: Triton's programs against the functions as they are written.

On a CPU Triton interprets them, where it is installed (conftest.py); with OPD_TEST_DEVICE=cuda they run compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from support.models import DEVICE
from torch import Tensor

from opd.maths import divergences, kernels
from opd.maths.closed_forms import CLOSED, closed_form

pytestmark = pytest.mark.numeric

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None or (DEVICE.type == "cpu" and torch.cuda.is_available()),
    reason="Triton is not installed, or it compiles and OPD_TEST_DEVICE=cuda is not set",
)

DIVERGENCES = [
    divergences.reverse_kl,
    divergences.forward_kl,
    divergences.generalised_jsd,
    partial(divergences.generalised_jsd, beta=0.1),
]
SHAPES = [(3, 10), (2, 64), (4, 150), (1, 257)]  # one block in part, one whole, several


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "BLOCK", 64)


def normal(*shape: int, seed: int, spread: float = 3.0) -> Tensor:
    return (spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE)


def in_float64(function: Callable[..., Any], *tensors: Tensor) -> Any:
    return function(*(t.double() if t.is_floating_point() else t for t in tensors))


@needs_triton
@pytest.mark.parametrize("spread", [3.0, 40.0])
@pytest.mark.parametrize(("n", "width"), SHAPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fused_into_gradient_equals_float64_reference(divergence: Any, n: int, width: int, spread: float):
    closed = closed_form(divergence)
    assert closed is not None
    wide = normal(n, width + 5, seed=n, spread=spread)  # rows that do not lie side by side
    logits, teacher = wide[:, :width], normal(n, width, seed=n + 1, spread=spread)
    sampled, weight = torch.arange(n, device=DEVICE)[:, None], torch.rand(n, device=DEVICE)
    reference = logits.double()
    expected = kernels.into_gradient(reference, teacher.double(), sampled, weight.double(), closed)
    before = wide.clone()
    got = kernels.fused_into_gradient(logits, teacher, sampled, weight, closed)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other.float(), atol=2e-5, rtol=2e-5)
    size = 1 + float(expected[0].abs().max())  # p (l - KL) is a difference of numbers of this size
    torch.testing.assert_close(logits, reference.float(), atol=2e-6 * size, rtol=2e-5)
    assert torch.equal(wide[:, width:], before[:, width:]), "nothing is written behind a row"


@needs_triton
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fused_into_gradient_is_zero_when_models_are_equal(divergence: Any):
    closed = closed_form(divergence)
    assert closed is not None
    logits = normal(2, 150, seed=0)
    sampled, weight = torch.zeros(2, 1, dtype=torch.long, device=DEVICE), torch.ones(2, device=DEVICE)
    value, ours, theirs = kernels.fused_into_gradient(logits, logits.clone(), sampled, weight, closed)
    assert torch.equal(ours, theirs)
    assert float(value.abs().max()) < 1e-6
    assert float(logits.abs().max()) < 1e-6


@needs_triton
@pytest.mark.parametrize(("n", "width"), SHAPES)
@pytest.mark.parametrize("spread", [3.0, 1e4])
def test_fused_into_probabilities_equals_plain_reference(n: int, width: int, spread: float):
    logits, factor = normal(n, width, seed=n, spread=spread), normal(n, 1, seed=8)
    expected_z = in_float64(kernels.log_normaliser, logits)
    log_z = kernels.fused_log_normaliser(logits)
    torch.testing.assert_close(log_z, expected_z.float(), atol=2e-6, rtol=2e-6)
    reference = logits.clone()
    kernels.into_probabilities(reference, log_z, factor)
    kernels.fused_into_probabilities(logits, log_z, factor)
    torch.testing.assert_close(logits, reference, atol=1e-7, rtol=1e-5)
    rounding = 2e-7 * (10 + spread)  # of a normaliser of this size, in float32
    torch.testing.assert_close(logits.sum(-1, keepdim=True), factor, atol=0.0, rtol=rounding)


def test_forms_cover_every_closed_form():
    assert set(kernels.FORMS) == set(CLOSED.values())


def test_on_gives_as_written_when_device_is_cpu():
    assert kernels.on(torch.device("cpu")) is kernels.PLAIN


def test_on_warns_when_triton_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    kernels._on_gpu.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Triton is not installed: losses on the GPU launch"):
            assert kernels.on(torch.device("cuda")) is kernels.PLAIN
    finally:
        kernels._on_gpu.cache_clear()
