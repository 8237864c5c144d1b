"""Two teachers and one student: who trains on what, who scores it, and what the study computes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.study_numbers.multi import two_teacher_numbers

from opd.recipe.load import parse_recipe
from opd.runs.prepare import Given, prepare
from opd_studies.claims import two_teachers
from opd_studies.lab.ablation import START, TEACHER
from opd_studies.lab.lab import SORTERS, Lab
from opd_studies.lab.two_tasks import TASKS, Setting, Size, distillation, models_of

TINY = replace(
    SORTERS,
    teacher={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    student={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1},
    teacher_steps=2,
    student_steps=2,
    prompts_per_step=4,
)
MODELS = dict.fromkeys((*TASKS, "student"), Path("somewhere"))


def trained_on(setting: Setting, steps: int = 200) -> set[tuple[str | None, str, str | None]]:
    """(task, the sign of its prompts, its teacher) of all prompts of a stage."""
    recipe = parse_recipe(distillation("x", 0, MODELS, setting, Size(steps=steps), before=False))
    (stage,) = recipe.stages
    order = prepare(stage, Given(), recipe.seed).order
    prompts = [prompt for step in range(stage.steps) for prompt in order.take(step)]
    assert len(prompts) == stage.steps * stage.prompts_per_step
    return {(prompt.task, str(prompt.content)[-1], prompt.teacher_id) for prompt in prompts}


@pytest.mark.parametrize("order", ["alternate", "mixed"])
def test_distillation_gives_each_task_its_teacher(order):
    both = Setting(method="reverse_kl", order=order)
    assert trained_on(both) == {("ascending", ">", "ascending"), ("descending", "<", "descending")}
    swapped = {("ascending", ">", "descending"), ("descending", "<", "ascending")}
    assert trained_on(replace(both, swapped=True)) == swapped
    assert trained_on(replace(both, tasks=("descending",))) == {("descending", "<", "descending")}


def test_setting_scales_steps_and_prompts():
    small = Setting(method="opd", steps=0.5, prompts=0.25)
    (stage,) = parse_recipe(distillation("x", 0, MODELS, small, Size(), before=False)).stages
    assert (stage.steps, stage.prompts_per_step) == (50, 16)


def test_recovery_is_share_of_gap():
    numbers = two_teacher_numbers(True, True)
    numbers |= {START: {"ascending": [0.2, 0.5]}, TEACHER: {"ascending": [1.0, 0.9]}, "x": {"ascending": [0.6, 0.4]}}
    assert two_teachers.recovery(numbers, "x", "ascending") == pytest.approx([0.5, -0.25])


def test_numbers_of_gives_means_over_tasks():
    row = {f"eval/{task}/teacher/top-p {p}/reward": value for task, p, value in (
        ("ascending", "0.9", 0.5), ("descending", "0.9", 0.7), ("ascending", "1", 0.2), ("descending", "1", 0.3),
    )}  # fmt: skip
    named = {"ascending": 0.5, "descending": 0.7, "both": 0.6, "both, top-p 1": 0.25}
    assert two_teachers.numbers_of(row, "teacher/") == pytest.approx(named)
    own = {name.replace("teacher/", ""): value for name, value in row.items()}
    assert two_teachers.numbers_of(own | {"eval/ascending/reverse_kl": 0.1})["KL ascending"] == 0.1


def test_two_teachers_measure_runs_at_reduced_size(tmp_path, monkeypatch):
    monkeypatch.setattr(two_teachers, "SETTINGS", dict(list(two_teachers.SETTINGS.items())[:2]))
    lab, size = Lab(folder=tmp_path, workers=1), Size(seeds=(0,), steps=2, prompts_per_step=4, pair=TINY)
    numbers = two_teachers.measure(lab, size)
    assert list(numbers) == [START, TEACHER, "sampled, alternate", "sampled, mixed"]
    assert set(numbers[TEACHER]) == {*TASKS, "both", "both, top-p 1"}
    assert set(numbers["sampled, mixed"]) == {*numbers[TEACHER], "KL ascending", "KL descending"}
    weights = [(path / "model.safetensors").read_bytes() for path in models_of(lab, size)[0].values()]
    assert len(set(weights)) == 3, "two teachers and the student are three models"
