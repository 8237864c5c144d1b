"""The files of a saved adapter, in a folder or on the hub: its settings and the names of its tensors. No torch."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.errors import ConfigError
from opd.files import tensor_shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """What the adapter_config.json of a folder or hub id says."""

    base: str  # folder or hub id of the model that it adapts
    kind: str  # peft's name, e.g. LORA
    has_tokenizer: bool


def adapter_settings(path: Path | str, label: str) -> AdapterSettings | None:
    """The settings of an adapter's folder or hub id; None if it is not an adapter.

    Raises ConfigError for an adapter that opd cannot load.
    """
    file = _file(path, "adapter_config.json")
    if file is None:
        return None
    try:
        settings: Mapping[str, Any] = json.loads(file.read_text())
        kind = str(settings["peft_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{label}: {file} is not the configuration of an adapter: {error!r}.") from error
    refuse_kind(kind, f"{label}: {path}")
    base = settings.get("base_model_name_or_path")
    if not base:
        raise ConfigError(
            f"{label}: {file} does not name the model that it adapts. Set its base_model_name_or_path to a folder or "
            "hub id."
        )
    if _file(path, "adapter_model.safetensors") is None:
        raise ConfigError(
            f"{label}: {path} has no adapter_model.safetensors. opd loads only safetensors: load the adapter where you "
            "trust it and call save_pretrained."
        )
    tokenizer = any(_file(path, name) is not None for name in ("tokenizer_config.json", "tokenizer.json"))
    return AdapterSettings(base=str(base), kind=kind, has_tokenizer=tokenizer)


def refuse_kind(kind: str, what: str) -> None:
    """Raise ConfigError for adapters that are not part of the model's layers: opd would score the model without them.

    They add virtual tokens to the input, or change the forward of peft's wrapper.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config: Any = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)  # type: ignore[call-overload]
    if config is None:
        raise ConfigError(f"{what} is an adapter of the type {kind}, which this version of peft does not have.")
    made: Any = config.__new__(config)
    if made.is_prompt_learning is not False or made.is_adaption_prompt or kind in ("XLORA", "POLY"):
        raise ConfigError(
            f"{what} is an adapter of the type {kind}, which changes the model's input or its forward outside its "
            "layers, so opd would score the model without it. Use a model with LoRA or another adapter of its layers."
        )


def adapter_tensors(path: Path | str, what: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes of an adapter's tensors. Raises ConfigError for a damaged file."""
    file = _file(path, "adapter_model.safetensors")
    assert file is not None, "adapter_settings checks it"
    return tensor_shapes(file, what)


def _file(path: Path | str, name: str) -> Path | None:
    """A file of a folder or hub id; None if it has no such file, or the hub cannot be reached."""
    if isinstance(path, Path):
        return path / name if (path / name).is_file() else None
    return _hub_file(path, name)


@functools.cache  # a request takes half a minute if the hub cannot be reached
def _hub_file(repository: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from transformers.utils.hub import cached_file

    try:
        local = try_to_load_from_cache(repository, name)
        if isinstance(local, str):
            return Path(local)
        if isinstance(
            try_to_load_from_cache(repository, "config.json"), str
        ):  # an adapter's repository need not have it
            return None
        found = cached_file(repository, name)
    except (OSError, ValueError):  # loading the model will report the error
        return None
    return None if found is None else Path(str(found))
