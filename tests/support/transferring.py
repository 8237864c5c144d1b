"""A small server with the routes of vLLM's weight transfer engine, and a group in this process instead of NCCL's."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from support.engines import Engine, refused
from support.gloo import GlooGroup
from support.http_server import Said

ROUTES = (
    "/get_world_size",
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/pause?mode=keep",
    "/resume",
)


@dataclass
class TransferringEngine(Engine):
    """Gets its weights from the line of a `Line`, or `over_gloo` from a trainer in another process.

    `calls` are the requests about it, in order, with their bodies.
    """

    name: str = "student"
    longest: int = 512
    workers: int = 1
    active: bool = False  # an update is open
    dead: bool = False  # tokens were requested while an update was open
    line: queue.Queue[torch.Tensor] = field(default_factory=queue.Queue)
    received: dict[str, torch.Tensor] = field(default_factory=dict)
    over_gloo: bool = False
    group: GlooGroup | None = None
    parts: list[int] = field(default_factory=list)  # bytes of each broadcast

    @property
    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        return [(one.target[1:], one.request) for one in self.arrived if one.target in ROUTES]

    def _said(self, target: str, request: dict[str, Any], ids: Any) -> Said:
        self.dead |= self.active and len(ids) > 0
        if self.dead:
            return refused(500, "EngineCore encountered an issue.")
        if target not in ROUTES:
            return super()._said(target, request, ids)
        if not self.dev:
            return refused(404, "Not Found")
        if target == "/get_world_size":
            return Said(body={"world_size": self.workers})
        if target == "/init_weight_transfer_engine" and self.over_gloo:
            told = request["init_info"]
            place = (told["master_address"], told["master_port"], told["rank_offset"])
            self.group = GlooGroup(*place, told["world_size"], limit_s=20.0)
        if target == "/start_weight_update":
            if self.active:
                return refused(500, "start_weight_update called while a weight update is already active.")
            self.active, self.received = True, {}
        if target == "/update_weights":
            self._receive(**request["update_info"])
        if target == "/finish_weight_update" and not self.active:
            return refused(500, "finish_weight_update called without a matching start_weight_update.")
        if target == "/finish_weight_update":
            self.lm.causal_lm.load_state_dict(self.received, strict=False)
            self.active, self.version = False, request.get("weight_version", self.version)
        return Said(body={"message": "ok"})

    def _receive(self, names: Sequence[str], dtype_names: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
        """As vLLM's consumer: a bucket ends with the tensor by which it has more bytes than it may have."""
        init = next(request for target, request in self.calls if target == "init_weight_transfer_engine")
        limit = init["init_info"]["packed_buffer_size_bytes"]
        waiting: list[tuple[str, torch.dtype, Sequence[int], int]] = []
        for name, dtype_name, shape in zip(names, dtype_names, shapes, strict=True):
            dtype = getattr(torch, dtype_name)
            waiting.append((name, dtype, shape, math.prod(shape) * dtype.itemsize))
            if sum(one[-1] for one in waiting) > limit:
                self._unpack(waiting)
                waiting = []
        if waiting:
            self._unpack(waiting)

    def _unpack(self, parts: Sequence[tuple[str, torch.dtype, Sequence[int], int]]) -> None:
        if self.group is None:
            packed = self.line.get(timeout=20.0)
        else:
            packed = torch.empty(sum(one[-1] for one in parts), dtype=torch.uint8)
            self.group.broadcast(packed)
        self.parts.append(packed.numel())
        assert packed.dtype == torch.uint8
        for (name, dtype, shape, _), values in zip(parts, packed.split([one[-1] for one in parts]), strict=True):
            self.received[name] = values.clone().view(dtype).view(*shape)


@dataclass
class Line:
    """Sends to servers of this process; a `Group` of `opd.engines.transfer`. `stuck`: as NCCL without a receiver."""

    engines: Sequence[TransferringEngine]
    stuck: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    joined: list[tuple[str, int]] = field(default_factory=list)  # addresses, and the sizes of the groups

    def join(self, address: str, port: int, size: int, limit_s: float) -> Line:
        self.joined.append((address, size))
        return self

    def broadcast(self, tensor: torch.Tensor) -> None:
        if self.stuck:
            threading.Event().wait()
        for one in self.engines:
            one.line.put(tensor.clone())
