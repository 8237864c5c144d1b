"""Low-rank adapters of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import nn

from opd.errors import ConfigError


def add_lora(model: nn.Module, *, rank: int, alpha: float, target_modules: str | list[str]) -> nn.Module:
    """The model with trainable low-rank adapters (arXiv 2106.09685) and everything else frozen.

    Raises ConfigError for an adapter of a weight that two modules share.
    """
    from peft import LoraConfig, get_peft_model

    targets: Any = target_modules
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")  # type: ignore[arg-type]
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
