"""Updates: what the step does with the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from opd.errors import ConfigError
from opd.pieces.memory import SavedAttributes, recalled
from opd.pieces.needs import Input, needing
from opd.types import MakeMemory, Optimisation, Update

if TYPE_CHECKING:
    from torch import Tensor

# The weights that a jump moves: all; attention and MLP by name, as the released code; or only a layer's matrices.
Moved: TypeAlias = Literal["all", "released", "matrices"]


# Parts of the parameter names of embeddings and output layers; `wte` and `wpe` are GPT-2's.
NO_LAYERS = ("embed", "wte", "wpe", "lm_head")


# Parts of the lower-case parameter names that the released code of arXiv 2605.11739 moves (`_should_modify_param`).
RELEASED_NAMES = (
    *("attn", "self_attn", "attention", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("mlp", "feed_forward", "ffn", "gate_proj", "up_proj", "down_proj"),
)


@cache
def optimizer_step() -> Update:
    """Clip the gradient, step the optimiser, step the schedule."""

    def update(optimisation: Optimisation) -> dict[str, float]:
        return optimisation.step()

    return needing(update)


class KeptWeights(SavedAttributes):
    """The memory of an extrapolation: the kept weights W', and the update after which the next jump is tried."""

    saved = ("due",)

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}  # empty before the first update
        self.due = 1  # number of the update after which the next jump is tried

    def tensors(self) -> Mapping[str, Tensor]:
        """The weights, sharded as the student's are."""
        return self.weights

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restore both."""
        self.due, self.weights = int(state["due"]), dict(tensors)


def kept_weights() -> MakeMemory:
    """A maker of `KeptWeights`."""
    return needing(KeptWeights)


def extrapolation(
    *, by: Literal["reward", "teacher_kl"], prompts: int, candidates: int, ties: bool, move: Moved = "all"
) -> Update:
    """The optimiser's step, and after updates 1, 2, 4, 8, ... a jump along the weights' change (arXiv 2605.11739).

    At update 2^n let D = W - W', with W' the weights kept at update 2^(n-1) (the initial weights for n = 0). The
    candidates W + 2kD, k = 1, 2, ..., `candidates`, are validated in turn, until one is not better than the best so
    far. The best stays; if that is W, it is restored exactly. With `ties`, an equal candidate counts as better. The
    optimiser's moments do not change.

    `move` names the weights that jump:

        all        every trained weight, as in the paper's formula
        released   those whose name has a part of `RELEASED_NAMES`, as in the released code: of attention and MLP with
                   biases and q and k norms, a router of experts, and norms that are named after attention
                   (`post_attention_layernorm`); no other norm, no embedding, no output layer
        matrices   a layer's matrices and stacks of experts; no bias, no norm, no embedding, no output layer

    The memory `extrapolation` (`kept_weights`) holds a copy of the moved weights; during the trials there are three
    copies. Raises ConfigError for fewer than one candidate or prompt, and, when called, if no trained weight jumps.
    """
    if candidates < 1 or prompts < 1:
        raise ConfigError(
            f"An extrapolation needs at least one candidate and one prompt, got candidates {candidates} and "
            f"prompts {prompts}."
        )

    def update(optimisation: Optimisation) -> dict[str, float]:
        """Step, and jump if due; metrics of both."""
        kept = recalled(optimisation.memory, "extrapolation", KeptWeights)
        if not kept.weights:
            kept.weights = _moved(optimisation, move)
        metrics = optimisation.step()
        if optimisation.updates != kept.due:
            return metrics
        here = _moved(optimisation, move)
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
        kept.weights, kept.due = _moved(optimisation, move), 2 * kept.due
        return metrics | {
            "extrapolation/factor": 2.0 * best,
            "extrapolation/tried": float(tried),
            "extrapolation/value_before": first,
            "extrapolation/value_after": value,
        }

    return needing(update, Input.WEIGHT_COPY, Input.REWARD if by == "reward" else Input.TEACHER)


def moves(name: str, dimensions: int, move: Moved) -> bool:
    """Whether a jump moves the parameter of that name; see `extrapolation`."""
    if move == "all":
        return True
    if move == "released":
        return any(part in name.lower() for part in RELEASED_NAMES)
    return dimensions >= 2 and not any(part in name for part in NO_LAYERS)


def _moved(optimisation: Optimisation, move: Moved) -> dict[str, Tensor]:
    """Copies of the weights that the jump moves."""
    found = {
        name: parameter.detach().clone()
        for name, parameter in optimisation.parameters.items()
        if moves(name, parameter.dim(), move)
    }
    if not found:
        names = ", ".join(list(optimisation.parameters)[:3])
        raise ConfigError(
            f"move={move!r} chooses none of the {len(optimisation.parameters)} trained weights ({names}, ...), so that "
            "no jump would change the student. Set move='all'."
        )
    return found


def _along(here: Mapping[str, Tensor], change: Mapping[str, Tensor], factor: float) -> Mapping[str, Tensor]:
    return {name: one + factor * change[name] for name, one in here.items()} if factor else here
