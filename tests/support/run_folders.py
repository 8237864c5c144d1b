"""Folders of runs that no model trained, in the format of docs/run_folder.md: for tests of what reads them.

Numbers are drawn from a seed. Texts are words of a small vocabulary, or what a test gives.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

INTS, FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
UNIT = pa.struct([(name, pa.int32()) for name in ("student_start", "student_end", "teacher_start", "teacher_end")])
IMAGE = pa.struct([("image", pa.string()), ("width", pa.int32()), ("height", pa.int32())])
COLUMNS: dict[str, Any] = {
    "task": pa.string(),
    "prompt_id": pa.int64(),
    "sample": pa.int64(),
    "part": pa.string(),
    "prompt": pa.string(),
    "student_reads": pa.string(),
    "teacher_reads": pa.string(),
    "response": pa.string(),
    "reward": pa.float64(),
    "finished": pa.bool_(),
    "sampler_version": pa.int64(),
    "response_ids": pa.list_(pa.int64()),
    "response_tokens": pa.list_(pa.string()),
    "sampler_logp": FLOATS,
    "policy_logp": FLOATS,
    "teacher_logp": FLOATS,
    "weight": FLOATS,
    "advantage": FLOATS,
    "when": pa.string(),
    "sampling": pa.string(),
    "prompt_messages": pa.string(),
    "answer": pa.string(),
    "extracted": pa.string(),
    "trained": pa.list_(pa.bool_()),
    "turn": INTS,
    "signal": FLOATS,
    "student_entropy": FLOATS,
    "teacher_entropy": FLOATS,
    "teacher_rank": INTS,
    "student_top_ids": pa.list_(INTS),
    "teacher_top_ids": pa.list_(INTS),
    "student_top_logp": pa.list_(FLOATS),
    "teacher_top_logp": pa.list_(FLOATS),
    "student_top_tokens": pa.list_(pa.list_(pa.string())),
    "teacher_top_tokens": pa.list_(pa.list_(pa.string())),
    "pick": pa.string(),
    "units": pa.list_(UNIT),
    "teacher_tokens": pa.list_(pa.string()),
    "images": pa.list_(IMAGE),
    "teacher_images": pa.list_(IMAGE),
    "box": pa.list_(pa.float64()),
    "turn_rewards": pa.list_(pa.float64()),
    "turn_errors": INTS,
    "conversation": pa.string(),
}
OLD = list(COLUMNS)[:20]  # what version 0.1.0 wrote
WORDS = (
    "the",
    " a",
    " of",
    " to",
    " and",
    " is",
    " in",
    " it",
    ".",
    ",",
    "\n",
    " 12",
    " 7",
    " =",
    " so",
    " we",
    "é",
    "日本",
)


@dataclass(kw_only=True)
class FakeRun:
    """What `write` puts into a folder."""

    name: str = "fake"
    description: str = "Numbers drawn from a seed."
    stages: tuple[str, ...] = ("distil",)
    method: str = "reverse_kl"
    methods: dict[str, str] = field(default_factory=dict)  # of other stages, by name
    steps: int = 20
    planned: int | None = None  # default: `steps`; more than it: the run is at work
    every: int = 5  # steps between files of samples
    rows: int = 8
    picked: int = 8
    tokens: int = 12
    prompts: int = 12  # held out
    vocabulary: int = 1000
    tasks: tuple[str, ...] = ()
    reward: str = "max_words"
    correctness: bool = False
    shares: bool = True  # rewards are 0 or 1; else any number
    units: bool = False
    turns: bool = False
    pictures: tuple[int, int] | None = None  # width and height of an image of each prompt, with a box for the teacher
    copies: int = 10**9  # of the images that have a copy
    old: bool = False  # the columns and files of version 0.1.0
    extracted: str = ""  # what the reward compared; default: a number
    hostile: tuple[str, ...] = ()  # texts of prompts, responses and tokens
    gain: float = 0.5  # how much the reward rises
    seed: int = 0
    settings: tuple[str, ...] = ("greedy", "sampled")
    extra: dict[str, Any] = field(default_factory=dict)  # keys of the recipe


def write(folder: Path, run: FakeRun | None = None, **changes: Any) -> Path:
    """Write a run's folder; `changes` are fields of `FakeRun`."""
    run = run or FakeRun(**changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(run), sort_keys=False, allow_unicode=True))
    packages = {"opd": "0.1.0", "torch": "2.13.0", "transformers": "5.0.0"}
    environment = {"python": "3.11.2", "platform": "Linux", "cpus": 2, "git_commit": None, "packages": packages}
    if not run.old:
        environment |= {"cpu": "a processor", "gpu": None, "memory_gib": 24.0}
    (folder / "environment.json").write_text(json.dumps(environment))
    for stage in run.stages:
        _stage(folder / stage, run, np.random.default_rng(run.seed))
    return folder


def recipe_of(run: FakeRun) -> dict[str, Any]:
    """The resolved recipe, as far as a reader needs it."""
    reward = {"name": run.reward, "options": {"n": 5}}
    sampling = {name: {"temperature": 0.0 if name == "greedy" else 1.0} for name in run.settings}
    evaluate = {"data": {"path": "held_out.jsonl"}, "reward": reward, "sampling": sampling, "pass_at": [1]}
    stages: list[dict[str, Any]] = []
    for name in run.stages:
        spec: dict[str, Any] = {
            "name": name,
            "train": "student",
            "teacher": "teacher",
            "method": run.methods.get(name, run.method),
        }
        spec |= {"options": {}, "steps": run.planned or run.steps, "tasks": {}, "evaluate": None}
        if run.tasks:
            spec["tasks"] = {task: {"evaluate": evaluate} for task in run.tasks}
        else:
            spec["evaluate"] = evaluate
        stages.append({**spec, **run.extra})
    return {"name": run.name, "description": run.description, "seed": run.seed, "models": {}, "stages": stages}


def _stage(folder: Path, run: FakeRun, rng: np.random.Generator) -> None:
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    if run.pictures:
        _copies(folder / "images", run)
    held = {when: _held_out(run, when, rng) for when in ("before", "teacher", f"step_{run.steps:06d}")}
    for when, rows in held.items():
        write_rows(folder / f"held_out_{when}.parquet", rows, run)
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "timings.jsonl").open("w") as timings:
        for step in range(run.steps + 1):
            row = {"step": step, **(_numbers(step / run.steps, rng) if step else {})}
            if step == 0:
                row |= _evaluated(run, held["before"]) | _evaluated(run, held["teacher"], teacher=True)
            if step == run.steps:
                row |= _evaluated(run, held[f"step_{run.steps:06d}"])
            metrics.write(json.dumps(row) + "\n")
            if step:
                seconds = {"step": step, "generate": 1.5, "score": 0.5, "train": 0.75, "total": 3.0}
                new = {"tokens": 400.0, "tokens_per_second": 133.0, "peak_memory_gib": 2.5, "wall": 1.79e9 + 3 * step}
                timings.write(json.dumps(seconds | ({} if run.old else new)) + "\n")
    for step in range(run.every, run.steps + 1, run.every):
        rows = _samples(run, step / run.steps, rng)
        write_rows(folder / "samples" / f"step_{step:06d}.parquet", rows, run)
    if run.planned in (None, run.steps):
        (folder / "done.json").write_text(json.dumps({"steps": run.steps, "seconds": 3.0 * run.steps}))
    if not run.old:
        keys = {"settings": list(run.settings), "tasks": list(run.tasks), "teacher_prefix": "eval/teacher/"}
        keys |= {"trained": "student", "teacher": "teacher", "reward": _reward(run)}
        (folder / "keys.json").write_text(json.dumps(keys))
        progress = {"phase": "train", "done": 3, "of": 8, "since": 1.79e9, "step": run.steps}
        progress |= {"steps": run.planned or run.steps, "eta_seconds": 60.0, "updated": 1.79e9 + 1}
        (folder / "progress.json").write_text(json.dumps(progress))


def _reward(run: FakeRun) -> dict[str, Any]:
    return {"name": run.reward, "correctness": run.correctness}


def write_rows(file: Path, rows: list[dict[str, Any]], run: FakeRun) -> None:
    """One Parquet file in the format, or in that of version 0.1.0."""
    names = OLD if run.old else list(COLUMNS)
    schema = pa.schema([(name, COLUMNS[name]) for name in names])
    if not run.old:
        described = {"format": 2, "library": "0.1.0", "reward": _reward(run)}
        schema = schema.with_metadata({"opd": json.dumps(described)})
    columns = [pa.array([row.get(name) for row in rows], type=schema.field(name).type) for name in names]
    pq.write_table(pa.table(columns, schema=schema), file, compression="zstd")


def _numbers(done: float, rng: np.random.Generator) -> dict[str, float]:
    """The metrics of a step, at a share of the run."""
    noise = lambda: float(rng.normal(0, 0.03))  # noqa: E731
    ratio = -0.5 * (1 - 0.8 * done) + noise()
    means = {
        "train/loss": 0.5 * (1 - 0.7 * done) + noise(),
        "teacher/log_ratio": ratio,
        "teacher/log_ratio_p05": ratio - 1.5,
        "teacher/log_ratio_p95": ratio + 0.8,
        "rollout/length": 30 - 10 * done + 10 * noise(),
        "rollout/length_max": 48.0,
        "rollout/cut_share": max(0.0, 0.2 * (1 - done) + noise()),
        "rollout/repeat_ratio": 0.02,
        "rollout/policy_nll": 0.8 - 0.2 * done + noise(),
        "optim/grad_norm": 1.2 - 0.6 * done + noise(),
        "train/tokens": 400.0,
    }
    return means | {f"other/number_{i:02d}": float(i) + noise() for i in range(30)}


def _evaluated(run: FakeRun, rows: list[dict[str, Any]], *, teacher: bool = False) -> dict[str, float]:
    out: dict[str, float] = {}
    for task in run.tasks or (None,):
        prefix = "/".join(part for part in ("eval", task, "teacher" if teacher else None) if part)
        for setting in run.settings:
            here = [row for row in rows if row["task"] == task and row["sampling"] == setting]
            mean = float(np.mean([row["reward"] for row in here]))
            out |= {f"{prefix}/{setting}/reward": mean, f"{prefix}/{setting}/length": float(run.tokens)}
            if run.shares:
                out |= {f"{prefix}/{setting}/reward_low": max(0.0, mean - 0.1)}
                out |= {f"{prefix}/{setting}/reward_high": min(1.0, mean + 0.1)}
            out[f"{prefix}/{setting}/cut_share"] = 0.05
        if not teacher:
            out |= {f"{prefix}/reverse_kl": 0.4, f"{prefix}/forward_kl": 0.5}
    return out


def _held_out(run: FakeRun, when: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    likely = {"before": 0.2, "teacher": 0.2 + run.gain * 1.2}.get(when, 0.2 + run.gain)
    rows: list[dict[str, Any]] = []
    for task in run.tasks or (None,):
        for setting in run.settings:
            for i in range(run.prompts):
                reward = float(rng.random() < likely) if run.shares else float(rng.normal(likely, 0.3))
                row = _row(run, i, rng, numbers=not run.old, done=1.0)
                if when == "teacher":
                    row |= {"student_reads": None, "images": None}
                rows.append({**row, "task": task, "sampling": setting, "when": when, "reward": reward, "pick": None})
    return rows


def _samples(run: FakeRun, done: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    names = ("least", "most", "longest", "shortest", "chance", "chance", "chance", "chance")
    rows = [
        _row(run, 1000 + i, rng, done=done, looked=i < run.picked) | {"pick": names[i % 8] if i < run.picked else None}
        for i in range(run.rows)
    ]
    if not run.old:
        rows += [_row(run, i, rng, done=done) | {"pick": "follow", "signal": None, "weight": None} for i in range(2)]
    return rows


def _row(
    run: FakeRun, i: int, rng: np.random.Generator, *, done: float, numbers: bool = True, looked: bool = True
) -> dict[str, Any]:
    """One response; `numbers`: with log-probs, `looked`: with entropies and most likely tokens."""
    n = int(run.tokens if run.tokens > 100 else rng.integers(max(1, run.tokens // 2), run.tokens + 1))
    ids = np.minimum(rng.zipf(1.3, n), run.vocabulary) - 1
    tokens = [run.hostile[k % len(run.hostile)] if run.hostile and k < 99 else _text(k) for k in ids.tolist()]
    prompt = run.hostile[i % len(run.hostile)] if run.hostile else f"What is {i} plus {i}?"
    p = -rng.gamma(0.5, 1.0, n)
    q = p + rng.normal(-0.2 * (1 - done), 0.5, n) - 3.0 * (1 - done) * (np.arange(n) == 0)
    q = np.minimum(q, -1e-4)
    row: dict[str, Any] = {
        "task": run.tasks[i % len(run.tasks)] if run.tasks else None,
        "prompt_id": i,
        "sample": 0,
        "prompt": prompt,
        "student_reads": f"<|user|>{prompt}<|end|>",
        "teacher_reads": f"<|system|>Answer in a few words.<|end|><|user|>{prompt}<|end|>",
        "response": "".join(tokens),
        "reward": float(rng.random() < 0.3 + run.gain * done),
        "finished": bool(rng.random() < 0.9),
        "sampler_version": 0,
        "response_ids": ids.tolist(),
        "response_tokens": tokens,
        "sampler_logp": p.tolist(),
    }
    if numbers:
        row |= {"policy_logp": p.tolist(), "teacher_logp": q.tolist(), "weight": [1.0] * n, "advantage": None}
    if not run.old:
        row |= _new(run, tokens, p, q, rng, looked)
        row |= {"prompt_messages": json.dumps([{"role": "user", "content": prompt}])}
        row |= {"answer": str(2 * i), "extracted": run.extracted or str(2 * i + 1)}
    if run.pictures:
        row |= _seen(run, i, rng)
    return row


BOX = (3, 4, 11, 12)  # of all images


def _seen(run: FakeRun, i: int, rng: np.random.Generator) -> dict[str, Any]:
    """The images of a prompt: the teacher's has a box, and the response is a place."""
    assert run.pictures is not None
    width, height = run.pictures
    x, y = (int(rng.integers(0, side)) for side in run.pictures)
    seen = {who: [{"image": name_of(who, i), "width": width, "height": height}] for who in ("images", "teacher_images")}
    return {**seen, "box": list(BOX), "response": f"({x}, {y})", "answer": "(07,08)"}


def name_of(who: str, i: int) -> str:
    """The name of an image: of the student's (`images`) or the teacher's, of a prompt."""
    return hashlib.sha256(f"{who} {i}".encode()).hexdigest()[:32]


def _copies(folder: Path, run: FakeRun) -> None:
    """The first `copies` prompts' images as PNG: noise, with a green box for the teacher."""
    from PIL import Image, ImageDraw

    assert run.pictures is not None
    folder.mkdir(exist_ok=True)
    for i in [*range(run.prompts), *range(1000, 1000 + run.rows)][: run.copies]:
        pixels = np.random.default_rng(i).integers(0, 256, (run.pictures[1], run.pictures[0], 3), np.uint8)
        for who in ("images", "teacher_images"):
            picture = Image.fromarray(pixels)
            if who == "teacher_images":
                ImageDraw.Draw(picture).rectangle((BOX[0], BOX[1], BOX[2] - 1, BOX[3] - 1), outline="green")
            picture.save(folder / f"{name_of(who, i)}.png")


def _new(run: FakeRun, tokens: list[str], p: Any, q: Any, rng: np.random.Generator, looked: bool) -> dict[str, Any]:
    """The columns per token that format 1 added."""
    n = len(tokens)
    out: dict[str, Any] = {"trained": [True] * n, "turn": [0] * n, "signal": (np.abs(q - p) * 0.7).tolist()}
    if run.turns:
        out["turn"] = (np.arange(n) // 4).tolist()
        out["trained"] = (
            (np.arange(n) % 4 > 0) | (np.arange(n) < 4)
        ).tolist()  # an answer, then three tokens of the student
        count = (n - 1) // 4 + 1
        out["turn_rewards"] = [None] * (count - 1) + [1.0]
        out["turn_errors"] = [1] + [0] * (count - 1)
        out["conversation"] = json.dumps({"turns": count, "tool_errors": 1, "turn_limit": 1})
    for model, logp in (("student", p), ("teacher", q)) if looked else ():
        others = np.minimum(rng.zipf(1.3, (n, 5)), run.vocabulary) - 1
        tops = np.sort(-rng.gamma(1.0, 2.0, (n, 5)), axis=1)[:, ::-1]
        tops[:, 0] = np.maximum(tops[:, 0], logp)
        out[f"{model}_entropy"] = rng.gamma(1.0, 0.5, n).tolist()
        out[f"{model}_top_ids"] = others.tolist()
        out[f"{model}_top_logp"] = tops.tolist()
        out[f"{model}_top_tokens"] = [[_text(k) for k in row] for row in others.tolist()]
    if not looked:
        return out
    out["teacher_rank"] = rng.integers(0, 4, n).tolist()
    if run.units:
        edges = [*range(0, n, 2), n]
        out["units"] = [
            {"student_start": a, "student_end": b, "teacher_start": i, "teacher_end": i + 1}
            for i, (a, b) in enumerate(pairwise(edges))
        ]
        out["teacher_tokens"] = ["".join(tokens[a:b]) for a, b in pairwise(edges)]
    return out


def _text(k: int) -> str:
    """The text of an id, words first."""
    return WORDS[k] if k < len(WORDS) else f" w{k}"
