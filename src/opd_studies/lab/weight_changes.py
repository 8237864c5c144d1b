"""The change of a model's matrices by training: its spectrum, its low-rank and its rescaled versions.

arXiv 2605.11739: dW = W - W_base of every matrix of attention and MLP, with the singular values s_1 >= s_2 >= ...:

    concentration = s_1 / sqrt(sum_i s_i^2)            spectral over Frobenius norm
    effective rank = exp(-sum_i p_i log p_i),  p_i = s_i / sum_j s_j
    rescaled       = dW_early |dW_final| / |dW_early|   the paper's "norm rescue" with beta = 1, matrix by matrix
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"


def matrices(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrices of attention and MLP by name, float64; not embeddings, norms and biases."""
    return {
        name: one.double()
        for name, one in weights.items()
        if one.dim() == 2 and {"self_attn", "mlp"} & {*name.split(".")}
    }


def of_model(folder: Path) -> dict[str, Tensor]:
    """`matrices` of a saved model."""
    return matrices(load_file(folder / WEIGHTS))


def of_checkpoint(stage: Path, step: int) -> dict[str, Tensor]:
    """`matrices` of a stage's checkpoint. Raises RunError if it is missing or damaged."""
    from opd.stage.checkpoint import load

    return matrices(load(stage / "checkpoints" / f"step_{step:06d}").tensors["student"])


def change(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """dW by name."""
    return {name: after[name] - one for name, one in before.items()}


def concentration(changes: Mapping[str, Tensor]) -> float:
    """Spectral over Frobenius norm, mean over matrices: from 1 / sqrt(rank) to 1 for rank 1."""
    spectra = [torch.linalg.svdvals(one) for one in changes.values()]
    return sum(float(s[0] / s.norm()) for s in spectra) / len(spectra)


def effective_rank(changes: Mapping[str, Tensor]) -> float:
    """exp of the entropy of the normalised singular values over the full rank, mean over matrices: a share."""
    shares: list[float] = []
    for one in changes.values():
        p = torch.linalg.svdvals(one)
        p = p / p.sum()
        shares.append(math.exp(float(torch.special.entr(p).sum())) / len(p))
    return sum(shares) / len(shares)


def cosine(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Cosine of two changes, mean over matrices."""
    found = [float((one * second[name]).sum() / (one.norm() * second[name].norm())) for name, one in first.items()]
    return sum(found) / len(found)


def rescaled(early: Mapping[str, Tensor], final: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The early change with the norm of the final one, matrix by matrix."""
    return {name: one * (final[name].norm() / one.norm()) for name, one in early.items()}


def truncated(changes: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The `share` of the singular directions with the largest singular values, rounded up."""
    kept: dict[str, Tensor] = {}
    for name, one in changes.items():
        u, s, v = torch.linalg.svd(one, full_matrices=False)
        rank = math.ceil(share * len(s))
        kept[name] = (u[:, :rank] * s[:rank]) @ v[:rank]
    return kept


def write_changed(base: Path, changes: Mapping[str, Tensor], folder: Path) -> Path:
    """Write the model `base` with its matrices changed by `changes` into `folder`; returns the folder."""
    shutil.copytree(base, folder)
    weights = load_file(base / WEIGHTS)
    for name, one in changes.items():
        weights[name] = (weights[name].double() + one).to(weights[name].dtype)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return folder
