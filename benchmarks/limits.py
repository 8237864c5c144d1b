"""Where opd's time goes in generation and in the training part: torch.profiler over the step's pair.

    python benchmarks/limits.py

The same 8 prompts, student and teacher as in step.py, both parts warm. The share of an operation is that of its own CPU
time in all of them; the profiler's own cost counts for small operations, so that their shares are upper bounds.

`products with the output layer` times that product alone, 8 rows as in a decode step and 1,024 as in training: what a
step of either cannot do without. GFLOP/s are to be compared with the calibration. `prepacked` is the layout that the
sampler multiplies on a CPU (samplers/prepack.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import opd_side
import torch
from common import Record, measured, say
from step import NEW_TOKENS, PROMPT_TOKENS, PROMPTS, pair
from torch.profiler import ProfilerActivity, profile
from workload import language_model, prompts

from opd.methods.reverse_kl import reverse_kl
from opd.models import LanguageModel
from opd.samplers.prepack import prepacked
from opd.types import Sampling

SHOWN = 8


def shares(work: Callable[[], Any]) -> list[Record]:
    """The operations with the most CPU time of their own, and their share of it."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    rows = sorted(profiled.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    return [
        {"operation": row.key, "share": row.self_cpu_time_total / total, "calls": row.count} for row in rows[:SHOWN]
    ]


def product(lm: LanguageModel, rows: int) -> list[Record]:
    """Seconds and GFLOP/s of [rows, H] x [H, V], as the weight lies and prepacked."""
    weight = lm.head().weight
    hidden = torch.randn(rows, weight.shape[1])
    with prepacked(lm) as logits_of:
        ways = {"as it lies": lm.head().logits, "prepacked": logits_of}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(20):
            for name, multiply in ways.items():
                started = perf_counter()
                multiply(hidden)
                times[name].append(perf_counter() - started)
    flops = 2 * rows * weight.numel()
    return [
        {"rows": rows, "layout": name, "seconds": median(t), "gflops": flops / median(t) / 1e9}
        for name, t in times.items()
    ]


def main() -> None:
    student, teacher, tok = pair()
    sampling = Sampling(max_completion_length=NEW_TOKENS)
    mine = opd_side.side(reverse_kl(), language_model(student, tok), language_model(teacher, tok), sampling)
    asked = prompts(PROMPTS, PROMPT_TOKENS, tok)
    steps = itertools.count()
    rollouts = mine.sampler(asked, seed=(0, 0))
    with measured("limits") as result, torch.no_grad():
        lm = mine.student
        result["products"] = [row for rows in (PROMPTS, PROMPTS * NEW_TOKENS) for row in product(lm, rows)]
        with torch.enable_grad():
            result["parts"] = {
                "generation": shares(lambda: mine.sampler(asked, seed=(0, next(steps)))),
                "training part": shares(lambda: opd_side.training_part(mine, rollouts, {})),
            }
    for part, rows in result["parts"].items():
        say(f"{part}: " + ", ".join(f"{row['operation']} {row['share']:.0%}" for row in rows))
    for row in result["products"]:
        say(f"product with the output layer, {row['rows']} rows, {row['layout']}: {row['gflops']:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
