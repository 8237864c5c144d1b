"""The protocol of vLLM's server for scores of given tokens: requests, and parsers of their answers.

Two endpoints (run with 0.32, read in 0.33):

- `/v1/completions` with `prompt_logprobs: k`: log-probs of the given token and of the k most likely ones, in JSON of
  about 75 bytes per entry.
- `/inference/v1/generate` with `prompt_logprob_token_ids`: log-probs of given ids by position, as base64 of a float32
  array. Since 0.31; the server has to run with `--enable-scale-out`.

Both are at temperature 1, whatever the request or the server's `--logprobs-mode` says. Unknown fields of a request are
ignored with status 200, so what a server can do is read from what comes back.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opd.engines.server import BodyError
from opd.types import Sampling

LARGEST_LOGP = 1e-3  # above 0 by rounding, at most
NO_LOGP = -9990.0  # and below: the endpoints write -9999 for minus infinity, and /inference/v1/generate for NaN too


@dataclass(frozen=True, slots=True, kw_only=True)
class TopScores:
    """Scores of T tokens. Entry t predicts token t of the response."""

    logp: np.ndarray  # [T] float32, of the given tokens
    top_ids: np.ndarray  # [T, k] int64, in falling order
    top_logp: np.ndarray  # [T, k] float32


def completion_fields(model: str, ids: Sequence[int], k: int) -> dict[str, Any]:
    """The fields of a request for `parse_top` with the same k.

    All sampling fields are sent: the server takes missing ones from the model's `generation_config.json`.
    """
    return {
        "model": model,
        "prompt": list(ids),
        "prompt_logprobs": k,
        "max_tokens": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "add_special_tokens": False,
    }


def parse_top(ids: Sequence[int], start: int, k: int) -> Callable[[bytes], TopScores]:
    """The parser of a completion's scores of `ids[start:]`. It raises BodyError for an answer without them."""

    def _parse(raw: bytes) -> TopScores:
        rows = _member(_json(raw), "choices", 0, "prompt_logprobs")
        if not isinstance(rows, list) or len(rows) != len(ids):
            found = len(rows) if isinstance(rows, list) else "no"
            raise BodyError(f"the answer has the scores of {found} tokens; the request had {len(ids)}")
        taken = [_entry(row, ids[start + t], k) for t, row in enumerate(rows[start:])]
        return TopScores(
            logp=np.array([logp for logp, _, _ in taken], dtype=np.float32),
            top_ids=np.array([top for _, top, _ in taken], dtype=np.int64).reshape(len(taken), k),
            top_logp=np.array([values for _, _, values in taken], dtype=np.float32).reshape(len(taken), k),
        )

    return _parse


def _entry(row: Any, token: int, k: int) -> tuple[float, list[int], list[float]]:
    """(log-prob of the given token, ids of the k most likely, their log-probs), from one position's dictionary.

    It has k entries, or k + 1 if the given token is not among the most likely; their order is not that of the ranks.
    """
    if not isinstance(row, dict):
        raise BodyError("the answer lacks the scores of a token")
    found: dict[int, tuple[int, float]] = {}
    try:
        for key, one in row.items():
            found[int(key)] = int(one["rank"]), checked(float(one["logprob"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BodyError(f"a token's score cannot be read: {type(error).__name__}: {error}") from error
    if token not in found:
        raise BodyError(f"the answer scores other tokens: it lacks {token}")
    ranked = sorted((rank, id_) for id_, (rank, _) in found.items() if rank <= k)
    if len(ranked) != k:
        raise BodyError(f"the answer has {len(ranked)} of the {k} most likely tokens of a position")
    top = [id_ for _, id_ in ranked]
    return found[token][1], top, [found[id_][1] for id_ in top]


def checked(logp: float) -> float:
    """A log-prob that is one. Raises BodyError for NaN, infinity, what stands for them, and a positive number."""
    if not NO_LOGP < logp <= LARGEST_LOGP:
        raise BodyError(f"a log-prob is {logp}")
    return logp


def positions_fields(model: str, ids: Sequence[int], start: int, wanted: np.ndarray, *, cached: bool) -> dict[str, Any]:
    """The fields of a request for `parse_positions`: the tokens `wanted` [T, K] at the positions of `ids[start:]`.

    Row r predicts the token after position `start - 1 + r`. `cached`: read a common prefix from the server's cache. If
    that holds more than `start - 1` tokens, vLLM gives no scores (0.32), with status 200.
    """
    sampling = {
        "max_tokens": 1,
        "temperature": 1.0,
        "detokenize": False,
        "prompt_logprob_token_ids": wanted.tolist(),
        "prompt_logprob_start": start - 1,
        "skip_reading_prefix_cache": not cached,
    }
    return {"model": model, "token_ids": list(ids), "sampling_params": sampling}


def parse_positions(wanted: np.ndarray, *, cached: bool = False) -> Callable[[bytes], np.ndarray]:
    """The parser of the log-probs [T, K] float32 of `wanted`. It raises BodyError for another shape or no scores.

    If the request was `cached`, no scores are an array of size 0: the same request without the cache gives them.
    """

    def _parse(raw: bytes) -> np.ndarray:
        body = _json(raw)
        text = body.get("prompt_token_id_logprobs") if isinstance(body, dict) else None
        if text is None and cached and isinstance(body, dict) and "choices" in body:
            return np.zeros((0, 0), dtype=np.float32)
        if text is None:
            text = _member(body, "choices", 0, "prompt_token_id_logprobs")
        if not isinstance(text, str):
            raise BodyError("the answer has no scores of the requested ids")
        try:
            values = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
        except (binascii.Error, ValueError, OSError, EOFError) as error:
            raise BodyError(f"the scores are no array: {error}") from error
        if values.shape != wanted.shape or values.dtype != np.float32:
            raise BodyError(f"the scores are {values.dtype} {values.shape}, not float32 {wanted.shape}")
        if not ((values > NO_LOGP) & (values <= LARGEST_LOGP)).all():
            raise BodyError("a log-prob is NaN, infinite or positive")
        return values

    return _parse


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BodyError("the answer is not JSON") from error


def _member(body: Any, *path: str | int) -> Any:
    """A member of nested JSON. Raises BodyError without it."""
    for key in path:
        try:
            body = body[key]
        except (KeyError, IndexError, TypeError) as error:
            raise BodyError(f"the answer has no {'.'.join(map(str, path))}") from error
    return body


def member_of(raw: bytes, *path: str | int) -> Any:
    """A member of an answer's JSON. Raises BodyError."""
    return _member(_json(raw), *path)


def workers_in(raw: bytes) -> int:
    """How many workers a server has, over all kinds of parallelism. Raises BodyError."""
    size = member_of(raw, "world_size")
    if not isinstance(size, int) or size < 1:
        raise BodyError(f"it says that it has {size!r} workers")
    return size


@dataclass(frozen=True, slots=True)
class Listed:
    """A model of `/v1/models`."""

    longest: int | None  # tokens of a sequence; None: the server does not say
    adapter: bool  # of another model


def models_in(raw: bytes) -> Mapping[str, Listed]:
    """The models of `/v1/models`, by name. Raises BodyError."""
    rows = _member(_json(raw), "data")
    try:
        return {str(row["id"]): Listed(row.get("max_model_len"), bool(row.get("parent"))) for row in rows}
    except (KeyError, TypeError, AttributeError) as error:
        raise BodyError("the answer is no list of models") from error


def text_in(raw: bytes) -> str:
    """The text of `/detokenize`. Raises BodyError."""
    text = _member(_json(raw), "prompt")
    if not isinstance(text, str):
        raise BodyError("the answer has no text")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One response of T tokens."""

    ids: list[int]
    logp: list[float]  # of the distribution that each token was drawn from, if the server runs as it must
    finished: bool  # by a stop token or string, not by the length
    versions: list[str]  # [T], of the weights that drew each token


def sampling_fields(sampling: Sampling, tokens: int, stop_ids: Iterable[int]) -> dict[str, Any]:
    """Every field of a response of at most `tokens` tokens that the server would choose otherwise."""
    return {
        "max_tokens": tokens,
        "min_tokens": 0,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "ignore_eos": True,
        "stop_token_ids": sorted(stop_ids),
        "stop": list(sampling.stop),
        "include_stop_str_in_output": True,
        "detokenize": bool(sampling.stop),
    }


def seed_of(seed: tuple[int, int, int], prompt_id: int, sample: int) -> int:
    """The seed of one request: a function of (seed, step, part), prompt and sample only."""
    return int(np.random.SeedSequence((*seed, prompt_id, sample)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def draw_fields(model: str, ids: Sequence[int], sampling: Mapping[str, Any], *, seed: int, salt: str) -> dict[str, Any]:
    """The fields of a request for `parse_drawn`. `sampling` has every field that the server would choose otherwise.

    `salt` separates the caches of the weights' versions: an update does not clear the prefix cache (vLLM 0.32).
    """
    params = {**sampling, "seed": seed, "logprobs": 0, "n": 1, "skip_special_tokens": False}
    return {"model": model, "token_ids": list(ids), "sampling_params": params, "cache_salt": salt}


def parse_drawn(raw: bytes) -> Drawn:
    """A response. Raises BodyError for one that was aborted, or lacks a token's log-prob or version."""
    choice = _member(_json(raw), "choices", 0)
    reason = _member(choice, "finish_reason")
    if reason not in ("stop", "length"):  # a paused server answers "abort" with status 200
        raise BodyError(f"the response ended by {reason!r}, not by its end or its length")
    ids, content = _member(choice, "token_ids"), _member(choice, "logprobs", "content")
    try:
        logp = [checked(float(one["logprob"])) for one in content]
        same = [int(one["token_id"]) for one in content] == [int(one) for one in ids]
        spans = [(str(one["version"]), int(one["start"]), int(one["end"])) for one in choice["weight_versions"] or ()]
    except (KeyError, TypeError, ValueError) as error:
        raise BodyError(f"a response cannot be read: {type(error).__name__}: {error}") from error
    versions = [version for version, start, end in spans for _ in range(start, end)]
    if not same or len(versions) not in (0, len(ids)):
        raise BodyError("the tokens, their log-probs and their versions do not fit together")
    return Drawn(ids=[int(one) for one in ids], logp=logp, finished=reason == "stop", versions=versions)
