"""The optimisers of the trained weights: AdamW, AdamW with moments of 8 bits, and Muon; clipping and learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from opd.errors import ConfigError
from opd.parallel import whole_tensor
from opd.recipe.schema import OptimizerSection

FUSED_ON = ("cpu", "cuda")  # where torch has a fused AdamW, of the devices that runs use

BLOCK_8BIT, SMALLEST_8BIT = 256, 4096  # entries that share a scale; below so many a moment has 32 bits

# The tensors of a state that have the parameter's shape, by optimiser: with shards, they are sharded as it is.
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}


@dataclass(slots=True)
class Optimiser:
    """The trained parameters, their optimisers by name, and one schedule for each."""

    parameters: dict[str, nn.Parameter]
    parts: dict[str, Optimizer]
    schedules: dict[str, LambdaLR]
    max_grad_norm: float

    def clip(self) -> float:
        """Scale the gradient down to `max_grad_norm`; returns its global norm before."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = whole_tensor(nn.utils.get_total_norm(gradients))
        value = float(norm)
        if not value < self.max_grad_norm:  # also for NaN; a smaller gradient would be multiplied by 1
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.max_grad_norm, norm)
        return value

    def step(self) -> dict[str, float]:
        rate = float(next(iter(self.schedules.values())).get_last_lr()[0])
        for name, part in self.parts.items():
            part.step()
            self.schedules[name].step()
            part.zero_grad(set_to_none=True)
        return {"optim/learning_rate": rate}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The optimisers' state by `optimiser.key` and then by parameter name; moments are sharded as parameters.

        A count that an optimiser keeps as a Python integer is an int64 tensor here.
        """
        groups: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.parameters.items():
            for part, optimizer in self.parts.items():
                for key, value in optimizer.state.get(parameter, {}).items():
                    kept = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
                    groups.setdefault(f"{part}.{key}", {})[name] = kept
        return groups

    @property
    def updates(self) -> int:
        """Number of updates so far, counted by the schedule."""
        return int(next(iter(self.schedules.values())).last_epoch)

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], updates: int) -> None:
        """Continue from saved `tensors` and `updates`; groups of other owners in `tensors` are ignored."""
        for group, named in tensors.items():
            part, _, key = group.partition(".")
            if part not in self.parts:
                continue
            for name, value in named.items():
                parameter = self.parameters[name]
                # The fused step reads its own count on the parameter's device; checkpoints are read on the CPU.
                state = int(value) if value.dtype == torch.int64 else value.to(parameter.device)
                self.parts[part].state[parameter][key] = state
        for name, schedule in self.schedules.items():
            schedule.last_epoch = updates
            groups = self.parts[name].param_groups
            for base, factor_at, group in zip(schedule.base_lrs, schedule.lr_lambdas, groups, strict=True):
                group["lr"] = base * factor_at(updates)
            schedule._last_lr = [group["lr"] for group in groups]


def build(
    parameters: dict[str, nn.Parameter], section: OptimizerSection, steps: int, outside: Collection[Tensor] = ()
) -> Optimiser:
    """An Optimiser over named parameters for a stage of `steps` updates.

    `outside`: the weights of embeddings and of the output layer, which `muon` leaves to AdamW. Raises ConfigError for
    `adamw_8bit` where bitsandbytes is not installed, or the weights are sharded.
    """
    assert parameters, "a model without trainable parameters is refused before this"
    weights = list(parameters.values())
    parts: dict[str, Optimizer] = {}
    if section.name == "adamw_8bit":
        parts["adamw_8bit"] = _adamw_8bit(weights, section)
    elif section.name == "muon":
        matrices = [one for one in weights if _is_matrix(one, outside)]
        others = [one for one in weights if not _is_matrix(one, outside)]
        parts |= {"muon": _muon(matrices, section)} if matrices else {}
        parts |= {"adamw": _adamw(others, section)} if others else {}
    else:
        parts["adamw"] = _adamw(weights, section)
    at = factor(section, steps)
    return Optimiser(
        parameters, parts, {name: LambdaLR(part, at) for name, part in parts.items()}, section.max_grad_norm
    )


def _adamw(parameters: list[nn.Parameter], section: OptimizerSection) -> Optimizer:
    # One pass over weight, gradient and both moments, instead of a dozen; on shards, each process updates its own.
    fused = all(parameter.device.type in FUSED_ON for parameter in parameters)
    return torch.optim.AdamW(
        parameters,
        lr=section.learning_rate,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
        fused=fused,
    )


def _adamw_8bit(parameters: list[nn.Parameter], section: OptimizerSection) -> Optimizer:
    """AdamW with moments of 8 bits, a scale for each block of entries (arXiv 2110.02861); small ones have 32 bits."""
    if any(hasattr(parameter, "full_tensor") for parameter in parameters):
        raise ConfigError(
            "optimizer.name is adamw_8bit, and several processes hold shards of the trained weights. bitsandbytes has "
            "no state for shards. Use `name: adamw`, whose moments are sharded, or one process."
        )
    try:
        from bitsandbytes.optim.adamw import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"optimizer.name is adamw_8bit, and bitsandbytes cannot be imported ({error}). Install it with: "
            "pip install 'opd[quantization]', or use `name: adamw`."
        ) from error
    rate, decay = section.learning_rate, section.weight_decay
    return AdamW8bit(parameters, lr=rate, betas=section.betas, eps=section.eps, weight_decay=decay)


def _muon(matrices: list[nn.Parameter], section: OptimizerSection) -> Optimizer:
    """Muon (arXiv 2502.16982): the momentum's nearest orthogonal matrix, by Newton-Schulz iterations in bfloat16.

    Scaled by 0.2 sqrt(max(A, B)) for a matrix [A, B], so that an update's root mean square is that of AdamW and one
    learning rate serves both.
    """
    return torch.optim.Muon(
        matrices,
        lr=section.learning_rate,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )


def state_bytes(parameters: Mapping[str, Tensor], section: OptimizerSection, outside: Collection[Tensor] = ()) -> int:
    """Bytes of the moments after the first update: two per weight, of 8 bits, or one of Muon's matrices."""
    total = 0.0
    for one in parameters.values():
        whole = one.numel() * one.element_size()
        if section.name == "adamw_8bit" and one.numel() >= SMALLEST_8BIT:
            total += 2 * one.numel() * (1 + 4 / BLOCK_8BIT)
        elif section.name == "muon" and _is_matrix(one, outside):
            total += whole
        else:
            total += 2 * whole
    return round(total)


def _is_matrix(weight: Tensor, outside: Collection[Tensor]) -> bool:
    """Whether Muon updates the weight."""
    return weight.dim() == 2 and not any(weight is other for other in outside)


def factor(section: OptimizerSection, steps: int) -> Callable[[int], float]:
    """Update number (from 0) -> factor on the learning rate: linear warm-up, then the schedule down to 0."""
    warmup = section.warmup_steps

    def at(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        if section.schedule == "linear":
            return max(0.0, 1.0 - progress)
        if section.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return 1.0

    return at
