"""What follows the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

from torch import Tensor

from opd.errors import ConfigError
from opd.pieces.memory import SavedAttributes, recalled
from opd.pieces.needs import Input, needing
from opd.types import MakeMemory, Optimisation, Update

# Parts of the names of embeddings and output layers: `wte` and `wpe` are those of GPT-2 and its like.
NO_LAYERS = ("embed", "wte", "wpe", "lm_head")


@cache
def optimizer_step() -> Update:
    """Clip, step, schedule."""
    return needing(lambda optimisation: optimisation.step())


class KeptWeights(SavedAttributes):
    """What an extrapolation remembers: the weights that the next change is measured from, and when that is due."""

    saved = ("due",)

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}  # none before the first update
        self.due = 1  # the update after which the next jump is tried

    def tensors(self) -> Mapping[str, Tensor]:
        """The weights, sharded as the student's are."""
        return self.weights

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what both were."""
        self.due, self.weights = int(state["due"]), dict(tensors)


def kept_weights() -> MakeMemory:
    """A maker of `KeptWeights`."""
    return needing(lambda: KeptWeights())


def extrapolation(
    *, by: Literal["reward", "teacher_kl"], prompts: int, candidates: int, ties: bool, matrices: bool
) -> Update:
    """The optimiser's step, and after 1, 2, 4, 8, ... of them a jump along what has changed (arXiv 2605.11739).

    At update 2^n, with D = W - W' and W' the weights kept at update 2^(n-1) (the first ones for n = 0), the candidates
    W + 2kD, k = 1, 2, ..., `candidates`, are tried in turn. The first that does not validate better than the best so
    far ends it, and the best stays; if that is W, it is back bit by bit. `ties` takes an equal one as better. The
    optimiser's moments stay as they are.

    `matrices` moves matrices alone, the stacks of them that a layer of experts is included, and neither embeddings nor
    the output layer, as the released code does. It reads the memory `extrapolation` (`kept_weights`), which holds a
    copy of the weights that it moves; there are three while it tries.
    Raises ConfigError for fewer than one candidate or prompt.
    """
    if candidates < 1 or prompts < 1:
        raise ConfigError(
            f"An extrapolation tries at least one candidate on at least one prompt, got candidates {candidates} and "
            f"prompts {prompts}."
        )

    def update(optimisation: Optimisation) -> dict[str, float]:
        """Step, and jump when it is due; metrics of both."""
        kept = recalled(optimisation.memory, "extrapolation", KeptWeights)
        if not kept.weights:
            kept.weights = _moved(optimisation, matrices)
        metrics = optimisation.step()
        if optimisation.updates != kept.due:
            return metrics
        here = _moved(optimisation, matrices)
        change = {name: here[name] - before for name, before in kept.weights.items()}
        value = first = optimisation.validate(by, prompts)
        best = tried = 0
        for k in range(1, candidates + 1):
            optimisation.set(_along(here, change, 2.0 * k))
            tried, found = k, optimisation.validate(by, prompts)
            if not (found > value or (ties and found == value)):
                break
            best, value = k, found
        if best < tried:
            optimisation.set(_along(here, change, 2.0 * best))
        if best:
            optimisation.jumped({name: 2.0 * best * one for name, one in change.items()})
        kept.weights, kept.due = _moved(optimisation, matrices), 2 * kept.due
        return metrics | {
            "extrapolation/factor": 2.0 * best,
            "extrapolation/tried": float(tried),
            "extrapolation/value_before": first,
            "extrapolation/value_after": value,
        }

    return needing(update, Input.WEIGHT_COPY, Input.REWARD if by == "reward" else Input.TEACHER)


def _moved(optimisation: Optimisation, matrices: bool) -> dict[str, Tensor]:
    """Copies of the weights that jump."""
    return {
        name: parameter.detach().clone()
        for name, parameter in optimisation.parameters.items()
        if not matrices or (parameter.dim() >= 2 and not any(word in name for word in NO_LAYERS))
    }


def _along(here: Mapping[str, Tensor], change: Mapping[str, Tensor], factor: float) -> Mapping[str, Tensor]:
    return {name: one + factor * change[name] for name, one in here.items()} if factor else here
