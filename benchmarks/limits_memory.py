"""Memory of a training step by part against each part's floor, the optimiser's time, and the error of bfloat16.

`benchmarks/limits.py` runs this file as a worker, in a process of its own, so that resident memory is that of the step.

The student has SmolLM2's shapes (135M, V = 49,152) in float32; the teacher is the student's own model, without
gradient. 8 prompts of 32 tokens, 64 new tokens each, reverse KL on the whole vocabulary. A part's bytes are the growth
of the highest resident size while the part is made:

* `weights`, `gradients`, `moments`: floor 4, 4 and 8 bytes per parameter. `weights` and `gradients` are what stays when
  they are made, `moments` the peak of clip and AdamW's first step;
* `KV cache`: the sampling call, without the next copy; floor: keys and values of all positions;
* `prepacked weights`: the sampler's copy for faster products (samplers/prepack.py). The floor is 0: it buys time;
* `activations`: the student's forward with gradient; floor: what autograd keeps in a plain forward of the same rows;
* `logits chunks`: the loss without a gradient of the head; floor: 2^22 entries of either model, the smallest chunk at
  which the products keep their speed;
* `head gradient`: what the head's gradient adds to that; floor [V, H];
* `whole step`: the second step, everything above. Floor: weights, moments and gradients, and the larger of KV cache and
  activations with logits chunks.

`optimiser`: seconds of opd's clip and step, and of the same with AdamW as a loop over tensors
(`fused=False, foreach=False`), in turns. `bfloat16`: mean error in nats of a random token's log-prob with bfloat16
weights and states, V = 49,152, H = 576, 512 rows, against the float32 product of the same numbers; and seconds of the
output layer, of opd and of a bfloat16 product that is then cast.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import opd_side
import torch
from common import GIB, PeakMemory, Record, resident, serve, spread, timed
from torch import Tensor, nn
from workload import causal_lm, language_model, prompts, tokenizer

from opd.loss.collate import MicroBatch, split
from opd.loss.step import PhaseA, scored
from opd.loss.token_loss import hidden_of, loss_at
from opd.methods.reverse_kl import reverse_kl
from opd.models.head import Head
from opd.models.language_model import LanguageModel
from opd.samplers.prepack import prepacked
from opd.types import Prompt, Rollout, Sampling

STUDENT = "135M"
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 32, 64
LOGITS_FLOOR = 2**22  # entries of one model's chunk
ROUNDS = 3
BFLOAT16 = (49_152, 512, 576)  # V, N, H
QUICK: Record = {"STUDENT": "5M", "PROMPTS": 2, "NEW_TOKENS": 8, "ROUNDS": 1, "BFLOAT16": (4096, 64, 64)}


def part(name: str, size: int, floor: int) -> Record:
    return {"part": name, "bytes": size, "floor": floor, "ratio": size / floor if floor else None}


def line(row: Record) -> str:
    """A row as text."""
    of = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
    return f"{row['part']:18} {row['bytes'] / GIB:.3f} GiB, floor {row['floor'] / GIB:.3f} GiB, ratio {of}"


def growth(make: Callable[[], Any]) -> tuple[Any, int]:
    """What `make` returns, and the growth of the highest resident size meanwhile."""
    memory = PeakMemory()
    made = make()
    return made, memory.above_start()


def memory_by_part(student: str) -> list[Record]:
    """The parts of a step, in the order in which they are made."""
    base = resident()
    tok = tokenizer()
    model = causal_lm(student, seed=1)
    weights = resident() - base  # what stays: the making of random weights is no part of a run
    count = sum(p.numel() for p in model.parameters())
    lm = language_model(model, tok)
    mine = opd_side.side(reverse_kl(), lm, lm, Sampling(max_completion_length=NEW_TOKENS))
    step_prompts = prompts(PROMPTS, PROMPT_TOKENS, tok)
    rows = [part("weights", weights, 4 * count)]
    rollouts = generated(mine, step_prompts, rows)
    rows += training_rows(mine, rollouts)
    before = resident()
    opd_side.training_part(mine, rollouts, {})
    rows.append(part("gradients", resident() - before, 4 * count))
    _, moments = growth(lambda: (mine.optimiser.clip(), mine.optimiser.step()))
    rows.append(part("moments", moments, 8 * count))
    memory = PeakMemory()
    opd_side.step(mine, step_prompts, (0, 1))
    floor = {row["part"]: row["floor"] for row in rows}
    training = floor["activations"] + floor["logits chunks"]
    whole = floor["weights"] + floor["gradients"] + floor["moments"] + max(floor["KV cache"], training)
    return [*rows, part("whole step", memory.start - base + memory.above_start(), whole)]


def generated(mine: opd_side.Side, step_prompts: list[Prompt], rows: list[Record]) -> list[Rollout]:
    """The step's rollouts; appends the rows of the cache and of the prepacked weights."""
    config = mine.student.model.config
    with torch.inference_mode():
        memory = PeakMemory()
        with prepacked(mine.student):
            copies = memory.above_start()
    rollouts, whole = growth(lambda: mine.sampler(step_prompts, seed=(0, 0)))
    entries = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    floor = 2 * 4 * PROMPTS * (PROMPT_TOKENS + NEW_TOKENS) * entries
    rows += [part("prepacked weights", copies, 0), part("KV cache", max(0, whole - copies), floor)]
    return rollouts


def training_rows(mine: opd_side.Side, rollouts: list[Rollout]) -> list[Record]:
    """Activations, logits chunks and the head's gradient, of one micro-batch with all rows."""
    lm, method = mine.student, mine.method
    contexts = method.context(rollouts)
    phase_a = scored(method, mine.teacher, rollouts, contexts, method.request(), lm.device)
    (micro,) = split(lm, phase_a.batch, phase_a.denominator, opd_side.MICRO_BATCH_TOKENS)
    lm.model.train()
    hidden, activations = growth(lambda: hidden_of(lm, micro))
    states = hidden.detach()
    del hidden
    kept = kept_by_autograd(lm, rollouts)
    lm.model.eval()
    head = lm.head().detached()
    _, logits = growth(lambda: loss_and_backward(mine, states, head, micro, phase_a))
    trained = replace(head, weight=head.weight.clone().requires_grad_())
    _, both = growth(lambda: loss_and_backward(mine, states, trained, micro, phase_a))
    return [
        part("activations", activations, kept),
        part("logits chunks", logits, 2 * 4 * LOGITS_FLOOR),
        part("head gradient", both - logits, 4 * head.weight.numel()),
    ]


def loss_and_backward(mine: opd_side.Side, states: Tensor, head: Head, micro: MicroBatch, phase_a: PhaseA) -> None:
    states = states.clone().requires_grad_()
    loss, _ = loss_at(mine.method, states, head, micro, phase_a.count, mine.student.head().detached())
    loss.backward()


def kept_by_autograd(lm: LanguageModel, rollouts: list[Rollout]) -> int:
    """Bytes of the tensors that autograd keeps for the backward of a plain forward, each once, without the weights."""
    ids = torch.tensor([[*r.prompt_ids, *r.response_ids.tolist()] for r in rollouts])
    weights = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = lm.model.model(input_ids=ids, use_cache=False).last_hidden_state
    del out
    return sum(kept.values())


def optimiser_race() -> Record:
    """Seconds of opd's clip and optimiser step, and of the same with a loop over tensors, in turns."""
    model = causal_lm(STUDENT, seed=1)
    tok = tokenizer()
    sides = {"opd": opd_side.side(reverse_kl(), language_model(model, tok), language_model(model, tok), Sampling())}
    sides["loop"] = opd_side.side(
        reverse_kl(), language_model(copy.deepcopy(model), tok), language_model(model, tok), Sampling()
    )
    for group in sides["loop"].optimiser.parts["adamw"].param_groups:
        group |= {"fused": False, "foreach": False}
    times: dict[str, list[Record]] = {name: [] for name in sides}
    for _ in range(ROUNDS + 1):
        for name, side in sides.items():
            for parameter in side.optimiser.parameters.values():
                parameter.grad = torch.ones_like(parameter)
            times[name].append(optimiser_seconds(side))
    return {
        name: {key: spread([answer[key] for answer in answers[1:]]) for key in answers[0]}
        for name, answers in times.items()
    }


def optimiser_seconds(side: opd_side.Side) -> Record:
    out: Record = {}
    with timed(out, "seconds"):
        side.optimiser.clip()
        side.optimiser.step()
    return out


def optimiser_ratio(result: Record) -> float:
    """CPU seconds of opd's optimiser step over those of the loop."""
    return result["optimiser"]["opd"]["seconds_cpu"]["median"] / result["optimiser"]["loop"]["seconds_cpu"]["median"]


@torch.no_grad()
def bfloat16() -> Record:
    """Errors in nats and seconds of the output layer in bfloat16: opd's, and a product that is then cast."""
    V, N, H = BFLOAT16
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(V, H, generator=generator) * 3 / H**0.5).bfloat16()
    hidden = torch.randn(N, H, generator=generator).bfloat16()
    ids = torch.randint(V, (N, 1), generator=generator)
    head = Head(weight=weight, bias=None, vocabulary=V)
    exact = (hidden.float() @ weight.float().t()).log_softmax(-1).gather(1, ids)
    ways: dict[str, Callable[[], Tensor]] = {
        "opd": lambda: head.logits(hidden),
        "cast": lambda: nn.functional.linear(hidden, weight).float(),
    }
    out: Record = {}
    for name, logits in ways.items():
        out[f"{name}_error"] = (logits().log_softmax(-1).gather(1, ids) - exact).abs().mean().item()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, logits in ways.items():
            started = time.perf_counter()
            logits()
            times[name].append(time.perf_counter() - started)
    return out | {f"{name}_seconds": median(seconds) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--worker", choices=("memory",), required=True)
    if parser.parse_args().quick:
        globals().update(QUICK)
    serve(lambda _: answer())


def answer() -> Record:
    memory_by_part("1M")  # libraries that load and memory that threads keep are no part of the step
    return {"memory": memory_by_part(STUDENT), "optimiser": optimiser_race(), "bfloat16": bfloat16()}


if __name__ == "__main__":
    main()
