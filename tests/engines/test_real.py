"""The real server of vLLM: exact scores, and the same answers as the tests' own server, request by request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from support.engines import Engine, running
from support.models import DEVICE, byte_tokenizer, rollout_of, tiny
from support.vllm_server import needs_vllm, vllm

from opd.engines.capabilities import control_ids, probe
from opd.engines.replicas import Replicas
from opd.engines.scoring import top_of
from opd.engines.server import Server
from opd.engines.vllm import completion_fields, parse_positions, parse_top, positions_fields
from opd.loss.step import gradient, scored
from opd.methods import build
from opd.models.language_model import LanguageModel
from opd.pieces.supports import sampled, top_k
from opd.samplers.hf import TransformersSampler
from opd.teachers.local import LocalTeacher
from opd.teachers.served import ServedTeacher
from opd.types import Prompt, Record, Sampling, ScoreRequest

pytestmark = [pytest.mark.engine, needs_vllm]
K = 4


@pytest.fixture(scope="module")
def teacher() -> LanguageModel:
    return tiny("llama", byte_tokenizer(), seed=1, hidden=64, spread=0.15, name="teacher")


@pytest.fixture(scope="module")
def url(teacher: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("vllm")
    teacher.model.save_pretrained(folder / "model")
    teacher.tokenizer.save_pretrained(folder / "model")
    with vllm(folder / "model", folder / "log") as one:
        yield one


@pytest.fixture
def fake(teacher: LanguageModel) -> Iterator[Engine]:
    one = Engine(lm=teacher, max_logprobs=40, longest=256)
    with running(one):
        yield one


REQUESTS = {
    "sampled": ScoreRequest(support=sampled()),
    **{by: ScoreRequest(support=top_k(K, by=by)) for by in ("teacher", "student", "union", "intersection")},
    "student, with the sampled token": ScoreRequest(support=top_k(K, by="student", with_sampled=True)),
}


def teacher_at(url: str, request: ScoreRequest, tokenizer: Any) -> ServedTeacher:
    replicas = Replicas(servers=(Server(url=url, timeout_s=120.0),))
    able = probe(replicas, None, tokenizer, by_position=K + 1, top=lambda by_ids: top_of(request, by_ids, 261) or 0)
    assert able.positions
    return ServedTeacher(
        name="teacher",
        replicas=replicas,
        capabilities=able,
        tokenizer=tokenizer,
        template_options={},
        device=DEVICE,
        max_failed=0.0,
    )


@pytest.mark.parametrize("name", REQUESTS)
def test_real_scores_equal_local_scores(teacher, url, name):
    request, tokenizer = REQUESTS[name], teacher.tokenizer
    student = tiny("llama", tokenizer, seed=2, hidden=32, spread=0.3, name="student")
    prompts = [Prompt(id=i, content=text) for i, text in enumerate(("the quick brown fox " * 4, "hello", "x = 12;"))]
    sampler = TransformersSampler(lm=student, sampling=Sampling(max_completion_length=40, n=2))
    rollouts = sampler(prompts, seed=(0, 0), record=Record(top_k=K))
    served = teacher_at(url, request, tokenizer)
    contexts = [one.prompt for one in rollouts]
    local = LocalTeacher(lm=teacher, micro_batch_tokens=4096, student_device=DEVICE)
    wanted = local.score(rollouts, contexts, request)
    for got, want in zip(served.score(rollouts, contexts, request), wanted, strict=True):
        torch.testing.assert_close(got.teacher_logp, want.teacher_logp, atol=1e-5, rtol=0)
        if want.support_ids is not None:
            assert torch.equal(got.support_ids, want.support_ids)
            assert torch.equal(got.support_mask, want.support_mask)
            torch.testing.assert_close(got.teacher_support_logp, want.teacher_support_logp, atol=1e-5, rtol=0)
    assert served.pop_requests()["repeated"] == 0


METHODS = {
    "sampled": ("opd", {}),
    "teacher's top k": ("topk_reverse_kl", {"k": K, "by": "teacher", "form": "tail"}),
    "student's top k": ("topk_reverse_kl", {"k": K, "by": "student", "form": "tail"}),
}


@pytest.mark.parametrize("name", METHODS)
def test_gradient_of_a_step_equals_that_of_a_local_teacher(teacher, url, name):
    method = build(*METHODS[name])
    student = tiny("llama", teacher.tokenizer, seed=2, hidden=32, spread=0.3, name="student")
    prompts = [Prompt(id=i, content=text) for i, text in enumerate(("the quick brown fox", "x = 12;"))]
    sampler = TransformersSampler(lm=student, sampling=Sampling(max_completion_length=24, n=2))
    rollouts = sampler(prompts, seed=(0, 0), record=method.record())
    contexts, request = method.context(rollouts), method.request()
    local = LocalTeacher(lm=teacher, micro_batch_tokens=4096, student_device=DEVICE)
    found = []
    for one in (local, teacher_at(url, request, teacher.tokenizer)):
        student.model.zero_grad()
        phase_a = scored(method, one, rollouts, contexts, request, DEVICE)
        gradient(method, student, one, phase_a, 4096)
        found.append({key: weight.grad.clone() for key, weight in student.model.named_parameters()})
    near, far = found
    assert max(float(grad.abs().max()) for grad in near.values()) > 1e-3
    for key, grad in near.items():
        torch.testing.assert_close(far[key], grad, atol=1e-5, rtol=0, msg=key)


def test_real_scores_of_equal_responses(teacher, url):
    """The prompt fills one block of the server's cache, the response another."""
    request = ScoreRequest(support=top_k(K, by="student"))
    ids = np.random.default_rng(5).integers(5, 261, 200).tolist()
    student = tiny("llama", byte_tokenizer(), seed=3, name="student")
    one = replace(rollout_of(student, Prompt(id=0, content="x"), ids[128:]), prompt_ids=tuple(ids[:128]))
    one = replace(one, student_top_ids=torch.arange(7, 7 + K).repeat(72, 1))
    served = teacher_at(url, request, teacher.tokenizer)
    found = served.score_after([ids[:128]] * 3, [one] * 3, request)
    local = LocalTeacher(lm=teacher, micro_batch_tokens=4096, student_device=DEVICE)
    want = local.score_after([ids[:128]], [one], request)[0]
    for got in found:
        torch.testing.assert_close(got.teacher_support_logp, want.teacher_support_logp, atol=1e-5, rtol=0)
    counts = served.pop_requests()
    assert (counts["repeated"], counts["failed"]) == (2.0, 0.0)


def sequences() -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(5, 261, 8 + 5 * i).tolist() for i in range(9)]


def contract() -> list[tuple[str, dict[str, Any]]]:
    """40 requests: scores of both kinds, tokens, and what a server refuses."""
    made: list[tuple[str, dict[str, Any]]] = []
    for i, ids in enumerate(sequences()):
        wanted = np.tile(np.arange(3 + i % 3), (len(ids) - 4, 1))
        made.append(("v1/completions", completion_fields("teacher", ids, i % 4)))
        made.append(("inference/v1/generate", positions_fields("teacher", ids, 4, wanted, cached=bool(i % 2))))
        made.append(("detokenize", {"model": "teacher", "tokens": ids[:2]}))
    ids = sequences()[0]
    rows = np.zeros((len(ids) - 4, 2), dtype=np.int64)
    made += [
        ("v1/completions", completion_fields("unknown", ids, 1)),
        ("v1/completions", completion_fields("teacher", ids, 41)),
        ("v1/completions", completion_fields("teacher", [7] * 300, 1)),
        ("detokenize", {"model": "another", "tokens": ids[:2]}),
        ("inference/v1/generate", positions_fields("another", ids, 4, rows, cached=True)),
        ("inference/v1/generate", positions_fields("teacher", ids, 4, rows[:2], cached=True)),
        ("inference/v1/generate", positions_fields("teacher", ids, 4, np.tile(np.arange(41), (4, 1)), cached=True)),
        ("inference/v1/generate", positions_fields("teacher", [7] * 300, 296, rows[:4], cached=True)),
    ]
    return [*made, *[("v1/completions", completion_fields("teacher", ids, k)) for k in (8, 16, 24, 32, 40)]]


def test_own_server_answers_as_the_real_one(url, fake):
    """The fast tests use a server of their own: its answers have the same status, shape and numbers."""
    requests = contract()
    assert len(requests) == 40
    assert set(shape(httpx2.get(f"{fake.url}/v1/models").json())) <= set(shape(httpx2.get(f"{url}/v1/models").json()))
    for path, fields in requests:
        real, own = (httpx2.post(f"{root}/{path}", json=fields, timeout=120.0) for root in (url, fake.url))
        assert own.status_code == real.status_code, (path, fields, real.text[:300])
        assert set(shape(own.json())) <= set(shape(real.json())), (path, fields)
        if real.status_code == 200 and path != "detokenize":
            ours, theirs = numbers(path, fields, own.content), numbers(path, fields, real.content)
            for mine, other in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(mine, other, atol=1e-5)
        elif real.status_code == 200:
            assert own.json()["prompt"] == real.json()["prompt"]


def shape(body: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, type) of every member; keys of tokens are one path."""
    if isinstance(body, dict):
        for key, one in body.items():
            yield from shape(one, f"{path}.{'TOKEN' if key.isdigit() else key}")
    elif isinstance(body, list):
        for one in body:
            yield from shape(one, f"{path}[]")
    elif path.endswith((".rank", ".logprob", "prompt_token_id_logprobs", ".max_model_len")) or ".id" in path:
        yield path, type(body).__name__


def numbers(path: str, fields: dict[str, Any], raw: bytes) -> Sequence[np.ndarray]:
    if path == "v1/completions":
        found = parse_top(fields["prompt"], 1, fields["prompt_logprobs"])(raw)
        return [found.logp, found.top_ids, found.top_logp]
    return [parse_positions(np.array(fields["sampling_params"]["prompt_logprob_token_ids"]))(raw)]


def test_real_server_ignores_temperature_and_unknown_fields(url):
    ids = control_ids(261)
    plain = completion_fields("teacher", ids, 2)
    answers = [
        httpx2.post(f"{url}/v1/completions", json=plain | more, timeout=120.0)
        for more in ({}, {"temperature": 2.0}, {"a_field_of_the_future": 3})
    ]
    assert {one.status_code for one in answers} == {200}
    first, *others = (parse_top(ids, 1, 2)(one.content).logp for one in answers)
    for other in others:
        np.testing.assert_allclose(first, other, atol=1e-6)
    assert json.loads(answers[0].content)["choices"][0]["prompt_logprobs"][0] is None
