"""The contents of a stage's checkpoint, and how a stage continues from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opd.models.language_model import LanguageModel
from opd.parallel import World
from opd.stage import checkpoint
from opd.stage.checkpoint import Checkpoint
from opd.stage.optimisation import StageOptimisation
from opd.types import Memory, Teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Everything that training changes: a checkpoint saves it, and a resumed stage restores it."""

    student: LanguageModel
    teacher: Teacher
    optimisation: StageOptimisation
    memory: Mapping[str, Memory]  # of the method, by name

    def save(
        self, folder: Path, step: int, *, seconds: float, remembered: Mapping[str, Any], keep: int, world: World
    ) -> None:
        """Write a checkpoint after `step` updates with `seconds` of training so far; keep the newest `keep`.

        `remembered`: the state of each memory at that time.
        """
        tensors = {"student": {name: p.detach() for name, p in self.student.trainable().items()}}
        tensors |= self.optimisation.optimiser.tensors()
        tensors |= {f"method.{name}": dict(one.tensors()) for name, one in self.memory.items()}
        if state := self.teacher.state_dict():
            tensors["teacher"] = state
        checkpoint.save(
            folder,
            step,
            tensors=tensors,
            state={
                "seconds": seconds,
                "updates": self.optimisation.updates,
                "method": {name: state for name, state in remembered.items() if state},
            },
            keep=keep,
            world=world,
        )

    def restore(self, folder: Path, world: World) -> Checkpoint | None:
        """Restore the last checkpoint of `folder` and return it; None if there is none."""
        if world.main:
            checkpoint.sweep(folder)
        world.wait()
        last = checkpoint.latest(folder)
        if last is None:
            return None
        trained = self.student.trainable()
        sharded = ["student", "adamw.exp_avg", "adamw.exp_avg_sq", *(f"method.{name}" for name in self.memory)]
        saved = checkpoint.load(last, like=dict.fromkeys(sharded, trained))
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved.tensors["student"][name])
        self.teacher.load_state_dict(saved.tensors.get("teacher", {}))
        self.optimisation.optimiser.restore(saved.tensors, saved.state["updates"])
        for name, one in self.memory.items():
            one.load_state_dict(saved.state["method"].get(name, {}), saved.tensors.get(f"method.{name}", {}))
        return saved
