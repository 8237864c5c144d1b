"""Which changes of a recipe a stopped run accepts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.runs import one_stage

from opd.errors import RunError
from opd.recipe.load import parse_recipe
from opd.recipe.schema import Recipe
from opd.stage.changes import recipe_changes
from opd.stage.folder import RunDir

CONSTANT = {"optimizer": {"schedule": "constant"}}


def recipe(**stage: Any) -> Recipe:
    return parse_recipe(one_stage(**stage))


def two(steps: int = 2) -> Recipe:
    """Two stages, of which the first has this many steps."""
    whole = one_stage(steps=steps)
    return parse_recipe({**whole, "stages": [*whole["stages"], {**whole["stages"][0], "name": "more", "steps": 3}]})


def begin(folder: Path, first: Recipe, *, made: Mapping[str, int]) -> None:
    """A run with this many steps in its stages."""
    run = RunDir.open(folder, first, {})
    for name, steps in made.items():
        for step in range(steps):
            run.stage(name).append_metrics(step + 1, {"a": 1.0})
        if steps == first.stage(name).steps:
            run.stage(name).mark_done({})
    run.close()


def effects(changed: Recipe) -> dict[str, str]:
    return {change.key: change.effect for change in recipe_changes(recipe(), changed)}


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ({"checkpoint": {"every": 7, "keep": 3}}, {"checkpoint.every": "none", "checkpoint.keep": "none"}),
        ({"samples_every": 1, "save_dtype": "float32"}, {"samples_every": "none", "save_dtype": "none"}),
        ({"diagnostics": {"every": 3}}, {"diagnostics.every": "none"}),
        ({"micro_batch_tokens": 64}, {"micro_batch_tokens": "rounding"}),
        ({"prompts_per_step": 3}, {"prompts_per_step": "numbers"}),
        ({"optimizer": {"learning_rate": 0.5}}, {"optimizer.learning_rate": "numbers"}),
        ({"method": "opd"}, {"method": "structure"}),
        ({"options": {"temperature": 2.0}}, {"options.temperature": "numbers"}),
    ],
)
def test_changes_have_effects(stage: dict[str, Any], expected: dict[str, str]):
    assert effects(recipe(**stage)) == {f"stages.distil.{key}": value for key, value in expected.items()}


def test_changes_of_servers_have_effects():
    """Where a server is, or how it is started, has none; the path of what it serves has."""

    def served(**teacher: Any) -> Recipe:
        whole = one_stage(engine={"urls": ["http://h:1"]})
        return parse_recipe(whole | {"models": whole["models"] | {"teacher": {"server": teacher}}})

    def effects_of(old: Recipe, new: Recipe) -> dict[str, str]:
        return {change.key.removeprefix("models.teacher.server."): change.effect for change in recipe_changes(old, new)}

    start = {"path": "a", "python": "p", "flags": ["-x"], "env": {"A": "1"}}
    one, two = served(urls=["http://h:1"]), served(urls=["http://h:2"], retries=5, model="m")
    assert effects_of(one, two) == {"urls": "none", "retries": "none", "model": "none"}
    other = {"path": "b", "python": "q", "flags": ["-y"], "env": {"A": "2"}, "dtype": "bfloat16"}
    assert effects_of(served(start=start), served(start=other)) == {
        "start.path": "numbers",
        "start.dtype": "rounding",
        "start.python": "none",
        "start.flags": "rounding",
        "start.env.A": "none",
    }
    raw = one_stage(engine={"urls": ["http://h:2"], "tolerance": 0.1})
    moved = parse_recipe(raw | {"models": raw["models"] | {"teacher": {"server": {"urls": ["http://h:1"]}}}})
    assert set(effects_of(one, moved).values()) == {"none"}


def test_changes_of_options_are_of_numbers_whatever_their_name():
    old, new = (recipe(reward={"name": "math_verify", "options": {"timeout_s": limit}}) for limit in (5, 3))
    (change,) = recipe_changes(old, new)
    assert (change.key, change.effect) == ("stages.distil.reward.options.timeout_s", "numbers")


def test_names_that_are_also_keys_have_no_effect():
    """Tasks, sampling settings and options may be called as keys without effect on the numbers are."""
    task = {"data": {"path": "train.jsonl"}, "teacher": "teacher", "sampling": {"n": 1, "max_completion_length": 3}}
    evaluate = {"data": {"path": "held_out.jsonl"}, "sampling": {"checkpoint": {"n": 1}}}

    def with_task(**changed: Any) -> Recipe:
        tasks = {"diagnostics": {**task, **changed}, "a.options.b": task}
        return recipe(data=None, teacher=None, sampling=None, tasks=tasks, method="reverse_kl")

    (change,) = recipe_changes(with_task(), with_task(teacher="student"))
    assert (change.key, change.effect) == ("stages.distil.tasks.diagnostics.teacher", "numbers")
    (change,) = recipe_changes(with_task(evaluate=evaluate), with_task(evaluate={**evaluate, "every": 3}))
    assert (change.key, change.effect) == ("stages.distil.tasks.diagnostics.evaluate.every", "none")
    other = {**evaluate, "sampling": {"checkpoint": {"n": 2}}}
    (change,) = recipe_changes(recipe(evaluate=evaluate), recipe(evaluate=other))
    assert (change.key, change.effect) == ("stages.distil.evaluate.sampling.checkpoint.n", "numbers")
    (change,) = recipe_changes(*(recipe(sampler="a:b", sampler_options={"timeout_s": s}) for s in (1, 2)))
    assert (change.key, change.effect) == ("stages.distil.sampler_options.timeout_s", "numbers")


def test_steps_of_evaluations_are_of_numbers_where_they_end_the_stage():
    """With `until`, at either start, another `every` may end the stage at another step."""
    evaluate = {"data": {"path": "held_out.jsonl"}, "every": 3}
    goal = {"until": {"sampled": 0.5}}

    def changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
        old, new = (recipe(evaluate={**evaluate, **one}) for one in (before, after))
        return {change.key.removeprefix("stages.distil."): change.effect for change in recipe_changes(old, new)}

    assert changed({}, {"every": 4}) == {"evaluate.every": "none"}
    assert changed(goal, {**goal, "every": 4}) == {"evaluate.every": "numbers"}
    both = {"evaluate.until.sampled": "numbers", "evaluate.every": "numbers"}
    assert changed(goal, {"every": 4}) == changed({}, {**goal, "every": 4}) == both
    assert changed(goal, {**goal, "pass_at": [1, 2]}) == {"evaluate.pass_at": "none"}

    def of_tasks(every: int) -> Recipe:
        task = {"data": {"path": "train.jsonl"}, "teacher": "teacher"}
        one, other = {**evaluate, **goal, "every": every}, {**evaluate, "every": every}
        tasks = {"a.b": {**task, "evaluate": one}, "until": {**task, "evaluate": other}}
        return recipe(data=None, teacher=None, tasks=tasks)

    found = {change.key: change.effect for change in recipe_changes(of_tasks(3), of_tasks(4))}
    where = "stages.distil.tasks"
    assert found == {f"{where}.a.b.evaluate.every": "numbers", f"{where}.until.evaluate.every": "none"}


def test_open_refuses_other_evaluations_of_a_stage_with_a_goal(tmp_path: Path):
    evaluate = {"data": {"path": "held_out.jsonl"}, "every": 3, "until": {"sampled": 0.5}}
    begin(tmp_path, recipe(evaluate=evaluate), made={"distil": 1})
    other = recipe(evaluate={**evaluate, "every": 2})
    with pytest.raises(RunError, match=r"evaluate\.every: 3 -> 2\n.*add --accept-changes"):
        RunDir.open(tmp_path, other, {})
    RunDir.open(tmp_path, other, {}, accept=True).close()
    assert "stages.distil.evaluate.every" in (tmp_path / "changes.jsonl").read_text()


def test_names_with_dots_do_not_hide_a_change_of_structure():
    old, new = (recipe(name="a.options.b", method=method) for method in ("reverse_kl", "opd"))
    (change,) = recipe_changes(old, new)
    assert (change.key, change.effect) == ("stages.a.options.b.method", "structure")


@pytest.mark.parametrize(("file", "text"), [("inputs.json", "[1]"), ("inputs.json", '{"distil": 3}')])
def test_open_refuses_damaged_inputs(tmp_path: Path, file: str, text: str):
    begin(tmp_path, recipe(), made={"distil": 1})
    (tmp_path / file).write_text(text)
    with pytest.raises(RunError, match=r"inputs\.json is damaged \(.*Remove it to go on without a comparison"):
        RunDir.open(tmp_path, recipe(), {"distil": {}})


@pytest.mark.parametrize("text", ["[]", '{"started": 5}', "{"])
def test_open_replaces_damaged_environment(tmp_path: Path, text: str):
    begin(tmp_path, recipe(), made={"distil": 1})
    (tmp_path / "environment.json").write_text(text)
    RunDir.open(tmp_path, recipe(), {}).close()
    assert "started" in json.loads((tmp_path / "environment.json").read_text())


def test_changes_of_models_and_run_have_effects():
    changed = one_stage()
    changed["models"]["teacher"] |= {"device": "cpu", "dtype": "bfloat16"}
    changed |= {"description": "more", "report_to": ["tensorboard"], "output_dir": "elsewhere"}
    assert effects(parse_recipe(changed)) == {
        "description": "none",
        "output_dir": "none",
        "report_to": "none",
        "models.teacher.dtype": "structure",
        "models.teacher.device": "rounding",
    }


def test_changes_of_servers_have_no_effect():
    """A server that moves, or another one in place of a dead one; whether it has the same model is proved."""
    made = one_stage(engine={"urls": ["http://localhost:1"]})
    made["models"]["teacher"] = {"server": {"urls": ["http://localhost:2"]}}
    moved = one_stage(engine={"urls": ["http://localhost:3"], "patience_s": 9})
    moved["models"]["teacher"] = {"server": {"urls": ["http://localhost:4"], "retries": 5, "model": "name"}}
    changes = recipe_changes(parse_recipe(made), parse_recipe(moved))
    assert {change.key: change.effect for change in changes} == {
        "models.teacher.server.urls": "none",
        "models.teacher.server.retries": "none",
        "models.teacher.server.model": "none",
        "stages.distil.engine.urls": "none",
        "stages.distil.engine.patience_s": "none",
    }


def test_open_accepts_changes_without_effect_on_numbers(tmp_path: Path):
    begin(tmp_path, recipe(), made={"distil": 1})
    run = RunDir.open(tmp_path, recipe(checkpoint={"every": 7}, micro_batch_tokens=64), {})
    run.close()
    assert run.notes == (
        "changed since the last start: stages.distil.micro_batch_tokens: 4096 -> 64",
        "changed since the last start: stages.distil.checkpoint.every: 50 -> 7",
    )
    assert [json.loads(line)["after"] for line in (tmp_path / "changes.jsonl").read_text().splitlines()] == [64, 7]


def test_open_refuses_other_structure_even_if_accepted(tmp_path: Path):
    begin(tmp_path, recipe(), made={"distil": 1})
    with pytest.raises(RunError, match=r"cannot go on after a change of stages\.distil\.method\."):
        RunDir.open(tmp_path, recipe(method="opd"), {}, accept=True)
    with pytest.raises(RunError, match="cannot go on after a change of the stages"):
        RunDir.open(tmp_path, two(), {}, accept=True)


@pytest.mark.parametrize("made", [1, 6])
def test_open_lets_steps_grow_under_constant_rate(tmp_path: Path, made: int):
    begin(tmp_path, recipe(steps=6, **CONSTANT), made={"distil": made})
    RunDir.open(tmp_path, recipe(steps=12, **CONSTANT), {}).close()
    assert not (tmp_path / "distil/done.json").exists()
    RunDir.open(tmp_path, recipe(steps=8, **CONSTANT), {}).close()


def test_open_lets_steps_grow_after_metrics_were_cut(tmp_path: Path):
    """A stage without `seconds_of` has no limit that could have ended it."""
    begin(tmp_path, recipe(steps=2, **CONSTANT), made={"distil": 2})
    metrics = tmp_path / "distil/metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-3])
    RunDir.open(tmp_path, recipe(steps=4, **CONSTANT), {}).close()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_open_refuses_other_steps_under_falling_rate(tmp_path: Path, schedule: str):
    begin(tmp_path, recipe(steps=6, optimizer={"schedule": schedule}), made={"distil": 2})
    with pytest.raises(RunError, match=f"and now has 12. Its learning rate falls to 0.*schedule: {schedule}"):
        RunDir.open(tmp_path, recipe(steps=12, optimizer={"schedule": schedule}), {}, accept=True)


@pytest.mark.parametrize(
    ("made", "steps", "message"),
    [
        ({"distil": 2}, 1, "had 2 steps, and now has 1, but 2 are made. Use at least 2"),
        ({"distil": 2, "more": 1}, 4, "but stage 'more', which begins after it, has begun"),
    ],
)
def test_open_refuses_steps_that_cannot_be(tmp_path: Path, made: dict[str, int], steps: int, message: str):
    begin(tmp_path, two(2), made=made)
    with pytest.raises(RunError, match=re.escape(message)):
        RunDir.open(tmp_path, two(steps), {}, accept=True)
