"""Processes that train together: who is who, what they add up, the student's weights in shards, and their files.

The only file that imports torch.distributed, and only when it is needed. Every process takes some of a step's prompts
and holds a shard of the student and of its optimiser (FSDP2). `torchrun --nproc-per-node N -m opd train RECIPE` starts
them; without torchrun there is a world of one, in which every function here is trivial.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from opd.errors import ConfigError, RunError

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")


# How long the others wait while one process works alone (a conversion, a card); a process that dies is noticed at once.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run, as one of them sees it. Every process has to make the same calls in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes the files and speaks to the person."""
        return self.rank == 0

    def positions(self, keys: Sequence[Hashable]) -> list[int]:
        """Where this process's share of a list lies that all of them have; items of one key stay together."""
        number = {key: n for n, key in enumerate(dict.fromkeys(keys))}
        return [i for i, key in enumerate(keys) if number[key] % self.size == self.rank]

    def in_order(self, positions: Sequence[int], rows: Sequence[T]) -> list[T]:
        """Everybody's rows, equally many a position, as one process would have made them from the common list."""
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
        """Everybody's value, in rank order, on every process."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every process is here."""
        self.gather(None)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process does what follows before the others: what it downloads or converts, they find."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    def agree(self, parameters: Iterable[Tensor]) -> None:
        """The main process's values, in every process (new adapters are random)."""
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

        number = torch.tensor(value, dtype=torch.float64)  # on the CPU, whatever trains: gloo adds it up
        dist.all_reduce(number, getattr(dist.ReduceOp, how))
        return number.item()

    @contextlib.contextmanager
    def gathered(self, root: nn.Module) -> Iterator[None]:
        """The whole weights of a sharded `root` in every process, for sampling and scoring.

        No forward inside communicates: how many there are differs from process to process.
        """
        if self.size == 1:
            yield
            return
        modules = _sharded(root)
        root(lambda: None)  # FSDP settles who is the root in the first forward, and that must not be a layer's
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.reshard()
                module.set_reshard_after_forward(module is not root, recurse=False)

    def shard(self, root: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Give every process a shard of each parameter (FSDP2): one group a block, and one for the rest, the root.

        `root` is called with a function to run over its weights. Gradients of a backward are summed over processes:
        a loss is divided by the step's one denominator before, so that nothing may divide again.
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
            # gloo has neither an average nor a scaled sum; and a plain sum is what is meant.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
        # What is fetched ahead in a backward is said here, since FSDP's guess looks at the forwards before it, and
        # those of sampling differ between processes. The first block names itself: nothing is ahead of it.
        for before, block in zip([blocks[0], *blocks[:-1]], blocks, strict=True) if blocks else ():
            block.set_modules_to_backward_prefetch([before])  # type: ignore[operator]
        root.set_modules_to_backward_prefetch([blocks[-1] if blocks else root])  # type: ignore[operator]


ALONE = World()


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, in every process; another tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined]


def _sharded(root: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in root.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def join() -> Iterator[World]:
    """The world that torchrun has started this process in; leaves it at the end, however that comes.

    The first process with an error raises it. The others, whether they meet the same error or lose their partner to
    it, exit quietly with code 1: one error is one message.

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
                    "GPUs, and each needs its own. Use a smaller --nproc-per-node."
                )
            torch.cuda.set_device(local)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        yield World(rank, size)
    except BaseException as error:
        first = str(rank)
        with contextlib.suppress(RuntimeError):  # the store has gone with torchrun
            first = store.compare_set("opd/first-error", "", first).decode()
        if first != str(rank):
            raise SystemExit(1) from None
        if type(error) in (RuntimeError, dist.DistBackendError, dist.DistNetworkError) and "onnection" in str(error):
            raise RunError(  # no message: it was killed
                f"This process lost another one of the run ({str(error).splitlines()[0]}). The same command goes on "
                "from the last checkpoint."
            ) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# --- tensors on disk -------------------------------------------------------------------------------------------------
def write_tensors(tensors: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
    """Groups of tensors as safetensors files, on disk when this returns: every process writes its shards.

    Whole tensors are the same in all processes, and one of them writes each. Raises what the writing raised, in every
    process.
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    # Sorted: a state that has been restored lists its tensors in another order, and is to give the same files.
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
    """What `write_tensors` wrote, by any number of processes. Tensors come whole and on the CPU.

    One that `like` has by its group and name is read as that one is: on its device, and in shards if it is sharded.
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
    """The error behind torch's collection of the errors of all ranks, which no `except Exception` catches."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is no mistake
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
