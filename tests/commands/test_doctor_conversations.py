"""The doctor on a stage with an environment: it leads conversations, and reads the student's own tokens alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import pytest
import torch
from support.doctor import characters, diagnosis, pair_of, sums
from support.models import rollout_of

from opd.commands.doctor import conversations, signal
from opd.commands.doctor.findings import Finding
from opd.commands.doctor.special_tokens import kinds_of
from opd.commands.doctor.subject import Subject
from opd.environments.protocol import Environment, Observation
from opd.types import Prompt

ENVIRONMENT = {"name": "support.talking:talker", "options": {"longest": 4}, "max_turns": 3}
STAGE: dict[str, Any] = {
    "environment": ENVIRONMENT,
    "method": "sod",
    "options": {},
    "reward": None,
    "sampling": {"max_completion_length": 24, "stop": [";"], "n": 2},
}


@dataclass
class Failing(Environment):
    """Raises at each action whose number `every` divides."""

    name = "failing"
    rewards = True
    acted = 0
    every: int = 3

    def act(self, state: Any, turn: Any) -> Observation:
        self.acted += 1
        if self.acted % self.every == 0:
            raise ValueError("no")
        return Observation(text="1")


def failing() -> Failing:
    return Failing()


def raising() -> Failing:
    return Failing(every=1)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return pair_of(characters("student", seed=1), characters("teacher", seed=2, hidden=16), sums(8), **STAGE)


def found(report: Any, name: str) -> Finding:
    (one,) = [finding for finding in report.findings if finding.name == name]
    return one


def test_doctor_leads_conversations_with_both_models():
    models = {"student": characters("student", seed=1), "teacher": characters("teacher", seed=2, hidden=16)}
    report = diagnosis(models, sums(8), looked_at=8, **STAGE)
    talk = found(report, "environment/conversations").numbers
    assert talk["conversations"] == 8
    assert 1 < talk["turns"] <= 3
    assert talk["heard_tokens"] > 0
    assert found(report, "signal/self_test").level == found(report, "signal/repeatability").level == "ok"
    assert found(report, "headroom/accuracy").level != "skipped"  # the environment's own reward
    assert "environment's state" in found(report, "headroom/continuation").says


def test_turn_divergences_are_means_over_own_tokens(subject):
    comparison = signal.compared(subject)
    numbers = conversations.by_turn(subject, comparison).numbers["turns"]
    size, kl, place = defaultdict(list), defaultdict(list), 0
    for row, one in enumerate(subject.firsts):
        of_row = defaultdict(list)
        for turn, own in zip(one.turn.tolist(), one.trained.tolist(), strict=True):
            if own:
                ratio = float(comparison.teacher_logp[place] - comparison.student_logp[place])
                of_row[turn].append(abs(ratio))
                kl[turn].append(float(comparison.reverse_kl[place]))
                assert int(comparison.row[place]) == row
                place += 1
        for turn, values in of_row.items():
            size[turn].append(fmean(values))
    assert place == len(comparison.row)
    assert [row["turn"] for row in numbers] == sorted(size)
    for row in numbers:
        assert row["conversations"] == len(size[row["turn"]])
        assert row["log_ratio_size"] == pytest.approx(fmean(size[row["turn"]]), rel=1e-5)
        assert row["reverse_kl"] == pytest.approx(fmean(kl[row["turn"]]), rel=1e-5)


def test_turns_that_sod_mutes_are_named(subject):
    comparison = signal.compared(subject)
    assert conversations.by_turn(subject, comparison).level == "ok"
    first = conversations.turns_of(subject) == 0
    agreeing = replace(
        comparison, teacher_logp=torch.where(first, comparison.student_logp, comparison.student_logp - 1.0)
    )
    muted = conversations.by_turn(subject, agreeing)
    assert (muted.level, muted.numbers["muted"]) == ("change", 1.0)
    assert "options.reference: batch" in muted.remedy
    batched = pair_of(subject.student, subject.teacher.lm, sums(8), **{**STAGE, "options": {"reference": "batch"}})
    given = replace(subject, method=batched.method)
    assert conversations.by_turn(given, agreeing).remedy == "Use method: opd."
    plain = replace(subject, method=replace(subject.method, memory={}))
    assert conversations.by_turn(plain, agreeing).level == "ok"


def test_environment_that_raises_is_a_change():
    lm = characters("student", seed=1)
    environment = {**ENVIRONMENT, "name": "commands.test_doctor_conversations:failing", "options": {}}
    one = pair_of(lm, characters("teacher", seed=2), sums(6), **{**STAGE, "environment": environment})
    finding = conversations.environment(one)
    assert finding.level == "change"
    assert finding.numbers["errors"] > 0
    assert "actions raised or took too long" in finding.says


TOOLS = {"tools": ["calculator"], "max_turns": 3}


@pytest.mark.parametrize(
    ("environment", "sampling", "level"),
    [
        (TOOLS, {}, "change"),  # an end without a call
        (TOOLS, {"max_completion_length": 1, "stop": []}, "cut"),
        ({**ENVIRONMENT, "max_turns": 1}, {}, "ok"),  # a game of one turn
        ({**ENVIRONMENT, "name": "commands.test_doctor_conversations:raising", "options": {}}, {}, "raised"),
    ],
)
def test_one_turn_is_a_change_where_tools_are_not_called(environment: Any, sampling: Any, level: str):
    """Not where a limit cut the turn, where the action failed, or where a game has one turn."""
    stage = {**STAGE, "environment": environment, "sampling": {**STAGE["sampling"], **sampling}, "method": "opd"}
    finding = conversations.environment(
        pair_of(characters("student", seed=1), characters("teacher", seed=2), sums(6), **stage)
    )
    assert finding.level == ("ok" if level == "ok" else "change")
    assert ("takes no part" in finding.says) == (level == "change")
    assert ("sft" in (finding.remedy or "")) == (level == "change")


def test_end_of_each_answered_turn_is_an_end():
    own = [True, True, False, False, True, True]
    one = rollout_of(characters("student", seed=1), Prompt(id=0, content="1"), [3, 5, 7, 8, 3, 5], trained=own)
    one = replace(one, turn=torch.tensor([0, 0, 1, 1, 1, 1]), finished=False)
    ends, others = kinds_of([one], frozenset({5}))
    assert ends.tolist() == [False, True, False, False]
    assert others.tolist() == [False, False, False, True]
    assert kinds_of([replace(one, finished=True)], frozenset({5}))[0].tolist() == [False, True, False, True]
