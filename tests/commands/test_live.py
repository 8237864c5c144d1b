"""`opd check --live`: what the servers of a recipe say, and each thing that one of them may lack."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engines import Engine, running
from support.http_server import Said
from support.runs import Ended, command, forbid, one_stage, prepare, tiny_model

from opd.models import saving
from opd.models.loading import load_model
from opd.recipe.schema import ModelSpec

TEACHER = tiny_model(1, hidden_size=24)
STUDENT = tiny_model(2)


@pytest.fixture
def servers() -> Iterator[tuple[Engine, Engine]]:
    """A teacher's server and an engine's."""
    teacher = Engine(lm=load_model(ModelSpec(**TEACHER), name="teacher", seed=0), longest=64)
    engine = Engine(lm=load_model(ModelSpec(**STUDENT), name="student", seed=0), name="student", longest=64)
    with running(teacher, engine):
        yield teacher, engine


def checked(
    folder: Path,
    teacher: Engine,
    engine: Engine,
    *flags: str,
    student: Any = STUDENT,
    weights: str = "full",
    **stage: Any,
) -> Ended:
    """`opd check` of a recipe with both, in `folder`."""
    made = one_stage(
        method="topk_reverse_kl",
        options={"k": 4, "by": "student", "form": "tail"},
        engine={"urls": [engine.url], "retries": 0, "weights": weights},
        data={"path": str(folder / "train.jsonl")},
        **stage,
    )
    models = {"student": student, "teacher": {"server": {"urls": [teacher.url], "retries": 0}}}
    prepare(folder, made | {"models": models, "output_dir": str(folder / "run")})
    return command("check", str(folder / "recipe.yaml"), *flags)


def text(ended: Ended) -> str:
    return " ".join((ended.out + ended.err).split())


def test_live_says_what_servers_can_do(servers, tmp_path):
    engine = servers[1]
    said = checked(tmp_path, *servers, "--live")
    assert said.code == 0, said.err
    for part in (
        "teacher: 1 of teacher",
        "teacher: given tokens are scored by position",
        "teacher: one row scored many times at once: log-probs within",
        "teacher: rows of up to 7 tokens, of 63 that its servers read",
        f"engine {engine.url}: student with its first weights; its log-probs are those of its draws",
        f"engine: weights go through {tmp_path / 'run'} (of which {tmp_path} exists), which its servers see",
        "engine: rows of up to 7 tokens, of 64 that its servers read",
        "nothing wrong found",
    ):
        assert part in text(said)
    assert (engine.version, engine.loads) == ("default", [])
    assert not (tmp_path / "run").exists()


def test_check_contacts_no_server_unless_live(servers, tmp_path):
    assert checked(tmp_path, *servers).code == 0
    assert not any(one.arrived for one in servers)


def test_live_loads_no_weights(servers, tmp_path, monkeypatch):
    saving.save(load_model(ModelSpec(**STUDENT), name="student", seed=0), tmp_path / "student")
    forbid(monkeypatch, "opd.models.loading.load_model")
    assert checked(tmp_path, *servers, "--live", student={"path": str(tmp_path / "student")}).code == 0


def test_live_says_what_takes_the_place_of_scores_by_position(servers, tmp_path):
    servers[0].scale_out = False
    assert "its servers do not score given tokens by position" in text(checked(tmp_path, *servers, "--live"))


def test_live_of_recipe_without_servers_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(prepare(tmp_path, one_stage()))
    assert "no servers to contact" in command("check", "recipe.yaml", "--live").out


LACKS: dict[str, tuple[dict[str, Any], str]] = {
    "control routes": ({"dev": False}, "VLLM_SERVER_DEV_MODE=1"),
    "extension": ({"extension": False}, "--worker-extension-cls opd.engines.worker.WeightLoader"),
    "draws": ({"scale_out": False}, "--enable-scale-out"),
    "log-probs of draws": ({"processed": False}, "--logprobs-mode processed_logprobs"),
    "room": ({"longest": 30}, "--max-model-len"),
}


@pytest.mark.parametrize("name", LACKS)
def test_live_names_what_an_engine_lacks(servers, tmp_path, name):
    settings, remedy = LACKS[name]
    for key, value in settings.items():
        setattr(servers[1], key, value)
    said = checked(tmp_path, *servers, "--live", sampling={"max_completion_length": 30})
    assert said.code == 2
    assert remedy in text(said)


def test_live_says_whether_an_engine_takes_adapters(servers, tmp_path):
    student = STUDENT | {"lora": {"rank": 2}}
    said = checked(tmp_path, *servers, "--live", student=student, weights="lora")
    assert said.code == 0, said.err
    assert "engine: 1 of student, which take adapters" in text(said)
    servers[1].lora = False
    said = checked(tmp_path, *servers, "--live", student=student, weights="lora")
    assert said.code == 2
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in text(said)


def test_live_names_a_server_that_does_not_answer(servers, tmp_path):
    gone = copy.copy(servers[1])
    with running(gone):
        pass
    said = checked(tmp_path, servers[0], gone, "--live")
    assert said.code == 2
    assert f"The server {gone.url} does not give its models: no connection" in text(said)


def test_live_refuses_folder_that_servers_do_not_see(servers, tmp_path):
    def blind(arrived: Any, said: Said) -> Said:
        if arrived.target != "/collective_rpc":
            return said
        return Said(body={"results": [{"tensors": 0, "sees": False}]})

    servers[1].fault = blind
    said = checked(tmp_path, *servers, "--live")
    assert said.code == 2
    assert f"does not see the folder {tmp_path}" in text(said)


def test_live_refuses_versions_that_are_not_there(servers, tmp_path):
    def without(arrived: Any, said: Said) -> Said:
        if arrived.request.get("cache_salt") is None:
            return said
        return Said(body={"choices": [{**said.body["choices"][0], "weight_versions": None}]})

    servers[1].fault = without
    assert "vLLM does since 0.32" in text(checked(tmp_path, *servers, "--live"))


def test_live_module_needs_no_torch():
    code = "import sys, opd.commands.live, opd.engines.control; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
