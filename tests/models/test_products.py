"""Products by oneDNN: values, gradients, what is left to torch, and that a model's layers use them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models import DEVICE, tiny
from torch import Tensor, nn

from opd.models import products
from opd.models.head import Head
from opd.models.products import faster_products, linear, slow_mkl, to_float32

pytestmark = pytest.mark.numeric


@pytest.fixture
def onednn(monkeypatch) -> list[tuple[int, ...]]:
    """As on a processor with a slow MKL, at every size; the shapes of the products that oneDNN computed."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    computed: list[tuple[int, ...]] = []
    inside = products._product

    def noted(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        computed.append((*inputs.shape, len(weight)))
        return inside(inputs, weight, bias)

    monkeypatch.setattr(products, "_product", noted)
    monkeypatch.setattr(products, "slow_mkl", lambda: True)
    monkeypatch.setattr(products, "SMALLEST", 1)
    monkeypatch.setattr(products, "NARROWEST", 1)
    monkeypatch.setattr(products, "FEWEST", 1)
    return computed


def strided(rows: int, columns: int) -> dict[str, Tensor]:
    """The same matrix in several layouts."""
    matrix = torch.randn(rows, columns, dtype=torch.float32)
    wide = torch.zeros(rows, 2 * columns)
    wide[:, ::2] = matrix
    return {
        "dense": matrix,
        "transposed": matrix.t().contiguous().t(),
        "columns": torch.cat([matrix, matrix], 1)[:, :columns],
        "every second": wide[:, ::2],
        "transposed columns": torch.cat([matrix.t(), matrix.t()], 1)[:, :rows].t(),
    }


@pytest.mark.parametrize("layout", ["dense", "transposed", "columns", "every second", "transposed columns"])
def test_linear_equals_float64_in_every_layout(onednn, layout: str):
    x, w, b = strided(7, 33)[layout], strided(20, 33)[layout], torch.randn(20)
    got = linear(x, w, b)
    assert onednn == [(7, 33, 20)]
    torch.testing.assert_close(got.double(), x.double() @ w.double().t() + b.double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 9), (2, 3, 9)])
def test_gradients_equal_float64(onednn, shape: tuple[int, ...], bias: bool):
    exact = nn.Linear(9, 5, bias=bias).double()
    layer = nn.Linear(9, 5, bias=bias)
    layer.load_state_dict({name: value.float() for name, value in exact.state_dict().items()})
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().double().requires_grad_()
    upstream = torch.randn(*shape[:-1], 5)
    linear(x, layer.weight, layer.bias).backward(upstream)
    exact(y).backward(upstream.double())
    assert len(onednn) == 3  # forward, inputs, weight
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=0, atol=1e-5)
    for mine, theirs in zip(layer.parameters(), exact.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=1e-5)


def test_gradient_of_a_sum_has_no_strides(onednn):
    """`sum().backward()` gives a gradient whose strides are all 0."""
    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    linear(x, w).sum().backward()
    torch.testing.assert_close(x.grad, w.detach().sum(0).expand(4, 6))
    torch.testing.assert_close(w.grad, x.detach().sum(0).expand(5, 6))


def test_other_types_are_left_to_torch(onednn):
    x, w = torch.randn(6, 8), torch.randn(4, 8)
    linear(x.double(), w.double())
    linear(x.bfloat16(), w.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        linear(x, w)
    assert onednn == []


def test_a_layer_inside_the_block_uses_onednn(onednn):
    layer, x = nn.Linear(8, 4), torch.randn(6, 8)
    with faster_products(tokens=6):
        inside = layer(x)
    assert onednn == [(6, 8, 4)]
    torch.testing.assert_close(inside, layer(x))
    assert len(onednn) == 1  # outside, torch computes


def test_gradient_checkpointing_is_left_to_torch(onednn):
    """It computes layers again in the backward, outside the block, and torch refuses other saved tensors there."""
    lm = tiny()
    lm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lm.model.train()
    ids = torch.tensor([[5, 6, 7, 8]])
    onednn.clear()
    lm.hidden(ids).sum().backward()
    assert onednn == []
    with torch.no_grad():
        lm.hidden(ids)
    assert len(onednn) > 6


def test_model_and_head_compute_with_onednn(onednn):
    lm = tiny()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        states = lm.hidden(ids)
        logits = lm.head().project(states[0])
    assert len(onednn) > 7  # the linear layers of every block, and the output layer
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        count = len(onednn)
        plain = lm.hidden(ids)
        torch.testing.assert_close(states, plain, rtol=0, atol=1e-5)
        torch.testing.assert_close(logits, lm.head().project(plain[0]), rtol=0, atol=1e-4)
        assert len(onednn) == count


def test_project_into_writes_the_given_memory(onednn, monkeypatch):
    monkeypatch.setattr("opd.models.head.COLUMNS", 2)
    layer = Head(weight=torch.randn(6, 8), bias=None, vocabulary=5)
    out, hidden = torch.zeros(4, 5), torch.randn(3, 8)
    rows = layer.project_into(out, hidden)
    assert rows.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out[:3], hidden @ layer.weight[:5].t())
    assert onednn == [(3, 8, 2), (3, 8, 2), (3, 8, 1)]


@pytest.mark.parametrize(
    ("capability", "text", "slow"),
    [
        ("AVX512", "vendor_id\t: AuthenticAMD\n", True),
        ("AVX512", "vendor_id\t: GenuineIntel\n", False),
        ("AVX2", "vendor_id\t: AuthenticAMD\n", False),
        ("AVX512", None, False),
    ],
)
def test_mkl_is_slow_on_amd_with_avx512(monkeypatch, tmp_path: Path, capability: str, text: str | None, slow: bool):
    info = tmp_path / "cpuinfo"
    if text is not None:
        info.write_text(text)
    monkeypatch.setattr(products, "CPU_INFO", info)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert slow_mkl.__wrapped__() is slow


def test_half_precision_is_summed_in_float32_on_cuda_alone():
    """On a CPU, as `linear` rounds it. A CUDA tensor is only where a GPU is: OPD_TEST_DEVICE=cuda."""
    x, w, b = torch.randn(2, 3, 8).bfloat16(), torch.randn(5, 8).bfloat16(), torch.randn(5).bfloat16()
    exact = x.double() @ w.double().t() + b.double()
    rounded = to_float32(x, w, b)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, nn.functional.linear(x, w, b).float(), rtol=0, atol=0)
    if DEVICE.type == "cuda":
        got = to_float32(x.to(DEVICE), w.to(DEVICE), b.to(DEVICE)).cpu()
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5)
