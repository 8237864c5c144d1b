"""Closed forms against the divergence that they belong to, its autograd, finite differences and the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd.errors import ConfigError
from opd.maths import closed_forms, divergences
from opd.maths.closed_forms import CLOSED, closed_form
from opd.pieces import signals

pytestmark = pytest.mark.numeric

FUNCTIONS: list[Callable[..., Tensor]] = [
    divergences.reverse_kl,
    divergences.forward_kl,
    divergences.generalised_jsd,
    *(partial(divergences.generalised_jsd, beta=beta) for beta in (1e-3, 0.1, 0.5, 0.85, 0.999)),
]


def name_of(function: Any) -> str:
    if isinstance(function, partial):
        return f"{function.func.__name__}-{function.keywords}"
    return function.__name__


every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=name_of)


def normal(*shape: int, seed: int, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def from_largest(logits: Tensor) -> Tensor:
    """The same distribution, in new memory, with 0 as the largest logit."""
    return logits - logits.amax(-1, keepdim=True)


def closed(function: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The closed form at logits [n, V]: value, and gradient of its sum."""
    form = closed_form(function)
    assert form is not None
    grad, other = from_largest(student), from_largest(teacher)
    student_log_z, teacher_log_z = grad.logsumexp(-1), other.logsumexp(-1)
    found = form(grad, other, student.new_ones(len(student)))
    torch.testing.assert_close(found.student_log_z, student_log_z)
    torch.testing.assert_close(found.teacher_log_z, teacher_log_z)
    assert found.value.shape == student.shape[:1]
    assert found.value.dtype == grad.dtype == student.dtype
    return found.value, grad


def by_autograd(function: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence, and its gradient through log_softmax, in float64."""
    leaf = student.double().requires_grad_()
    value = function(leaf.log_softmax(-1), teacher.double().log_softmax(-1))
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@every_function
def test_closed_form_equals_divergence_and_autograd(function: Callable[..., Tensor]):
    student, teacher = normal(20, 13, seed=0), normal(20, 13, seed=1)
    value, grad = closed(function, student, teacher)
    expected_value, expected_grad = by_autograd(function, student, teacher)
    torch.testing.assert_close(value, expected_value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)


@every_function
def test_closed_form_gradient_equals_finite_differences(function: Callable[..., Tensor]):
    """Central differences of the divergence itself, logit by logit."""
    student, teacher = normal(4, 7, seed=2), normal(4, 7, seed=3)
    _, grad = closed(function, student, teacher)
    step = 1e-5
    for j in range(7):
        shift = torch.zeros(7, dtype=torch.float64)
        shift[j] = step
        above, below = (function((student + s).log_softmax(-1), teacher.log_softmax(-1)) for s in (shift, -shift))
        torch.testing.assert_close(grad[:, j], (above - below) / (2 * step), rtol=1e-7, atol=1e-9)


ORACLE: dict[Callable[..., Tensor], tuple[oracle.Divergence, oracle.Slope]] = {
    divergences.reverse_kl: (oracle.reverse_kl, oracle.reverse_kl_slope),
    divergences.forward_kl: (oracle.forward_kl, oracle.forward_kl_slope),
    divergences.generalised_jsd: (oracle.generalised_jsd, oracle.generalised_jsd_slope),
}


@every_function
def test_closed_form_equals_oracle(function: Callable[..., Tensor]):
    plain, options = (function.func, function.keywords) if isinstance(function, partial) else (function, {})
    paper_value, slope = (partial(f, **options) for f in ORACLE[plain])
    student, teacher = normal(5, 6, seed=4), normal(5, 6, seed=5)
    value, grad = closed(function, student, teacher)
    for i in range(5):
        s, t = student[i].tolist(), teacher[i].tolist()
        wanted = paper_value(oracle.log_softmax(s), oracle.log_softmax(t))
        assert value[i].item() == pytest.approx(wanted, rel=1e-12)
        wanted_grad = oracle.grad_on_support(slope, "raw", s, t, range(6))
        assert grad[i].tolist() == pytest.approx(wanted_grad, rel=1e-10, abs=1e-12)


def test_closed_entries_all_have_cases():
    assert set(ORACLE) == set(CLOSED)
    assert {f.func if isinstance(f, partial) else f for f in FUNCTIONS} == set(CLOSED)


@every_function
@given(
    logits=st.integers(1, 8).flatmap(
        lambda v: st.lists(
            st.tuples(*[st.one_of(st.floats(-20, 20), st.sampled_from([-1e4, 0.0, 1e4]))] * 2), min_size=v, max_size=v
        )
    )
)
@settings(max_examples=60, deadline=None)
def test_closed_form_equals_autograd_for_any_logits(function: Callable[..., Tensor], logits: list[tuple[float, float]]):
    """Finite, never negative, the gradient of autograd, and no push on the sum of the logits, which means nothing."""
    student = torch.tensor([[pair[0] for pair in logits]], dtype=torch.float64)
    teacher = torch.tensor([[pair[1] for pair in logits]], dtype=torch.float64)
    value, grad = closed(function, student, teacher)
    expected_value, expected_grad = by_autograd(function, student, teacher)
    scale = max(1.0, value.item())
    assert bool(grad.isfinite().all())
    assert value.item() >= -1e-12
    torch.testing.assert_close(value, expected_value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-11 * scale)
    assert abs(grad.sum().item()) <= 1e-11 * scale


@every_function
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]),
        ([1e4, -1e4, 0.0], [1e4, -1e4, 0.0]),
        ([1e4, 1e4, -1e4], [0.0, 1e4, 1e4]),
        ([0.0, 0.0, 0.0], [1e4, -1e4, -1e4]),
        ([1e4, -1e4, -1e4], [0.0, 0.0, 0.0]),
    ],
)
def test_closed_form_equals_autograd_when_logits_are_extreme(
    function: Callable[..., Tensor], student: list[float], teacher: list[float]
):
    s, t = torch.tensor([student]), torch.tensor([teacher])
    value, grad = closed(function, s, t)
    expected_value, expected_grad = by_autograd(function, s, t)
    assert bool(value.isfinite().all())
    torch.testing.assert_close(value.double(), expected_value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-6, atol=1e-6)


@every_function
def test_closed_form_is_as_exact_as_autograd_in_float32(function: Callable[..., Tensor]):
    student, teacher = normal(4, 50_000, seed=6, scale=3.0).float(), normal(4, 50_000, seed=7, scale=3.0).float()
    expected_value, expected = by_autograd(function, student, teacher)
    leaf = student.clone().requires_grad_()
    (plain,) = torch.autograd.grad(function(leaf.log_softmax(-1), teacher.log_softmax(-1)).sum(), leaf)
    value, grad = closed(function, student, teacher)
    torch.testing.assert_close(value.double(), expected_value, rtol=1e-5, atol=1e-7)
    error, usual = ((g.double() - expected).norm() / expected.norm() for g in (grad, plain))
    assert error <= 1.5 * usual
    assert usual < 1e-3
    assert float(grad.double().sum(-1).abs().max()) < 1e-5 * float(grad.double().abs().sum(-1).max())


@every_function
def test_closed_form_gradient_sums_to_zero_in_float32(function: Callable[..., Tensor]):
    """Over a large vocabulary `log_softmax` on a CPU gives probabilities that sum to more than 1."""
    student, teacher = normal(3, 150_000, seed=11).float(), normal(3, 150_000, seed=12).float()
    _, grad = closed(function, student, teacher)
    assert float((grad.double().sum(-1).abs() / grad.double().abs().sum(-1)).max()) < 1e-6


@every_function
def test_closed_form_multiplies_gradient_by_weight(function: Callable[..., Tensor]):
    student, teacher = normal(3, 9, seed=13), normal(3, 9, seed=14)
    value, grad = closed(function, student, teacher)
    weight = torch.tensor([2.0, 0.0, -0.5], dtype=torch.float64)
    form = closed_form(function)
    assert form is not None
    own = from_largest(student)
    found = form(own, from_largest(teacher), weight)
    assert torch.equal(found.value, value)
    torch.testing.assert_close(own, grad * weight[:, None], rtol=1e-14, atol=0)


@every_function
def test_closed_form_is_zero_when_student_is_teacher(function: Callable[..., Tensor]):
    logits = normal(3, 9, seed=8)
    value, grad = closed(function, logits, logits.clone())
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-15)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-15)


# --- which have one -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", divergences.DIVERGENCES)
def test_closed_form_is_found_for_divergence_signal(name: str):
    plain = divergences.DIVERGENCES[name]
    found = closed_form(signals.divergence(name).divergence)  # type: ignore[attr-defined]
    assert found is CLOSED.get(plain)
    assert (found is None) == (name == "skew_kl")


def test_closed_form_binds_options_of_partial():
    student, teacher = normal(3, 5, seed=9), normal(3, 5, seed=10)
    for function in (
        partial(divergences.generalised_jsd, beta=0.2),
        partial(partial(divergences.generalised_jsd, beta=0.7), beta=0.2),
        divergences.named("generalised_jsd", beta=0.2),
        divergences.named(divergences.generalised_jsd, beta=0.2),
        signals.divergence("generalised_jsd", beta=0.2).divergence,  # type: ignore[attr-defined]
    ):
        value, grad = closed(function, student, teacher)
        own = from_largest(student)
        expected = closed_forms.generalised_jsd(own, from_largest(teacher), torch.ones(3).double(), beta=0.2)
        assert torch.equal(value, expected.value)
        assert torch.equal(grad, own)


@pytest.mark.parametrize(
    "function",
    [
        None,
        lambda student, teacher: (student - teacher).square().sum(-1),
        lambda student, teacher: divergences.reverse_kl(student, teacher),
        divergences.skew_kl,
        partial(divergences.skew_kl, alpha=0.3),
        partial(lambda student, teacher, k: k * divergences.reverse_kl(student, teacher), k=2.0),
        torch.nn.Identity(),
    ],
)
def test_closed_form_is_none_for_other_functions(function: Any):
    assert closed_form(function) is None


@dataclass
class Squared:
    """A user's divergence with options: a dataclass that may change, so that it has no hash."""

    strength: float = 1.0

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        return self.strength * (student_logp.exp() - teacher_logp.exp()).square().sum(-1)


def test_closed_form_is_none_when_callable_has_no_hash():
    assert closed_form(Squared(2.0)) is None


def test_closed_form_is_none_when_partial_is_positional():
    """`partial(reverse_kl, q)` is a function of one argument: no divergence, and no closed form of one."""
    assert closed_form(partial(divergences.reverse_kl, torch.zeros(3))) is None


@pytest.mark.parametrize("beta", [0.0, 1.0, 1.5])
def test_closed_form_raises_config_error_when_beta_is_invalid(beta: float):
    """`signals.divergence` refuses it for a name, but takes a function as it is."""
    signal = signals.divergence(divergences.generalised_jsd, beta=beta)
    with pytest.raises(ConfigError, match="beta must lie strictly between 0 and 1"):
        closed_form(signal.divergence)  # type: ignore[attr-defined]
