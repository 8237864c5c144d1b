"""Whether a saved folder is the model that was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from opd.errors import TrainingError
from opd.models.language_model import LanguageModel, evaluating

# The largest divergence, in nats per token, that rounding explains: of float32 the order of sums; of two-byte weights
# and activations relative errors of 2^-9, which grow with depth. A wrong or missing weight gives far more.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}


@torch.no_grad()
def check_saved(lm: LanguageModel, folder: Path, ids: Sequence[int]) -> float:
    """Load the folder and compare it with the model; returns the mean KL divergence over the tokens `ids`, in nats.

    The saved model is loaded on the CPU in the dtype of its file, so its weights are pages of the file that the system
    can drop again: no second copy has to fit into memory. Without adapters every tensor must also equal the model's,
    rounded to the dtype of the file; with adapters the merge may differ in rounding.

    Raises TrainingError if the two differ by more than rounding.
    """
    kind: Any = type(lm.causal_lm)
    with torch.random.fork_rng(devices=[]):
        saved, found = kind.from_pretrained(folder, dtype="auto", use_safetensors=True, output_loading_info=True)
    problems = [f"{folder} has no weight {name}" for name in sorted(found["missing_keys"])]
    if not lm.adapters:
        problems += _unequal(lm.causal_lm.state_dict(), saved)
    tokens = torch.tensor([list(ids)], device=lm.device)
    with evaluating(lm.model):
        trained = lm.model(input_ids=tokens, use_cache=False).logits[0].float().cpu()
    written = saved.eval()(input_ids=tokens.cpu(), use_cache=False).logits[0].float()
    divergence = _divergence(trained, written)
    allowed = max(ROUNDING.get(model.dtype, ROUNDING[torch.bfloat16]) for model in (saved, lm.causal_lm))  # type: ignore[arg-type, type-var, return-value]
    if not divergence <= allowed:
        problems.append(f"their next tokens differ by {divergence:.3g} nats per token, and rounding gives {allowed:g}")
    if problems:
        raise TrainingError(
            f"{lm.name}: the model that was saved to {folder} is not the model that was trained: "
            f"{'; '.join(problems[:5])}. The trained weights are in the stage's last checkpoint. Please report the "
            f"architecture, {kind.__name__}."
        )
    return divergence


def check_saved_adapter(lm: LanguageModel, folder: Path) -> None:
    """Compare the tensors of a saved adapter with the model's, bit by bit. Raises TrainingError."""
    from peft import get_peft_model_state_dict

    state: dict[str, Tensor] = get_peft_model_state_dict(lm.model, save_embedding_layers=False)  # type: ignore[arg-type]
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        same = set(file.keys()) == set(state) and all(  # noqa: SIM118
            torch.equal(file.get_tensor(name), tensor.detach().cpu()) for name, tensor in state.items()
        )
    if not same:
        raise TrainingError(
            f"{lm.name}: the adapter that was saved to {folder} is not the adapter that was trained. The trained "
            "weights are in the stage's last checkpoint. Please report it with the model's architecture."
        )


def _unequal(state: dict[str, Tensor], saved: Any) -> list[str]:
    """A line for each tensor of the saved model that is not the model's, rounded to its dtype."""
    problems: list[str] = []
    ignored = saved._keys_to_ignore_on_save or ()
    for name, tensor in saved.state_dict().items():
        if name in ignored:
            continue
        trained = state.get(name)
        if trained is None or not torch.equal(trained.detach().to("cpu", tensor.dtype), tensor):
            problems.append(f"the weight {name} is another one")
    return problems


def _divergence(trained: Tensor, saved: Tensor) -> float:
    """The mean over positions of KL(trained || saved); NaN if a logit is NaN."""
    p, q = trained.log_softmax(-1), saved.log_softmax(-1)
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1).mean().item()
