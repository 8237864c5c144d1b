"""Small models on made-up tasks, trained through recipes and cached by the hash of recipe and library.

A pair is a teacher that learned a task from many worked examples, and a smaller student that saw few. Two tasks: sums
of two numbers with a chain of thought (`opd.data.toy.addition`), and sorting digits (`opd.data.toy.sorting`). Responses
are short, so a distillation takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from time import process_time
from typing import Any

from opd.files import cache_dir

SOURCE = Path(__file__).parents[2]


LONGEST = 28  # tokens of the longest response to a sum


# Files of the studies that training depends on.
WORLDS = (
    *("answer_styles", "boundaries", "graders", "bad_habit_data", "half_keys", "lists", "methods", "nearly_sorted"),
    "older_weights",
    "sorting_kinds",
    "two_signs",
)
TRAINED_WITH = tuple(f"opd_studies/worlds/{name}.py" for name in WORLDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A made-up task: its data function, its reward, and the longest response."""

    data: str  # a data function, as in a recipe
    reward: str
    longest: int  # tokens
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    characters: str = "0123456789+=,;>"

    def rows(self, count: int, **options: Any) -> dict[str, Any]:
        """A data section of `count` rows."""
        return {"path": self.data, "options": {**self.options, "count": count, **options}}


ADDITION = Task(
    data="opd.data.toy:addition",
    reward="final_number",
    longest=LONGEST,
    options={"digits": 2},
    characters="0123456789+=,;",
)


SORTING = Task(data="opd.data.toy:sorting", reward="exact", longest=12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Folders of two trained models."""

    teacher: Path
    student: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSize:
    """A pair's task, model sizes and training lengths, which decide how good both models are."""

    task: Task = ADDITION
    teacher: Mapping[str, int] = field(
        default_factory=lambda: {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3}
    )
    student: Mapping[str, int] = field(
        default_factory=lambda: {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    )
    teacher_rows: int = 3500
    teacher_steps: int = 250
    student_rows: int = 600
    student_steps: int = 200
    prompts_per_step: int = 64
    teacher_merges: Sequence[tuple[str, str]] = ()  # of the teacher's tokenizer, if it differs from the student's
    student_merges: Sequence[tuple[str, str]] = ()


SORTERS = PairSize(
    task=SORTING,
    teacher={"hidden_size": 80, "intermediate_size": 240, "num_hidden_layers": 3},
    student={"hidden_size": 48, "intermediate_size": 144, "num_hidden_layers": 2},
    teacher_rows=20_000,
    teacher_steps=300,
    student_rows=128,
    student_steps=100,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """Runs recipes in parallel and caches their models in a folder."""

    folder: Path = field(default_factory=lambda: cache_dir() / "studies")
    workers: int = field(default_factory=lambda: min(os.cpu_count() or 1, 8))
    note: Callable[[str], None] = lambda text: None
    cpu: list[float] = field(default_factory=list[float])  # seconds of each training in another process

    def run(self, recipe: Mapping[str, Any]) -> Path:
        """Run a recipe unless cached; returns the run's folder. Raises the kinds of `opd.errors`."""
        return self.run_all([recipe])[0]

    def run_all(self, recipes: Sequence[Mapping[str, Any]]) -> list[Path]:
        """Run the recipes that are not cached, `workers` at a time; returns the folders of all, in order.

        A run's folder is named by the hash of its recipe and the library's source, so that a change of either runs it
        again. Each runs on one thread: the models are too small for more, and one thread makes numbers reproducible.
        Raises the kinds of `opd.errors`.
        """
        folders = [self.folder / self.fingerprint(recipe) for recipe in recipes]
        missing = {
            folder: recipe for folder, recipe in zip(folders, recipes, strict=True) if not _finished(folder, recipe)
        }
        if len(missing) == 1 or self.workers == 1:
            for folder, recipe in missing.items():
                self.note(f"training {recipe['name']}")
                _train(recipe, folder)
        elif missing:
            pool = _pool(self.workers)
            running = {pool.submit(_train, recipe, folder): recipe for folder, recipe in missing.items()}
            try:
                for done, finished in enumerate(as_completed(running), 1):
                    self.cpu.append(finished.result())
                    self.note(f"{done} of {len(missing)}: trained {running[finished]['name']}")
            except BrokenProcessPool:
                _pool.cache_clear()
                raise
            finally:  # after an error no training may continue
                for one in running:
                    one.cancel()
                wait(running)
        return folders

    def fingerprint(self, recipe: Mapping[str, Any]) -> str:
        """16 hexadecimal digits of the hash of a recipe and the library; the cache's own path does not count."""
        text = json.dumps(recipe, sort_keys=True).replace(str(self.folder), "")
        return hashlib.sha256(f"{text}{library_digest()}".encode()).hexdigest()[:16]

    def pair(self, seed: int, size: PairSize | None = None) -> Pair:
        """A teacher and a weaker student of this seed."""
        return self.pairs([seed], size)[0]

    def pairs(self, seeds: Sequence[int], size: PairSize | None = None) -> list[Pair]:
        """A pair for each seed."""
        size = size or PairSize()
        recipes = [recipe(seed, size) for seed in seeds for recipe in (teacher_recipe, student_recipe)]
        made = self.run_all(recipes)
        return [
            Pair(teacher=teacher / "teacher" / "model", student=student / "warm-up" / "model")
            for teacher, student in zip(made[::2], made[1::2], strict=True)
        ]


@cache
def _pool(workers: int) -> ProcessPoolExecutor:
    """Processes for the training of all calls: each imports the libraries once, which takes seconds.

    Spawned, because a forked copy of a process that has used torch's threads can hang.
    """
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


def teacher_recipe(seed: int, size: PairSize) -> dict[str, Any]:
    """The recipe of a teacher, which sees many worked examples."""
    data = size.task.rows(size.teacher_rows, seed=1)
    stage = {"name": "teacher", "train": "teacher", "data": data, "steps": size.teacher_steps}
    return _warm_up("teacher", seed, new_model(size.teacher, size.task.characters, size.teacher_merges), stage, size)


def student_recipe(seed: int, size: PairSize) -> dict[str, Any]:
    """The recipe of a student, which sees few."""
    data = size.task.rows(size.student_rows, seed=2)
    stage = {"name": "warm-up", "train": "student", "data": data, "steps": size.student_steps}
    return _warm_up("student", seed, new_model(size.student, size.task.characters, size.student_merges), stage, size)


def _warm_up(
    name: str, seed: int, model: Mapping[str, Any], stage: Mapping[str, Any], size: PairSize
) -> dict[str, Any]:
    settings = {
        "method": "sft",
        "prompts_per_step": size.prompts_per_step,
        "optimizer": optimizer(3e-3, 20),
        "checkpoint": {"every": 100_000, "keep": 1},
        "samples_every": 0,
    }
    return {
        "name": f"{name}-{seed}",
        "seed": seed,
        "models": {name: model},
        "stages": [{**stage, **settings}],
    }


def sums(count: int, **options: Any) -> dict[str, Any]:
    """A data section of two-digit sums."""
    return ADDITION.rows(count, **options)


def new_model(size: Mapping[str, int], characters: str, merges: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """A model section: a new small Llama of `size` with a tokenizer of characters and `merges`."""
    tokenizer: dict[str, Any] = {"characters": characters}
    if merges:
        tokenizer["merges"] = [list(merge) for merge in merges]
    return {
        "init": {
            "model_type": "llama",
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            **size,
        },
        "tokenizer": tokenizer,
    }


def optimizer(learning_rate: float, warmup: int) -> dict[str, Any]:
    """An optimizer section: `warmup` steps of rising learning rate, then a cosine down to 0."""
    return {"learning_rate": learning_rate, "betas": [0.9, 0.99], "schedule": "cosine", "warmup_steps": warmup}


@cache
def library_digest() -> str:
    """A hash of all sources that affect training: the library without its commands, and `TRAINED_WITH`."""
    digest = hashlib.sha256()
    for file in sorted(SOURCE.rglob("*.py")):
        name = file.relative_to(SOURCE).as_posix()
        if name == "opd/cli.py" or (name.startswith(("opd/commands/", "opd_studies/")) and name not in TRAINED_WITH):
            continue
        digest.update(name.encode() + file.read_bytes())
    return digest.hexdigest()


def _finished(folder: Path, recipe: Mapping[str, Any]) -> bool:
    return all((folder / stage["name"] / "done.json").exists() for stage in recipe["stages"])


def _train(recipe: Mapping[str, Any], folder: Path) -> float:
    """Train in this process; returns its CPU seconds."""
    import torch

    from opd.api import run

    started = process_time()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            # The raw form warns that it is biased, which the study shows on purpose.
            warnings.filterwarnings("ignore", message="form='raw' is biased")
            run({**recipe, "output_dir": str(folder)}, quiet=True)
    finally:
        torch.set_num_threads(threads)
    return process_time() - started
