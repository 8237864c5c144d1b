"""From a recipe's model section to a LanguageModel: folders, hub ids, GGUF and packaged files, adapters, new models."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opd.errors import ConfigError, OPDError
from opd.models import adapters, quantised, weights, wrapping
from opd.models.gguf import convert_gguf, notes_of
from opd.models.language_model import LanguageModel
from opd.models.new import attention_of, auto_class, new_config, new_model, new_tokenizer, read_config
from opd.models.paths import Source, source_of
from opd.models.preview import without_weights
from opd.models.tokenizer_files import load_tokenizer
from opd.recipe.schema import ModelSpec

SMALL = 5_000_000  # parameters of a new model that a check makes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(
    spec: ModelSpec,
    *,
    name: str,
    folder: Path | None = None,
    seed: int = 0,
    where: str | None = None,
    trains: bool = False,
) -> LanguageModel:
    """Load the model of a recipe; `folder` replaces its path (a stage's result). Raises ConfigError or DataError.

    The recipe's `seed` and the model's name determine the random weights of new adapters, and of a new model without a
    seed. `where` is the name of the path in messages; default: the recipe's key. An adapter in the path is merged into
    its base. With `trains` and without `lora` it stays an adapter, and goes on training. In `folder` it has been
    merged, and a new adapter of its settings trains.
    """
    try:
        model, tokenizer, notes = _load(spec, name, folder, seed, where, trains)
    except OPDError:
        raise
    except Exception as error:  # of sizes that do not fit, transformers, peft and torch raise any type
        origin, kind = folder or spec.path or "init", type(error).__name__
        raise ConfigError(
            f"{where or f'models.{name}'}: {origin} could not be loaded as a model: {kind}: {error}"
        ) from error
    lm = wrapping.wrap(
        model.eval(), tokenizer, name=name, template_options=spec.template_options, autocast=spec.autocast
    )
    return replace(lm, notes=(*notes, *lm.notes))


def _load(
    spec: ModelSpec, name: str, folder: Path | None, seed: int, where: str | None, trains: bool
) -> tuple[Any, Any, list[str]]:
    device = device_of(spec, f"models.{name}")
    label = where or f"models.{name}.path"
    notes: list[str] = []
    source = Source(weights=folder, tokenizer=folder) if folder is not None else None
    model: Any
    if spec.init is not None and source is None:
        model, tokenizer = new_model(spec, name, seed)
    else:
        source = source or loadable(source_of(spec, name, where))
        tokenizer = load_tokenizer(source.tokenizer, trust_remote_code=spec.trust_remote_code, where=label)
        model, notes = pretrained(source.weights, spec, label)
        notes += [f"{name}: {note}" for note in conversion_notes(source)]
    if spec.chat_template is not None:
        tokenizer.chat_template = spec.chat_template
    if spec.quantization is None:
        model = model.to(device=device, dtype=DTYPES[spec.dtype])
    else:
        quantised.keep_layout(model)
    saved = [] if source is None else list(source.adapters)
    for left, adapter in enumerate(saved, start=1 - len(saved)):
        goes_on = trains and spec.lora is None and left == 0
        if spec.quantization is not None and not goes_on:
            raise ConfigError(
                f"{label}: {adapter} is an adapter, and models.{name}.quantization cannot merge it: the sum would be "
                "rounded to 4 bits again. Merge it first (PEFT's merge_and_unload, saved as a folder), or leave "
                "`quantization` out."
            )
        model, found = adapters.with_adapter(model, adapter, trains=goes_on, what=label)
        notes += found
        weights.check_values(model, None, f"{label}: {adapter}")
    if folder is not None and trains and spec.lora is None and spec.path is not None:
        # An earlier stage trained the path's adapter, and merged it into the folder.
        for adapter in source_of(spec, name, where).adapters[-1:]:
            with _seeded(seed, name):
                model = adapters.new_like(model, adapter)
    if spec.autocast and device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # the output layer, which autocast leaves in float32, uses TF32
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if hasattr(model, "peft_config") or spec.lora is not None:
            model.enable_input_require_grads()
    if spec.lora is not None:
        with _seeded(seed, name):
            model = adapters.add_lora(model, **spec.lora.model_dump())
    return model, tokenizer, notes


@contextlib.contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    """Random numbers of a new adapter, independent of earlier ones."""
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(f"{seed}-{name}-lora".encode()))
        yield


def check_new(spec: ModelSpec, name: str, seed: int) -> None:
    """Make a small new model, and read with it as `wrapping.wrap` does: its config holds all that is known of it.

    A larger one is made without storage. Other models pass. Raises the errors of `load_model`.
    """
    if spec.init is None:
        return
    config = new_config(spec, name, new_tokenizer(spec, name))
    made = without_weights(config, trust_remote_code=False)
    if made is None or sum(p.numel() for p in made.parameters()) <= SMALL:
        load_model(spec.model_copy(update={"device": "cpu"}), name=name, seed=seed)


def device_of(spec: ModelSpec, where: str) -> torch.device:
    """The device of a model: its `device`, else a GPU if there is one. Raises ConfigError for one that is not here."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if spec.device is None:
        return torch.device("cuda" if count else "cpu")
    if why := unusable(spec.device, count):
        here = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
        raise ConfigError(
            f"{where}.device is {spec.device!r}, which cannot be used: {why:.200}. This machine has: {here}. Set one "
            "of these, or leave `device` out."
        )
    return torch.device(spec.device)


def unusable(name: str, gpus: int) -> str | None:
    """Why a device cannot hold a model, or None. `gpus`: how many GPUs of CUDA there are."""
    try:
        device = torch.device(name)
    except RuntimeError as error:  # no name of a device
        return _first_line(error)
    if device.type == "cuda":
        return "there is no such device" if (device.index or 0) >= gpus else None
    if device.type == "meta":
        return "it holds no numbers"
    try:
        torch.empty(0, device=device)
    # What torch raises for a backend that it was not built with, that is not here, or that lacks this operation.
    except (AssertionError, RuntimeError) as error:
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].removesuffix(".")


def pretrained(path: Path | str, spec: ModelSpec, label: str) -> tuple[Any, list[str]]:
    """The model of a folder or hub id with all of its weights, and notes. Raises ConfigError if it lacks any."""
    from transformers import AutoConfig

    folder = path if isinstance(path, Path) else None
    if folder is None:
        config = AutoConfig.from_pretrained(path, trust_remote_code=spec.trust_remote_code)
    else:
        config = read_config(folder, trust_remote_code=spec.trust_remote_code, where=label)
        weights.headers(folder, label)  # names a damaged file
    with weights.silent():
        # Only safetensors: a pickle can run code. Shapes that differ are refused below, by name.
        loaded: Any = auto_class(config).from_pretrained(
            path,
            dtype=DTYPES[spec.dtype],
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **attention_of(spec),
            **_quantised(spec, label),
        )
    model, info = loaded
    notes = weights.check_loaded(info, f"{label}: {path}")
    weights.check_values(model, folder, f"{label}: {path}")
    return model, notes


def _quantised(spec: ModelSpec, label: str) -> dict[str, Any]:
    """What `from_pretrained` gets of a model that is quantised on its way to the device."""
    if spec.quantization is None:
        return {}
    where = label.removesuffix(".path")
    config = quantised.config_of(spec.quantization, DTYPES[spec.dtype], where)
    return {"quantization_config": config, "device_map": {"": device_of(spec, where)}}


def conversion_notes(source: Source) -> list[str]:
    """What the conversion of a GGUF file could not take over."""
    return notes_of(source.weights) if isinstance(source.weights, Path) else []


def loadable(source: Source) -> Source:
    """The source with folders (or hub ids) that transformers can load. GGUF files are converted once, to the cache."""
    if not isinstance(source.weights, Path) or source.weights.suffix != ".gguf":
        return source
    folder = convert_gguf(source.weights)
    return replace(source, weights=folder, tokenizer=folder if source.tokenizer == source.weights else source.tokenizer)
