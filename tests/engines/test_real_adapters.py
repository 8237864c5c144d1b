"""The real server of vLLM with LoRA adapters: `engine: {weights: lora}`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from support.engine_sampler import changed, engine_sampler
from support.models import byte_tokenizer, policy, tiny
from support.runs import Forks, one_stage, prepare
from support.vllm_server import needs_vllm, vllm

from opd.engines.adapters import AdapterSync
from opd.engines.control import check_adapters
from opd.errors import TrainingError
from opd.models import saving
from opd.models.adapters import add_lora
from opd.models.language_model import LanguageModel
from opd.recipe.schema import EngineSection
from opd.samplers.vllm import EngineSampler
from opd.types import Prompt

pytestmark = [pytest.mark.engine, needs_vllm]
STEPS = 3
PROMPTS = [Prompt(id=i, content=text) for i, text in enumerate(("the quick brown fox " * 4, "x = 12;", "hello"))]


def base() -> LanguageModel:
    return tiny("llama_tied", byte_tokenizer(), seed=2, hidden=64, spread=0.15, name="student")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders student and teacher."""
    folder = tmp_path_factory.mktemp("models")
    saving.save(base(), folder / "student")
    saving.save(tiny("llama_tied", byte_tokenizer(), seed=1, hidden=64, spread=0.15), folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def url(models: Path) -> Iterator[str]:
    """A server with the student's base model, in which adapters of rank 8 fit."""
    flags = ("--logprobs-mode", "processed_logprobs", "--enable-lora", "--max-lora-rank", "8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        with vllm(models / "student", models / "log", *flags, by_position=False) as one:
            yield one


def learner(rank: int = 4) -> LanguageModel:
    lm = base()
    return replace(lm, model=add_lora(lm.model, rank=rank, alpha=8.0, target_modules="all-linear"))


def sampler_of(url: str, lm: LanguageModel, folder: Path) -> EngineSampler:
    return engine_sampler(lm, folder, EngineSection(urls=[url], weights="lora", timeout_s=120.0), temperature=0.7)


def test_engine_serves_new_adapter_after_each_update(url, tmp_path):
    """Five updates with the same prompts, one of them longer than blocks of the cache."""
    lm = learner()
    sampler = sampler_of(url, lm, tmp_path)
    for version in range(5):
        changed(lm, version)
        sampler.sync(version)
        assert isinstance(sampler.update, AdapterSync)
        assert sampler.update.error < 1e-4
        for one in sampler(PROMPTS, seed=(0, version)):
            taken = policy(lm, one).gather(1, one.response_ids[:, None])[:, 0]
            torch.testing.assert_close(one.policy_logp, taken.float(), atol=1e-4, rtol=0)
    served = [one["id"] for one in httpx2.get(f"{url}/v1/models").json()["data"]]
    assert served == ["teacher", sampler.update.serves]  # the others are unloaded
    assert [folder.name for folder in (tmp_path / "engine").iterdir()] == ["version-4"]


def test_control_finds_the_routes_of_adapters(url, tmp_path):
    sampler = sampler_of(url, learner(), tmp_path)
    check_adapters(sampler.replicas, sampler.model, 261)


def test_rank_that_does_not_fit_ends_the_run(url, tmp_path):
    sampler = sampler_of(url, learner(rank=16), tmp_path)
    with pytest.raises(
        TrainingError, match=r"rank 16 is greater than max_lora_rank 8.*`--max-lora-rank` of at least 16"
    ):
        sampler.sync(0)


def test_unloaded_adapter_is_never_replaced_by_the_base(url, tmp_path):
    sampler = sampler_of(url, learner(), tmp_path)
    sampler.sync(0)
    assert sampler.adapters is not None
    name = sampler.adapters.serves
    httpx2.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": name}).raise_for_status()
    with pytest.raises(TrainingError, match=f"The model `{name}` does not exist"):
        sampler(PROMPTS, seed=(0, 0))


def test_version_of_the_base_is_stamped_on_tokens_of_adapters(url, tmp_path):
    """Whole weights of another run are noticed, another adapter's version is not: there is none."""
    sampler = sampler_of(url, learner(), tmp_path)
    sampler.sync(0)
    sampler(PROMPTS, seed=(0, 0))
    httpx2.post(f"{url}/update_weight_version", json={"new_version": "12"}).raise_for_status()
    with pytest.raises(TrainingError, match="with the weights of version 12, and the student is at version"):
        sampler(PROMPTS, seed=(0, 0))


def trained(forks: Forks, folder: Path, models: Path, processes: int = 1, **stage: Any) -> list[float]:
    made = one_stage(
        method="topk_reverse_kl",
        options={"k": 4, "by": "teacher", "form": "tail"},
        steps=STEPS,
        sampling={"max_completion_length": 8, "temperature": 0},
        optimizer={"learning_rate": 1e-2},
        **stage,
    )
    described = {name: {"path": str(models / name)} for name in ("student", "teacher")}
    described["student"] |= {"lora": {"rank": 4, "alpha": 8}}  # type: ignore[dict-item]
    ended = forks.start(prepare(folder, made | {"models": described}), "train", "recipe.yaml", processes=processes)
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in (folder / "run/distil/metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_run_with_adapters_on_a_server_equals_local_run(forks, models, url, tmp_path):
    near = trained(forks, tmp_path / "near", models)
    far = trained(forks, tmp_path / "far", models, engine={"urls": [url], "weights": "lora"})
    assert far == pytest.approx(near, abs=1e-4)
    assert len(set(near)) == STEPS


def test_two_processes_with_real_adapters_equal_one(forks, models, url, tmp_path):
    """Nothing is scored on the server, by neither process: two scores at a time would end it."""
    section = {"urls": [url], "weights": "lora"}
    one, two = (trained(forks, tmp_path / str(n), models, n, engine=section) for n in (1, 2))
    assert two == pytest.approx(one, abs=1e-4)
