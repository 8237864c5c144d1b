"""opd's limits: time by operation, products with the output layer, memory of a step by part.

    python benchmarks/limits.py [--quick]

Times by operation are torch.profiler's, in generation and in the training part: the same 8 prompts, student and teacher
as in step.py, both parts warm. An operation's share is its own CPU time over that of all operations. It includes the
profiler's cost, so shares of small operations are upper bounds.

`products with the output layer` times that product alone, 8 rows as in a decode step and 1,024 as in training: the
minimum work of either step. Compare GFLOP/s with the calibration. `prepacked` is the layout of the sampler's products
on a CPU (samplers/prepack.py).

`training part against bare` is also in step.py, where each is a process that waits for the others between turns; here
both alternate in one process, so that the memory of both is warm.

Memory, the optimiser and bfloat16 are in limits_memory.py.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import limits_memory
import opd_side
import step
import torch
from common import Record, measured, say, spread, workers
from step import bare, pair
from torch.profiler import ProfilerActivity, profile
from workload import language_model, prompts

from opd.methods.reverse_kl import reverse_kl
from opd.models.language_model import LanguageModel
from opd.samplers.prepack import prepacked
from opd.types import Rollout, Sampling

SHOWN = 8
RACES = 5


def ratio(result: Record) -> float:
    """The training part's median seconds over those of bare."""
    race = result["against_bare"]
    return race["opd"]["median"] / race["bare"]["median"]


def shares(work: Callable[[], Any]) -> list[Record]:
    """The operations with the most own CPU time, and their shares."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    rows = sorted(profiled.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    return [
        {"operation": row.key, "share": row.self_cpu_time_total / total, "calls": row.count} for row in rows[:SHOWN]
    ]


def product(lm: LanguageModel, rows: int) -> list[Record]:
    """Seconds and GFLOP/s of [rows, H] x [H, V], with the weight as stored and prepacked."""
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


def against_bare(mine: opd_side.Side, teacher: Any, rollouts: Sequence[Rollout]) -> Record:
    """Seconds of the training part and of bare, in turns, after one warm-up turn each."""
    twin = copy.deepcopy(mine.student.model)
    work_of_bare = bare(twin, teacher, mine.student.tokenizer)
    times: dict[str, list[float]] = {"opd": [], "bare": []}
    for _ in range(RACES + 1):
        times["bare"].append(work_of_bare()["total"])
        parts: Record = {}
        opd_side.training_part(mine, rollouts, parts)
        mine.student.model.zero_grad()
        times["opd"].append(sum(parts[part] for part in ("teacher", "loss", "backward")))
    return {name: spread(seconds[1:]) for name, seconds in times.items()}


def by_operation(result: Record) -> None:
    """Fill in `products`, `against_bare` and `parts`."""
    student, teacher, tok = pair()
    sampling = Sampling(max_completion_length=step.NEW_TOKENS)
    mine = opd_side.side(reverse_kl(), language_model(student, tok), language_model(teacher, tok), sampling)
    step_prompts = prompts(step.PROMPTS, step.PROMPT_TOKENS, tok)
    steps = itertools.count()
    rollouts = mine.sampler(step_prompts, seed=(0, 0))
    with torch.no_grad():
        counts = (step.PROMPTS, step.PROMPTS * step.NEW_TOKENS)
        result["products"] = [row for rows in counts for row in product(mine.student, rows)]
    result["against_bare"] = against_bare(mine, teacher, rollouts)
    result["parts"] = {
        "generation": shares(lambda: mine.sampler(step_prompts, seed=(0, next(steps)))),
        "training part": shares(lambda: opd_side.training_part(mine, rollouts, {})),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the code")
    options = parser.parse_args()
    if options.quick:
        vars(step).update(step.QUICK)
    flags = ["--quick"] if options.quick else []
    with measured("limits", options.quick) as result:
        by_operation(result)
        with workers(limits_memory.__file__, ["memory"], *flags) as started:
            result |= started["memory"].ask({})
    for part, rows in result["parts"].items():
        say(f"{part}: " + ", ".join(f"{row['operation']} {row['share']:.0%}" for row in rows))
    say(f"training part against bare: {ratio(result):.2f}")
    for row in result["products"]:
        say(f"product with the output layer, {row['rows']} rows, {row['layout']}: {row['gflops']:.0f} GFLOP/s")
    for row in result["memory"]:
        say(limits_memory.line(row))
    say(f"optimiser step against a loop over tensors: {limits_memory.optimiser_ratio(result):.2f}")
    say(f"bfloat16: {result['bfloat16']}")


if __name__ == "__main__":
    main()
