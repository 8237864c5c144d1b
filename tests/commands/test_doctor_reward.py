"""The doctor's audit of a reward: one that cannot tell right from wrong stops, before any model is loaded."""

from __future__ import annotations

from typing import Any

from support.doctor import recipe_of, sums

from opd.commands.doctor.findings import Finding, verdict
from opd.commands.doctor.reward import reward_audit
from opd.evaluation.evaluate import HeldOut
from opd.recipe.schema import JudgeSection
from opd.rewards.registry import as_reward, load_reward
from opd.runs.prepare import Task
from opd.types import Prompt, Reward, Sampling


def audited(reward: Reward | None, held_out: Reward | None = None) -> Finding:
    measured = None
    if held_out is not None:
        measured = HeldOut(prompts=sums(8), sampling={"sampled": Sampling()}, reward=held_out, seed=0)
    (spec,) = recipe_of().stages
    return reward_audit(spec, Task(prompts=sums(8), reward=reward, held_out=measured))


def always(prompt: Prompt, text: str) -> float:
    return 1.0


def part(prompt: Prompt, text: str) -> float:
    return 1.0 if text == str(prompt.answer) else 0.5


def broken(prompt: Prompt, text: str) -> Any:
    return {}[text]


def test_reward_that_pays_anything_stops():
    found = audited(as_reward(always))
    assert (found.name, found.level, verdict([found])) == ("reward/audit", "stop", "stop")
    assert "It cannot tell right from wrong: an empty text is paid 1.00" in found.says
    assert "Change reward of stage 'distil'" in found.remedy


def test_reward_that_pays_in_part_or_raises_is_a_change():
    assert audited(as_reward(part)).level == "change"
    raises = audited(as_reward(broken))
    assert raises.level == "change"
    assert raises.numbers["failed"] == raises.numbers["texts"]
    assert "It failed on " in raises.says


def test_reward_that_tells_right_from_wrong_is_ok():
    found = audited(load_reward("final_number", {}))
    assert (found.level, found.remedy) == ("ok", "")
    assert found.numbers["right"]["in a sentence"] == 1.0  # type: ignore[index]
    assert found.numbers["rows"] == 8


def test_evaluation_reward_is_audited_where_the_stage_has_none():
    found = audited(None, as_reward(always))
    assert found.level == "stop"
    assert "Change evaluate.reward of stage 'distil'" in found.remedy


def test_audit_is_skipped_without_a_reward_that_reads_answers():
    judged = load_reward("rubric", {"judge": JudgeSection(function="json:dumps")})
    for reward in (None, load_reward("max_words", {"n": 3}), judged):
        assert audited(reward).level == "skipped"
