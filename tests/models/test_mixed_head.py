"""The output layers of several teachers as one, against K passes."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

from opd.models.head import Head
from opd.models.mixed_head import MixedHead

V, N, WIDTHS = 11, 7, (5, 8, 3)
KINDS: dict[str, list[dict[str, Any]]] = {
    "plain": [{}, {}, {}],
    "multipliers": [{"multiplier": 0.25}, {"multiplier": 3.0}, {}],
    "a bias": [{}, {"bias": True}, {}],
    "soft caps": [{"softcap": 2.0}, {"softcap": 3.0, "multiplier": 0.5}, {"softcap": 1.0, "bias": True}],
    "a soft cap and none": [{}, {"softcap": 2.0}, {"multiplier": 2.0}],
}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def heads_of(kinds: list[dict[str, Any]], dtype: torch.dtype = torch.float64) -> tuple[Head, ...]:
    """Each with rows of padding beyond the vocabulary."""
    return tuple(
        Head(
            weight=random(V + k, width, seed=k, dtype=dtype),
            bias=random(V + k, seed=9 + k, dtype=dtype) if kind.get("bias") else None,
            vocabulary=V,
            multiplier=kind.get("multiplier", 1.0),
            softcap=kind.get("softcap"),
        )
        for k, (width, kind) in enumerate(zip(WIDTHS, kinds, strict=True))
    )


def states_of(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [random(N, width, seed=20 + k, dtype=dtype) for k, width in enumerate(WIDTHS)]


def weights_of() -> Tensor:
    """Of every row its own; one row has a weight of 0, one has one teacher."""
    weights = random(N, len(WIDTHS), seed=40).softmax(-1)
    weights[1] = torch.tensor([0.0, 0.3, 0.7])
    weights[2] = torch.tensor([0.0, 1.0, 0.0])
    return weights


def own_logits(head: Head, hidden: Tensor) -> list[list[float]]:
    """W h + b, times the multiplier, capped; one teacher's, in plain Python."""
    out: list[list[float]] = []
    for row in hidden.double().tolist():
        logits: list[float] = []
        for v in range(V):
            z = math.fsum(w * h for w, h in zip(head.weight[v].double().tolist(), row, strict=True))
            z = (z + (0.0 if head.bias is None else head.bias[v].item())) * head.multiplier
            logits.append(z if head.softcap is None else math.tanh(z / head.softcap) * head.softcap)
        out.append(logits)
    return out


def expected(
    heads: tuple[Head, ...], states: list[Tensor], weights: Tensor, mixture: str, temperature: float
) -> Tensor:
    mean = oracle.geometric_mean if mixture == "geometric" else oracle.arithmetic_mean
    by_teacher = [own_logits(head, state) for head, state in zip(heads, states, strict=True)]
    rows = [
        mean([[z / temperature for z in logits[n]] for logits in by_teacher], weights[n].tolist()) for n in range(N)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def log_probs(head: MixedHead, hidden: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    out = torch.full((N + 2, V), torch.nan, dtype=dtype)
    logits = head.project_into(out, hidden, temperature)
    head.finish_(logits, temperature)
    assert logits.shape == (N, V)
    assert bool(out[N:].isnan().all())
    return logits.log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("mixture", ["geometric", "arithmetic"])
def test_mixed_head_equals_mean_of_passes(mixture: Any, kinds: list[dict[str, Any]], temperature: float):
    heads, states, weights = heads_of(kinds), states_of(), weights_of()
    head = MixedHead(heads=heads, mixture=mixture)
    got = log_probs(head, head.join(states, weights), temperature, torch.float64)
    # In a geometric mean, a layer with a bias or a soft cap computes in float32 (`Head.logits`).
    exact = mixture == "arithmetic" or all(head.folded)
    wanted = expected(heads, states, weights, mixture, temperature)
    assert float((got - wanted).abs().max()) < (1e-12 if exact else 2e-6)


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("mixture", ["geometric", "arithmetic", "each"])
def test_mixed_head_in_float32_is_close_to_oracle(mixture: Any, kinds: list[dict[str, Any]]):
    heads, states = heads_of(kinds, torch.float32), states_of(torch.float32)
    head = MixedHead(heads=heads, mixture=mixture)
    hidden = head.join(states, weights_of())
    got = log_probs(head, hidden, 0.7, torch.float32)
    assert float((got - expected(heads, states, weights_of(), mixture, 0.7)).abs().max()) < 2e-5
    assert torch.equal(head.logits_at(hidden, 0.7).log_softmax(-1), got)


def test_mixed_head_adds_bfloat16_layers_in_float32():
    """The states keep the dtype of the teachers; the sum over teachers does not round to it."""
    heads, states = heads_of(KINDS["plain"], torch.bfloat16), states_of(torch.bfloat16)
    head = MixedHead(heads=heads, mixture="geometric")
    hidden = head.join(states, weights_of())
    assert hidden.dtype == torch.bfloat16
    got = log_probs(head, hidden, 1.0, torch.float32)
    assert float((got - expected(heads, states, weights_of(), "geometric", 1.0)).abs().max()) < 0.1


def test_mixed_head_keeps_weights_beside_states_in_float32():
    head = MixedHead(heads=heads_of(KINDS["plain"], torch.bfloat16), mixture="each")
    hidden = head.join(states_of(torch.bfloat16), weights_of())
    assert hidden.dtype == torch.float32
    shares = [share for _, _, share in head.passes(hidden)]
    torch.testing.assert_close(torch.stack(shares, 1), weights_of().float())


@pytest.mark.parametrize("mixture", ["geometric", "arithmetic"])
def test_one_mean_has_gradient_of_all_passes(mixture: str):
    """sum_k w_k D(q_k, p) and D(mean, p) differ by a number without the student: 1e-12 in float64."""
    weights = [0.2, 0.5, 0.3]
    student, *teachers = (random(V, seed=60 + i).mul(2).tolist() for i in range(4))
    reverse = mixture == "geometric"
    slope = oracle.reverse_kl_slope if reverse else oracle.forward_kl_slope
    mean = (oracle.geometric_mean if reverse else oracle.arithmetic_mean)(teachers, weights)
    passes = oracle.grad_mixed_loss(slope, student, teachers, weights)
    once = oracle.grad_on_support(slope, "raw", student, mean, list(range(V)))
    assert max(abs(a - b) for a, b in zip(passes, once, strict=True)) < 1e-12

    leaf = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    p, loss = leaf.log_softmax(-1), torch.zeros((), dtype=torch.float64)
    for weight, teacher in zip(weights, teachers, strict=True):
        q = torch.tensor(teacher, dtype=torch.float64).log_softmax(-1)
        loss = loss + weight * ((p.exp() * (p - q)).sum() if reverse else (q.exp() * (q - p)).sum())
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert max(abs(a - b) for a, b in zip(gradient.tolist(), once, strict=True)) < 1e-12
    divergence = oracle.reverse_kl if reverse else oracle.forward_kl
    assert loss.item() == pytest.approx(oracle.mixed_loss(divergence, student, teachers, weights), abs=1e-12)
    assert loss.item() > divergence(oracle.log_softmax(student), mean)  # by the teachers' disagreement


def test_no_mean_has_gradient_of_the_jsd():
    """So a JSD makes K passes: with either mean its gradient is another one."""
    weights = [0.5, 0.5]
    student, *teachers = (random(V, seed=70 + i).mul(2).tolist() for i in range(3))
    passes = oracle.grad_mixed_loss(oracle.generalised_jsd_slope, student, teachers, weights)
    for mean in (oracle.geometric_mean(teachers, weights), oracle.arithmetic_mean(teachers, weights)):
        once = oracle.grad_on_support(oracle.generalised_jsd_slope, "raw", student, mean, list(range(V)))
        assert max(abs(a - b) for a, b in zip(passes, once, strict=True)) > 1e-3
