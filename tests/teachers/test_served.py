"""A teacher on servers: its scores against those of the same model in this process, and every fault counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.engines import Engine, packed, refused, running, spoilt
from support.http_server import Said
from support.models import DEVICE, byte_tokenizer, tiny

from opd.engines.capabilities import probe
from opd.engines.replicas import Replicas
from opd.engines.scoring import refusal, top_of
from opd.engines.server import Server
from opd.errors import ConfigError, DataError, TeacherError
from opd.models.language_model import LanguageModel
from opd.pieces.supports import full, sampled, top_k
from opd.samplers.hf import TransformersSampler
from opd.teachers.local import LocalTeacher
from opd.teachers.served import ABSENT, ServedTeacher
from opd.types import Prompt, Record, Rollout, Sampling, ScoreRequest, Scores

K = 3
REQUESTS = {
    "sampled": ScoreRequest(support=sampled()),
    "sampled, with a top k": ScoreRequest(support=sampled(), top_k=4),
    **{
        f"{by}{', with the sampled token' * more}": ScoreRequest(support=top_k(K, by=by, with_sampled=more))
        for by in ("teacher", "student", "union", "intersection", "symmetric_difference")
        for more in (False, True)
    },
}


@pytest.fixture(scope="module")
def models() -> tuple[LanguageModel, LanguageModel]:
    tokenizer = byte_tokenizer()
    return tiny("llama", tokenizer, seed=1, name="student"), tiny("llama", tokenizer, seed=2, name="teacher")


@pytest.fixture(scope="module")
def rollouts(models: tuple[LanguageModel, LanguageModel]) -> list[Rollout]:
    prompts = [Prompt(id=i, content=text) for i, text in enumerate(("ab", "hello", "x"))]
    sampler = TransformersSampler(lm=models[0], sampling=Sampling(max_completion_length=7, n=2))
    return sampler(prompts, seed=(0, 0), record=Record(top_k=K))


@pytest.fixture
def engine(models: tuple[LanguageModel, LanguageModel]) -> Iterator[Engine]:
    one = Engine(lm=models[1])
    with running(one):
        yield one


def served(student: LanguageModel, *engines: Engine, request: ScoreRequest, **settings: Any) -> ServedTeacher:
    max_failed = settings.pop("max_failed", 0.0)
    replicas = Replicas(
        servers=tuple(Server(url=one.url, timeout_s=5.0) for one in engines),
        **{"patience_s": 1.0, "pause_s": 0.05, **settings},
    )
    k = request.support.student_top_k
    able = probe(
        replicas,
        None,
        student.tokenizer,
        by_position=k + 1 if k else 0,
        top=lambda positions: top_of(request, positions, len(student.tokenizer)) or 0,
    )
    return ServedTeacher(
        name="teacher",
        replicas=replicas,
        capabilities=able,
        tokenizer=student.tokenizer,
        template_options={},
        device=DEVICE,
        max_failed=max_failed,
    )


def local(models: tuple[LanguageModel, LanguageModel]) -> LocalTeacher:
    return LocalTeacher(lm=models[1], micro_batch_tokens=4096, student_device=DEVICE)


def contexts(rollouts: Sequence[Rollout]) -> list[Prompt]:
    return [rollout.prompt for rollout in rollouts]


def same(got: Scores, want: Scores) -> None:
    """The same support, in any order of the teacher's equal tokens, with the same log-probs."""
    torch.testing.assert_close(got.teacher_logp, want.teacher_logp, atol=1e-5, rtol=0)
    for name in ("support_ids", "support_mask", "teacher_top_ids"):
        assert torch.equal(getattr(got, name), getattr(want, name)) if getattr(want, name) is not None else True
    for name in ("teacher_support_logp", "teacher_top_logp"):
        if getattr(want, name) is not None:
            torch.testing.assert_close(getattr(got, name), getattr(want, name), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", REQUESTS)
def test_served_scores_equal_local_scores(models, rollouts, engine, name):
    request = REQUESTS[name]
    teacher = served(models[0], engine, request=request)
    found = teacher.score(rollouts, contexts(rollouts), request)
    for got, want in zip(found, local(models).score(rollouts, contexts(rollouts), request), strict=True):
        same(got, want)
    assert teacher.pop_requests()["ids_missing"] == 0.0


def test_served_responses_of_one_prompt_share_its_cache(models, rollouts, engine):
    request = REQUESTS["student"]
    served(models[0], engine, request=request).score(rollouts, contexts(rollouts), request)
    sent = [one["sampling_params"] for one in engine.scored if "sampling_params" in one]
    assert len(sent) == len(rollouts)
    assert not any(one["skip_reading_prefix_cache"] for one in sent)


def test_served_scores_what_the_cache_hides(models, rollouts, engine):
    """vLLM gives no scores to a request whose first scored token is in its cache, as for equal responses."""
    engine.block = 1
    request = REQUESTS["student"]
    teacher = served(models[0], engine, request=request)
    twice = [*rollouts, *rollouts]
    found = teacher.score(twice, contexts(twice), request)
    for got, want in zip(found, local(models).score(twice, contexts(twice), request), strict=True):
        same(got, want)
    counts = teacher.pop_requests()
    assert len(rollouts) <= counts["repeated"] < len(twice)
    assert (counts["failed"], counts["servers_lost"]) == (0.0, 0.0)


def test_served_falls_back_to_wider_top_k_and_counts(models, rollouts, engine):
    """Without scores by position, the student's tokens outside of the teacher's top 12 have no score."""
    engine.scale_out = False
    request = REQUESTS["student"]
    teacher = served(models[0], engine, request=request)
    assert not teacher.capabilities.positions
    found = teacher.score(rollouts, contexts(rollouts), request)
    exact = local(models).score(rollouts, contexts(rollouts), request)
    wide = local(models).score(rollouts, contexts(rollouts), ScoreRequest(support=sampled(), top_k=4 * K))
    missing = 0
    for got, want, top, rollout in zip(found, exact, wide, rollouts, strict=True):
        assert torch.equal(got.support_ids, want.support_ids)
        known = torch.cat([top.teacher_top_ids, rollout.response_ids[:, None]], 1)
        inside = (want.support_ids[:, :, None] == known[:, None, :]).any(-1)
        assert torch.equal(got.support_mask, inside)
        missing += int((~inside).sum())
        torch.testing.assert_close(
            got.teacher_support_logp, want.teacher_support_logp.masked_fill(~inside, ABSENT), atol=1e-5, rtol=0
        )
    counts = teacher.pop_requests()
    assert counts["ids"] == sum(K * len(one.response_ids) for one in rollouts)
    assert 0 < counts["ids_missing"] == missing


def test_served_refuses_what_no_server_computes():
    assert "whole distribution" in str(refusal(ScoreRequest(support=full())))
    assert "temperature 1" in str(refusal(ScoreRequest(support=sampled(), temperature=0.5)))
    assert "entropy" in str(refusal(ScoreRequest(support=sampled(), entropy=True)))
    assert all(refusal(request) is None for request in REQUESTS.values())


def test_probe_refuses_server_that_cannot_teach(models, engine):
    request = ScoreRequest(support=top_k(30, by="teacher"))
    with pytest.raises(ConfigError, match=r"does not give the top 30.*--max-logprobs"):
        served(models[0], engine, request=request)
    with pytest.raises(ConfigError, match=r"30 tokens by position.*--max-logprobs"):
        served(models[0], engine, request=ScoreRequest(support=top_k(29, by="student")))
    other = Engine(lm=tiny(seed=3, spread=0.4))  # with another tokenizer
    with running(other), pytest.raises(ConfigError, match=r"the text of a token|same tokens"):
        served(models[0], other, request=REQUESTS["sampled"])
    with pytest.raises(ConfigError, match="no model 'qwen'"):
        probe(Replicas(servers=(Server(url=engine.url),)), "qwen", models[0].tokenizer, by_position=0, top=lambda _: 0)


def test_probe_refuses_servers_of_different_models(models, engine):
    other = Engine(lm=models[0])
    with running(other), pytest.raises(ConfigError, match=r"different models.* nats per token"):
        served(models[0], engine, other, request=REQUESTS["sampled"])


def test_served_notices_server_that_has_another_model(models, rollouts, engine):
    teacher = served(models[0], engine, request=REQUESTS["sampled"])
    teacher.score(rollouts, contexts(rollouts), REQUESTS["sampled"])
    engine.lm = models[0]
    with pytest.raises(TeacherError, match=r"another model than at the start.*scores were not used"):
        teacher.score(rollouts, contexts(rollouts), REQUESTS["sampled"])


def test_served_recognises_its_model_at_a_later_start(models, engine):
    teacher, later = (served(models[0], engine, request=REQUESTS["sampled"]) for _ in range(2))
    later.load_state_dict(teacher.state_dict())
    later.load_state_dict({})  # of an older checkpoint
    engine.lm = models[0]
    with pytest.raises(TeacherError, match=r"another model than in the stage's last steps.* nats per token"):
        served(models[0], engine, request=REQUESTS["sampled"]).load_state_dict(teacher.state_dict())


def test_served_notices_other_model_behind_a_failure(models, rollouts, engine):
    """The fixed sequence is scored again after a failed answer, not left out."""
    teacher = served(models[0], engine, request=REQUESTS["sampled"])
    engine.lm = models[0]
    failures = [Said(status=500, body={})]
    engine.fault = lambda arrived, said: (
        failures.pop() if failures and len(arrived.request.get("prompt") or ()) == 24 else said
    )
    with pytest.raises(TeacherError, match="another model than at the start"):
        teacher.score(rollouts, contexts(rollouts), REQUESTS["sampled"])


def test_served_refuses_row_longer_than_servers_read(models, rollouts, engine):
    engine.longest = 25  # the fixed sequence has 24 tokens
    teacher = served(models[0], engine, request=REQUESTS["sampled"])
    long = replace(rollouts[0], response_ids=torch.arange(5, 29))
    with pytest.raises(DataError, match=r"reads at most 24 tokens.*--max-model-len"):
        teacher.score([long], contexts([long]), REQUESTS["sampled"])


def _of_choice(change: Any) -> Any:
    def changed(body: dict[str, Any]) -> dict[str, Any]:
        rows = [dict(row) if row else row for row in body["choices"][0]["prompt_logprobs"]]
        return body | {"choices": [body["choices"][0] | {"prompt_logprobs": change(rows)}]}

    return changed


def _with_logp(value: float) -> Any:
    return _of_choice(lambda rows: [*rows[:-1], {key: one | {"logprob": value} for key, one in rows[-1].items()}])


FAULTS: dict[str, Any] = {
    "500": lambda body: Said(status=500, body={"error": "boom"}),
    "hung up": lambda body: Said(hang_up=True),
    "busy": lambda body: Said(status=503, body={}, headers=(("Retry-After", "0.01"),)),
    "no JSON": lambda body: Said(body=b"<html>"),
    "cut": lambda body: Said(body=b'{"choices": [{"prompt_logp'),
    "NaN": _with_logp(float("nan")),
    "-9999 for NaN": _with_logp(-9999.0),
    "positive": _with_logp(0.5),
    "a field less": lambda body: {"choices": [{"text": ""}]},
    "a token less": _of_choice(lambda rows: rows[:-1]),
    "other tokens": _of_choice(lambda rows: [*rows[:-1], {"1000": {"logprob": -1.0, "rank": 1}}]),
    "no score of a token": _of_choice(lambda rows: [*rows[:-1], None]),
    "fewer of the top k": _of_choice(lambda rows: [*rows[:-1], dict(list(rows[-1].items())[:2])]),
}
OF_POSITIONS: dict[str, Any] = {
    "no field": lambda body: {"choices": body["choices"]},
    "another shape": lambda body: body | {"prompt_token_id_logprobs": packed(np.zeros((1, 1), np.float32))},
    "an object array": lambda body: body | {"prompt_token_id_logprobs": packed(np.array([None], dtype=object))},
    "no base64": lambda body: body | {"prompt_token_id_logprobs": "*"},
    "NaN": lambda body: body | {"prompt_token_id_logprobs": packed(np.full((7, K + 1), np.nan, np.float32))},
}


@pytest.mark.parametrize(
    ("name", "support"), [*((name, "teacher") for name in FAULTS), *((name, "student") for name in OF_POSITIONS)]
)
def test_served_repeats_faulty_answer_without_loss(models, rollouts, engine, name, support):
    request = REQUESTS[support]
    teacher = served(models[0], engine, request=request)
    teacher.pop_requests()
    engine.fault = spoilt((FAULTS if support == "teacher" else OF_POSITIONS)[name], times=1)
    found = teacher.score(rollouts, contexts(rollouts), request)
    for got, want in zip(found, local(models).score(rollouts, contexts(rollouts), request), strict=True):
        same(got, want)
    counts = teacher.pop_requests()
    assert counts["requests"] == len(rollouts) + 2  # one again, and that of the fixed sequence
    assert counts["failed"] == 0


def test_served_masks_response_without_scores_and_counts(models, rollouts, engine):
    """One response has no score: none of its tokens is trained, and the others are."""
    request = REQUESTS["union, with the sampled token"]
    teacher = served(models[0], engine, request=request, max_failed=0.1)
    engine.fault = lambda arrived, said: (
        refused(400, "no")
        if (arrived.request.get("token_ids") or [])[-7:] == rollouts[2].response_ids.tolist()[-7:]
        else said
    )
    found = teacher.score(rollouts, contexts(rollouts), request)
    wanted = local(models).score(rollouts, contexts(rollouts), request)
    for i, (got, want) in enumerate(zip(found, wanted, strict=True)):
        if i == 2:
            assert not got.scored.any()
            assert got.teacher_logp.isnan().all()
            assert got.support_ids.shape == want.support_ids.shape
            assert not got.support_mask.any()
        else:
            same(got, want)
    assert teacher.pop_requests()["failed"] == 1


def test_served_stops_if_too_many_responses_have_no_scores(models, rollouts, engine):
    teacher = served(models[0], engine, request=REQUESTS["sampled"], max_failed=0.1)
    engine.fault = spoilt(FAULTS["500"])
    with pytest.raises(TeacherError, match=r"no scores for 6 of 6 .*HTTP 500.*`max_failed`|`max_failed`.*HTTP 500"):
        teacher.score(rollouts, contexts(rollouts), REQUESTS["sampled"])
