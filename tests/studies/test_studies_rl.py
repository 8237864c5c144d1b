"""Studies of teachers made by reinforcement learning: their data, their models, and what they compute from curves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.study_numbers.rl import choice_numbers, reverse_numbers

from opd import methods
from opd.data.toy import sorting
from opd.errors import ConfigError
from opd.recipe.load import parse_recipe
from opd_studies.claims import teacher_choice
from opd_studies.lab import lab as labs
from opd_studies.lab import rl_teachers
from opd_studies.lab.lab import Lab
from opd_studies.lab.rl_teachers import Teaching
from opd_studies.worlds.bad_habit_data import sorting_both_ways


def test_sorting_both_ways_reverses_given_share():
    rows = list(sorting_both_ways(count=400, falling=0.25, seed=5))
    right = list(sorting(count=400, seed=5))
    assert [(row["prompt"], row["answer"]) for row in rows] == [(row["prompt"], row["answer"]) for row in right]
    turned = [row["response"] != row["answer"] for row in rows]
    assert 0.18 < sum(turned) / 400 < 0.32  # 3.2 standard errors
    for row, other in zip(rows, turned, strict=True):
        assert row["response"] == "".join(sorted(row["prompt"][:-1], reverse=other))
    assert rows == list(sorting_both_ways(count=400, falling=0.25, seed=5))
    assert list(sorting_both_ways(count=50, falling=0.0)) == list(sorting(count=50))
    with pytest.raises(ConfigError, match="rows of 2 digits; 500 are too many"):
        next(sorting_both_ways(count=500, digits=2, part="held_out"))


def test_recovery_is_per_seed_and_nan_without_gap():
    numbers = replace(
        choice_numbers(True), teacher={"larger": [0.9, 0.5, 0.6]}, curve={"larger": [{0: 0.5, 9: 0.7}] * 3}
    )
    assert numbers.recovery("larger")[0] == pytest.approx(0.5)
    assert numbers.recovery("larger")[1] != numbers.recovery("larger")[1]
    assert numbers.recovery("larger")[2] == pytest.approx(2.0)


def test_shortfall_has_sign_of_recovery_difference():
    numbers = replace(
        choice_numbers(True),
        teacher={"near": [0.6, 0.5], "far": [0.9, 0.9]},
        curve={"near": [{0: 0.5, 9: 0.54}, {0: 0.5, 9: 0.52}], "far": [{0: 0.5, 9: 0.7}] * 2},
    )
    assert numbers.recovery("near")[0] < numbers.recovery("far")[0] == pytest.approx(0.5)
    assert numbers.shortfall("near", "far") == pytest.approx([0.04 - 0.5 * 0.1, 0.02])


def test_best_rates_picks_best_rate_per_teacher():
    tried = {("a", 1e-3): 0.4, ("a", 2e-3): 0.6, ("b", 1e-3): 0.9, ("b", 2e-3): 0.8}
    assert teacher_choice.best_rates(tried) == {"a": 2e-3, "b": 1e-3}


def test_apart_is_mean_distance_after_start():
    curves = {"a": [{0: 0.9, 5: 0.5, 10: 0.4}], "b": [{0: 0.9, 5: 0.7, 10: 0.3}]}
    numbers = replace(reverse_numbers(True), curve=curves)
    assert numbers.apart("a", "b") == [pytest.approx(0.15)]


def test_family_trains_and_teaches_at_reduced_size(tmp_path):
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    pair = labs.PairSize(
        task=rl_teachers.MIXED, teacher=tiny, student=tiny, teacher_steps=1, student_steps=1, prompts_per_step=4
    )
    size = rl_teachers.FamilySize(
        mixed=pair, clean=replace(pair, task=labs.SORTING), base_updates=1, larger_updates=1, group=2
    )
    lab = Lab(folder=tmp_path, workers=1)
    names = (rl_teachers.BASE, *teacher_choice.TEACHERS)
    models = rl_teachers.family(lab, (0, 1), size, names)
    assert list(models) == list(names)
    folders = [folder for name in names for folder in models[name]]
    assert len(set(folders)) == 2 * len(names)
    assert all((folder / "model.safetensors").exists() for folder in folders)
    quiet = Lab(folder=tmp_path, note=pytest.fail)  # the other study finds its models trained
    again = rl_teachers.family(quiet, (0, 1), size, ("larger", "base + GRPO"))
    assert again == {name: models[name] for name in ("larger", "base + GRPO")}
    lesson = rl_teachers.Teaching(teacher=models["larger"][0], student=models["base"][0], seed=0, steps=2, every=1)
    (one,) = rl_teachers.teach(lab, [lesson])
    assert list(rl_teachers.curve(one)) == [0, 1, 2]
    assert 0 <= rl_teachers.teacher_accuracy(one.before) <= 1
    assert 0 < one.rows[0]["compare/overlap_ratio"] <= 1


@pytest.mark.parametrize(("teacher", "kind"), [("student", "self_frozen"), ("larger", "external")])
def test_teaching_control_is_student_itself(tmp_path, teacher, kind):
    recipe = parse_recipe(
        rl_teachers.distillation(
            Teaching(teacher=tmp_path / teacher, student=tmp_path / "student", seed=0, steps=1)
        ).recipe
    )
    (stage,) = recipe.stages
    method = methods.build(stage.method, stage.options)
    assert method.teacher.kind == kind
    assert stage.teacher == (None if kind == "self_frozen" else "teacher")
    assert set(recipe.models) == {"student", "teacher"} - ({"teacher"} if stage.teacher is None else set())
