"""A decode step by the kind of its cache: the sampler's decoder, and a static cache, on a GPU in a CUDA graph too.

    python benchmarks/decode.py [--quick]

64 rows read prompts of 128 tokens and then 64 tokens one by one; on a GPU with the 1.7B model in bfloat16, on a CPU
with the 5M model. A turn is the 64 tokens of one contestant; the first turn of each warms up and compiles. The output
layer is part of a step, the choice of a token is not.

* `opd`: `models/decoding.py`, which the sampler uses: a cache that grows in memory made ahead;
* `static`: transformers' `StaticCache`, one forward per token;
* `static_graph`: the same, its forward through `torch.compile(mode="reduce-overhead")`, which records a CUDA graph. On
  a GPU only.

All give the same states: the largest difference of the last logits is in the result.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from common import DEVICE, ON_GPU, Record, measured, say, spread, wait_for_device
from torch import Tensor
from transformers import StaticCache
from workload import causal_lm, language_model, tokenizer

from opd.models.decoding import begin
from opd.models.language_model import LanguageModel

SIZE = "1.7B" if ON_GPU else "5M"
ROWS, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 64, 128, 64, 3
QUICK: Record = {"SIZE": "5M", "ROWS": 2, "PROMPT_TOKENS": 8, "NEW_TOKENS": 4, "ROUNDS": 1}
TOLERANCE = 0.25 if ON_GPU else 1e-3  # of logits, in bfloat16 and float32

Turn = Callable[[Tensor], tuple[list[float], Tensor]]  # ids [rows, all tokens] -> seconds per token, the last logits


def decode_opd(lm: LanguageModel, ids: Tensor) -> tuple[list[float], Tensor]:
    head = lm.head()
    decoder = begin(lm, ids[:, :PROMPT_TOKENS].tolist(), more=NEW_TOKENS)

    def step(token: Tensor) -> Tensor:
        decoder.read(token)
        return head.logits(decoder.hidden)

    return timed_steps(step, ids)


def decode_static(lm: LanguageModel, forward: Callable[..., Any], ids: Tensor) -> tuple[list[float], Tensor]:
    head, model = lm.head(), lm.causal_lm
    cache = StaticCache(config=model.config, max_cache_len=PROMPT_TOKENS + NEW_TOKENS)
    model.model(input_ids=ids[:, :PROMPT_TOKENS], past_key_values=cache, use_cache=True)

    def step(token: Tensor) -> Tensor:
        states = forward(input_ids=token, past_key_values=cache, use_cache=True).last_hidden_state
        return head.logits(states[:, -1])

    return timed_steps(step, ids)


def timed_steps(step: Callable[[Tensor], Tensor], ids: Tensor) -> tuple[list[float], Tensor]:
    seconds: list[float] = []
    logits = torch.empty(0)
    for t in range(PROMPT_TOKENS, PROMPT_TOKENS + NEW_TOKENS):
        wait_for_device()
        started = time.perf_counter()
        logits = step(ids[:, t : t + 1].clone())
        wait_for_device()
        seconds.append(time.perf_counter() - started)
    return seconds, logits.clone()


def contestants(lm: LanguageModel) -> dict[str, Turn]:
    forward = lm.causal_lm.model
    found: dict[str, Turn] = {
        "opd": lambda ids: decode_opd(lm, ids),
        "static": lambda ids: decode_static(lm, forward, ids),
    }
    if ON_GPU:
        graph = torch.compile(forward, mode="reduce-overhead", fullgraph=True)
        found["static_graph"] = lambda ids: decode_static(lm, graph, ids)
    return found


@torch.inference_mode()
def race(lm: LanguageModel) -> Record:
    """Milliseconds per token of each contestant, and the largest difference of its last logits to opd's."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.vocabulary, (ROWS, PROMPT_TOKENS + NEW_TOKENS), generator=generator).to(DEVICE)
    turns, last = contestants(lm), dict[str, Tensor]()
    times: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(ROUNDS + 1):
        for name, turn in turns.items():
            seconds, last[name] = turn(ids)
            times[name] += seconds if number else []
    rows = {
        name: {
            "milliseconds": spread([1e3 * value for value in seconds]),
            "difference": (last[name] - last["opd"]).abs().max().item(),
        }
        for name, seconds in times.items()
    }
    for name, row in rows.items():
        assert row["difference"] <= TOLERANCE, f"{name} gives other logits than opd: {row['difference']:.2e}"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the code")
    quick = parser.parse_args().quick
    if quick:
        globals().update(QUICK)
    with measured("decode", quick) as result:
        model = causal_lm(SIZE, seed=1, device=DEVICE)
        lm = language_model(model.bfloat16() if ON_GPU else model, tokenizer())
        result["rows"] = race(lm)
        for name, row in result["rows"].items():
            say(f"{SIZE}, {ROWS} rows, {name:14} {row['milliseconds']['median']:.2f} ms per token")
        if not ON_GPU:
            say("static_graph skipped: it needs a GPU")


if __name__ == "__main__":
    main()
