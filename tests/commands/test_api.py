"""`opd.distill` and `opd.run` from Python: everything that a caller may hand over, and what comes back."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from support.runs import CHARACTERS, one_stage, prepare, sums, tiny_model, two_stages, write_rows

import opd
from opd.api import _described
from opd.data.prompts import prompts_of_rows
from opd.environments.protocol import Begun
from opd.errors import AlignmentError, ConfigError, DataError, RunError, TrainingError
from opd.models import saving
from opd.models.loading import load_model
from opd.models.new import character_tokenizer
from opd.parallel import World
from opd.recipe.load import load_recipe, parse_recipe
from opd.recipe.schema import ModelSpec
from opd.types import Prompt

ONE_ROW = datasets.Dataset.from_list([{"prompt": "1+1="}])
PROMPTS = [row["prompt"] for row in sums(0, 6)]


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, where a caller's own `mine.py` is found and forgotten afterwards."""
    monkeypatch.chdir(prepare(tmp_path, one_stage()))
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("mine", None)
    yield tmp_path
    sys.modules.pop("mine", None)


def model(seed: int, **spec: Any) -> Any:
    """A transformers (or peft) model with random weights; every call makes a new one."""
    return load_model(ModelSpec(**tiny_model(seed, **spec)), name="tiny").model


def weights(of: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in of.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def distill(**changes: Any) -> opd.Run:
    """Two steps of reverse KL between two new models; keywords replace arguments."""
    arguments = {
        "student": model(2) if "student" not in changes else None,
        "teacher": model(1) if "teacher" not in changes else None,
        "tokenizer": character_tokenizer(CHARACTERS),
        "prompts": PROMPTS,
        "steps": 2,
        "prompts_per_step": 2,
        "sampling": {"max_completion_length": 3},
        "optimizer": {"learning_rate": 0.01},
        "quiet": True,
    }
    return opd.distill(**{**arguments, **changes})


# --- models ----------------------------------------------------------------------------------------------------------


def test_distill_trains_student_in_place_and_keeps_teacher():
    student, teacher = model(2), model(1)
    before, asked = weights(student), weights(teacher)
    run = distill(student=student, teacher=teacher)
    assert run.student is student
    assert not same(weights(student), before)
    assert same(weights(teacher), asked)
    assert run.tokenizer.get_vocab() == character_tokenizer(CHARACTERS).get_vocab()
    assert run.folder == Path("runs/distill-1")

    saved = load_model(ModelSpec(path=str(run.folder / "distill/model")), name="saved").model
    assert same(weights(saved), weights(student))


def test_run_holds_metrics_and_samples_of_every_step():
    run = distill(evaluate={"data": {"path": "held_out.jsonl"}, "kl": True}, steps=3, samples_every=1)
    lines = (run.folder / "distill/metrics.jsonl").read_text().splitlines()
    assert run.metrics == [{"stage": "distill", **json.loads(line)} for line in lines]
    assert [row["step"] for row in run.metrics] == [0, 1, 2, 3, 3]
    assert all(math.isfinite(row["train/loss"]) for row in run.metrics if "train/loss" in row)
    assert run.metrics[0]["eval/reverse_kl"] > 0

    assert [row["step"] for row in run.samples] == [1, 1, 2, 2, 3, 3]
    for row in run.samples:
        assert row["stage"] == "distill"
        assert row["prompt"] in PROMPTS
        assert 1 <= len(row["response_ids"]) <= 3
        assert len(row["teacher_logp"]) == len(row["sampler_logp"]) == len(row["response_ids"])


def test_metrics_have_no_step_0_row_when_before_is_false():
    run = distill(evaluate={"data": {"path": "held_out.jsonl"}, "before": False})
    assert [row["step"] for row in run.metrics] == [1, 2, 2]


def test_distill_reduces_held_out_reverse_kl():
    settings = {"prompts_per_step": 6, "optimizer": {"learning_rate": 0.03}}
    run = distill(steps=40, evaluate={"data": {"path": "held_out.jsonl"}, "kl": True}, samples_every=0, **settings)
    # Of three seeds the worst leaves 0.5 of it: far enough from the limit for a processor that rounds otherwise.
    assert run.metrics[-1]["eval/reverse_kl"] < 0.75 * run.metrics[0]["eval/reverse_kl"]


def test_distill_is_reproducible_when_seed_is_equal():
    first, second, third = distill(), distill(), distill(seed=1)
    assert [run.folder.name for run in (first, second, third)] == ["distill-1", "distill-2", "distill-3"]
    assert first.metrics == second.metrics != third.metrics
    assert same(weights(first.student), weights(second.student))


def test_distill_accepts_model_and_prompt_paths(work: Path):
    for name, seed in (("student", 2), ("teacher", 1)):
        saving.save(load_model(ModelSpec(**tiny_model(seed)), name=name), work / name)
    run = distill(student="./student", teacher=work / "teacher", tokenizer=None, prompts="train.jsonl")
    assert run.metrics == distill(prompts="train.jsonl").metrics
    assert run.recipe.models["student"].path == "./student"
    again = opd.run(yaml.safe_load((run.folder / "recipe.yaml").read_text()), quiet=True)
    assert again.metrics == run.metrics
    assert same(weights(again.student), weights(run.student))


def test_distill_trains_only_adapter_when_student_is_peft():
    student = model(2, lora={"rank": 2})
    before = weights(student)
    run = distill(student=student)
    assert run.student is student
    changed = {name for name, value in weights(student).items() if not value.equal(before[name])}
    assert changed
    assert changed <= {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in changed)
    # The folder holds one plain model, the adapter merged in.
    saved = load_model(ModelSpec(path=str(run.folder / "distill/model")), name="saved").model
    ids = torch.tensor([[2, 3, 4]])
    torch.testing.assert_close(saved(ids).logits, student(ids).logits)


def test_context_distillation_runs_when_student_is_peft():
    run = distill(
        student=model(2, lora={"rank": 2}),
        teacher=None,
        method="context_distillation",
        options={"template": "1+1=2;{prompt}", "k": None},
    )
    assert [row["step"] for row in run.metrics] == [1, 2]


def test_distill_refuses_model_object_when_processes_are_several(work: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("opd.api.join", lambda: contextlib.nullcontext(World(rank=0, size=2)))
    with pytest.raises(ConfigError, match=r"student and teacher: 2 processes cannot share a model object\. Save it"):
        distill()
    assert not (work / "runs").exists()


def test_distill_refuses_model_object_without_tokenizer():
    with pytest.raises(ConfigError, match="student: a model object needs its tokenizer; pass `tokenizer=`"):
        distill(tokenizer=None)


def test_distill_refuses_tokenizer_without_eos_token():
    tokenizer = character_tokenizer(CHARACTERS)
    tokenizer.eos_token = None
    student = model(2)
    student.generation_config.eos_token_id = None
    with pytest.raises(ConfigError, match=r"no end-of-sequence token, so no response could end. Set eos_token"):
        distill(student=student, tokenizer=tokenizer)


def test_distill_refuses_tokenizer_larger_than_output_layer():
    tokenizer = character_tokenizer(CHARACTERS + "abc")
    with pytest.raises(ConfigError, match=r"ids up to 17, but the output layer has only 15 rows"):
        distill(tokenizer=tokenizer)


def test_distill_raises_alignment_error_when_teacher_ids_differ():
    teacher = model(1, characters="1023456789+=;")
    with pytest.raises(AlignmentError, match="2 tokens have another id"):
        distill(teacher=teacher, teacher_tokenizer=character_tokenizer("1023456789+=;"))


def test_distill_refuses_frozen_student():
    with pytest.raises(ConfigError, match="model 'student' has no parameter that requires a gradient"):
        distill(student=model(2).requires_grad_(False))


# --- prompts ---------------------------------------------------------------------------------------------------------


def same_prompts() -> dict[str, Any]:
    """The same six prompts in every form that is accepted."""
    return {
        "list of strings": PROMPTS,
        "tuple": tuple(PROMPTS),
        "generator": (prompt for prompt in PROMPTS),
        "rows": [{"prompt": prompt, "note": "x"} for prompt in PROMPTS],
        "Dataset": datasets.Dataset.from_dict({"prompt": PROMPTS}),
        "Prompts": [Prompt(id=i, content=prompt) for i, prompt in enumerate(PROMPTS)],
        "path": "six.jsonl",
        "Path": Path("six.jsonl"),
    }


@pytest.mark.parametrize("form", list(same_prompts()))
def test_distill_gives_equal_run_for_every_prompt_form(work: Path, form: str):
    write_rows(work / "six.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    run = distill(prompts=same_prompts()[form], samples_every=1)
    assert [(row["prompt_id"], row["prompt"]) for row in run.samples] == [
        (index, PROMPTS[index]) for index in (row["prompt_id"] for row in run.samples)
    ]
    assert run.metrics == distill().metrics


def test_distill_keeps_ids_of_prompt_objects():
    run = distill(prompts=[Prompt(id=40 + i, content=prompt) for i, prompt in enumerate(PROMPTS)])
    assert all(row["prompt_id"] >= 40 for row in run.samples)


@pytest.mark.parametrize(
    "changed", [{"response": "x"}, {"tools": [{"name": "f"}]}, {"chat_template_kwargs": {"a": 1}}, {"level": 1}]
)
def test_distill_hash_covers_every_column_of_rows(changed: dict[str, Any]):
    row = {"prompt": [{"role": "user", "content": "1+1="}]}
    assert _described(prompts_of_rows([row])) == _described(prompts_of_rows([dict(row)]))
    assert _described(prompts_of_rows([row])) != _described(prompts_of_rows([{**row, **changed}]))


def test_distill_reads_columns_and_leaves_answers_out():
    tokenizer = character_tokenizer(CHARACTERS)
    tokenizer.chat_template = "{% for message in messages %};{{ message.content }}{% endfor %}"
    said = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    run = distill(
        tokenizer=tokenizer, prompts=[{"messages": said}], columns={"prompt": "messages"}, method="sft", teacher=None
    )
    assert {(row["prompt"], row["response"]) for row in run.samples} == {("1+1=", "2")}
    data = run.recipe.stages[0].data
    assert data is not None
    assert (data.columns, data.last_assistant) == ({"prompt": "messages"}, "response")


def test_distill_trains_all_turns_of_rows():
    rows = [{"prompt": "1+1=", "response": ["2", "+1=", "3"]}]
    run = distill(prompts=rows, method="sft", options={}, teacher=None, assistant_turns="all")
    assert {(row["prompt"], row["response"]) for row in run.samples} == {("1+1=", "2+1=3")}
    assert all(row["trained"] == [True, False, False, False, True, True] for row in run.samples)


def test_distill_needs_chat_template_when_chat_is_true():
    tokenizer = character_tokenizer(CHARACTERS)
    tokenizer.chat_template = "{% for message in messages %};{{ message.content }}{% endfor %}"
    run = distill(tokenizer=tokenizer, chat=True)
    assert all(row["prompt"] in PROMPTS for row in run.samples)
    with pytest.raises(DataError, match=r"Prompt \d is a list of messages.* has no chat template"):
        distill(chat=True)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts has no rows"),
        (None, "prompts is None (NoneType). Give a path, or a list of rows."),
        # Each of these was read as prompts with the names of its columns or splits.
        ({"prompt": ["1+1=", "1+2="]}, "prompts is a dict with the keys 'prompt', but must be a list of rows."),
        (
            datasets.DatasetDict({"train": ONE_ROW}),
            "prompts is a DatasetDict with the keys 'train', but must be a list of rows. Give one split of",
        ),
        (
            ONE_ROW.to_pandas(),
            "prompts is a DataFrame, a table that is iterated by its columns.",
        ),
        (
            ONE_ROW.data.table,
            "prompts is a Table, a table that is iterated by its columns.",
        ),
        (["1+1=", 5], "Row 1 of prompts is a int, got 5"),
        ([{"question": "1+1="}], "Row 0 of prompts has no column 'prompt'. Its columns: question"),
        (["1+1=", " "], "Row 1 of prompts: `prompt` is empty"),
        ("held_ot.jsonl", "held_ot.jsonl does not exist. Did you mean 'held_out.jsonl'?"),
    ],
)
def test_distill_refuses_bad_prompts(prompts: Any, message: str):
    with pytest.raises(DataError) as error:
        distill(prompts=prompts)
    assert message in str(error.value)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": None}, "The `method` of opd.distill is None (NoneType). Give a name (`opd methods` lists them)"),
        ({"options": [1]}, "`options` of opd.distill is [1] (list), but must be a mapping, such as {'k': 20}."),
        ({"lora": 16}, "`lora` of opd.distill is 16 (int), but must be a mapping, such as {'rank': 16}."),
        ({"lora": True}, "`lora` of opd.distill is True (bool)"),
        ({"columns": "question"}, "`columns` of opd.distill is 'question' (str)"),
        ({"report_to": 3}, "`report_to`"),
        ({"student": None}, "student is None (NoneType). Give a path, a hub id, or a model object"),
        ({"teacher": ["a", "b"]}, "teacher is ['a', 'b'] (list). Give a path, a hub id, or a model object"),
    ],
)
def test_distill_refuses_other_kinds(arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        distill(**arguments)
    assert message in str(error.value)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("column", "arguments"),
    [
        ("response", {"method": "sft"}),
        (
            "privileged_context",
            {"method": "context_distillation", "options": {"template": "{privileged_context}{prompt}", "k": None}},
        ),
    ],
)
def test_distill_refuses_rows_without_needed_column(column: str, arguments: dict[str, Any]):
    rows = [{"prompt": "1+1=", column: "2"}, {"prompt": "1+2="}]
    with pytest.raises(DataError, match=f"needs `{column}` in every row, but 1 of 2 rows"):
        distill(prompts=rows, teacher=None, **arguments)
    assert not Path("runs").exists()


# --- methods and rewards ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("opd", {}),
        ("gkd", {"options": {"beta": 0.0}}),
        ("topk_reverse_kl", {"options": {"k": 3, "by": "union"}}),
        ("sft", {"options": {"source": "teacher"}}),
        ("sft", {"teacher": None, "prompts": sums(0, 6)}),
        (
            "context_distillation",
            {"teacher": None, "options": {"template": "1+1=2;{prompt}", "teacher": "live", "k": None}},
        ),
    ],
)
def test_distill_accepts_method_names(method: str, arguments: dict[str, Any]):
    run = distill(method=method, **arguments)
    assert run.recipe.stages[0].method == method
    assert [row["step"] for row in run.metrics] == [1, 2]


def test_distill_calls_reward_function_for_each_response():
    asked: list[tuple[Prompt, str]] = []

    def even(prompt: Prompt, response: str) -> bool:
        asked.append((prompt, response))
        return len(response) % 2 == 0

    run = distill(
        method="grpo", teacher=None, reward=even, prompts=sums(0, 6), sampling={"n": 4, "max_completion_length": 3}
    )
    assert len(asked) == len(run.samples) * len(run.metrics) // 2 == 16
    assert all(isinstance(prompt, Prompt) and prompt.answer is not None for prompt, _ in asked)
    assert all(row["reward"] == float(len(row["response"]) % 2 == 0) for row in run.samples)
    assert all("rollout/reward" in row for row in run.metrics)


@pytest.mark.parametrize("reward", ["exact", {"name": "exact", "options": {"ignore_case": True}}])
def test_distill_accepts_reward_name(reward: Any):
    run = distill(
        method="grpo", teacher=None, reward=reward, prompts=sums(0, 6), sampling={"n": 2, "max_completion_length": 8}
    )
    assert {row["reward"] for row in run.samples} <= {0.0, 1.0}


def test_distill_raises_training_error_when_reward_raises():
    def broken(prompt: Prompt, response: str) -> float:
        raise KeyError("answers")

    message = r"The reward 'broken' raised KeyError on prompt \d+, response '.*': 'answers'"
    with pytest.raises(TrainingError, match=message) as error:
        distill(method="grpo", teacher=None, reward=broken, sampling={"n": 2, "max_completion_length": 8})
    assert isinstance(error.value.__cause__, KeyError)


def test_distill_raises_config_error_when_arguments_are_wrong():
    with pytest.raises(ConfigError, match=r"method 'grpo' needs .*sampling\.n.*; a reward"):
        distill(method="grpo", teacher=None)
    with pytest.raises(ConfigError, match="method 'reverse_kl' needs a teacher model"):
        distill(teacher=None)
    with pytest.raises(ConfigError, match=r"There is no method 'revers_kl'. Did you mean 'reverse_kl'"):
        distill(method="revers_kl")
    with pytest.raises(ConfigError, match=r"unknown option `avrage`. Did you mean 'average'"):
        distill(options={"avrage": "token"})
    with pytest.raises(ConfigError, match=r"unknown key `stages.0.prompts_per_stp`. Did you mean 'prompts_per_step'"):
        distill(prompts_per_stp=2)
    assert not Path("runs").exists()


def test_distill_loads_method_from_working_directory(work: Path):
    (work / "mine.py").write_text(
        "from opd.pieces import signals, supports\n"
        "from opd.method import Method\n\n\n"
        "def method(strength: float = 1.0) -> Method:\n"
        '    signal = signals.scale(strength, signals.divergence("reverse_kl"))\n'
        "    return Method(support=supports.full(), signal=signal)\n"
    )
    once, twice = (distill(method="mine:method", options={"strength": n}).metrics[0]["train/loss"] for n in (1, 2))
    assert twice == pytest.approx(2 * once, rel=1e-6)
    # The built-in method has a closed form: another order of the same sums, of float32 logits of about 1.
    assert once == pytest.approx(distill().metrics[0]["train/loss"], abs=1e-6)
    with pytest.raises(ConfigError, match=r"unknown option `strenght`. Did you mean 'strength'"):
        distill(method="mine:method", options={"strenght": 2})


# --- folders ---------------------------------------------------------------------------------------------------------


def test_distill_returns_finished_run_when_output_dir_repeats(work: Path):
    first = distill(output_dir=work / "here")
    assert first.folder == work / "here"
    again = distill(output_dir=work / "here")
    assert again.metrics == first.metrics
    assert same(weights(again.student), weights(first.student))


def test_distill_refuses_output_dir_when_seed_differs():
    distill(output_dir="here")
    with pytest.raises(RunError, match="here holds a run with other values"):
        distill(output_dir="here", seed=1)


def test_distill_refuses_output_dir_when_prompts_differ():
    distill(output_dir="here")
    with pytest.raises(RunError, match="here holds a run with other values"):
        distill(output_dir="here", prompts=PROMPTS[:3])


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_run_accepts_mapping_path_and_recipe_object():
    runs = [
        opd.run(one_stage() | {"output_dir": "one"}, quiet=True),
        opd.run("recipe.yaml", "output_dir=two", quiet=True),
        opd.run(Path("recipe.yaml"), "output_dir=three", quiet=True),
        opd.run(parse_recipe(one_stage() | {"output_dir": "four"}), quiet=True),
    ]
    assert [run.folder.name for run in runs] == ["one", "two", "three", "four"]
    assert all(run.metrics == runs[0].metrics for run in runs)
    assert all(same(weights(run.student), weights(runs[0].student)) for run in runs)


def test_run_returns_metrics_of_all_stages_and_last_student():
    run = opd.run(two_stages(), "stages.distil.steps=2", "stages.teach.steps=2", quiet=True)
    assert [(row["stage"], row["step"]) for row in run.metrics] == [
        *(("teach", 1), ("teach", 2)),
        *(("distil", 0), ("distil", 1), ("distil", 2), ("distil", 2)),
    ]
    assert {row["stage"] for row in run.samples} == {"teach", "distil"}
    saved = load_model(ModelSpec(path="run/distil/model"), name="saved").model
    assert same(weights(run.student), weights(saved))
    again = opd.run(two_stages(), "stages.distil.steps=2", "stages.teach.steps=2", quiet=True)
    assert again.metrics == run.metrics
    assert repr(again.samples) == repr(run.samples)  # text: a NaN equals itself
    assert same(weights(again.student), weights(run.student))


def test_run_refuses_overrides_of_recipe_object():
    with pytest.raises(ConfigError, match="Overrides apply to a path or a mapping"):
        opd.run(load_recipe("recipe.yaml"), "seed=1")


def test_distill_prints_progress_when_not_quiet(capsys: pytest.CaptureFixture[str]):
    distill(quiet=False)
    assert "distill: 2 steps" in capsys.readouterr().out


def test_quiet_prints_nothing(capfd: pytest.CaptureFixture[str], work: Path):
    saving.save(load_model(ModelSpec(**tiny_model(2)), name="student"), work / "student")
    capfd.readouterr()
    distill(student="./student")
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_opd_exports_only_public_names():
    assert sorted(opd.__all__) == ["Run", "distill", "evaluate", "load_run", "run"]
    for name in opd.__all__:
        assert callable(getattr(opd, name))
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = opd.distil  # type: ignore[attr-defined]


# --- settings of models given by path, and evaluate ------------------------------------------------------------------


def saved(seed: int, folder: Path) -> str:
    model(seed).save_pretrained(folder)
    character_tokenizer(CHARACTERS).save_pretrained(folder)
    return str(folder)


def test_distill_takes_lora_device_and_report_to(work: Path):
    given = {"student": saved(2, work / "student"), "teacher": saved(1, work / "teacher"), "tokenizer": None}
    run = distill(**given, lora={"r": 4, "alpha": 8}, device="cpu", report_to="none")
    student, teacher = run.recipe.models["student"], run.recipe.models["teacher"]
    assert student.lora is not None
    assert (student.lora.rank, student.lora.alpha, student.device, teacher.device) == (4, 8.0, "cpu", "cpu")
    assert teacher.lora is None
    assert run.recipe.report_to == []
    assert any("lora_A" in name for name, _ in run.student.named_parameters())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": {"rank": 4}}, "`lora` is for a student that is given by path, and this one is a model object"),
        ({"device": "cpu"}, "`device` is 'cpu', and student is a model object"),
        ({"report_to": "wandbb"}, "report_to: 'wandbb' is unknown. Did you mean 'wandb'"),
    ],
)
def test_distill_refuses_settings_that_objects_do_not_read(changes: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as error:
        distill(**changes)
    assert said in str(error.value)


def test_evaluate_measures_rows_with_a_function():
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in sums(0, 4)]
    found = opd.evaluate(
        model(2),
        rows,
        reward=lambda prompt, text: float(len(text) > 0 and prompt.answer is not None),
        teacher=model(1),
        tokenizer=character_tokenizer(CHARACTERS),
        sampling={"n": 2, "max_completion_length": 3},
        quiet=True,
    )
    assert found.metrics["responses"] == len(found.rows) == 8
    rewards = [row["metrics"]["reward"] for row in found.rows]
    assert found.metrics["reward"] == pytest.approx(sum(rewards) / 8)
    assert {row["response"] != "" for row in found.rows if row["metrics"]["reward"]} <= {True}
    assert found.metrics["reverse_kl"] > 0


def test_evaluate_equals_the_command_on_a_file(work: Path):
    from opd.commands.eval import Subject, evaluate_model

    path, sampling = saved(2, work / "student"), {"n": 2, "max_completion_length": 3}
    write_rows(work / "held.jsonl", sums(3, 4))
    found = opd.evaluate(path, "held.jsonl", reward="final_number", sampling=sampling, seed=5, quiet=True)
    command = evaluate_model(
        Subject(name="model", given=path, where="opd eval MODEL"),
        data={"path": "held.jsonl"},
        reward={"name": "final_number"},
        sampling=sampling,
        seed=5,
    )
    assert found.metrics == command.metrics
    assert found.rows == command.rows


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"reward": "exakt"}, ConfigError, "There is no reward 'exakt'"),
        ({"reward": "exact"}, DataError, "needs `answer` in every row"),
        ({"device": "cpu"}, ConfigError, "model is a model object"),
        ({"sampling": {"k": 1}}, ConfigError, "unknown key `k`"),
        (
            {"sampling": "greedy"},
            ConfigError,
            "valid:\n  Input should be a valid dictionary (got 'greedy'). Its keys: ",
        ),
        ({"columns": ["a"]}, ConfigError, "`columns` of opd.evaluate is ['a'] (list), but must be a mapping"),
    ],
)
def test_evaluate_refuses_what_it_cannot_use(arguments: dict[str, Any], error: type[Exception], said: str):
    with pytest.raises(error) as raised:
        opd.evaluate(model(2), ["1+1="], tokenizer=character_tokenizer(CHARACTERS), quiet=True, **arguments)
    assert said in str(raised.value)


def times(a: int, b: int) -> int:
    """Multiplies.

    Args:
        a: One.
        b: The other.
    """
    return a * b


@pytest.mark.parametrize(
    ("environment", "remedy"),
    [
        ({"tools": [times]}, rf"`stages\.0\.environment\.tools\.0`: .*Write {__name__}:times"),
        ({"name": Begun}, r"environment\.name`: .*Write opd\.environments\.protocol:Begun"),
        ({"tools": [lambda a: a]}, r"Write my_module:NAME, a function at the top of its file"),
        (Begun, r"Write \{name: opd\.environments\.protocol:Begun\}, or \{tools: \[calculator\]\}"),
        ("game:Higher", r"Write \{name: game:Higher\}"),
        (Begun(), r"Write \{name: \.\.\.\}"),
    ],
)
def test_function_in_place_of_its_name_names_the_remedy(environment: Any, remedy: str):
    """A recipe is written to the run's folder, so it holds names."""
    with pytest.raises(ConfigError, match=remedy):
        distill(environment=environment)
