"""A group of processes over gloo, with what vLLM needs of its NCCL communicator. Imports torch alone."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

c10d: Any = torch.distributed  # some of its names have no types


class GlooGroup:
    """Broadcasts between the trainer, rank 0, and the workers; a `Group` of `opd.engines.transfer`."""

    def __init__(self, address: str, port: int, rank: int, size: int, limit_s: float) -> None:
        within = timedelta(seconds=limit_s)
        store = c10d.TCPStore(address, port, size, rank == 0, within, wait_for_workers=False)
        options = c10d.ProcessGroupGloo._Options()
        options._devices = [c10d.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = within
        self.device = torch.device("cpu")
        self.group = c10d.ProcessGroupGloo(c10d.PrefixStore("weights", store), rank, size, options)

    def broadcast(self, tensor: Tensor, src: int = 0, stream: object = None) -> None:
        """As vLLM's communicator, but it has ended when this returns."""
        options = c10d.BroadcastOptions()
        options.rootRank = src
        self.group.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        """vLLM calls this at its end."""
