"""Distillations of pairs as recipes, run in parallel, and their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_studies.lab.lab import ADDITION, Lab, Pair, Task, optimizer

FINAL_STEPS = 10  # training metrics are means over the last steps


HELD_OUT = 200  # prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """Teacher, student, method with its options, and fields of the stage that differ from the default."""

    pair: Pair
    seed: int
    method: str
    task: Task = ADDITION
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    stage: Mapping[str, Any] = field(default_factory=dict[str, Any])
    models: Mapping[str, Any] = field(default_factory=dict[str, Any])  # further model sections, or other ones

    @property
    def recipe(self) -> dict[str, Any]:
        """A recipe of one stage: 64 prompts per step, 150 steps, and an evaluation at the end."""
        paths = {"teacher": self.pair.teacher, "student": self.pair.student}
        unused = {"teacher"} if self.stage.get("teacher", "teacher") is None else frozenset[str]()
        return {
            "name": f"{self.method.rpartition(':')[2]}-{self.seed}".translate(str.maketrans("_+", "--")),
            "seed": self.seed,
            "models": {name: {"path": str(path)} for name, path in paths.items() if name not in unused}
            | dict(self.models),
            "stages": [
                {
                    "name": "distil",
                    "train": "student",
                    "teacher": "teacher",
                    "method": self.method,
                    "options": dict(self.options),
                    "data": self.task.rows(3000, seed=3),
                    "checkpoint": {"every": 100_000, "keep": 1},
                    "samples_every": 0,
                    "sampling": {"max_completion_length": self.task.longest},
                    "prompts_per_step": 64,
                    "steps": 150,
                    "optimizer": optimizer(2e-3, 10),
                    "evaluate": held_out(self.task),
                    **self.stage,
                }
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A finished stage: the folder of its model, and its numbers by metric name."""

    model: Path
    before: Mapping[str, float]  # held out, empty if not measured
    after: Mapping[str, float]  # held out, empty if not measured
    last: Mapping[str, float]  # training metrics, means over the last steps
    rows: Sequence[Mapping[str, float]]  # all rows of training metrics
    evaluations: Sequence[Mapping[str, float]]  # all evaluations, including `before`


def distil_all(lab: Lab, distillations: Sequence[Distillation]) -> list[Trained]:
    """Run the missing distillations, `lab.workers` in parallel, and read all. Raises the kinds of `opd.errors`."""
    return [read(folder, "distil") for folder in lab.run_all([one.recipe for one in distillations])]


def read(folder: Path, stage: str, peer: str | None = None) -> Trained:
    """The numbers of a finished run's stage, or of one of its peers. Raises RunError for damaged metrics."""
    from opd.stage.folder import RunDir

    there = RunDir(folder).stage(stage)
    there = there if peer is None else there.of_peer(peer)
    rows = there.read_metrics()
    steps = [row for row in rows if "train/loss" in row]
    evaluations = [row for row in rows if any(name.startswith("eval/") for name in row)]
    tail = steps[-FINAL_STEPS:]
    names = set.intersection(*(set(row) for row in tail)) - {"step"}
    return Trained(
        model=there.model,
        before=next((row for row in evaluations if row["step"] == 0), {}),
        after=evaluations[-1] if evaluations and evaluations[-1]["step"] else {},
        last={name: sum(row[name] for row in tail) / len(tail) for name in sorted(names)},
        rows=steps,
        evaluations=evaluations,
    )


def held_out(task: Task, **more: Any) -> dict[str, Any]:
    """An evaluate section: held-out prompts, greedy and sampled, with exact reverse KL on the sampled responses."""
    return {
        "data": task.rows(HELD_OUT, part="held_out"),
        "reward": {"name": task.reward},
        "sampling": {
            "sampled": {"temperature": 1, "max_completion_length": task.longest},
            "greedy": {"temperature": 0, "max_completion_length": task.longest},
        },
        "kl": True,
        "before": False,
        **more,
    }
