"""Adapters of a model (peft): new ones, and those of an adapter folder."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opd.errors import ConfigError
from opd.models.adapter_files import adapter_tensors
from opd.models.experts import routers_of
from opd.models.lora_targets import check_targets

# Merged into the weights, an adapter changes logits only by rounding: by this part of the largest logit.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def add_lora(model: nn.Module, *, rank: int, alpha: float, target_modules: str | list[str]) -> nn.Module:
    """The model with trainable low-rank adapters (arXiv 2106.09685) and everything else frozen.

    Routers that are linear layers with a result of several parts (PhiMoE, Llama 4) are left out: peft would add its
    product to the tuple. Raises ConfigError for an adapter of a weight that two modules share, and as `check_targets`.
    """
    from peft import LoraConfig, get_peft_model

    check_targets(model, target_modules, "LoRA")
    targets: Any = target_modules
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    config.exclude_modules = [r.name for r in routers_of(model) if isinstance(r.module, nn.Linear)] or None
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    check_tied(adapted)
    return adapted


def new_like(model: nn.Module, path: Path | str) -> nn.Module:
    """The model with a new trainable adapter of the settings of a saved one, which changes nothing yet.

    Raises ConfigError for an adapter of a weight that two modules share.
    """
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(str(path))
    config.inference_mode, config.base_model_name_or_path = False, None
    for name in (
        "init_lora_weights",
        "init_ia3_weights",
        "init_weights",
    ):  # of some values, the adapter would begin with an update
        if hasattr(config, name):
            setattr(config, name, True)
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    check_tied(adapted)
    return adapted


def check_tied(model: nn.Module) -> None:
    """Raise ConfigError for an adapter of a weight that another module uses too, as tied embeddings do.

    The adapter changes the weight in one place. A merged model has a single weight for both, so it would be another
    model than the trained one.
    """
    users: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)].append(name)
    for adapter, weight in _adapted(model):
        if len(users[id(weight)]) > 1:
            names = sorted({_plain(user) for user in users[id(weight)]} - {_plain(adapter)})
            raise ConfigError(
                f"LoRA adapts {_plain(adapter)}, whose weight is also the weight of {' and '.join(names)} (tied "
                "embeddings). The adapter would change one of the two, and the saved model has one weight for both, so "
                "the saved model would differ from the trained one. Leave the embeddings out of the LoRA target "
                "modules (the default `all-linear` does), or untie them first: save the model with "
                "tie_word_embeddings=False and two weights."
            )


def coverage(model: nn.Module) -> str | None:
    """A line on the share of the weight matrices that adapters change; None without adapters.

    Embeddings and the output layer do not count. A 3-dimensional parameter has the matrices of all experts.
    """
    if not hasattr(model, "get_base_model"):
        return None
    base: Any = model.get_base_model()  # type: ignore[operator]
    ends = {id(p) for end in (base.get_input_embeddings(), base.get_output_embeddings()) for p in end.parameters()}
    frozen = {
        name: parameter
        for name, parameter in base.named_parameters()
        if parameter.ndim >= 2 and ".lora_" not in name and "bias" not in name and id(parameter) not in ends
    }
    covered = {id(weight) for _, weight in _adapted(model)}
    adapted = [parameter for parameter in frozen.values() if id(parameter) in covered]
    share = sum(p.numel() for p in adapted) / max(1, sum(p.numel() for p in frozen.values()))
    left_out = [name for name, parameter in frozen.items() if id(parameter) not in covered]
    kinds = sorted({".".join(part for part in _plain(name).split(".")[-3:] if not part.isdigit()) for name in left_out})
    experts = any(parameter.ndim == 3 and id(parameter) not in covered for parameter in frozen.values())
    note = " (experts, which are one parameter of three dimensions)" if experts else ""
    rest = f"; not adapted: {', '.join(kinds)}{note}" if kinds else ""
    return (
        f"LoRA adapts {len(adapted)} of {len(frozen)} weight matrices, {share:.1%} of their parameters"
        f" (without embeddings){rest}"
    )


def _adapted(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapters' modules and the weights that they change. Adapters of two weights of one module are nested."""
    for name, module in model.named_modules():
        if not hasattr(module, "base_layer"):
            continue
        layer: Any = module
        while hasattr(layer, "base_layer"):
            layer = layer.base_layer
        weight = getattr(layer, getattr(module, "parameter_name", "weight"), None)
        if isinstance(weight, nn.Parameter):
            yield name, weight


def _plain(name: str) -> str:
    """The name that a module has without adapters."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def with_adapter(base: nn.Module, path: Path | str, *, trains: bool, what: str) -> tuple[nn.Module, list[str]]:
    """The base model with a saved adapter, and notes: trainable, or merged into its weights.

    Raises ConfigError if tensors of the adapter are missing, and if merging changes the logits.
    """
    from peft import PeftModel, get_peft_model_state_dict

    names = adapter_tensors(path, what)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Ff]ound missing adapter keys")
        try:
            model: Any = PeftModel.from_pretrained(base, str(path), is_trainable=trains)  # type: ignore[arg-type]
        except UserWarning as error:
            raise ConfigError(
                f"{what}: {path} lacks tensors of its adapter, which peft would leave as they are: {error} Copy or "
                "download it again."
            ) from error
    spare = sorted({*names} - set(get_peft_model_state_dict(model)) - set(model.state_dict()))
    notes = [f"{what}: {path} has {len(spare)} tensors that nothing uses ({spare[0]}, ...)"] if spare else []
    return (model, notes) if trains else (_merged(model, f"{what}: {path}"), notes)


@torch.no_grad()
def _merged(model: Any, what: str) -> nn.Module:
    """The model with its adapter merged into its weights. Raises ConfigError if that changes the logits."""
    ids = torch.arange(4, device=next(model.parameters()).device)[None]
    model.eval()
    with_adapter: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float()
    kind = next(iter(model.peft_config.values())).peft_type
    if not hasattr(model, "merge_and_unload"):
        raise ConfigError(_unmerged(what, kind, "it has no merge_and_unload"))
    try:
        merged = model.merge_and_unload()
    except ValueError as error:  # for adapters or layers that cannot be merged
        raise ConfigError(_unmerged(what, kind, str(error))) from error
    off = (merged(input_ids=ids, use_cache=False).logits.float() - with_adapter).abs().max().item()
    scale = with_adapter.abs().max().item()
    if not off <= ROUNDING.get(merged.dtype, 5e-2) * scale + 1e-4:
        raise ConfigError(
            f"{what}: the model with the adapter merged into its weights has other logits, by up to {off:.3g} (largest "
            f"logit {scale:.3g}). Merge it where it was trained, and give the merged model."
        )
    return merged


def _unmerged(what: str, kind: Any, why: str) -> str:
    return (
        f"{what} has adapters of the type {getattr(kind, 'value', kind)}, which peft cannot merge into the weights: "
        f"{why}. Merge it where it was trained, and give the merged model."
    )


@torch.no_grad()
def adds_nothing(model: Any) -> bool:
    """Whether a peft model computes exactly what its base computes, as with new low-rank adapters."""
    ids = torch.arange(4, device=next(model.parameters()).device)[None]
    whole: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    with model.disable_adapter():
        return torch.equal(whole, model(input_ids=ids, use_cache=False).logits)
