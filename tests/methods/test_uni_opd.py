"""Uni-OPD: gaps and shifts against the oracle, the mask, the seeded balance, metrics, what is refused."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from support.models import rollout_of, tiny

from opd import methods
from opd.errors import ConfigError
from opd.loss.collate import collate
from opd.maths import margins as order
from opd.methods.coherence import Facts, check_coherence
from opd.methods.combine import conflict
from opd.pieces import filters, margins
from opd.pieces.needs import Input, Trait
from opd.types import Batch, Prompt, Rollout, Scores

LM = tiny()
SIDES = ("both", "correct_up", "incorrect_down")


def drawn(rng: random.Random, n: int) -> tuple[list[float], list[bool]]:
    """Scores and outcomes, with at least one of each outcome."""
    right = [True, False, *(rng.random() < 0.5 for _ in range(n - 2))]
    return [rng.gauss(0, 1) for _ in right], right


def response(prompt: int, sample: int, reward: float | None, ratios: Sequence[float], **columns: Any) -> Rollout:
    """A response of which the student gives every token log-prob 0 less the ratio: see `batch`."""
    ids = [4] * len(ratios)
    logp = -torch.tensor(ratios)
    made = rollout_of(
        LM, Prompt(id=prompt, content="ab"), ids, sample=sample, reward=reward, policy_logp=logp, sampler_logp=logp
    )
    return replace(made, **columns)


def batch(*rollouts: Rollout) -> Batch:
    """The teacher's log-probs are 0, so log q - log p is what the responses were made with."""
    return collate(rollouts, [Scores(teacher_logp=torch.zeros(len(r.response_ids))) for r in rollouts], LM.device)


def split(scores: Sequence[float], right: Sequence[bool]) -> tuple[list[float], list[float]]:
    pairs = list(zip(scores, right, strict=True))
    return [g for g, passed in pairs if passed], [g for g, passed in pairs if not passed]


# --- the margin ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["mean", "minmax"])
@pytest.mark.parametrize("side", SIDES)
def test_shift_makes_gap_equal_delta(statistic: Any, side: Any):
    rng = random.Random(0)
    for _ in range(50):
        scores, right = drawn(rng, rng.randint(2, 8))
        ups, downs = split(scores, right)
        gap = order.gap(ups, downs, statistic)
        assert gap == pytest.approx(oracle.order_gap(ups, downs, statistic))
        up, down = order.shares(order.shift(gap, 0.4), side)
        assert order.gap([g + up for g in ups], [g + down for g in downs], statistic) == pytest.approx(max(gap, 0.4))
        expected = oracle.order_shifts(scores, right, 0.4, statistic, side)
        assert [up if passed else down for passed in right] == pytest.approx(expected)


def test_mean_shift_leaves_pairs_disordered():
    right, wrong = [1.0, -1.0], [0.5, -0.5]
    up, down = order.shares(order.shift(order.gap(right, wrong, "mean"), 0.4), "both")
    assert order.gap([g + up for g in right], [g + down for g in wrong], "minmax") == pytest.approx(-1.1)


@pytest.mark.parametrize("statistic", ["mean", "minmax"])
@pytest.mark.parametrize("keep", [0.0, 0.25, 0.6, 1.0])
def test_left_out_equals_oracle(statistic: Any, keep: float):
    rng = random.Random(1)
    some = 0
    for _ in range(60):
        scores, right = drawn(rng, rng.randint(2, 9))
        places = [i for i, passed in enumerate(right) if passed], [i for i, passed in enumerate(right) if not passed]
        ups, downs = split(scores, right)
        got = order.left_out(ups, downs, statistic, 1.0, keep)
        rows = {places[0][i] for i in got[0]} | {places[1][i] for i in got[1]}
        out = oracle.order_left_out(scores, right, 1.0, keep, statistic)
        assert rows == {i for i, one in enumerate(out) if one}
        some += bool(rows)
    assert (some > 20) == (keep < 1.0)


def test_left_out_keeps_share_of_each_class():
    assert order.left_out([-9.0, -8.0, -7.0, -6.0], [5.0], "minmax", 1.0, 0.5) == ({0, 1}, set())
    assert order.left_out([-9.0], [5.0, 4.0, 3.0, 2.0], "minmax", 1.0, 0.25) == (set(), {0, 1, 2})


# --- the credit ------------------------------------------------------------------------------------------------------


def test_shifted_adds_same_number_to_every_token():
    right, wrong = response(0, 0, 1.0, [-1.0, -3.0]), response(0, 1, 0.0, [0.0, 0.5, -0.5, 0.0])
    alone = response(1, 0, 1.0, [0.3])
    got = margins.shifted(margins.Margin(delta=0.4))(batch(right, wrong, alone))
    lacking = 0.4 - (-2.0 - 0.0)
    assert got[0, :2].tolist() == pytest.approx([-1.0 + lacking / 2, -3.0 + lacking / 2])
    assert got[1].tolist() == pytest.approx([r - lacking / 2 for r in (0.0, 0.5, -0.5, 0.0)])
    assert got[2, :1].tolist() == pytest.approx([0.3])  # a group of right responses alone stays
    assert got[0, 2:].tolist() == [0.0, 0.0]


def test_shifted_reads_trained_tokens_of_judged_rows():
    right = response(0, 0, 0.7, [1.0, 9.0], trained=torch.tensor([True, False]))
    wrong, unjudged = response(0, 1, 0.2, [2.0]), response(0, 2, None, [5.0], unjudged="no answer")
    out = response(0, 3, 0.0, [50.0], trained=torch.tensor([False]))
    got = margins.shifted(margins.Margin(delta=0.0, passes=0.5), "correct_up")(batch(right, wrong, unjudged, out))
    assert got[:, 0].tolist() == pytest.approx([2.0, 2.0, 5.0, 0.0])


def test_in_order_weighs_left_out_rows_zero():
    rows = [response(0, i, r, [g, g]) for i, (r, g) in enumerate([(1.0, 3.0), (1.0, -3.0), (0.0, 0.0), (0.0, 1.0)])]
    weight = margins.in_order(margins.Margin(gap="minmax", delta=1.5))(batch(*rows))
    assert weight[:, 0].tolist() == [1.0, 0.0, 1.0, 1.0]
    weight = margins.in_order(margins.Margin(gap="minmax", delta=2.5))(batch(*rows))
    assert weight[:, 0].tolist() == [1.0, 0.0, 1.0, 0.0]


def test_near_teacher_weighs_far_tokens_zero():
    weight = margins.near_teacher(10.0)(batch(response(0, 0, 1.0, [9.9, -10.0, 10.0, -9.9])))
    assert weight.tolist() == [[1.0, 0.0, 0.0, 1.0]]


# --- the balance -----------------------------------------------------------------------------------------------------


def group(rewards: Sequence[float | None], prompt: int = 3, step: int = 0) -> list[Rollout]:
    return [response(prompt, i, r, [0.0, 0.0], sampler_version=step) for i, r in enumerate(rewards)]


def kept(rollouts: Sequence[Rollout]) -> list[int]:
    return [r.sample for r in rollouts if bool(r.trained.any())]


@pytest.mark.parametrize(
    ("rewards", "ratio", "right", "wrong"),
    [
        ([1.0] * 5 + [0.0] * 2, 1.0, 2, 2),
        ([1.0] + [0.0] * 6, 1.0, 1, 1),
        ([1.0] * 6 + [0.0] * 2, 2.0, 4, 2),
        ([1.0] * 2 + [0.0] * 6, 0.5, 2, 4),
        ([1.0] * 3 + [0.0] * 3, 0.2, 1, 3),
        ([1.0] * 4, 1.0, 4, 0),
        ([0.0] * 4, 1.0, 0, 4),
    ],
)
def test_balanced_trains_classes_in_ratio(rewards: list[float], ratio: float, right: int, wrong: int):
    left = kept(filters.balanced(ratio)(group(rewards)))
    assert [sum(rewards[i] == value for i in left) for value in (1.0, 0.0)] == [right, wrong]


def test_balanced_choice_depends_on_seed_step_and_prompt():
    rewards = [1.0] * 12 + [0.0]
    first = kept(filters.balanced()(group(rewards)))
    assert kept(filters.balanced()(group(rewards)[::-1]))[::-1] == first
    assert kept(filters.balanced()(group([0.0] * 3, prompt=9) + group(rewards)))[3:] == first
    others = {
        *(kept(filters.balanced(seed=i)(group(rewards)))[0] for i in range(1, 9)),
        *(kept(filters.balanced()(group(rewards, step=i)))[0] for i in range(1, 9)),
        *(kept(filters.balanced()(group(rewards, prompt=i)))[0] for i in range(10, 18)),
    }
    assert len(others) > 5


def test_balanced_trains_response_without_reward():
    left = kept(filters.balanced()(group([1.0, 1.0, None, 0.0])))
    assert 2 in left
    assert len(left) == 3
    assert kept(filters.balanced(passes=0.5)(group([0.6, 0.5, 0.4, None]))) in ([0, 2, 3], [1, 2, 3])


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_order_metrics_are_equal_over_processes():
    rows = [
        *(response(0, i, r, [g]) for i, (r, g) in enumerate([(1.0, -1.0), (0.0, 11.0)])),
        *(response(1, i, r, [g]) for i, (r, g) in enumerate([(1.0, 1.0), (0.0, 0.0)])),
        response(2, 0, 1.0, [0.0]),
        response(2, 1, None, [0.0], trained=torch.tensor([False])),
    ]
    made = margins.ordered(margins.Margin(delta=0.4), 10.0)()
    whole = made.observe(batch(*rows), lambda value: [value])
    assert whole == pytest.approx(
        {
            "margin/mixed_share": 2 / 3,
            "margin/gap": (-12.0 + 1.0) / 2,
            "margin/short_share": 0.5,
            "margin/shifted_share": 2 / 6,
            "margin/far_share": 1 / 5,
            "margin/balanced_out": 1.0,
            "margin/unjudged": 1.0,
        }
    )
    parts: list[Any] = []
    made.observe(batch(*rows[:2]), lambda value: parts.append(value) or [value])
    assert made.observe(batch(*rows[2:]), lambda value: [*parts, value]) == pytest.approx(whole)


def test_order_metrics_have_no_gap_without_mixed_group():
    found = margins.ordered(margins.Margin(), None)().observe(batch(response(0, 0, 1.0, [0.0])), lambda value: [value])
    assert "margin/gap" not in found
    assert found["margin/shifted_share"] == 0.0


# --- the method ------------------------------------------------------------------------------------------------------


def test_uni_opd_refuses_mean_per_token_with_shift():
    with pytest.raises(ConfigError, match=r"500 tokens would be pushed 100 times.*Set average: sequence"):
        check_coherence(Facts(method=methods.build("uni_opd", {"average": "token"})), "Stage 'x'")
    for options in ({}, {"average": "token", "margin": "mask"}, {"average": "token", "margin": "none"}):
        check_coherence(Facts(method=methods.build("uni_opd", options)), "Stage 'x'")


@pytest.mark.parametrize(("average", "ratio"), [("token", 100.0), ("sequence", 1.0)])
def test_shift_pushes_long_responses_under_mean_per_token(average: str, ratio: float):
    """The sum over a response of share times shift: what the rule refuses, in numbers."""
    made = batch(response(0, 0, 1.0, [0.0] * 5), response(0, 1, 0.0, [0.0] * 500))
    shift = margins.shifted(margins.Margin(delta=0.4))(made)
    share = methods.build("uni_opd", {"average": average}).normalise(made).share
    pushed = (shift * share).sum(1).tolist()
    assert -pushed[1] / pushed[0] == pytest.approx(ratio)


def test_uni_opd_declares_reward_group_and_teacher():
    needs = methods.build("uni_opd", {}).needs
    assert {Input.REWARD, Input.GROUP, Input.TEACHER_MODEL} <= needs.inputs
    assert Trait.FILTERS not in needs.traits  # the balance leaves a response of every prompt
    assert "trust in the teacher" in str(
        conflict(methods.build("uni_opd", {}), methods.build("prune_opd", {"loss": "sampled", "stop": "none"}))
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": -0.1}, r"`delta`.*at least 0"),
        ({"balance": 0.0}, r"balance.*above 0"),
        ({"balance_seed": -1}, r"seed of the balance"),
        ({"bound": 0.0}, r"`bound`.*above 0"),
        ({"margin": "mask", "keep": 1.5}, r"`keep` is a share"),
        ({"side": "up"}, r"option `side`"),
    ],
)
def test_uni_opd_refuses_options_without_meaning(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        methods.build("uni_opd", options)


def test_margin_refuses_threshold_that_is_not_finite():
    with pytest.raises(ConfigError, match="`passes`"):
        margins.Margin(passes=math.nan)
