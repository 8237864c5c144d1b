"""Distributed training: ranks, reductions, the student's weights in shards, and their files.

The only file that imports torch.distributed, and only if needed. Every process takes some of a step's prompts and holds
a shard of the student and of its optimiser (FSDP2). `torchrun --nproc-per-node N -m opd train RECIPE` starts the
processes; without torchrun the world has one process, and every function here is trivial.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from opd.errors import ConfigError, OPDError, RunError

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")


# Longest wait of the others while one process works alone (a conversion, a card). A dead process is noticed at once.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run, from the view of one. Every process must make the same calls in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def positions(self, keys: Sequence[Hashable]) -> list[int]:
        """This process's positions in a list that all processes have; items of one key stay together."""
        number = {key: n for n, key in enumerate(dict.fromkeys(keys))}
        return [i for i, key in enumerate(keys) if number[key] % self.size == self.rank]

    def in_order(self, positions: Sequence[int], rows: Sequence[T]) -> list[T]:
        """The rows of all processes, equally many per position, in the order of the common list."""
        each = len(rows) // max(1, len(positions))
        assert each * len(positions) == len(rows), f"{len(rows)} rows of {len(positions)} items"
        found: dict[int, list[T]] = {}
        for theirs, made in self.gather((list(positions), list(rows))):
            each = len(made) // max(1, len(theirs))
            found |= {at: made[i * each : (i + 1) * each] for i, at in enumerate(theirs)}
        return [row for at in sorted(found) for row in found[at]]

    def sum(self, value: float) -> float:
        return self._reduced(value, "SUM")

    def max(self, value: float) -> float:
        return self._reduced(value, "MAX")

    def any(self, flag: bool) -> bool:
        return bool(self._reduced(float(flag), "MAX"))

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in rank order, on every process."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until every process calls this."""
        self.gather(None)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block before the others, which find its downloads and conversions."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    def by_main(self, work: Callable[[], T]) -> T:
        """The result of `work`, which the main process alone does while the others wait.

        An OPDError of it is raised in every process. Another error ends the main process, and by that the others.
        """
        made: T | None = None
        error: OPDError | None = None
        if self.main:
            try:
                made = work()
            except OPDError as raised:
                if self.size == 1:
                    raise
                error = raised
        made, error = self.gather((made, error))[0]
        if error is not None:
            raise error
        return cast(T, made)

    def agree(self, parameters: Iterable[Tensor]) -> None:
        """Copy the main process's values to every process (new adapters are random)."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for parameter in parameters:
            dist.broadcast(parameter.detach(), 0)

    def _reduced(self, value: float, how: str) -> float:
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        number = torch.tensor(value, dtype=torch.float64)  # on the CPU, for gloo
        dist.all_reduce(number, getattr(dist.ReduceOp, how))
        return number.item()

    @contextlib.contextmanager
    def gathered(self, root: nn.Module) -> Iterator[None]:
        """The whole weights of a sharded `root` in every process, for sampling and scoring.

        Forwards inside do not communicate, because their number differs between processes.
        """
        if self.size == 1:
            yield
            return
        modules = _sharded(root)
        root(lambda: None)  # FSDP's first forward determines its root module, which must not be a layer
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.reshard()
                module.set_reshard_after_forward(module is not root, recurse=False)

    def over(self, root: nn.Module, function: Callable[[], T]) -> T:
        """`function` over the weights of `root`, gathered block by block as its forward reaches them.

        Every process calls this, and each must make the same forwards. Inside `gathered` nothing is communicated.
        """
        if not any(hasattr(parameter, "full_tensor") for parameter in root.parameters()):
            return function()
        try:
            return root(function)
        finally:
            for module in _sharded(root):  # the root's own weights stay whole after a forward
                module.reshard()

    def shard(self, root: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Give every process a shard of each parameter (FSDP2): one group per block, and the root for the rest.

        `root` is called with a function to run over its weights. Gradients are summed over processes, not averaged: the
        loss is already divided by the step's denominator.
        """
        if self.size == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(next(root.parameters()).device.type, (self.size,))
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(root, mesh=mesh, reshard_after_forward=False)
        for module in _sharded(root):
            # A plain sum is intended; gloo has neither an average nor a scaled sum.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
        # Set the prefetch order of the backward here. FSDP derives it from the forwards before, which during sampling
        # differ between processes. The first block prefetches itself: no block comes after it in the backward.
        for before, block in zip([blocks[0], *blocks[:-1]], blocks, strict=True) if blocks else ():
            block.set_modules_to_backward_prefetch([before])  # type: ignore[operator]
        root.set_modules_to_backward_prefetch([blocks[-1] if blocks else root])  # type: ignore[operator]


ALONE = World()


def whole_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered on every process; any other tensor unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined]


def _sharded(root: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in root.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def join() -> Iterator[World]:
    """The world that torchrun started this process in; leaves it at the end, also after an error.

    The first process with an error raises it. The others, with the same error or a lost connection, exit silently with
    code 1, so that one error prints one message.

    Raises ConfigError when there are more processes than GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    store, _, _ = next(iter(rendezvous("env://", rank, size)))
    try:
        backend = "gloo"
        if torch.cuda.is_available():
            if local >= torch.cuda.device_count():
                raise ConfigError(
                    f"torchrun started at least {local + 1} processes on a machine with {torch.cuda.device_count()} "
                    "GPUs, but each process needs its own GPU. Use a smaller --nproc-per-node."
                )
            torch.cuda.set_device(local)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        yield World(rank, size)
    except BaseException as error:
        first = str(rank)
        with contextlib.suppress(RuntimeError):  # the store ended with torchrun
            first = store.compare_set("opd/first-error", "", first).decode()
        if first != str(rank):
            raise SystemExit(1) from None
        if type(error) in (RuntimeError, dist.DistBackendError, dist.DistNetworkError) and "onnection" in str(error):
            raise RunError(  # the other process left no message: it was killed
                f"Another process of this run died ({str(error).splitlines()[0]}). The same command continues from the "
                "last checkpoint."
            ) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# --- tensors on disk -------------------------------------------------------------------------------------------------
def write_tensors(tensors: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
    """Write groups of tensors as safetensors files, flushed to disk; every process writes its shards.

    Whole tensors are equal in all processes, and one process writes each. Raises the error of writing, on every rank.
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    # Sorted, because a restored state may list its tensors in another order but must give the same files.
    filled = sorted(group for group, named in tensors.items() if named)
    flat = {f"{group}/{name}": tensors[group][name] for group in filled for name in sorted(tensors[group])}
    if not flat:
        return
    numbers = {group: number for number, group in enumerate(filled, start=1)}
    writer = HuggingFaceStorageWriter(
        path=str(folder),
        fqn_to_index_mapping={key: numbers[key.partition("/")[0]] for key in flat},
        save_distributed=True,
    )
    with _own_errors():
        save(flat, storage_writer=writer, no_dist=not dist.is_initialized())


def read_tensors(folder: Path, like: Mapping[str, Mapping[str, Tensor]] | None = None) -> dict[str, dict[str, Tensor]]:
    """The tensors that `write_tensors` wrote, with any number of processes: whole and on the CPU.

    A tensor that `like` has under the same group and name is read onto its device, and in shards if it is sharded.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(path=str(folder))
    flat: dict[str, Tensor] = {}
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        group, _, name = key.partition("/")
        template = (like or {}).get(group, {}).get(name)
        if template is not None and template.shape != stored.size:  # type: ignore[union-attr]
            raise ValueError(f"{name} has the shape {tuple(stored.size)} instead of {tuple(template.shape)}")  # type: ignore[union-attr]
        empty = torch.empty(stored.size) if template is None else torch.empty_like(template, requires_grad=False)  # type: ignore[union-attr]
        flat[key] = empty.to(stored.properties.dtype)  # type: ignore[union-attr]
    if flat:
        with _own_errors():
            load(flat, storage_reader=reader, no_dist=not dist.is_initialized())
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        group, _, name = key.partition("/")
        tensors.setdefault(group, {})[name] = tensor
    return tensors


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Raise the original error instead of torch's collection of all ranks' errors, which is not an Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is fine
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
