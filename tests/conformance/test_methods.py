"""One set of claims, held by every method: through the library's own path, against the oracle, on models made here.

A method that is added to `METHODS` gets a row in `CASES`: its options, and its formula from the oracle.
"""

from __future__ import annotations

import copy
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import oracle
import pytest
import torch
from support.models import (
    LETTERS,
    Gradient,
    batch_of,
    bigram,
    double,
    full_logits,
    gradient_of,
    prompts_of,
    rollout_of,
    step,
    teacher_of,
    tiny,
    write,
)
from torch import Tensor

import opd.loss.token_loss
import opd.models.head
from opd import methods
from opd.api import distill
from opd.commands.check import check_recipe
from opd.errors import ConfigError
from opd.loss.collate import attach
from opd.maths import divergences
from opd.method import Method
from opd.methods import METHODS
from opd.models.forward import ResponseStates, response_states
from opd.models.language_model import LanguageModel, frozen_copy
from opd.models.render import render
from opd.parallel import ALONE
from opd.recipe.load import load_recipe
from opd.recipe.schema import OptimizerSection
from opd.rewards.base import StageRewards
from opd.samplers.hf import TransformersSampler
from opd.stage import optimisers
from opd.stage.optimisation import StageOptimisation
from opd.teachers.local import LocalTeacher
from opd.teachers.mixed import MixedTeacher, mixed_teacher
from opd.teachers.with_base import WithBase
from opd.types import Batch, Prompt, Rollout, Sampling, ScoreRequest, Teacher

pytestmark = pytest.mark.filterwarnings("ignore:form='raw' is biased")

ROUNDING = 2e-5  # a float32 step against the same in float64
SPLIT = 1e-6  # two orders of the same sums
FIXED = 5e-6
SAMPLING = Sampling(max_completion_length=6, n=3, top_p=0.7)
PROMPTS = [
    Prompt(id=0, content="a", answer="c", response="bcd", privileged_context="hh"),
    Prompt(id=7, content="bcdfa", answer="d", response="a", privileged_context="g"),
    Prompt(id=3, content="hg", answer="ef", response="abcdefghab", privileged_context="abc"),
]


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """What a paper's formula may look at: logits z/temperature of both models [V], and numbers of the token."""

    student: list[float]
    teacher: list[float]  # of several, the mean that the method compares with; in turn, the first
    token: int
    sampler_logp: float
    advantage: float
    teachers: list[list[float]] = field(default_factory=list[list[float]])  # all of them, if there are several
    base: list[float] = field(default_factory=list[float])  # of a method of three models

    @property
    def student_logp(self) -> float:
        return oracle.log_softmax(self.student)[self.token]

    @property
    def log_ratio(self) -> float:
        """log q(y) - log p(y)."""
        return oracle.log_softmax(self.teacher)[self.token] - self.student_logp

    def along_token(self, slope: float) -> list[float]:
        """d/dz of a function of log p(y) alone, whose derivative there is `slope`."""
        return [slope * ((j == self.token) - p) for j, p in enumerate(oracle.softmax(self.student))]


Loss = Callable[[Position], float]
Slope = Callable[[Position], list[float]]
# Of all responses of a step and their positions: an advantage per token.
Credit = Callable[[Sequence[Rollout], Sequence[Sequence[Position]]], list[list[float]]]
Weigh = Callable[[Sequence[Position], Sequence[bool]], list[float]]  # of a response's tokens, and which are trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One setting of a method: its loss at one position and dloss/dz in plain Python, and its denominator."""

    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    loss: Loss
    slope: Slope
    average: Literal["token", "sequence"] | int = "sequence"  # a number: Dr.GRPO's constant length
    fixed_point: bool = True  # no gradient where student and teacher are the same distribution
    learns: bool = True  # the exact KL falls in the tiny run below
    gamma: float | None = None  # the advantage is the discounted log-ratio, not the group's reward
    across_turns: bool = True  # the sum of log-ratios goes on over untrained tokens
    early: float | None = None  # the advantage is the log-ratio times a weight of early tokens
    epsilon: float = 1e-4  # added to the std of a group's rewards
    scale: bool = True  # the group's reward is divided by its std (but with a constant length)
    weigh: Weigh | None = None  # None: every token weighs 1
    parts: Mapping[str, tuple[Case, float]] = field(default_factory=dict[str, Any])  # with its factor
    credit: Credit | None = None  # None: the advantage is the group's reward


def nll() -> tuple[Loss, Slope]:
    return (lambda at: -at.student_logp), (lambda at: at.along_token(-1.0))


def clipped(low: float, high: float, dual: float | None = None) -> tuple[Loss, Slope]:
    def both(at: Position) -> tuple[float, float]:
        return oracle.policy_gradient(at.student_logp, at.sampler_logp, at.advantage, clip=(low, high), dual=dual)

    return (lambda at: both(at)[0]), (lambda at: at.along_token(both(at)[1]))


def sampled_log_ratio(importance: bool) -> tuple[Loss, Slope]:
    if importance:

        def both(at: Position) -> tuple[float, float]:
            return oracle.policy_gradient(at.student_logp, at.sampler_logp, at.log_ratio)

        return (lambda at: both(at)[0]), (lambda at: at.along_token(both(at)[1]))
    return (
        lambda at: -at.log_ratio * at.student_logp,
        lambda at: oracle.grad_sampled_policy_gradient(at.student, at.teacher, at.token),
    )


def away(strength: float = 0.5, shape: str = "jsd") -> tuple[Loss, Slope]:
    """The clipped policy gradient of the reward's advantage less the bounded log-ratio of a self that read more."""

    def both(at: Position) -> tuple[float, float]:
        advantage = oracle.anti_advantage(at.log_ratio, at.advantage, strength, shape)
        return oracle.policy_gradient(at.student_logp, at.sampler_logp, advantage, clip=(0.2, 0.2))

    return (lambda at: both(at)[0]), (lambda at: at.along_token(both(at)[1]))


def beyond(strength: float, clip: str = "teacher/student", bound: float = 5.0) -> tuple[Loss, Slope]:
    """The log-ratio of three models, weighed by a cut ratio."""

    def slope(at: Position) -> float:
        log_b = oracle.log_softmax(at.base)[at.token]
        log_q = at.log_ratio + at.student_logp
        weight = {
            "teacher/student": min(bound, math.exp(at.log_ratio)),
            "student/sampler": min(bound, math.exp(at.student_logp - at.sampler_logp)),
            "none": 1.0,
        }
        return -weight[clip] * oracle.extrapolated_advantage(at.student_logp, log_q, log_b, strength)

    return (lambda at: slope(at) * at.student_logp), (lambda at: at.along_token(slope(at)))


def bounded(least: float = 0.2, most: float = 5.0, reward: float = 0.0) -> tuple[Loss, Slope]:
    """MOPD: the log-ratio and the group's reward, with an importance weight that is 0 outside two bounds."""

    def both(at: Position) -> tuple[float, float]:
        advantage = at.log_ratio + reward * at.advantage
        return oracle.within_bounds(at.student_logp, at.sampler_logp, advantage, least, most)

    return (lambda at: both(at)[0]), (lambda at: at.along_token(both(at)[1]))


def standardised(alpha: float = 0.2, clip: float = 0.2, **rest: Any) -> Case:
    """TOP-D."""

    def credit(rollouts: Sequence[Rollout], positions: Sequence[Sequence[Position]]) -> list[list[float]]:
        out = [[0.0] * len(row) for row in positions]
        for group in dict.fromkeys(rollout.prompt.id for rollout in rollouts):
            kept = [
                (i, [t for t, counts in enumerate(rollout.trained.tolist()) if counts])
                for i, rollout in enumerate(rollouts)
                if rollout.prompt.id == group
            ]
            ratios = [[positions[i][t].log_ratio for t in places] for i, places in kept]
            for (i, places), row in zip(kept, oracle.proximal([ratios], alpha)[0], strict=True):
                for t, value in zip(places, row, strict=True):
                    out[i][t] = value
        return out

    settings = {"alpha": alpha, "clip": clip, **rest.pop("options", {})}
    return case(clipped(clip, clip), settings, credit=credit, **{"average": "token", "learns": False, **rest})


def by_turn(reward: float = 1.0, strength: float = 1.0, bound: float = 0.2, batch: bool = False, **rest: Any) -> Case:
    """SOD."""

    def credit(rollouts: Sequence[Rollout], positions: Sequence[Sequence[Position]]) -> list[list[float]]:
        out = [[reward * a] * len(row) for a, row in zip(advantages(rollouts, True, 1e-6), positions, strict=True)]
        turns = [runs(rollout.trained.tolist()) for rollout in rollouts]
        apart = [
            [sum(abs(row[t].log_ratio) for t in turn) / len(turn) for turn in own]
            for row, own in zip(positions, turns, strict=True)
        ]
        firsts = [d[0] for d in apart if d]
        for i, (own, d) in enumerate(zip(turns, apart, strict=True)):
            reference = sum(firsts) / len(firsts) if batch else None
            for turn, w in zip(own, oracle.turn_weights(d, 1e-6, bound, reference) if d else [], strict=True):
                for t in turn:
                    out[i][t] += strength * w * positions[i][t].log_ratio
        return out

    settings = {"reward": reward, "strength": strength, "bound": bound, "reference": "batch" if batch else "first"}
    settings |= rest.pop("options", {})
    rest = {"average": "token", "learns": False, "fixed_point": reward == 0.0, **rest}
    return case(clipped(0.2, 0.28), settings, credit=credit, **rest)


def runs(trained: Sequence[bool]) -> list[list[int]]:
    """The places of each run of trained tokens."""
    out: list[list[int]] = []
    for t, own in enumerate(trained):
        if own and (t == 0 or not trained[t - 1]):
            out.append([])
        if own:
            out[-1].append(t)
    return out


def coupled() -> tuple[Loss, Slope]:
    """The policy gradient with an advantage from phase A."""
    return (lambda at: -at.advantage * at.student_logp), (lambda at: at.along_token(-at.advantage))


def centred(k: int | None = None, optimal: bool = False, reward: bool = False) -> tuple[Loss, Slope]:
    """The sampled log-ratio less a baseline; k=None is the whole vocabulary."""

    def advantage(at: Position) -> float:
        support = list(range(len(at.student))) if k is None else listed(at, k, "student")
        if optimal:
            return at.log_ratio - oracle.optimal_baseline(at.student, at.teacher)
        task = at.advantage if reward else 0.0
        return at.log_ratio - oracle.value_baseline(at.student, at.teacher, support) + task

    return (lambda at: -advantage(at) * at.student_logp), (lambda at: at.along_token(-advantage(at)))


def ranked() -> tuple[Loss, Slope]:
    """Sorted probabilities."""
    return (
        lambda at: oracle.rank_distance(oracle.softmax(at.student), oracle.softmax(at.teacher)),
        lambda at: oracle.grad_rank_distance(at.student, at.teacher),
    )


VALUES: dict[str, tuple[oracle.Divergence, oracle.Slope]] = {
    "reverse_kl": (oracle.reverse_kl, oracle.reverse_kl_slope),
    "forward_kl": (oracle.forward_kl, oracle.forward_kl_slope),
    "generalised_jsd": (oracle.generalised_jsd, oracle.generalised_jsd_slope),
    "skew_kl": (oracle.skew_kl, oracle.skew_kl_slope),
}


def top(logits: Sequence[float], k: int) -> set[int]:
    return set(sorted(range(len(logits)), key=lambda v: -logits[v])[:k])


SETS: dict[str, Callable[[set[int], set[int]], set[int]]] = {
    "teacher": lambda student, teacher: teacher,
    "student": lambda student, teacher: student,
    "intersection": lambda student, teacher: student & teacher,
    "union": lambda student, teacher: student | teacher,
    "symmetric_difference": lambda student, teacher: student ^ teacher,
}


def listed(at: Position, k: int, by: str) -> list[int]:
    return sorted(SETS[by](top(at.student, k), top(at.teacher, k)))


def compared(
    divergence: str,
    *,
    k: int | None = None,
    by: str = "teacher",
    form: str = "tail",
    with_sampled: bool = False,
    **settings: float,
) -> tuple[Loss, Slope]:
    """A divergence on a support; k=None is the whole vocabulary."""
    value, slope = (partial(function, **settings) for function in VALUES[divergence])

    def support(at: Position) -> list[int]:
        if k is None:
            return list(range(len(at.student)))
        chosen = listed(at, k, by)
        return sorted({*chosen, at.token} if with_sampled else chosen)

    def loss(at: Position) -> float:
        s, t = oracle.log_softmax(at.student), oracle.log_softmax(at.teacher)
        ids = support(at)
        if k is None or not ids:
            return value([s[v] for v in ids], [t[v] for v in ids])
        return oracle.FORMS[form](value, [s[v] for v in ids], [t[v] for v in ids])

    def gradient(at: Position) -> list[float]:
        ids = support(at)
        return oracle.grad_on_support(slope, form, at.student, at.teacher, ids) if ids else [0.0] * len(at.student)

    return loss, gradient


def bounded_entries(divergence: str, most: float, **settings: float) -> tuple[Loss, Slope]:
    """A divergence on the whole vocabulary, of which each entry adds at most `most`."""
    value, slope = (partial(function, **settings) for function in VALUES[divergence])
    cut, cut_slope = oracle.clipped(value, most), oracle.clipped_slope(value, slope, most)
    return (
        lambda at: cut(oracle.log_softmax(at.student), oracle.log_softmax(at.teacher)),
        lambda at: oracle.grad_on_support(cut_slope, "raw", at.student, at.teacher, range(len(at.student))),
    )


def in_turn(beta: float) -> tuple[Loss, Slope]:
    """The JSD with each of several teachers of equal weights."""
    value, slope = (partial(function, beta=beta) for function in VALUES["generalised_jsd"])

    def weights(at: Position) -> list[float]:
        return [1 / len(at.teachers)] * len(at.teachers)

    return (
        lambda at: oracle.mixed_loss(value, at.student, at.teachers, weights(at)),
        lambda at: oracle.grad_mixed_loss(slope, at.student, at.teachers, weights(at)),
    )


def released(k: int, by: str, weights: str = "student", normalised: bool = True) -> tuple[Loss, Slope]:
    """What the released code of Rethinking computes."""

    def loss(at: Position) -> float:
        s, t = oracle.log_softmax(at.student), oracle.log_softmax(at.teacher)
        ids = listed(at, k, by)
        return oracle.support_policy_gradient([s[v] for v in ids], [t[v] for v in ids], weights, normalised)

    def gradient(at: Position) -> list[float]:
        return oracle.grad_support_policy_gradient(at.student, at.teacher, listed(at, k, by), weights, normalised)

    return loss, gradient


def sampled_tail(k: int, by: str, bounds: tuple[float, float] = (0.0, math.inf)) -> tuple[Loss, Slope]:
    """EMA-PG of Revisiting."""
    return (
        lambda at: oracle.ema_pg(at.student, at.teacher, listed(at, k, by), at.token, at.sampler_logp, bounds),
        lambda at: oracle.grad_ema_pg(at.student, at.teacher, listed(at, k, by), at.token, at.sampler_logp, bounds),
    )


def weighed_ratio(k: int, weights: str) -> tuple[Loss, Slope]:
    """The released teacher-context losses of BRTS."""
    by = "teacher" if weights == "teacher" else "student"
    return (
        lambda at: oracle.weighed_log_ratio(at.student, at.teacher, listed(at, k, by), weights),
        lambda at: oracle.grad_weighed_log_ratio(at.student, at.teacher, listed(at, k, by), weights),
    )


def best_of(teachers: tuple[Loss, Slope], own: tuple[Loss, Slope], options: Mapping[str, Any], **rest: Any) -> Case:
    """BRTS: the mean over the student's tokens, and the weighed mean over the tokens of the teacher's rows."""
    settings = {"k": 3, "n": 2, "weight": 2.5, "hinted": 0, **options}
    parts = {"teacher": (case(teachers, average="token"), settings["weight"])}
    return case(own, settings, **{"average": "token", "parts": parts, "learns": False, **rest})


def taught(clip: tuple[float, float], beta: float, **options: Any) -> Case:
    """CoPD in phase II: GRPO on own prompts, and the clipped log-ratio to a peer on the peer's."""

    def both(at: Position) -> tuple[float, float]:
        return oracle.policy_gradient(at.student_logp, at.sampler_logp, at.log_ratio, clip=clip)

    ratio = (lambda at: both(at)[0]), (lambda at: at.along_token(both(at)[1]))
    settings = {"alone": 0, "together": 1, "beta": beta, **options}
    return case(clipped(*clip), settings, parts={"taught": (case(ratio), beta)}, fixed_point=False, learns=False)


def case(formula: tuple[Loss, Slope], options: Mapping[str, Any] | None = None, **rest: Any) -> Case:
    return Case(loss=formula[0], slope=formula[1], options=options or {}, **rest)


def topk(fixed_point: bool = True, learns: bool = False, **changed: Any) -> Case:
    options = {"by": "teacher", "form": "tail", **changed}
    return case(compared("reverse_kl", **options), options, fixed_point=fixed_point, learns=learns)


def rethinking(k: int = 4, by: str = "student", learns: bool = False, **options: Any) -> Case:
    """The paper's form, or the released one when the options say so."""
    settings = {"k": k, "by": by, **options}
    if options.pop("form", "paper") == "paper":
        formula = compared("reverse_kl", k=k, by=by, form="renormalised")
    else:
        formula = released(k, by, **{"normalised": by != "symmetric_difference", **options})
    return case(formula, settings, average="token", learns=learns)


def matching(formula: tuple[Loss, Slope], options: Mapping[str, Any], **rest: Any) -> Case:
    return case(formula, options, **{"average": "token", "learns": False, **rest})


def drifting(k: int, threshold: float, drop: float, base: float, metric: str = "overlap") -> Weigh:
    """The weights of Prune-OPD."""

    def weigh(positions: Sequence[Position], trained: Sequence[bool]) -> list[float]:
        lost: list[bool] = []
        for at, counts in zip(positions, trained, strict=True):
            s, t = oracle.log_softmax(at.student), oracle.log_softmax(at.teacher)
            if metric == "overlap":
                lost.append(counts and oracle.overlap_ratio(s, t, k) < threshold)
            else:
                lost.append(counts and not oracle.top_p_accepts(t, at.token, k, threshold))
        return [trust + base for trust in oracle.trust(lost, drop)]

    return weigh


def sure(positions: Sequence[Position], trained: Sequence[bool]) -> list[float]:
    """GUI-SD's weight: 1 - H(q) / log V."""
    return [1.0 - oracle.entropy(oracle.log_softmax(at.teacher)) / math.log(len(at.teacher)) for at in positions]


def pruned(learns: bool = False, k: int = 4, average: Any = "token", **options: Any) -> Case:
    """Prune-OPD: the released form of Rethinking on the student's k, weighed by drift. A response has 6 tokens."""
    settings = {"threshold": 0.9, "drop": 0.2, "base": 0.3, **options}
    weigh = drifting(
        k, **{name: settings[name] for name in ("threshold", "drop", "base", "metric") if name in settings}
    )
    ends = {"stop": "none"} if "stop" not in settings else {}
    options = {"k": k, "average": average, **ends, **settings}
    formula = sampled_log_ratio(False) if options.get("loss") == "sampled" else released(k, "student")
    return case(formula, options, average=average, learns=learns, weigh=weigh)


SHORT = {"budget": 4, "budget_min": 3, "budget_max": 6, "budget_step": 1, "margin": 1}  # of responses of up to 6 tokens


def in_order(delta: float, passes: float, statistic: str, side: str | None, keep: float, bound: float) -> Credit:
    """Uni-OPD's advantages; `side` None: the mask in place of the shift. Left out is an advantage of 0."""

    def credit(rollouts: Sequence[Rollout], positions: Sequence[Sequence[Position]]) -> list[list[float]]:
        out = [[at.log_ratio if abs(at.log_ratio) < bound else 0.0 for at in row] for row in positions]
        groups: dict[int, list[int]] = {}
        for i, rollout in enumerate(rollouts):
            if bool(rollout.trained.any()):
                groups.setdefault(rollout.prompt.id, []).append(i)
        for rows in groups.values():
            ratios = [
                [at.log_ratio for at, counts in zip(positions[i], rollouts[i].trained.tolist(), strict=True) if counts]
                for i in rows
            ]
            scores = [math.fsum(one) / len(one) for one in ratios]
            right = [float(rollouts[i].reward or 0.0) >= passes for i in rows]
            if side is None:
                left_out = oracle.order_left_out(scores, right, delta, keep, statistic)
                out = [[0.0] * len(row) if i in rows and left_out[rows.index(i)] else row for i, row in enumerate(out)]
                continue
            for i, shift in zip(rows, oracle.order_shifts(scores, right, delta, statistic, side), strict=True):
                out[i] = [
                    a + shift if abs(at.log_ratio) < bound else 0.0 for a, at in zip(out[i], positions[i], strict=True)
                ]
        return out

    return credit


def ordered(**options: Any) -> Case:
    """Uni-OPD on groups of three, of which a reward of .5 is right; everything is trained unless `balance` is given."""
    settings: dict[str, Any] = {"passes": 0.5, "balance": None, "delta": 0.4, "gap": "mean", "side": "both", **options}
    masks, plain = settings.get("margin") == "mask", settings.get("margin") == "none"
    credit = in_order(
        0.0 if plain else settings["delta"],
        -1.0 if plain else settings["passes"],
        settings["gap"],
        None if masks else settings["side"],
        settings.get("keep", 0.25),
        settings.get("bound", 10.0),
    )
    formula = clipped(settings.get("clip_low", 0.2), settings.get("clip_high", 0.28))
    average = settings.get("average", "sequence")
    return case(formula, settings, credit=credit, average=average, fixed_point=plain or masks, learns=plain)


def sized(k: int = 4, share: float = 0.5, bound: float = 0.2, **options: Any) -> Case:
    """VISD in its first step, in which l is `share`."""

    def both(at: Position) -> tuple[float, float]:
        advantage = oracle.sized_advantage(at.student, at.teacher, k, at.token, at.advantage, share, bound)
        return oracle.policy_gradient(at.student_logp, at.sampler_logp, advantage, clip=(0.2, 0.2))

    formula: tuple[Loss, Slope] = (lambda at: both(at)[0]), (lambda at: at.along_token(both(at)[1]))
    settings = {"k": k, "share": share, "bound": bound, "hint": "privileged_context", "template": HINT, **options}
    average = options.get("average", "sequence")
    return case(formula, settings, average=average, fixed_point=False, learns=False)


HINT = "{privileged_context}{prompt}"
ALL_TOKENS = {"template": HINT, "k": None}
CASES: dict[str, list[Case]] = {
    "sft": [
        case(nll(), average="token", fixed_point=False, learns=False),
        case(nll(), {"source": "teacher"}, average="token", fixed_point=False),
        case(nll(), {"keep": "clean"}, average="token", fixed_point=False, learns=False),
    ],
    "grpo": [
        case(clipped(0.2, 0.2), fixed_point=False, learns=False),
        case(clipped(0.1, 0.3), {"clip_low": 0.1, "clip_high": 0.3}, fixed_point=False, learns=False),
        case(
            clipped(0.2, 5.0, dual=1.05),
            {"clip_high": 5.0, "dual_clip": 1.05, "epsilon": 0.3},
            fixed_point=False,
            learns=False,
            epsilon=0.3,
        ),
        case(clipped(0.2, 0.2), {"variant": "dr_grpo", "length": 5}, average=5, fixed_point=False, learns=False),
    ],
    "opd": [
        case(sampled_log_ratio(False)),
        case(sampled_log_ratio(False), {"average": "token", "temperature": 2.0}, average="token", learns=False),
        case(sampled_log_ratio(True), {"importance": True}, learns=False),
        case(coupled(), {"gamma": 0.6}, gamma=0.6, learns=False),
        case(coupled(), {"gamma": 1.0, "average": "token"}, average="token", gamma=1.0, learns=False),
        case(coupled(), {"gamma": 0.6, "across_turns": False}, gamma=0.6, across_turns=False, learns=False),
        case(sampled_log_ratio(False), {"mask_tokens": ["a", "d"], "mask": "every"}, learns=False),
    ],
    "gkd": [
        case(compared("generalised_jsd", beta=0.5)),
        case(compared("forward_kl"), {"beta": 0.0, "temperature": 0.5}, learns=False),
        case(compared("reverse_kl"), {"beta": 1.0}, learns=False),
        case(compared("generalised_jsd", beta=0.1), {"beta": 0.1, "on_policy_share": 0.0}, learns=False),
    ],
    "reverse_kl": [
        case(compared("reverse_kl")),
        case(compared("reverse_kl"), {"average": "token", "temperature": 0.7}, average="token", learns=False),
    ],
    "forward_kl": [
        case(compared("forward_kl"), average="token"),
        case(
            compared("forward_kl"),
            {"source": "student", "average": "sequence", "temperature": 0.7},
            learns=False,
        ),
        case(compared("forward_kl"), {"source": "dataset"}, average="token", learns=False),
    ],
    "topk_reverse_kl": [
        topk(k=5, learns=True),
        topk(k=3, form="stop_gradient"),
        topk(k=3, form="renormalised"),
        topk(k=3, form="raw", fixed_point=False),
        topk(k=3, by="student"),  # what it learns depends on what the student already likes
        topk(k=3, by="student", with_sampled=True, form="stop_gradient"),
        topk(k=3, by="intersection", form="renormalised"),
        topk(k=3, by="union"),
        topk(k=3, by="symmetric_difference"),
        topk(k=2, by="symmetric_difference", with_sampled=True, form="raw", fixed_point=False),
        case(compared("reverse_kl", k=4, by="intersection", form="renormalised"), {"k": 4}, learns=False),
    ],
    "topk_forward_kl": [
        case(compared("forward_kl", k=5), {"k": 5}, average="token"),
        *(
            case(compared("forward_kl", k=3, form=form), {"k": 3, "form": form}, average="token", learns=False, **rest)
            for form, rest in {"raw": {"fixed_point": False}, "stop_gradient": {}, "renormalised": {}}.items()
        ),
        case(compared("forward_kl", k=3), {"k": 3, "average": "sequence", "temperature": 0.7}, learns=False),
    ],
    "rethinking_opd": [
        rethinking(),
        rethinking(by="intersection"),
        rethinking(by="symmetric_difference"),
        rethinking(k=5, by="union", form="released", learns=True),
        rethinking(form="released"),
        rethinking(k=1, form="released"),
        rethinking(by="teacher", form="released", weights="teacher"),
        rethinking(by="intersection", form="released", weights="none"),
        rethinking(by="symmetric_difference", form="released"),
        rethinking(by="symmetric_difference", form="released", normalised=True),
        rethinking(by="union", form="released", weights="teacher", normalised=False),
    ],
    "local_support_matching": [
        matching(compared("reverse_kl", k=9, form="renormalised"), {"k": 9}, learns=True),
        matching(compared("reverse_kl", k=3, form="renormalised"), {"k": 3, "average": "sequence"}, average="sequence"),
        matching(compared("reverse_kl", k=3, form="renormalised"), {"k": 3, "mask_tokens": ["a", "bc", [5]]}),
        matching(
            compared("reverse_kl", k=3, form="renormalised"), {"k": 3, "mask_tokens": ["a", "d"], "mask": "every"}
        ),
        matching(
            compared("reverse_kl", k=3, by="student", form="renormalised", with_sampled=True),
            {"k": 3, "by": "student", "sampled_token": "in_support"},
        ),
        matching(
            compared("reverse_kl", k=3, form="renormalised", with_sampled=True),
            {"k": 3, "sampled_token": "in_support"},
        ),
        matching(sampled_tail(3, "student"), {"k": 3, "by": "student", "sampled_token": "tail"}, fixed_point=False),
        matching(sampled_tail(3, "teacher"), {"k": 3, "sampled_token": "tail"}, fixed_point=False),
        matching(
            sampled_tail(3, "teacher", (0.5, 0.9)),
            {"k": 3, "sampled_token": "tail", "ratio_bounds": [0.5, 0.9]},
            fixed_point=False,
        ),
    ],
    "vopd": [
        case(centred(k=3), {"k": 3}, average="token"),
        case(centred(), {"baseline": "full", "average": "sequence"}, learns=False),
        case(centred(optimal=True), {"baseline": "optimal", "temperature": 0.7}, average="token", learns=False),
        case(
            centred(k=4, reward=True),
            {"k": 4, "task_reward": True},
            average="token",
            fixed_point=False,
            learns=False,
        ),
    ],
    "eff_opd": [
        case(sampled_log_ratio(False), {"validate_by": "teacher_kl"}),
        case(
            sampled_log_ratio(False),
            {"validate_by": "teacher_kl", "average": "token", "move": "matrices", "ties": True},
            average="token",
            learns=False,
        ),
        case(sampled_log_ratio(False), {"validate_by": "teacher_kl", "move": "released"}, learns=False),
    ],
    "iw_opd": [
        case(coupled(), average="token", early=0.5),
        case(coupled(), {"gamma": 3.0, "average": "sequence"}, early=3.0, learns=False),
        case(coupled(), {"gamma": 0.0}, average="token", early=0.0, learns=False),
    ],
    "sod": [
        by_turn(),
        by_turn(reward=0.0, strength=2.0, bound=0.0, learns=True),
        by_turn(reward=0.3, batch=True, average="sequence", options={"average": "sequence"}),
    ],
    "tcod": [  # one turn: tests/pieces/test_turns.py has more
        case(sampled_log_ratio(False), average="token"),
        case(sampled_log_ratio(False), {"first": 2, "end": "back", "average": "sequence"}, learns=False),
    ],
    "top_d": [
        standardised(learns=True),
        standardised(alpha=1.0, clip=0.1, options={"average": "sequence"}, average="sequence"),
        standardised(alpha=0.6),
    ],
    "mopd": [
        case(bounded(reward=1.0), fixed_point=False, learns=False),
        case(bounded(), {"reward": 0.0}),
        case(bounded(0.8, 1.0), {"reward": 0.0, "least_ratio": 0.8, "most_ratio": 1.0}, learns=False),
        case(
            bounded(reward=0.3), {"reward": 0.3, "average": "token"}, average="token", fixed_point=False, learns=False
        ),
    ],
    "extrapolated_opd": [
        case(beyond(1.15), average="token", fixed_point=False, learns=False),
        case(beyond(1.0, "none"), {"strength": 1.0, "clip": "none", "average": "sequence"}),
        case(
            beyond(1.6, bound=1.2),
            {"strength": 1.6, "bound": 1.2, "average": "sequence", "temperature": 0.7},
            fixed_point=False,
            learns=False,
        ),
        case(
            beyond(1.25, "student/sampler", 1.1),
            {"strength": 1.25, "clip": "student/sampler", "bound": 1.1},
            average="token",
            fixed_point=False,
            learns=False,
        ),
        case(beyond(0.5, "none"), {"strength": 0.5, "clip": "none"}, average="token", fixed_point=False, learns=False),
    ],
    "anti_sd": [
        case(clipped(0.2, 0.2), {"template": HINT}, fixed_point=False, learns=False),  # the warm-up: the reward alone
        case(clipped(0.2, 0.2), {"template": HINT, "form": "released"}, fixed_point=False, learns=False),
        case(away(), {"template": HINT, "gate": False}, fixed_point=False, learns=False),
        case(
            away(2.0, "reverse_kl"),
            {"template": HINT, "gate": False, "shape": "reverse_kl", "strength": 2.0, "average": "token"},
            average="token",
            fixed_point=False,
            learns=False,
        ),
    ],
    "visd": [
        sized(),
        sized(k=1, share=1.0, bound=3.0, average="token"),
        sized(k=9, share=1.0, bound=0.9, fades=1),
        sized(share=0.0),
    ],
    "gui_sd": [  # no letter is a digit, and no prompt has a picture: tests/methods/test_gui_sd.py has both
        case(
            compared("reverse_kl"),
            {"hint": "none", "digits": False},
            average="token",
            weigh=sure,
            learns=False,
        ),
        case(
            compared("reverse_kl"),
            {"hint": "none", "digits": False, "entropy": False, "average": "sequence", "temperature": 0.7},
            learns=False,
        ),
    ],
    "uni_opd": [
        ordered(),
        ordered(gap="minmax", delta=1.5),
        ordered(side="correct_up", balance=1.0),
        ordered(side="incorrect_down", delta=2.0, bound=1.0, clip_low=0.3, clip_high=0.1),
        ordered(margin="mask", delta=3.0),
        ordered(margin="mask", gap="minmax", delta=3.0, keep=0.0, average="token"),
        ordered(margin="none"),
    ],
    "ropd": [
        case(clipped(0.2, 0.2), average="token", fixed_point=False, learns=False),
        case(
            clipped(0.2, 0.2, dual=3.0),
            {"dual_clip": 3.0, "epsilon": 1e-6},
            average="token",
            fixed_point=False,
            learns=False,
            epsilon=1e-6,
        ),
        case(
            clipped(0.1, 0.3),
            {"advantage": "centred", "clip_low": 0.1, "clip_high": 0.3, "average": "sequence"},
            fixed_point=False,
            learns=False,
            scale=False,
        ),
    ],
    "prune_opd": [
        pruned(k=9, threshold=0.7, learns=True),
        pruned(average="sequence", temperature=0.7),
        pruned(metric="teacher_top_p_accept", threshold=0.5),
        pruned(stop="budget", **SHORT),
        pruned(loss="sampled"),
        pruned(stop="rollout", every=3, drop=0.3, threshold=0.7),
    ],
    "brts": [
        best_of(compared("forward_kl", k=9), compared("reverse_kl", k=9, by="student"), {"k": 9}, learns=True),
        best_of(
            compared("forward_kl", k=3),
            compared("reverse_kl", k=3, by="student"),
            {"hinted": 2, "hint": "{answer}h{prompt}", "marker": "h", "overlap": "forced", "temperature": 0.7},
        ),
        best_of(
            compared("forward_kl", k=3),
            compared("reverse_kl", k=3, by="student"),
            {"pick": "shortest", "fallback": "skip", "weight": 0.05},
        ),
        best_of(
            weighed_ratio(3, "teacher"),
            released(3, "student"),
            {"form": "released_teacher_topk"},
            fixed_point=False,
        ),
        best_of(
            weighed_ratio(3, "student"),
            released(3, "student"),
            {"form": "released_student_p", "pick": "first"},
            fixed_point=False,
        ),
    ],
    "copd": [
        taught((0.2, 0.28), 1.0),
        taught((0.1, 0.3), 2.5, clip_low=0.1, clip_high=0.3, temperature=0.7),
    ],
    "simct": [  # with one tokenizer: the exact reverse KL
        case(compared("reverse_kl"), average="token"),
        case(compared("reverse_kl"), {"spans": False, "average": "sequence", "temperature": 0.7}, learns=False),
        case(compared("reverse_kl"), {"least_mass": 0.5}, average="token", learns=False),
    ],
    "uld": [
        case(ranked(), average="token", learns=False),  # it does not know which token is which
        case(compared("generalised_jsd", beta=0.5), {"matched": "generalised_jsd"}, average="token"),
        case(compared("reverse_kl"), {"matched": "reverse_kl", "average": "sequence"}, learns=False),
    ],
    "mad_opd": [  # two teachers of equal weights
        case(compared("reverse_kl"), {"rounds": 0}),
        case(compared("forward_kl"), {"rounds": 0, "beta": 0.0, "temperature": 0.7}, learns=False),
        case(in_turn(0.5), {"rounds": 0, "beta": 0.5}),
        case(in_turn(0.2), {"rounds": 0, "beta": 0.2, "average": "token"}, average="token", learns=False),
    ],
    "opsd": [
        case(compared("generalised_jsd", beta=0.5), {"template": HINT}, average="token"),
        case(
            bounded_entries("forward_kl", 0.05),
            {"template": HINT, "beta": 0.0, "clip": 0.05, "teacher": "live"},
            average="token",
            learns=False,
        ),
        case(
            compared("reverse_kl", k=3),
            {"template": HINT, "beta": 1.0, "k": 3, "teacher": "ema", "average": "sequence", "temperature": 0.7},
            learns=False,
        ),
    ],
    "sdft": [
        case(compared("forward_kl"), {"template": HINT, "decay": 1.0}),
        case(
            compared("reverse_kl"), {"template": HINT, "beta": 1.0, "average": "token"}, average="token", learns=False
        ),
        case(compared("generalised_jsd", k=3, beta=0.3), {"template": HINT, "beta": 0.3, "k": 3}, learns=False),
    ],
    "sdpo": [
        case(
            compared("generalised_jsd", k=9, by="student"),
            {"template": HINT, "k": 9, "decay": 1.0, "otherwise": "privileged_context"},
            average="token",
        ),
        case(
            compared("reverse_kl", k=3, by="student"),
            {"template": HINT, "beta": 1.0, "k": 3, "otherwise": "privileged_context", "average": "sequence"},
            learns=False,
        ),
        case(
            compared("forward_kl"),
            {"template": HINT, "beta": 0.0, "k": None, "otherwise": "privileged_context", "temperature": 0.7},
            average="token",
            learns=False,
        ),
    ],
    "context_distillation": [
        case(compared("reverse_kl"), ALL_TOKENS),
        case(compared("reverse_kl"), {**ALL_TOKENS, "prefill": "ab"}, fixed_point=False, learns=False),
        case(compared("forward_kl"), {**ALL_TOKENS, "teacher": "live", "divergence": "forward_kl"}, learns=False),
        case(compared("skew_kl"), {**ALL_TOKENS, "teacher": "ema", "divergence": "skew_kl"}, learns=False),
        case(
            compared("reverse_kl", k=4, by="intersection", form="renormalised"),
            {"template": HINT, "k": 4},
            learns=False,
        ),
        case(compared("reverse_kl"), {**ALL_TOKENS, "template": HINT, "peers": True}, fixed_point=False, learns=False),
        case(
            compared("generalised_jsd", k=3),
            {
                "template": HINT,
                "divergence": "generalised_jsd",
                "k": 3,
                "by": "teacher",
                "form": "tail",
                "average": "token",
                "temperature": 2.0,
            },
            average="token",
            learns=False,
        ),
    ],
}
# Nothing is compared with a teacher, or a reward has a say beside it: student = teacher is no fixed point of theirs.
NO_FIXED_POINT = {"sft", "grpo", "copd", "anti_sd", "ropd", "visd"}
NO_TARGET = {"grpo", "copd", "anti_sd", "ropd", "visd", "gui_sd"}  # they go where no teacher, or no text, is
CLIPPED = {"uni_opd", "top_d", "mopd", "sod"}  # a policy gradient with a clip, beside a teacher


def built(name: str, options: Mapping[str, Any]) -> Method:
    """The method, with the tokenizer of the models here."""
    return methods.build(name, dict(options)).with_tokenizer(tiny().tokenizer)


def label(name: str, one: Case) -> str:
    return "-".join([name, *(f"{key}={value}" for key, value in one.options.items() if key != "template")])


def every(keep: Callable[[Case], bool] = lambda one: True) -> pytest.MarkDecorator:
    """Run the test for each case of each method."""
    rows = [(name, one) for name, cases in CASES.items() for one in cases if keep(one)]
    return pytest.mark.parametrize(("name", "one"), rows, ids=[label(*row) for row in rows])


def test_methods_all_have_cases():
    assert set(CASES) == set(METHODS)
    assert all(CASES.values())


def test_methods_have_fixed_point_case_unless_exempt():
    exempt = {name for name, cases in CASES.items() if not any(one.fixed_point for one in cases)}
    assert exempt == NO_FIXED_POINT


def test_methods_have_learning_case_unless_exempt():
    assert {name for name, cases in CASES.items() if not any(one.learns for one in cases)} == NO_TARGET


# --- one step of one method -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A method, its models (heads of different width over one vocabulary), and responses with masked tokens."""

    method: Method
    student: LanguageModel
    teacher: Teacher
    rollouts: list[Rollout]

    def step(self, micro_batch_tokens: int = 10**6) -> Gradient:
        return step(self.method, self.student, self.teacher, self.rollouts, micro_batch_tokens)


def masked(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Some tokens are not trained: the second one of every response of three, and all of the second response."""
    out: list[Rollout] = []
    for i, rollout in enumerate(rollouts):
        trained = rollout.trained.clone()
        trained[1:2] &= len(trained) < 3
        out.append(replace(rollout, trained=trained & (i != 1)))
    return out


def scene(name: str, one: Case, *, float64: bool = False, **student: Any) -> Scene:
    """`float64` is of the models' weights; log-probs are float32 in any case."""
    method = built(name, one.options)
    learner = tiny(**{"padding_rows": 3, "name": "student", **student})
    external = tiny(seed=1, hidden=24, padding_rows=5, name="teacher")
    if float64:
        learner.model.double()
        external.model.double()
    teacher = teacher_of(method, learner, external)
    if method.teacher.mixture is not None:
        other = LocalTeacher(
            lm=tiny(seed=2, hidden=8, name="other", padding_rows=1),
            micro_batch_tokens=64,
            student_device=learner.device,
        )
        if float64:
            other.lm.model.double()
        teacher = mixed_teacher({"teacher": teacher, "other": other}, method.teacher.mixture, "test")
    with torch.no_grad():  # a teacher made of the student is not the student any more
        for parameter in learner.model.parameters():
            parameter.mul_(1.1)
    rollouts = masked(write(method, learner, external, PROMPTS, SAMPLING))
    return Scene(method=method, student=learner, teacher=teacher, rollouts=rollouts)


def advantages(rollouts: Sequence[Rollout], scale: bool, epsilon: float = 1e-4) -> list[float]:
    """GRPO's, by group of responses to one prompt, which stand together."""
    out: list[float] = []
    for _, group in groupby(rollouts, key=lambda rollout: rollout.prompt.id):
        out += oracle.group_advantage([float(rollout.reward or 0.0) for rollout in group], epsilon, scale=scale)
    return out


def coupled_returns(rollout: Rollout, z: Tensor, other: Tensor, one: Case) -> dict[int, float]:
    """The discounted log-ratios of the trained tokens, as if the others were not there, or of each turn alone."""
    places = range(len(rollout.response_ids))
    kept = [t for t in places if rollout.trained[t]]
    ids = rollout.response_ids.tolist()
    ratios = [oracle.log_softmax(other[t].tolist())[ids[t]] - oracle.log_softmax(z[t].tolist())[ids[t]] for t in places]
    if one.early is not None:
        return dict(zip(kept, oracle.early([ratios[t] for t in kept], one.early), strict=True))
    gamma = one.gamma
    assert gamma is not None
    if not one.across_turns:
        return dict(zip(places, oracle.discounted_by_turn(ratios, rollout.trained.tolist(), gamma), strict=True))
    return dict(zip(kept, oracle.discounted([ratios[t] for t in kept], gamma), strict=True))


def judging(teacher: Teacher) -> list[LanguageModel]:
    """The models that score a row."""
    if isinstance(teacher, MixedTeacher):
        return [one.lm for one in teacher.teachers.values()]
    return [] if teacher.lm is None else [teacher.lm]


def mean_of(teachers: list[Tensor], mixture: str | None) -> Tensor:
    """The mean of equal weights of several teachers' logits [T, V]; in turn, and of one teacher, the first."""
    if mixture not in ("geometric", "arithmetic"):
        return teachers[0]
    mean = oracle.geometric_mean if mixture == "geometric" else oracle.arithmetic_mean
    weights = [1 / len(teachers)] * len(teachers)
    rows = [mean([one[t].tolist() for one in teachers], weights) for t in range(len(teachers[0]))]
    return torch.tensor(rows, dtype=torch.float64)


def reference(on: Scene, one: Case) -> Gradient:
    """The step in float64: logits of unpadded rows from the models themselves, then the paper's formula a token."""
    method, student = on.method, on.student
    learner = double(student)
    judges = {
        name: [double(lm) for lm in judging(on.teacher.of(name))]
        for name in {rollout.prompt.teacher_id for rollout in on.rollouts}
    }
    counts = [int(rollout.trained.sum()) for rollout in on.rollouts]
    cases = {"": (one, 1.0), **one.parts}
    totals: dict[str, dict[str, int]] = {}
    for name in cases:
        of_part = [n for n, rollout in zip(counts, on.rollouts, strict=True) if rollout.part == name]
        totals[name] = {"token": sum(of_part), "sequence": sum(count > 0 for count in of_part)}
    credit = advantages(on.rollouts, scale=one.scale and not isinstance(one.average, int), epsilon=one.epsilon)
    loss = 0.0
    contexts = method.context(on.rollouts)
    rows: list[tuple[Tensor, list[Position]]] = []
    for rollout, context, advantage in zip(on.rollouts, contexts, credit, strict=True):
        logits = full_logits(learner, rollout.prompt_ids, rollout.response_ids, student.vocabulary)
        z = logits / method.temperature
        read = render(context, student.tokenizer)
        scored_by = judges[rollout.prompt.teacher_id]
        with torch.no_grad():
            others = [full_logits(one, read, rollout.response_ids, student.vocabulary) for one in scored_by]
        others = [other / method.temperature for other in others] or [z.detach()]
        other = mean_of(others, method.teacher.mixture)
        thirds = [[] for _ in range(len(z))]
        if isinstance(on.teacher, WithBase):
            base = double(on.teacher.third.lm)
            with torch.no_grad():
                own = full_logits(base, rollout.prompt_ids, rollout.response_ids, student.vocabulary)
            thirds = (own / method.temperature).tolist()
        returns = {} if one.gamma is None and one.early is None else coupled_returns(rollout, z, other, one)
        positions = [
            Position(
                student=z[t].tolist(),
                teacher=other[t].tolist(),
                token=int(rollout.response_ids[t]),
                sampler_logp=math.nan if rollout.sampler_logp is None else float(rollout.sampler_logp[t]),
                advantage=returns.get(t, advantage),
                teachers=[one[t].tolist() for one in others],
                base=thirds[t],
            )
            for t in range(len(rollout.response_ids))
        ]
        rows.append((z, positions))
    if one.credit is not None:
        found = one.credit(on.rollouts, [positions for _, positions in rows])
        rows = [
            (z, [replace(at, advantage=a) for at, a in zip(positions, mine, strict=True)])
            for (z, positions), mine in zip(rows, found, strict=True)
        ]
    for rollout, (z, positions), count in zip(on.rollouts, rows, counts, strict=True):
        (formula, factor), total = cases[rollout.part], totals[rollout.part]
        slope = torch.zeros_like(z)
        weights = [1.0] * len(positions)
        if one.weigh is not None:
            weights = one.weigh(positions, rollout.trained.tolist())
        for t, at in enumerate(positions):
            if not rollout.trained[t]:
                continue
            if isinstance(formula.average, int):
                share = 1.0 / (len(on.rollouts) * formula.average)
            else:
                share = 1.0 / total[formula.average] / (count if formula.average == "sequence" else 1)
            share *= weights[t] * factor
            loss += share * formula.loss(at)
            slope[t] = share * torch.tensor(formula.slope(at), dtype=torch.float64)
        z.backward(slope)
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in learner.named_parameters()}
    return Gradient(loss=loss, grads=grads)


@pytest.mark.numeric
@every()
def test_method_loss_and_gradient_equal_oracle(name: str, one: Case):
    on = scene(name, one)
    got, expected = on.step(), reference(on, one)
    assert got.loss == pytest.approx(expected.loss, rel=ROUNDING, abs=ROUNDING)
    assert expected.norm > 1e-3
    assert got.distance(expected) < ROUNDING


@pytest.mark.parametrize("family", ["llama_tied", "gemma2", "cohere", "granite", "gpt2", "phi"])
@pytest.mark.parametrize("name", ["opd", "reverse_kl", "topk_reverse_kl"])
def test_method_gradient_equals_oracle_for_every_head(name: str, family: str):
    one = CASES[name][0]
    on = scene(name, one, family=family)
    got, expected = on.step(), reference(on, one)
    assert got.loss == pytest.approx(expected.loss, rel=ROUNDING, abs=ROUNDING)
    assert got.distance(expected) < ROUNDING


def test_grpo_clips_some_tokens_only():
    one = CASES["grpo"][0]
    on = scene("grpo", one)
    slopes = [
        oracle.policy_gradient(float(p), float(mu), advantage, clip=(0.2, 0.2))[1]
        for rollout, advantage in zip(on.rollouts, advantages(on.rollouts, scale=True), strict=True)
        for p, mu in zip(known(rollout.policy_logp), known(rollout.sampler_logp), strict=True)
    ]
    assert 0.1 < sum(slope == 0 for slope in slopes) / len(slopes) < 0.9


def known(values: Tensor | None) -> Tensor:
    assert values is not None
    return values


# --- padding and masked tokens --------------------------------------------------------------------------------------


@every()
def test_method_gradient_is_zero_for_untrained_tokens(name: str, one: Case, monkeypatch: pytest.MonkeyPatch):
    on = scene(name, one)
    seen: list[tuple[list[list[int]], ResponseStates]] = []

    def recorded(lm: LanguageModel, prompts: Any, responses: list[list[int]]) -> ResponseStates:
        got = response_states(lm, prompts, responses)
        got.hidden.retain_grad()
        seen.append((responses, got))
        return got

    monkeypatch.setattr(opd.loss.token_loss, "response_states", recorded)
    on.step()
    parts = ["", *(part for part in on.method.parts if any(r.part == part for r in on.rollouts))]
    for part, (responses, got) in zip(parts, seen, strict=True):
        hidden = got.hidden
        assert hidden.grad is not None
        expected = torch.zeros(hidden.shape[:2], dtype=torch.bool)
        left = [r for r in on.rollouts if bool(r.trained.any()) and r.part == part]
        for i, response in enumerate(responses):
            found = next(r for r in left if r.response_ids.tolist() == response)
            left.remove(found)
            start = int(got.first[i])
            expected[int(got.row[i]), start : start + len(response)] |= found.trained
        moved = (hidden.grad != 0).any(-1).cpu()
        assert not bool((moved & ~expected).any())
        # A clipped token, and a support of one token or none, may rightly give nothing; of all else, nothing is zero.
        symmetric = on.method.support.by in ("intersection", "symmetric_difference")
        if name not in NO_TARGET | CLIPPED and not symmetric:
            assert torch.equal(moved, expected)


def poisoned(batch: Batch, value: float, token: int) -> Batch:
    """The batch with everything that is not trained overwritten: floats with `value`, ids with `token`."""
    changed: dict[str, Any] = {}
    for entry in fields(batch):
        tensor = getattr(batch, entry.name)
        if not isinstance(tensor, Tensor) or tensor.shape[:2] != batch.mask.shape or entry.name == "mask":
            continue
        changed[entry.name] = tensor.clone()
        changed[entry.name][~batch.mask] = value if tensor.is_floating_point() else token
    if batch.teacher_hidden is not None:
        changed["teacher_hidden"] = tuple(
            states.masked_fill(~batch.mask[i, : len(states), None], value)
            for i, states in enumerate(batch.teacher_hidden)
        )
    if batch.units is not None:
        changed["units"] = batch.units.each(
            lambda field: field.masked_fill(~batch.mask, value if field.is_floating_point() else token)
        )
    return replace(batch, **changed)


@every()
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_method_gradient_ignores_padding_and_masked_tokens(name: str, one: Case, value: float):
    on = scene(name, one)
    on = replace(on, rollouts=[rollout for rollout in on.rollouts if not rollout.part])  # tests/loss/test_parts.py
    plain = batch_of(on.method, on.student, on.teacher, on.rollouts)
    assert bool((~plain.mask).any(1).all()), "every row has padding or a masked token"
    expected = on.step()

    dirty = poisoned(plain, value, token=1)
    assert torch.equal(dirty.mask, plain.mask)
    dirty = poisoned(attach(dirty, on.method), value, token=1)
    got = gradient_of(on.method, on.student, on.teacher, dirty, on.method.normalise(dirty))
    assert got.same_bits(expected)
    assert math.isfinite(got.loss)
    assert math.isfinite(got.norm)


@every()
def test_method_gradient_is_zero_in_padding_rows_of_head(name: str, one: Case):
    on = scene(name, one)
    weight = on.step().grads["lm_head.weight"]
    assert weight.shape[0] == on.student.vocabulary + 3
    assert bool((weight[on.student.vocabulary :] == 0).all())
    assert bool((weight[: on.student.vocabulary] != 0).any())


# --- what a step may not depend on ----------------------------------------------------------------------------------


@every()
def test_method_gradient_is_unchanged_by_micro_batch_tokens(name: str, one: Case):
    on = scene(name, one, float64=True)
    whole = on.step(10**6)
    for micro_batch_tokens in (1, 17):
        parts = on.step(micro_batch_tokens)
        assert parts.loss == pytest.approx(whole.loss, rel=SPLIT, abs=SPLIT)
        assert parts.distance(whole) < SPLIT


@every()
def test_method_gradient_is_unchanged_by_chunk_entries(name: str, one: Case, monkeypatch: pytest.MonkeyPatch):
    on = scene(name, one, float64=True)
    whole = on.step()
    for entries in (1, 3 * on.student.vocabulary):
        monkeypatch.setattr(opd.models.head, "CHUNK_ENTRIES", entries)
        assert len(list(opd.models.head.chunks(7, on.student.vocabulary, torch.device("cpu")))) == (
            7 if entries == 1 else 3
        )
        parts = on.step()
        assert parts.loss == pytest.approx(whole.loss, rel=SPLIT, abs=SPLIT)
        assert parts.distance(whole) < SPLIT


@every()
def test_method_gradient_is_unchanged_by_row_order(name: str, one: Case):
    on = scene(name, one, float64=True)
    turned = replace(on, rollouts=on.rollouts[::-1])
    assert turned.step().distance(on.step()) < SPLIT


@every()
def test_method_gradient_is_byte_equal_when_repeated(name: str, one: Case):
    on = scene(name, one)
    assert on.step(20).same_bits(on.step(20))


# --- fixed point, extremes ------------------------------------------------------------------------------------------


@every(lambda one: one.fixed_point)
def test_method_gradient_is_zero_when_teacher_is_student(name: str, one: Case):
    own = "template" in one.options  # of a self-teacher, for which there is nothing more to read
    method = built(name, {**one.options, "template": HINT} if own else one.options)
    student = tiny(padding_rows=3)
    same = frozen_copy(student)
    teacher = teacher_of(method, student, same)
    prompts = [replace(prompt, privileged_context="") for prompt in PROMPTS] if own else PROMPTS
    rollouts = masked(write(method, student, same, prompts, SAMPLING))
    rollouts = [replace(rollout, reward=0.0) for rollout in rollouts] if own else rollouts  # no right peer
    got = step(method, student, teacher, rollouts)
    assert got.norm < FIXED * scene(name, one).step().norm


@every(lambda one: not one.fixed_point)
def test_method_gradient_is_nonzero_when_case_is_exempt(name: str, one: Case):
    method = built(name, one.options)
    student = tiny(padding_rows=3)
    same = frozen_copy(student)
    teacher = teacher_of(method, student, same)
    rollouts = masked(write(method, student, same, PROMPTS, SAMPLING))
    if one.options.get("by") == "symmetric_difference":  # of a set with itself: only the sampled token is left
        assert teacher is not None
        assert all(bool((s.support_mask.sum(1) == 1).all()) for s in score_all(method, teacher, rollouts))
    assert step(method, student, teacher, rollouts).norm > 1e-3


def score_all(method: Method, teacher: Teacher, rollouts: list[Rollout]) -> list[Any]:
    return teacher.score(
        rollouts, method.context(rollouts), ScoreRequest(support=method.support, temperature=method.temperature)
    )


def steep(lm: LanguageModel, largest: float = 1e4) -> LanguageModel:
    """A copy whose largest logit, on these prompts, is about `largest` in size."""
    sharp = replace(lm, model=copy.deepcopy(lm.model))
    with torch.no_grad():
        ids = torch.tensor([sharp.tokenizer(LETTERS).input_ids], device=sharp.device)
        head = sharp.head()
        head.weight.mul_(largest / float(head.logits(sharp.hidden(ids)).abs().max()))
        reached = float(sharp.head().logits(sharp.hidden(ids)).abs().max())
    assert reached == pytest.approx(largest, rel=1e-3)
    return sharp


@every()
@pytest.mark.parametrize("writer", ["fresh", "stale"])
@pytest.mark.parametrize("steep_teacher", [False, True])
def test_method_gradient_is_finite_when_logits_are_extreme(name: str, one: Case, writer: str, steep_teacher: bool):
    method = built(name, one.options)
    before, external = tiny(padding_rows=3), tiny(seed=1, hidden=24, padding_rows=5)
    student = steep(before)
    if steep_teacher:
        external = steep(external)
    teacher = teacher_of(method, student, external)
    author = student if writer == "fresh" else before
    sampling = SAMPLING if writer == "fresh" else replace(SAMPLING, top_p=1.0)
    rollouts = masked(write(method, author, external, PROMPTS, sampling))
    got = step(method, student, teacher, rollouts)
    assert math.isfinite(got.loss)
    assert all(bool(g.isfinite().all()) for g in got.grads.values())


@pytest.mark.parametrize("form", divergences.FORMS)
@pytest.mark.parametrize("divergence", divergences.DIVERGENCES)
@pytest.mark.parametrize("logp", [-80.0, -1e3])
@pytest.mark.parametrize("little", ["student", "teacher", "both"])
def test_on_support_is_finite_when_mass_is_almost_zero(divergence: str, form: str, logp: float, little: str):
    """One token of three exists, and a model hardly believes in it: what two sharp models have in common."""
    rows = {who: [logp if little in (who, "both") else -0.5, -1.0, -2.0] for who in ("student", "teacher")}
    student = torch.tensor([rows["student"]], requires_grad=True)
    exists = torch.tensor([[True, False, False]])
    value = divergences.on_support(divergence, student, torch.tensor([rows["teacher"]]), form, exists)
    value.sum().backward()
    assert student.grad is not None
    assert bool(value.isfinite().all())
    assert bool(student.grad.isfinite().all())
    assert student.grad[0, 1:].tolist() == [0.0, 0.0]


# --- identities of single methods -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["raw", "stop_gradient", "renormalised", "tail"])
@pytest.mark.parametrize("by", ["teacher", "student", "intersection", "union"])
def test_topk_reverse_kl_equals_reverse_kl_when_k_is_vocabulary(form: str, by: str):
    exact = scene("reverse_kl", CASES["reverse_kl"][0])
    k = exact.student.vocabulary
    method = methods.build("topk_reverse_kl", {"k": k, "form": form, "by": by})
    rollouts = masked(write(method, exact.student, None, PROMPTS, SAMPLING))
    assert [r.text for r in rollouts] == [r.text for r in exact.rollouts]
    got, expected = replace(exact, method=method, rollouts=rollouts).step(), exact.step()
    assert got.loss == pytest.approx(expected.loss, rel=ROUNDING)
    assert got.distance(expected) < ROUNDING


@pytest.mark.parametrize("by", ["teacher", "student"])
def test_topk_reverse_kl_refuses_k_above_vocabulary(by: str, tmp_path: Path):
    student, external = tiny(), tiny(seed=1)
    with pytest.raises(ConfigError, match=r"k = 11.*10 tokens"):
        distill(
            student=student.model,
            teacher=external.model,
            tokenizer=student.tokenizer,
            method="topk_reverse_kl",
            options={"k": 11, "by": by},
            prompts=["a", "b"],
            steps=1,
            output_dir=tmp_path / "run",
            quiet=True,
        )


@pytest.mark.parametrize("form", ["raw", "stop_gradient", "renormalised", "tail"])
def test_topk_reverse_kl_is_zero_when_support_is_empty(form: str):
    on = scene("reverse_kl", CASES["reverse_kl"][0])
    k = on.student.vocabulary
    method = methods.build("topk_reverse_kl", {"k": k, "form": form, "by": "symmetric_difference"})
    rollouts = masked(write(method, on.student, None, PROMPTS, SAMPLING))
    got = replace(on, method=method, rollouts=rollouts).step()
    assert got.loss == 0.0
    assert all(bool((g == 0).all()) for g in got.grads.values())


@pytest.mark.parametrize("importance", [False, True])
def test_opd_gradient_is_unbiased_over_all_tokens(importance: bool):
    """Every token of the vocabulary as the one response, weighted by its probability: the exact KL's gradient.

    With importance the tokens are drawn from another distribution, a hotter one here.
    """
    student, external = tiny(padding_rows=3), tiny(seed=1, hidden=24, padding_rows=5)
    (prompt,) = prompts_of("gab")
    logits = full_logits(double(student), student.tokenizer("gab").input_ids, torch.tensor([0]), student.vocabulary)[0]
    drawn_from = (logits / (3.0 if importance else 1.0)).log_softmax(-1).detach()
    method = methods.build("opd", {"importance": importance})
    teacher = teacher_of(method, student, external)

    total: dict[str, Tensor] = {}
    for token in range(student.vocabulary):
        mu = drawn_from[token]
        rollout = rollout_of(student, prompt, [token], sampler_logp=mu.float()[None], policy_logp=mu.float()[None])
        one = step(method, student, teacher, [rollout])
        for key, grad in one.grads.items():
            total[key] = total.get(key, torch.zeros_like(grad, dtype=torch.float64)) + mu.exp() * grad.double()
    mean = Gradient(loss=math.nan, grads=total)

    exact = methods.build("reverse_kl", {})
    rollout = rollout_of(student, prompt, [0])
    expected = step(exact, student, teacher_of(exact, student, external), [rollout])
    assert expected.norm > 0.1
    assert mean.distance(expected) < ROUNDING


def test_on_policy_share_equals_share_of_student_rollouts():
    method = methods.build("gkd", {"on_policy_share": 0.3})
    student, external = tiny(), tiny(seed=1)
    short = replace(SAMPLING, max_completion_length=1, n=1)
    steps = 300
    own = sum(
        write(method, student, external, PROMPTS[:1], short, seed=(5, i))[0].sampler_logp is not None
        for i in range(steps)
    )
    assert abs(own / steps - 0.3) < 4 * math.sqrt(0.3 * 0.7 / steps)


# --- learning -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """A run that is so small that its KL is computed exactly, at every state that there is."""

    student: LanguageModel
    external: LanguageModel | None
    prompts: list[Prompt]
    sampling: Sampling
    read: list[list[int]]  # what the student reads at each state
    taught: list[list[int]]  # what the teacher reads there

    def kl(self, target: LanguageModel) -> float:
        """Mean over states of KL(p||q)."""
        return sum(self._kl(target, x, c) for x, c in zip(self.read, self.taught, strict=True)) / len(self.read)

    @torch.no_grad()
    def _kl(self, target: LanguageModel, read: list[int], taught: list[int]) -> float:
        nothing = torch.tensor([0])
        s = full_logits(self.student.causal_lm, read, nothing, self.student.vocabulary)[0]
        t = full_logits(target.causal_lm, taught, nothing, target.vocabulary)[0]
        return oracle.reverse_kl(oracle.log_softmax(s.tolist()), oracle.log_softmax(t.tolist()))


def next_letters() -> Lesson:
    """Another bigram table to learn; a state is the last letter."""
    student = bigram(seed=0, spread=0.35)
    states = [[token] for token in student.tokenizer(LETTERS).input_ids]
    return Lesson(
        student=student,
        external=bigram(seed=1, spread=0.35),
        prompts=prompts_of(*LETTERS),
        sampling=Sampling(max_completion_length=4, n=4),
        read=states,
        taught=states,
    )


def a_letter_in_the_context() -> Lesson:
    """What the model itself would write next if it had read one more letter; a state is a prompt."""
    student = tiny(layers=1)
    encode = student.tokenizer
    return Lesson(
        student=student,
        external=None,
        prompts=prompts_of(*LETTERS, privileged_context="d"),
        sampling=Sampling(max_completion_length=1, n=2),
        read=[encode(x).input_ids for x in LETTERS],
        taught=[encode(f"{x}d").input_ids for x in LETTERS],
    )


@every(lambda one: one.learns)
def test_method_reduces_exact_kl_to_a_tenth(name: str, one: Case):
    own = "template" in one.options
    lesson = a_letter_in_the_context() if own else next_letters()
    method = built(name, {**one.options, "template": "{prompt}{privileged_context}"} if own else one.options)
    teacher = teacher_of(method, lesson.student, lesson.external, micro_batch_tokens=10**4)
    target = lesson.external or frozen_copy(lesson.student)
    steps = 80
    section = OptimizerSection(learning_rate=0.05, schedule="linear", max_grad_norm=10.0)
    moves = StageOptimisation(
        optimiser=optimisers.build(lesson.student.trainable(), section, steps),
        student=lesson.student,
        root=lesson.student.model,
        teacher=teacher,
        sampler=TransformersSampler(lm=lesson.student, sampling=lesson.sampling),
        prompts=lesson.prompts,
        reward=StageRewards(by_task={None: None}),
        context=method.context,
        memory=method.make_memory(),
        world=ALONE,
        seed=0,
        micro_batch_tokens=10**4,
    )
    before = lesson.kl(target)
    for i in range(steps):
        rollouts = write(method, lesson.student, lesson.external, lesson.prompts, lesson.sampling, seed=(0, i))
        got = step(method, lesson.student, teacher, rollouts)
        for key, parameter in lesson.student.trainable().items():
            parameter.grad = got.grads[key].to(parameter.device)
        moves.optimiser.clip()
        method.update(moves)
        teacher.after_step()
    after = lesson.kl(target)
    assert before > 0.3
    assert after < before / 10, f"KL {before:.3f} -> {after:.3f}"


# --- papers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_method_page_has_citation_formula_and_symbols(name: str):
    page = sys.modules[METHODS[name].__module__].__doc__ or ""
    lines = page.splitlines()
    assert re.search(r"arXiv \d{4}\.\d{5}", page), "no citation (arXiv number)"
    assert any(line.startswith("    ") and "=" in line for line in lines), "no formula (an indented line)"
    header = lines.index("| paper | here |")
    assert lines[header + 1] == "|---|---|"
    assert lines[header + 2].startswith("| "), "the table of symbols is empty"
    assert any(line.startswith("Differs from the paper: ") for line in lines)
    assert METHODS[name].__doc__, "the function says nothing about itself"


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_methods_all_have_recipe():
    used = {name for path in RECIPES for stage in load_recipe(path).stages for name in stage.method.split("+")}
    missing = sorted(set(METHODS) - used)
    assert not missing, f"no recipe uses {', '.join(missing)}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_check_recipe_accepts_shipped_recipe(path: Path):
    if "start: {" in path.read_text() and not os.environ.get("OPD_VLLM"):
        pytest.skip("the recipe starts vLLM, and OPD_VLLM names no Python that has it; `make engines` builds one")
    if "textarena:" in path.read_text():
        pytest.importorskip("textarena", reason="needs textarena: `pip install 'opd[textarena]'`")
    large = [one.name for one in load_recipe(path).stages if one.data and not 0 < (one.data.limit or 0) <= 500]
    recipe = load_recipe(path, [f"stages.{name}.data.limit=500" for name in large])
    assert len(check_recipe(recipe)) >= len(recipe.stages)
