"""What studies measure, against plain Python: gradients, fixed points, walks, geometric means, bias and noise."""

from __future__ import annotations

import math

import oracle
import pytest
import torch

from opd_studies.claims import estimators, fixed_points, losses, one_token, privileged, supports
from opd_studies.lab import ablation
from opd_studies.lab.on_policy_batch import OnPolicyBatch, output_norm
from opd_studies.worlds import gaussian_walks, truncated_forms


def random_pair(seed: int, vocabulary: int = 6, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Student logits and teacher log-probs [rows, V], float64."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64)
    return student, teacher.log_softmax(-1)


@pytest.mark.parametrize("form", truncated_forms.FORMS)
def test_on_support_equals_oracle_gradient(form):
    student, teacher = random_pair(3)
    inside = torch.tensor([True, False, True, True, False, False]).expand(3, 6)
    z = student.clone().requires_grad_()
    (grad,) = torch.autograd.grad(truncated_forms.on_support(form, z.log_softmax(-1), teacher, inside).sum(), z)
    written = {
        "raw": oracle.grad_topk_raw,
        "stop_gradient": oracle.grad_topk_stop_gradient,
        "renormalised": oracle.grad_renormalised,
        "tail": oracle.grad_tail,
        "released_code": oracle.grad_support_policy_gradient,
    }[form]
    for row in range(3):
        expected = written(student[row].tolist(), teacher[row].tolist(), [0, 2, 3])
        assert grad[row].tolist() == pytest.approx(expected, abs=1e-12)


def test_identity_errors_are_zero_unless_form_is_wrong(monkeypatch):
    assert max(truncated_forms.identity_errors(0).values()) < 1e-12
    monkeypatch.setitem(truncated_forms.divergences.FORMS, "stop_gradient", truncated_forms.divergences.FORMS["raw"])
    wrong = truncated_forms.identity_errors(0)
    assert wrong["raw - stop-gradient = grad P_S"] > 1e-3
    assert wrong["released code = stop-gradient / P_S"] > 1e-3


def test_fixed_points_descend_to_closed_forms():
    """Four tokens, two of them scored: the closed form of the mass at the end."""
    teacher = torch.tensor([[0.4, 0.2, 0.3, 0.1]], dtype=torch.float64).log()
    student, support = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([[True, True, False, False]])
    rate = torch.tensor([[1.0]], dtype=torch.float64)
    for form, expected in {"raw": 0.6 / math.e, "stop_gradient": 0.6, "tail": 0.6, "released_code": 0.6}.items():
        masses, end = fixed_points.descend(form, student, teacher, support, rate, 600)
        assert masses.shape == (601, 1)
        assert masses[0].item() == pytest.approx(0.5)
        assert masses[-1].item() == pytest.approx(expected, abs=1e-6)
        p = end.softmax(-1)[0]
        assert (p[0] / p[1]).item() == pytest.approx(2.0, abs=1e-5)


def test_discounted_equals_plain_sum():
    values = torch.tensor([[[1.0, -2.0, 3.0]], [[0.5, 4.0, -1.0]]])
    gamma_of_row = torch.tensor([0.5, 1.0])
    got = gaussian_walks.discounted(values, gamma_of_row)
    for r, g in enumerate((0.5, 1.0)):
        row = values[r, 0].tolist()
        expected = [sum(g ** (j - t) * row[j] for j in range(t, 3)) for t in range(3)]
        assert got[r, 0].tolist() == pytest.approx(expected)


def test_gaussian_walks_have_consistent_steps_and_densities():
    network = gaussian_walks.new_network([1, 2], 5)
    floor = torch.tensor([-1.0, -5.0])
    states, steps = gaussian_walks.rollout(network, floor, 1, 4, gaussian_walks.generator_of(0, 1))
    assert states.shape == (2, 4, gaussian_walks.HORIZON + 1, 3)
    assert torch.equal(states[:, :, 0, 1], torch.full((2, 4), gaussian_walks.STARTS[1]))
    assert torch.allclose(states[:, :, 1:, 1], states[:, :, :-1, 1] + steps)
    out = gaussian_walks.outputs(network, states[:, :, :-1])[1]
    got = gaussian_walks.log_prob(out, steps, floor)
    for r, t in ((0, 0), (1, 7)):
        mean, log_sigma = out[r, 2, t].tolist()
        sigma = math.exp(max(min(log_sigma, gaussian_walks.LARGEST_LOG_SIGMA), floor[r].item()))
        z = (steps[r, 2, t].item() - mean) / sigma
        expected = -z * z / 2 - math.log(sigma) - math.log(2 * math.pi) / 2
        assert got[r, 2, t].item() == pytest.approx(expected, abs=1e-4)


def test_between_micro_batches_equals_variance_of_gradients():
    network = [w.double().requires_grad_() for w in gaussian_walks.new_network([3], 4)]
    floor = torch.tensor([-1.0])
    states, steps = gaussian_walks.rollout(
        [w.detach().float() for w in network], floor, 0, 8, gaussian_walks.generator_of(1)
    )
    weight = torch.linspace(-1, 1, 8, dtype=torch.float64)[None, :, None]

    def per_walk() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden, out = gaussian_walks.outputs(network, states[:, :, :-1].double())
        return hidden, out, (weight * gaussian_walks.log_prob(out, steps.double(), floor.double())).sum(2)

    hidden, out, losses_of_walks = per_walk()
    (at_output,) = torch.autograd.grad(losses_of_walks.mean(1).sum(), out)
    got = gaussian_walks.between_micro_batches(hidden.detach(), at_output * 8, 4)
    grads = []
    for m in range(4):
        part = per_walk()[2][:, 2 * m : 2 * m + 2].mean(1).sum()
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(part, network[-2:])]).tolist())
    mean = [math.fsum(column) / 4 for column in zip(*grads, strict=True)]
    expected = math.fsum((g - m) ** 2 for grad in grads for g, m in zip(grad, mean, strict=True)) / 4
    assert got.item() == pytest.approx(expected)


def test_privileged_descend_ends_at_geometric_mean():
    teacher = torch.tensor([[[0.7, 0.2, 0.1]], [[0.1, 0.6, 0.3]]], dtype=torch.float64).log()
    logits, losses_by_step = privileged.descend(torch.zeros(1, 3, dtype=torch.float64), lambda z: z, teacher, 800)
    product = [math.sqrt(a * b) for a, b in ((0.7, 0.1), (0.2, 0.6), (0.1, 0.3))]
    assert logits.softmax(-1)[0].tolist() == pytest.approx([v / sum(product) for v in product], abs=1e-4)
    assert losses_by_step[-1].item() == pytest.approx(-math.log(sum(product)), abs=1e-6)


def test_share_kept_equals_hand_value():
    base = torch.zeros(1, 1, 2, dtype=torch.float64)
    added = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    teacher = torch.tensor([[[0.9, 0.1]]], dtype=torch.float64).log()
    student = torch.tensor([[0.6, 0.4]], dtype=torch.float64).log()
    assert privileged.share_kept(student, teacher, base, added) == pytest.approx(0.1 / 0.4)


def test_sampled_gradients_equal_enumeration():
    student, teacher = random_pair(5)
    batch = OnPolicyBatch(student=student, teacher=teacher, hidden=torch.eye(3, dtype=torch.float64))
    (mean, variance), (wrong, _) = estimators.sampled_gradients(batch)
    for row in range(3):
        z, t = student[row].tolist(), teacher[row].tolist()
        p, exact = oracle.softmax(z), oracle.grad_full(z, t)
        assert mean[row].tolist() == pytest.approx(exact, abs=1e-12)
        each = [oracle.grad_sampled_policy_gradient(z, t, y) for y in range(6)]
        distances = [math.fsum((g - e) ** 2 for g, e in zip(one, exact, strict=True)) for one in each]
        expected = math.fsum(chance * distance for chance, distance in zip(p, distances, strict=True))
        assert variance[row].item() == pytest.approx(expected)
    assert wrong.abs().max() < 1e-12
    # hidden states that are unit vectors keep positions apart: the output layer's gradient is that of the logits
    assert output_norm(mean, batch) == pytest.approx(float(mean.norm()))


def test_estimators_measure_equals_plain_python(monkeypatch):
    monkeypatch.setattr(estimators, "KS", (2, 6))
    student, teacher = random_pair(7, rows=2)
    hidden = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    numbers = estimators.measure([OnPolicyBatch(student=student, teacher=teacher, hidden=hidden)])

    def norm(gradients: list[list[float]]) -> float:
        rows = list(zip(gradients, hidden.tolist(), strict=True))
        layer = [sum(g[v] * h[i] for g, h in rows) for v in range(6) for i in (0, 1)]
        return math.sqrt(math.fsum(x * x for x in layer))

    pairs = list(zip(student.tolist(), teacher.tolist(), strict=True))
    exact = [oracle.grad_full(z, t) for z, t in pairs]
    top = [sorted(range(6), key=lambda v, t=t: -t[v])[:2] for _, t in pairs]
    raw = [oracle.grad_topk_raw(z, t, s) for (z, t), s in zip(pairs, top, strict=True)]
    gap = [[r - e for r, e in zip(one, other, strict=True)] for one, other in zip(raw, exact, strict=True)]
    p = [oracle.softmax(z) for z, _ in pairs]
    assert numbers.bias["raw"][2][0] == pytest.approx(norm(gap) / norm(exact))
    assert numbers.bias["raw"][6][0] == pytest.approx(0.0, abs=1e-9)
    assert numbers.student_mass[2][0] == pytest.approx(sum(a[v] for a, s in zip(p, top, strict=True) for v in s) / 2)
    assert numbers.sampled_bias[0] < 1e-9
    assert numbers.sampled_noise[0] > 0.0


def test_smoothed_and_curve_measures_equal_hand_values():
    assert ablation.smoothed([1.0, 2.0, 6.0, 0.0], 2) == [1.5, 4.0, 3.0]
    assert ablation.smoothed([1.0], 2) == []
    assert one_token.largest_fall([0.2, 0.5, 0.4, 0.6, 0.1]) == pytest.approx(0.5)
    assert one_token.largest_fall([0.1, 0.2, 0.3]) == 0.0
    assert losses.half_life([0.9, 0.5, 0.46, 0.44, 0.8]) == 3.0
    assert losses.half_life([0.9, 0.5]) == 2.0  # it always is
    assert losses.doublings([8.0, 3.0], [2.0, 6.0]) == pytest.approx([2.0, -1.0])
    rows = [{"step": 1.0, supports.OVERLAP: 0.5}, {"step": 2.0}, {"step": 10.0, supports.OVERLAP: 0.75}]
    assert supports.looked_at(rows, supports.OVERLAP) == {1: 0.5, 10: 0.75}
