"""Teachers and responses from real vLLM servers on the loopback, against this process, in turns.

    python benchmarks/engines.py --vllm PYTHON [--quick] [--only engines | engine_steps]

PYTHON is an interpreter with vLLM for the CPU, as `make engines` builds it. Printed are ratios:

* scores: the teacher's top 64 of 8 responses of 128 tokens, SmolLM2-135M in float32, served / local;
* responses: 32 rows of 64 tokens of SmolLM2-135M, seconds of the library's sampler / seconds of the engine's;
* update, proof: waiting for the weights to be written, loaded and proved, and the proof alone, as shares of a step;
* ahead: seconds of a training step one step ahead / of one in order, trainer and engine on one thread each;
* bytes: 64 given tokens by position / the top 64 in JSON, received for the same responses;
* cache: seconds of 8 responses of one prompt (four times as long) by position, with the prompt's cache / without;
* pool: seconds with one of two servers dead / with both alive, on two servers that take a fixed time per request.

Scores by position run under Triton's interpreter here, on a model of 261 tokens: its seconds say something about the
work that the cache saves, and nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from common import HERE, THREADS, Record, measured, say, spread
from workload import SMOLLM2_NAME, causal_lm, language_model, prompts, tokenizer

sys.path.insert(0, str(HERE.parent / "tests"))
from support.engine_sampler import engine_sampler
from support.engines import Engine, running
from support.http_server import Arrived, Said
from support.models import byte_tokenizer, tiny
from support.vllm_server import vllm

import opd
from opd.engines.capabilities import control_ids, probe
from opd.engines.replicas import Replicas
from opd.engines.scoring import top_of
from opd.engines.server import Server
from opd.engines.sync import Sync
from opd.engines.vllm import completion_fields, parse_top
from opd.models import saving
from opd.models.language_model import LanguageModel
from opd.pieces.supports import sampled, top_k
from opd.recipe.schema import EngineSection, StageSpec
from opd.runs.served import engine_samplers
from opd.samplers.hf import TransformersSampler
from opd.samplers.vllm import EngineSampler
from opd.teachers.local import LocalTeacher
from opd.teachers.served import ServedTeacher
from opd.types import Prompt, Rollout, Sampling, ScoreRequest
from opd.types import Record as Recorded

K, ROUNDS = 64, 3
ROWS, TURNS = 4, 1  # of a training step; runs of each kind
GOALS = {"scores": 3.0, "bytes": 0.1, "cache": 0.5, "proof": 0.02, "ahead": 0.75, "pool": 2.2}  # at most
ENGINE_FLAGS = (
    *("--max-logprobs", str(K + 1), "--max-model-len", "1024", "--max-num-seqs", "64"),
    *("--logprobs-mode", "processed_logprobs", "--worker-extension-cls", "opd.engines.worker.WeightLoader"),
)


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(contestants: dict[str, Callable[[], Any]], rounds: int) -> Record:
    """Seconds of every contestant, after one call each to warm."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for work in contestants.values():
        work()
    for _ in range(rounds):
        for name, work in contestants.items():
            found[name].append(seconds(work))
    return {name: spread(values) for name, values in found.items()}


def served_by(url: str, lm: LanguageModel, request: ScoreRequest) -> ServedTeacher:
    replicas = Replicas(servers=(Server(url=url, timeout_s=600.0),))
    k, size = request.support.student_top_k, len(lm.tokenizer)
    able = probe(
        replicas,
        None,
        lm.tokenizer,
        by_position=k + 1 if k else 0,
        top=lambda by_ids: top_of(request, by_ids, size) or 0,
    )
    return ServedTeacher(
        name="teacher",
        replicas=replicas,
        capabilities=able,
        tokenizer=lm.tokenizer,
        template_options={},
        device=lm.device,
        max_failed=0.0,
    )


def of_smollm2(python: str, folder: Path, quick: bool) -> Record:
    """Scores, responses and updates of SmolLM2."""
    lm = language_model(causal_lm(SMOLLM2_NAME), tokenizer(), name=SMOLLM2_NAME)
    saving.save(lm, folder / "smollm2")
    rows, tokens = (4, 8) if quick else (32, 64)
    written = prompts(rows, 32, lm.tokenizer)
    with vllm(
        folder / "smollm2", folder / "log", *ENGINE_FLAGS, by_position=False, python=python, threads=THREADS
    ) as url:
        section = EngineSection(urls=[url], timeout_s=600.0)
        engine = engine_sampler(lm, folder / "weights", section, max_completion_length=tokens, n=1)
        engine.sync(0)
        own = TransformersSampler(lm=lm, sampling=Sampling(max_completion_length=tokens))
        responses = in_turns(
            {"engine": lambda: engine(written, seed=(0, 0)), "opd": lambda: own(written, seed=(0, 0))}, ROUNDS
        )
        longer = TransformersSampler(lm=lm, sampling=Sampling(max_completion_length=2 * tokens))
        rollouts = longer(written[:8], seed=(0, 1))
        request = ScoreRequest(support=top_k(K, by="teacher"))
        far = served_by(url, lm, request)
        near = LocalTeacher(lm=lm, micro_batch_tokens=4096, student_device=lm.device)
        contexts = [one.prompt for one in rollouts]
        scores = in_turns(
            {
                "served": lambda: far.score(rollouts, contexts, request),
                "local": lambda: near.score(rollouts, contexts, request),
            },
            ROUNDS,
        )
    return {"responses": responses, "scores": scores}


def proved(engine: EngineSampler) -> None:
    """The work of one proof: the servers and the student score a fixed sequence."""
    sync = engine.update
    assert isinstance(sync, Sync)
    ids = control_ids(sync.vocabulary)
    fields = completion_fields(sync.model, ids, 0)
    engine.replicas.each(lambda one: one.post("v1/completions", fields, parse_top(ids, 1, 0)))
    sync.logp(ids, 1.0)


def of_steps(python: str, folder: Path, quick: bool) -> Record:
    """Steps of SmolLM2, taught by a neighbour, in order and one step ahead. In turns, one thread each."""
    steps, tokens = (2, 8) if quick else (6, 256)  # long responses: about half of a step
    texts = [{"prompt": one.content} for one in prompts(ROWS, 16, tokenizer())]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in texts))
    teacher = language_model(causal_lm(SMOLLM2_NAME), tokenizer(), name="teacher")
    with torch.no_grad():
        for weight in teacher.model.parameters():
            weight.mul_(1.01)
    saving.save(teacher, folder / "teacher")
    student = language_model(causal_lm(SMOLLM2_NAME), tokenizer(), name="student")
    saving.save(student, folder / "smollm2")
    found: dict[str, list[Record]] = {"in order": [], "ahead": []}
    torch.set_num_threads(1)
    cores = os.sched_getaffinity(0)
    try:
        with vllm(folder / "smollm2", folder / "log3", *ENGINE_FLAGS, by_position=False, python=python) as url:
            os.sched_setaffinity(0, {max(cores)})  # the server, which has started, binds the first: one core each
            for turn in range(TURNS):
                for name, rows in found.items():
                    made = steps_recipe(folder, url, f"{name.split()[-1]}{turn}", steps, tokens, name == "ahead")
                    opd.run(made, quiet=True)
                    timings = (Path(made["output_dir"]) / "distil" / "timings.jsonl").read_text().splitlines()
                    # The first step of a run checks the server's mode; the last one has none to write ahead.
                    rows += [json.loads(line) for line in timings[1:-1] or timings]
            stage = StageSpec.model_validate(steps_recipe(folder, url, "proof", 1, tokens, False)["stages"][0])
            assert stage.engine is not None
            engine = engine_samplers(stage, stage.engine, student, folder)[None]
            engine.sync(0)
            proof = spread([seconds(lambda: proved(engine)) for _ in range(ROUNDS)])
    finally:
        torch.set_num_threads(THREADS)
        os.sched_setaffinity(0, cores)
    parts = ("sync", "generate", "score", "train", "total", "engine_waited_s")
    made: Record = {
        name: {part: spread([row[part] for row in rows]) for part in parts if part in rows[0]}
        for name, rows in found.items()
    }
    return made | {"proof": proof}


def steps_recipe(folder: Path, url: str, name: str, steps: int, tokens: int, ahead: bool) -> Record:
    stage = {
        "name": "distil",
        "train": "student",
        "teacher": "teacher",
        "method": "topk_reverse_kl",
        "options": {"k": 16, "by": "teacher", "form": "tail"},
        "data": {"path": str(folder / "prompts.jsonl")},
        "steps": steps,
        "prompts_per_step": ROWS,
        "sampling": {"max_completion_length": tokens, "temperature": 1.0},
        "optimizer": {"learning_rate": 1e-6},
        "engine": {"urls": [url], "timeout_s": 600},
        "ahead": int(ahead),
        "checkpoint": {"every": 1000, "every_minutes": 1000},
        "samples_every": 0,
    }
    return {
        "name": name,
        "output_dir": str(folder / name),
        "models": {"student": {"path": str(folder / "smollm2")}, "teacher": {"path": str(folder / "teacher")}},
        "stages": [stage],
    }


def of_positions(python: str, folder: Path, quick: bool) -> Record:
    """Bytes and the prompt's cache of scores by position."""
    # Enough layers that reading a prompt costs more than the interpreter's work for a token.
    settings: Record = {"hidden": 512, "layers": 12, "num_attention_heads": 8, "spread": 0.05}
    settings["max_position_embeddings"] = 512
    lm = tiny("llama", byte_tokenizer(), seed=1, name="teacher", **settings)
    saving.save(lm, folder / "tiny")
    tokens = 8 if quick else 96
    sampler = TransformersSampler(lm=lm, sampling=Sampling(max_completion_length=tokens, n=8))
    numbers = iter(range(10**6))

    def fresh() -> tuple[list[Rollout], list[Prompt]]:
        """Responses to a prompt of which no server has a token in its cache."""
        number = next(numbers)
        prompt = Prompt(
            id=0, content=(f"{number} is a prompt that is long " * 40)[: 4 * tokens + 8]
        )  # not whole blocks of the cache
        rollouts = sampler([prompt], seed=(0, number), record=Recorded(top_k=K))
        return rollouts, [prompt] * len(rollouts)

    flags = ("--max-logprobs", str(K + 1), "--max-model-len", "512")
    with vllm(folder / "tiny", folder / "log2", *flags, python=python, threads=THREADS) as url:
        by_position, top = (ScoreRequest(support=top_k(K, by=by)) for by in ("student", "teacher"))
        positions, listed = served_by(url, lm, by_position), served_by(url, lm, top)
        received: Record = {}
        rollouts, contexts = fresh()
        for name, teacher, request in (("by position", positions, by_position), ("JSON", listed, top)):
            teacher.pop_requests()
            teacher.score(rollouts, contexts, request)
            received[name] = teacher.pop_requests()["received_mb"]
        rows = {name: [fresh() for _ in range(1 + ROUNDS)] for name in ("with", "without")}
        cache = in_turns(
            {
                "with": lambda: positions.score(*rows["with"].pop(), by_position),
                "without": lambda: uncached(positions, *rows["without"].pop(), by_position),
            },
            ROUNDS,
        )
    return {"bytes": received, "cache": cache, "tokens": sum(len(one.response_ids) for one in rollouts)}


def uncached(
    teacher: ServedTeacher, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], request: ScoreRequest
) -> None:
    """The same scores, with every prompt read again."""
    import opd.teachers.served as module

    fields = module.positions_fields
    module.positions_fields = lambda *args, cached: fields(*args, cached=False)
    try:
        teacher.score(rollouts, contexts, request)
    finally:
        module.positions_fields = fields


def of_pool(quick: bool) -> Record:
    """Two servers that take a fixed time per request and serve one request at a time, and one of them dead."""
    import threading

    wait = 0.02
    lm = tiny("llama", byte_tokenizer(), seed=1, name="teacher")

    def slow() -> Callable[[Arrived, Said], Said]:
        one = threading.Lock()

        def fault(arrived: Arrived, said: Said) -> Said:
            with one:
                time.sleep(wait)
            return said

        return fault

    sampler = TransformersSampler(lm=lm, sampling=Sampling(max_completion_length=8))
    count = 8 if quick else 200
    written = [Prompt(id=i, content=f"prompt {i}") for i in range(count)]
    rollouts, request = sampler(written, seed=(0, 0)), ScoreRequest(support=sampled())
    found: Record = {}
    with ExitStack() as stack:
        a, b = Engine(lm=lm), Engine(lm=lm)
        for one in (a, b):
            one.fault = slow()
        urls = stack.enter_context(running(a, b))
        dead = stack.enter_context(ExitStack())
        (gone,) = dead.enter_context(running(Engine(lm=lm)))
        dead.close()
        both = served_by(urls[0], lm, request)
        for name, addresses in (("alive", urls), ("one dead", [urls[0], gone])):
            replicas = Replicas(
                servers=tuple(Server(url=url, timeout_s=60.0) for url in addresses), tokens_in_flight=64
            )
            both.replicas = replicas
            both.score(rollouts, written, request)
            found[name] = spread([seconds(lambda: both.score(rollouts, written, request)) for _ in range(ROUNDS)])
    return found


def of(found: Record, group: str, above: str, below: str) -> float:
    return found[group][above]["median"] / found[group][below]["median"]


def parts_record(given: argparse.Namespace, folder: Path) -> Record:
    """The first benchmark: scores, responses, bytes, the prompt's cache, two servers."""
    found = {"pool": of_pool(given.quick), **of_positions(given.vllm, folder, given.quick)}
    found |= of_smollm2(given.vllm, folder, given.quick)
    ratios = {
        "scores": of(found, "scores", "served", "local"),
        "responses": of(found, "responses", "opd", "engine"),
        "bytes": found["bytes"]["by position"] / found["bytes"]["JSON"],
        "cache": of(found, "cache", "with", "without"),
        "pool": of(found, "pool", "one dead", "alive"),
    }
    return {**found, "ratios": ratios}


def steps_record(given: argparse.Namespace, folder: Path) -> Record:
    """The second benchmark: whole steps with an engine."""
    found = of_steps(given.vllm, folder, given.quick)
    step = found["in order"]["total"]["median"]
    ratios = {
        "generation": found["in order"]["generate"]["median"] / step,
        "ahead": found["ahead"]["total"]["median"] / step,
        "update": found["in order"]["sync"]["median"] / step,
        "proof": found["proof"]["median"] / step,
    }
    return {**found, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vllm", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=["engines", "engine_steps"])
    given = parser.parse_args()
    for name, make in (("engines", parts_record), ("engine_steps", steps_record)):
        if given.only in (None, name):
            with measured(name, given.quick) as record, tempfile.TemporaryDirectory() as scratch:
                record |= make(given, Path(scratch))
                for one, value in record["ratios"].items():
                    say(f"{one}: {value:.3g}" + (f" (goal: at most {GOALS[one]:g})" if one in GOALS else ""))


if __name__ == "__main__":
    main()
