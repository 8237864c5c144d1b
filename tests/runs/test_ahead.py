"""One step ahead, with a server that draws: the numbers of a loop in order, kills, and what is refused or said."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import Engine, running
from support.http_server import Arrived, Said
from support.in_order import in_order
from support.models import policy
from support.runs import Forks, Strike, assert_same, command, one_stage, prepare, start, tiny_model

import opd
from opd.engines.threads import in_thread
from opd.errors import ConfigError, RunError, TrainingError
from opd.loss.step import gradient, scored
from opd.models.language_model import LanguageModel
from opd.models.loading import load_model
from opd.recipe.schema import EngineSection, ModelSpec, StageSpec
from opd.runs.served import engine_samplers
from opd.samplers.ahead import one_ahead
from opd.types import Prompt, Record

STEPS = 5
TOP_K: dict[str, Any] = {"method": "topk_reverse_kl", "options": {"k": 4, "by": "student", "form": "tail"}}
SAMPLED: dict[str, Any] = {"method": "opd", "importance": {"level": "token", "cap": 1.5}}


def model(name: str) -> LanguageModel:
    spec = tiny_model(1, hidden_size=24) if name == "teacher" else tiny_model(2)
    return load_model(ModelSpec(**spec), name=name, seed=0)


@pytest.fixture
def engine() -> Iterator[Engine]:
    one = Engine(lm=model("student"), name="student", longest=512)
    with running(one):
        yield one


def recipe(one: Engine, **stage: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "steps": STEPS,
        "ahead": 1,
        "engine": {"urls": [one.url], "patience_s": 2.0, "retries": 0},
        "optimizer": {"learning_rate": 0.05, "schedule": "constant"},
        "sampling": {"max_completion_length": 5, "n": 2},
        "checkpoint": {"every": 2},
        "samples_every": 1,
        **stage,
    }
    made = one_stage(**settings)
    return made | {"models": {"teacher": tiny_model(1, hidden_size=24), "student": tiny_model(2)}}


def rows(folder: Path, name: str = "metrics") -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / f"run/distil/{name}.jsonl").read_text().splitlines()]
    return [row for row in found if name != "metrics" or "train/loss" in row]


def run(folder: Path, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    prepare(folder, made)
    monkeypatch.chdir(folder)
    opd.run("recipe.yaml", quiet=True)
    return folder


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [TOP_K, SAMPLED, {"method": "grpo", "reward": {"name": "final_number"}}])
def test_losses_are_those_of_a_loop_in_order(engine, tmp_path, monkeypatch, settings):
    made = recipe(engine, **settings)
    run(tmp_path, made, monkeypatch)
    if settings["method"] != "grpo":  # whose reward this loop does not have
        wanted = in_order(made["stages"][0], model("student"), model("teacher"), tmp_path / "again")
        assert [row["train/loss"] for row in rows(tmp_path)] == pytest.approx(wanted, abs=1e-6)
    assert [row["rollout/staleness_max"] for row in rows(tmp_path)] == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert all(row["engine_waited_s"] >= 0 for row in rows(tmp_path, "timings"))


def test_values_of_the_student_are_the_steps(engine, tmp_path):
    """The sampler's log-probs are those of the older weights, the policy's and the top k those of the step."""
    student = model("student")
    spec = StageSpec.model_validate(recipe(engine, **TOP_K)["stages"][0])
    sampler = one_ahead(engine_samplers(spec, EngineSection(urls=[engine.url]), student, tmp_path), 0)
    prompts = [Prompt(id=i, content=text) for i, text in enumerate(("1+2=", "3+3="))]
    sampler.sync(0)
    sampler.begin(0, prompts)
    sampler.wait()
    old = model("student")
    with torch.no_grad():
        for weight in student.model.parameters():
            weight.mul_(1.5)
    for one in sampler(prompts, seed=(0, 0), record=Record(top_k=4, entropy=True)):
        drawn, now = (policy(lm, one).gather(1, one.response_ids[:, None])[:, 0] for lm in (old, student))
        torch.testing.assert_close(one.sampler_logp.double(), drawn, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.policy_logp.double(), now, atol=1e-5, rtol=0)
        assert float((drawn - now).abs().max()) > 1e-2
        assert torch.equal(one.student_top_ids, policy(student, one).topk(4).indices)
        assert one.sampler_version == 0


def test_engine_draws_while_the_step_trains(engine, tmp_path, monkeypatch):
    """The requests of step s + 1 have arrived when the gradient of step s is computed."""
    seen: list[int] = []
    real = gradient

    def gradient_(*given: Any, **named: Any) -> Any:
        seen.append(len([one for one in engine.arrived if "seed" in one.request.get("sampling_params", {})]))
        return real(*given, **named)

    monkeypatch.setattr("opd.train.gradient", gradient_)
    monkeypatch.setattr("opd.samplers.vllm.in_thread", lambda work: waited(in_thread(work)))
    run(tmp_path, recipe(engine, **TOP_K), monkeypatch)
    mode, each = 1, 4  # the check of the server's mode; two prompts of two responses
    assert seen == [mode + each * min(step + 2, STEPS) for step in range(STEPS)]


def waited(future: Any) -> Any:
    future.exception()
    return future


@pytest.mark.parametrize(("by", "early"), [("teacher", True), ("student", False)])
def test_served_teacher_scores_what_needs_no_student(engine, tmp_path, monkeypatch, by, early):
    """The same losses as with the teacher in this process; its top k is scored before the step, once."""
    teacher = Engine(lm=model("teacher"), longest=512)
    method = {"method": "topk_reverse_kl", "options": {"k": 4, "by": by, "form": "tail"}}
    method |= {"samples": {"rows": 0, "follow": 0, "held_out": 0}}  # which are scored apart
    with running(teacher):
        made = recipe(engine, **method)
        served = made | {"models": made["models"] | {"teacher": {"server": {"urls": [teacher.url]}}}}
        at: list[int] = []
        real = scored

        def scored_(*given: Any, **named: Any) -> Any:
            at.append(len(teacher.scored))
            return real(*given, **named)

        monkeypatch.setattr("opd.train.scored", scored_)
        run(tmp_path / "served", served, monkeypatch)
        total = len(teacher.scored)
    run(tmp_path / "local", made, monkeypatch)
    near, far = ([row["train/loss"] for row in rows(tmp_path / name)] for name in ("local", "served"))
    assert far == pytest.approx(near, abs=1e-5)
    counts = rows(tmp_path / "served", "timings")
    assert sum(row["teacher_repeated"] + row["teacher_failed"] for row in counts) == 0
    assert total == 4 * STEPS, "each response is scored once"
    for step, requests in enumerate(at[1:STEPS], start=1):
        assert (requests >= 4 * (step + 1)) == early, "before the step's own requests"


# --- kills -----------------------------------------------------------------------------------------------------------

PHASES = {
    "while the first responses are drawn": Strike(call="opd.samplers.vllm.seed_of", nth=2),
    "while responses are drawn ahead": Strike(call="opd.samplers.vllm.seed_of", nth=14),
    "before weights are written": Strike(call="opd.engines.sync.Sync.__call__", nth=4),
    "before the servers load": Strike(call="opd.engines.sync.Folder.load", nth=4),
    "after the servers load": Strike(call="opd.engines.sync.Folder.load", nth=4, when="after"),
    "before an update is proved": Strike(call="opd.engines.sync.Sync._prove", nth=4),
    "before responses are taken": Strike(call="opd.samplers.ahead.Ahead.__call__", nth=4),
    "before the next are begun": Strike(call="opd.samplers.ahead.Ahead.begin", nth=4),
    "in the teacher's scores": Strike(call="opd.teachers.local.teacher_scores", nth=5),
    "in the gradient": Strike(call="opd.loss.step.loss_of", nth=4),
    "before the update": Strike(call="opd.stage.stage.Stage.update", nth=4),
    "after the update": Strike(call="opd.stage.stage.Stage.update", nth=4, when="after"),
    "before the checkpoint's responses": Strike(call="opd.stage.drawn_ahead.saved", nth=2),
    "in the checkpoint": Strike(call="opd.stage.checkpoint.write_tensors", nth=2, when="half"),
    "after the checkpoint": Strike(call="opd.stage.resume.Trained.save", nth=2, when="after"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Path]]:
    """A server, and a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    one = Engine(lm=model("student"), name="student", longest=512)
    with running(one):
        prepare(folder, recipe(one, **TOP_K))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            opd.run("recipe.yaml", quiet=True)
        yield one, folder / "run"


@pytest.mark.parametrize("phase", PHASES)
def test_killed_run_continues_to_the_same_numbers(whole, tmp_path, forks: Forks, phase):
    one, expected = whole
    folder = prepare(tmp_path / "killed", recipe(one, **TOP_K))
    ended = forks.start(folder, "train", "recipe.yaml", strike=PHASES[phase])
    assert ended.code == -signal.SIGKILL, ended.err
    again = forks.start(folder, "train", "recipe.yaml")
    assert again.code == 0, again.err
    assert_same(folder / "run", expected)


def test_stopped_run_continues_with_its_responses(whole, tmp_path, forks: Forks):
    one, expected = whole
    folder = prepare(tmp_path / "stopped", recipe(one, **TOP_K))
    strike = Strike(call="opd.loss.step.loss_of", nth=3, signals=("SIGINT",))
    assert forks.start(folder, "train", "recipe.yaml", strike=strike).code == 130
    before = len(one.arrived)
    assert forks.start(folder, "train", "recipe.yaml").code == 0
    assert_same(folder / "run", expected)
    drawn = [arrived for arrived in one.arrived[before:] if "seed" in arrived.request.get("sampling_params", {})]
    assert len(drawn) == 1 + 4, "the mode's check and step 5: those of step 4 are in the checkpoint"


def test_dead_server_costs_no_step(engine, tmp_path, monkeypatch):
    """No server gives the responses of step 4, drawn while step 3 trains: the steps before are saved."""
    made = recipe(engine, **TOP_K)
    draws = [0]

    def dies(arrived: Any, said: Any) -> Any:
        draws[0] += "seed" in arrived.request.get("sampling_params", {})
        return replace(said, status=500) if draws[0] > 1 + 3 * 4 else said

    engine.fault = dies
    with pytest.raises(TrainingError, match=r"No server of the engine gave a response|could not be given"):
        run(tmp_path, made, monkeypatch)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    engine.fault = lambda arrived, said: said
    ended = command("train", "recipe.yaml")
    assert ended.code == 0
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert "no server gave the responses of step 4 before the run ended" in " ".join((ended.out + ended.err).split())


HELD_S = 120.0  # far longer than the rest of the run, if it does not wait for these responses


@contextmanager
def holding(engine: Engine) -> Iterator[tuple[threading.Event, list[Arrived]]]:
    """The engine keeps the responses to step 3, which it draws while step 2 trains, until the block ends.

    Yields what says that one is requested, and those that it gave nevertheless after `HELD_S` seconds.
    """
    asked, over, given = threading.Event(), threading.Event(), list[Arrived]()

    def holds(arrived: Arrived, said: Said) -> Said:
        if "seed" in arrived.request.get("sampling_params", {}) and engine.version == "1":
            asked.set()
            if not over.wait(HELD_S):
                given.append(arrived)
        return said

    engine.fault = holds
    try:
        yield asked, given
    finally:
        over.set()


def test_error_does_not_wait_for_the_next_responses(engine, tmp_path):
    """The teacher's server fails in step 2. A process of its own: threads must not keep it alive either."""
    teacher = Engine(lm=model("teacher"), longest=512)
    with running(teacher), holding(engine) as (asked, given):

        def fails(arrived: Arrived, said: Said) -> Said:
            return replace(said, status=400) if engine.version == "1" and asked.wait(HELD_S) else said

        teacher.fault = fails
        made = recipe(engine, **TOP_K)
        models = made["models"] | {"teacher": {"server": {"urls": [teacher.url], "retries": 0, "patience_s": 0.5}}}
        ended = start(prepare(tmp_path / "ends", made | {"models": models}), "train", "recipe.yaml")
        assert not given
    assert ended.code == 1
    assert "TeacherError: The servers of the teacher 'teacher' gave no scores for 4 of 4 requests" in ended.err
    assert "an error after 1 steps, of which 0 are lost" in ended.out


def test_error_of_an_evaluation_waits_for_no_responses(engine, tmp_path, monkeypatch):
    """It comes after step 2, which is saved without the responses to step 3. The next start says so."""
    evaluate = {"data": {"path": "held_out.jsonl"}, "reward": {"name": "final_number"}, "every": 2, "before": False}
    made = recipe(engine, **TOP_K, checkpoint={"every": 4}, evaluate=evaluate)
    in_the_way = tmp_path / "run/distil/held_out_step_000002.parquet"
    with holding(engine) as (_, given):
        holds = engine.fault

        def blocks(arrived: Arrived, said: Said) -> Said:
            if engine.version == "1":
                in_the_way.mkdir(exist_ok=True)
            return holds(arrived, said)

        engine.fault = blocks
        with pytest.raises(RunError, match=r"held_out_step_000002.parquet cannot be written"):
            run(tmp_path, made, monkeypatch)
        assert not given
        engine.fault = lambda arrived, said: said  # before the rest of the responses is requested
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    in_the_way.rmdir()
    ended = command("train", "recipe.yaml")
    assert ended.code == 0
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert "no server gave the responses of step 3 before the run ended" in " ".join((ended.out + ended.err).split())


# --- what is refused, and what is said -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "why"),
    [
        ({"engine": None}, r"needs an `engine`"),
        ({"method": "gkd", "options": {"on_policy_share": 0.5}}, r"not the student alone writes"),
        ({"method": "vopd"}, r"subtracts a baseline"),
        ({"method": "reverse_kl", "importance": {}}, r"weighs a policy gradient, and method 'reverse_kl' has none"),
        ({"method": "opd", "options": {"importance": True}, "importance": {}}, r"ratio of its own"),
    ],
)
def test_check_refuses_what_cannot_be_ahead(tmp_path, monkeypatch, stage, why):
    engine = Engine(lm=None, url="http://127.0.0.1:9")  # type: ignore[arg-type]
    prepare(tmp_path, recipe(engine, **stage))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=why):
        opd.run("recipe.yaml", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stage", "biased"),
    [({"method": "opd"}, True), (SAMPLED, False), (TOP_K, False), ({"method": "opd", "ahead": 0}, False)],
)
def test_check_names_the_bias_without_weights(tmp_path, monkeypatch, stage, biased):
    prepare(tmp_path, recipe(Engine(lm=None, url="http://127.0.0.1:9"), **stage))  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    said = " ".join(command("check", "recipe.yaml").out.split())
    assert ("is a policy gradient without importance weights" in said) == biased


def test_run_names_the_bias_too(engine, tmp_path, monkeypatch):
    prepare(tmp_path, recipe(engine, method="opd", steps=1))
    monkeypatch.chdir(tmp_path)
    ended = command("train", "recipe.yaml")
    assert ended.code == 0
    assert "is a policy gradient without importance weights" in " ".join((ended.out + ended.err).split())


def test_more_steps_than_were_drawn_are_refused(engine, tmp_path, monkeypatch):
    run(tmp_path, recipe(engine, **TOP_K), monkeypatch)
    prepare(tmp_path, recipe(engine, **TOP_K, steps=STEPS + 1))
    with pytest.raises(RunError, match=r"would be of the weights after step 4, which are gone"):
        opd.run("recipe.yaml", quiet=True)
