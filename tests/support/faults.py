"""Whole runs beside faulty servers: one fault per run, and what became of it.

As a script it prints the table of docs/served.md: with the server of vLLM if OPD_VLLM names a Python that has it, else
with the tests' own server.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

import opd
from opd.errors import OPDError
from opd.models import saving
from support.engines import Engine, packed, running
from support.http_server import Said
from support.models import byte_tokenizer, tiny
from support.proxy import Proxy, Spoilt, before
from support.runs import one_stage, prepare
from support.vllm_server import PYTHON, vllm

STEPS = 6
HUGE = b" " * (65 << 20)  # more than the client reads


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault in the middle of a run. `side`: of the teacher's server, or of the engine's. `by` chooses the support.

    `two`: a second server stands beside the faulty one. `ends`: the message with which the run must end; without one
    it must reach its last step. `weights`: what the engine gets, the whole model or its LoRA adapter.
    `ahead`: whether it writes the next step's responses during a step.
    """

    side: str
    name: str
    spoilt: Callable[[Servers], Spoilt]
    by: str = "teacher"
    two: bool = False
    late: bool = False
    weights: str = "full"
    ahead: int = 0
    ends: str = ""

    @property
    def kind(self) -> tuple[str, str, int]:
        return self.by, self.weights, self.ahead


@dataclass(frozen=True, slots=True)
class Servers:
    """The addresses of the servers: of the teacher, of an engine, and of two others with the student's first weights.

    `fresh` stands for a server that was started again; `adapters` takes adapters, and keeps its weights.
    `late_s`: the client's `timeout_s` where an answer is late. Elsewhere it is long, so that a busy machine fails none.
    """

    teacher: str
    engine: str
    fresh: str
    adapters: str
    late_s: float

    def engine_of(self, weights: str) -> str:
        """The engine that gets the whole model, or its adapter."""
        return self.adapters if weights == "lora" else self.engine


def spoil(kind: str, change: Callable[[Any], Any], *at: int) -> Callable[[Servers], Spoilt]:
    return lambda servers: Spoilt(kind=kind, change=change, at=at or (5, 8))


def late(kind: str, *at: int) -> Callable[[Servers], Spoilt]:
    return lambda servers: Spoilt(
        kind=kind, change=lambda body: Said(body=body, wait_s=1.5 * servers.late_s), at=at or (5, 8)
    )


def cut(body: Any) -> Said:
    raw = json.dumps(body).encode()
    return Said(body=raw[: len(raw) // 2], cut=len(raw) - len(raw) // 2)


def failed(body: Any) -> Said:
    return Said(status=500, body={"error": {"message": "internal error"}})


def busy(body: Any) -> Said:
    return Said(status=503, body={"error": {"message": "busy"}}, headers=(("Retry-After", "0"),))


def huge(body: Any) -> Said:
    return Said(body=HUGE)


def hung_up(body: Any) -> Said:
    return Said(hang_up=True)


def of_choice(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Any], Any]:
    """A change of an answer's only choice."""
    return lambda body: body | {"choices": [change(body["choices"][0])]}


def last_row(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], Any]:
    """A change of the scores of the last token."""

    def changed(one: dict[str, Any]) -> dict[str, Any]:
        *rows, last = one["prompt_logprobs"]
        return one | {"prompt_logprobs": [*rows, change(last)]}

    return of_choice(changed)


def last_token(change: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Other members in place of those of the last drawn token."""

    def changed(one: dict[str, Any]) -> dict[str, Any]:
        content = one["logprobs"]["content"]
        return one | {"logprobs": {"content": [*content[:-1], content[-1] | dict(change)]}}

    return of_choice(changed)


def array(values: Callable[[], np.ndarray]) -> Callable[[Any], Any]:
    def changed(body: Any) -> Any:
        found = {"prompt_token_id_logprobs": packed(values())}
        inside = "prompt_token_id_logprobs" in body["choices"][0]
        return body | {"choices": [body["choices"][0] | found]} if inside else body | found

    return changed


def without(name: str) -> Callable[[Any], Any]:
    """The answer without a member, wherever it is."""

    def changed(body: Any) -> Any:
        left = {key: value for key, value in body.items() if key != name}
        return left | {
            "choices": [{key: value for key, value in one.items() if key != name} for one in body["choices"]]
        }

    return changed


def backwards(one: dict[str, Any]) -> dict[str, Any]:
    spans = one["weight_versions"]
    return one | {"weight_versions": [span | {"version": str(int(span["version"]) - 1)} for span in spans]}


def switched(kind: str, to: str | None) -> Callable[[Servers], Spoilt]:
    """From the fifth request on another server answers, named by its role, or none."""
    return lambda servers: Spoilt(kind=kind, at=(5,), instead=None if to is None else getattr(servers, to))


NAN = last_row(lambda row: {key: one | {"logprob": float("nan")} for key, one in row.items()})
OTHER = r"has another model than at the start of the stage.*scores were not used.*the same command then continues"
BACK = r"with the weights of version \d, and the student is at version \d.*the same command then continues"
NOT_GIVEN = r"could not be given the student's weights: no room.*the same command then continues"
REFUSED = {"results": [{"error": "no room"}]}
RESTARTED = r"with the weights of version default, and the student is at version \d.*the same command then continues"
FAULTS = (
    Fault("teacher", "an answer later than `timeout_s`", late("scores"), late=True),
    Fault("teacher", "a body that is cut", spoil("scores", cut)),
    Fault("teacher", "a connection that is closed", spoil("scores", hung_up)),
    Fault("teacher", "status 500", spoil("scores", failed)),
    Fault("teacher", "status 503 with Retry-After", spoil("scores", busy)),
    Fault("teacher", "NaN", spoil("scores", NAN)),
    Fault("teacher", "a field is missing", spoil("scores", without("prompt_logprobs"))),
    Fault(
        "teacher", "scores of other tokens", spoil("scores", last_row(lambda row: {"3": {"logprob": -1.0, "rank": 1}}))
    ),
    Fault("teacher", "a body of 65 MiB", spoil("scores", huge)),
    Fault(
        "teacher",
        "an array of another shape",
        spoil("positions", array(lambda: np.zeros((2, 2), np.float32))),
        "student",
    ),
    Fault("teacher", "an array of Python objects", spoil("positions", array(lambda: np.array([None]))), "student"),
    Fault(
        "teacher",
        "an array with NaN",
        spoil("positions", array(lambda: np.full((8, 5), np.nan, np.float32))),
        "student",
    ),
    Fault("teacher", "no array", spoil("positions", without("prompt_token_id_logprobs")), "student"),
    Fault("teacher", "status 500 to the fixed sequence", spoil("control", failed, 4, 6)),
    Fault("teacher", "one of two servers is gone", switched("scores", None), two=True),
    Fault("teacher", "started again with another model", switched("scores", "fresh"), ends=OTHER),
    Fault("engine", "a response later than `timeout_s`", late("response"), late=True),
    Fault("engine", "a body that is cut", spoil("response", cut)),
    Fault("engine", "status 500", spoil("response", failed)),
    Fault("engine", "status 503 with Retry-After", spoil("response", busy)),
    Fault("engine", "NaN", spoil("response", last_token({"logprob": float("nan")}))),
    Fault("engine", "a field is missing", spoil("response", without("logprobs"))),
    Fault("engine", "no version of the weights", spoil("response", without("weight_versions"))),
    Fault("engine", "log-probs of other tokens", spoil("response", last_token({"token_id": 3}))),
    Fault(
        "engine", "`finish_reason: abort`", spoil("response", of_choice(lambda one: one | {"finish_reason": "abort"}))
    ),
    Fault("engine", "a body of 65 MiB", spoil("response", huge)),
    Fault("engine", "status 500 to an update", spoil("load", failed, 3, 5)),
    Fault("engine", "an update later than `timeout_s`", late("load", 3), late=True),
    Fault("engine", "a connection that is closed in an update", spoil("name", hung_up, 3, 5)),
    Fault("engine", "NaN in the proof of an update", spoil("control", NAN, 4)),
    Fault("engine", "one of two servers is gone", switched("response", None), two=True),
    Fault("engine", "one of two servers is gone for one update", spoil("load", hung_up, 3, 4, 5), two=True),
    Fault("engine", "one of two servers was started again", switched("response", "fresh"), two=True),
    Fault("engine", "status 500 to an adapter", spoil("load", failed, 3, 5), weights="lora"),
    Fault("engine", "a connection that is closed behind an adapter", spoil("load", hung_up, 3, 5), weights="lora"),
    Fault("engine", "one of two servers with adapters is gone", switched("response", None), two=True, weights="lora"),
    Fault("engine", "a body that is cut, one step ahead", spoil("response", cut), ahead=1),
    Fault("engine", "status 500 to an update, one step ahead", spoil("load", failed, 3, 5), ahead=1),
    Fault("engine", "one of two servers is gone, one step ahead", switched("response", None), two=True, ahead=1),
    Fault("engine", "started again", switched("response", "fresh"), ends=RESTARTED),
    Fault("engine", "refuses an update", spoil("load", lambda body: REFUSED, *range(3, 99)), ends=NOT_GIVEN),
    Fault("engine", "versions that run backwards", spoil("response", of_choice(backwards), *range(5, 99)), ends=BACK),
)


@dataclass(frozen=True, slots=True)
class Ended:
    """A run: rows of metrics by step, sums of the counts of `timings.jsonl`, the step of the last checkpoint, and the
    message that it ended with."""

    metrics: list[dict[str, float]]
    counts: dict[str, float]
    saved: int
    message: str = ""


def run(
    folder: Path,
    models: Path,
    kind: tuple[str, str, int],
    teachers: list[str],
    engines: list[str],
    timeout_s: float = 120.0,
) -> Ended:
    """`opd train` of a recipe with a served teacher and an engine, or its continuation, in this process.

    `kind`: what chooses the support, what the engine gets, and how many steps it is ahead.
    """
    by, weights, ahead = kind
    student = {"path": str(models / "student"), **({"lora": {"rank": 4}} if weights == "lora" else {})}
    limits = {"timeout_s": timeout_s, "patience_s": 60.0}
    made = one_stage(
        method="topk_reverse_kl",
        options={"k": 4, "by": by, "form": "tail"},
        steps=STEPS,
        sampling={"max_completion_length": 8},
        optimizer={"learning_rate": 3e-3},
        engine={"urls": engines, "weights": weights, **limits},
        ahead=ahead,
        data={"path": str(folder / "train.jsonl")},
    )
    served = {"server": {"urls": teachers, **limits}}
    prepare(
        folder,
        made
        | {
            "models": {"student": student, "teacher": served},
            "output_dir": str(folder / "run"),
        },
    )
    message = ""
    try:
        opd.run(str(folder / "recipe.yaml"), quiet=True)
    except OPDError as error:
        message = str(error)
    assert (folder / "run/distil/timings.jsonl").exists(), f"no step was made: {message}"
    rows, timings = (
        [json.loads(line) for line in (folder / "run/distil" / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "timings.jsonl")
    )
    counts = {
        name: sum(row[name] for row in timings) for name in timings[0] if name.startswith(("teacher_", "engine_"))
    }
    saved = max(int(one.name.removeprefix("step_")) for one in (folder / "run/distil/checkpoints").glob("step_*"))
    return Ended([row for row in rows if "train/loss" in row], counts, saved, message)


def outcome(fault: Fault, servers: Servers, models: Path, folder: Path) -> tuple[Ended, Ended | None]:
    """The run with the fault, and its continuation with good servers if the fault ended it."""
    as_new(servers.fresh)
    spoilt = fault.spoilt(servers)
    own, timeout_s = fault.side == "teacher", servers.late_s if fault.late else 120.0
    with (
        before(servers.teacher, spoilt if own else None) as teacher,
        before(servers.engine_of(fault.weights), None if own else spoilt) as engine,
    ):
        proxies: dict[str, Proxy] = {"teacher": teacher, "engine": engine}
        urls = {side: [proxy.url] for side, proxy in proxies.items()}
        if fault.two:
            urls[fault.side].append(servers.teacher if own else servers.engine_of(fault.weights))
        first = run(folder, models, fault.kind, urls["teacher"], urls["engine"], timeout_s)
        assert proxies[fault.side].spoiled, f"the fault was not met: {proxies[fault.side].seen}"
        if not first.message:
            return first, None
        proxies[fault.side].heal()
        return first, run(folder, models, fault.kind, urls["teacher"], urls["engine"], timeout_s)


def as_new(url: str) -> None:
    """Let a server call its weights what it calls them when it starts."""
    httpx2.post(f"{url}/update_weight_version", json={"new_version": "default"}, timeout=60.0).raise_for_status()


@contextlib.contextmanager
def models_in(folder: Path) -> Iterator[Path]:
    for name, seed in (("teacher", 1), ("student", 2)):
        saving.save(tiny("llama_tied", byte_tokenizer(), seed=seed, hidden=64, spread=0.15), folder / name)
    yield folder


@contextlib.contextmanager
def own_servers(models: Path, late_s: float = 2.0) -> Iterator[Servers]:
    """Four of the tests' own servers."""
    tokenizer = byte_tokenizer()
    engines = [
        Engine(lm=tiny("llama_tied", tokenizer, seed=seed, hidden=64, spread=0.15), longest=256)
        for seed in (1, 2, 2, 2)
    ]
    with running(*engines) as urls:
        yield Servers(*urls, late_s)


@contextlib.contextmanager
def real_servers(models: Path, late_s: float = 20.0) -> Iterator[Servers]:
    """Four servers of vLLM."""
    flags = ("--logprobs-mode", "processed_logprobs", "--worker-extension-cls", "opd.engines.worker.WeightLoader")
    lora = ("--logprobs-mode", "processed_logprobs", "--enable-lora", "--max-lora-rank", "8")
    chosen = {"teacher": (), "engine": flags, "fresh": flags, "adapters": lora}
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        urls: list[str] = []
        for role, more in chosen.items():
            model = "student" if more else "teacher"
            one = vllm(models / model, models / f"{role}.log", *more, by_position=not more)
            urls.append(stack.enter_context(one))
        yield Servers(*urls, late_s)


def clean(servers: Servers, models: Path, folder: Path, kinds: Collection[tuple[str, str, int]]) -> dict[Any, Ended]:
    """The runs without a fault, by kind."""
    return {
        kind: run(folder / "-".join(map(str, kind)), models, kind, [servers.teacher], [servers.engine_of(kind[1])])
        for kind in sorted(kinds)
    }


KINDS = {fault.kind for fault in FAULTS}


def check(fault: Fault, found: tuple[Ended, Ended | None], wanted: Ended) -> None:
    """The numbers are those of the run without the fault, nothing is lost, and the fault is counted or named."""
    first, again = found
    assert first.saved == len(first.metrics)
    assert bool(first.message) == bool(fault.ends), first.message
    assert re.search(fault.ends, first.message), first.message
    last = first if again is None else again
    assert not last.message, last.message
    assert [row["step"] for row in last.metrics] == list(range(1, STEPS + 1))
    for got, want in zip(last.metrics, wanted.metrics, strict=True):
        assert got == pytest.approx(want, abs=1e-6, nan_ok=True), (got, want)
    for ended in (first, last):
        assert ended.counts["teacher_failed"] == ended.counts["engine_failed"] == 0
    assert first.message or noticed(fault, first) > 0, first.counts


def noticed(fault: Fault, ended: Ended) -> float:
    """How often `timings.jsonl` counts the fault."""
    return sum(ended.counts[f"{fault.side}_{name}"] for name in ("repeated", "waits", "servers_lost"))


def row(fault: Fault, found: tuple[Ended, Ended | None]) -> str:
    """A row of the table."""
    first, again = found
    counts = [f"{first.counts[f'{fault.side}_{name}']:.0f}" for name in ("repeated", "waits", "servers_lost")]
    if again is None:
        last = f"{len(first.metrics)} of {STEPS} steps"
    else:
        more = len(again.metrics) - len(first.metrics)
        last = f"ends after step {len(first.metrics)}; the same command makes the {more} others"
    return f"| {fault.side} | {fault.name} | {' | '.join(counts)} | {last} |"


def main() -> None:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models = stack.enter_context(models_in(folder / "models"))
        servers = stack.enter_context((real_servers if PYTHON else own_servers)(models))
        wanted = clean(servers, models, folder / "clean", KINDS)
        print("| server of | fault | repeated | waits | left out | outcome |\n|---|---|---:|---:|---:|---|")
        for i, fault in enumerate(FAULTS):
            found = outcome(fault, servers, models, folder / str(i))
            check(fault, found, wanted[fault.kind])
            print(row(fault, found), flush=True)


if __name__ == "__main__":
    main()
