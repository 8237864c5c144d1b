"""Whether a saved folder is the model that was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from opd.errors import TrainingError
from opd.models.language_model import LanguageModel, evaluating
from opd.models.pictures import inputs
from opd.models.saving import merged_state

# The largest mean divergence, in nats per token, that rounding explains: of float32 the order of sums, and TF32 on a
# GPU; of two-byte weights and activations relative errors of 2^-9, which grow with depth.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}


@torch.no_grad()
def check_saved(lm: LanguageModel, folder: Path, ids: Sequence[int]) -> float:
    """Load the folder and compare it with the model; returns the mean KL divergence over the tokens `ids`, in nats.

    Three comparisons: every tensor in the file is the merged model's, rounded to the dtype of the file; the merged
    model computes what the model with adapters computes; the loaded model computes what the trained one computes.

    The saved model is loaded on the CPU in the dtype of its file, so its weights are pages of the file that the system
    can drop again: beside the merged copy that saving needs, no further copy has to fit into memory. (Experts that a
    file holds one by one are put together, which makes a copy of them.)

    Raises TrainingError if a comparison fails.
    """
    kind: Any = type(lm.causal_lm)
    with torch.random.fork_rng(devices=[]):
        saved, found = kind.from_pretrained(folder, dtype="auto", use_safetensors=True, output_loading_info=True)
    plain: Any = merged_state(lm)
    problems = [f"{folder} has no weight {name}" for name in sorted(found["missing_keys"])]
    problems += _unequal(plain.state_dict(), saved)
    trained = log_probs(lm, ids)
    saved_kl = divergence(trained, log_probs(replace(lm, model=saved), ids))
    merged = divergence(trained, log_probs(replace(lm, model=plain), ids)) if lm.adapters else 0.0
    exact, rounded = (ROUNDING.get(model.dtype, ROUNDING[torch.bfloat16]) for model in (plain, saved))
    for what, nats, allowed in (("merged", merged, exact), ("saved", saved_kl, max(exact, rounded))):
        if not nats <= allowed:
            problems.append(
                f"the next tokens of the {what} model differ by {nats:.3g} nats per token, and rounding explains "
                f"{allowed:g}"
            )
    if problems:
        raise TrainingError(
            f"{lm.name}: the model that was saved to {folder} is not the model that was trained: "
            f"{'; '.join(problems[:5])}. The trained weights are in the stage's last checkpoint. Please report the "
            f"architecture, {kind.__name__}."
        )
    return saved_kl


def check_saved_adapter(lm: LanguageModel, folder: Path) -> None:
    """Compare the tensors of a saved adapter with the model's, bit by bit. Raises TrainingError."""
    from peft import get_peft_model_state_dict

    state: dict[str, Tensor] = get_peft_model_state_dict(lm.model, save_embedding_layers=False)  # type: ignore[arg-type]
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        same = set(file.keys()) == set(state) and all(
            torch.equal(file.get_tensor(name), tensor.detach().cpu()) for name, tensor in state.items()
        )
    if not same:
        raise TrainingError(
            f"{lm.name}: the adapter that was saved to {folder} is not the adapter that was trained. The trained "
            "weights are in the stage's last checkpoint. Please report it with the model's architecture."
        )


def _unequal(state: Mapping[str, Tensor], saved: Any) -> list[str]:
    """A line if tensors of the saved model are not the model's, rounded to their dtype."""
    written = {n: t for n, t in saved.state_dict().items() if n not in (saved._keys_to_ignore_on_save or ())}
    other = [
        name
        for name, tensor in written.items()
        if name not in state or not torch.equal(state[name].detach().to("cpu", tensor.dtype), tensor)
    ]
    return [f"{len(other)} of {len(written)} weights are others, e.g. {other[0]}"] if other else []


@torch.no_grad()
def log_probs(lm: LanguageModel, ids: Sequence[int]) -> Tensor:
    """[tokens, V] float32 on the CPU, as transformers computes them, pictures included."""
    tokens = torch.tensor([list(ids)], device=lm.device)
    with evaluating(lm.model):
        tokens, pictures = inputs(lm.tokenizer.pictures, lm.backbone, tokens, lm.name) if lm.sees else (tokens, {})
        return lm.model(input_ids=tokens, use_cache=False, **pictures).logits[0].float().cpu().log_softmax(-1)


def divergence(p: Tensor, q: Tensor) -> float:
    """The mean over positions of KL(p || q) of log-probs; NaN if a log-prob is NaN."""
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1).mean().item()
