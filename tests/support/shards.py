"""What torchrun starts for the test of AdamW on shards: `shards.py FILE` writes the weights after some updates."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from opd.parallel import World, join, whole_tensor
from opd.recipe.schema import OptimizerSection
from opd.stage import optimisers

UPDATES = 4
# The bias of the second layer has one row: a process has no part of it.
WIDTHS = ((5, 7), (7, 1))


def updated(world: World, *, fused: bool) -> dict[str, Tensor]:
    """Weights, moments and counts after `UPDATES` updates with fixed gradients, whole."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(*width) for width in WIDTHS))
    world.shard(module, [])
    # No clipping: the norm's sum over two processes rounds in another order.
    section = OptimizerSection(learning_rate=0.01, weight_decay=0.1, schedule="constant", max_grad_norm=1e9)
    optimiser = optimisers.build(dict(module.named_parameters()), section, UPDATES)
    assert optimiser.parts["adamw"].param_groups[0]["fused"]
    optimiser.parts["adamw"].param_groups[0]["fused"] = fused
    generator = torch.Generator().manual_seed(1)
    for _ in range(UPDATES):
        for parameter in optimiser.parameters.values():
            parameter.grad = like(parameter, torch.randn(parameter.shape, generator=generator))
        optimiser.clip()
        optimiser.step()
    state = {f"{group}/{name}": t for group, named in optimiser.tensors().items() for name, t in named.items()}
    return {name: whole_tensor(t.detach()) for name, t in (optimiser.parameters | state).items()}


def like(parameter: Tensor, whole: Tensor) -> Tensor:
    """This process's part of `whole`, cut as the parameter is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    return (
        distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        if isinstance(parameter, DTensor)
        else whole
    )


if __name__ == "__main__":
    with join() as world:
        results = {fused: updated(world, fused=fused) for fused in (True, False)}
        if world.main:
            torch.save(results, Path(sys.argv[1]))
