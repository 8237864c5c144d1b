"""The weights of a model folder: compared with its config before and after they are loaded.

transformers fills a missing tensor with random numbers and only logs it. Here a missing tensor is an error.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.errors import ConfigError, incomplete
from opd.files import tensor_shapes
from opd.models.new import auto_class, read_config
from opd.models.remembered import keep, recall
from opd.plugins import torch
from opd.recipe.schema import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn


def check_weights(folder: Path, spec: ModelSpec, label: str) -> list[str]:
    """Compare the tensors' names and shapes with the config, without reading weights. Returns notes.

    transformers itself matches the names: it loads tensors without storage, so its renamings, conversions and tied
    weights all count. Raises ConfigError for missing tensors and other shapes, and for damaged files. Quantised weights
    and models that cannot be built without storage pass: `check_loaded` compares them when they load.
    """
    what, trusts = f"{label}: {folder}", spec.trust_remote_code
    spare = None if trusts else recall("weights", folder)
    if spare is not None:
        return _spare_notes(spare, what)
    config = read_config(folder, trust_remote_code=spec.trust_remote_code, where=label)
    tensors = {
        name: torch.empty(shape, device="meta")
        for shapes in headers(folder, label).values()
        for name, shape in shapes.items()
    }
    info = _loading_info(config, spec, tensors)
    if info is None:
        return []
    notes = check_loaded(info, what)
    if not trusts:
        keep("weights", folder, sorted(info["unexpected_keys"]))
    return notes


def check_loaded(info: Mapping[str, Any], what: str) -> list[str]:
    """Notes on tensors that the model does not use, from transformers' `output_loading_info`.

    Raises ConfigError for missing tensors and other shapes.
    """
    if problem := incomplete(info):
        raise ConfigError(
            f"{what}: {problem}. transformers would fill them with random numbers. Copy or download the files again, "
            "or correct config.json, e.g. num_hidden_layers, vocab_size or tie_word_embeddings."
        )
    return _spare_notes(sorted(info["unexpected_keys"]), what)


def _spare_notes(spare: Sequence[str], what: str) -> list[str]:
    """A line if the model does not use some tensors of its folder; else none."""
    return [f"{what} has {len(spare)} tensors that the model does not use ({_some(spare)})"] if spare else []


def check_values(model: nn.Module, folder: Path | None, what: str) -> None:
    """Raise ConfigError for NaN or infinity in the weights. `folder`: where to find the file that holds the tensor."""
    bad = next((name for name, p in model.named_parameters() if not _finite(p)), None)
    if bad is None:
        return
    where = f"the tensor {bad}" if folder is None else _place(folder, what) or f"the tensor {bad}"
    raise ConfigError(f"{what}: {where} holds NaN or infinity. Copy, download or export the weights again.")


def headers(folder: Path, label: str) -> dict[Path, dict[str, tuple[int, ...]]]:
    """The names and shapes of the tensors in each weight file that transformers would read. Raises ConfigError."""
    return {file: tensor_shapes(file, label) for file in weight_files(folder, label)}


def weight_files(folder: Path, label: str) -> list[Path]:
    """model.safetensors, else the files of model.safetensors.index.json. Raises ConfigError if one is missing."""
    try:
        named = json.loads((folder / "config.json").read_text()).get("transformers_weights")
    except (OSError, ValueError):  # loading the config will report the error
        named = None
    single = folder / (named or "model.safetensors")
    index = single if single.name.endswith(".index.json") else folder / "model.safetensors.index.json"
    if single.exists() and single != index:
        return [single]
    if not index.exists():
        raise ConfigError(
            f"{label}: {folder} has no weights: neither {single.name} nor {index.name}. Give a folder that "
            "save_pretrained wrote."
        )
    try:
        files = [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{label}: {index} is damaged: {error!r}. Copy or download it again.") from error
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ConfigError(
            f"{label}: {folder} lacks {len(missing)} of the {len(files)} weight files that {index.name} names "
            f"({_some(missing)}). Copy or download them again."
        )
    return files


def _loading_info(config: Any, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> Mapping[str, Any] | None:
    """What transformers reports when it loads tensors without storage; None if it cannot."""
    trust: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    # Any error: a model's own code need not run without storage. Loading the weights then finds what is wrong.
    with contextlib.suppress(Exception), silent(), _without_progress_bar():
        if getattr(config, "quantization_config", None) is not None:
            return None
        with torch.device("meta"):
            kind: Any = type(auto_class(config).from_config(config, **trust))
        _, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        return info
    return None


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without the reports that transformers logs, because `check_loaded` raises them."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _finite(values: Tensor) -> bool:
    # The sum is finite only if every value is, and needs no memory. A sum that overflows is looked at more closely.
    return bool(values.detach().sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())


def _place(folder: Path, label: str) -> str | None:
    from safetensors import safe_open

    for file, shapes in headers(folder, label).items():
        with safe_open(file, "pt") as stored:
            for name in shapes:
                values = stored.get_tensor(name)
                if values.is_floating_point() and not _finite(values):
                    return f"the tensor {name} in {file}"
    return None


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
