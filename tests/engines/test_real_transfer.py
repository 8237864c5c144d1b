"""The real server of vLLM with `engine: {weights: transfer}`: its own weight transfer engine, with gloo for NCCL.

NCCL needs GPUs. It is replaced at one place in each process: `opd.engines.nccl.nccl_group` here, and what joins the
group in vLLM's worker (`support/gloo_workers.py`). The routes, the update, the buckets and the loading are vLLM's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.engine_sampler import changed, engine_sampler
from support.gloo import GlooGroup
from support.models import byte_tokenizer, policy, tiny
from support.vllm_server import needs_vllm, vllm

from opd.engines.sync import Sync
from opd.engines.transfer import Transfer
from opd.errors import TrainingError
from opd.models import saving
from opd.models.language_model import LanguageModel
from opd.recipe.schema import EngineSection
from opd.samplers.vllm import EngineSampler
from opd.types import Prompt

pytestmark = [pytest.mark.engine, needs_vllm]
TESTS = Path(__file__).parents[1]
PROMPTS = [Prompt(id=i, content=text) for i, text in enumerate(("the quick brown fox " * 4, "x = 12;", "hello"))]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("vllm")
    saving.save(learner(), folder / "model")
    flags = ("--logprobs-mode", "processed_logprobs", "--worker-extension-cls", "support.gloo_workers.Loader")
    transfer = ("--weight-transfer-config", '{"backend": "nccl"}')
    with vllm(folder / "model", folder / "log", *flags, *transfer, by_position=False, imports=(TESTS,)) as one:
        yield one


def learner() -> LanguageModel:
    """Its output layer has weights of its own: on a CPU vLLM's engine leaves a shared one old (see served.md)."""
    return tiny("llama", byte_tokenizer(), seed=2, hidden=64, spread=0.15, name="student")


def over_gloo(device: torch.device, address: str, port: int, size: int, limit_s: float) -> GlooGroup:
    return GlooGroup(address, port, 0, size, limit_s)


@pytest.fixture
def sampler(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineSampler:
    monkeypatch.setattr("opd.runs.weights.nccl_group", over_gloo)
    return sampler_of(url, tmp_path)


def sampler_of(url: str, folder: Path) -> EngineSampler:
    """The sampler of a new start of the trainer."""
    section = EngineSection(urls=[url], weights="transfer", timeout_s=60.0, retries=0, patience_s=0.0)
    return engine_sampler(learner(), folder, section, temperature=0.7)


def delivery_of(sampler: EngineSampler) -> Transfer:
    assert isinstance(sampler.update, Sync)
    assert isinstance(sampler.update.delivery, Transfer)
    return sampler.update.delivery


@pytest.mark.parametrize("bucket", [10_000, 256 << 20])
def test_engine_serves_transferred_weights(sampler, tmp_path, bucket):
    """Three updates with the same prompts, in several buckets and in one. Each case is another start of the trainer."""
    delivery_of(sampler).bucket = bucket
    for version in range(3):
        changed(sampler.lm, version)
        sampler.sync(version)
        assert sampler.update is not None
        assert sampler.update.error < 1e-4
        for one in sampler(PROMPTS, seed=(0, version)):
            taken = policy(sampler.lm, one).gather(1, one.response_ids[:, None])[:, 0]
            torch.testing.assert_close(one.sampler_logp, taken.float(), atol=1e-4, rtol=0)
    assert not list(tmp_path.iterdir())  # nothing went through a folder


def test_transfer_without_a_tensor_ends_the_run(sampler):
    """vLLM accepts it, and serves a model of neither weights."""
    delivery = delivery_of(sampler)
    sampler.sync(0)
    whole = delivery.gather
    delivery.gather = lambda: {name: one for name, one in whole().items() if "layers.0.mlp.down_proj" not in name}
    changed(sampler.lm, 1)
    with pytest.raises(TrainingError, match=r"does not serve the student's weights of step 1: .* nats"):
        sampler.sync(1)


def test_transfer_continues_after_a_broken_update(url, sampler, tmp_path):
    """The trainer ends between the start of an update and its end; its next start ends that update."""
    sampler.sync(0)
    with sampler.replicas.servers[0].connected() as one:
        for path in ("pause?mode=keep", "start_weight_update"):
            assert one.post(path, {}, lambda raw: True).value
    again = sampler_of(url, tmp_path)
    again.sync(0)
    assert again.update is not None
    assert again.update.error < 1e-4


def test_refused_tensor_ends_the_run_at_once(sampler):
    """With the server's own reason, while the broadcast waits. The last test: this server has no whole weights now."""
    sampler.sync(0)
    delivery = delivery_of(sampler)
    whole = delivery.gather
    delivery.gather = lambda: {"model.layers.9.mlp.down_proj.weight": torch.ones(3), **whole()}
    with pytest.raises(TrainingError, match=r"no module or parameter named 'layers.9'") as raised:
        sampler.sync(1)
    assert "weights: full" in str(raised.value)
