"""Tokens per second of sampling, against `generate()` of transformers and, if available, vLLM on the CPU.

    python benchmarks/generate.py [--vllm PYTHON]

1, 8 and 32 prompts of 32 tokens on Llamas of 1M, 5M and 26M parameters with random weights, and on SmolLM2-135M;
float32, temperature 1, top-p 1 and (8 and 32 prompts) 0.95. All responses have the same length: stop tokens are off on
every side. A round is one call; the rate is rows x new tokens / seconds of the call, which includes the prompt's
prefill and, for opd, the log-probs of the sampled tokens.

* `opd`: `TransformersSampler`, which every training step uses;
* `generate`: `model.generate(do_sample=True, top_k=0)`, with its default cache;
* `vllm`: vLLM for the CPU under the interpreter PYTHON, with its defaults, in float32.

With top-p the shape of the distribution matters: a set of few tokens is found faster than one of nearly all. The models
are `peaked` (about as sure of the next token as SmolLM2; see workload.py), and the 5M model is also measured `flat`, as
initialised: the worst case for a partial sort, the same work for a full one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import HERE, Record, Worker, measured, say, serve, spread, take_turns, timed, workers
from workload import SMOLLM2_NAME, causal_lm, language_model, prompts, tokenizer

from opd.samplers.hf import TransformersSampler
from opd.types import Sampling

PROMPT_TOKENS = 32
ROWS = (1, 8, 32)
NEW_TOKENS = {"1M": 64, "5M": 128, "26M": 32, SMOLLM2_NAME: 16}
ROUNDS = 2
CONTESTANTS = ("opd", "generate")


def points() -> list[Record]:
    """Size, rows, top-p and new tokens of every measurement."""
    out: list[Record] = []
    for size, new_tokens in NEW_TOKENS.items():
        for rows in ROWS:
            for top_p in (1.0,) if rows == 1 else (1.0, 0.95):
                out.append({"size": size, "rows": rows, "top_p": top_p, "new_tokens": new_tokens, "peaked": True})
    out.append({"size": "5M", "rows": 8, "top_p": 0.95, "new_tokens": 128, "peaked": False})
    return out


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
    step_prompts = prompts(point["rows"], PROMPT_TOKENS, lm.tokenizer)
    out: Record = {}
    if name == "opd":
        sampling = Sampling(max_completion_length=point["new_tokens"], top_p=point["top_p"])
        with timed(out, "seconds"):
            rollouts = TransformersSampler(lm=lm, sampling=sampling)(step_prompts, seed=(0, 0))
        lengths = {len(rollout.response_ids) for rollout in rollouts}
    else:
        ids = torch.tensor(lm.tokenizer([prompt.content for prompt in step_prompts]).input_ids)
        lm.model.generation_config.eos_token_id = None
        with timed(out, "seconds"), torch.no_grad():
            written = lm.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_p=point["top_p"],
                top_k=0,
                max_new_tokens=point["new_tokens"],
                pad_token_id=lm.tokenizer.pad_token_id,
            )
        lengths = {written.shape[1] - PROMPT_TOKENS}
    assert lengths == {point["new_tokens"]}, f"{name} wrote responses of {lengths} tokens, not {point['new_tokens']}"
    return out


def vllm_answers(python: str, point: Record, folder: Path) -> list[Record]:
    """The same calls by vLLM in a new engine; [] and a printed reason if it cannot run the model."""
    tok = tokenizer()
    model = folder / f"{point['size']}-{point['peaked']}"
    if not model.exists():
        causal_lm(point["size"], peaked=point["peaked"]).save_pretrained(model)
        tok.save_pretrained(model)
    step_prompts = [tok(prompt.content).input_ids for prompt in prompts(point["rows"], PROMPT_TOKENS, tok)]
    request = {**point, "model": str(model), "prompts": step_prompts, "rounds": ROUNDS}
    command = [python, str(HERE / "vllm_side.py"), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        say(f"vllm skipped at {point}: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}")
        return []
    return json.loads(done.stdout.strip().splitlines()[-1])


def row_of(name: str, point: Record, answers: list[Record]) -> Record:
    rate = [point["rows"] * point["new_tokens"] / a["seconds"] for a in answers]
    return {"name": name, **point, "tokens_per_second": spread(rate)}


def run_point(started: dict[str, Worker], point: Record, python: str | None, folder: Path) -> list[Record]:
    answers = take_turns(started, point, ROUNDS)
    if python is not None and (vllm := vllm_answers(python, point, folder)):
        answers["vllm"] = vllm
    return [row_of(name, point, mine) for name, mine in answers.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vLLM for the CPU")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    if options.vllm is None:
        say("vllm skipped: no --vllm PYTHON, an interpreter that has it")
    with measured("generate") as result, tempfile.TemporaryDirectory() as folder:
        result["vllm"] = options.vllm is not None
        result["rows"] = []
        with workers(__file__, CONTESTANTS) as started:
            for point in points():
                rows = run_point(started, point, options.vllm, Path(folder))
                result["rows"] += rows
                rates = ", ".join(f"{row['name']} {row['tokens_per_second']['median']:.0f}" for row in rows)
                kind = "" if point["peaked"] else " (flat)"
                say(f"{point['size']:12}{kind} rows {point['rows']:2} top-p {point['top_p']}: {rates} tokens/s")


if __name__ == "__main__":
    main()
