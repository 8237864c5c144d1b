"""Several processes, and several nodes, with an engine and a teacher on servers: the run of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support import shards
from support.engines import Engine, running
from support.http_server import Arrived, Said
from support.runs import ENVIRONMENT, Ended, Forks, one_stage, prepare, tiny_model
from support.transferring import TransferringEngine
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
def servers() -> Iterator[tuple[Engine, Engine]]:
    """An engine, whose own weights are not the student's, and a teacher."""
    lm = load_model(ModelSpec.model_validate(student() | {"seed": 5}), name="student", seed=0)
    engine = Engine(lm=lm, name="student", longest=512)
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


def test_whole_weights_are_gathered_layer_by_layer(tmp_path):
    """Of four layers one is whole at a time; the copy is in the main process alone, and its error in all."""
    script = Path(shards.__file__).with_name("over.py")
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        str(tmp_path / "found"),
    ]
    path = f"{script.parents[1]}:{ENVIRONMENT.get('PYTHONPATH', '')}"
    subprocess.run([sys.executable, *command], env={**ENVIRONMENT, "PYTHONPATH": path}, check=True, timeout=300)
    found = json.loads((tmp_path / "found").read_text())
    assert found["apart"] < 1e-6
    assert found["most"] == 1
    assert found["sharded_after"]
    assert found["apart_inside"] < 1e-6
    assert found["whole_inside"] == 4  # still gathered
    assert found["copied"] == [True, False]
    assert found["copy_apart"] == 0.0
    assert found["told"] == ["no room in process 0"] * 2
    assert found["value"] == [0, 0]


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


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_jumps_are_validated_with_their_own_weights(forks, servers, tmp_path, weights):
    """Candidate weights go to the engine too, while the student is whole in every process."""
    engine, _ = servers
    engine.lm = load_model(ModelSpec.model_validate(student()), name="student", seed=0)  # the base of the adapter
    stage = {
        "method": "eff_opd",
        "options": {"prompts": 6, "ties": True},
        "reward": {"name": "final_number"},
        "engine": {"urls": [engine.url], "weights": weights},
    }
    model = student(lora={"rank": 2, "alpha": 4})
    one = trained(forks, tmp_path / "one", recipe(*servers, model=model, **stage), 1)
    two = trained(forks, tmp_path / "two", recipe(*servers, model=model, **stage), 2)
    assert_same_run(one, two)
    sent = engine.names_used if weights == "lora" else engine.loads
    assert len(sent) > 2 * (STEPS + 1)
    if weights == "lora":
        assert not engine.loads
        assert len(set(sent)) == len(sent)


def test_runs_on_one_server_share_no_cache(forks, servers, tmp_path):
    engine, _ = servers
    for name in ("one", "two"):
        trained(forks, tmp_path / name, recipe(*servers), 1)
    salts = [one["cache_salt"] for one in engine.drawn]
    assert len(set(salts)) == 2 * STEPS  # one for each update
    assert not set(salts[: len(salts) // 2]) & set(salts[len(salts) // 2 :])


def test_two_processes_one_step_ahead_equal_one(forks, servers, tmp_path):
    ahead = recipe(*servers, ahead=1, checkpoint={"every": 1})
    one = trained(forks, tmp_path / "one", ahead, 1)
    two = trained(forks, tmp_path / "two", ahead, 2)
    assert_same_run(one, two)
    assert [row["rollout/staleness_max"] for row in rows(two, "metrics.jsonl")] == [0.0, 1.0, 1.0]


def test_no_process_uses_a_server_that_missed_an_update(forks, servers, tmp_path):
    """Of two servers of an engine one is gone from the second update on: the main process finds it, for both."""
    engine, _ = servers
    lm = load_model(ModelSpec.model_validate(student()), name="student", seed=0)
    other = Engine(lm=lm, name="student", longest=512)

    with running(other):
        updates = [0]

        def fault(arrived: Arrived, said: Said) -> Said:
            updates[0] += arrived.target == "/collective_rpc"
            return Said(hang_up=True) if updates[0] > 1 else said

        other.fault = fault
        section = {"urls": [engine.url, other.url], "patience_s": 1.0, "retries": 0}
        two = trained(forks, tmp_path / "two", recipe(*servers, engine=section), 2)
    drawn = len(other.drawn)
    assert 0 < drawn <= 6  # in the first step alone
    assert len(engine.drawn) + drawn == STEPS * 6
    assert [row["engine_servers_lost"] for row in rows(two, "timings.jsonl")] == [0.0, 1.0, 1.0]
    assert sum(row["engine_repeated"] for row in rows(two, "timings.jsonl")) == 0


FAULTS = {
    "a server refuses the weights": ({"error": "no room"}, "no room"),
    "the update has no effect": ({"tensors": 1}, "the update had no effect"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_failed_update_ends_all_processes_with_one_message(forks, servers, tmp_path, monkeypatch, name):
    """The main process alone speaks to the servers; the other one waits for it."""
    answer, message = FAULTS[name]
    ill = [True]
    real = Engine._load

    def load(self: Engine, folder: Path) -> dict[str, Any]:
        return answer if ill[0] and folder.name == "version-2" else real(self, folder)

    monkeypatch.setattr(Engine, "_load", load)
    ended = forks.start(prepare(tmp_path / "work", recipe(*servers)), "train", "recipe.yaml", processes=2)
    assert ended.code not in (0, 97)
    assert ended.err.count("TrainingError: ") == 1, ended.err
    assert ended.err.count(message) == 1, ended.err
    assert "Traceback" not in ended.err
    ill[0] = False
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


def over_gloo(folder: Path, made: dict[str, Any], processes: int) -> Path:
    """A run with weights by gloo, in several processes of torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "support.over_gloo", "train", "recipe.yaml"]
    prepare(folder, made)
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    ended = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT | paths, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return folder


def test_two_processes_that_transfer_equal_one_by_folder(forks, servers, tmp_path):
    """The gathers of a sharded student end in both before the first one speaks to a server and broadcasts."""
    lm = load_model(ModelSpec.model_validate(student() | {"seed": 5}), name="student", seed=0)
    engine = TransferringEngine(lm=lm, over_gloo=True)
    with running(engine):
        one = trained(forks, tmp_path / "one", recipe(*servers), 1)
        section = {"urls": [engine.url], "patience_s": 5.0, "timeout_s": 60.0, "weights": "transfer"}
        two = over_gloo(tmp_path / "two", recipe(*servers, engine=section), 2)
    assert_same_run(one, two)
    assert [target for target, _ in engine.calls].count("init_weight_transfer_engine") == 1


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
    monkeypatch.setattr(Engine, "_load", lambda self, folder: {"error": "no room"})
    nodes = of_two_nodes(tmp_path / "work", recipe(*servers))
    assert all(one.code for one in nodes)
    assert sum(one.err.count("TrainingError: ") for one in nodes) == 1, [one.err for one in nodes]
