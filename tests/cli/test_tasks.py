"""Stages with several tasks, as a user writes, runs, stops and reads them."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.runs import Ended, Forks, Strike, assert_same, command, prepare, sums, tiny_model, write_rows

import opd
from opd.commands.doctor.subject import stage_to_examine
from opd.errors import ConfigError, DataError
from opd.recipe.load import dump, parse_recipe
from opd.runs.prepare import Given
from opd.stage.folder import StageDir
from opd.types import Prompt

TRAIN = ("train", "recipe.yaml")
STAGE = Path("run/distil")


def echoes(first: int, count: int) -> list[dict[str, Any]]:
    """Rows of another task: say the digit again."""
    digits = [str(n % 10) for n in range(first, first + count)]
    return [{"prompt": f"{d}{i % 7};", "response": d, "answer": d} for i, d in enumerate(digits)]


def two_tasks(**stage: Any) -> dict[str, Any]:
    """Two teachers of different sizes, response limits and rewards; keywords replace fields of the stage."""
    tasks = {
        "sums": {
            "teacher": "adder",
            "data": {"path": "train.jsonl"},
            "sampling": {"max_completion_length": 6},
            "reward": {"name": "final_number"},
            "evaluate": {"data": {"path": "held_out.jsonl"}},
        },
        "echo": {
            "teacher": "parrot",
            "data": {"path": "echo.jsonl"},
            "sampling": {"max_completion_length": 2},
            "reward": {"name": "exact"},
            "evaluate": {"data": {"path": "echo_held_out.jsonl"}, "every": 3},
        },
    }
    described = {
        "name": "distil",
        "train": "student",
        "method": "reverse_kl",
        "tasks": tasks,
        "steps": 7,
        "prompts_per_step": 4,
        "sampling": {"n": 2},
        "optimizer": {"learning_rate": 0.01},
        "checkpoint": {"every": 2, "keep": 2},
        "evaluate": {
            "sampling": {"greedy": {"temperature": 0, "max_completion_length": 3}},
            "teacher": True,
            "kl": True,
        },
        "samples_every": 1,
        **stage,
    }
    models = {
        "student": tiny_model(2),
        "adder": tiny_model(1, hidden_size=24),
        "parrot": tiny_model(3, hidden_size=8),
    }
    stages = [{key: value for key, value in described.items() if value is not None}]
    return {"name": "tiny", "output_dir": "run", "models": models, "stages": stages}


def with_echoes(folder: Path, recipe: dict[str, Any]) -> Path:
    prepare(folder, recipe)
    write_rows(folder / "echo.jsonl", echoes(0, 9))
    write_rows(folder / "echo_held_out.jsonl", echoes(3, 4))
    return folder


RUNS = {
    "alternate": two_tasks(),
    "mixed": two_tasks(task_order="mixed"),
    "top-k": two_tasks(task_order="mixed", method="topk_reverse_kl", options={"k": 4}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> dict[str, Path]:
    """The folder of each recipe above, run to its end; its output lies beside it."""
    root = tmp_path_factory.mktemp("tasks")
    folders = {name: with_echoes(root / name, recipe) for name, recipe in RUNS.items()}
    for folder in folders.values():
        ended = forks.start(folder, *TRAIN)
        assert ended.code == 0, ended.err
    return folders


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = with_echoes(tmp_path / "work", two_tasks())
    monkeypatch.chdir(folder)
    return folder


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in StageDir(folder / STAGE).read_metrics() if "train/loss" in row]


def samples_of(folder: Path) -> list[dict[str, Any]]:
    return StageDir(folder / STAGE).read_samples()


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_task_order_takes_one_task_a_step_when_alternate(runs: dict[str, Path]):
    rows = samples_of(runs["alternate"])
    by_step = [{row["task"] for row in rows if row["step"] == step} for step in range(1, 8)]
    assert by_step == [{"sums"}, {"echo"}] * 3 + [{"sums"}]
    assert all(sum(row["step"] == step for row in rows) == 8 for step in range(1, 8)), "4 prompts, 2 responses each"


@pytest.mark.parametrize("name", ["mixed", "top-k"])
def test_task_order_puts_all_tasks_in_a_step_when_mixed(runs: dict[str, Path], name: str):
    rows = samples_of(runs[name])
    for step in range(1, 8):
        tasks = [row["task"] for row in rows if row["step"] == step]
        assert sorted(tasks) == ["echo"] * 4 + ["sums"] * 4


@pytest.mark.parametrize("name", RUNS)
def test_prompt_id_is_unique_across_tasks(runs: dict[str, Path], name: str):
    stage = StageDir(runs[name] / STAGE)
    for rows in (samples_of(runs[name]), stage.read_held_out("before")):
        prompts = {row["prompt_id"]: (row["task"], row["prompt"]) for row in rows}
        assert all(prompts[row["prompt_id"]] == (row["task"], row["prompt"]) for row in rows)
        assert {task for task, _ in prompts.values()} == {"sums", "echo"}


@pytest.mark.parametrize("name", RUNS)
def test_tasks_use_own_length_limit_and_reward(runs: dict[str, Path], name: str):
    answers = {row["prompt"]: str(row["answer"]) for row in [*sums(0, 12), *echoes(0, 9)]}
    lengths: dict[str, int] = {"sums": 0, "echo": 0}
    for row in samples_of(runs[name]):
        lengths[row["task"]] = max(lengths[row["task"]], len(row["response_ids"]))
        if row["task"] == "echo":
            assert row["reward"] == float(row["response"].strip() == answers[row["prompt"]])
        elif not row["response"].strip("0123456789"):
            assert row["reward"] == float(row["response"] != "" and int(row["response"]) == int(answers[row["prompt"]]))
    assert 2 < lengths["sums"] <= 6
    assert lengths["echo"] == 2


@pytest.mark.parametrize("name", RUNS)
def test_task_metrics_equal_means_of_own_responses(runs: dict[str, Path], name: str):
    rows = samples_of(runs[name])
    for metrics in steps_of(runs[name]):
        here = [row for row in rows if row["step"] == metrics["step"]]
        tasks = {row["task"] for row in here}
        found = {key.split("/")[1] for key in metrics if key.startswith("task/")}
        assert found == tasks, "a step says nothing about a task that it did not take"
        for task in tasks:
            own = [row for row in here if row["task"] == task]
            ratios = [q - p for row in own for q, p in zip(row["teacher_logp"], row["policy_logp"], strict=True)]
            expected = {
                "reward": sum(row["reward"] for row in own) / len(own),
                "length": sum(len(row["response_ids"]) for row in own) / len(own),
                "cut_share": sum(not row["finished"] for row in own) / len(own),
                "log_ratio": sum(ratios) / len(ratios),
            }
            got = {key: metrics[f"task/{task}/{key}"] for key in expected}
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_tasks_are_evaluated_at_own_interval(runs: dict[str, Path]):
    stage = StageDir(runs["alternate"] / STAGE)
    rows = {row["step"]: row for row in stage.read_metrics() if any(key.startswith("eval/") for key in row)}
    measured = {
        step: sorted({key.split("/")[1] for key in row if key.startswith("eval/")}) for step, row in rows.items()
    }
    assert measured == {0: ["echo", "sums"], 3: ["echo"], 6: ["echo"], 7: ["echo", "sums"]}
    for task, count in (("sums", 5), ("echo", 4)):
        for key in ("greedy/reward", "greedy/length", "reverse_kl", "forward_kl"):
            assert f"eval/{task}/{key}" in rows[7]
        assert f"eval/{task}/teacher/greedy/reward" in rows[0]
        assert rows[7][f"eval/{task}/greedy/responses"] == count
    assert {row["task"] for row in stage.read_held_out("step_000003")} == {"echo"}
    assert [row["task"] for row in stage.read_held_out("teacher")] == ["sums"] * 5 + ["echo"] * 4


def test_report_prints_table_for_each_task(runs: dict[str, Path]):
    out = (runs["alternate"].with_suffix(".out")).read_text()
    assert "distil, sums (reverse_kl), held-out prompts" in out
    assert "distil, echo (reverse_kl), held-out prompts" in out
    assert out.count("greedy: reward") == 2


def test_task_metrics_are_absent_when_stage_has_no_tasks(work: Path):
    recipe = two_tasks(tasks=None, teacher="adder", data={"path": "train.jsonl"}, evaluate=None, steps=1)
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    ended = command(*TRAIN)
    assert ended.code == 0, ended.err
    assert not [key for row in steps_of(work) for key in row if key.startswith("task/")]
    assert {row["task"] for row in samples_of(work)} == {None}


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "nth"), [("alternate", 4), ("alternate", 7), ("mixed", 6), ("mixed", 11)])
def test_resume_gives_equal_run_when_stage_has_tasks(
    tmp_path: Path, forks: Forks, runs: dict[str, Path], name: str, nth: int
):
    folder = with_echoes(tmp_path / "work", RUNS[name])
    assert forks.start(folder, *TRAIN, strike=Strike(call="opd.loss.step.loss_of", nth=nth)).code == -signal.SIGKILL
    again = forks.start(folder, *TRAIN)
    assert again.code == 0, again.err
    assert "continuing after step" in again.out
    assert_same(folder / "run", runs[name] / "run")


# --- what else has tasks ---------------------------------------------------------------------------------------------


def without_teachers(**stage: Any) -> dict[str, Any]:
    recipe = two_tasks(evaluate=None, steps=2, **stage)
    for task in recipe["stages"][0]["tasks"].values():
        del task["teacher"], task["evaluate"]
    return recipe


@pytest.mark.parametrize(
    "stage",
    [
        {"method": "sft", "sampling": None, "task_order": "mixed"},
        {"method": "grpo", "task_order": "mixed"},
        {"method": "grpo"},
        {
            "method": "context_distillation",
            "options": {"system": "5;", "teacher": "live", "k": None},
            "task_order": "mixed",
        },
        {"method": "context_distillation", "options": {"system": "5;", "teacher": "ema", "decay": 0.5, "k": 4}},
    ],
    ids=lambda stage: f"{stage['method']} {stage.get('task_order', 'alternate')}",
)
def test_tasks_train_when_method_has_no_teacher_model(work: Path, stage: dict[str, Any]):
    (work / "recipe.yaml").write_text(yaml.safe_dump(without_teachers(**stage), sort_keys=False))
    ended = command(*TRAIN)
    assert ended.code == 0, ended.err
    assert [row["step"] for row in steps_of(work)] == [1, 2]


def test_teacher_sampling_applies_to_own_task(work: Path):
    recipe = two_tasks(method="sft", options={"source": "teacher"}, task_order="mixed", steps=1, evaluate=None)
    stage = recipe["stages"][0]
    for task in stage["tasks"].values():
        del task["evaluate"]
    stage["tasks"]["echo"]["teacher_sampling"] = {"max_completion_length": 1, "n": 2}
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    ended = command(*TRAIN)
    assert ended.code == 0, ended.err
    rows = samples_of(work)
    assert max(len(row["response_ids"]) for row in rows if row["task"] == "echo") == 1
    assert max(len(row["response_ids"]) for row in rows if row["task"] == "sums") > 1
    assert all(row["sampler_logp"] is None for row in rows)


# --- the recipe ------------------------------------------------------------------------------------------------------


def test_parse_recipe_merges_stage_settings_into_tasks():
    stage = parse_recipe(two_tasks(sampling={"n": 2, "top_p": 0.9, "max_completion_length": 5})).stages[0]
    stage_tasks = stage.tasks
    assert stage_tasks["echo"].sampling.model_dump() == {
        "max_completion_length": 2,
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 0,
        "n": 2,
        "stop": [],
    }
    evaluate = stage_tasks["sums"].evaluate
    assert evaluate is not None
    assert (evaluate.every, evaluate.kl, evaluate.data.path) == (0, True, "held_out.jsonl")
    assert evaluate.sampling["greedy"].temperature == 0
    assert stage.evaluate is None


def test_dump_gives_equal_recipe_when_parsed_again():
    recipe = parse_recipe(two_tasks(task_order="mixed"))
    assert parse_recipe(yaml.safe_load(dump(recipe))) == recipe
    plain = parse_recipe(two_tasks(tasks=None, data={"path": "train.jsonl"}, teacher="adder", evaluate=None))
    assert parse_recipe(yaml.safe_load(dump(plain))) == plain


def test_parse_recipe_applies_overrides_to_tasks():
    recipe = parse_recipe(
        two_tasks(), ["tasks.echo.sampling.max_completion_length=3", "stages.distil.tasks.sums.share=2"]
    )
    tasks = recipe.stages[0].tasks
    assert (tasks["echo"].sampling.max_completion_length, tasks["sums"].share) == (3, 2.0)


def refused(work: Path, change: Callable[[dict[str, Any]], Any], what: str = "check") -> str:
    recipe = copy.deepcopy(two_tasks())
    change(recipe["stages"][0])
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    ended: Ended = command(what, "recipe.yaml")
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    return ended.err


REFUSALS: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "data and tasks": (
        lambda s: s.update(data={"path": "train.jsonl"}),
        ["stage 'distil': it has `tasks` and also `data`, which nothing reads: each task has its own."],
    ),
    "a teacher and a reward of the stage": (
        lambda s: s.update(teacher="adder", reward={"name": "exact"}),
        ["it has `tasks` and also `teacher` and `reward`", "into the tasks (tasks.sums), or remove `tasks`"],
    ),
    "neither data nor tasks": (
        lambda s: (s.pop("evaluate"), s.update(tasks={}, data=None)),
        ["it has neither `data` nor `tasks`, so it has no prompts"],
    ),
    "no data at all": (lambda s: (s.pop("evaluate"), s.pop("tasks")), ["`stages.0.data` is missing"]),
    "an order of nothing": (
        lambda s: (s.pop("evaluate"), s.pop("tasks"), s.update(task_order="mixed", data={"path": "train.jsonl"})),
        ["`task_order` needs `tasks`, and the stage has none"],
    ),
    "another order": (lambda s: s.update(task_order="mix"), ["`stages.0.task_order`", "'alternate' or 'mixed'"]),
    "a task without a teacher": (
        lambda s: s["tasks"]["echo"].pop("teacher"),
        [
            "Stage 'distil', task 'echo': method 'reverse_kl' needs a teacher model: set the task's `teacher` to one "
            "of the models."
        ],
    ),
    "the student as a teacher": (
        lambda s: s["tasks"]["echo"].update(teacher="student"),
        ["Stage 'distil', task 'echo': method 'reverse_kl' needs a teacher model"],
    ),
    "an unknown teacher": (
        lambda s: s["tasks"]["echo"].update(teacher="parott"),
        ["stage 'distil': `tasks.echo.teacher: parott` is not among the models. Did you mean 'parrot'?"],
    ),
    "a teacher that is not needed": (
        lambda s: s.update(method="context_distillation", options={"system": "5"}),
        ["task 'sums': in method 'context_distillation' the student is its own teacher, and the task names 'adder'"],
    ),
    "an unknown key": (
        lambda s: s["tasks"]["echo"].update(techer="parrot"),
        ["unknown key `stages.0.tasks.echo.techer`. Did you mean 'teacher'? Known here: data, environment"],
    ),
    "an unknown key of partial settings": (
        lambda s: s["tasks"]["echo"]["sampling"].update(temprature=1),
        ["unknown key `stages.0.tasks.echo.sampling.temprature`. Did you mean 'temperature'?"],
    ),
    "a task without data": (lambda s: s["tasks"]["echo"].pop("data"), ["`stages.0.tasks.echo.data` is missing"]),
    "a share of nothing": (lambda s: s["tasks"]["echo"].update(share=0), ["`stages.0.tasks.echo.share`", "(got 0)"]),
    "an endless share": (lambda s: s["tasks"]["echo"].update(share=float("inf")), ["`stages.0.tasks.echo.share`"]),
    "a name that is no name": (
        lambda s: s["tasks"].update({"a/b": s["tasks"]["echo"]}),
        ["`stages.0.tasks.a/b", "should match pattern"],
    ),
    "no task": (lambda s: s["tasks"].update(echo=None), ["`stages.0.tasks.echo`", "valid dictionary"]),
    "different n in one step": (
        lambda s: (s.update(task_order="mixed"), s["tasks"]["echo"]["sampling"].update(n=3)),
        ["a mixed step draws equally many responses to each prompt, and sampling.n is {'sums': 2, 'echo': 3}"],
    ),
    "held-out prompts of all": (
        lambda s: s["evaluate"].update(data={"path": "held_out.jsonl"}),
        ["`evaluate.data` would be the held-out prompts of every task. Move it into tasks.sums.evaluate"],
    ),
    "an evaluation of nothing": (
        lambda s: [task.pop("evaluate") for task in s["tasks"].values()],
        ["`evaluate` holds shared settings of its tasks' evaluations, and no task has one"],
    ),
    "an evaluation that is none": (lambda s: s.update(evaluate=5), ["`stages.0.evaluate`", "(got 5)"]),
    "a reward that is missing": (
        lambda s: (
            s.update(method="grpo", evaluate=None),
            [task.pop("evaluate") for task in s["tasks"].values()],
            s["tasks"]["echo"].pop("reward"),
        ),
        [
            "Stage 'distil', task 'echo': method 'grpo' needs a reward: set the task's `reward`",
            "e.g. {name: math_verify}",
        ],
    ),
    "a group of one": (
        lambda s: (
            s.update(method="grpo", evaluate=None),
            [task.pop("evaluate") for task in s["tasks"].values()],
            s["tasks"]["echo"]["sampling"].update(n=1),
        ),
        ["Stage 'distil', task 'echo': method 'grpo' needs several responses per prompt"],
    ),
    "a gradient of another temperature": (
        lambda s: (s.update(method="opd"), s["tasks"]["echo"]["sampling"].update(temperature=0.5)),
        ["Stage 'distil', task 'echo': method 'opd' is a policy gradient.", "are sampled at temperature 0.5"],
    ),
    "a pass@k without responses": (
        lambda s: s["tasks"]["echo"]["evaluate"].update(pass_at=[4]),
        ["Stage 'distil', task 'echo': evaluate.pass_at has pass@4"],
    ),
}


@pytest.mark.parametrize(("change", "parts"), REFUSALS.values(), ids=REFUSALS)
def test_check_refuses_bad_tasks(work: Path, change: Callable[..., Any], parts: list[str]):
    message = refused(work, change)
    for part in parts:
        assert part in message, f"{part!r} is not in:\n{message}"


def test_teacher_id_raises_data_error_when_task_teacher_differs(work: Path):
    rows = [{**row, "teacher_id": "adder" if i else "parrot"} for i, row in enumerate(echoes(0, 3))]
    write_rows(work / "echo.jsonl", rows)
    message = refused(work, lambda stage: stage)
    assert (
        "DataError: Stage 'distil', task 'echo': 2 of 3 prompts have another `teacher_id` (prompt 1: 'adder')"
        in message
    )
    assert "than the teacher 'parrot' that would score them. Give each teacher's prompts their own task" in message


def test_check_names_task_teacher_when_tokenizers_differ(work: Path):
    recipe = two_tasks()
    recipe["models"]["parrot"] = tiny_model(3, characters="0123456789=+;")
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    ended = command("check", "recipe.yaml")
    assert ended.code == 2
    assert "AlignmentError: The tokenizers of student (15 tokens) and parrot (15) differ: 2 tokens have" in ended.err


def test_check_prints_line_for_each_task(work: Path):
    ended = command("check", "recipe.yaml")
    assert ended.code == 0, ended.err
    for line in (
        "stage distil: reverse_kl, 2 tasks, alternate",
        "  task sums: 12 prompts, 5 held out, teacher adder, at most 6 tokens",
        "  task echo: 9 prompts, 4 held out, teacher parrot, at most 2 tokens",
        "  student and adder and parrot map every token to the same id",
    ):
        assert line in ended.out.splitlines(), ended.out


# --- from Python -----------------------------------------------------------------------------------------------------


def test_distill_raises_data_error_when_prompt_ids_repeat(work: Path):
    prompts = [Prompt(id=i % 2, content=f"{i}+1=") for i in range(3)]
    with pytest.raises(DataError, match=r"1 ids belong to several of the 3 prompts given in Python \(e.g. 0\)"):
        opd.distill(student="./nowhere", teacher="./nowhere", prompts=prompts, steps=1, quiet=True)


def test_distill_refuses_prompts_when_tasks_are_given(work: Path):
    tasks = {"a": {"data": {"path": "train.jsonl"}}}
    with pytest.raises(ConfigError, match=r"it has `tasks` and also `data` and `teacher`"):
        opd.distill(student="./nowhere", teacher="./nowhere", prompts=["1+1="], steps=1, tasks=tasks, quiet=True)


def test_prompt_id_continues_from_task_to_task(work: Path):
    """Ids go on from task to task in the order of the recipe, first those of training."""
    command(*TRAIN, "steps=2", "output_dir=short")
    rows = [row for row in StageDir(work / "short/distil").read_samples() if row["step"] == 2]
    assert {row["prompt_id"] for row in rows} <= set(range(12, 21))
    assert {row["task"] for row in rows} == {"echo"}


def test_stage_to_examine_selects_one_task(work: Path):
    recipe = parse_recipe(two_tasks())
    spec = stage_to_examine(recipe, "distil", Given(), "echo")
    assert (spec.teacher, spec.tasks, list(spec.by_task)) == (recipe.stages[0].tasks["echo"].teacher, {}, [None])
    with pytest.raises(ConfigError, match=r"has the tasks .*, examined one by one\. Choose one with --task\."):
        stage_to_examine(recipe, "distil", Given())
    with pytest.raises(ConfigError, match=r"has the tasks .*; got --task ech\. Did you mean 'echo'\?"):
        stage_to_examine(recipe, "distil", Given(), "ech")
