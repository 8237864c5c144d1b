"""How the cost of opd's step grows: length, vocabulary, support, group size, ranks.

    python benchmarks/scaling.py [--quick]

Student 5M, teacher 26M, float32; the base is a step of 8 prompts of 32 tokens, 128 new tokens, reverse KL on the full
vocabulary. One quantity varies at a time; the points of an axis take turns:

* `length`: one response of 128 to 4,096 tokens;
* `vocabulary`: 32,768 to 262,144 tokens, both heads, 4 prompts;
* `support`: `topk_reverse_kl` with k = 8 to 512, and the full vocabulary;
* `group`: 16 responses of 32 tokens in total, to 16, 8, 4, 2 or 1 prompts of 512 tokens: the saving by a shared prompt;
* `prompt`: 1 and 8 responses of 32 tokens to one prompt of 32 or 512 tokens; here the student is the 26M model;
* `ranks`: `torchrun --nproc-per-node 1` and `2` of `opd train`, the same batch divided among them, one thread per core
  in total; 8 steps.

`of linear` compares a point with the points of less work on its axis. It is the cost per unit of work over the least
one among them: at most 1 where cost grows no faster than the work, and 1 at the first point. The unit is the token that
is generated or trained (`length`; with a prompt once per group in `group`), or the vocabulary's token. `support` and
`ranks` should be flat, so there it is the cost over the least one.

Two more pairs of runs compare the parameters of 2 ranks with those of 1 after 20 steps of 4 prompts and 16 new tokens,
one thread per process: full weights, and adapters (LoRA, rank 16, all linear layers). See `difference`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import opd_side
from common import Record, Worker, measured, say, serve, spread, workers
from workload import SIZES, causal_lm, language_model, prompts, tokenizer, tokenizer_folder

from opd.methods.reverse_kl import reverse_kl
from opd.methods.topk_reverse_kl import topk_reverse_kl
from opd.stage import checkpoint
from opd.types import Sampling

SMOLLM2_VOCABULARY = 49152
BASE: Record = {
    "prompts": 8,
    "n": 1,
    "prompt_tokens": 32,
    "new_tokens": 128,
    "vocabulary": SMOLLM2_VOCABULARY,
    "k": 0,  # 0: the full vocabulary
    "student": "5M",
}
AXES: dict[str, list[Record]] = {
    "length": [{"prompts": 1, "new_tokens": length} for length in (128, 512, 2048, 4096)],
    "vocabulary": [{"prompts": 4, "vocabulary": size} for size in (2**15, 2**16, 2**17, 2**18)],
    "support": [{"k": k} for k in (8, 32, 128, 512, 0)],
    "group": [{"prompts": 16 // n, "n": n, "prompt_tokens": 512, "new_tokens": 32} for n in (16, 8, 4, 2, 1)],
    "prompt": [
        {"prompts": 1, "n": n, "prompt_tokens": length, "new_tokens": 32, "student": "26M"}
        for n in (1, 8)
        for length in (32, 512)
    ],
}
VARIED = {
    "length": "new_tokens",
    "vocabulary": "vocabulary",
    "support": "k",
    "group": "n",
    "prompt": "prompt_tokens",
}
# The work that an axis grows with, by a key of its rows; None: the cost should not grow.
WORK = {
    "length": "tokens",
    "vocabulary": "vocabulary",
    "support": None,
    "group": "read_once",
}
PARTS = ("total", "generate", "teacher", "loss", "backward")
TRAINING = ("loss", "backward")
LINEAR = ("total", "generate", "teacher", "training")
ROUNDS = {"prompt": 5, "length": 2}  # the first of them warms up
OTHER_ROUNDS = 3
QUICK_AXES = {"length": AXES["length"][:2], "support": AXES["support"][-1:], "prompt": AXES["prompt"]}
RANKS = (1, 2)
RANK_STEPS = 20
SPEED_STEPS = 8
SHORT = {"prompts": 4, "new_tokens": 16}
# Differences from the base step. Parameters are compared after short responses, with one thread per process: rounding
# changes a few of 100,000 sampled tokens of a flat distribution, and then the rest of a response, which is not the
# effect to measure.
KINDS: dict[str, Record] = {"speed": {}, "full": SHORT, "lora": SHORT}


def worker() -> None:
    tok = tokenizer()
    sides: dict[str, Any] = {}
    steps = itertools.count()

    def work(point: Record) -> Record:
        if point.pop("fresh"):
            sides.clear()  # drop the models of the axis before
        key = json.dumps(point, sort_keys=True)
        if key not in sides:
            sides[key] = make_side(point, tok)
        step_prompts = prompts(point["prompts"], point["prompt_tokens"], tok)
        seed = (0, next(steps))
        return opd_side.step(sides[key], step_prompts, seed)

    serve(work)


def make_side(point: Record, tok: Any) -> opd_side.Side:
    V = point["vocabulary"]
    rows = max(V, len(tok))  # of a smaller vocabulary, the rows beyond it are padding, which no product reads
    student, teacher = (
        replace(language_model(causal_lm(size, seed=seed, vocabulary=rows), tok), vocabulary=V)
        for size, seed in ((point["student"], 1), ("26M", 2))
    )
    method = topk_reverse_kl(k=point["k"], by="teacher", form="tail") if point["k"] else reverse_kl()
    return opd_side.side(method, student, teacher, Sampling(max_completion_length=point["new_tokens"], n=point["n"]))


def run_axis(started: Worker, axis: str, points: list[Record]) -> list[Record]:
    """One row per point: the step's work, seconds of each part, cost over linear."""
    answers: list[list[Record]] = [[] for _ in points]
    for turn in range(ROUNDS.get(axis, OTHER_ROUNDS)):
        for i, point in enumerate(points):
            fresh = turn == 0 and i == 0
            answers[i].append(started.ask({**BASE, **point, "fresh": fresh}))
    rows: list[Record] = []
    for point, mine in zip(points, answers, strict=True):
        whole = {**BASE, **point}
        names = [name for part in PARTS for name in (part, f"{part}_cpu") if name in mine[0]]
        seconds = {name: spread([a[name] for a in mine[1:]]) for name in names}
        new = whole["prompts"] * whole["n"] * whole["new_tokens"]
        tokens = new + whole["prompts"] * whole["n"] * whole["prompt_tokens"]
        read_once = new + whole["prompts"] * whole["prompt_tokens"]
        rows.append({**whole, "tokens": tokens, "read_once": read_once, "seconds": seconds})
    if axis in WORK:
        for row, ratios in zip(rows, of_linear(rows, WORK[axis]), strict=True):
            row["of_linear"] = ratios
    return rows


def of_linear(rows: list[Record], work: str | None) -> list[Record]:
    """By part, each row's cost per unit of work over the least one of this and the rows before it.

    Rows come by rising work. Without `work` the cost over the least one of all rows.
    """
    out: list[Record] = [{} for _ in rows]
    for part in LINEAR:
        names = TRAINING if part == "training" else (part,)
        costs = [sum(row["seconds"][name]["median"] for name in names) for row in rows]
        if work is None:
            least = [min(costs)] * len(costs)
        else:
            costs = [cost / row[work] for cost, row in zip(costs, rows, strict=True)]
            least = list(itertools.accumulate(costs[:1] + costs[:-1], min))
        for ratios, cost, low in zip(out, costs, least, strict=True):
            ratios[part] = cost / low
    return out


def shared_prompt(rows: list[Record]) -> float:
    """The training cost of a prompt of 512 tokens under 8 responses over that under one, above a prompt of 32 tokens.

    1 where a group reads its prompt once, 8 where every response reads it.
    """
    cost = {(row["n"], row["prompt_tokens"]): sum(row["seconds"][part]["median"] for part in TRAINING) for row in rows}
    return (cost[8, 512] - cost[8, 32]) / (cost[1, 512] - cost[1, 32])


def recipe(folder: Path, ranks: int, kind: str) -> Path:
    """The base step, or a short one, as a recipe for `opd train`."""
    name, step = f"{kind}-{ranks}", {**BASE, **KINDS[kind]}
    data = folder / f"prompts-{kind}.jsonl"
    step_prompts = prompts(step["prompts"], step["prompt_tokens"], tokenizer())
    data.write_text("".join(json.dumps({"prompt": prompt.content}) + "\n" for prompt in step_prompts))

    def model(size: str) -> Record:
        shape = SIZES[size]
        init = {
            "model_type": "llama",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.heads,
            "tie_word_embeddings": True,
        }
        return {"init": init, "tokenizer": str(tokenizer_folder())}

    stage = {
        "name": "distil",
        "train": "student",
        "teacher": "teacher",
        "method": "reverse_kl",
        "data": {"path": str(data)},
        "sampling": {"max_completion_length": step["new_tokens"]},
        "prompts_per_step": step["prompts"],
        "steps": SPEED_STEPS if kind == "speed" else RANK_STEPS,
        "optimizer": {"learning_rate": 1e-4},
        "samples_every": 0,
        "checkpoint": {"every": 1000, "keep": 1},
    }
    student = model("5M") | ({"lora": {"rank": 16, "target_modules": "all-linear"}} if kind == "lora" else {})
    whole = {
        "name": name,
        "output_dir": str(folder / name),
        "models": {"student": student, "teacher": model("26M")},
        "stages": [stage],
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(whole))  # JSON is YAML
    return file


def run_ranks(folder: Path, ranks: int, kind: str) -> Record:
    """Seconds of a step with this many processes, after the first two steps, from the run's own timings."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks) if kind == "speed" else 1
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "opd", "train", str(recipe(folder, ranks, kind))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return {"ranks": ranks, "skipped": "\n".join(done.stderr.strip().splitlines()[-3:])}
    (file,) = (folder / f"{kind}-{ranks}").rglob("timings.jsonl")
    steps = [json.loads(line) for line in file.read_text().splitlines()][2:]
    parts = {part: spread([step[part] for step in steps]) for part in ("total", "generate", "score", "train")}
    cpu = spread([step["cpu"] for step in steps])
    return {"ranks": ranks, "threads_each": threads, "seconds": parts, "cpu_of_first_rank": cpu}


def difference(folder: Path, kind: str) -> Record:
    """The difference of two ranks (a) from one (b) after the last step.

    `whole` is |a - b| / |b| with all trained parameters as one vector, `worst` the largest over tensors of
    max|a - b| / max|b|. An adapter's second matrix starts at zero, so there `worst` is relative to its change.
    """
    one, two = (
        checkpoint.load(folder / f"{kind}-{ranks}/distil/checkpoints/step_{RANK_STEPS:06d}").tensors["student"]
        for ranks in RANKS
    )
    assert one.keys() == two.keys(), f"tensors in one of the runs only: {sorted(one.keys() ^ two.keys())}"
    gap = sum(((two[name] - b).double() ** 2).sum().item() for name, b in one.items())
    size = sum((b.double() ** 2).sum().item() for b in one.values())
    worst = max(((two[name] - b).abs().max() / b.abs().max()).item() for name, b in one.items())
    return {"whole": (gap / size) ** 0.5, "worst": worst}


def all_ranks(result: Record) -> None:
    """Fill in `ranks` (speed, full weights) and `ranks_difference` (full and LoRA; None where a run failed)."""
    result["ranks_difference"] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for kind in KINDS:
            rows = [run_ranks(folder, ranks, kind) for ranks in RANKS]
            for row in rows:
                say(f"ranks {row['ranks']}, {kind}: {row.get('skipped') or row['seconds']['total']}")
            if kind == "speed":
                result["ranks"] = rows
                continue
            failed = [row["skipped"] for row in rows if "skipped" in row]
            result["ranks_difference"][kind] = None if failed else difference(folder, kind)
            say(f"ranks, {kind}: parameters differ by {result['ranks_difference'][kind]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few points, without ranks, to try the code")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker()
        return
    with measured("scaling", options.quick) as result:
        result["axes"] = {}
        with workers(__file__, ["opd"]) as started:
            for axis, points in (QUICK_AXES if options.quick else AXES).items():
                rows = run_axis(started["opd"], axis, points)
                result["axes"][axis] = rows
                key = VARIED[axis]
                shown = (f"{row[key]}: {next(iter(row['seconds'].values()))['median']:.2f}" for row in rows)
                say(f"{axis} ({key}: seconds) {', '.join(shown)}")
        result["shared_prompt"] = shared_prompt(result["axes"]["prompt"])
        say(f"a prompt of 512 tokens under 8 responses, against under one: {result['shared_prompt']:.2f} of the cost")
        if options.quick:
            result["ranks"] = [{"ranks": ranks, "skipped": "--quick"} for ranks in RANKS]
            result["ranks_difference"] = {"full": None, "lora": None}
        else:
            all_ranks(result)


if __name__ == "__main__":
    main()
