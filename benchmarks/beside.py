"""vLLM beside the trainer on one device: the proof of every update, and the seconds of a step by part.

    python benchmarks/beside.py --vllm PYTHON [--quick]

PYTHON is an interpreter with vLLM. On a GPU a 0.6B student trains in float32 with autocast, and vLLM has its weights in
bfloat16 and `SHARE` of the GPU's memory; on a CPU both have the 5M model in float32. A local teacher of the same size
scores the top 16. After the run, on a GPU, the memory that vLLM gives back while it sleeps.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import torch
from common import DEVICE, GIB, HERE, ON_GPU, Record, measured, say
from workload import causal_lm, language_model, tokenizer

sys.path.insert(0, str(HERE.parent / "tests"))
from support.vllm_server import vllm

import opd
from opd.models import saving

SHARE = 0.35  # of the GPU's memory
SIZE = "0.6B" if ON_GPU else "5M"
STEPS, PROMPTS, NEW_TOKENS = 6, 64, 256
QUICK: Record = {"STEPS": 3, "PROMPTS": 2, "NEW_TOKENS": 4}
TOLERANCE = 0.1 if ON_GPU else 1e-3  # nats, of bfloat16 against autocast, and of float32
FLAGS = (
    *("--logprobs-mode", "processed_logprobs", "--worker-extension-cls", "opd.engines.worker.WeightLoader"),
    *("--max-model-len", "1024", "--max-num-seqs", "64"),
    *(("--dtype", "bfloat16", "--gpu-memory-utilization", str(SHARE), "--enable-sleep-mode") if ON_GPU else ()),
)


def recipe(folder: Path, url: str) -> Record:
    """A student and its teacher in `folder`, and the engine at `url`."""
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Question {i}: what comes after {i}?"}) + "\n" for i in range(STEPS * PROMPTS))
    )
    stage = {
        "name": "distil",
        "train": "student",
        "teacher": "teacher",
        "method": "topk_reverse_kl",
        "options": {"k": 16, "by": "teacher", "form": "tail"},
        "data": {"path": str(folder / "prompts.jsonl")},
        "engine": {"urls": [url], "tolerance": TOLERANCE},
        "prompts_per_step": PROMPTS,
        "sampling": {"max_completion_length": NEW_TOKENS},
        "optimizer": {"learning_rate": 1e-5},
        "steps": STEPS,
    }
    student = {"path": str(folder / "student"), "autocast": ON_GPU}
    models = {"student": student, "teacher": {"path": str(folder / "teacher"), "dtype": "bfloat16" if ON_GPU else None}}
    models["teacher"] = {key: value for key, value in models["teacher"].items() if value is not None}
    return {"name": "beside", "output_dir": str(folder / "run"), "models": models, "stages": [stage]}


def steps(folder: Path) -> Record:
    """Medians of the parts of a step, without the first one, and the largest error of a proof in nats."""
    rows = [json.loads(line) for line in (folder / "run/distil/timings.jsonl").read_text().splitlines()]
    names = [name for name in ("sync", "generate", "score", "train", "total", "tokens_per_second") if name in rows[0]]
    parts = {name: median(row[name] for row in rows[1:]) for name in names}
    return {
        "steps": len(rows),
        "parts": parts,
        "sync_error": max(row["engine_sync_error"] for row in rows),
        "repeated": sum(row["engine_repeated"] for row in rows),
        "peak_memory_gib": rows[-1]["peak_memory_gib"],
    }


def slept(url: str) -> Record:
    """GiB of the GPU that vLLM gives back while it sleeps, and whether it answers afterwards."""
    free = [torch.cuda.mem_get_info(DEVICE)[0]]
    for path in ("sleep?level=1", "wake_up"):
        httpx2.post(f"{url}/{path}", timeout=60.0).raise_for_status()
        free.append(torch.cuda.mem_get_info(DEVICE)[0])
    return {"given_back_gib": (free[1] - free[0]) / GIB, "taken_again_gib": (free[1] - free[2]) / GIB}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vllm", required=True)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    globals().update(QUICK if given.quick else {})
    with measured("beside", given.quick) as record, tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for seed, name in enumerate(("student", "teacher")):
            saving.save(language_model(causal_lm(SIZE, seed=seed), tokenizer(), name=name), folder / name)
        with vllm(folder / "student", folder / "log", *FLAGS, by_position=False, python=given.vllm) as url:
            opd.run(recipe(folder, url), quiet=True)
            record |= {"size": SIZE, **steps(folder), **({"sleep": slept(url)} if ON_GPU else {})}
        shown: dict[str, Any] = {name: round(value, 3) for name, value in record["parts"].items()}
        say(f"{record['steps']} steps of {SIZE}, seconds by part: {shown}")
        say(f"largest error of a proof: {record['sync_error']:.1e} nats, of {TOLERANCE:g} allowed")
        if ON_GPU:
            say(f"asleep, vLLM gives back {record['sleep']['given_back_gib']:.1f} GiB")


if __name__ == "__main__":
    main()
