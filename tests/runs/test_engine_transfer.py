"""`engine: {weights: transfer}` against small servers.

NCCL needs GPUs: `opd.engines.nccl.nccl_group`, and what this environment lacks for it, are replaced by queues of this
process. `tests/engines/test_real_transfer.py` does the same with vLLM itself, over gloo.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import refused, running
from support.runs import command, one_stage, prepare, tiny_model
from support.transferring import Line, TransferringEngine

import opd
from opd.engines import nccl
from opd.engines.address import own_address
from opd.engines.transfer import Transfer, buckets
from opd.errors import TrainingError
from opd.models.loading import load_model
from opd.recipe.schema import ModelSpec

STEPS = 3
BEFORE = ["finish_weight_update", "resume"]  # of an update that an earlier start may have left open
UPDATE = ["pause?mode=keep", "start_weight_update", "update_weights", "finish_weight_update", "resume"]


@pytest.fixture
def engines() -> Iterator[list[TransferringEngine]]:
    """Two servers, the first with two workers."""
    lms = [load_model(ModelSpec(**tiny_model(5)), name="student", seed=0) for _ in range(2)]
    made = [TransferringEngine(lm=lms[0], workers=2), TransferringEngine(lm=lms[1])]
    with running(*made):
        yield made


@pytest.fixture
def line(engines: list[TransferringEngine], monkeypatch: pytest.MonkeyPatch) -> Line:
    made = Line(engines)
    monkeypatch.setattr("opd.runs.weights.nccl_group", lambda device, *where: made.join(*where))
    monkeypatch.setattr("opd.engines.nccl.lacking", lambda: None)
    return made


def recipe(engines: list[TransferringEngine], *, lora: bool = False, **section: Any) -> dict[str, Any]:
    settings = {"patience_s": 2.0, "timeout_s": 10.0, "weights": "transfer"}
    made = one_stage(
        method="topk_reverse_kl",
        options={"k": 4, "by": "teacher", "form": "tail"},
        steps=STEPS,
        prompts_per_step=3,
        sampling={"max_completion_length": 5, "n": 2},
        optimizer={"learning_rate": 0.02, "eps": 1e-4},
        engine={"urls": [one.url for one in engines], **settings, **section},
    )
    made["models"]["student"] |= {"lora": {"rank": 4, "alpha": 8}} if lora else {}
    return made


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/distil" / name).read_text().splitlines()]


def run(folder: Path, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(prepare(folder, made))
    opd.run("recipe.yaml", quiet=True)


@pytest.mark.parametrize("lora", [False, True])
def test_transferred_run_equals_run_through_folder(engines, line, tmp_path, monkeypatch, lora):
    run(tmp_path / "transfer", recipe(engines, lora=lora), monkeypatch)
    assert not engines[0].loads  # of folders
    assert not (tmp_path / "transfer/run/distil/engine").exists()
    run(tmp_path / "full", recipe(engines, lora=lora, weights="full"), monkeypatch)
    found, wanted = (
        [row["train/loss"] for row in rows(tmp_path / name, "metrics.jsonl")] for name in ("transfer", "full")
    )
    assert found == pytest.approx(wanted, rel=2e-5)
    assert len(set(wanted)) == STEPS
    assert max(row["engine_sync_error"] for row in rows(tmp_path / "transfer", "timings.jsonl")) < 1e-5


def test_servers_get_calls_in_order_and_all_tensors(engines, line, tmp_path, monkeypatch):
    monkeypatch.setattr("opd.runs.weights.Transfer", functools.partial(Transfer, bucket=2000))
    run(tmp_path / "transfer", recipe(engines), monkeypatch)
    student = load_model(ModelSpec(**tiny_model(2)), name="student", seed=0).causal_lm.state_dict()
    for one, offset in zip(engines, (1, 3), strict=True):
        targets = [target for target, _ in one.calls]
        assert targets == [*BEFORE, "get_world_size", "init_weight_transfer_engine", *UPDATE * STEPS]
        bodies = [body for _, body in one.calls]
        init = bodies[3]["init_info"]
        assert (init["rank_offset"], init["world_size"], init["packed"]) == (offset, 4, True)
        told = bodies[6]["update_info"]
        assert set(told["names"]) == student.keys()
        assert [student[name].shape for name in told["names"]] == [torch.Size(shape) for shape in told["shapes"]]
        assert set(told["dtype_names"]) == {"float32"}
        versions = [body["weight_version"] for target, body in one.calls if target == "finish_weight_update" and body]
        assert versions == [str(step) for step in range(STEPS)]
        assert len(one.parts) > 2 * STEPS
        assert sum(one.parts) == STEPS * sum(tensor.nbytes for tensor in student.values())
    assert line.joined == [("127.0.0.1", 4)]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("/get_world_size", "no such route"),
        ("/init_weight_transfer_engine", "Weight transfer not configured"),
        ("/start_weight_update", "no room"),
        ("/update_weights", "model.layers.0 has another shape"),
        ("/finish_weight_update", "a layer is incomplete"),
    ],
)
def test_refusal_ends_the_run_at_once(engines, line, tmp_path, monkeypatch, target, reason):
    """Also while the broadcast waits for a server that has refused the update."""
    line.stuck = target == "/update_weights"
    if line.stuck:
        monkeypatch.setattr(TransferringEngine, "_receive", lambda self, **told: None)
    engines[1].fault = lambda arrived, said: refused(500, reason) if arrived.target == target else said
    began = time.monotonic()
    with pytest.raises(TrainingError, match=rf"{engines[1].url} could not be given .*{reason}.*weights: full"):
        run(tmp_path, recipe(engines), monkeypatch)
    assert time.monotonic() - began < 9.0  # below timeout_s


def test_stuck_broadcast_ends_at_the_time_limit(engines, line, tmp_path, monkeypatch):
    """Servers that answer at once, and a collective that never ends."""
    monkeypatch.setattr(TransferringEngine, "_receive", lambda self, **told: None)
    line.stuck = True
    with pytest.raises(TrainingError, match=r"the collective has not ended within 1 s\. .*weights: full"):
        run(tmp_path, recipe(engines, timeout_s=1.0), monkeypatch)


def test_server_that_hangs_ends_at_the_time_limit(engines, line, tmp_path, monkeypatch):
    """A server that receives nothing, in a group whose sends end."""
    monkeypatch.setattr(TransferringEngine, "_receive", lambda self, **told: time.sleep(4.0))
    with pytest.raises(TrainingError, match=r"could not be given .* no answer within 1 s\. .*weights: full"):
        run(tmp_path, recipe(engines, timeout_s=1.0), monkeypatch)


def test_failed_broadcast_ends_the_run_at_once(engines, line, tmp_path, monkeypatch):
    def broken(self: Line, tensor: torch.Tensor) -> None:
        raise RuntimeError("NCCL error: remote process exited")

    monkeypatch.setattr(Line, "broadcast", broken)
    monkeypatch.setattr(TransferringEngine, "_receive", lambda self, **told: time.sleep(1.0))
    with pytest.raises(
        TrainingError, match=r"could not be sent to .*: RuntimeError: NCCL error: remote process exited"
    ):
        run(tmp_path, recipe(engines), monkeypatch)


def test_update_left_open_is_ended_first(engines, line, tmp_path, monkeypatch):
    """Else the first request for tokens ends the server."""
    engines[1].active = True
    run(tmp_path, recipe(engines), monkeypatch)
    assert not engines[1].dead


def test_update_without_effect_ends_the_run(engines, line, tmp_path, monkeypatch):
    """A server that receives the second update and keeps its weights."""

    def kept(self: TransferringEngine, **told: Any) -> None:
        real(self, **told)
        if self.version == "0":
            self.received = {}

    real = TransferringEngine._receive
    monkeypatch.setattr(TransferringEngine, "_receive", kept)
    with pytest.raises(TrainingError, match=r"of step 1: .*They are those of the step before"):
        run(tmp_path, recipe(engines), monkeypatch)


def test_buckets_hold_all_bytes_in_order():
    tensors = [torch.randn(3, 5), torch.arange(7), torch.tensor(2.0), torch.randn(4, 6).T, torch.zeros(0)]
    expected = torch.cat([one.contiguous().view(-1).view(torch.uint8) for one in tensors])
    sizes = {}
    for limit in (1, 60, 10**6):
        found = list(buckets(tensors, limit, torch.device("cpu")))
        assert torch.equal(torch.cat(found), expected)
        sizes[limit] = [one.numel() for one in found]
    assert sizes == {1: [60, 56, 4, 96, 0], 60: [116, 100, 0], 10**6: [216]}  # vLLM's last ones have no bytes too


def test_own_address_is_that_towards_the_servers():
    address, port = own_address(["http://127.0.0.1:80", "http://127.0.0.1"])
    assert address == "127.0.0.1"
    assert port > 1023


@pytest.mark.parametrize(
    ("gpu", "section", "message"),
    [
        (False, {}, "torch finds no GPU in this process. Set `weights: full`"),
        (True, {}, "the package vllm, whose classes join the servers' group, is not in this environment"),
    ],
)
def test_check_refuses_what_nccl_needs(engines, tmp_path, monkeypatch, gpu, section, message):
    monkeypatch.setattr(nccl.torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(nccl.importlib.util, "find_spec", lambda name: None)
    assert message.split(". Set")[0] in str(nccl.lacking())
    if not gpu:
        monkeypatch.chdir(prepare(tmp_path, recipe(engines, **section)))
        said = command("check", "recipe.yaml")
        assert said.code
        assert message in " ".join(said.err.split())
        assert not engines[0].arrived


def test_live_says_what_it_cannot_see(engines, line, tmp_path, monkeypatch):
    monkeypatch.chdir(prepare(tmp_path, recipe(engines)))
    said = command("check", "recipe.yaml", "--live")
    assert said.code == 0, said.err
    for part in (
        f"engine {engines[0].url}: student, workers: 2;",
        "engine: weights go by NCCL, which is not tried here",
    ):
        assert part in " ".join(said.out.split())
    assert [target for target, _ in engines[0].calls] == ["get_world_size"]
    engines[1].dev = False
    assert "VLLM_SERVER_DEV_MODE=1" in command("check", "recipe.yaml", "--live").err


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"folder": "weights"}, "nothing goes through a folder. Remove `folder`"),
        ({"sleep": True}, "which do not sleep. Remove `start` and `sleep`"),
    ],
)
def test_check_refuses_what_excludes_transfer(engines, line, tmp_path, monkeypatch, section, message):
    monkeypatch.chdir(prepare(tmp_path, recipe(engines, **section)))
    said = command("check", "recipe.yaml")
    assert said.code
    assert message in " ".join(said.err.split())
