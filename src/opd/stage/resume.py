"""The contents of a stage's checkpoint, and how a stage continues from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from opd.models.language_model import LanguageModel
from opd.parallel import World
from opd.stage import checkpoint
from opd.stage.checkpoint import Checkpoint
from opd.stage.optimisation import StageOptimisation
from opd.stage.optimisers import MOMENTS
from opd.types import Memory, Teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Everything that training changes: a checkpoint saves it, and a resumed stage restores it."""

    student: LanguageModel
    teacher: Teacher
    optimisation: StageOptimisation
    memory: Mapping[str, Memory]  # of the method, by name
    peers: Sequence[Trained] = ()  # other models of the stage: in the same checkpoint, so that all are of one step

    @property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors by group and name; the groups of peer i begin with `peer{i}.`."""
        tensors = {"student": {name: p.detach() for name, p in self.student.trainable().items()}}
        tensors |= self.optimisation.optimiser.tensors()
        tensors |= {f"method.{name}": dict(one.tensors()) for name, one in self.memory.items()}
        if state := self.teacher.state_dict():
            tensors["teacher"] = state
        for i, peer in enumerate(self.peers):
            tensors |= {f"peer{i}.{group}": named for group, named in peer.tensors.items()}
        return tensors

    @property
    def sharded(self) -> dict[str, Mapping[str, Tensor]]:
        """The groups that are sharded as the trained weights are, with these."""
        moments = [f"{part}.{key}" for part, keys in MOMENTS.items() for key in keys]
        groups = ["student", *moments, *(f"method.{name}" for name in self.memory)]
        like: dict[str, Mapping[str, Tensor]] = dict.fromkeys(groups, self.student.trainable())
        for i, peer in enumerate(self.peers):
            like |= {f"peer{i}.{group}": named for group, named in peer.sharded.items()}
        return like

    def save(
        self,
        folder: Path,
        step: int,
        *,
        seconds: float,
        remembered: Sequence[Mapping[str, Any]],
        keep: int,
        world: World,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Write a checkpoint after `step` updates with `seconds` of training so far; keep the newest `keep`.

        `remembered`: the state of each memory at that time, of this model and then of each peer. `more`: JSON that the
        checkpoint's state holds besides.
        """
        states = [
            {
                "updates": one.optimisation.updates,
                "method": {name: state for name, state in memory.items() if state},
            }
            for one, memory in zip((self, *self.peers), remembered, strict=True)
        ]
        state = {"seconds": seconds, **states[0], **more} | ({"peers": states[1:]} if self.peers else {})
        checkpoint.save(folder, step, tensors=self.tensors, state=state, keep=keep, world=world)

    def restore(self, folder: Path, world: World) -> Checkpoint | None:
        """Restore the last checkpoint of `folder` and return it; None if there is none."""
        if world.main:
            checkpoint.sweep(folder)
        world.wait()
        last = checkpoint.latest(folder)
        if last is None:
            return None
        saved = checkpoint.load(last, like=self.sharded)
        self._take(saved.tensors, saved.state)
        for i, (peer, state) in enumerate(zip(self.peers, saved.state.get("peers", ()), strict=True)):
            start = f"peer{i}."
            own = {g.removeprefix(start): named for g, named in saved.tensors.items() if g.startswith(start)}
            peer._take(own, state)
        return saved

    def _take(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.student.trainable().items():
                parameter.copy_(tensors["student"][name])
        self.teacher.load_state_dict(tensors.get("teacher", {}))
        self.optimisation.optimiser.restore(tensors, state["updates"])
        for name, one in self.memory.items():
            one.load_state_dict(state["method"].get(name, {}), tensors.get(f"method.{name}", {}))
