"""The student's weights, or its adapter, on the way to an engine, from all processes that hold shards of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from opd.engines.adapters import AdapterSync
from opd.engines.nccl import nccl_group
from opd.engines.replicas import Replicas
from opd.engines.sync import Folder, Sync
from opd.engines.transfer import Transfer
from opd.errors import ConfigError, OPDError
from opd.files import refused
from opd.models import saving
from opd.models.language_model import LanguageModel
from opd.models.saving import ADAPTER
from opd.parallel import World, whole_tensor
from opd.recipe.schema import EngineSection
from opd.teachers.local import log_probs


def sync_of(
    section: EngineSection,
    student: LanguageModel,
    *,
    replicas: Replicas,
    model: str,
    folder: Path,
    root: nn.Module,
    world: World,
    load: Callable[[], LanguageModel],
    where: str,
) -> Sync | AdapterSync:
    """What sends a stage's weights to its engine and proves them; every process of `world` makes it.

    `model`: the servers' name of it. `load`: see `saving.whole`. Raises ConfigError if there is no adapter to send.
    """

    def logp(ids: Sequence[int], temperature: float) -> np.ndarray:
        return world.over(root, lambda: log_probs(student, ids, temperature)).numpy()

    common: dict[str, Any] = {
        "replicas": replicas,
        "model": model,
        "logp": logp,
        "vocabulary": len(student.tokenizer),
        "tolerance": section.tolerance,
        "world": world,
    }
    if section.weights == "lora":
        rank = adapter_rank(student, where)
        return AdapterSync(write=adapter_writer(student, world, model), rank=rank, folder=folder, **common)
    if section.weights == "transfer":
        device = student.device if student.device.type == "cuda" else torch.device("cuda")
        delivery = Transfer(
            replicas=replicas,
            gather=weights_gatherer(student, world, load),
            join=functools.partial(nccl_group, device),
            limit_s=section.timeout_s,
            world=world,
        )
        return Sync(delivery=delivery, **common)
    written_to = Folder(folder=folder, write=weights_writer(student, world, load), world=world, sleeps=section.sleep)
    return Sync(delivery=written_to, **common)


def weights_gatherer(
    student: LanguageModel, world: World, load: Callable[[], LanguageModel]
) -> Callable[[], dict[str, Tensor]]:
    """The student's whole tensors in the main process, none in the others; every process calls it.

    `load`: see `saving.whole`, once. Shards are gathered into the main process's memory, not on its GPU.
    """
    copied = functools.cache(load)

    def gather() -> dict[str, Tensor]:
        whole = saving.whole(student, world, copied)  # has ended in all processes
        return {} if whole is None else saving.tensors_of(whole)

    return gather


def weights_writer(student: LanguageModel, world: World, load: Callable[[], LanguageModel]) -> Callable[[Path], None]:
    """Writes the student's whole weights to a folder; every process calls it. `load`: see `saving.whole`, once.

    It raises RunError, in every process, if the folder cannot be written.
    """
    copied = functools.cache(load)

    def write(to: Path) -> None:
        whole = saving.whole(student, world, copied)  # has ended in all processes
        world.by_main(lambda: written(to, lambda: None if whole is None else saving.save(whole, to)))

    return write


def adapter_writer(student: LanguageModel, world: World, base: str) -> Callable[[Path], None]:
    """Writes the student's adapter to a folder; every process calls it. RunError as `weights_writer`."""

    def write(to: Path) -> None:
        whole: dict[str, Tensor] = {}
        for name, one in student.trainable().items():
            values = whole_tensor(one.detach())  # a gather of all processes
            if world.main:
                whole[name] = values.cpu()
        world.by_main(lambda: written(to, lambda: saving.write_adapter(student, to, base, whole)))

    return write


def written(to: Path, write: Callable[[], None]) -> None:
    """Call `write`, which fills the folder `to`. Raises RunError if it cannot be written."""
    try:
        write()
    except OPDError:
        raise
    except (OSError, SafetensorError) as error:
        raise refused(to, error if isinstance(error, OSError) else OSError(str(error))) from error


def adapter_rank(student: LanguageModel, where: str) -> int:
    """The largest rank of the student's adapter. Raises ConfigError for another adapter than one of LoRA."""
    configs: Any = getattr(student.model, "peft_config", {})
    kinds = {name: getattr(one.peft_type, "value", one.peft_type) for name, one in configs.items()}
    if kinds != {ADAPTER: "LORA"}:
        raise ConfigError(
            f"{where}: `weights: lora` sends one LoRA adapter named {ADAPTER!r}, and the student has "
            f"{kinds or 'none'}. Set `weights: full`."
        )
    return max(configs[ADAPTER].r, *configs[ADAPTER].rank_pattern.values(), 1)
