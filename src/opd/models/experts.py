"""The routers of a mixture of experts: which experts they choose for which tokens, recorded by hooks.

transformers names each model's routers and the place of the logits in their result (`_can_record_outputs`), for its own
`output_router_logits`. The losses call the backbone, and a sharded or wrapped model has the same router modules, so
hooks on these modules see every forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opd.errors import ConfigError
from opd.plugins import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

# Routers whose result has probabilities in the place of the logits.
GIVE_PROBABILITIES = ("Gemma4TextRouter", "DiffusionGemmaTextRouter")
# Their results do not say which experts run: Zaya's gives tokens that skip the layer to expert 0, Doge's has the logits
# of keys whose products are the experts, DBRX's only logits.
UNREADABLE = ("ZayaRouter", "DogeCDMoE", "DbrxRouter")
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """A router module, and the place of its logits in its result."""

    name: str
    module: nn.Module
    index: int

    @property
    def readable(self) -> bool:
        return type(self.module).__name__ not in UNREADABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """What a router decided in one forward about N places, padding included."""

    router: str
    reads: Tensor  # [N]: the number of sequences that read the place; 0 for padding
    chosen: Tensor  # [N, k]
    experts: int  # E
    logits: Tensor | None = None  # [N, E], if requested
    probabilities: bool = False  # `logits` holds probabilities

    @property
    def counts(self) -> Tensor:
        """[E] int64: how often each expert was chosen."""
        empty = torch.zeros(self.experts, dtype=torch.long, device=self.chosen.device)
        k = self.chosen.shape[1]
        return empty.scatter_add_(0, self.chosen.reshape(-1).long(), self.reads.repeat_interleave(k))

    @property
    def mass(self) -> Tensor:
        """[E]: the sum of the routing probabilities, softmax(logits), with gradient."""
        assert self.logits is not None
        logits = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        probabilities = logits if self.probabilities else logits.softmax(-1)
        return (probabilities * self.reads[:, None]).sum(0)


class Recording:
    """The decisions that `recorded` collects, and the names of routers whose results could not be read."""

    def __init__(self) -> None:
        self.decisions: list[Decisions] = []
        self.unread: set[str] = set()


def routers_of(model: nn.Module) -> list[Router]:
    """The routers that transformers names for this model, in order; empty for a dense model.

    A module with another router inside is left out: its result repeats that of the inner one (JetMoE's attention).
    """
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    found: dict[str, Router] = {}
    for prefix, part in base.named_modules():
        if named := (getattr(part, "_can_record_outputs", None) or {}).get("router_logits"):
            for recorder in named if isinstance(named, list) else [named]:
                for name, module in part.named_modules(prefix=prefix):
                    if _records(recorder, name, module):
                        found[name] = Router(name=name, module=module, index=getattr(recorder, "index", 1))
    if not found:
        return []
    return [
        found[name]
        for name, _ in base.named_modules()
        if name in found and not any(other.startswith(f"{name}.") for other in found)
    ]


def _records(recorder: Any, name: str, module: nn.Module) -> bool:
    """Whether a recorder of transformers, or the class or the class's name in its place, means this module."""
    kind = recorder if isinstance(recorder, type) else getattr(recorder, "target_class", None)
    ending = recorder if isinstance(recorder, str) else getattr(recorder, "class_name", None)
    layer = getattr(recorder, "layer_name", None)
    fits = (kind is not None and isinstance(module, kind)) or (ending is not None and name.endswith(ending))
    return fits and (layer is None or f".{layer.strip('.')}." in f".{name}.")


@contextlib.contextmanager
def recorded(routers: Sequence[Router], reads: Sequence[Tensor], *, logits: bool = False) -> Iterator[Recording]:
    """Record the routers' decisions in the forwards inside the block.

    `reads`: for each forward in order, the number of sequences that read each place (`forward.reads_of`). The hooks end
    with the block, so that a backward which computes the layers again records nothing. They make no autograd operation,
    because checkpointing compares what the two passes save.
    """
    recording = Recording()
    calls = dict.fromkeys((router.name for router in routers), 0)

    def hook_of(router: Router) -> Any:
        def hook(module: nn.Module, _: Any, result: Any) -> None:
            call = calls[router.name]
            calls[router.name] += 1
            here = reads[call] if call < len(reads) else None
            found = None if here is None else _decisions(router, result, here, logits=logits)
            if found is None:
                recording.unread.add(router.name)
            else:
                recording.decisions.append(found)

        return hook

    handles = [router.module.register_forward_hook(hook_of(router)) for router in routers]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def _decisions(router: Router, result: Any, reads: Tensor, *, logits: bool) -> Decisions | None:
    """A router's result as `Decisions`; None if it has another form.

    The chosen experts are the result's integers [N, k]; without them the `top_k` largest logits, as in Llama 4.
    """
    values: Sequence[Any] = result if isinstance(result, (tuple, list)) else [result]
    scores = values[router.index] if len(values) > router.index else values[0]
    if not router.readable or not isinstance(scores, torch.Tensor) or scores.ndim != 2 or len(scores) != len(reads):
        return None
    n, k = len(reads), getattr(router.module, "top_k", None)
    integers = [
        v
        for v in values
        if isinstance(v, torch.Tensor) and v.ndim == 2 and len(v) == n and v.dtype in (torch.int64, torch.int32)
    ]
    if not integers and not isinstance(k, int):
        return None
    chosen = integers[0] if integers else scores.detach().topk(k or 1, dim=-1).indices
    return Decisions(
        router=router.name,
        reads=reads,
        chosen=chosen,
        experts=scores.shape[1],
        logits=scores if logits else None,
        probabilities=type(router.module).__name__ in GIVE_PROBABILITIES,
    )


def coefficient_of(model: nn.Module, setting: bool | float, where: str) -> float:
    """The factor of the load-balancing loss: 0 without one. `setting`: a number, or True for the config's.

    Raises ConfigError for a model without routers, and for True where the config has no coefficient above 0.
    """
    if setting is False or setting == 0:
        return 0.0
    if not any(router.readable for router in routers_of(model)):
        raise ConfigError(
            f"{where}: router_aux_loss is {_shown(setting)}, and {_kind(model)} has no router that opd can read. Leave "
            "router_aux_loss out, or train a mixture of experts of transformers."
        )
    if setting is not True:
        return float(setting)
    if not (found := coefficient_in(model.config)):
        raise ConfigError(
            f"{where}: router_aux_loss is true, which means the coefficient of the config, and the config of "
            f"{_kind(model)} has no {COEFFICIENTS[0]} above 0. Set router_aux_loss to a number, e.g. 0.001."
        )
    return found


def left_out(model: nn.Module, setting: bool | float) -> str | None:
    """A line if the model's config has a load-balancing loss and the stage does not train it; else None."""
    config: Any = model.config
    if setting is True or setting > 0 or not (found := coefficient_in(config)) or not routers_of(model):
        return None
    config = config.get_text_config()
    requested = "output_router_logits and " if getattr(config, "output_router_logits", False) else ""
    return (
        f"its config has {requested}a load-balancing loss of its routers with the coefficient {found:g}, which is not "
        "trained; `router_aux_loss: true` in the stage adds it"
    )


def coefficient_in(config: Any) -> float:
    """The coefficient of the load-balancing loss in a transformers config; 0 without one. Dense models may have it."""
    config = config.get_text_config()
    found = [getattr(config, name, None) for name in COEFFICIENTS]
    found.append(getattr(getattr(config, "ffn_config", None), "moe_loss_weight", None))  # DBRX
    return next((float(value) for value in found if isinstance(value, (int, float)) and value > 0), 0.0)


def _kind(model: nn.Module) -> str:
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return f"the model ({type(base).__name__})"


def _shown(setting: bool | float) -> str:
    return str(setting).lower()
