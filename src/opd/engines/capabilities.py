"""What vLLM servers can do, and whether they are the model that they were: read from what comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opd.engines.replicas import Job, Replicas
from opd.engines.server import Answer, Connection
from opd.engines.vllm import (
    TopScores,
    completion_fields,
    models_in,
    parse_positions,
    parse_top,
    positions_fields,
    text_in,
)
from opd.errors import ConfigError, TeacherError

CONTROL = 24  # tokens of the sequence by which a server's model is recognised
AT_ONCE = 8  # scores of it by which servers are compared with themselves
RECOGNISED_S = 30.0  # for its scores after a step: a server that hangs does not hold up the step
OTHER_MODEL = 0.1  # nats per token, mean: above the noise of batches in bfloat16, below the distance of two models


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What all servers can do."""

    model: str  # the servers' name of it
    longest: int | None  # tokens of a sequence; None: the servers do not say
    positions: bool  # log-probs of given ids by position
    control: np.ndarray  # [CONTROL - 1] log-probs of the control sequence; empty for an engine
    notes: tuple[str, ...] = ()


def control_ids(vocabulary: int) -> list[int]:
    """The control sequence: tokens that no model expects, equal in every run."""
    return np.random.default_rng(0).integers(0, vocabulary, CONTROL).tolist()


def probe(
    replicas: Replicas,
    model: str | None,
    tokenizer: Any,
    *,
    top: Callable[[bool], int],
    by_position: int,
    one_model: bool = True,
) -> Capabilities:
    """Look at every server once: its models, its tokens, scores by position if they are needed, and a top-k.

    `model` None: the only model of the servers. `tokenizer` is the student's. `by_position`: the number of given tokens
    to score at a position, 0 for none. `top`: whether the servers do that -> the largest top-k that will be requested.
    `one_model`: whether all servers must have the same weights. Those of an engine get theirs later, and nothing is
    scored: on a CPU a server of vLLM 0.32 that takes adapters does not score given tokens reliably.

    Raises:
        ConfigError: a server does not answer, lacks the model, has other tokens, or refuses `k`; or two servers differ.
    """
    listed = of_each(replicas, lambda one: one.get("v1/models", models_in), "its models")
    named = _named(model, listed)
    ids = control_ids(len(tokenizer))
    _check_tokens(replicas, named, tokenizer, ids)
    control, notes = np.zeros(0, np.float32), list[str]()
    if one_model:
        scored = of_each(replicas, lambda one: _control(one, named, ids, 0), "the log-probs of given tokens")
        control, notes = _compared(scored)
    can = by_position > 0 and _by_position(replicas, named, ids, control)
    if can and by_position > 1:
        many = np.arange(by_position, dtype=np.int64)[None, :].repeat(len(ids) - 1, 0)
        of_each(replicas, lambda one: _positions(one, named, ids, many), f"{by_position} tokens by position", WIDER)
    if k := top(can):
        of_each(replicas, lambda one: _control(one, named, ids, k), f"the top {k} of each token", WIDER)
    lengths = [models[named].longest for models in listed.values()]
    return Capabilities(
        model=named,
        longest=min([length for length in lengths if length is not None], default=None),
        positions=can,
        control=control,
        notes=tuple(notes),
    )


def check_same(replicas: Replicas, of: Capabilities, vocabulary: int) -> None:
    """Raise TeacherError if a server that answers has another model than `probe` saw."""
    ids = control_ids(vocabulary)
    for url, answer in replicas.each(lambda one: _control(one, of.model, ids, 0), RECOGNISED_S).items():
        if answer.value is None:  # a lost server: the scores came from another
            continue
        apart = float(np.abs(answer.value.logp - of.control).mean())
        if apart > OTHER_MODEL:
            raise TeacherError(
                f"The server {url} has another model than at the start of the stage: the log-probs of a fixed sequence "
                f"differ by {apart:.3g} nats per token. The step's scores were not used. Start the server with the "
                "teacher again; the same command then continues."
            )


def apart_at_once(replicas: Replicas, of: Capabilities, vocabulary: int) -> float:
    """The largest difference of a log-prob, in nats, among `AT_ONCE` scores of the fixed sequence per server.

    They are sent at the same time: a server adds in another order in other batches, and replicas may differ in more.
    Raises ConfigError if a server gives no scores.
    """
    ids = control_ids(vocabulary)
    jobs = [
        Job(
            path="v1/completions",
            fields=completion_fields(of.model, ids, 0),
            read=parse_top(ids, 1, 0),
            tokens=len(ids) + 1,
            group=i,
        )
        for i in range(AT_ONCE * len(replicas.servers))
    ]
    found = replicas.answers(jobs)
    values = [answer.value.logp for answer in found if answer.value is not None]
    if len(values) < len(jobs):
        why = next(answer.failure for answer in found if answer.value is None)
        raise ConfigError(f"The servers gave {len(values)} of {len(jobs)} scores that were sent at once: {why}.")
    return float(np.ptp(np.stack(values), axis=0).max())


WIDER = "Start the server with --max-logprobs of at least that number, or lower the method's k."


def _control(one: Connection, model: str, ids: Sequence[int], k: int) -> Answer[TopScores]:
    return one.post("v1/completions", completion_fields(model, ids, k), parse_top(ids, 1, k))


def _positions(one: Connection, model: str, ids: Sequence[int], wanted: np.ndarray) -> Answer[np.ndarray]:
    fields = positions_fields(model, ids, 1, wanted, cached=False)
    return one.post("inference/v1/generate", fields, parse_positions(wanted))


def of_each(replicas: Replicas, send: Any, what: str, remedy: str = "") -> dict[str, Any]:
    """The value of every server. Raises ConfigError for a server without one."""
    found = replicas.each(send, wait_s=replicas.pause_s)
    for url, answer in found.items():
        if answer.value is None:
            raise ConfigError(f"The server {url} does not give {what}: {answer.failure}. {remedy}".rstrip())
    return {url: answer.value for url, answer in found.items()}


def _named(model: str | None, listed: dict[str, Any]) -> str:
    """The model that all servers have; of itself none of their adapters. Raises ConfigError."""
    own = {url: [name for name, one in models.items() if not one.adapter] for url, models in listed.items()}
    for url, models in listed.items():
        if model is None and len(own[url]) != 1:
            raise ConfigError(f"The server {url} has the models {', '.join(models)}. Name one: `model`.")
        if model is not None and model not in models:
            raise ConfigError(f"The server {url} has no model {model!r}; it has {', '.join(models)}. Correct `model`.")
    names = {model or own[url][0] for url in listed}
    if len(names) > 1:
        raise ConfigError(f"The servers have different models: {', '.join(sorted(names))}. Name one: `model`.")
    return names.pop()


def _check_tokens(replicas: Replicas, model: str, tokenizer: Any, ids: Sequence[int]) -> None:
    """Compare the texts of the control's tokens, one by one. Raises ConfigError for a server with other tokens."""

    def texts(one: Connection) -> Answer[list[str]]:
        found: list[str] = []
        for token in ids:
            answer = one.post("detokenize", {"model": model, "tokens": [token]}, text_in)
            if answer.value is None:
                return Answer(failure=answer.failure)
            found.append(answer.value)
        return Answer(value=found)

    own = [tokenizer.decode([token]) for token in ids]
    for url, theirs in of_each(replicas, texts, "the text of a token").items():
        for token, mine, other in zip(ids, own, theirs, strict=True):
            if mine != other:
                raise ConfigError(
                    f"The server {url} and the student do not have the same tokens: token {token} is {mine!r} for the "
                    f"student, and {other!r} for the server. A served teacher needs the student's tokenizer."
                )


def _compared(scored: dict[str, TopScores]) -> tuple[np.ndarray, list[str]]:
    """The control's log-probs and a note on how far servers differ. Raises ConfigError for different models."""
    (first, mine), *others = scored.items()
    notes: list[str] = []
    for url, theirs in others:
        apart = float(np.abs(mine.logp - theirs.logp).mean())
        if apart > OTHER_MODEL:
            raise ConfigError(
                f"The servers {first} and {url} have different models: the log-probs of a fixed sequence differ by "
                f"{apart:.3g} nats per token. Start both with the same weights."
            )
        notes.append(f"the servers {first} and {url} differ by {apart:.1e} nats per token")
    return mine.logp, notes


def _by_position(replicas: Replicas, model: str, ids: Sequence[int], control: np.ndarray) -> bool:
    """Whether every server scores given ids by position, and gives the numbers of the other endpoint."""
    wanted = np.array(ids[1:], dtype=np.int64)[:, None]
    found = replicas.each(lambda one: _positions(one, model, ids, wanted), wait_s=replicas.pause_s)
    return all(
        answer.value is not None and float(np.abs(answer.value[:, 0] - control).mean()) < OTHER_MODEL
        for answer in found.values()
    )
