"""What `opd check` says of what models read, and a recipe that is corrected after it failed."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.runs import command, forbid, one_stage, prepare, sums, tiny_model, write_rows

import opd
from opd.commands.check import check_recipe
from opd.errors import ConfigError, DataError
from opd.models.loading import load_model
from opd.models.saving import save
from opd.recipe.load import parse_recipe
from opd.recipe.schema import ModelSpec
from opd.samplers.hf import TransformersSampler
from opd.samplers.writers import ReferenceWriter
from opd.types import Prompt, Sampling

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking %}={% endif %}"


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(prepare(tmp_path / "work", one_stage()))
    write_rows(Path("long.jsonl"), [*sums(0, 3), {"prompt": "1+1+1+1+1="}])
    return tmp_path / "work"


def knowing(positions: int, seed: int = 2, **spec: Any) -> dict[str, Any]:
    model = copy.deepcopy(tiny_model(seed, **spec))
    model["init"]["max_position_embeddings"] = positions
    return model


def recipe(student: dict[str, Any], teaches: dict[str, Any] | None = None, **stage: Any) -> dict[str, Any]:
    made = one_stage(**stage)
    made["models"] = {"teacher": teaches or knowing(512, 1), "student": student}
    return made


def refused(made: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        check_recipe(parse_recipe(made))
    return str(caught.value)


def test_check_recipe_raises_data_error_when_no_prompt_fits():
    said = refused(recipe(knowing(16), sampling={"max_completion_length": 20}))
    assert said == (
        "Stage 'distil': student would read 23 tokens in all, but has only 16 positions. 12 of 12 prompts are too long "
        "for responses of up to 20 tokens (sampling.max_completion_length); even the shortest has 4. Lower "
        "sampling.max_completion_length to 13, or use a model with more positions."
    )
    check_recipe(parse_recipe(recipe(knowing(16), sampling={"max_completion_length": 13})))


def test_check_recipe_counts_prompts_that_are_too_long():
    said = refused(recipe(knowing(16), data={"path": "long.jsonl"}, sampling={"max_completion_length": 8}))
    assert "would read 17 tokens in all, but has only 16 positions. 1 of 4 prompts are too long" in said
    assert "the longest has 10. Lower sampling.max_completion_length to 7, or leave out the longest prompts" in said
    check_recipe(parse_recipe(recipe(knowing(16), data={"path": "long.jsonl"}, sampling={"max_completion_length": 7})))


def test_responses_of_the_data_longer_than_the_positions_are_refused():
    """By `opd check`, and by the writer where the tokenizer is known with the weights alone."""
    write_rows(Path("given.jsonl"), [{"prompt": "1+1=", "response": "1" * n} for n in (3, 12, 13)])
    made = recipe(knowing(16), method="sft", teacher=None, options={}, data={"path": "given.jsonl"})
    assert refused(made) == (
        "Stage 'distil': student would read 17 tokens in all, but has only 16 positions. 1 of 3 responses of the data "
        "are too long with their prompts; the longest is that to prompt 2. Leave them out, or use a model with more "
        "positions."
    )
    made["stages"][0]["data"]["limit"] = 2
    check_recipe(parse_recipe(made))
    lm = load_model(ModelSpec(**made["models"]["student"]), name="student")
    ReferenceWriter(student=lm)([Prompt(id=0, content="1+1=", response="1" * 12)], seed=(0, 0))
    with pytest.raises(DataError, match=r"student would read 17 tokens .*Leave the longest responses of the data out"):
        ReferenceWriter(student=lm)([Prompt(id=0, content="1+1=", response="1" * 13)], seed=(0, 0))


def test_check_recipe_refuses_same_length_as_sampler(work: Path):
    """A response that never ends dies at 14 tokens after prompts of 4, and at 13 does not."""
    made = recipe(knowing(16), method="grpo", teacher=None, reward={"name": "final_number"})
    lm = replace(load_model(ModelSpec(**made["models"]["student"]), name="student"), stop_ids=frozenset({-1}))
    for length, dies in ((13, False), (14, True)):
        sampling: dict[str, Any] = {"max_completion_length": length, "n": 2}
        run = parse_recipe({**made, "stages": [{**made["stages"][0], "sampling": sampling}]})
        sampler = TransformersSampler(lm=lm, sampling=Sampling(**sampling))
        prompts = [Prompt(id=0, content="1+1=")]
        if dies:
            with pytest.raises(
                DataError, match=r"has only 16 positions\. Lower sampling\.max_completion_length, or leave"
            ):
                sampler(prompts, seed=(0, 0))
            with pytest.raises(DataError, match="student would read 17 tokens in all"):
                check_recipe(run)
        else:
            sampler(prompts, seed=(0, 0))
            check_recipe(run)


def test_check_recipe_names_evaluate_key_when_held_out_is_long():
    evaluate = {"data": {"path": "held_out.jsonl"}, "sampling": {"drawn": {"max_completion_length": 14}}}
    said = refused(recipe(knowing(16), evaluate=evaluate))
    assert "Lower evaluate.sampling.drawn.max_completion_length to 13" in said


def test_check_recipe_names_task_when_its_responses_are_too_long():
    tasks = {
        "short": {"data": {"path": "train.jsonl"}, "teacher": "teacher"},
        "long": {"data": {"path": "train.jsonl"}, "teacher": "teacher", "sampling": {"max_completion_length": 14}},
    }
    said = refused(recipe(knowing(16), data=None, teacher=None, tasks=tasks))
    assert said.startswith("Stage 'distil', task 'long': student would read 17 tokens in all")


def test_check_recipe_names_teacher_when_its_positions_run_out():
    said = refused(recipe(knowing(512), knowing(16, 1), sampling={"max_completion_length": 13}))
    assert said.startswith("Stage 'distil': teacher would read 17 tokens in all, but has only 16 positions.")
    check_recipe(parse_recipe(recipe(knowing(512), knowing(16, 1), sampling={"max_completion_length": 12})))
    writes = {"method": "sft", "options": {"source": "teacher"}, "teacher_sampling": {"max_completion_length": 14}}
    said = refused(recipe(knowing(512), knowing(16, 1), **writes))
    assert "teacher would read 17 tokens in all" in said
    assert "Lower teacher_sampling.max_completion_length to 13" in said


def test_sft_ignores_max_completion_length_and_gkd_does_not():
    made = recipe(knowing(16), method="sft", teacher=None, sampling={"max_completion_length": 500})
    check_recipe(parse_recipe(made))
    mixed = recipe(knowing(16), method="gkd", options={"on_policy_share": 0.5}, sampling={"max_completion_length": 500})
    assert "student would read 503 tokens" in refused(mixed)


@pytest.mark.parametrize("what", ["check", "train", "doctor"])
def test_max_completion_length_is_refused_before_weights_load(monkeypatch: pytest.MonkeyPatch, what: str):
    forbid(monkeypatch, "opd.runs.build.load_model")
    ended = _command(what, recipe(knowing(16), sampling={"max_completion_length": 20}))
    assert ended.code == 2
    assert "DataError: Stage 'distil': student would read 23 tokens in all" in ended.err


def test_distill_refuses_length_when_student_is_model_object(work: Path):
    lm = load_model(ModelSpec(**knowing(16)), name="student")
    with pytest.raises(DataError, match="student would read 23 tokens in all, but has only 16 positions"):
        opd.distill(
            student=lm.model,
            teacher=lm.model,
            tokenizer=lm.tokenizer,
            prompts=["1+1="],
            method="reverse_kl",
            steps=1,
            sampling={"max_completion_length": 20},
            output_dir=work / "run",
        )


def test_eval_names_own_flag_when_prompts_are_too_long(work: Path):
    lm = load_model(ModelSpec(**knowing(4)), name="model")
    save(lm, work / "model")
    write_rows(work / "short.jsonl", [{"prompt": "1="}])
    ended = command("eval", "model", "short.jsonl", "--n", "64", "--max-completion-length", "20")
    assert "has only 4 positions. 1 of 1 prompts are too long for responses of up to 20 tokens" in ended.err
    assert "Lower --max-completion-length to 3, or use a model with more positions." in ended.err
    ended = command("eval", "model", "long.jsonl")
    assert "even the shortest has 4. Leave out the longest prompts, or use a model with more positions." in ended.err
    assert "max_prompt_length" not in ended.err


def test_train_replaces_run_when_no_step_was_made(
    monkeypatch: pytest.MonkeyPatch,
):
    with monkeypatch.context() as patch:
        forbid(patch, "opd.runs.build.load_model")
        with pytest.raises(AssertionError):
            _command("train", one_stage())
    ended = _command("train", one_stage(steps=1))
    assert ended.code == 0, ended.err
    assert "run: a run of another recipe that made no step was here; this run replaces it" in ended.out
    assert _command("train", one_stage(steps=1, prompts_per_step=3)).code == 1


# --- chat templates --------------------------------------------------------------------------------------------------


def test_template_options_are_refused_when_prompts_are_text():
    thinks = tiny_model(2, chat_template=TEMPLATE, template_options={"enable_thinking": False})
    teacher = tiny_model(1, chat_template=TEMPLATE)
    for models in ({"student": thinks, "teacher": teacher}, {"student": teacher, "teacher": thinks}):
        made = recipe(models["student"], models["teacher"])
        name = next(name for name, model in models.items() if model is thinks)
        with pytest.raises(ConfigError) as caught:
            check_recipe(parse_recipe(made))
        assert str(caught.value).startswith(
            f"models.{name}.template_options is {{'enable_thinking': False}}, and nothing would use it: all prompts of "
            "stage 'distil' are text"
        )
        assert "Set data.chat: true" in str(caught.value)
        said = _command("train", made)
        assert f"models.{name}.template_options" in said.err
        check_recipe(parse_recipe({**made, "stages": [{**made["stages"][0], "data": CHAT}]}))


CHAT = {"path": "train.jsonl", "chat": True}


def test_template_options_are_accepted_when_other_stage_chats():
    thinks = tiny_model(2, chat_template=TEMPLATE, template_options={"enable_thinking": False})
    made = recipe(thinks, tiny_model(1, chat_template=TEMPLATE))
    made["stages"].append({**made["stages"][0], "name": "again", "data": CHAT})
    check_recipe(parse_recipe(made))


def test_check_recipe_names_chat_template_when_prompts_are_text():
    made = recipe(tiny_model(2, chat_template=TEMPLATE), tiny_model(1, chat_template=TEMPLATE))
    said = "student has a chat template, which nothing uses: the prompts are text, and are read as they are."
    assert any(said in line and "data.chat: true" in line for line in check_recipe(parse_recipe(made)))
    made["stages"][0]["data"] = CHAT
    assert not any("which nothing uses" in line for line in check_recipe(parse_recipe(made)))


def _command(what: str, made: dict[str, Any]) -> Any:
    Path("recipe.yaml").write_text(yaml.safe_dump(made, sort_keys=False))
    return command(what, "recipe.yaml")
