"""A student's whole weights for vLLM's servers by its own weight transfer engine (0.32): nothing goes through a disk.

The main process and all workers of all servers are one NCCL group, in which the main process has rank 0. An update is
/pause and /start_weight_update, then at the same time /update_weights, which names all tensors, and one broadcast per
bucket of them, then /finish_weight_update and /resume. The pause keeps requests of others waiting: between start and
finish the model has no weights.

A broadcast has no time limit and cannot be interrupted. So requests and broadcasts run in threads of their own, and the
first failure of either, or the time limit, ends the run. The group cannot be used after that.

NCCL is reached through `nccl.nccl_group` alone. With gloo in its place the rest has run with vLLM on a CPU; NCCL itself
has not been run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from opd.engines.address import own_address
from opd.engines.replicas import Replicas
from opd.engines.server import Answer, Connection, Server, in_turn
from opd.engines.sync import not_given
from opd.engines.threads import in_thread
from opd.engines.vllm import workers_in
from opd.errors import TrainingError
from opd.parallel import ALONE, World

BUCKET = 256 << 20  # bytes beyond which a bucket takes no more tensors
OPEN_S = 30.0  # for the end of an update that was left open

START = (
    'Start it with VLLM_SERVER_DEV_MODE=1, `--weight-transfer-config \'{"backend": "nccl"}\'`, `--enable-scale-out` '
    "and `--logprobs-mode processed_logprobs`, or set `weights: full`"
)


class Group(Protocol):
    """The main process and the servers' workers. `broadcast` sends a tensor on `device` from the main process to all.

    The tensor may be changed or freed afterwards.
    """

    @property
    def device(self) -> torch.device: ...

    def broadcast(self, tensor: Tensor) -> None: ...


@dataclass(slots=True, kw_only=True)
class Transfer:
    """Delivers weights through NCCL; a `Delivery`.

    `gather`: the whole tensors by their names in a Hugging Face folder, in the main process, and nothing in the others.
    All processes call it. `join(address, port, size, limit_s)` makes the group. `limit_s`: of a request, and of the
    broadcasts of one update.
    """

    replicas: Replicas
    gather: Callable[[], Mapping[str, Tensor]]
    join: Callable[[str, int, int, float], Group]
    limit_s: float
    world: World = ALONE
    bucket: int = BUCKET  # bytes
    version: int = 0
    start: str = START
    group: Group | None = field(default=None, init=False)

    def send(self, version: int) -> None:
        """Gather and broadcast the weights. Raises TrainingError in every process."""
        self.version = version
        tensors = self.gather()  # has ended in all processes
        self.world.by_main(lambda: self._send(tensors))

    def load(self, one: Connection) -> Answer[bool]:
        """One server begins to use the weights that it has received."""
        return in_turn(
            lambda: one.post("finish_weight_update", {"weight_version": str(self.version)}, _done),
            lambda: one.post("resume", {}, _done),
        )

    def _send(self, tensors: Mapping[str, Tensor]) -> None:
        if self.group is None:
            self.group = self._joined()
        group = self.group
        described = {
            "names": list(tensors),
            "dtype_names": [str(one.dtype).removeprefix("torch.") for one in tensors.values()],
            "shapes": [list(one.shape) for one in tensors.values()],
        }
        self._all(
            lambda one: in_turn(
                lambda: one.post("pause?mode=keep", {}, _done), lambda: one.post("start_weight_update", {}, _done)
            )
        )

        def broadcast() -> None:
            for packed in buckets(tensors.values(), self.bucket, group.device):
                group.broadcast(packed)

        self._all(lambda one: one.post("update_weights", {"update_info": described}, _done), broadcast)

    def _joined(self) -> Group:
        """The group, which all workers join at the same time."""
        sizes = self._all(lambda one: one.get("get_world_size", workers_in))
        first, joining = 1, dict[str, dict[str, Any]]()
        urls = [one.url for one in self.replicas.servers]
        try:
            address, port = own_address(urls)
        except OSError as error:
            raise not_given(" or ".join(urls), f"this machine has no address towards it ({error})", START) from error
        packed = {"packed": True, "packed_buffer_size_bytes": self.bucket, "packed_num_buffers": 2}
        group = {"master_address": address, "master_port": port, "world_size": 1 + sum(sizes.values()), **packed}
        for url, workers in sizes.items():
            joining[url] = {"init_info": {**group, "rank_offset": first}}
            first += workers
        made: list[Group] = []
        self._all(
            lambda one: one.post("init_weight_transfer_engine", joining[one.server.url], _done),
            lambda: made.append(self.join(address, port, first, self.limit_s)),
        )
        return made[0]

    def _all(
        self, ask: Callable[[Connection], Answer[Any]], meanwhile: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        """What every server answers, by its address, while `meanwhile` runs. Nothing is repeated.

        Raises TrainingError with the first failure, also of `meanwhile`, or at the time limit.
        """

        def asked(server: Server) -> Any:
            with replace(server, retries=0, timeout_s=self.limit_s, patience_s=0.0).connected() as one:
                answer = ask(one)
            self.replicas.counts.add(answer)
            if answer.value is None:
                raise not_given(server.url, answer.failure, self.start)
            return answer.value

        servers = self.replicas.servers
        answers = [in_thread(lambda server=one: asked(server)) for one in servers]
        broadcast = [] if meanwhile is None else [in_thread(meanwhile)]
        ended, late = wait([*answers, *broadcast], timeout=1.1 * self.limit_s, return_when=FIRST_EXCEPTION)
        for one in (one for one in (*answers, *broadcast) if one in ended):
            error = one.exception()
            if isinstance(error, TrainingError):
                raise error
            if error is not None:
                raise TrainingError(
                    f"The student's weights could not be sent to {', '.join(server.url for server in servers)}: "
                    f"{type(error).__name__}: {error}. {self.start}; the same command then continues."
                ) from error
        if late:
            raise not_given(servers[0].url, f"the collective has not ended within {self.limit_s:.3g} s", self.start)
        return {server.url: answer.result() for server, answer in zip(servers, answers, strict=True)}


def buckets(tensors: Iterable[Tensor], size: int, device: torch.device) -> Iterator[Tensor]:
    """The bytes of all tensors, in order, on `device`: [bytes] each, uint8. vLLM cuts them by the same rule.

    A bucket ends with the tensor by which it has more than `size` bytes.
    """
    parts: list[Tensor] = []
    held = 0
    for tensor in tensors:
        parts.append(tensor.detach().to(device).contiguous().view(-1).view(torch.uint8))
        held += parts[-1].numel()
        if held > size:
            yield torch.cat(parts)
            parts, held = [], 0
    if parts:
        yield torch.cat(parts)


def end_open_update(replicas: Replicas) -> None:
    """End an update that a trainer has left open when it was killed, and let its servers answer again.

    A server with an open update has no weights and cannot answer. One without an open update
    refuses to end it, so that failures have no meaning here: what is wrong shows at the next request.
    """
    once = replace(replicas, retries=0)
    for path in ("finish_weight_update", "resume"):
        once.each(lambda one, path=path: one.post(path, {}, _done), OPEN_S)


def _done(raw: bytes) -> bool:
    return True
