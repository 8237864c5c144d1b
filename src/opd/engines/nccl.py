"""The NCCL group of a trainer and vLLM's workers, by vLLM's own classes. Written for vLLM 0.32; never run on GPUs.

torch's own process groups cannot join this one: they make the NCCL id themselves, and vLLM's workers wait for one in a
pickled object of vLLM's store. So the trainer's environment needs the package vllm, with the servers' version of NCCL.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd.errors import TrainingError


def lacking() -> str | None:
    """Why this environment cannot send weights by NCCL; None if it can."""
    if not torch.cuda.is_available():
        return "torch finds no GPU in this process"
    if importlib.util.find_spec("vllm") is None:
        return "the package vllm, whose classes join the servers' group, is not in this environment"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class NcclGroup:
    """A `Group` of `transfer`."""

    device: torch.device
    communicator: Any

    def broadcast(self, tensor: Tensor) -> None:
        """Send `tensor`, on `device`, to all workers, and wait until it is sent. No time limit."""
        with torch.cuda.device(self.device):  # a thread begins with device 0
            stream = torch.cuda.current_stream()
            self.communicator.broadcast(tensor, src=0, stream=stream)
            stream.synchronize()


def nccl_group(device: torch.device, address: str, port: int, size: int, limit_s: float) -> NcclGroup:
    """Wait at address:port for `size` - 1 workers, and join them as rank 0 with the GPU `device`.

    Raises TrainingError if vLLM finds no NCCL library: its communicator would send nothing, without an error.
    """
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator  # type: ignore[import-not-found]
    from vllm.distributed.utils import StatelessProcessGroup  # type: ignore[import-not-found]

    with torch.cuda.device(device):
        device = torch.device("cuda", torch.cuda.current_device())  # with a number, as its tensors have
        group = StatelessProcessGroup.create(
            host=address, port=port, rank=0, world_size=size, store_timeout=max(1, int(limit_s))
        )
        communicator = PyNcclCommunicator(group, device=device)
    if communicator.disabled:
        raise TrainingError(
            "vLLM finds no NCCL library in the trainer's environment, so no weights can be sent to the engine. Install "
            "the package vllm for GPUs, unset VLLM_DISABLE_PYNCCL, or set `weights: full`."
        )
    return NcclGroup(device=device, communicator=communicator)
