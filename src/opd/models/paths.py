"""Resolves a model's path: a folder, a GGUF file, a packaged file or a hub id, with messages for anything else.

The folder or hub id may hold an adapter, which names the model that it adapts.

`where` is the name of the path in messages: the recipe's key, or the argument of a command.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from opd.errors import ConfigError, nearest
from opd.files import expanded
from opd.models.adapter_files import adapter_settings
from opd.plugins import packaged
from opd.recipe.schema import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the parts of a model are: folders or hub ids; the weights also a GGUF file."""

    weights: Path | str
    tokenizer: Path | str
    adapters: tuple[Path | str, ...] = ()  # in order of application


def source_of(spec: ModelSpec, name: str, where: str | None = None) -> Source:
    """The parts of a model with a `path`. An adapter without a tokenizer uses that of its base.

    Raises ConfigError or DataError.
    """
    label = where or f"models.{name}.path"
    path = resolved_path(spec, name, where)
    adapter = adapter_settings(path, label)
    if adapter is None:
        return Source(weights=path, tokenizer=path)
    if adapter.base == spec.path:
        raise ConfigError(f"{label}: the adapter {path} names itself as the model that it adapts. Correct its config.")
    key = f"{label}: base_model_name_or_path in the adapter_config.json of {path}"
    base = source_of(spec.model_copy(update={"path": adapter.base}), name, key)
    return Source(
        weights=base.weights,
        tokenizer=path if adapter.has_tokenizer else base.tokenizer,
        adapters=(*base.adapters, path),
    )


def resolved_path(spec: ModelSpec, name: str, where: str | None = None) -> Path | str:
    """An existing folder or GGUF file, or a hub id. Raises ConfigError or DataError."""
    assert spec.path is not None
    label = where or f"models.{name}.path"
    path: Path | str = packaged(spec.path) if spec.path.startswith("package:") else spec.path
    local = expanded(path)
    if local.is_file() and local.suffix == ".gguf":
        return local
    if local.is_dir():
        if (local / "adapter_config.json").exists():
            return local
        if (local / "config.json").exists():
            key = f"models.{name}.trust_remote_code: true"
            _check_folder(local, spec, label, f"set {key}" if where is None else f"measure it in a recipe with {key}")
            return local
        files = sorted(local.glob("*.gguf"))
        if len(files) != 1:
            remedy = (
                _models_of_its_run(local) or "Give a Hugging Face model folder, an adapter folder, or one GGUF file."
            )
            raise ConfigError(
                f"{label}: {local} has no config.json and {len(files)} GGUF files, so no model can be loaded from it. "
                f"{remedy}"
            )
        return files[0]
    if looks_local(str(path)) or local.suffix == ".gguf" or local.exists():
        problem = f"{local} is not a model folder" if local.exists() else f"{local} does not exist"
        raise ConfigError(f"{label}: {problem}.{near_path(local)} Give an existing folder or a GGUF file.")
    return str(path)


def looks_local(path: str) -> bool:
    """Whether a path cannot be a hub id."""
    return path.startswith(("/", ".", "~")) or path.count("/") > 1


def near_path(path: Path) -> str:
    """` Did you mean 'x'?` for a path with a misspelt part, else the empty string."""
    if path.exists():
        return ""
    part = path
    while not part.parent.exists():
        part = part.parent
    if not part.parent.is_dir():
        return ""
    there = sorted(one.name for one in part.parent.iterdir() if one.is_dir() or one.suffix == ".gguf")
    return nearest(part.name, there)


def _models_of_its_run(folder: Path) -> str:
    """A remedy that names the models of a run, if the folder belongs to one; else the empty string."""
    parts = [folder, *folder.parents][:4]  # a checkpoint, `checkpoints`, the stage, the run
    run = next((p for p in parts if (p / "recipe.yaml").exists() and (p / "environment.json").exists()), None)
    if run is None:
        return ""
    files = [*run.glob("*/model/config.json"), *run.glob("*/adapter/adapter_config.json")]
    found = sorted(file.parent for file in files)
    its_own = [model for model in found if model.parent in parts]
    if not found:
        return "It belongs to a run without a finished stage: a stage writes its model when it ends."
    return f"It belongs to a run. Its stages write their models to: {', '.join(map(str, its_own or found))}."


def _check_folder(folder: Path, spec: ModelSpec, label: str, remedy: str) -> None:
    """Raise ConfigError for pickled weights and for code in the folder, before either is loaded."""
    if not any(folder.glob("*.safetensors")) and (pickled := [*folder.glob("*.bin"), *folder.glob("*.pt")]):
        raise ConfigError(
            f"{label}: {folder} has its weights in {pickled[0].name}, a pickle, which can run code when "
            "loaded. opd loads only safetensors: load the model where you trust it and call save_pretrained."
        )
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ConfigError(f"{label}: {folder / 'config.json'} is not valid JSON: {error}") from error
    if "auto_map" in config and not spec.trust_remote_code:
        raise ConfigError(
            f"{label}: {folder} has its own Python code ({sorted(config['auto_map'])}), which opd does not run "
            f"by default. If you trust it, {remedy}."
        )
