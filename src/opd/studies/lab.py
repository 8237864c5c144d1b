"""What studies share: small models on the addition task, trained through recipes and kept by the hash of their making.

The task is `opd.tasks.addition` with two digits: a chain of at most 21 characters and the end token, over a vocabulary
of 16. A pair is a teacher that learned it from many worked sums, and a smaller student that saw fewer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from opd.loading import cache_dir

SOURCE = Path(__file__).parents[1]
LONGEST = 28  # tokens of a response


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Folders of two trained models with the same tokenizer."""

    teacher: Path
    student: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSize:
    """How large the models are and how long they learn; how good the student is at the start depends on it."""

    teacher: Mapping[str, int] = field(
        default_factory=lambda: {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3}
    )
    student: Mapping[str, int] = field(
        default_factory=lambda: {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    )
    teacher_steps: int = 250
    student_steps: int = 200
    student_sums: int = 600
    prompts_per_step: int = 64


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
            run({**recipe, "output_dir": str(folder)}, quiet=True)
        return folder

    def fingerprint(self, recipe: Mapping[str, Any]) -> str:
        """16 hexadecimal digits of a recipe and the library; where the cache itself lies does not count."""
        text = json.dumps(recipe, sort_keys=True).replace(str(self.folder), "")
        return hashlib.sha256(f"{text}{library_digest()}".encode()).hexdigest()[:16]

    def pair(self, seed: int, size: PairSize | None = None) -> Pair:
        """A teacher and a student that knows less, both of their own seed."""
        size = size or PairSize()
        teacher = self.run(teacher_recipe(seed, size)) / "teacher" / "model"
        return Pair(teacher=teacher, student=self.run(student_recipe(seed, size)) / "warm-up" / "model")


def teacher_recipe(seed: int, size: PairSize) -> dict[str, Any]:
    """The recipe of a teacher: 3,500 worked sums."""
    stage = {"name": "teacher", "train": "teacher", "data": sums(3500, seed=1), "steps": size.teacher_steps}
    return _warm_up("teacher", seed, size.teacher, stage | {"optimizer": _optimizer(3e-3, 20)}, size)


def student_recipe(seed: int, size: PairSize) -> dict[str, Any]:
    """The recipe of a student: 600 worked sums, unless `size` says otherwise."""
    data = sums(size.student_sums, seed=2)
    stage = {"name": "warm-up", "train": "student", "data": data, "steps": size.student_steps}
    return _warm_up("student", seed, size.student, stage | {"optimizer": _optimizer(3e-3, 20)}, size)


def _warm_up(
    name: str, seed: int, model: Mapping[str, int], stage: Mapping[str, Any], size: PairSize
) -> dict[str, Any]:
    settings = {
        "method": "sft",
        "prompts_per_step": size.prompts_per_step,
        "checkpoint": {"every": 100_000, "keep": 1},
        "samples_every": 0,
    }
    return {"name": name, "seed": seed, "models": {name: _new(model)}, "stages": [{**stage, **settings}]}


def sums(count: int, **options: Any) -> dict[str, Any]:
    """A data section of two-digit sums."""
    return {"path": "opd.tasks:addition", "options": {"digits": 2, "count": count, **options}}


@cache
def library_digest() -> str:
    """A hash of the source of all that trains: the library without its command line and without studies."""
    digest = hashlib.sha256()
    for file in sorted(SOURCE.rglob("*.py")):
        if file.name == "cli.py" or file.parent.name == "studies":
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
