"""The signal of three models: its mean gradient, its fixed point, its weights, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from support.models import batch_of, rollout_of, teacher_of, tiny
from torch import Tensor

from opd import methods
from opd.errors import ConfigError, TeacherError
from opd.loss.step import scored
from opd.methods.coherence import Facts, broken
from opd.pieces.extrapolation import extrapolated, extrapolation_of
from opd.pieces.needs import Reads
from opd.teachers.cross_tokenizer import teacher_by_rule
from opd.types import Prompt, Tokens

V = 9


def three(seed: int) -> tuple[list[float], list[float], list[float]]:
    """Logits of student, teacher and base."""
    generator = torch.Generator().manual_seed(seed)
    z = 1.5 * torch.randn(3, V, generator=generator, dtype=torch.float64)
    return z[0].tolist(), z[1].tolist(), z[2].tolist()


def mean_gradient(student: list[float], teacher: list[float], base: list[float], **options: Any) -> Tensor:
    """E_{y~p} of the signal's gradient at the logits, every token once: [V]."""
    z = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    p = z.log_softmax(-1)
    none = torch.zeros(V, dtype=torch.float64)
    tokens = Tokens(
        student_logp=p,
        sampler_logp=p.detach(),
        teacher_logp=torch.tensor(teacher, dtype=torch.float64).log_softmax(-1),
        base_logp=torch.tensor(base, dtype=torch.float64).log_softmax(-1),
        advantage=none,
        weight=none + 1,
    )
    losses = extrapolated(**options)(tokens)
    return torch.autograd.grad((losses * p.detach().exp()).sum(), z)[0]


@pytest.mark.parametrize("strength", [0.4, 1.0, 1.15, 2.0])
@pytest.mark.parametrize("clip", ["none", "student/sampler"])
@pytest.mark.parametrize("seed", range(3))
def test_extrapolated_mean_gradient_is_that_of_kl(seed: int, clip: str, strength: float):
    student, teacher, base = three(seed)
    target = [math.log(one) for one in oracle.extrapolation(teacher, base, strength)]
    z = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    s = z.log_softmax(-1)
    kl = (s.exp() * (s - torch.tensor(target, dtype=torch.float64))).sum()
    (expected,) = torch.autograd.grad(kl, z)
    got = mean_gradient(student, teacher, base, strength=strength, clip=clip)
    assert got.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


@pytest.mark.parametrize("strength", [0.4, 1.3, 2.0])
def test_extrapolated_gradient_is_zero_at_target(strength: float):
    _, teacher, base = three(5)
    target = [math.log(one) for one in oracle.extrapolation(teacher, base, strength)]
    assert mean_gradient(target, teacher, base, strength=strength, clip="none").abs().max() < 1e-12


def test_weight_of_teacher_moves_target_towards_teacher():
    """At pi the weighted gradient is not zero, and a descent step from pi brings the student nearer to the teacher."""
    _, teacher, base = three(5)
    pi = [math.log(one) for one in oracle.extrapolation(teacher, base, 1.5)]
    gradient = mean_gradient(pi, teacher, base, strength=1.5, bound=5.0)
    assert gradient.abs().max() > 1e-3
    moved = (torch.tensor(pi, dtype=torch.float64) - 0.01 * gradient).tolist()
    q = oracle.log_softmax(teacher)
    assert oracle.reverse_kl(oracle.log_softmax(moved), q) < oracle.reverse_kl(oracle.log_softmax(pi), q)


@pytest.mark.parametrize("clip", ["teacher/student", "student/sampler"])
def test_extrapolated_bounds_named_ratio(clip: str):
    """One token of log-probs p -2, mu -3.5, q -0.5, b -1: both ratios are e^1.5, cut at 2."""
    p = torch.tensor([-2.0], requires_grad=True)
    one = torch.ones(1)
    tokens = Tokens(
        student_logp=p,
        sampler_logp=torch.tensor([-3.5]),
        teacher_logp=torch.tensor([-0.5]),
        base_logp=torch.tensor([-1.0]),
        advantage=one,
        weight=one,
    )
    advantage = oracle.extrapolated_advantage(-2.0, -0.5, -1.0, 1.4)
    assert advantage == pytest.approx(1.5 + 0.4 * 0.5)
    for bound, weight in ((2.0, 2.0), (5.0, math.exp(1.5))):
        loss = extrapolated(1.4, clip=clip, bound=bound)(tokens)  # type: ignore[arg-type]
        assert loss.tolist() == pytest.approx([weight * advantage * 2.0])
        (slope,) = torch.autograd.grad(loss.sum(), p)
        assert slope.tolist() == pytest.approx([-weight * advantage])


def test_extrapolated_declares_base():
    method = methods.build("extrapolated_opd", {"strength": 1.3})
    assert Reads.BASE_LOGP in method.needs
    assert method.request().base
    assert not methods.build("opd", {}).request().base
    found = extrapolation_of(method.signal)
    assert found is not None
    assert (found.strength, found.clip, found.bound, found.allow_cliff) == (1.3, "teacher/student", 5.0, False)
    assert extrapolation_of(methods.build("opd", {}).signal) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, "lambda must be positive and finite, got 0"),
        ({"strength": -1.0}, "lambda must be positive"),
        ({"bound": 1.0}, r"bound of the ratio teacher/student must be above 1"),
        ({"clip": "student/sampler", "bound": 0.5}, r"bound of the ratio student/sampler"),
        ({"clip": "p/q"}, "option `clip`"),
    ],
)
def test_extrapolated_opd_refuses_options(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        methods.build("extrapolated_opd", options)


def test_extrapolated_opd_refuses_validation_by_teacher():
    method = methods.build("extrapolated_opd+eff_opd", {"eff_opd": {"validate_by": "reward"}})
    assert broken(Facts(method=method)) is None
    with pytest.raises(ConfigError, match="the signal's target is another distribution"):
        methods.build("extrapolated_opd+eff_opd", {"eff_opd": {"validate_by": "teacher_kl"}})


def test_measured_equals_plain_mean():
    method = methods.build("extrapolated_opd", {"bound": 1.1})
    student, external = tiny(name="student"), tiny(seed=1, hidden=24, name="teacher")
    teacher = teacher_of(method, student, external)
    ids = [[2, 3, 4], [5, 6], [7, 8, 9, 2]]
    unknown = [torch.full((len(one),), -2.0) for one in ids]
    rollouts = [
        rollout_of(student, Prompt(id=i, content="ab"), one, sampler_logp=u, policy_logp=u, trained=[True] * len(one))
        for i, (one, u) in enumerate(zip(ids, unknown, strict=True))
    ]
    batch = batch_of(method, student, teacher, rollouts)
    got = batch.memory["three models"].observe(batch, lambda value: [value, value])
    q, b = batch.teacher_logp[batch.mask].tolist(), batch.base_logp[batch.mask].tolist()  # type: ignore[index]
    assert len(q) == 9
    assert got["extrapolation/teacher_over_base"] == pytest.approx(sum(q) / 9 - sum(b) / 9)
    assert got["extrapolation/clipped"] == pytest.approx(sum(one + 2.0 > math.log(1.1) for one in q) / 9)


def test_scored_refuses_teacher_without_base():
    method = methods.build("extrapolated_opd", {})
    student, external = tiny(name="student"), tiny(seed=1, hidden=24, name="teacher")
    teacher = teacher_by_rule(method.teacher, student, external, micro_batch_tokens=64)
    rollout = rollout_of(student, Prompt(id=0, content="ab"), [2, 3])
    with pytest.raises(TeacherError, match=r"base model's log-probs, and the teacher 'teacher' returned none"):
        scored(method, teacher, [rollout], [rollout.prompt], method.request(), student.device)
