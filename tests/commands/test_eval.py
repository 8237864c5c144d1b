"""`opd eval --recipe`: a model is measured as a stage of the recipe measures its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from support.gguf_files import byte_level, model_file
from support.runs import CHARACTERS, EVALUATE, command, forbid, one_stage, prepare, sums, tiny_model, write_rows

import opd
from opd.errors import AlignmentError, ConfigError, DataError
from opd.models import saving
from opd.models.loading import load_model
from opd.recipe.load import load_recipe
from opd.recipe.schema import ModelSpec
from opd.runs.measured import Reads
from opd.runs.prepare import Given, prepare_held_out
from opd.runs.prepare import prepare as prepare_stage

GAME = "opd.environments.guessing:guessing"


def trained(folder: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """The evaluations of a run in `folder`, in order: before and after training."""
    prepare(folder, recipe)
    monkeypatch.chdir(folder)
    opd.run("recipe.yaml", quiet=True)
    lines = (folder / "run/distil/metrics.jsonl").read_text().splitlines()
    found: list[dict[str, float]] = []
    for line in map(json.loads, lines):
        measured = {key.removeprefix("eval/"): value for key, value in line.items() if key.startswith("eval/")}
        if measured:
            found.append(measured)
    return found


def measured(*arguments: str) -> dict[str, float]:
    ended = command("eval", *arguments, "--json")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)["metrics"]


def test_saved_model_has_the_numbers_of_the_runs_last_evaluation(tmp_path, monkeypatch):
    after = trained(tmp_path, one_stage(evaluate={**EVALUATE, "every": 0, "pass_at": [1, 2]}), monkeypatch)[-1]
    found = measured("run/distil/model", "--recipe", "recipe.yaml", "--responses", "rows.jsonl")
    assert {"greedy/reward", "drawn/reward", "drawn/pass@2", "drawn/length"} <= found.keys()
    assert found == {key: after[key] for key in found}
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [(row["setting"], row["prompt_id"], row["sample"]) for row in rows] == [
        *(("greedy", i, 0) for i in range(5)),
        *(("drawn", i, s) for i in range(5) for s in range(2)),
    ]
    mean = sum(row["metrics"]["reward"] for row in rows[5:]) / 10
    assert mean == pytest.approx(found["drawn/reward"])


def test_overrides_limit_seed_and_teacher(tmp_path, monkeypatch):
    trained(tmp_path, one_stage(evaluate={**EVALUATE, "every": 0}), monkeypatch)
    model = ("run/distil/model", "--recipe", "recipe.yaml")
    assert measured(*model, "--limit", "3")["greedy/responses"] == 3
    assert measured(*model, "--set", "stages.distil.evaluate.sampling.drawn.n=4")["drawn/responses"] == 20
    texts = {}
    for seed in ("0", "7"):
        measured(*model, "--seed", seed, "--responses", "rows.jsonl")
        rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
        texts[seed] = [row["response"] for row in rows]
    assert texts["0"][:5] == texts["7"][:5], "greedy, nothing is drawn"
    assert texts["0"][5:] != texts["7"][5:]
    own = measured(*model, "--teacher", "run/distil/model")
    assert own["reverse_kl"] == pytest.approx(0, abs=1e-9)


def test_training_data_are_not_read(tmp_path, monkeypatch):
    trained(tmp_path, one_stage(evaluate=EVALUATE), monkeypatch)
    (tmp_path / "train.jsonl").unlink()
    assert measured("run/distil/model", "--recipe", "recipe.yaml")["greedy/responses"] == 5


def test_parts_that_measure_nothing_are_not_read(tmp_path, monkeypatch):
    trained(tmp_path, one_stage(evaluate={**EVALUATE, "every": 0}), monkeypatch)
    alone = {**EVALUATE, "teacher": False, "kl": False}
    broken = one_stage(evaluate=alone, method="nowhere.mine:method", teacher=None, reward={"name": "nowhere:fn"})
    broken["models"]["student"] = {"path": "./nowhere"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(broken))
    assert measured("run/distil/model", "--recipe", "recipe.yaml")["greedy/responses"] == 5


def test_what_cannot_be_measured_is_refused_by_its_key(tmp_path, monkeypatch):
    prepare(tmp_path, one_stage(evaluate={**EVALUATE, "pass_at": [1, 3]}))
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    for more in (
        (),
        ("--set", "stages.distil.evaluate.pass_at=[1]", "--set", "models.student.device=meta"),
        ("--teacher", "--limit", "6"),
    ):
        ended = command("eval", "run/distil/model", "--recipe", "recipe.yaml", *more)
        assert ended.code == 2
        said.append(" ".join(ended.err.split()))
    assert "evaluate.pass_at has pass@3, and the settings sample at most 2 responses per prompt" in said[0]
    assert "models.student.device is 'meta', which cannot be used" in said[1]
    assert "got --recipe recipe.yaml and DATA (6)" in said[2], "--limit was read as the teacher"


CHAT = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}={% if plus is defined %}+{% endif %}{% endif %}"
)


@pytest.mark.parametrize(("own", "read"), [({}, "2+2==+"), ({"template_options": {}}, "2+2==")])
def test_model_from_a_stage_reads_as_the_model_there(tmp_path, monkeypatch, own, read):
    """The template's options are of the model, unless others are written, if only none; check, run and eval agree."""
    evaluate = {**EVALUATE, "data": {"path": "held_out.jsonl", "chat": True}, "every": 0}
    recipe = one_stage(evaluate=evaluate, data={"path": "train.jsonl", "chat": True})
    for model in recipe["models"].values():
        model |= {"chat_template": CHAT}
    recipe["models"]["student"]["template_options"] = {"plus": True}
    recipe["models"]["later"] = {"from_stage": "distil", **own}
    recipe["stages"].append({**recipe["stages"][0], "name": "again", "train": "later"})
    prepare(tmp_path, recipe)
    monkeypatch.chdir(tmp_path)
    assert "the student reads (6 tokens): '0+0==+'" in command("check", "recipe.yaml").out
    opd.run("recipe.yaml", quiet=True)
    for stage, expected in (("distil", "2+2==+"), ("again", read)):
        rows = pq.read_table(f"run/{stage}/held_out_before.parquet").to_pylist()
        assert rows[0]["student_reads"] == expected, stage
    last = json.loads((tmp_path / "run/again/metrics.jsonl").read_text().splitlines()[-1])
    found = measured("run/again/model", "--recipe", "recipe.yaml")
    assert found == {key: last[f"eval/{key}"] for key in found}


def test_peers_are_measured_with_the_ids_of_the_model_train():
    spec = load_recipe("copd", []).stage("copd")
    exams, _ = prepare_held_out(spec, 0)
    own = prepare_stage(spec.as_seen_by(spec.train), Given(), 0)
    for name, task in own.tasks.items():
        assert task.held_out is not None
        assert [p.id for p in exams[name].prompts] == [p.id for p in task.held_out.prompts]


def test_tasks_are_measured_by_name(tmp_path, monkeypatch):
    one = {"data": {"path": "train.jsonl"}, "teacher": "teacher", "evaluate": {**EVALUATE, "every": 0}}
    two = {**one, "evaluate": {**EVALUATE, "every": 0, "data": {"path": "other.jsonl"}}}
    write_rows(tmp_path / "other.jsonl", sums(17, 3))
    recipe = one_stage(tasks={"a": one, "b": two}, data=None, teacher=None)
    after = trained(tmp_path, recipe, monkeypatch)[-1]
    found = measured("run/distil/model", "--recipe", "recipe.yaml")
    assert (found["a/greedy/responses"], found["b/greedy/responses"]) == (5, 3)
    assert found == {key: after[key] for key in found}


def test_conversations_are_led_with_the_stages_environment(tmp_path, monkeypatch):
    student = tiny_model(2, characters="abcdefghijklmnopqrstuvwxyz01234;<>?")
    data = {"path": "opd.data.toy:guesses", "options": {"count": 8}}
    recipe = one_stage(
        method="grpo",
        teacher=None,
        data=data,
        environment={"name": GAME, "max_turns": 3},
        sampling={"n": 2, "max_completion_length": 9, "stop": [";"]},
        evaluate={"data": data, "sampling": {"drawn": {"n": 2, "max_completion_length": 9, "stop": [";"]}}},
    )
    recipe = {**recipe, "models": {"student": student}}
    after = trained(tmp_path, recipe, monkeypatch)[-1]
    found = measured("run/distil/model", "--recipe", "recipe.yaml", "--responses", "rows.jsonl")
    assert found["drawn/environment/turns"] > 1
    assert found == {key: after[key] for key in found}
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert sum(row["tokens"] for row in rows) / len(rows) == found["drawn/length"], "the student's alone"
    assert sum(len(row["turns"]) for row in rows) / len(rows) == found["drawn/environment/turns"]
    for row in rows:
        said = "".join(turn["environment"] + turn["student"] for turn in row["turns"])
        assert said.replace("<pad>", "").replace("<eos>", "") == row["response"]
        assert [turn["environment"] in ("<", ">", "?") for turn in row["turns"]] == [False] + [True] * (
            len(row["turns"]) - 1
        )
        assert sum(turn["reward"] or 0 for turn in row["turns"]) == row["metrics"]["reward"]


def test_stage_without_an_evaluation_is_refused(tmp_path, monkeypatch):
    prepare(tmp_path, one_stage())
    monkeypatch.chdir(tmp_path)
    ended = command("eval", "run/distil/model", "--recipe", "recipe.yaml")
    assert ended.code == 2
    assert "no stage of this one has an `evaluate` section. Add one, or give prompts" in ended.err
    first, last = one_stage(evaluate=EVALUATE), one_stage(name="later")
    both = {**first, "stages": [*first["stages"], *last["stages"]]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(both))
    ended = command("eval", "run/distil/model", "--recipe", "recipe.yaml", "--stage", "later")
    assert ended.code == 2
    assert "stage 'later' has no `evaluate` section. Stages with one: distil" in ended.err


def rows_of(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_python_has_the_numbers_and_rows_of_the_command(tmp_path, monkeypatch):
    evaluate = {**EVALUATE, "every": 0, "pass_at": [1, 2]}
    after = trained(tmp_path, one_stage(evaluate=evaluate), monkeypatch)[-1]
    model = "run/distil/model"
    own = opd.evaluate(model, recipe="recipe.yaml", quiet=True)
    assert own.metrics == measured(model, "--recipe", "recipe.yaml", "--responses", "rows.jsonl")
    assert own.rows == rows_of("rows.jsonl")
    assert own.metrics == {key: after[key] for key in own.metrics}
    drawn = "stages.distil.evaluate.sampling.drawn.n=4"
    other = opd.evaluate(
        model, recipe="recipe.yaml", overrides=[drawn], stage="distil", limit=3, seed=7, teacher=model, quiet=True
    )
    assert other.metrics["drawn/responses"] == 12
    assert other.metrics["reverse_kl"] == pytest.approx(0, abs=1e-9)
    more = ("--set", drawn, "--stage", "distil", "--limit", "3", "--seed", "7", "--teacher", model)
    assert other.metrics == measured(model, "--recipe", "recipe.yaml", *more, "--responses", "rows.jsonl")
    assert other.rows == rows_of("rows.jsonl")


def test_model_object_reads_as_the_recipes_student(tmp_path, monkeypatch):
    """The student that a run returns has the numbers of the run's last evaluation; other objects its template."""
    data = {"path": "held_out.jsonl", "chat": True}
    recipe = one_stage(evaluate={**EVALUATE, "data": data, "every": 0}, data={"path": "train.jsonl", "chat": True})
    for model in recipe["models"].values():
        model |= {"chat_template": CHAT}
    recipe["models"]["student"]["template_options"] = {"plus": True}
    after = trained(tmp_path, recipe, monkeypatch)[-1]
    run = opd.load_run("run")
    bare, text = run.tokenizer, "{% for m in messages %}{{ m.content }};{% endfor %}"
    bare.chat_template = text
    for given in (recipe, load_recipe("recipe.yaml")):
        found = opd.evaluate(run.student, recipe=given, tokenizer=bare, quiet=True).metrics
        assert found == {key: after[key] for key in found}
    assert bare.chat_template == text, "the caller's own"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompts": ["1+1="], "chat": True}, "got a recipe and `prompts`, `chat`. The recipe has the prompts"),
        ({"reward": "exact", "sampling": {"n": 2}}, "got a recipe and `reward`, `sampling`"),
        ({"device": "cpu", "columns": {"prompt": "q"}}, "got a recipe and `device`, `columns`"),
        ({"limit": 0}, "limit=0. Give at least 1"),
        ({"stage": "distill"}, "has no stage 'distill' to measure a model by. Did you mean 'distil'?"),
        ({"recipe": None}, "neither `prompts` nor a `recipe`"),
        ({"recipe": None, "prompts": ["1+1="], "stage": "distil"}, "stage='distil' without a recipe"),
        ({"recipe": None, "prompts": ["1+1="], "overrides": ["seed=1"]}, "overrides=['seed=1'] without a recipe"),
        ({"recipe": None, "prompts": ["1+1="], "limit": 2}, "limit=2 and rows. Give fewer rows"),
        ({"model": "./modl"}, "opd.evaluate(model=...): modl does not exist"),
        ({"teacher": "./modl"}, "opd.evaluate(teacher=...): modl does not exist"),
    ],
)
def test_python_refuses_arguments_that_contradict(tmp_path, monkeypatch, arguments, said):
    prepare(tmp_path, one_stage(evaluate=EVALUATE))
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "model")
    with pytest.raises(ConfigError) as raised:
        opd.evaluate(**{"model": "model", "recipe": "recipe.yaml", "quiet": True} | arguments)
    assert said in str(raised.value)


def folder(path: Path, *, positions: int = 512, **spec: Any) -> str:
    """A saved tiny model with this many positions."""
    section = tiny_model(1, **spec)
    section["init"]["max_position_embeddings"] = positions
    saving.save(load_model(ModelSpec(**section), name="tiny"), path)
    return str(path)


ALIKE = "{% for m in messages %}{{ m.content if '+' not in m.content }}={% endfor %}"  # every prompt of the data


@pytest.mark.parametrize(
    ("model", "teacher", "error", "said"),
    [
        ({}, {"characters": CHARACTERS[::-1]}, AlignmentError, "tokenizers of model (15 tokens) and teacher (15) di"),
        ({}, {"positions": 5}, DataError, "Stage 'distil': teacher would read 8 tokens in all, but has only 5 pos"),
        ({"positions": 5}, None, DataError, "Stage 'distil': model would read 7 tokens in all, but has only 5 pos"),
        ({}, {"chat_template": ALIKE}, DataError, "Correct the chat template of its tokenizer or the data"),
        ({}, {"chat_template": "{% bad %}"}, DataError, "other' refused prompt"),
    ],
)
def test_what_models_read_is_checked_before_their_weights(tmp_path, monkeypatch, model, teacher, error, said):
    recipe = one_stage(evaluate={**EVALUATE, "data": {"path": "held_out.jsonl", "chat": True}})
    recipe["models"]["student"] |= {"chat_template": CHAT}
    prepare(tmp_path, recipe)
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"model": folder(tmp_path / "one", **model)}
    if teacher is not None:
        given["teacher"] = folder(tmp_path / "other", **{"chat_template": CHAT, **teacher})
    forbid(monkeypatch, "opd.commands.eval.load_model")
    with pytest.raises(error) as raised:
        opd.evaluate(**given, recipe="recipe.yaml", quiet=True)
    assert said in str(raised.value)


def test_own_prompts_are_checked_before_weights_too(tmp_path, monkeypatch, capsys):
    prepare(tmp_path, one_stage())
    monkeypatch.chdir(tmp_path)
    model, other = folder(tmp_path / "one", chat_template=CHAT), folder(tmp_path / "two", characters=CHARACTERS[::-1])
    short = folder(tmp_path / "short", positions=5)
    with monkeypatch.context() as patch:
        forbid(patch, "opd.commands.eval.load_model")
        ended = command("eval", model, "held_out.jsonl", "--teacher", other)
        assert ended.code == 2
        assert "The tokenizers of model (15 tokens) and teacher (15) differ" in ended.err
        with pytest.raises(DataError) as raised:
            opd.evaluate(short, "held_out.jsonl", sampling={"max_completion_length": 3}, quiet=True)
    said = "The held-out prompts: model would read 6 tokens in all, but has only 5 positions"
    assert str(raised.value).startswith(said)
    assert "Lower sampling.max_completion_length to 2" in str(raised.value)
    unused = (
        "model has a chat template, which nothing uses: the prompts are text, and are read as they are. For answers "
    )
    ended = command("eval", model, "held_out.jsonl", "--max-completion-length", "1")
    assert f"eval: {unused}as in a chat, add --chat" in ended.err
    opd.evaluate(model, "held_out.jsonl", sampling={"max_completion_length": 1})
    assert f"evaluate: {unused}as in a chat, give chat=True" in capsys.readouterr().err


def test_tokenizer_that_comes_with_the_weights_is_checked_with_them(tmp_path, monkeypatch):
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    words = {**byte_level(["ab"]), "tokenizer.ggml.pre": "no-such-rule"}
    file, _ = model_file(tmp_path / "tiny.gguf", vocabulary=words)
    prepare(tmp_path, one_stage(evaluate=EVALUATE))
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"model": str(file), "recipe": "recipe.yaml", "quiet": True}
    assert opd.evaluate(**given).metrics["greedy/responses"] == 5
    assert Reads.before(ModelSpec(path=str(file)), "model", "here", "its template") is not None, "it is converted"
    file.touch()  # so it is another file, which is not
    assert Reads.before(ModelSpec(path=str(file)), "model", "here", "its template") is None
    forbid(monkeypatch, "opd.samplers.hf.TransformersSampler.__call__")
    with pytest.raises(DataError, match=r"Stage 'distil': model would read 65 tokens in all, but has only 64 pos"):
        opd.evaluate(**given, overrides=["stages.distil.evaluate.sampling.greedy.max_completion_length=62"])


def test_warnings_about_what_models_read_are_said(tmp_path, monkeypatch):
    prepare(tmp_path, one_stage(evaluate=EVALUATE))
    monkeypatch.chdir(tmp_path)
    model, teacher = folder(tmp_path / "one", chat_template=CHAT), folder(tmp_path / "other")
    ended = command("eval", model, "--recipe", "recipe.yaml", "--teacher", teacher)
    assert ended.code == 0, ended.err
    assert ended.err.count("eval: model has a chat template, which nothing uses: the prompts are text") == 1
