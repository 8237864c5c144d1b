"""The command `opd` with gloo in the place of NCCL for `weights: transfer`: `python -m support.over_gloo train ...`."""

from __future__ import annotations

import torch

from opd.cli import main
from opd.engines import nccl
from opd.runs import weights
from support.gloo import GlooGroup


def joined(device: torch.device, address: str, port: int, size: int, limit_s: float) -> GlooGroup:
    """As `nccl_group`."""
    return GlooGroup(address, port, 0, size, limit_s)


if __name__ == "__main__":
    nccl.lacking = lambda: None
    weights.nccl_group = joined  # type: ignore[assignment]
    main()
