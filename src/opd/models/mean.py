"""The mean of several models with the same architecture, as a new model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from opd.models.language_model import LanguageModel
from opd.models.saving import merged_state


@torch.no_grad()
def mean_of(models: Sequence[LanguageModel]) -> LanguageModel:
    """The model whose weights are the mean of the models' whole weights, taken in float64.

    With LoRA, W + mean_k B_k A_k: the mean of the models. The mean of the factors, (mean B)(mean A), is another one,
    because the product is not linear. The models themselves are unchanged.
    """
    plain: list[Any] = [merged_state(lm) for lm in models]
    states: list[dict[str, torch.Tensor]] = [one.state_dict() for one in plain]
    merged: Any = copy.deepcopy(plain[0]) if plain[0] is models[0].causal_lm else plain[0]
    for name, tensor in merged.state_dict().items():
        values = [state[name] for state in states]
        if tensor.is_floating_point():
            total = torch.stack([value.to("cpu", torch.float64) for value in values]).mean(0)
            tensor.copy_(total)
    return replace(models[0], model=merged, name=" + ".join(lm.name for lm in models))
