"""The audit of a reward: what it pays for wrong texts and for forms of the right answer, and its verdict."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opd.data.prompts import load_prompts
from opd.recipe.schema import DataSection
from opd.rewards.audit import REFERENCE, RIGHT, WRONG, audit, texts_of
from opd.rewards.base import watched
from opd.rewards.registry import as_reward, load_reward
from opd.types import Prompt, Reward, Rollout


def rows(*answers: Any, **fields: Any) -> list[Prompt]:
    return [Prompt(id=i, content="?", answer=answer, **fields) for i, answer in enumerate(answers)]


def test_exact_tells_right_from_wrong_and_pays_one_form():
    found = audit(load_reward("exact", {}), rows("3", "5", "5", "x"))
    assert found is not None
    assert (found.level, found.verdict, found.rows) == ("ok", None, 4)
    assert found.right == {kind: float(kind == "the answer") for kind in RIGHT}
    assert found.wrong == dict.fromkeys(WRONG, 0.0)  # the mean over the rows that have such a text
    assert found.line.startswith("the reward exact pays on 4 rows: right: the answer 1.00, in a sentence 0.00")


def test_reward_that_pays_any_text_is_a_stop():
    found = audit(as_reward(lambda prompt, text: 1.0), rows("3", "5"))
    assert found is not None
    assert found.level == "stop"
    assert "cannot tell right from wrong: an empty text is paid 1.00, the right answer at most 1.00" in str(
        found.verdict
    )


def test_reward_that_pays_another_answer_in_part_is_a_change():
    found = audit(as_reward(lambda prompt, text: 1.0 if text == prompt.answer else 0.25 * bool(text)), rows("3", "5"))
    assert found is not None
    assert found.level == "change"
    paid = '"hello" 0.25, another row\'s answer 0.25, a longer number 0.25'
    assert found.verdict == f"It pays wrong texts in part: {paid}."


def test_reward_that_pays_no_form_is_a_change_unless_the_response_is_paid():
    asks = load_reward("regex", {"pattern": r"Final: (\d)", "group": 1})
    found = audit(asks, rows("3", "5"))
    assert found is not None
    assert (found.level, found.best) == ("change", 0.0)
    assert "None of these forms of the right answer is paid" in str(found.verdict)
    shown = audit(asks, rows("3", response="Final: 3"))
    assert shown is not None
    assert (shown.level, shown.right[REFERENCE]) == ("ok", 1.0)


def test_failures_are_counted_with_the_first_reason():
    def picky(prompt: Prompt, text: str) -> float:
        if text == "hello":
            raise ValueError("no number")
        return float(text == prompt.answer)

    for reward in (as_reward(picky), watched(as_reward(picky))):
        found = audit(reward, rows("3", "5"))
        assert found is not None
        assert (found.level, found.failed, found.texts) == ("change", 2, 20)
        assert '"hello"' not in found.wrong
        assert found.verdict == "It failed on 2 of 20 texts: no number."


class Longest(Reward):
    name = "longest"
    needs = frozenset({"answer"})

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        return [replace(one, reward=float(len(one.text))) for one in rollouts]


def test_user_reward_is_audited_and_rewards_without_answers_are_not():
    found = audit(Longest(), rows("3", "5"))
    assert found is not None
    assert (found.level, found.worst, found.best) == ("change", 5.0, 18.0)  # "hello", "<answer>3</answer>"
    assert audit(load_reward("max_words", {"n": 5}), rows("3")) is None
    assert audit(load_reward("exact", {}), rows(None, " ")) is None
    judged = load_reward("rubric", {"judge": _judge()})
    assert audit(judged, rows("3")) is None


def _judge() -> Any:
    from opd.recipe.schema import JudgeSection

    return JudgeSection(function="json:dumps")


def test_texts_leave_out_another_answer_where_all_are_equal():
    prompts = rows("Yes", "yes")
    assert set(WRONG) - set(texts_of(prompts[0], prompts, 0)) == {"another row's answer", "a longer number"}
    numbers = texts_of(rows("3", "5")[0], rows("3", "5"), 0)
    assert [numbers[kind] for kind in WRONG] == ["", "hello", "5", "13"]


def test_audit_stops_after_its_seconds_and_spreads_its_rows():
    seen: list[int] = []

    def slow(prompt: Prompt, text: str) -> float:
        seen.append(prompt.id)
        time.sleep(0.002)
        return float(text == prompt.answer)

    found = audit(as_reward(slow), rows(*map(str, range(100))), rows=4)
    assert found is not None
    assert sorted(set(seen)) == [0, 25, 50, 75]
    cut = audit(as_reward(slow), rows("1", "2", "3"), seconds=0.001)
    assert cut is not None
    assert cut.rows == 1


@pytest.mark.parametrize(
    ("task", "level"), [("game_of_life_halting", "stop"), ("gcd", "change"), ("word_sorting", "ok")]
)
def test_audit_of_reasoning_gym_tasks(task, level):
    pytest.importorskip("reasoning_gym")
    prompts = load_prompts(DataSection(path=f"reasoning_gym:{task}", limit=5))
    found = audit(load_reward("reasoning_gym", {}), prompts)
    assert found is not None
    assert found.level == level


def test_page_counts_the_tasks_of_its_table():
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "| 1.00 |" in line]
    names = next(line for line in page.splitlines() if line.startswith("| task | level |"))
    columns = [cell.strip() for cell in names.strip("|").split("|")]
    audited = [dict(zip(columns, row, strict=True)) for row in table if row[1] in ("stop", "change", "ok")]
    levels = [row["level"] for row in audited]
    words = " ".join(page.split())
    assert f"{len(audited)} of 106 tasks can be audited" in words
    assert f"{levels.count('stop')} are a stop, {levels.count('change')} a change" in words
    paid = [sum(float(row[kind] or 0) > 0 for row in audited) for kind in ("empty", "hello", "another's", "longer")]
    assert (
        'An empty text is paid by {} tasks, "hello" by {}, another row\'s answer by {}, a longer number by {}'.format(
            *paid
        )
        in words
    )
