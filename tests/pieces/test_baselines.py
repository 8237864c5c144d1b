"""Baselines: their values, the mean gradient that they leave as it is, its variance, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import oracle
import pytest
import torch
from torch import Tensor

from opd import methods
from opd.api import distill
from opd.errors import ConfigError
from opd.pieces import baselines, contexts, filters, signals, weights
from opd.pieces.needs import Trait, needs_of
from opd.types import Tokens


def pair(seed: int, vocabulary: int = 12, scale: float = 2.0) -> tuple[list[float], list[float]]:
    """Logits of student and teacher."""
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(2, vocabulary, generator=generator, dtype=torch.float64)
    return z[0].tolist(), z[1].tolist()


def tokens_of(student: list[float], teacher: list[float], k: int | None) -> tuple[Tensor, Tokens]:
    """Every token of the vocabulary once, as if each had been drawn at the same prefix: logits [V] and the record."""
    z = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    p, q = z.log_softmax(-1), torch.tensor(teacher, dtype=torch.float64).log_softmax(-1)
    n = len(student)
    top = torch.arange(n) if k is None else p.topk(k).indices
    none = torch.zeros(n, dtype=torch.float64)
    return z, Tokens(
        student_logp=p,
        sampler_logp=p.detach(),
        teacher_logp=q,
        advantage=none,
        weight=none + 1,
        student_support_logp=p[top].expand(n, -1),
        teacher_support_logp=q[top].expand(n, -1),
        support_mask=None if k is None else torch.ones(n, k, dtype=torch.bool),
    )


def moments(student: list[float], teacher: list[float], method: str, **options: object) -> tuple[list[float], float]:
    """Mean and summed variance over y ~ p of the gradient at the logits, by enumeration."""
    made = methods.build(method, options)
    k = None if made.support.kind in ("full", "sampled") else made.support.k
    z, tokens = tokens_of(student, teacher, k)
    losses = made.signal(tokens)
    p = tokens.student_logp.detach().exp()
    grads = torch.stack([torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses])
    mean = (p[:, None] * grads).sum(0)
    return mean.tolist(), float((p[:, None] * grads.square()).sum() - mean.square().sum())


SETTINGS = [{"baseline": "full"}, {"baseline": "optimal"}, {"k": 1}, {"k": 3}, {"k": 12}]


@pytest.mark.parametrize("seed", range(4))
def test_baselines_equal_oracle(seed: int):
    student, teacher = pair(seed)
    _, tokens = tokens_of(student, teacher, None)
    everything = list(range(12))
    value = oracle.value_baseline(student, teacher, everything)
    assert baselines.expected_log_ratio(tokens).tolist() == pytest.approx([value] * 12, abs=1e-12)
    best = oracle.optimal_baseline(student, teacher)
    assert baselines.least_variance(tokens).tolist() == pytest.approx([best] * 12, abs=1e-12)
    for k in (1, 3, 7):
        _, tokens = tokens_of(student, teacher, k)
        top = sorted(everything, key=lambda v: -student[v])[:k]
        value = oracle.value_baseline(student, teacher, top)
        assert baselines.expected_log_ratio(tokens).tolist() == pytest.approx([value] * 12, abs=1e-12)


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("seed", range(4))
def test_vopd_keeps_mean_gradient_and_optimal_varies_least(seed: int, options: dict):
    student, teacher = pair(seed)
    mean, variance = moments(student, teacher, "vopd", **options)
    assert mean == pytest.approx(oracle.grad_full(student, teacher), abs=1e-12)
    _, least = moments(student, teacher, "vopd", baseline="optimal")
    assert variance >= least - 1e-12
    assert moments(student, teacher, "opd")[1] >= least - 1e-12


def test_vopd_full_baseline_raises_variance_when_student_errs():
    student = [math.log(0.99)] + [math.log(0.01 / 11)] * 11
    teacher = [math.log(0.007)] + [math.log(0.993 / 11)] * 11
    _, plain = moments(student, teacher, "opd")
    _, value = moments(student, teacher, "vopd", baseline="full")
    _, optimal = moments(student, teacher, "vopd", baseline="optimal")
    assert value > 2 * plain
    assert optimal < 0.5 * plain


def test_expected_log_ratio_ignores_masked_entries():
    student, teacher = pair(0)
    _, tokens = tokens_of(student, teacher, 3)
    exists = torch.tensor([[True, True, False], [False] * 3]).repeat(6, 1)
    spoilt = torch.where(exists, tokens.teacher_support_logp, torch.nan)
    values = baselines.expected_log_ratio(
        Tokens(
            student_logp=tokens.student_logp,
            sampler_logp=tokens.sampler_logp,
            teacher_logp=tokens.teacher_logp,
            advantage=tokens.advantage,
            weight=tokens.weight,
            student_support_logp=tokens.student_support_logp,
            teacher_support_logp=spoilt,
            support_mask=exists,
        )
    )
    top = sorted(range(12), key=lambda v: -student[v])[:2]
    assert values[::2].tolist() == pytest.approx([oracle.value_baseline(student, teacher, top)] * 6)
    assert values[1::2].tolist() == [0.0] * 6


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (
            {"top_p": 0.9},
            r"drawn with top_p 0.9 and top_k 0, .* biases a baseline\. .* Set sampling.top_p to 1",
        ),
        ({"top_k": 5}, r"drawn with top_p 1.0 and top_k 5, .*Set sampling.top_p to 1 and sampling.top_k to 0"),
        ({"temperature": 0.7}, r"sampled at temperature 0.7 and scored at 1.0: the gradient would be biased"),
    ],
)
def test_vopd_refuses_biased_sampling(sampling: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        distill(student="nowhere", teacher="nowhere", prompts=["1"], method="vopd", steps=1, sampling=sampling)


def weighted(piece: str) -> object:
    method = methods.build("vopd", {"k": 3})
    if piece == "weight":
        return replace(method, weight=weights.times(weights.mask_tokens(["1"]), weights.every_token()))
    return replace(method, filter=filters.in_turn(filters.without_tokens(["1"])))


@pytest.mark.parametrize("piece", ["weight", "filter"])
def test_vopd_refuses_pieces_that_look_at_sampled_token(piece: str):
    with pytest.raises(
        ConfigError, match=rf"the {piece} depends on the sampled token, .* Leave it out, or use method opd"
    ):
        distill(student="nowhere", teacher="nowhere", prompts=["1"], method=weighted(piece), steps=1)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (
            {"filter": filters.first_passing(filters.clean())},
            "the filter selects responses by their content, .* Leave it out",
        ),
        (
            {"context": contexts.privileged(template="{prompt}{attempt}")},
            "the teacher reads the response that it scores, .* Use a context without the attempt",
        ),
    ],
)
def test_vopd_refuses_pieces_that_look_at_whole_response(pieces: dict, message: str):
    method = replace(methods.build("vopd", {"k": 3}), **pieces)
    with pytest.raises(ConfigError, match=message):
        distill(student="nowhere", teacher="nowhere", prompts=["1"], method=method, steps=1)


def test_needs_of_has_unbiased_baseline_when_signal_is_centred():
    assert Trait.UNBIASED_BASELINE in methods.build("vopd", {}).needs
    centred = signals.policy_gradient(baselines.against(baselines.expected_log_ratio, signals.log_ratio))
    assert Trait.UNBIASED_BASELINE in needs_of(signals.add(centred, signals.nll()))
