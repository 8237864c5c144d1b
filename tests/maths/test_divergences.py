"""Divergences and signals against the oracle, finite differences, and the identities that the papers state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd import methods
from opd.errors import ConfigError
from opd.maths import divergences
from opd.maths.divergences import forward_kl, generalised_jsd, on_support, reverse_kl, skew_kl
from opd.pieces import signals
from opd.types import Tokens

pytestmark = pytest.mark.numeric

FORMS = ("raw", "stop_gradient", "renormalised", "tail")
EXACT = 1e-12  # float64 autograd against a closed form
FINITE_DIFFERENCE = 1e-8


@dataclass(frozen=True, kw_only=True)
class Case:
    """One divergence: ours, the oracle's value, the oracle's df/dp, and df/dp at p = q from the paper by hand."""

    name: str
    ours: Callable[[Tensor, Tensor], Tensor]
    value: oracle.Divergence
    slope: oracle.Slope
    slope_at_equality: float


def jsd(beta: float) -> Case:
    return Case(
        name=f"generalised_jsd({beta})",
        ours=partial(generalised_jsd, beta=beta),
        value=partial(oracle.generalised_jsd, beta=beta),
        slope=partial(oracle.generalised_jsd_slope, beta=beta),
        slope_at_equality=0.0,
    )


def skew(alpha: float, direction: str) -> Case:
    return Case(
        name=f"skew_kl({alpha}, {direction})",
        ours=partial(skew_kl, alpha=alpha, direction=direction),
        value=partial(oracle.skew_kl, alpha=alpha, direction=direction),
        slope=partial(oracle.skew_kl_slope, alpha=alpha, direction=direction),
        slope_at_equality=(1.0 - alpha) if direction == "reverse" else -(1.0 - alpha),
    )


REVERSE_KL = Case(
    name="reverse_kl",
    ours=reverse_kl,
    value=oracle.reverse_kl,
    slope=oracle.reverse_kl_slope,
    slope_at_equality=1.0,
)
FORWARD_KL = Case(
    name="forward_kl",
    ours=forward_kl,
    value=oracle.forward_kl,
    slope=oracle.forward_kl_slope,
    slope_at_equality=-1.0,
)
CASES = (
    REVERSE_KL,
    FORWARD_KL,
    jsd(0.5),
    jsd(0.1),
    jsd(0.85),
    skew(0.1, "forward"),
    skew(0.6, "forward"),
    skew(0.1, "reverse"),
    skew(0.6, "reverse"),
)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_form = pytest.mark.parametrize("form", FORMS)


# ---------------------------------------------------------------------------------------------------------------------
# Helpers


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of a few numbers: on a busy machine, waiting for a second thread takes ten times as long as the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    """Logits, float64."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got: Tensor, expected: Tensor | list[float] | float, tolerance: float) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got.detach().double(), expected, rtol=tolerance, atol=tolerance)


def gradient(loss_of: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """d sum(loss) / d inputs by autograd."""
    leaf = inputs.detach().clone().requires_grad_()
    (result,) = torch.autograd.grad(loss_of(leaf).sum(), leaf)
    return result


def finite_difference(value_of: Callable[[Tensor], Tensor], logits: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of `value_of` ([R, V] logits -> [R]) at `logits` [V]."""
    shifts = step * torch.eye(len(logits), dtype=logits.dtype)
    return (value_of(logits + shifts) - value_of(logits - shifts)) / (2.0 * step)


def oracle_rows(value: Callable[[list[float]], float]) -> Callable[[Tensor], Tensor]:
    """An oracle's value of one list as a function of rows of a tensor."""
    return lambda rows: torch.tensor([value(row) for row in rows.tolist()], dtype=torch.float64)


def loss_on(
    support: Tensor, teacher: Tensor, divergence: str | divergences.Divergence, form: str
) -> Callable[[Tensor], Tensor]:
    """Student logits [..., V] -> the divergence on `support` (ids), against teacher logits [V]."""
    teacher_support_logp = teacher.log_softmax(-1)[..., support]

    def loss_of(student: Tensor) -> Tensor:
        student_support_logp = student.log_softmax(-1)[..., support]
        return on_support(divergence, student_support_logp, teacher_support_logp.expand_as(student_support_logp), form)

    return loss_of


def tokens_of(**fields: Tensor | None) -> Tokens:
    """Tokens [N] with zeros for what a test does not name."""
    given_fields = {name: value for name, value in fields.items() if value is not None}
    n = next(iter(given_fields.values())).shape[0]
    names = ("student_logp", "sampler_logp", "teacher_logp", "advantage", "weight")
    defaults = {name: torch.zeros(n, dtype=torch.float64) for name in names}
    if (support := given_fields.get("student_support_logp")) is not None:
        defaults["support_mask"] = torch.ones(support.shape, dtype=torch.bool)  # truncated: without one it is all of V
    return Tokens(**{**defaults, **given_fields})


def p2_code(support: Tensor, teacher: Tensor) -> Callable[[Tensor], Tensor]:
    """Student logits [N, V] or [V] -> `support_policy_gradient` on `support`."""
    teacher_support_logp = teacher.log_softmax(-1)[support]

    def loss_of(student: Tensor) -> Tensor:
        student_support_logp = student.log_softmax(-1)[..., support].reshape(-1, len(support))
        return signals.support_policy_gradient()(
            tokens_of(
                student_support_logp=student_support_logp,
                teacher_support_logp=teacher_support_logp.expand_as(student_support_logp),
            )
        )

    return loss_of


STUDENT, TEACHER = normal(50, seed=1), normal(50, seed=2)
SUPPORT = STUDENT.topk(8).indices
ON_SUPPORT = torch.zeros(50, dtype=torch.bool).scatter(0, SUPPORT, True)
P = STUDENT.softmax(-1)
P_S, Q_S = P[SUPPORT].sum(), TEACHER.softmax(-1)[SUPPORT].sum()
GRAD_P_S = P * (ON_SUPPORT.double() - P_S)  # of P_S in the student's logits
LISTS = (STUDENT.tolist(), TEACHER.tolist(), SUPPORT.tolist())


# ---------------------------------------------------------------------------------------------------------------------
# The oracle itself: its closed-form gradients are the derivatives of its values


def on_list(value: Callable[[list[float], list[float]], float]) -> Callable[[list[float]], float]:
    """Student logits -> the oracle's `value` on SUPPORT."""
    teacher = [oracle.log_softmax(LISTS[1])[v] for v in LISTS[2]]

    def of(student: list[float]) -> float:
        logp = oracle.log_softmax(student)
        return value([logp[v] for v in LISTS[2]], teacher)

    return of


def frozen(value: str) -> Callable[[list[float], list[float]], float]:
    """The two surrogates with a stop-gradient, as functions of the student with everything under sg held at STUDENT."""
    fixed = [oracle.log_softmax(LISTS[0])[v] for v in LISTS[2]]
    inside = oracle.mass(fixed)

    def stop_gradient(student: list[float], teacher: list[float]) -> float:
        return sum(math.exp(s) * (f - t) for s, f, t in zip(student, fixed, teacher, strict=True))

    def support_policy_gradient(student: list[float], teacher: list[float]) -> float:
        advantages = [-math.exp(f) / inside * (f - t) for f, t in zip(fixed, teacher, strict=True)]
        return -sum(a * math.exp(s - f) for a, s, f in zip(advantages, student, fixed, strict=True))

    return {"stop_gradient": stop_gradient, "support_policy_gradient": support_policy_gradient}[value]


@pytest.mark.parametrize(
    ("closed_form", "value"),
    [
        (oracle.grad_topk_raw, oracle.reverse_kl_raw),
        (oracle.grad_topk_stop_gradient, frozen("stop_gradient")),
        (oracle.grad_renormalised, oracle.reverse_kl_renormalised),
        (oracle.grad_tail, oracle.reverse_kl_tail),
        (oracle.grad_support_policy_gradient, frozen("support_policy_gradient")),
        (lambda s, t, support: oracle.grad_mass(s, support), lambda s, t: oracle.mass(s)),
    ],
    ids=["raw", "stop_gradient", "renormalised", "tail", "p2_code", "mass"],
)
def test_oracle_support_gradients_equal_finite_differences(closed_form, value):
    expected = finite_difference(oracle_rows(on_list(value)), STUDENT)
    close(expected, closed_form(*LISTS), FINITE_DIFFERENCE)


def test_oracle_full_gradients_equal_finite_differences():
    teacher = oracle.log_softmax(LISTS[1])
    for closed_form, value in (
        (oracle.grad_full, oracle.reverse_kl),
        (oracle.grad_full_forward_kl, oracle.forward_kl),
    ):
        of = oracle_rows(lambda row, value=value: value(oracle.log_softmax(row), teacher))
        close(finite_difference(of, STUDENT), closed_form(*LISTS[:2]), FINITE_DIFFERENCE)


@every_case
def test_oracle_slopes_equal_finite_differences(case):
    for p, q in ((0.3, 0.2), (0.05, 0.6), (0.9, 0.01)):
        up, down = (case.value([math.log(p + h)], [math.log(q)]) for h in (1e-6, -1e-6))
        assert case.slope(p, q) == pytest.approx((up - down) / 2e-6, rel=1e-7, abs=1e-8)
        assert case.slope(p, p) == pytest.approx(case.slope_at_equality, abs=EXACT)


def test_oracle_metrics_equal_known_values():
    assert oracle.pass_at_k([True, False, False, False], 2) == pytest.approx(0.5)
    assert oracle.pass_at_k([True] * 3 + [False] * 7, 4) == pytest.approx(1 - math.comb(7, 4) / math.comb(10, 4))
    assert oracle.repeat_ratio("abcabcab", 3) == pytest.approx(3 / 8)  # abc, bca, cab end again at tokens 6, 7, 8
    assert oracle.repeat_ratio("aaaa", 3) == pytest.approx(1 / 4)
    assert oracle.repeat_ratio("ab", 3) == oracle.repeat_ratio("", 3) == 0.0
    assert oracle.group_advantage([1.0, 0.0, 0.0, 1.0], epsilon=0.0, ddof=0) == pytest.approx([1.0, -1.0, -1.0, 1.0])
    assert oracle.group_advantage([3.0, 0.0], epsilon=0.5, ddof=1) == pytest.approx(
        [1.5 / (4.5**0.5 + 0.5), -1.5 / (4.5**0.5 + 0.5)]
    )
    assert oracle.group_advantage([3.0, 0.0, 0.0], scale=False) == pytest.approx([2.0, -1.0, -1.0])
    assert oracle.group_advantage([1.0]) == [0.0]
    assert oracle.policy_gradient(math.log(1.5), 0.0, 2.0, (0.2, 0.28)) == (pytest.approx(-2.56), 0.0)
    assert oracle.policy_gradient(math.log(1.5), 0.0, -2.0, (0.2, 0.28)) == (pytest.approx(3.0), pytest.approx(3.0))


# ---------------------------------------------------------------------------------------------------------------------
# Values and gradients


def test_divergences_equal_values_computed_by_hand():
    student = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    teacher = torch.tensor([0.75, 0.25], dtype=torch.float64).log()
    log = math.log
    expected = {
        "KL(p||q)": (reverse_kl(student, teacher), 0.5 * log(2 / 3) + 0.5 * log(2)),
        "KL(q||p)": (forward_kl(student, teacher), 0.75 * log(3 / 2) + 0.25 * log(1 / 2)),
        # m = q/4 + 3p/4 = (9/16, 7/16)
        "JSD(1/4)": (
            generalised_jsd(student, teacher, beta=0.25),
            0.25 * (0.75 * log(4 / 3) + 0.25 * log(4 / 7)) + 0.75 * (0.5 * log(8 / 9) + 0.5 * log(8 / 7)),
        ),
        # m = q/5 + 4p/5 = (0.55, 0.45)
        "skew forward": (skew_kl(student, teacher, alpha=0.2), 0.75 * log(0.75 / 0.55) + 0.25 * log(0.25 / 0.45)),
        # m = p/5 + 4q/5 = (0.7, 0.3)
        "skew reverse": (
            skew_kl(student, teacher, alpha=0.2, direction="reverse"),
            0.5 * log(0.5 / 0.7) + 0.5 * log(0.5 / 0.3),
        ),
    }
    for name, (got, value) in expected.items():
        assert got.item() == pytest.approx(value, abs=1e-15), name


def test_divergences_have_default_options_of_papers():
    student, teacher = STUDENT.log_softmax(-1), TEACHER.log_softmax(-1)
    assert torch.equal(generalised_jsd(student, teacher), generalised_jsd(student, teacher, beta=0.5))
    assert torch.equal(skew_kl(student, teacher), skew_kl(student, teacher, alpha=0.1, direction="forward"))
    default = on_support("reverse_kl", student[SUPPORT], teacher[SUPPORT])
    assert torch.equal(default, on_support("reverse_kl", student[SUPPORT], teacher[SUPPORT], form="tail"))


@every_case
def test_divergences_equal_oracle_for_any_leading_shape(case):
    student, teacher = normal(2, 3, 7, seed=3).log_softmax(-1), normal(2, 3, 7, seed=4).log_softmax(-1)
    got = case.ours(student, teacher)
    assert got.shape == (2, 3)
    assert got.dtype == torch.float64
    rows = zip(student.reshape(6, 7).tolist(), teacher.reshape(6, 7).tolist(), strict=True)
    close(got.reshape(6), [case.value(s, t) for s, t in rows], EXACT)
    assert case.ours(student[0, 0], teacher[0, 0]).shape == ()


@every_case
def test_divergences_gradient_equals_oracle(case):
    student, teacher = normal(12, seed=5), normal(12, seed=6)
    got = gradient(lambda z: case.ours(z.log_softmax(-1), teacher.log_softmax(-1)), student)
    close(got, oracle.grad_on_support(case.slope, "raw", student.tolist(), teacher.tolist(), range(12)), EXACT)
    teacher_logp = oracle.log_softmax(teacher.tolist())
    of = oracle_rows(lambda row: case.value(oracle.log_softmax(row), teacher_logp))
    close(got, finite_difference(of, student), FINITE_DIFFERENCE)


def test_reverse_kl_and_forward_kl_gradients_equal_oracle():
    teacher = TEACHER.log_softmax(-1)
    reverse = gradient(lambda z: reverse_kl(z.log_softmax(-1), teacher), STUDENT)
    forward = gradient(lambda z: forward_kl(z.log_softmax(-1), teacher), STUDENT)
    close(reverse, oracle.grad_full(*LISTS[:2]), EXACT)
    close(forward, oracle.grad_full_forward_kl(*LISTS[:2]), EXACT)


@every_form
@every_case
def test_on_support_equals_oracle(case, form):
    students = normal(5, 50, seed=7)
    got = loss_on(SUPPORT, TEACHER, case.ours, form)(students)
    teacher = [oracle.log_softmax(LISTS[1])[v] for v in LISTS[2]]
    expected = [
        oracle.FORMS[form](case.value, [oracle.log_softmax(row)[v] for v in LISTS[2]], teacher)
        for row in students.tolist()
    ]
    assert got.shape == (5,)
    close(got, expected, EXACT)


@pytest.mark.parametrize(
    ("form", "value"),
    [
        ("raw", oracle.reverse_kl_raw),
        ("stop_gradient", oracle.reverse_kl_stop_gradient),
        ("renormalised", oracle.reverse_kl_renormalised),
        ("tail", oracle.reverse_kl_tail),
    ],
)
def test_on_support_reverse_kl_equals_paper_formula(form, value):
    close(loss_on(SUPPORT, TEACHER, "reverse_kl", form)(STUDENT), on_list(value)(LISTS[0]), EXACT)


@every_form
@every_case
def test_on_support_gradient_equals_oracle(case, form):
    got = gradient(loss_on(SUPPORT, TEACHER, case.ours, form), STUDENT)
    close(got, oracle.grad_on_support(case.slope, form, *LISTS), EXACT)


@every_form
@every_case
def test_on_support_gradient_equals_finite_differences(case, form):
    """Of our value and of the oracle's. What `stop_gradient` descends is the raw value minus slope * P_S."""
    got = gradient(loss_on(SUPPORT, TEACHER, case.ours, form), STUDENT)
    correction = case.slope_at_equality * GRAD_P_S if form == "stop_gradient" else 0.0
    close(got, finite_difference(loss_on(SUPPORT, TEACHER, case.ours, form), STUDENT) - correction, FINITE_DIFFERENCE)
    of = oracle_rows(on_list(partial(oracle.FORMS[form], case.value)))
    close(got, finite_difference(of, STUDENT) - correction, FINITE_DIFFERENCE)


@pytest.mark.parametrize(
    ("form", "closed_form"),
    [
        ("raw", oracle.grad_topk_raw),
        ("stop_gradient", oracle.grad_topk_stop_gradient),
        ("renormalised", oracle.grad_renormalised),
        ("tail", oracle.grad_tail),
    ],
)
def test_on_support_reverse_kl_gradient_equals_oracle(form, closed_form):
    close(gradient(loss_on(SUPPORT, TEACHER, reverse_kl, form), STUDENT), closed_form(*LISTS), EXACT)


def test_support_policy_gradient_equals_scaled_stop_gradient():
    loss_of = p2_code(SUPPORT, TEACHER)
    got = gradient(loss_of, STUDENT)
    close(got, oracle.grad_support_policy_gradient(*LISTS), EXACT)
    close(got, gradient(loss_on(SUPPORT, TEACHER, reverse_kl, "stop_gradient"), STUDENT) / P_S, EXACT)
    close(loss_of(STUDENT)[0], on_list(oracle.support_policy_gradient)(LISTS[0]), EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# Six identities


def test_raw_minus_stop_gradient_equals_gradient_of_mass():
    raw, stopped = (gradient(loss_on(SUPPORT, TEACHER, reverse_kl, form), STUDENT) for form in ("raw", "stop_gradient"))
    close(raw - stopped, GRAD_P_S, EXACT)
    assert ((raw - stopped)[SUPPORT] > 0).all()  # descent pushes mass out of S
    assert ((raw - stopped)[~ON_SUPPORT] < 0).all()


@every_case
def test_slope_at_equality_scales_raw_minus_stop_gradient(case):
    raw, stopped = (gradient(loss_on(SUPPORT, TEACHER, case.ours, form), STUDENT) for form in ("raw", "stop_gradient"))
    close(raw - stopped, case.slope_at_equality * GRAD_P_S, EXACT)
    assert divergences.slope_at_equality(case.ours) == pytest.approx(case.slope_at_equality, abs=EXACT)


def test_support_policy_gradient_also_corrects_mass():
    renorm = loss_on(SUPPORT, TEACHER, reverse_kl, "renormalised")
    got = gradient(p2_code(SUPPORT, TEACHER), STUDENT) - gradient(renorm, STUDENT)
    close(got, ((P_S / Q_S).log() + renorm(STUDENT)) * GRAD_P_S / P_S, EXACT)


def test_stop_gradient_equals_renormalised_after_normalising():
    teacher_bar = TEACHER[SUPPORT].log_softmax(-1)
    stopped = gradient(
        lambda z: on_support(reverse_kl, z[SUPPORT].log_softmax(-1), teacher_bar, "stop_gradient"), STUDENT
    )
    renorm = gradient(loss_on(SUPPORT, TEACHER, reverse_kl, "renormalised"), STUDENT)
    close(stopped, renorm, EXACT)
    assert renorm[~ON_SUPPORT].abs().max() < 1e-16
    assert renorm[SUPPORT].abs().max() > 0.01


def test_on_support_equals_score_formula_when_k_is_one():
    one = SUPPORT[:1]
    p, log_ratio = P[one].item(), (STUDENT.log_softmax(-1) - TEACHER.log_softmax(-1))[one].item()
    renorm = loss_on(one, TEACHER, reverse_kl, "renormalised")
    assert renorm(STUDENT).item() == 0.0
    assert gradient(renorm, STUDENT).abs().max().item() == 0.0
    score = torch.nn.functional.one_hot(one[0], 50) - P  # grad log p(token)
    close(gradient(loss_on(one, TEACHER, reverse_kl, "raw"), STUDENT), p * (log_ratio + 1.0) * score, EXACT)
    close(gradient(loss_on(one, TEACHER, reverse_kl, "stop_gradient"), STUDENT), p * log_ratio * score, EXACT)
    close(gradient(p2_code(one, TEACHER), STUDENT), log_ratio * score, EXACT)


def enumerate_tokens(signal: Callable[[Tokens], Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    """sum_y p(y) loss(y): every token of the vocabulary is one of the N tokens, weighted with its probability."""
    student_logp = student.log_softmax(-1)
    tokens = tokens_of(
        student_logp=student_logp, sampler_logp=student_logp.detach(), teacher_logp=teacher.log_softmax(-1)
    )
    return (student_logp.exp().detach() * signal(tokens)).sum()


@pytest.mark.parametrize("options", [{}, {"importance": True}, {"clip": (0.2, 0.28)}], ids=str)
def test_policy_gradient_is_unbiased_over_all_tokens(options):
    signal = signals.policy_gradient(advantage=signals.log_ratio, **options)
    got = gradient(lambda z: enumerate_tokens(signal, z, TEACHER), STUDENT)
    close(got, oracle.grad_sampled_policy_gradient_mean(*LISTS[:2]), EXACT)
    close(got, oracle.grad_full(*LISTS[:2]), EXACT)
    close(got, gradient(lambda z: reverse_kl(z.log_softmax(-1), TEACHER.log_softmax(-1)), STUDENT), EXACT)


def test_log_ratio_as_loss_has_zero_mean_gradient():
    got = gradient(lambda z: enumerate_tokens(lambda t: t.student_logp - t.teacher_logp, z, TEACHER), STUDENT)
    close(got, torch.zeros(50), EXACT)
    assert oracle.grad_sampled_loss_mean(LISTS[0]) == pytest.approx([0.0] * 50, abs=EXACT)


@every_form
@every_case
def test_on_support_equals_divergence_on_whole_vocabulary(case, form):
    everything, teacher = torch.arange(50), TEACHER.log_softmax(-1)
    loss_of = loss_on(everything, TEACHER, case.ours, form)
    close(loss_of(STUDENT), case.ours(STUDENT.log_softmax(-1), teacher), EXACT)
    full = gradient(lambda z: case.ours(z.log_softmax(-1), teacher), STUDENT)
    close(gradient(loss_of, STUDENT), full, EXACT)


@every_case
def test_tail_is_unchanged_by_order_of_whole_vocabulary(case):
    """The remaining mass is rounding whatever the order of the sum; it must not show in float32 either."""
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    student, teacher = STUDENT.float(), TEACHER.float()
    full = case.ours(student.log_softmax(-1), teacher.log_softmax(-1))
    close(loss_on(order, teacher, case.ours, "tail")(student), full, 1e-5)
    expected = gradient(lambda z: case.ours(z.log_softmax(-1), teacher.log_softmax(-1)), student)
    close(gradient(loss_on(order, teacher, case.ours, "tail"), student), expected, 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Fixed points


@every_case
def test_raw_alone_has_gradient_when_models_agree_on_support(case):
    """p = q on S, different elsewhere. RAW still pulls with slope * grad P_S there."""
    teacher_logp = TEACHER.log_softmax(-1)
    p = STUDENT.softmax(-1).where(~ON_SUPPORT, 0.0)
    student = torch.where(ON_SUPPORT, teacher_logp, (p * (1.0 - Q_S) / p.sum()).log())
    close(student.logsumexp(-1), 0.0, EXACT)
    at_equality = {form: gradient(loss_on(SUPPORT, TEACHER, case.ours, form), student) for form in FORMS}
    for form in ("stop_gradient", "renormalised", "tail"):
        close(at_equality[form], torch.zeros(50), EXACT)
    grad_mass = student.softmax(-1) * (ON_SUPPORT.double() - Q_S)
    close(at_equality["raw"], case.slope_at_equality * grad_mass, EXACT)
    close(gradient(p2_code(SUPPORT, TEACHER), student), torch.zeros(50), EXACT)


def descend(loss_of: Callable[[Tensor], Tensor], start: Tensor, *, steps: int, lr: float) -> Tensor:
    logits = start.clone()
    for _ in range(steps):
        logits = logits - lr * gradient(loss_of, logits)
    return logits


TABLE_TEACHER = normal(9, seed=11, scale=0.7)
TABLE_SUPPORT = TABLE_TEACHER.topk(4).indices
TABLE_Q = TABLE_TEACHER.softmax(-1)[TABLE_SUPPORT]
RICH = normal(9, seed=12, scale=0.7).index_add(0, TABLE_SUPPORT, torch.full((4,), 2.0, dtype=torch.float64))
POOR = normal(9, seed=13, scale=0.7).index_add(0, TABLE_SUPPORT, torch.full((4,), -2.0, dtype=torch.float64))
STARTS = torch.stack([RICH, POOR])  # much and little mass on the support


def test_raw_converges_to_teacher_over_e():
    starts = STARTS.softmax(-1)[:, TABLE_SUPPORT].sum(-1)
    bound = TABLE_Q.sum() / math.e
    assert starts[0] > TABLE_Q.sum() > bound > starts[1]
    loss_of = loss_on(TABLE_SUPPORT, TABLE_TEACHER, "reverse_kl", "raw")
    end = descend(loss_of, STARTS, steps=300, lr=4.0)
    p = end.softmax(-1)[:, TABLE_SUPPORT]
    close(p, (TABLE_Q / math.e).expand(2, 4), 1e-9)
    close(p.sum(-1), bound.expand(2), 1e-9)
    close(loss_of(end), -bound.expand(2), 1e-9)


@pytest.mark.parametrize(
    "loss_of",
    [
        loss_on(TABLE_SUPPORT, TABLE_TEACHER, "reverse_kl", "stop_gradient"),
        loss_on(TABLE_SUPPORT, TABLE_TEACHER, "reverse_kl", "tail"),
        p2_code(TABLE_SUPPORT, TABLE_TEACHER),
    ],
    ids=["stop_gradient", "tail", "p2_code"],
)
def test_stop_gradient_and_tail_converge_to_teacher_mass(loss_of):
    end = descend(loss_of, STARTS, steps=300, lr=4.0)
    p = end.softmax(-1)[:, TABLE_SUPPORT]
    close(p, TABLE_Q.expand(2, 4), 1e-9)
    close(p.sum(-1), TABLE_Q.sum().expand(2), 1e-9)


def test_renormalised_converges_to_teacher_shape_not_mass():
    """The sum of the logits on S and every logit off S never move, which says where P_S ends."""
    end = descend(loss_on(TABLE_SUPPORT, TABLE_TEACHER, "reverse_kl", "renormalised"), STARTS, steps=300, lr=4.0)
    p = end.softmax(-1)[:, TABLE_SUPPORT]
    close(p / p.sum(-1, keepdim=True), (TABLE_Q / TABLE_Q.sum()).expand(2, 4), 1e-9)
    on = torch.zeros(9, dtype=torch.bool).scatter(0, TABLE_SUPPORT, True)
    close(end[:, ~on], STARTS[:, ~on], EXACT)
    level = (STARTS[:, TABLE_SUPPORT] - TABLE_Q.log()).mean(-1)
    inside, outside = level.exp() * TABLE_Q.sum(), STARTS[:, ~on].exp().sum(-1)
    close(p.sum(-1), inside / (inside + outside), 1e-9)
    assert ((p.sum(-1) - TABLE_Q.sum()).abs() > 0.1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Properties

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def pairs(draw: st.DrawFn, bound: float = 5.0) -> tuple[Tensor, Tensor, Tensor]:
    """Student log-probs [V], teacher log-probs [V] and a support that is neither empty nor everything."""
    size = draw(st.integers(2, 8))
    logits = st.lists(st.floats(-bound, bound, width=32), min_size=size, max_size=size)
    student, teacher = (torch.tensor(draw(logits), dtype=torch.float64).log_softmax(-1) for _ in range(2))
    support = draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size - 1))
    return student, teacher, torch.tensor(sorted(support))


case_of = st.sampled_from(CASES)


@SETTINGS
@given(pairs(), case_of)
def test_on_support_equals_oracle_for_any_pair(pair, case):
    student, teacher, support = pair
    close(case.ours(student, teacher), case.value(student.tolist(), teacher.tolist()), EXACT)
    for form in FORMS:
        got = on_support(case.ours, student[support], teacher[support], form)
        expected = oracle.FORMS[form](case.value, student[support].tolist(), teacher[support].tolist())
        close(got, expected, 1e-9)  # 1 - P_S loses digits when P_S is near 1


@SETTINGS
@given(pairs(bound=30.0), case_of)
def test_on_support_is_not_negative_for_tail_and_renormalised(pair, case):
    student, teacher, support = pair
    assert case.ours(student, teacher) >= -1e-14
    assert on_support(case.ours, student[support], teacher[support], "tail") >= -1e-14
    assert on_support(case.ours, student[support], teacher[support], "renormalised") >= -1e-14


@SETTINGS
@given(pairs(bound=30.0))
def test_raw_reverse_kl_is_bounded_by_teacher_mass_over_e(pair):
    student, teacher, support = pair
    for form in ("raw", "stop_gradient"):
        value = on_support("reverse_kl", student[support], teacher[support], form)
        assert value >= -teacher[support].exp().sum() / math.e - 1e-14


def test_raw_reverse_kl_attains_its_bound():
    teacher = TEACHER.log_softmax(-1)[SUPPORT]
    value = on_support("reverse_kl", teacher - 1.0, teacher, "raw")
    assert value.item() == pytest.approx(-Q_S.item() / math.e, abs=EXACT)
    assert on_support("reverse_kl", teacher - 1.0, teacher, "tail") > 0


@SETTINGS
@given(pairs(bound=30.0), case_of)
def test_on_support_is_zero_when_models_are_equal(pair, case):
    student, _, support = pair
    assert abs(case.ours(student, student).item()) < 1e-14
    for form in FORMS:
        assert abs(on_support(case.ours, student[support], student[support], form).item()) < 1e-14


@SETTINGS
@given(pairs(), case_of, st.randoms(use_true_random=False))
def test_on_support_is_unchanged_by_token_order(pair, case, random):
    student, teacher, support = pair
    order = list(range(len(support)))
    random.shuffle(order)
    shuffled = support[order]
    for form in FORMS:
        got = on_support(case.ours, student[shuffled], teacher[shuffled], form)
        close(got, on_support(case.ours, student[support], teacher[support], form), 1e-9)


@SETTINGS
@given(pairs(), case_of)
def test_tail_grows_with_support_to_full_divergence(pair, case):
    """A coarser vocabulary cannot tell two distributions apart better than a finer one."""
    student, teacher, support = pair
    rest = torch.tensor([v for v in range(len(student)) if v not in support.tolist()])
    order = torch.cat([support, rest])
    values = [on_support(case.ours, student[order[:k]], teacher[order[:k]], "tail") for k in range(1, len(order) + 1)]
    for smaller, larger in itertools.pairwise(values):
        assert smaller <= larger + 1e-9
    close(values[-1], case.ours(student, teacher), 1e-9)


@SETTINGS
@given(pairs(), case_of)
def test_tail_equals_divergence_of_coarser_vocabulary(pair, case):
    student, teacher, support = pair
    rest = torch.tensor([v for v in range(len(student)) if v not in support.tolist()])
    coarse = [torch.cat([logp[support], logp[rest].logsumexp(-1, keepdim=True)]) for logp in (student, teacher)]
    close(on_support(case.ours, student[support], teacher[support], "tail"), case.ours(*coarse), 1e-9)


@SETTINGS
@given(pairs(bound=30.0), st.floats(0.01, 0.99))
def test_generalised_jsd_is_bounded_and_swaps_with_beta(pair, beta):
    student, teacher, _ = pair
    value = generalised_jsd(student, teacher, beta=beta)
    close(value, generalised_jsd(teacher, student, beta=1.0 - beta), EXACT)
    half = generalised_jsd(student, teacher, beta=0.5)
    close(half, generalised_jsd(teacher, student, beta=0.5), EXACT)
    assert value <= -(beta * math.log(beta) + (1.0 - beta) * math.log(1.0 - beta)) + 1e-14
    assert half <= math.log(2.0) + 1e-14


@SETTINGS
@given(pairs(bound=30.0), st.floats(0.01, 0.99))
def test_skew_kl_is_bounded_and_mixes_to_jsd(pair, alpha):
    student, teacher, _ = pair
    forward = skew_kl(student, teacher, alpha=alpha, direction="forward")
    reverse = skew_kl(student, teacher, alpha=alpha, direction="reverse")
    assert max(forward, reverse) <= -math.log(alpha) + 1e-14
    close(reverse, skew_kl(teacher, student, alpha=alpha, direction="forward"), EXACT)
    other = skew_kl(student, teacher, alpha=1.0 - alpha, direction="reverse")
    close(alpha * forward + (1.0 - alpha) * other, generalised_jsd(student, teacher, beta=alpha), EXACT)


def test_skew_kl_approaches_kl_when_alpha_is_small():
    student, teacher = STUDENT.log_softmax(-1), TEACHER.log_softmax(-1)
    for direction, limit in (("forward", forward_kl), ("reverse", reverse_kl)):
        close(skew_kl(student, teacher, alpha=1e-9, direction=direction), limit(student, teacher), 1e-6)
        assert abs(skew_kl(student, teacher, alpha=1.0 - 1e-9, direction=direction).item()) < 1e-9
        values = [skew_kl(student, teacher, alpha=alpha, direction=direction) for alpha in (0.1, 0.3, 0.5, 0.7, 0.9)]
        assert values == sorted(values, reverse=True)


def test_generalised_jsd_approaches_kl_when_beta_is_extreme():
    student, teacher = STUDENT.log_softmax(-1), TEACHER.log_softmax(-1)
    small = 1e-7
    close(generalised_jsd(student, teacher, beta=small) / small, forward_kl(student, teacher), 1e-5)
    close(generalised_jsd(student, teacher, beta=1.0 - small) / small, reverse_kl(student, teacher), 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def masked_support() -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher log-probs [6, 5] of a vocabulary of 9, and a mask whose last row is empty."""
    student, teacher = normal(6, 9, seed=21).log_softmax(-1)[:, :5], normal(6, 9, seed=22).log_softmax(-1)[:, :5]
    rows = ["11111", "10110", "01001", "00001", "11011", "00000"]
    return student, teacher, torch.tensor([[entry == "1" for entry in row] for row in rows])


def support_losses(case: Case, form: str) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    return lambda student, teacher, mask: on_support(case.ours, student, teacher, form, mask)


def p2_code_loss(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    tokens = tokens_of(student_support_logp=student, teacher_support_logp=teacher, support_mask=mask)
    return signals.support_policy_gradient()(tokens)


MASKED = [(f"{case.name}-{form}", support_losses(case, form)) for case in CASES for form in FORMS]
MASKED.append(("p2_code", p2_code_loss))
every_masked_loss = pytest.mark.parametrize("loss", [loss for _, loss in MASKED], ids=[name for name, _ in MASKED])


@every_masked_loss
def test_support_mask_equals_shorter_support(loss):
    student, teacher, mask = masked_support()
    got, got_gradient = loss(student, teacher, mask), gradient(lambda s: loss(s, teacher, mask), student)
    for row in range(5):
        kept = mask[row]
        short, short_teacher = student[row : row + 1, kept], teacher[row : row + 1, kept]
        close(got[row], loss(short, short_teacher, None)[0], EXACT)
        close(got_gradient[row, kept], gradient(lambda s, t=short_teacher: loss(s, t, None), short)[0], EXACT)
    assert (got_gradient[~mask] == 0.0).all()


@every_masked_loss
def test_support_mask_gives_zero_when_empty(loss):
    student, teacher, mask = masked_support()
    assert loss(student, teacher, mask)[5].item() == 0.0
    alone = gradient(lambda s: loss(s, teacher[5:], mask[5:]), student[5:])
    assert torch.equal(alone, torch.zeros(1, 5, dtype=torch.float64))
    everything = torch.ones_like(mask)
    assert torch.equal(loss(student, teacher, everything), loss(student, teacher, None))


@every_masked_loss
def test_support_mask_hides_nan_and_infinity(loss):
    student, teacher, mask = masked_support()
    value, expected = loss(student, teacher, mask), gradient(lambda s: loss(s, teacher, mask), student)
    assert expected.isfinite().all()
    for junk in (math.nan, math.inf, -math.inf, 1e30):
        dirty_student, dirty_teacher = student.masked_fill(~mask, junk), teacher.masked_fill(~mask, junk)
        assert torch.equal(loss(dirty_student, dirty_teacher, mask), value), junk
        got = gradient(lambda s, teacher=dirty_teacher: loss(s, teacher, mask), dirty_student)
        assert torch.equal(got, expected), junk


# ---------------------------------------------------------------------------------------------------------------------
# Numbers: extremes, precision, purity


def extreme_logits() -> tuple[Tensor, Tensor]:
    """Float32 logits [R, 6] of +-1e4: random rows, and rows where both, one or none is certain of one token."""
    generator = torch.Generator().manual_seed(5)
    random = 1e4 * (2.0 * torch.randint(0, 2, (2, 60, 6), generator=generator).float() - 1.0)
    one_hot = 2e4 * torch.eye(6) - 1e4
    student = torch.cat([random[0], one_hot, one_hot, torch.full((6, 6), 1e4), one_hot])
    teacher = torch.cat([random[1], one_hot, one_hot.roll(1, 0), one_hot, torch.full((6, 6), -1e4)])
    return student, teacher


@every_case
def test_divergences_are_finite_when_logits_are_extreme(case):
    student, teacher = extreme_logits()
    teacher_logp = teacher.log_softmax(-1)
    value = case.ours(student.log_softmax(-1), teacher_logp)
    assert value.dtype == torch.float32
    rows = zip(student.log_softmax(-1).tolist(), teacher_logp.tolist(), strict=True)
    close(value, [case.value(s, t) for s, t in rows], 1e-5)
    assert gradient(lambda z: case.ours(z.log_softmax(-1), teacher_logp), student).isfinite().all()


@every_form
@every_case
def test_on_support_is_finite_when_logits_are_extreme(case, form):
    student, teacher = extreme_logits()
    for support in ([0], [1, 4], [0, 2, 3, 5], [0, 1, 2, 3, 4, 5]):
        loss_of = loss_on(torch.tensor(support), teacher, case.ours, form)
        assert loss_of(student).isfinite().all(), support
        assert gradient(loss_of, student).isfinite().all(), support


@pytest.mark.parametrize("support", [[0], [1, 4], [0, 1, 2, 3, 4, 5]], ids=str)
def test_support_policy_gradient_is_finite_at_extreme_logits(support):
    student, teacher = extreme_logits()
    index = torch.tensor(support)

    def loss_of(z: Tensor) -> Tensor:
        return p2_code_loss(z.log_softmax(-1)[:, index], teacher.log_softmax(-1)[:, index], None)

    assert loss_of(student).isfinite().all()
    assert gradient(loss_of, student).isfinite().all()


@every_form
@every_case
def test_on_support_in_float32_is_close_to_float64(case, form):
    students = normal(16, 50, seed=31)
    exact = loss_on(SUPPORT, TEACHER, case.ours, form)
    single = loss_on(SUPPORT, TEACHER.float(), case.ours, form)
    close(single(students.float()), exact(students), 2e-6)
    close(gradient(single, students.float()), gradient(exact, students), 2e-6)


@every_form
@every_case
def test_on_support_computes_half_precision_in_float32(case, form):
    for dtype in (torch.bfloat16, torch.float16):
        student = normal(4, 50, seed=32).log_softmax(-1)[:, :6].to(dtype)
        teacher = normal(4, 50, seed=33).log_softmax(-1)[:, :6].to(dtype)
        for function in (case.ours, partial(on_support, case.ours, form=form)):
            got = function(student, teacher)
            assert got.dtype == torch.float32
            assert torch.equal(got, function(student.float(), teacher.float()))


@every_form
@every_case
def test_on_support_is_byte_equal_without_autograd(case, form):
    student, teacher, mask = masked_support()
    expected = on_support(case.ours, student, teacher, form, mask)
    with torch.no_grad():
        assert torch.equal(on_support(case.ours, student, teacher, form, mask), expected)
    with torch.inference_mode():
        assert torch.equal(on_support(case.ours, student, teacher, form, mask), expected)


@every_form
@every_case
def test_on_support_modifies_no_input(case, form):
    student, teacher, mask = masked_support()
    inputs = (student, teacher, mask)
    before, versions = [x.clone() for x in inputs], [x._version for x in inputs]
    for dtype in (torch.float64, torch.float32):
        s, t = student.to(dtype), teacher.to(dtype)
        copies, typed_versions = (s.clone(), t.clone()), (s._version, t._version)
        case.ours(s, t)
        on_support(case.ours, s, t, form)
        on_support(case.ours, s, t, form, mask)
        gradient(lambda x, t=t: on_support(case.ours, x, t, form, mask), s)
        p2_code_loss(s, t, mask)
        assert torch.equal(s, copies[0])
        assert torch.equal(t, copies[1])
        assert (s._version, t._version) == typed_versions
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert [x._version for x in inputs] == versions


# ---------------------------------------------------------------------------------------------------------------------
# Names


def test_on_support_accepts_name_function_or_partial():
    student, teacher = STUDENT.log_softmax(-1)[SUPPORT], TEACHER.log_softmax(-1)[SUPPORT]
    functions = {
        "reverse_kl": reverse_kl,
        "forward_kl": forward_kl,
        "generalised_jsd": generalised_jsd,
        "skew_kl": skew_kl,
    }
    for name, function in functions.items():
        for form in FORMS:
            by_name = on_support(name, student, teacher, form)
            assert torch.equal(by_name, on_support(function, student, teacher, form))
            assert torch.equal(by_name, on_support(partial(function), student, teacher, form))
            tokens = tokens_of(student_support_logp=student[None], teacher_support_logp=teacher[None])
            assert torch.equal(by_name[None], signals.divergence(name, form=form)(tokens))


def test_on_support_accepts_custom_divergence():
    """c(p, q) = p - q + q log(q/p), a function that the library has never seen: slope 0 at equality, never negative."""

    def own(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        p, q = student_logp.exp(), teacher_logp.exp()
        return (p - q + q * (teacher_logp - student_logp)).sum(-1)

    def slope(p: float, q: float) -> float:
        return 1.0 - q / p

    for form in FORMS:
        got = gradient(loss_on(SUPPORT, TEACHER, own, form), STUDENT)
        close(got, oracle.grad_on_support(slope, form, *LISTS), EXACT)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("revers_kl", "reverse_kl"),
        ("forwardkl", "forward_kl"),
        ("generalized_jsd", "generalised_jsd"),
        ("skew", "skew_kl"),
    ],
)
def test_on_support_names_nearest_divergence_when_unknown(wrong, nearest):
    logp = STUDENT.log_softmax(-1)[SUPPORT]
    for attempt in (lambda: on_support(wrong, logp, logp), lambda: signals.divergence(wrong)):
        with pytest.raises(ConfigError) as raised:
            attempt()
        assert repr(wrong) in str(raised.value)
        assert f"Did you mean {nearest!r}?" in str(raised.value)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("tial", "tail"), ("renormalized", "renormalised"), ("stop-gradient", "stop_gradient"), ("rawr", "raw")],
)
def test_on_support_names_nearest_form_when_unknown(wrong, nearest):
    logp = STUDENT.log_softmax(-1)[SUPPORT]
    for attempt in (
        lambda: on_support("reverse_kl", logp, logp, form=wrong),
        lambda: signals.divergence("reverse_kl", form=wrong),
    ):
        with pytest.raises(ConfigError) as raised:
            attempt()
        assert repr(wrong) in str(raised.value)
        assert f"Did you mean {nearest!r}?" in str(raised.value)


@pytest.mark.parametrize("wrong", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_generalised_jsd_and_skew_kl_refuse_bad_parameters(wrong):
    logp = STUDENT.log_softmax(-1)
    with pytest.raises(ConfigError, match=rf"beta must lie strictly between 0 and 1, got {wrong}"):
        generalised_jsd(logp, logp, beta=wrong)
    with pytest.raises(ConfigError, match=rf"alpha must lie strictly between 0 and 1, got {wrong}"):
        skew_kl(logp, logp, alpha=wrong)


def test_skew_kl_refuses_unknown_direction():
    logp = STUDENT.log_softmax(-1)
    with pytest.raises(ConfigError, match=r"'backward'.*'forward'.*'reverse'"):
        skew_kl(logp, logp, direction="backward")


@pytest.mark.parametrize(
    ("name", "options"),
    [("generalised_jsd", {"beta": 2.0}), ("skew_kl", {"alpha": 0.0}), ("skew_kl", {"direction": "backward"})],
)
def test_divergence_refuses_bad_options_when_built(name, options):
    """Not at the first step, after the weights of two models were loaded."""
    with pytest.raises(ConfigError):
        signals.divergence(name, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Signals


def sampled_tokens() -> Tokens:
    """Eight tokens: ratios p/mu on both sides of a clip of (0.2, 0.28), with advantages of both signs."""
    ratio = torch.tensor([0.5, 0.5, 0.9, 0.9, 1.1, 1.1, 2.0, 2.0], dtype=torch.float64)
    sampler_logp = normal(8, seed=41) - 3.0
    return tokens_of(
        student_logp=sampler_logp + ratio.log(),
        sampler_logp=sampler_logp,
        teacher_logp=normal(8, seed=42) - 3.0,
        advantage=torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 1.5, -1.5], dtype=torch.float64),
    )


def with_student(tokens: Tokens, student_logp: Tensor) -> Tokens:
    return tokens_of(
        student_logp=student_logp,
        sampler_logp=tokens.sampler_logp,
        teacher_logp=tokens.teacher_logp,
        advantage=tokens.advantage,
    )


@pytest.mark.parametrize("clip", [None, (0.2, 0.28), (0.0, 0.0), (0.2, 5.0)], ids=str)
@pytest.mark.parametrize("advantage", [signals.credit, signals.log_ratio])
def test_policy_gradient_equals_oracle_when_weighted_or_clipped(advantage, clip):
    tokens = sampled_tokens()
    signal = signals.policy_gradient(advantage, importance=True, clip=clip)
    expected = [
        oracle.policy_gradient(logp, old, a, clip)
        for logp, old, a in zip(
            tokens.student_logp.tolist(), tokens.sampler_logp.tolist(), advantage(tokens).tolist(), strict=True
        )
    ]
    close(signal(tokens), [value for value, _ in expected], EXACT)
    got = gradient(lambda logp: signal(with_student(tokens, logp)), tokens.student_logp)
    close(got, [slope for _, slope in expected], EXACT)


def test_policy_gradient_equals_minus_advantage_times_logp():
    tokens = sampled_tokens()
    signal = signals.policy_gradient()
    close(signal(tokens), -tokens.advantage * tokens.student_logp, EXACT)
    close(gradient(lambda logp: signal(with_student(tokens, logp)), tokens.student_logp), -tokens.advantage, EXACT)


def test_policy_gradient_uses_importance_when_clip_is_given():
    tokens = sampled_tokens()
    with_flag = signals.policy_gradient(clip=(0.2, 0.28), importance=True)(tokens)
    assert torch.equal(signals.policy_gradient(clip=(0.2, 0.28))(tokens), with_flag)


@pytest.mark.parametrize("clip", [(-0.1, 0.2), (0.2, -0.1), (math.nan, 0.2)], ids=str)
def test_policy_gradient_refuses_bad_clip(clip):
    with pytest.raises(ConfigError, match=r"\(low, high\)"):
        signals.policy_gradient(clip=clip)


@pytest.mark.parametrize("dual", [1.15, 3.0, 1e6])
@pytest.mark.parametrize("clip", [(0.2, 0.28), (0.2, 5.0)], ids=str)
def test_policy_gradient_equals_oracle_with_dual_clip(dual: float, clip: tuple[float, float]):
    tokens = sampled_tokens()
    signal = signals.policy_gradient(clip=clip, dual_clip=dual)
    rows = list(zip(*(getattr(tokens, n).tolist() for n in ("student_logp", "sampler_logp", "advantage")), strict=True))
    expected = [oracle.policy_gradient(*row, clip, dual) for row in rows]
    close(signal(tokens), [value for value, _ in expected], EXACT)
    got = gradient(lambda logp: signal(with_student(tokens, logp)), tokens.student_logp)
    close(got, [slope for _, slope in expected], EXACT)
    changed = [value != oracle.policy_gradient(*row, clip)[0] for row, (value, _) in zip(rows, expected, strict=True)]
    assert changed == [a < 0 and math.exp(p - mu) > dual for p, mu, a in rows]
    if dual == 1.15:
        assert any(changed)


@pytest.mark.parametrize(
    ("dual", "clip"), [(1.0, (0.2, 0.2)), (math.inf, (0.2, 0.2)), (math.nan, (0.2, 0.2)), (3, None)]
)
def test_policy_gradient_refuses_bad_dual_clip(dual: float, clip: tuple[float, float] | None):
    with pytest.raises(ConfigError, match=r"dual_clip bounds a clipped ratio and must be above 1 and finite; got dual"):
        signals.policy_gradient(clip=clip, dual_clip=dual)


@pytest.mark.parametrize("epsilon", [0.0, -1e-6, math.inf, math.nan])
@pytest.mark.parametrize("name", ["grpo", "ropd"])
def test_build_refuses_bad_epsilon(name: str, epsilon: float):
    with pytest.raises(ConfigError, match=r"a group's standard deviation, must be positive and finite, got"):
        methods.build(name, {"epsilon": epsilon})


@pytest.mark.parametrize(("advantage", "expected"), [(1.0, -1.28), (0.5, -0.64)])
def test_policy_gradient_is_zero_when_clipped_ratio_overflows(advantage, expected):
    """A sampler whose probability underflowed: min(rho A, 1.28 A) is a constant, its slope 0 and not 0 * inf."""
    signal = signals.policy_gradient(clip=(0.2, 0.28))
    fields = {"sampler_logp": torch.tensor([-2e4]), "advantage": torch.tensor([advantage])}
    assert signal(tokens_of(student_logp=torch.zeros(1), **fields)).item() == pytest.approx(expected)
    got = gradient(lambda logp: signal(tokens_of(student_logp=logp, **fields)), torch.zeros(1))
    assert got.item() == 0.0


def test_policy_gradient_stops_gradient_of_advantage():
    """Also when it is made from the student's own log-probs without a detach."""
    tokens = sampled_tokens()
    for advantage in (signals.log_ratio, lambda t: t.teacher_logp - t.student_logp):
        signal = signals.policy_gradient(advantage)
        got = gradient(lambda logp, signal=signal: signal(with_student(tokens, logp)), tokens.student_logp)
        close(got, tokens.student_logp - tokens.teacher_logp, EXACT)
    leaf = tokens.student_logp.clone().requires_grad_()
    assert not signals.log_ratio(with_student(tokens, leaf)).requires_grad


def test_policy_gradient_of_one_token_equals_oracle():
    signal = signals.policy_gradient(advantage=signals.log_ratio)
    teacher = TEACHER.log_softmax(-1)
    for y in (0, 7, 49):

        def loss_of(z: Tensor, y: int = y) -> Tensor:
            return signal(tokens_of(student_logp=z.log_softmax(-1)[y : y + 1], teacher_logp=teacher[y : y + 1]))

        close(gradient(loss_of, STUDENT), oracle.grad_sampled_policy_gradient(*LISTS[:2], y), EXACT)


@every_form
@every_case
def test_divergence_equals_on_support_with_token_mask(case, form):
    student, teacher, mask = masked_support()
    expected = on_support(case.ours, student, teacher, form, mask)
    tokens = tokens_of(student_support_logp=student, teacher_support_logp=teacher, support_mask=mask)
    assert torch.equal(signals.divergence(case.ours, form=form)(tokens), expected)


def test_divergence_binds_options_to_name():
    student, teacher, _ = masked_support()
    tokens = tokens_of(student_support_logp=student, teacher_support_logp=teacher)
    got = signals.divergence("skew_kl", form="renormalised", alpha=0.3, direction="reverse")(tokens)
    function = partial(skew_kl, alpha=0.3, direction="reverse")
    assert torch.equal(got, on_support(function, student, teacher, "renormalised"))


@pytest.mark.parametrize("signal", [signals.divergence(), signals.support_policy_gradient()])
def test_divergence_raises_config_error_when_support_is_missing(signal):
    with pytest.raises(ConfigError, match=r"support=top_k\(k\)"):
        signal(sampled_tokens())


def test_nll_add_and_scale_equal_formula():
    tokens = sampled_tokens()
    policy = signals.policy_gradient()
    close(signals.nll()(tokens), -tokens.student_logp, EXACT)
    got = signals.add(signals.nll(), signals.scale(0.3, policy))(tokens)
    close(got, -tokens.student_logp + 0.3 * policy(tokens), EXACT)
