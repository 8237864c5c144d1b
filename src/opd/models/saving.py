"""Writes a LanguageModel as a Hugging Face folder: merged, or its adapter alone in the format of PEFT.

Weights are written first and apart from the rest, so that no error in a config or tokenizer loses them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from opd.errors import ConfigError, RunError
from opd.files import follow_umask
from opd.models.language_model import LanguageModel
from opd.models.noise import config_of_origin
from opd.models.quantised import is_quantised, merged
from opd.parallel import World, whole_tensor

ADAPTER = "default"  # PEFT's name of the adapter, which its files do not carry


def save(lm: LanguageModel, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Safetensors, config and tokenizer: `AutoModelForCausalLM.from_pretrained(folder)` loads it.

    `dtype`: of the weights in the file; default: the model's own. Dropout and router jitter are those of the origin.
    Raises RunError if the weights are written and another file could not be.
    """
    plain: Any = merged_state(lm)
    with _weights_alone(plain):
        plain.save_pretrained(folder, state_dict=_in_dtype(plain.state_dict(), dtype))
    if failed := _describe(lm, plain, folder, dtype):
        raise RunError(f"{folder} has the weights, and could not be completed: {'; '.join(failed)}.")
    follow_umask(folder)


def tensors_of(lm: LanguageModel) -> dict[str, Tensor]:
    """The tensors that `save` writes, by their names in the file. They are the model's own where it has no adapters."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    plain: Any = merged_state(lm)
    ignored = set(plain._keys_to_ignore_on_save or ())
    state = {name: tensor for name, tensor in plain.state_dict().items() if name not in ignored}
    return dict(revert_weight_conversion(plain, remove_tied_weights_from_state_dict(state, plain)))


def whole(lm: LanguageModel, world: World, load: Callable[[], LanguageModel]) -> LanguageModel | None:
    """The model with its whole weights, in the process that writes files; None in the others. Every process calls this.

    A sharded model's trained weights are gathered one tensor after the other into `load()`: the model as it was before
    the stage, without shards and on the CPU. The gathers have ended in all processes when this returns.
    """
    if world.size == 1:
        return lm
    copied = load() if world.main else None
    into = {} if copied is None else copied.trainable()
    with torch.no_grad():
        for name, parameter in lm.trainable().items():
            values = whole_tensor(parameter.detach())
            if copied is not None:
                into[name].copy_(values)
    return copied


def save_adapter(lm: LanguageModel, folder: Path, base: str) -> None:
    """The LoRA adapter of `base`, a folder or hub id, and the tokenizer: `PeftModel.from_pretrained` loads it.

    Raises RunError if the adapter is written and the tokenizer could not be.
    """
    write_adapter(lm, folder, base)
    if failed := _tried({"the tokenizer": lambda: lm.tokenizer.save_pretrained(folder)}):
        raise RunError(f"{folder} has the adapter, and could not be completed: {'; '.join(failed)}.")
    follow_umask(folder)


def write_adapter(lm: LanguageModel, folder: Path, base: str, tensors: Mapping[str, Tensor] | None = None) -> None:
    """The adapter alone, in PEFT's format. `tensors`: its weights by parameter, where `lm` has shards of them."""
    model: Any = lm.model
    with _based_on(model, base):
        # Without save_embedding_layers, PEFT looks for the base model's config on the hub.
        model.save_pretrained(folder, selected_adapters=[ADAPTER], save_embedding_layers=False, state_dict=tensors)


def load_adapter(lm: LanguageModel, folder: Path) -> None:
    """Give the model's adapter the weights that `save_adapter` wrote."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(lm.model, load_file(folder / "adapter_model.safetensors"))  # type: ignore[arg-type]


def try_to_describe(lm: LanguageModel, folder: Path, *, base: str | None = None) -> None:
    """Write every file but the weights, to find errors before a training. `base`: also the adapter's config.

    Raises ConfigError.
    """
    failed = _describe(lm, lm.causal_lm, folder, None)
    if base is not None:
        configs: Any = lm.model.peft_config
        if list(configs) != [ADAPTER]:
            raise ConfigError(
                f"{lm.name}: `save` includes the adapter, and the model has the adapters {sorted(configs)}. It needs "
                f"exactly one, named {ADAPTER!r}, as get_peft_model names it."
            )
        with _based_on(lm.model, base):
            failed += _tried({"adapter_config.json": lambda: configs[ADAPTER].save_pretrained(folder)})
    if failed:
        raise ConfigError(
            f"{lm.name} could not be saved after the training: {'; '.join(failed)}. Correct it before the training, in "
            "the model object or in the files of its folder."
        )
    check_type(lm)


def check_type(lm: LanguageModel) -> None:
    """Raise ConfigError if no later stage could load the saved model: its config is a part of a larger model's."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config: Any = lm.causal_lm.config
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not known and not getattr(config, "auto_map", None):
        raise ConfigError(
            f"{lm.name}: the trained {type(lm.causal_lm).__name__} would be saved with the config of a part, "
            f"{type(config).__name__}, which AutoModelForCausalLM does not load. Such a model can be a teacher; train "
            "one whose language model has a type of its own."
        )


def merged_state(lm: LanguageModel) -> nn.Module:
    """A plain transformers model: the model itself, or a copy with the adapters merged.

    The copy is on the CPU, so that it needs no memory of a GPU.
    """
    if not lm.adapters:
        return lm.causal_lm
    if is_quantised(lm.model):
        return merged(lm.model)
    tensors = [*lm.model.parameters(), *lm.model.buffers()]
    on_cpu = {id(t): _on_cpu(t) for t in tensors if t.device.type != "cpu"}
    return copy.deepcopy(lm.model, on_cpu).merge_and_unload()  # type: ignore[operator]


def _on_cpu(tensor: Tensor) -> Tensor:
    copied = tensor.detach().cpu()
    return nn.Parameter(copied, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _in_dtype(state: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors in `dtype`, on the CPU if that makes a copy. Tied weights stay one tensor."""
    made: dict[tuple[int, torch.Size], Tensor] = {}
    for name, tensor in state.items():
        if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
            continue
        key = (tensor.data_ptr(), tensor.shape)
        if key not in made:
            made[key] = tensor.detach().to("cpu", dtype)
        state[name] = made[key]
    return state


def _describe(lm: LanguageModel, plain: Any, folder: Path, dtype: torch.dtype | None) -> list[str]:
    """Write the config, the generation config and the tokenizer; returns a line for each that failed."""

    def config() -> None:
        described = config_of_origin(plain)
        described.architectures = [type(plain).__name__]
        described.dtype = str(dtype or plain.dtype).removeprefix("torch.")
        if getattr(described, "tie_word_embeddings", False) and not _tied(plain):
            described.tie_word_embeddings = False  # else other programs would read one weight for both
        described.save_pretrained(folder)

    def generation() -> None:
        found = getattr(plain, "generation_config", None)
        if found is None:
            return
        found.save_pretrained(folder)  # refuses values that were set since loading and do not fit together
        ending = copy.deepcopy(found)
        ids = sorted(lm.stop_ids)
        ending.eos_token_id = ids[0] if len(ids) == 1 else ids
        ending.to_json_file(folder / "generation_config.json", use_diff=True, keys_to_pop=["compile_config"])

    return _tried(
        {
            "model.config": config,
            "model.generation_config": generation,
            "the tokenizer": lambda: lm.tokenizer.save_pretrained(folder),
        }
    )


def _tied(model: Any) -> bool:
    """Whether the output layer has the input's weight; True for a model without an output layer."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    places = {layer.weight.data_ptr() for layer in layers if isinstance(getattr(layer, "weight", None), Tensor)}
    return len(places) < 2


def _tried(parts: dict[str, Callable[[], Any]]) -> list[str]:
    """Make every call; returns a line for each that raised."""
    failed: list[str] = []
    for name, write in parts.items():
        try:
            write()
        except OSError as error:
            failed.append(f"{name} could not be written ({error.strerror or error})")
        except Exception as error:  # whatever a model's or tokenizer's own code raises
            failed.append(f"{name} cannot be saved ({' '.join(str(error).split())})")
    return failed


@contextlib.contextmanager
def _weights_alone(model: Any) -> Iterator[None]:
    """Inside, `model.save_pretrained` writes the weights and no config, whose errors would come before the weights."""
    described = [c for c in (model.config, getattr(model, "generation_config", None)) if c is not None]
    for config in described:
        vars(config)["save_pretrained"] = lambda *_, **__: None
    try:
        yield
    finally:
        for config in described:
            del vars(config)["save_pretrained"]


@contextlib.contextmanager
def _based_on(model: Any, base: str) -> Iterator[None]:
    """Inside, the adapter's config names `base` as its base model."""
    config = model.peft_config[ADAPTER]
    before, config.base_model_name_or_path = config.base_model_name_or_path, base
    try:
        yield
    finally:
        config.base_model_name_or_path = before
