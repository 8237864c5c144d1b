"""Rewards whose function raises, exits, hangs or returns nonsense: stopped, dropped and counted, or only watched."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.rollouts import text_rollout

from opd.errors import ConfigError, DataError, TrainingError
from opd.evaluation.evaluate import summary
from opd.models.ticks import running
from opd.recipe.schema import RewardSection
from opd.rewards.base import TIMED_OUT, FunctionReward, StageRewards, check_readable, watched
from opd.rewards.calls import TooLongError, Waiting, called
from opd.rewards.registry import load_reward, reward_of
from opd.types import Prompt, Reward, Rollout


def rollout(text: str, prompt: int = 0, answer: Any = None) -> Rollout:
    return text_rollout(text, Prompt(id=prompt, content="?", answer=answer))


class Panic(BaseException):
    """What a library in Rust raises for a fault of its own."""


def picky(prompt: Prompt, text: str) -> Any:
    """Fails for the texts that the tests name."""
    if text == "raise":
        raise KeyError("points")
    if text == "exit":
        sys.exit("bye")
    if text == "panic":
        raise Panic("index out of range")
    if text == "sleep":
        time.sleep(5)
    if text == "swallow":
        try:
            time.sleep(5)
        except Exception:
            return 7.0
    return {"none": None, "huge": 10**400, "digits": 10**9999, "late": TIMED_OUT}.get(text, 1.0)


def reward_for(**settings: Any) -> FunctionReward:
    return FunctionReward(name="picky", function=picky, **settings)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("raise", r"raised KeyError on prompt 0, response 'raise': 'points'"),
        ("exit", r"raised SystemExit on prompt 0, response 'exit': bye"),
        ("panic", r"raised RuntimeError on prompt 0, response 'panic': Panic: index out of range"),
        ("none", r"returned None \(NoneType\)"),
        ("huge", r"returned 1000+.* \(int\)"),
        ("digits", r"returned a value that cannot be shown \(ValueError\) \(int\)"),
        ("sleep", r"raised TooLongError .*: it took longer than 0.05 s"),
        ("swallow", r"raised TooLongError .*: it took longer than 0.05 s"),
    ],
)
def test_failure_stops_or_is_dropped_and_counted(text, why):
    limit = 0.05 if text in ("sleep", "swallow") else None
    with pytest.raises(TrainingError, match=rf"The reward 'picky' {why}.*`on_error: drop`"):
        reward_for(timeout_s=limit)([rollout(text)])
    good, bad = reward_for(timeout_s=limit, on_error="drop")([rollout("fine"), rollout(text)])
    assert (good.reward, good.reward_failure) == (1.0, None)
    assert (bad.reward, bad.reward_failure) == (None, "failed")
    assert str(bad.unjudged).startswith("the reward 'picky' r")


@pytest.mark.parametrize("limit", [None, 5])
def test_reward_that_changes_folder_leaves_the_working_folder(tmp_path: Path, limit: float | None):
    """A grader that runs programs in a temporary folder; the run's own paths are relative."""

    def moves(prompt: Prompt, text: str) -> float:
        os.chdir(tmp_path)
        return {"fine": 1.0}[text]

    here = Path.cwd()
    reward = FunctionReward(name="moves", function=moves, timeout_s=limit, on_error="drop")
    assert [one.reward for one in reward([rollout("fine"), rollout("raise")])] == [1.0, None]
    assert Path.cwd() == here


def test_panic_within_a_limit_is_the_rewards_error():
    with pytest.raises(TrainingError, match=r"raised RuntimeError .*: Panic: index out of range"):
        reward_for(timeout_s=5)([rollout("panic")])


def test_keyboard_interrupt_is_no_failure_of_the_reward():
    def interrupted(prompt: Prompt, text: str) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FunctionReward(name="f", function=interrupted, on_error="drop")([rollout("a")])


def test_too_many_dropped_groups_end_the_run():
    rows = [rollout("raise", 0), rollout("a", 0), *(rollout("a", i) for i in range(1, 10))]
    StageRewards(by_task={None: reward_for(on_error="drop", max_failed=0.1)})(rows)
    message = r"'picky' got no answer for 1 of this step's 10 groups .*allows 5%\. For prompt 0: .*raised KeyError"
    with pytest.raises(TrainingError, match=message):
        StageRewards(by_task={None: reward_for(on_error="drop", max_failed=0.05)})(rows)


def test_reward_cut_off_at_its_own_limit_counts_as_zero():
    (late,) = reward_for()([rollout("late")])
    assert (late.reward, late.reward_failure, late.unjudged) == (0.0, "timed_out", None)


class Broken(Reward):
    name = "broken"

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        if rollouts[0].text == "raise":
            raise OSError("no disk")
        return [replace(one, reward=0.5) for one in rollouts[: 1 if rollouts[0].text == "short" else None]]


def test_watched_reward_stops_nothing():
    for text in ("raise", "exit", "none"):
        (one,) = StageRewards(by_task={None: watched(reward_for())})([rollout(text)])
        assert (one.reward, one.reward_failure) == (None, "failed")
    shown = watched(Broken())
    assert (shown.name, shown.comparable, watched(shown)) == ("broken", True, shown)
    assert [one.reward for one in shown([rollout("a"), rollout("b")])] == [0.5, 0.5]
    for text, why in (("raise", "OSError: no disk"), ("short", "TrainingError: The reward 'broken' got 2 rollouts")):
        found = StageRewards(by_task={None: shown})([rollout(text), rollout("b")])
        assert [one.reward_failure for one in found] == ["failed", "failed"]
        assert all(str(one.unjudged).startswith(why) for one in found)


def test_summary_counts_failures_and_leaves_their_prompts_out():
    rows = [rollout("a", 0), rollout("raise", 1), rollout("a", 1), rollout("late", 2)]
    found = summary(watched(reward_for())(rows))
    assert (found["rewards_failed"], found["rewards_timed_out"], found["reward"]) == (1.0, 1.0, 0.5)
    assert "reward" not in summary(watched(reward_for())([rollout("raise")]))
    assert "rewards_failed" not in summary(reward_for()([rollout("a")]))


def test_called_limits_time_in_the_main_thread_and_notices_it_in_others():
    assert called(lambda: 3, 1.0) == 3
    results: list[str] = []

    def elsewhere() -> None:
        try:
            called(lambda: time.sleep(0.05), 0.01)
        except TooLongError as error:
            results.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "longer than 0.01 s" in results[0]


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)


def test_waiting_says_what_is_waited_for_at_growing_intervals():
    lines: list[str] = []
    with Waiting(first_s=0.05, out=lines.append) as waiting:
        waiting.now("the reward 'mine:run' on prompt 3")
        wait_for(lambda: len(lines) >= 2)
        waiting.now("another")
        wait_for(lambda: any("another" in line for line in lines))
    assert lines[0].startswith("waiting for the reward 'mine:run' on prompt 3: ")
    with Waiting(first_s=60, out=lines.append) as waiting:
        waiting.now("something short")
    assert not any("short" in line for line in lines)


def test_reward_of_section_passes_settings_to_functions_alone():
    section = RewardSection(name="exact", on_error="drop", max_failed=0.5, timeout_s=3)
    reward = reward_of(section)
    assert isinstance(reward, FunctionReward)
    assert (reward.on_error, reward.max_failed, reward.timeout_s) == ("drop", 0.5, 3.0)
    with pytest.raises(ConfigError, match=r"got `max_failed: 0.5`, but its `on_error: stop` ends the run"):
        reward_of(RewardSection(name="exact", max_failed=0.5))
    judged = {"name": "rubric", "judge": {"function": "json:dumps"}, "on_error": "drop"}
    with pytest.raises(ConfigError, match=r"'rubric' does not read on_error, which are for functions"):
        reward_of(RewardSection(**judged))


@pytest.mark.parametrize(
    ("name", "answers", "message"),
    [
        (
            "final_number",
            ["3", "none", "x"],
            r"'final_number' cannot read 2 of 3 rows \(rows 1, 2\); of row 1: its",
        ),
        (
            "math_verify",
            ["3", " "],
            r"'math_verify' cannot read 1 of 2 rows \(rows 1\); of row 1: its `answer` is",
        ),
        ("reasoning_gym", ["3"], r"cannot read 1 of 1 rows .*: it is no row of `reasoning_gym:TASK`"),
    ],
)
def test_check_readable_names_rows_that_a_reward_cannot_read(name, answers, message):
    pytest.importorskip("math_verify")
    pytest.importorskip("reasoning_gym")
    rows = [Prompt(id=i, content="?", answer=answer) for i, answer in enumerate(answers)]
    with pytest.raises(DataError, match=f"^Here: the reward {message if message[0] == chr(39) else '.*' + message}"):
        check_readable(load_reward(name, {}), rows, "Here")
    check_readable(load_reward("exact", {}), rows, "Here")
    check_readable(None, rows, "Here")


def test_long_rewards_are_counted_for_the_display():
    seen: list[str] = []
    reward = FunctionReward(name="seen", function=lambda prompt, text: float(seen.append(running()) is None))
    assert [one.reward for one in reward([rollout("a"), rollout("b")])] == [1.0, 1.0]
    assert seen == ["0/2 responses rewarded", "1/2 responses rewarded"]
