"""The choice among a teacher's responses: tiers, overlaps, leaks and the settings that are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import prompts_of, teacher_of, tiny, writers_of

from opd import methods
from opd.errors import ConfigError
from opd.loss.step import scored, written
from opd.method import Method
from opd.pieces.best_of_n import MARKER, TEACHERS_ROWS, BestOfN, forced_overlap, positional_overlap, right
from opd.pieces.needs import Input
from opd.types import Prompt, Record, Rollout, Sampling

PROMPT = Prompt(id=0, content="a", answer="b")
SAMPLING = Sampling(max_completion_length=6, n=2)


def response(ids: Sequence[int], tops: Sequence[Sequence[int]] | None = None) -> Rollout:
    n = len(ids)
    return Rollout(
        prompt=PROMPT,
        sample=0,
        prompt_ids=(1,),
        response_ids=torch.tensor(ids),
        trained=torch.ones(n, dtype=torch.bool),
        turn=torch.zeros(n, dtype=torch.long),
        finished=True,
        text="",
        student_top_ids=None if tops is None else torch.tensor(tops),
    )


def test_overlap_compares_places_and_forced_overlap_prefixes():
    """The same 20 tokens one place later: from 1.00 to .05, while the student still follows the teacher's text."""
    ids = [*range(10, 30)]
    own = response(ids, [[v, 0, 1] for v in ids])
    later = response([9, *ids], [[8, 0, 1], *([v, 0, 1] for v in ids)])
    assert positional_overlap([own], response(ids), 3) == 1.0
    assert positional_overlap([own], later, 3) == 0.0  # of different tokens, none is in its place
    assert positional_overlap([own], response([10, *ids]), 3) == pytest.approx(0.05)
    assert forced_overlap(later, 3) == pytest.approx(20 / 21)


def test_overlap_reads_k_tokens_common_places_and_all_responses():
    own, other = response([2, 3, 4], [[2, 5], [5, 3], [4, 6]]), response([7], [[7, 2]])
    assert positional_overlap([own], response([2, 3]), 1) == 0.5  # 3 is second at its place
    assert positional_overlap([own], response([2, 3]), 2) == 1.0
    assert positional_overlap([own], response([2, 3, 4, 9, 9, 9]), 2) == 1.0  # nothing to compare beyond its end
    assert positional_overlap([own, other], response([2, 9, 9]), 2) == pytest.approx((1 / 3 + 1) / 2)


def by_text(*rewards: float) -> Any:
    """A reward by a teacher's sample number, 0 for the student."""

    def reward(rollouts: Sequence[Rollout]) -> list[Rollout]:
        written = [r.sampler_logp is None for r in rollouts]
        return [replace(r, reward=rewards[r.sample] if w else 0.0) for r, w in zip(rollouts, written, strict=True)]

    return reward


def rows(reward: Any, prompts: Sequence[Prompt] = (PROMPT,), **options: Any) -> list[Rollout]:
    """The rows of a step of brts; its hint is the letter h."""
    student, external = tiny(), tiny(seed=1)
    options = {"k": 3, "n": 2, "hint": "{answer}h{prompt}", "marker": "h", **options}
    method = methods.build("brts", options)
    return written(method, prompts, writers_of(student, external, SAMPLING), reward, (0, 0))


def tier_of(row: Rollout) -> int:
    (tier,) = [i for i in (1, 2, 3) if row.measured[f"tier_{i}"] == 1.0]
    return tier


@pytest.mark.parametrize(
    ("rewards", "options", "tier", "sample"),
    [
        ((0.0, 1.0, 1.0), {}, 1, 1),
        ((1.0, 1.0, 1.0), {"pick": "first"}, 1, 0),
        ((0.0, 0.0, 1.0), {"marker": "h"}, 2, 2),
        ((0.0, 0.0, 0.0), {"pick": "first"}, 3, 0),
        ((0.0, 0.0, 1.0), {"hinted": 0, "pick": "first"}, 3, 0),
        ((0.0, 0.0, 0.0, 1.0), {"hinted": 2}, 2, 3),
        ((0.9, 1.0, 1.0), {}, 1, 1),  # below the threshold of a right response
    ],
)
def test_row_comes_from_the_first_tier_that_has_one(rewards: Any, options: Any, tier: int, sample: int):
    made = rows(by_text(*rewards), **options)
    *students, row = made
    assert [one.part for one in students] == ["", ""]
    if tier == 2 and "h" in row.text:
        pytest.fail("this seed's hinted response repeats the marker; choose another")
    assert (tier_of(row), row.sample, row.part) == (tier, sample, TEACHERS_ROWS)
    assert row.measured["right"] == float(tier < 3) == float(right(row))
    assert row.prompt == PROMPT  # the student does not read the hint
    assert row.sampler_logp is None
    assert row.student_top_ids is not None
    assert ("leaked" in row.measured) == (options.get("hinted", 1) > 0 and not any(r >= 1 for r in rewards[:2]))


def test_hinted_response_with_the_marker_is_not_taken():
    prompts = [
        replace(PROMPT, id=i, content=text) for i, text in enumerate(["a", "bc", "d", "efg", "b", "cd", "e", "f"])
    ]
    teachers = [row for row in rows(by_text(0.0, 0.0, 1.0), prompts) if row.part]
    by_tier = {tier: [row for row in teachers if tier_of(row) == tier] for tier in (2, 3)}
    assert all("h" not in row.text and row.measured["leaked"] == 0.0 for row in by_tier[2])
    assert all(row.sample < 2 and row.measured["leaked"] == 1.0 for row in by_tier[3])
    assert min(map(len, by_tier.values())) >= 1


def test_prompt_without_right_response_is_left_out_when_skipped():
    prompts = [PROMPT, replace(PROMPT, id=1)]

    def reward(rollouts: Sequence[Rollout]) -> list[Rollout]:
        return [replace(r, reward=float(r.prompt.id == 1)) for r in rollouts]

    made = rows(reward, prompts, fallback="skip")
    assert [(r.part, r.prompt.id) for r in made] == [("", 0), ("", 0), ("", 1), ("", 1), (TEACHERS_ROWS, 1)]
    assert [r.part for r in rows(by_text(0.0, 0.0, 0.0), fallback="skip")] == ["", ""]


def test_shortest_and_overlap_choose_by_their_number():
    everything = by_text(*[1.0] * 8)
    prompts = prompts_of("a", "bc", "d", "efg")
    prompts = [replace(prompt, answer="b") for prompt in prompts]
    chosen = {pick: rows(everything, prompts, n=8, pick=pick)[-4:] for pick in ("first", "shortest", "overlap")}
    lengths = {pick: [len(r.response_ids) for r in made] for pick, made in chosen.items()}
    overlaps = {pick: [r.measured["overlap_positional"] for r in made] for pick, made in chosen.items()}
    assert all(a <= b for a, b in zip(lengths["shortest"], lengths["first"], strict=True))
    assert all(a >= b for a, b in zip(overlaps["overlap"], overlaps["first"], strict=True))
    assert lengths["shortest"] != lengths["first"]
    assert overlaps["overlap"] != overlaps["first"]
    forced = rows(everything, prompts, n=8, overlap="forced")[-4:]
    assert sum(r.measured["overlap_forced"] for r in forced) >= sum(
        r.measured["overlap_forced"] for r in chosen["overlap"]
    )


def test_rewards_are_called_equally_often_with_and_without_open_prompts():
    """Rewards may be collective: a process whose prompts are all right calls as often as the others."""
    calls: list[list[int]] = []
    for values in ((1.0, 1.0, 1.0), (0.0, 0.0, 1.0)):
        sizes: list[int] = []
        inner = by_text(*values)

        def reward(rollouts: Sequence[Rollout], inner: Any = inner, sizes: list[int] = sizes) -> list[Rollout]:
            sizes.append(len(rollouts))
            return inner(rollouts)

        rows(reward)
        calls.append(sizes)
    assert calls == [[2, 0, 2], [2, 1, 2]]


def test_step_of_brts_is_both_terms():
    student, external = tiny(), tiny(seed=1)
    method = methods.build("brts", {"k": 3, "n": 2, "hinted": 0, "weight": 4.0})
    made = written(method, [PROMPT], writers_of(student, external, SAMPLING), by_text(1.0, 1.0), (0, 0))
    teacher = teacher_of(method, student, external)
    phase = scored(method, teacher, made, method.context(made), method.request(), student.device)
    (part,) = phase.parts.values()
    assert part.count == len(made[-1].response_ids) / 4.0
    assert phase.count == sum(len(r.response_ids) for r in made[:-1])
    assert part.batch.rollouts[0].part == TEACHERS_ROWS


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": 0}, r"n = 0 responses.*Set n to 1 or more"),
        ({"hinted": -1}, r"-1 more with the answer shown.*`hinted` to 0 or more"),
        ({"hint": "{prompt}", "marker": "x"}, r"has to contain \{answer\} and the marker 'x'"),
        ({"marker": "other"}, r"has to contain \{answer\} and the marker 'other'"),
        ({"marker": ""}, r"has to contain \{answer\} and the marker ''"),
        ({"k": 0}, r"k of at least 1, got 0"),
        ({"weight": 0}, r"has the factor 0.*above 0"),
        ({"hint": MARKER + "{answer}"}, r"prompt"),
    ],
)
def test_brts_refuses_settings_without_a_meaning(options: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        methods.build("brts", options)


def test_brts_declares_its_needs():
    needs = methods.build("brts", {}).needs
    assert {Input.REWARD, Input.TEACHER_MODEL} <= needs.inputs
    assert "answer" in needs.columns
    assert "answer" not in methods.build("brts", {"hinted": 0}).needs.columns
    method: Method = methods.build("brts", {"k": 5})
    assert method.record() == Record(top_k=5)
    assert BestOfN().hint.count(MARKER) == 1
