"""What studies share: small models on the addition task, trained through recipes and kept by the hash of their making.

The task is `opd.tasks.addition` with two digits: a chain of at most 21 characters and the end token, over a vocabulary
of 17. A pair is a teacher that learned it from many worked sums, and a student that saw a few.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from opd.loading import cache_dir

SOURCE = Path(__file__).parents[1]
LONGEST = 28  # tokens of a response
FINAL_STEPS = 10  # a run's own numbers are means over its last steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Folders of two trained models with the same tokenizer."""

    teacher: Path
    student: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSize:
    """How large the models are and how long they learn; a student's accuracy is in its hands."""

    teacher: Mapping[str, int] = field(
        default_factory=lambda: {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3}
    )
    student: Mapping[str, int] = field(
        default_factory=lambda: {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    )
    teacher_steps: int = 250
    student_steps: int = 150
    prompts_per_step: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A finished distillation: where its model is, and its numbers by metric name."""

    model: Path
    before: Mapping[str, float]  # held out, empty if it was not measured
    after: Mapping[str, float]  # held out
    last: Mapping[str, float]  # training metrics, means over the last steps
    rows: Sequence[Mapping[str, float]]  # all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """Where models are kept, and who hears what is going on."""

    folder: Path = field(default_factory=lambda: cache_dir() / "studies")
    note: Callable[[str], None] = lambda text: None

    def run(self, recipe: Mapping[str, Any]) -> Path:
        """Run a recipe, or find that it has been run; the run's folder.

        Its place is the hash of the recipe and of the library's own source, so that no model outlives what made it.
        Raises the kinds of `opd.errors`.
        """
        from opd.api import run

        folder = self.folder / self.fingerprint(recipe)
        if not all((folder / stage["name"] / "done.json").exists() for stage in recipe["stages"]):
            self.note(f"training {recipe['name']}: {', '.join(stage['name'] for stage in recipe['stages'])}")
            with warnings.catch_warnings():
                # The raw form says that it is biased, and a study that trains with it shows that.
                warnings.filterwarnings("ignore", message="form='raw' is biased")
                run({**recipe, "output_dir": str(folder)}, quiet=True)
        return folder

    def fingerprint(self, recipe: Mapping[str, Any]) -> str:
        """16 hexadecimal digits of a recipe and the library; where the cache itself lies does not count."""
        text = json.dumps(recipe, sort_keys=True).replace(str(self.folder), "")
        return hashlib.sha256(f"{text}{library_digest()}".encode()).hexdigest()[:16]

    def pair(self, seed: int, size: PairSize | None = None) -> Pair:
        """A teacher and a student that knows little, both of their own seed."""
        folder = self.run(pair_recipe(seed, size or PairSize()))
        return Pair(teacher=folder / "teacher" / "model", student=folder / "warm-up" / "model")

    def distil(
        self, pair: Pair, *, seed: int, method: str, options: Mapping[str, Any] | None = None, **stage: Any
    ) -> Trained:
        """One stage from a pair, evaluated on held-out sums; further keywords are fields of a recipe's stage."""
        from opd.rundir import RunDir

        folder = self.run(distil_recipe(pair, seed, method, options or {}, stage))
        there = RunDir(folder).stage("distil")
        rows = there.read_metrics()
        before = [row for row in rows if row["step"] == 0]
        steps = [row for row in rows if "train/loss" in row]
        tail = steps[-FINAL_STEPS:]
        names = set(tail[-1]) - {"step"}
        return Trained(
            model=there.model,
            before=before[0] if before else {},
            after=next(row for row in reversed(rows) if any(name.startswith("eval/") for name in row)),
            last={name: sum(row[name] for row in tail) / len(tail) for name in sorted(names)},
            rows=steps,
        )


def pair_recipe(seed: int, size: PairSize) -> dict[str, Any]:
    """The recipe of a pair: the teacher from 3,500 worked sums, the student from 128."""
    return {
        "name": "pair",
        "seed": seed,
        "models": {"teacher": _new(size.teacher), "student": _new(size.student)},
        "defaults": {
            "method": "sft",
            "prompts_per_step": size.prompts_per_step,
            "checkpoint": {"every": 100_000, "keep": 1},
            "samples_every": 0,
        },
        "stages": [
            {
                "name": "teacher",
                "train": "teacher",
                "data": sums(3500, seed=1),
                "steps": size.teacher_steps,
                "optimizer": _optimizer(3e-3, 20),
            },
            {
                "name": "warm-up",
                "train": "student",
                "data": sums(128, seed=2),
                "steps": size.student_steps,
                "optimizer": {"learning_rate": 1e-3, "betas": [0.9, 0.99]},
            },
        ],
    }


def distil_recipe(
    pair: Pair, seed: int, method: str, options: Mapping[str, Any], stage: Mapping[str, Any]
) -> dict[str, Any]:
    """The recipe of one stage from a pair: 32 sums a step, and 200 held-out sums at the end."""
    settings = {
        "sampling": {"max_completion_length": LONGEST},
        "prompts_per_step": 32,
        "steps": 60,
        "optimizer": _optimizer(3e-3, 5),
        "evaluate": held_out(),
        **stage,
    }
    return {
        "name": f"{method.rpartition(':')[2]}-{seed}".replace("_", "-"),
        "seed": seed,
        "models": {"teacher": {"path": str(pair.teacher)}, "student": {"path": str(pair.student)}},
        "stages": [
            {
                "name": "distil",
                "train": "student",
                "teacher": "teacher",
                "method": method,
                "options": dict(options),
                "data": sums(3000, seed=3),
                "checkpoint": {"every": 100_000, "keep": 1},
                "samples_every": 0,
                **settings,
            }
        ],
    }


def held_out(**more: Any) -> dict[str, Any]:
    """An evaluate section: 200 held-out sums, greedy and sampled."""
    return {
        "data": sums(200, part="held_out"),
        "reward": {"name": "final_number"},
        "sampling": {
            "greedy": {"temperature": 0, "max_completion_length": LONGEST},
            "sampled": {"temperature": 1, "max_completion_length": LONGEST},
        },
        "before": False,
        **more,
    }


def sums(count: int, **options: Any) -> dict[str, Any]:
    """A data section of two-digit sums."""
    return {"path": "opd.tasks:addition", "options": {"digits": 2, "count": count, **options}}


@cache
def library_digest() -> str:
    """A hash of the source of all that trains: the library without command and studies, whose recipes speak for them.

    Methods that only studies have are part of it.
    """
    digest = hashlib.sha256()
    for file in sorted(SOURCE.rglob("*.py")):
        if file.name == "cli.py" or (file.parent.name == "studies" and file.name != "methods.py"):
            continue
        digest.update(file.relative_to(SOURCE).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def _new(size: Mapping[str, int]) -> dict[str, Any]:
    return {
        "init": {
            "model_type": "llama",
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            **size,
        },
        "tokenizer": {"characters": "0123456789+=,;"},
    }


def _optimizer(learning_rate: float, warmup: int) -> dict[str, Any]:
    return {"learning_rate": learning_rate, "betas": [0.9, 0.99], "schedule": "cosine", "warmup_steps": warmup}
