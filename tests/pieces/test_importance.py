"""Capped importance weights against plain Python, and the mean gradient that they correct, by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from opd.errors import ConfigError
from opd.pieces import importance
from opd.types import Batch

NAN = math.nan
POLICY = [[-1.0, -0.5, -2.0], [-0.3, -0.9, NAN]]
SAMPLER = [[-1.5, -0.4, -2.0], [-0.1, -2.5, NAN]]


def batch(policy: Tensor, sampler: Tensor) -> Batch:
    rows = len(policy)
    return Batch(
        rollouts=(),
        response_ids=torch.zeros(policy.shape, dtype=torch.int64),
        mask=~policy.isnan(),
        sampler_logp=sampler,
        policy_logp=policy,
        teacher_logp=policy,
        reward=torch.zeros(rows),
        group=torch.arange(rows),
    )


def test_weights_are_ratios_up_to_the_cap():
    made = batch(torch.tensor(POLICY), torch.tensor(SAMPLER))
    ratios = [
        [math.exp(p - m) for p, m in zip(*pair, strict=True) if p == p] for pair in zip(POLICY, SAMPLER, strict=True)
    ]
    token, sequence = (importance.truncated(level, 2.0)(made) for level in ("token", "sequence"))
    for row, own in enumerate(ratios):
        assert token[row, : len(own)].tolist() == pytest.approx([min(2.0, one) for one in own], rel=1e-6)
        assert sequence[row, : len(own)].tolist() == pytest.approx([min(2.0, math.prod(own))] * len(own), rel=1e-6)
    assert token.isfinite().all(), "padding is multiplied by other weights"


def test_measured_weights_are_those_of_trained_tokens():
    made = batch(torch.tensor(POLICY), torch.tensor(SAMPLER))
    found = importance.weighed("token", 2.0)().observe(made, lambda value: [value, value])
    w = [
        min(2.0, math.exp(p - m))
        for pair in zip(POLICY, SAMPLER, strict=True)
        for p, m in zip(*pair, strict=True)
        if p == p
    ]
    assert found["importance/mean"] == pytest.approx(sum(w) / 5, rel=1e-6)
    assert found["importance/ess"] == pytest.approx(sum(w) ** 2 / (5 * sum(one * one for one in w)), rel=1e-6)
    assert found["importance/capped"] == pytest.approx(1 / 5)


def test_measured_weights_are_left_out_without_trained_tokens():
    empty = batch(torch.full((1, 2), NAN), torch.full((1, 2), NAN))
    assert importance.weighed("sequence", 2.0)().observe(empty, lambda value: [value]) == {}


@pytest.mark.parametrize("cap", [0.5, math.inf, NAN])
def test_cap_below_one_is_refused(cap: float):
    with pytest.raises(ConfigError, match="is 1 on policy: give 1 or more"):
        importance.truncated("token", cap)


V = 3


def log_probs(logits: Tensor, y: tuple[int, int]) -> Tensor:
    """Log-probs [2] of a response of two tokens; the second depends on the first."""
    first, second = logits[0].log_softmax(-1), logits[1 + y[0]].log_softmax(-1)
    return torch.stack([first[y[0]], second[y[1]]])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_mean_gradient_is_that_of_the_weights_that_train(level: importance.Level):
    """E_mu[sum_t w_t A_t grad log p_t]: `sequence` has E_p's; `token` has it at mu's prefixes."""
    draw = torch.Generator().manual_seed(7)
    p, mu = (torch.randn(1 + V, V, generator=draw, dtype=torch.float64) for _ in range(2))
    advantage = torch.randn(V, V, 2, generator=draw, dtype=torch.float64)

    def mean(prefixes: Tensor, tokens: Tensor, weigh: bool) -> Tensor:
        """The mean gradient; a first token that is a prefix is of `prefixes`, all others of `tokens`."""
        logits, total = p.clone().requires_grad_(), torch.zeros((), dtype=torch.float64)
        for y in itertools.product(range(V), repeat=2):
            now = log_probs(logits, y)
            drawn = [log_probs(one, y).detach().exp() for one in (tokens, prefixes)]
            w = torch.ones(2, dtype=torch.float64)
            if weigh:
                made = batch(now.detach()[None], log_probs(mu, y).detach()[None])
                w = importance.truncated(level, 1e9)(made)[0]
            # token 0 has no prefix; the mean over what follows it is 1
            total = total + drawn[0][0] * drawn[0][1] * w[0] * advantage[y[0], 0, 0] * now[0]
            total = total + drawn[1][0] * drawn[0][1] * w[1] * advantage[y[0], y[1], 1] * now[1]
        total.backward()
        assert logits.grad is not None
        return logits.grad

    got = mean(mu, mu, weigh=True)
    wanted = mean(mu if level == "token" else p, p, weigh=False)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    assert not torch.allclose(mean(mu, mu, weigh=False), wanted, atol=1e-2)
