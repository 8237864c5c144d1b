"""Tokens per second of sampling, against `generate()` of transformers and, if available, vLLM on the CPU.

    python benchmarks/generate.py [--quick] [--vllm PYTHON]

1, 8 and 32 prompts of 32 tokens on a Llama of 5M parameters with random weights, and on SmolLM2-135M; float32,
temperature 1, top-p 1 and (8 prompts) 0.95. Every contestant gets the same token ids. All responses have the same
length: stop tokens are off on every side. A round is one call; the rate is rows x new tokens / seconds of the call,
which includes the prompt's prefill and, for opd, the log-probs of the sampled tokens. The points of SmolLM2 with 8 and
32 rows are also run with one thread.

* `opd`: `TransformersSampler`, which every training step uses;
* `generate`: `model.generate(do_sample=True, top_k=0)`, with its default cache;
* `generate_static`: the same with `cache_implementation="static"`, for 8 and 32 rows. transformers compiles the decode
  step of a static cache on a GPU only, so here it runs eagerly;
* `vllm`: vLLM for the CPU under the interpreter PYTHON, in float32, with its defaults but for memory (vllm_side.py).
  Its engine lives as long as the points of one model and takes turns like the others.

With top-p the shape of the distribution matters: a set of few tokens is found faster than one of nearly all. The models
are `peaked` (about as sure of the next token as SmolLM2; see workload.py), and the 5M model is also measured `flat`, as
initialised: the worst case for a partial sort, the same work for a full one.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from common import HERE, THREADS, Record, Worker, measured, say, serve, spread, take_turns, timed, workers
from workload import SMOLLM2_NAME, causal_lm, language_model, prompts, tokenizer

from opd.samplers.hf import TransformersSampler
from opd.types import Sampling

PROMPT_TOKENS = 32
ROWS = (1, 8, 32)
NEW_TOKENS = {"5M": 64, SMOLLM2_NAME: 32}
ROUNDS = 2
CONTESTANTS = ("opd", "generate", "generate_static")
VLLM = str(HERE / "vllm_side.py")
Key = tuple[str, bool]  # size, peaked


def points(quick: bool) -> list[Record]:
    """Size, rows, top-p, new tokens and threads of every measurement; the points of one model follow one another."""
    if quick:
        return [point("5M", 2, 1.0, 8), point("5M", 2, 0.95, 8, threads=1)]
    out: list[Record] = []
    for size, new_tokens in NEW_TOKENS.items():
        for rows in ROWS:
            out += [point(size, rows, top_p, new_tokens) for top_p in ((1.0, 0.95) if rows == 8 else (1.0,))]
    out += [point(SMOLLM2_NAME, rows, 1.0, NEW_TOKENS[SMOLLM2_NAME], threads=1) for rows in (8, 32)]
    return [*out, point("5M", 8, 0.95, NEW_TOKENS["5M"], peaked=False)]


def point(size: str, rows: int, top_p: float, new_tokens: int, threads: int = THREADS, peaked: bool = True) -> Record:
    given = {"size": size, "rows": rows, "top_p": top_p, "new_tokens": new_tokens}
    return {**given, "threads": threads, "peaked": peaked}


def request(point: Record, tok: Any) -> Record:
    """The point with its prompts as token ids, the same for every contestant."""
    return {
        **point,
        "prompts": [tok(prompt.content).input_ids for prompt in prompts(point["rows"], PROMPT_TOKENS, tok)],
    }


def worker(name: str) -> None:
    tok = tokenizer()
    lms: dict[tuple[str, bool], Any] = {}

    def work(point: Record) -> Record:
        key = (point["size"], point["peaked"])
        if key not in lms:
            lms.clear()  # one model at a time: points come sorted by size
            lms[key] = language_model(causal_lm(key[0], peaked=key[1]), tok)
            measure(name, lms[key], {**point, "new_tokens": 4})  # warm
        return measure(name, lms[key], point)

    serve(work)


def measure(name: str, lm: Any, point: Record) -> Record:
    ids = point["prompts"]
    out: Record = {}
    if name == "opd":
        step_prompts = prompts(point["rows"], PROMPT_TOKENS, lm.tokenizer)
        sampling = Sampling(max_completion_length=point["new_tokens"], top_p=point["top_p"])
        with timed(out, "seconds"):
            rollouts = TransformersSampler(lm=lm, sampling=sampling)(step_prompts, seed=(0, 0))
        lengths = {len(rollout.response_ids) for rollout in rollouts}
        read = [list(rollout.prompt_ids) for rollout in rollouts]
    else:
        given = torch.tensor(ids)
        lm.model.generation_config.eos_token_id = None
        with timed(out, "seconds"), torch.no_grad():
            written = lm.model.generate(
                given,
                attention_mask=torch.ones_like(given),
                do_sample=True,
                temperature=1.0,
                top_p=point["top_p"],
                top_k=0,
                max_new_tokens=point["new_tokens"],
                pad_token_id=lm.tokenizer.pad_token_id,
                cache_implementation="static" if name == "generate_static" else None,
            )
        lengths, read = {written.shape[1] - PROMPT_TOKENS}, written[:, :PROMPT_TOKENS].tolist()
    assert lengths == {point["new_tokens"]}, f"{name} wrote responses of {lengths} tokens, not {point['new_tokens']}"
    assert read == ids, f"{name} read other prompts"
    return out


@contextmanager
def vllm_engine(python: str | None, key: Key, folder: Path) -> Iterator[dict[str, Worker]]:
    """vLLM's worker for one model, by name; none, with a printed reason, if there is no interpreter or it fails."""
    with ExitStack() as stack:
        started: dict[str, Worker] = {}
        if python is not None:
            tok, model = tokenizer(), folder / f"{key[0]}-{key[1]}"
            causal_lm(key[0], peaked=key[1]).save_pretrained(model)
            tok.save_pretrained(model)
            try:
                started = stack.enter_context(workers(VLLM, ["vllm"], str(model), interpreter=python))
            except RuntimeError as error:
                say(f"vllm skipped at {key[0]}: {str(error).strip().splitlines()[-1]}")
        yield started


def row_of(name: str, point: Record, answers: list[Record]) -> Record:
    rate = [point["rows"] * point["new_tokens"] / a["seconds"] for a in answers]
    return {
        "name": name,
        **point,
        "tokens_per_second": spread(rate),
        "cpu": spread([a["seconds_cpu"] for a in answers]),
    }


def run_point(started: dict[str, Worker], engine: dict[str, Worker], point: Record) -> list[Record]:
    """One row per contestant."""
    able = {name: worker for name, worker in started.items() if point["rows"] > 1 or name != "generate_static"}
    if point["threads"] == THREADS:  # vLLM binds its threads when it starts
        able |= engine
    answers = take_turns(able, request(point, tokenizer()), ROUNDS)
    return [row_of(name, point, mine) for name, mine in answers.items()]


def run_model(started: dict[str, Worker], python: str | None, key: Key, its_points: list[Record]) -> list[Record]:
    """The rows of one model's points."""
    rows: list[Record] = []
    with tempfile.TemporaryDirectory() as folder, vllm_engine(python, key, Path(folder)) as engine:
        for point in its_points:
            new = run_point(started, engine, point)
            rows += new
            rates = ", ".join(f"{row['name']} {row['tokens_per_second']['median']:.0f}" for row in new)
            kind = f"{point['size']}{'' if point['peaked'] else ' (flat)'}"
            count = f"rows {point['rows']:2} top-p {point['top_p']} threads {point['threads']}"
            say(f"{kind:12} {count}: {rates} tokens/s")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vLLM for the CPU")
    parser.add_argument("--quick", action="store_true", help="one small model, to try the code")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    if options.vllm is None:
        say("vllm skipped: no --vllm PYTHON, an interpreter that has it")
    with measured("generate", options.quick) as result:
        result["vllm"] = options.vllm is not None
        result["rows"] = []
        with workers(__file__, CONTESTANTS) as started:
            for key, its_points in groupby(points(options.quick), key=lambda point: (point["size"], point["peaked"])):
                result["rows"] += run_model(started, options.vllm, key, list(its_points))


if __name__ == "__main__":
    main()
