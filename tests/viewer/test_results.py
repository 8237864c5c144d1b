"""Held-out numbers of a page: the columns, the reward's own name, paired differences."""

import numpy as np
import pytest
from support.run_folders import write

from opd.viewer.pairs import paired
from opd.viewer.read import StageView, read_run
from opd.viewer.results import columns_of, divergences, labels_of, reward_of, settings, tasks_of


def stage_of(folder, **changes):
    return read_run(write(folder / "run", **changes)).stages["distil"]


def rewards(stage, when, task, setting):
    rows = stage.held_out(when, ["task", "sampling", "reward"])
    every = zip(rows.values("task"), rows.values("sampling"), rows.values("reward"), strict=True)
    return [reward for one, name, reward in every if (one, name) == (task, setting)]


def test_columns_are_before_teacher_and_after(tmp_path):
    stage = stage_of(tmp_path)
    columns = columns_of(stage, None)
    assert list(columns) == ["before", "teacher", "after"]
    for name, when in (("before", "before"), ("teacher", "teacher"), ("after", "step_000020")):
        assert columns[name]["greedy/reward"] == pytest.approx(np.mean(rewards(stage, when, None, "greedy")))
    assert "reverse_kl" not in columns["teacher"]


def test_columns_of_tasks_have_their_own_teacher(tmp_path):
    stage = stage_of(tmp_path, tasks=("alpha", "beta"))
    assert list(tasks_of(stage)) == ["alpha", "beta"]
    for task in ("alpha", "beta"):
        expected = np.mean(rewards(stage, "teacher", task, "sampled"))
        assert columns_of(stage, task)["teacher"]["sampled/reward"] == pytest.approx(expected)
    assert [one.title for one in settings(stage)] == [
        *("alpha, greedy", "alpha, sampled", "beta, greedy", "beta, sampled"),
    ]


def test_settings_name_the_reward_unless_it_declares_correctness(tmp_path):
    one = settings(stage_of(tmp_path / "a"))[0]
    assert (one.reward, one.up) == ("max_words", "max_words 0 \u2192 1")
    assert one.rows[0][0] == "max_words"
    right = settings(stage_of(tmp_path / "b", reward="exact", correctness=True))[0]
    assert right.up == "wrong \u2192 right"
    assert reward_of(stage_of(tmp_path / "c", old=True), None) == ("max_words", False)


def test_paired_difference_counts_prompts_that_changed(tmp_path):
    stage = stage_of(tmp_path, prompts=40)
    one = settings(stage)[0]
    before, after = (rewards(stage, when, None, "greedy") for when in ("before", "step_000020"))
    assert one.paired is not None
    assert one.paired.only_second == sum(a == 0 and b == 1 for a, b in zip(before, after, strict=True))
    assert one.paired.only_first == sum(a == 1 and b == 0 for a, b in zip(before, after, strict=True))
    assert one.paired.difference.mean == pytest.approx(np.mean(after) - np.mean(before))
    assert one.paired.difference.low < one.paired.difference.mean < one.paired.difference.high


def test_rewards_that_are_no_shares_have_no_pairs(tmp_path):
    one = settings(stage_of(tmp_path, shares=False))[0]
    assert one.paired is not None
    assert (one.paired.only_first, one.paired.p) == (None, None)
    assert "%" not in one.rows[0][1][0].text


def test_labels_name_the_step_of_an_unfinished_stage(tmp_path):
    assert labels_of(stage_of(tmp_path / "a"))["after"] == "after"
    assert labels_of(stage_of(tmp_path / "b", planned=40))["after"] == "step 20"


def test_divergences_leave_the_teacher_empty(tmp_path):
    rows = divergences(stage_of(tmp_path))
    assert [label.partition(",")[0] for label, _ in rows] == ["KL(p‖q)", "KL(q‖p)"]
    assert [cell.text for cell in rows[0][1]] == ["0.400", "", "0.400"]


def test_paired_uses_prompts_of_both_alone():
    found = paired({1: [0.0], 2: [1.0], 3: [1.0]}, {2: [0.0], 3: [1.0], 4: [1.0]})
    assert found is not None
    assert (found.prompts, found.only_first, found.only_second, found.both) == (2, 1, 0, 1)
    assert (found.first, found.second, found.difference.mean) == (1.0, 0.5, -0.5)
    assert found.p == 1.0
    assert paired({1: [0.0]}, {2: [1.0]}) is None
    several = paired({1: [0.0, 1.0]}, {1: [1.0, 1.0]})
    assert several is not None
    assert (several.difference.mean, several.p) == (0.5, None)


def test_task_without_reward_of_its_evaluation_has_that_of_its_training(tmp_path):
    tasks = {"sums": {"evaluate": {}, "reward": {"name": "final_number"}}, "words": {"reward": {"name": "exact"}}}
    keys = {"reward": {"name": "final_number, exact", "correctness": True}}
    stage = StageView("distil", tmp_path, {"name": "distil", "tasks": tasks}, keys=keys)
    assert reward_of(stage, "sums") == ("final_number", True)
    assert reward_of(stage, "words") == ("exact", True)
