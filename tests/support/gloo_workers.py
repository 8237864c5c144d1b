"""Runs in a worker of vLLM on a CPU, `--worker-extension-cls support.gloo_workers.Loader`: without NCCL and CUDA.

Everything else of vLLM's weight transfer engine "nccl" is its own: routes, updates, buckets, and the model's loading.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed.weight_transfer import nccl_engine, packed_tensor  # type: ignore[import-not-found]

from opd.engines.worker import WeightLoader as Loader
from support.gloo import GlooGroup

__all__ = ["Loader"]
LIMIT_S = 120.0


def joined(info: Any, parallel: Any) -> GlooGroup:
    """The group of the trainer, as `worker_init_process_group` makes it with one data-parallel rank."""
    rank = info.rank_offset + parallel.rank
    return GlooGroup(info.master_address, info.master_port, rank, info.world_size, LIMIT_S)


nccl_engine.worker_init_process_group = joined
packed_tensor._get_streams = lambda device, number: (SimpleNamespace(synchronize=lambda: None),) * number
packed_tensor.torch = SimpleNamespace(
    **{name: getattr(torch, name) for name in ("empty", "uint8", "Tensor", "cat", "dtype")},
    cuda=SimpleNamespace(stream=contextlib.nullcontext),
    accelerator=SimpleNamespace(current_device_index=lambda: 0),
)
