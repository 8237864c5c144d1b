"""Responses of a served teacher: what its servers read, and what the student's records say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.engines import Engine, refused, running
from support.http_server import Arrived, Said
from support.models import byte_tokenizer, tiny

from opd.engines.replicas import Replicas
from opd.engines.server import Server
from opd.errors import DataError, TeacherError
from opd.models.language_model import LanguageModel
from opd.models.render import render
from opd.pieces.contexts import informed, same_prompt
from opd.teachers.written import ServedWriter
from opd.types import Prompt, Sampling

PROMPTS = [Prompt(id=i, content=[{"role": "user", "content": text}]) for i, text in enumerate(("ab", "hello"))]
TEMPLATE = "{% for message in messages %}{{ message.content }};{% endfor %}"


@pytest.fixture
def student() -> LanguageModel:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tiny("llama", tokenizer, seed=1, name="student")


@pytest.fixture
def engine(student: LanguageModel) -> Iterator[Engine]:
    one = Engine(lm=tiny("llama", student.tokenizer, seed=2, name="teacher"), longest=256)
    with running(one):
        yield one


def writer(student: LanguageModel, engine: Engine, **settings: Any) -> ServedWriter:
    return ServedWriter(
        name="teacher",
        replicas=Replicas(servers=(Server(url=engine.url, timeout_s=5.0),), retries=0, patience_s=1.0),
        model=engine.name,
        tokenizer=student.tokenizer,
        template_options={},
        student=student,
        **{"sampling": Sampling(max_completion_length=6, n=2), "context": same_prompt(), **settings},
    )


def test_servers_read_the_context_and_records_have_the_prompt(student, engine):
    context = informed(None, system="Be short.")
    found = writer(student, engine, context=context)(PROMPTS, seed=(0, 3))
    assert [(one.prompt.id, one.sample) for one in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for one in found:
        assert list(one.prompt_ids) == render(one.prompt, student.tokenizer)
        assert one.sampler_logp is None
        assert 0 < len(one.response_ids) <= 6
    read = {tuple(arrived.request["token_ids"]) for arrived in engine.arrived}
    assert {student.tokenizer.decode(ids) for ids in read} == {"Be short.;ab;", "Be short.;hello;"}


def test_responses_depend_on_seed_prompt_and_sample_alone(student, engine):
    def texts(prompts: list[Prompt], step: int) -> dict[tuple[int, int], list[int]]:
        found = writer(student, engine)(prompts, seed=(0, step))
        return {(one.prompt.id, one.sample): one.response_ids.tolist() for one in found}

    first = texts(PROMPTS, 0)
    assert texts(PROMPTS[::-1], 0) == first
    assert texts(PROMPTS, 1) != first
    assert first[0, 0] != first[0, 1]


def test_another_end_token_of_the_teacher_is_replaced(student, engine):
    """The students's own end token is in its place; the text has neither."""
    (end,) = student.stop_ids
    other = next(one for one in student.tokenizer.added_tokens_decoder if one != end)

    def fault(arrived: Arrived, said: Said) -> Said:
        content = [{"token_id": one, "logprob": -1.0} for one in (97, other)]
        choice = {"token_ids": [97, other], "finish_reason": "stop", "logprobs": {"content": content}}
        return Said(body={"choices": [{**choice, "weight_versions": None}]})

    engine.fault = fault
    for one in writer(student, engine)(PROMPTS, seed=(0, 0)):
        assert one.response_ids.tolist() == [97, end]
        assert one.text == student.tokenizer.decode([97])
        assert one.finished


def test_a_response_without_an_answer_ends_the_run(student, engine):
    engine.fault = lambda arrived, said: refused(400, "Start the server with --enable-scale-out.")
    with pytest.raises(TeacherError, match=r"wrote a response to prompt 0 of an evaluation: HTTP 400.*teacher"):
        writer(student, engine)(PROMPTS, seed=(0, 0))


def test_a_prompt_that_is_too_long_is_refused(student, engine):
    with pytest.raises(DataError):
        writer(student, engine, max_prompt_length=2)(PROMPTS, seed=(0, 0))
    assert not engine.arrived
