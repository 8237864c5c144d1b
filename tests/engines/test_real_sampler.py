"""The real server of vLLM as the sampler: what it draws, and updates that must each be proved."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engine_sampler import changed, engine_sampler
from support.engines import Engine, running
from support.models import byte_tokenizer, policy, tiny
from support.talking import Talker
from support.vllm_server import needs_vllm, vllm

from opd.engines import vllm as protocol
from opd.engines.control import check_control
from opd.engines.server import Answer
from opd.engines.sync import Folder, Sync
from opd.environments.conversations import ConversationSampler, Rules
from opd.errors import ConfigError, TrainingError
from opd.models import saving
from opd.models.language_model import LanguageModel
from opd.recipe.schema import EngineSection
from opd.samplers.vllm import EngineSampler
from opd.types import EarlyStop, Prompt, Record, Rollout, Sampling

pytestmark = [pytest.mark.engine, needs_vllm]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("vllm")
    saving.save(learner(), folder / "model")
    flags = ("--logprobs-mode", "processed_logprobs", "--worker-extension-cls", "opd.engines.worker.WeightLoader")
    with vllm(folder / "model", folder / "log", *flags, by_position=False) as one:
        yield one


def learner(seed: int = 2) -> LanguageModel:
    """Embedding and output layer share their weights, as in many small models."""
    return tiny("llama_tied", byte_tokenizer(), seed=seed, hidden=64, spread=0.15, name="student")


def sampler_of(url: str, lm: LanguageModel, folder: Path, **sampling: object) -> EngineSampler:
    return engine_sampler(lm, folder, EngineSection(urls=[url], timeout_s=120.0), **sampling)


PROMPTS = [Prompt(id=i, content=text) for i, text in enumerate(("the quick brown fox", "x = 12;", "hello"))]


def drawn(sampler: EngineSampler, step: int = 0, prompts: list[Prompt] = PROMPTS) -> list[Rollout]:
    return sampler(prompts, seed=(0, step))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"top_p": 0.8}, {"temperature": 1.5, "top_k": 5}])
def test_engine_log_probs_are_those_of_the_student(url, tmp_path, sampling):
    lm = learner()
    sampler = sampler_of(url, lm, tmp_path, **sampling)
    sampler.sync(0)
    found = drawn(sampler)
    assert [one.prompt.id for one in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for one in found:
        logp = policy(lm, one)
        taken = logp.gather(1, one.response_ids[:, None])[:, 0]
        torch.testing.assert_close(one.policy_logp, taken.float(), atol=1e-4, rtol=0)
        if "top_p" in sampling or "top_k" in sampling:
            assert (one.sampler_logp > one.policy_logp - 1e-4).all()
        else:
            torch.testing.assert_close(one.sampler_logp, taken.float(), atol=1e-4, rtol=0)
        assert one.finished == (int(one.response_ids[-1]) in lm.stop_ids)
        assert one.finished or len(one.response_ids) == 12


def test_engine_draws_by_seed_prompt_and_sample_alone(url, tmp_path):
    sampler = sampler_of(url, learner(), tmp_path)
    sampler.sync(0)
    first, again, back = drawn(sampler), drawn(sampler), drawn(sampler, prompts=PROMPTS[::-1])
    ids = {(one.prompt.id, one.sample): one.response_ids.tolist() for one in first}
    assert len({tuple(one) for one in ids.values()}) > 6
    for other in (again, back):
        assert {(one.prompt.id, one.sample): one.response_ids.tolist() for one in other} == ids
    assert {(one.prompt.id, one.sample): one.response_ids.tolist() for one in drawn(sampler, step=1)} != ids


def test_engine_serves_new_weights_after_each_update(url, tmp_path):
    """Five updates, of a model whose output layer is its embedding, with the same prompts: no cache is old."""
    lm = learner()
    sampler = sampler_of(url, lm, tmp_path)
    for version in range(5):
        changed(lm, version)
        sampler.sync(version)
        assert isinstance(sampler.update, Sync)
        assert sampler.update.error < 1e-4
        for one in drawn(sampler):
            taken = policy(lm, one).gather(1, one.response_ids[:, None])[:, 0]
            torch.testing.assert_close(one.sampler_logp, taken.float(), atol=1e-4, rtol=0)
            assert one.sampler_version == version
    assert [folder.name for folder in (tmp_path / "engine").iterdir()] == ["version-4"]


def test_engine_records_what_pieces_read(url, tmp_path):
    lm = learner()
    sampler = sampler_of(url, lm, tmp_path)
    sampler.sync(0)
    for one in sampler(PROMPTS, seed=(0, 0), record=Record(top_k=4, entropy=True)):
        logp = policy(lm, one)
        assert torch.equal(one.student_top_ids, logp.topk(4).indices)
        torch.testing.assert_close(one.student_entropy, -(logp.exp() * logp).sum(-1).float(), atol=1e-4, rtol=0)


def test_engine_ends_responses_early(url, tmp_path):
    sampler = sampler_of(url, learner(), tmp_path)
    sampler.sync(0)
    stop = EarlyStop(every=4, keeps_going=lambda rollouts: [one.sample == 0 for one in rollouts])
    for one in sampler(PROMPTS, seed=(0, 0), stop=stop):
        assert len(one.response_ids) == (12 if one.sample == 0 and not one.finished else len(one.response_ids))
        assert one.finished or one.sample == 0 or len(one.response_ids) == 4


# --- four updates that fail without an error ------------------------------------------------------------------------


def test_old_output_layer_ends_the_run(url, tmp_path, monkeypatch):
    """A reload without the worker's second packing of the output layer."""
    lm = learner()
    sampler = sampler_of(url, lm, tmp_path)
    sampler.sync(0)
    sync = sampler.update
    assert isinstance(sync, Sync)
    monkeypatch.setattr(
        Folder,
        "load",
        lambda self, one: one.post(
            "collective_rpc",
            {"method": "reload_weights", "kwargs": {"weights_path": str(self._now)}},
            lambda raw: 1,
        ),
    )
    changed(lm, 1)
    with pytest.raises(TrainingError, match=r"does not serve the student's weights of step 1: .* nats"):
        sampler.sync(1)


def test_update_without_effect_ends_the_run(url, tmp_path, monkeypatch):
    lm = learner()
    sampler = sampler_of(url, lm, tmp_path)
    sampler.sync(0)
    monkeypatch.setattr(Folder, "load", lambda self, one: Answer(value=1))
    changed(lm, 1)
    with pytest.raises(TrainingError, match=r"They are those of the step before: the update had no effect"):
        sampler.sync(1)


def test_missing_tensor_ends_the_run_with_old_weights(url, tmp_path):
    lm = learner()
    sampler = sampler_of(url, lm, tmp_path)
    sampler.sync(0)
    before = drawn(sampler)
    assert isinstance(sampler.update, Sync)
    delivery = sampler.update.delivery
    assert isinstance(delivery, Folder)
    whole = delivery.write

    def without_one(folder: Path) -> None:
        whole(folder)
        tensors = load_file(folder / "model.safetensors")
        tensors.pop("model.layers.0.mlp.down_proj.weight")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    delivery.write = without_one
    changed(lm, 1)
    with pytest.raises(TrainingError, match=r"without \['model.layers.0.mlp.down_proj.weight'\]"):
        sampler.sync(1)
    delivery.write = whole
    assert [one.response_ids.tolist() for one in drawn(sampler)] == [one.response_ids.tolist() for one in before]


def test_another_run_on_the_same_server_ends_the_run(url, tmp_path):
    one, other = sampler_of(url, learner(), tmp_path / "a"), sampler_of(url, learner(), tmp_path / "b")
    one.sync(3)
    other.sync(4)
    with pytest.raises(TrainingError, match=r"with the weights of version 4, and the student is at version 3"):
        drawn(one)


def test_old_cache_would_change_the_response(url, tmp_path, monkeypatch):
    """The control of the salt: with one salt for all versions, the cache of the last weights is read."""
    lm = learner()
    sampler = sampler_of(url, lm, tmp_path, n=1)
    fields = protocol.draw_fields
    monkeypatch.setattr(
        "opd.samplers.vllm.draw_fields", lambda *args, seed, salt: fields(*args, seed=seed, salt="the same")
    )
    prompts = [Prompt(id=0, content="a long prompt of more than two blocks of the cache, " * 4)]
    apart = []
    for version in range(2):
        changed(lm, version)
        sampler.sync(version)
        (one,) = drawn(sampler, prompts=prompts)
        taken = policy(lm, one).gather(1, one.response_ids[:, None])[:, 0]
        apart.append(float((one.sampler_logp - taken).abs().max()))
    assert apart[0] < 1e-4 < 1e-2 < apart[1]


def test_later_start_reads_no_cache_of_an_earlier_one(url, tmp_path):
    """The same number of updates after another start of the trainer, beside a server that went on."""
    prompts = [Prompt(id=0, content="a long prompt of more than two blocks of the cache, " * 4)]
    for start in range(2):
        lm = learner()
        changed(lm, start)
        sampler = sampler_of(url, lm, tmp_path / str(start), n=1)
        sampler.sync(0)
        (one,) = drawn(sampler, prompts=prompts)
        taken = policy(lm, one).gather(1, one.response_ids[:, None])[:, 0]
        torch.testing.assert_close(one.sampler_logp, taken.float(), atol=1e-4, rtol=0)


def members(body: object, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, type) of every member."""
    if isinstance(body, dict):
        for key, one in body.items():
            yield from members(one, f"{path}.{key}")
    elif isinstance(body, list):
        for one in body:
            yield from members(one, f"{path}[]")
    else:
        yield path, type(body).__name__


def test_own_server_draws_and_is_controlled_as_the_real_one(url, tmp_path):
    """The fast tests use a server of their own: its answers have the same status, and members of the real ones."""
    lm = learner()
    sampler_of(url, lm, tmp_path).sync(0)
    params = {"max_tokens": 4, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "stop_token_ids": [1]}
    ids = [7, 8, 9]
    requests = [
        ("collective_rpc", {"method": "opd_about", "kwargs": {"folder": str(tmp_path)}}),
        ("collective_rpc", {"method": "opd_load", "kwargs": {"folder": str(tmp_path / "engine" / "version-0")}}),
        ("update_weight_version", {"new_version": "0"}),
        ("inference/v1/generate", protocol.draw_fields("teacher", ids, params, seed=3, salt="a")),
        ("inference/v1/generate", protocol.draw_fields("teacher", ids, params | {"top_k": 1}, seed=3, salt="a")),
        ("inference/v1/generate", protocol.draw_fields("unknown", ids, params, seed=3, salt="a")),
    ]
    with running(Engine(lm=learner(), longest=256)) as (own_url,):
        pairs = [
            [httpx2.post(f"{root}/{path}", json=fields, timeout=120.0) for root in (own_url, url)]
            for path, fields in requests
        ]
        pairs.append([httpx2.get(f"{root}/weight_info", timeout=120.0) for root in (own_url, url)])
    for own, real in pairs:
        assert own.status_code == real.status_code, real.text[:300]
        if real.status_code == 200:
            assert set(members(own.json())) <= set(members(real.json())), (own.text[:300], real.text[:300])


def test_control_finds_what_the_server_has(url, tmp_path):
    sampler = sampler_of(url, learner(), tmp_path)
    sampler.sync(7)
    found = check_control(sampler.replicas, sampler.model, 261, str(tmp_path))
    assert {one.version for one in found.values()} == {"7"}
    assert {one.tensors > 0 for one in found.values()} == {True}
    with pytest.raises(ConfigError, match=r"does not see the folder .*nowhere"):
        check_control(sampler.replicas, sampler.model, 261, str(tmp_path / "nowhere"))


def test_folder_of_weights_is_removed(url, tmp_path):
    lm = learner()
    sampler = sampler_of(url, lm, tmp_path)
    sampler.sync(0)
    shutil.rmtree(tmp_path / "engine")
    sampler.sync(1)
    assert len(list((tmp_path / "engine").iterdir())) == 1


def test_engine_leads_conversations(url, tmp_path):
    """Turn by turn behind the ids of the conversation so far; the student's log-probs are recorded, no others."""
    lm = learner()
    inner = sampler_of(url, lm, tmp_path, max_completion_length=40)
    sampling = Sampling(max_completion_length=40, n=3)
    rules = Rules(environment=Talker(longest=3), max_turn_length=8)
    sampler = ConversationSampler(inner=inner, lm=lm, sampling=sampling, rules=rules)
    sampler.sync(0)
    found = sampler(PROMPTS, seed=(0, 0), record=Record(entropy=True))
    for one in found:
        assert one.talk is not None
        own = ~one.talk.heard
        taken = policy(lm, one).gather(1, one.response_ids[:, None])[:, 0]
        torch.testing.assert_close(one.policy_logp[own], taken[own].float(), atol=1e-4, rtol=0)
        assert one.policy_logp[~own].isnan().all()
        assert one.student_entropy[own].isfinite().all()
