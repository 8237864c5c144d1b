"""Pieces that do not fit together: `opd check` and two methods in one refuse the same, by one table of rules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from opd import methods
from opd.errors import ConfigError
from opd.method import Method, Part
from opd.methods.coherence import RULES, Facts, broken, check_coherence
from opd.methods.combine import PLAIN, combined, conflict
from opd.pieces import (
    contexts,
    credit,
    drift,
    filters,
    normalise,
    signals,
    solutions,
    sources,
    supports,
    updates,
    weights,
)
from opd.types import Sampling

SAMPLED = signals.sampled_reverse_kl()
DRIFT = drift.Drift(k=3)
VOPD = methods.build("vopd", {"k": 3})
SIMCT = methods.build("simct", {})
GROUP = credit.group_reward()
ATTEMPT = contexts.privileged(template="{prompt}{attempt}")
JUDGED = methods.build("ropd", {})
JUMPS = {by: updates.extrapolation(by=by, prompts=1, candidates=1, ties=False) for by in ("reward", "teacher_kl")}
TOP_P = Sampling(top_p=0.9)
PARTS = {"other": Part(method=Method(signal=SAMPLED))}
PEERS = contexts.privileged(template="{prompt}{privileged_context}", solutions=solutions.from_peers())

# A method that breaks each rule, in their order; with what of the recipe's sampling it takes.
BROKEN: list[tuple[Method, Sampling | None]] = [
    (replace(methods.build("grpo", {}), weight=drift.trusted(DRIFT)), None),
    (Method(source=sources.dataset(), signal=signals.policy_gradient(importance=True)), None),
    (Method(support=supports.top_k(3), signal=signals.reverse_kl_with_sampled_tail()), None),
    (Method(source=sources.on_policy(drift.ends_drifted(DRIFT, 2)), context=ATTEMPT, signal=SAMPLED), None),
    (replace(VOPD, source=sources.dataset()), None),
    (VOPD, TOP_P),
    (replace(VOPD, weight=weights.mask_tokens(["a"])), None),
    (replace(VOPD, filter=filters.first_passing(filters.clean())), None),
    (replace(VOPD, context=ATTEMPT), None),
    (Method(support=supports.units(), signal=signals.divergence()), None),
    (replace(SIMCT, parts=PARTS), None),
    (Method(context=PEERS, signal=SAMPLED, parts=PARTS), None),
    (replace(SIMCT, weight=drift.trusted(DRIFT)), None),
    (replace(SIMCT, update=JUMPS["teacher_kl"]), None),
    (replace(methods.build("mad_opd", {"rounds": 0}), source=sources.teacher_writes()), None),
    (replace(methods.build("extrapolated_opd", {}), update=JUMPS["teacher_kl"]), None),
    (replace(methods.build("copd", {}), update=JUMPS["teacher_kl"]), None),
    (Method(signal=signals.add(SAMPLED, signals.scale(-0.1, SAMPLED))), None),
    (Method(weight=drift.trusted(DRIFT), credit=GROUP, signal=signals.policy_gradient()), None),
    (replace(methods.build("uni_opd", {}), normalise=normalise.per("token")), None),
    (replace(JUDGED, update=JUMPS["reward"]), None),
]


def test_rules_have_one_broken_example_each():
    assert len(BROKEN) == len(RULES)


@pytest.mark.parametrize("place", range(len(RULES)))
def test_check_coherence_states_rule_and_remedy(place: int):
    method, sampling = BROKEN[place]
    facts = Facts(method=method, sampling=sampling)
    rule = broken(facts)
    assert rule is not None
    assert rule.when is RULES[place].when, rule.what
    assert "{" not in rule.what
    with pytest.raises(ConfigError) as refused:
        check_coherence(facts, "Stage 'a': method 'b'")
    assert str(refused.value) == f"Stage 'a': method 'b': {rule.what}. {rule.remedy}"


@pytest.mark.parametrize("place", [i for i, (_, sampling) in enumerate(BROKEN) if sampling is None])
def test_apart_equals_broken_rule_of_method(place: int):
    method, _ = BROKEN[place]
    rule = broken(Facts(method=method))
    assert rule is not None
    assert conflict(PLAIN, method) == rule.what


def test_broken_is_none_when_sampling_is_unknown():
    assert broken(Facts(method=VOPD)) is None
    assert broken(Facts(method=VOPD, sampling=Sampling())) is None


def test_broken_refuses_extrapolation_by_reward_when_judged():
    jumping = Method(signal=SAMPLED, update=JUMPS["reward"])
    assert broken(Facts(method=jumping)) is None
    assert broken(Facts(method=jumping, asks=True)) is not None
    assert broken(Facts(method=replace(jumping, update=JUMPS["teacher_kl"]), asks=True)) is None


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (replace(PLAIN, context=ATTEMPT), "the teacher reads the response that it scores, which biases a baseline"),
        (
            replace(PLAIN, filter=filters.first_passing(filters.clean())),
            "the filter selects responses by their content",
        ),
    ],
    ids=["attempt", "filter"],
)
def test_combined_refuses_baseline_when_other_reads_response(other: Method, why: str):
    for one, two in ((VOPD, other), (other, VOPD)):
        with pytest.raises(ConfigError, match=f"cannot be combined: {why}"):
            combined(one, two)
    pieces = {name: getattr(other, name) for name in ("context", "filter")}
    with pytest.raises(ConfigError, match=f"^Here: {why}"):
        check_coherence(Facts(method=replace(VOPD, **pieces)), "Here")


def test_broken_is_none_when_weight_is_bare_function():
    grpo = methods.build("grpo", {})
    bare = replace(grpo, weight=weights.times(lambda batch: batch.mask.float(), weights.every_token()))
    assert broken(Facts(method=bare)) is None
