"""The values of a config that make a forward random: dropout and router jitter.

Training sets them to 0, because the trained distribution must be the distribution that writes. A saved model has the
values of its origin.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


_KEPT = "noise_of_origin"  # an attribute of the transformers model, which copies of the model keep


def remember_noise(model: nn.Module) -> None:
    """Keep the values that the model's config has now. A value that was set to 0 since the last call is not lost."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    earlier: list[dict[str, float]] = vars(base).get(_KEPT, [])
    now = [_noise(config) for config in _configs(getattr(base, "config", None))]
    earlier = earlier if len(earlier) == len(now) else [{} for _ in now]
    vars(base)[_KEPT] = [
        {name: value or before.get(name, 0.0) for name, value in values.items()}
        for before, values in zip(earlier, now, strict=True)
    ]


def config_of_origin(model: nn.Module) -> Any:
    """A copy of the model's config with the dropout and jitter of its origin."""
    config = copy.deepcopy(model.config)
    for part, values in zip(_configs(config), vars(model).get(_KEPT, []), strict=False):
        for name, value in values.items():
            setattr(part, name, value)
    return config


def _configs(config: Any) -> Iterator[Any]:
    """The config and the configs inside it, e.g. `text_config`."""
    if config is None:
        return
    yield config
    for name in getattr(config, "sub_configs", {}):
        yield from _configs(getattr(config, name, None))


def _noise(config: Any) -> dict[str, float]:
    return {
        name: value
        for name, value in vars(config).items()
        if ("drop" in name or "jitter" in name) and isinstance(value, float)
    }
