"""What torchrun starts for the tests of a sharded model's whole weights: `over.py FILE` writes what it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from opd.errors import TrainingError
from opd.models import saving
from opd.models.root import Root
from opd.parallel import World, join
from opd.teachers.local import log_probs
from support.models import tiny

IDS = [1, 5, 3, 7, 2]


def found(world: World) -> dict[str, Any]:
    """Differences from an unsharded model, and how many layers were whole at once."""
    alone = tiny("llama_tied", layers=4)
    wanted = log_probs(alone, IDS)
    lm = tiny("llama_tied", layers=4)
    root, blocks = Root(lm.model), lm.blocks()  # FSDP changes their classes, by which they are found
    world.shard(root, blocks)
    most = [0]

    def count(*_: Any) -> None:
        most[0] = max(most[0], sum(not sharded(block) for block in blocks))

    for block in blocks:
        block.get_submodule("self_attn").register_forward_pre_hook(count)
    own = world.over(root, lambda: log_probs(lm, IDS))
    at_once, after = most[0], all(map(sharded, blocks)) and sharded(root)
    with world.gathered(root):
        inside = world.over(root, lambda: log_probs(lm, IDS))
        whole_inside = sum(not sharded(block) for block in blocks)
    copied = saving.whole(lm, world, lambda: tiny("llama_tied", layers=4, seed=3))
    apart = [0.0]
    if copied is not None:
        pairs = zip(copied.model.parameters(), alone.model.parameters(), strict=True)
        apart = [float((one - other).detach().abs().max()) for one, other in pairs]
    return {
        "apart": float((own - wanted).abs().max()),
        "apart_inside": float((inside - wanted).abs().max()),
        "most": at_once,
        "sharded_after": after,
        "whole_inside": whole_inside,
        "copied": world.gather(copied is not None),
        "copy_apart": max(apart),
        "told": world.gather(said(world)),
        "value": world.gather(world.by_main(lambda: world.rank)),
    }


def sharded(module: torch.nn.Module) -> bool:
    return all(hasattr(parameter, "full_tensor") for parameter in module.parameters())


def said(world: World) -> str:
    """The error that the main process raises, as this one sees it."""

    def fail() -> None:
        raise TrainingError(f"no room in process {world.rank}")

    try:
        world.by_main(fail)
    except TrainingError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    with join() as world:
        result = found(world)
        if world.main:
            Path(sys.argv[1]).write_text(json.dumps(result))
