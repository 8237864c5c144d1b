"""Several processes, and several nodes, with an engine and a teacher on servers: the run of one process."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.drawing import DrawingEngine
from support.engines import Engine, running
from support.http_server import Arrived, Said
from support.runs import ENVIRONMENT, Ended, Forks, one_stage, prepare, tiny_model
from support.vllm_server import free_port

from opd.models.loading import load_model
from opd.recipe.schema import ModelSpec

STEPS = 3
TEACHER = tiny_model(1, hidden_size=24)
CLOSE = 2e-5


def student(**spec: Any) -> dict[str, Any]:
    made = tiny_model(2, **spec)
    made["init"] |= {"num_hidden_layers": 2}
    return made


@pytest.fixture
def servers() -> Iterator[tuple[DrawingEngine, Engine]]:
    """An engine, whose own weights are not the student's, and a teacher."""
    engine = DrawingEngine(lm=load_model(ModelSpec.model_validate(student() | {"seed": 5}), name="student", seed=0))
    teacher = Engine(lm=load_model(ModelSpec(**TEACHER), name="teacher", seed=0), longest=512)
    with running(engine, teacher):
        yield engine, teacher


def recipe(writes: Engine, scores: Engine, model: dict[str, Any] | None = None, **stage: Any) -> dict[str, Any]:
    settings = {
        "method": "topk_reverse_kl",
        "options": {"k": 4, "by": "student", "form": "tail"},
        "steps": STEPS,
        "prompts_per_step": 3,  # one process has two of them
        "micro_batch_tokens": 24,
        "sampling": {"max_completion_length": 5, "top_p": 0.9, "n": 2},
        "optimizer": {"learning_rate": 0.01, "eps": 1e-4},
        "samples_every": 1,
        "engine": {"urls": [writes.url], "patience_s": 5.0},
    }
    made = one_stage(**(settings | stage))
    served = {"server": {"urls": [scores.url], "patience_s": 5.0}}
    return made | {"models": {"student": model or student(), "teacher": served}}


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/distil" / name).read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    """The same numbers, responses and weights up to the rounding of sums."""
    assert len(rows(one, "metrics.jsonl")) == STEPS
    for row, got in zip(rows(one, "metrics.jsonl"), rows(other, "metrics.jsonl"), strict=True):
        assert got == pytest.approx(row, rel=CLOSE, abs=1e-6)
    wanted, found = (load_file(folder / "run/distil/model/model.safetensors") for folder in (one, other))
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() <= CLOSE * tensor.abs().max(), name


def trained(forks: Forks, folder: Path, made: dict[str, Any], processes: int) -> Path:
    ended = forks.start(prepare(folder, made), "train", "recipe.yaml", processes=processes)
    assert ended.code == 0, ended.err
    return folder


@pytest.mark.parametrize("model", [student(), student(lora={"rank": 2, "alpha": 4})], ids=["full", "lora"])
def test_two_processes_with_servers_equal_one(forks, servers, tmp_path, model):
    engine, _ = servers
    one = trained(forks, tmp_path / "one", recipe(*servers, model=model), 1)
    requests = len(engine.drawn)
    two = trained(forks, tmp_path / "two", recipe(*servers, model=model), 2)
    assert_same_run(one, two)
    assert len(engine.drawn) == 2 * requests == 2 * STEPS * 6
    assert engine.loads[:STEPS] == [f"version-{step}" for step in range(STEPS)]
    assert engine.loads == engine.loads[: len(engine.loads) // 2] * 2
    for row, got in zip(rows(one, "timings.jsonl"), rows(two, "timings.jsonl"), strict=True):
        assert got["engine_sync_error"] < 1e-5
        assert got["teacher_ids"] == row["teacher_ids"]  # over all processes
        assert got["engine_failed"] == got["teacher_failed"] == 0
    assert [folder.name for folder in (two / "run/distil/engine").iterdir()] == engine.loads[-1:]


def test_runs_on_one_server_share_no_cache(forks, servers, tmp_path):
    engine, _ = servers
    for name in ("one", "two"):
        trained(forks, tmp_path / name, recipe(*servers), 1)
    salts = [one["cache_salt"] for one in engine.drawn]
    assert len(set(salts)) == 2 * STEPS  # one for each update
    assert not set(salts[: len(salts) // 2]) & set(salts[len(salts) // 2 :])


FAULTS = {
    "a server refuses the weights": ({"error": "no room"}, 3, "no room"),  # an update is sent three times
    "the update has no effect": ({"tensors": 1}, 1, "the update had no effect"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_failed_update_ends_all_processes_with_one_message(forks, servers, tmp_path, monkeypatch, name):
    """The main process alone speaks to the servers; the other one waits for it."""
    answer, times, message = FAULTS[name]
    updates = [0]
    real = DrawingEngine._load

    def load(self: DrawingEngine, folder: Path) -> dict[str, Any]:
        updates[0] += 1
        return answer if 3 <= updates[0] < 3 + times else real(self, folder)

    monkeypatch.setattr(DrawingEngine, "_load", load)
    ended = forks.start(prepare(tmp_path / "work", recipe(*servers)), "train", "recipe.yaml", processes=2)
    assert ended.code not in (0, 97)
    assert ended.err.count("TrainingError: ") == 1, ended.err
    assert ended.err.count(message) == 1, ended.err
    assert "Traceback" not in ended.err
    again = forks.start(tmp_path / "work", "train", "recipe.yaml", processes=2)
    assert again.code == 0, again.err


def test_unwritable_folder_ends_all_processes(forks, servers, tmp_path):
    folder = prepare(tmp_path / "work", recipe(*servers))
    (folder / "weights").write_text("a file in the folder's place")
    made = recipe(*servers, engine={"urls": [servers[0].url], "folder": str(folder / "weights")})
    ended = forks.start(prepare(folder, made), "train", "recipe.yaml", processes=2)
    assert ended.code not in (0, 97)
    assert ended.err.count("RunError: ") == 1, ended.err
    assert "cannot be written" in ended.err


def test_processes_share_tokens_in_flight(forks, servers, tmp_path):
    """Of a bound of 40 tokens each of two processes sends 20; either could use all 40."""
    engine, _ = servers
    lock, load, most = threading.Lock(), [0], [0]

    def fault(arrived: Arrived, said: Said) -> Said:
        if arrived.request not in engine.drawn:
            return said
        tokens = len(arrived.request["token_ids"]) + arrived.request["sampling_params"]["max_tokens"]
        with lock:
            load[0] += tokens
            most[0] = max(most[0], load[0])
        time.sleep(0.05)
        with lock:
            load[0] -= tokens
        return said

    engine.fault = fault
    made = recipe(*servers, engine={"urls": [engine.url], "tokens_in_flight": 40}, prompts_per_step=8)
    trained(forks, tmp_path / "two", made, 2)
    assert 20 < most[0] <= 40


# --- two nodes -------------------------------------------------------------------------------------------------------


# As docs/scale.md starts a node. With c10d torchrun gives the ranks itself.
BACKENDS = {"static": ["--node-rank", "{rank}"], "c10d": ["--rdzv-id", "opd"]}


def node(folder: Path, rank: int, port: int, backend: str) -> subprocess.Popen[str]:
    """One of two nodes; both are this machine."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
        *("--rdzv-backend", backend, "--rdzv-endpoint", f"127.0.0.1:{port}"),
        *(part.format(rank=rank) for part in BACKENDS[backend]),
        *("-m", "opd", "train", "recipe.yaml"),
    ]
    return subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def of_two_nodes(folder: Path, made: dict[str, Any], backend: str = "static") -> list[Ended]:
    """A run on two nodes."""
    prepare(folder, made)
    port = free_port()
    nodes = [node(folder, rank, port, backend) for rank in range(2)]
    try:
        said = [one.communicate(timeout=300) for one in nodes]
    finally:
        for one in nodes:
            one.kill()
    return [Ended(one.returncode, *texts) for one, texts in zip(nodes, said, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_nodes_with_servers_equal_one_process(forks, servers, tmp_path, backend):
    made = recipe(*servers)
    one = trained(forks, tmp_path / "one", made, 1)
    first, second = of_two_nodes(tmp_path / "two", made, backend)
    assert first.code == second.code == 0, first.err + second.err
    assert_same_run(one, tmp_path / "two")


def test_failed_update_ends_both_nodes_with_one_message(servers, tmp_path, monkeypatch):
    monkeypatch.setattr(DrawingEngine, "_load", lambda self, folder: {"error": "no room"})
    nodes = of_two_nodes(tmp_path / "work", recipe(*servers))
    assert all(one.code for one in nodes)
    assert sum(one.err.count("TrainingError: ") for one in nodes) == 1, [one.err for one in nodes]
