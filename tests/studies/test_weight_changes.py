"""The lab of weight changes and of costs: spectra and rescaled changes by hand, equal functions, small runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_pair

from opd.types import Prompt
from opd_studies.claims import baseline_cost, overlap_mass, weight_change
from opd_studies.lab import lab as labs
from opd_studies.lab import loss_costs, weight_changes
from opd_studies.lab.lab import Lab
from opd_studies.lab.rl_teachers import MIXED, FamilySize, grpo_recipe

NAME = "model.layers.0.mlp.up_proj.weight"
TINY = replace(tiny_pair.TINY, task=labs.SORTING)


def length(prompt: Prompt, response: str) -> float:
    return float(len(response))


def diagonal(*values: float) -> dict[str, torch.Tensor]:
    return {NAME: torch.tensor(values, dtype=torch.float64).diag()}


def test_matrices_are_those_of_attention_and_mlp():
    weights = {
        NAME: torch.ones(2, 3),
        "model.layers.0.self_attn.q_proj.weight": torch.ones(3, 3),
        "model.layers.0.self_attn.q_proj.bias": torch.ones(3),
        "model.layers.0.post_attention_layernorm.weight": torch.ones(3),
        "model.embed_tokens.weight": torch.ones(5, 3),
        "lm_head.weight": torch.ones(5, 3),
    }
    assert [*weight_changes.matrices(weights)] == [NAME, "model.layers.0.self_attn.q_proj.weight"]


def test_spectrum_of_known_singular_values():
    """Singular values 3, 4, 0: spectral over Frobenius norm is 4 / 5; the effective rank is exp of the entropy."""
    change = diagonal(3.0, 4.0, 0.0)
    assert weight_changes.concentration(change) == pytest.approx(4 / 5)
    entropy = -(3 / 7) * math.log(3 / 7) - (4 / 7) * math.log(4 / 7)
    assert weight_changes.effective_rank(change) == pytest.approx(math.exp(entropy) / 3)
    assert weight_changes.effective_rank(diagonal(2.0, 2.0)) == pytest.approx(1.0)
    assert weight_changes.concentration(diagonal(2.0, 2.0)) == pytest.approx(1 / math.sqrt(2))


def test_cosine_rescaled_and_truncated_change():
    early, final = diagonal(0.3, 0.4), diagonal(6.0, 8.0)
    assert weight_changes.cosine(early, final) == pytest.approx(1.0)
    assert weight_changes.cosine(diagonal(1.0, 0.0), diagonal(0.0, 1.0)) == pytest.approx(0.0)
    assert torch.allclose(weight_changes.rescaled(early, final)[NAME], final[NAME])
    assert torch.allclose(weight_changes.truncated(final, 0.5)[NAME], diagonal(0.0, 8.0)[NAME])
    assert torch.allclose(weight_changes.truncated(final, 0.51)[NAME], final[NAME])


def test_write_changed_changes_named_weights_alone(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    save_file({NAME: torch.zeros(2, 2), "norm": torch.ones(2)}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    written = weight_changes.write_changed(base, diagonal(1.0, 2.0), tmp_path / "new")
    found = load_file(written / "model.safetensors")
    assert found[NAME].tolist() == [[1.0, 0.0], [0.0, 2.0]]
    assert found["norm"].tolist() == [1.0, 1.0]
    assert found[NAME].dtype == torch.float32
    assert (written / "config.json").exists()


SHAPE = loss_costs.Shape(tokens=6, vocabulary=50, hidden=12, k=4)


@pytest.mark.parametrize("name", baseline_cost.METHODS)
def test_both_implementations_have_equal_gradients(name):
    x = loss_costs.states_of(0, SHAPE)
    plain, fused = (loss_costs.gradients(one, name, x, SHAPE.k) for one in (loss_costs.PLAIN, loss_costs.FUSED))
    for a, b in zip(plain, fused, strict=True):
        assert float(a.abs().max()) > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_costs_are_measured_for_every_method():
    times = loss_costs.seconds(loss_costs.PLAIN, baseline_cost.METHODS, 0, SHAPE, rounds=1)
    assert min(times.values()) > 0
    large = replace(SHAPE, tokens=512, vocabulary=20_000)
    peaks = loss_costs.peak_mib([(loss_costs.PLAIN, loss_costs.FULL, 0, large)])
    logits = 512 * 20_000 * 4 / 2**20  # both models' log-probs and their difference, at least
    assert 3 * logits < peaks[0] < 12 * logits


def test_overlap_mass_runs_at_reduced_size(tmp_path):
    teachers = {
        name: replace(TINY, task=size.task, teacher_rows=size.teacher_rows)
        for name, size in overlap_mass.TEACHERS.items()
    }
    size = overlap_mass.Size(seeds=(0,), steps=2, prompts_per_step=2, every=1, held_out=2, teachers=teachers)
    numbers = overlap_mass.measure(Lab(folder=tmp_path, workers=1), size)
    assert len(numbers) == 6
    for runs in numbers.values():
        for one in runs:
            assert [*one.overlap] == [1, 2]
            assert all(0 <= mass <= 1 for mass in one.student_mass.values())
    assert len(overlap_mass.table(numbers)) == 7


def test_weight_change_runs_at_reduced_size(tmp_path, monkeypatch):
    """With a reward of the text's length, because a tiny model never sorts and GRPO needs different rewards."""

    def recipe(*arguments):
        made = grpo_recipe(*arguments)
        return {**made, "stages": [{**made["stages"][0], "reward": {"name": f"{__name__}:length"}}]}

    monkeypatch.setattr(weight_change, "grpo_recipe", recipe)
    mixed = replace(TINY, task=MIXED)
    size = weight_change.Size(
        seeds=(0,), steps=4, early=0.5, held_out=8, family=FamilySize(mixed=mixed, clean=mixed, group=2)
    )
    assert size.points == [2, 4]
    numbers = weight_change.measure(Lab(folder=tmp_path, workers=1), size)
    assert [*numbers] == ["GRPO", "opd", "reverse_kl", "sft on right examples"]
    for name in ("opd", "reverse_kl"):
        for one in numbers[name]:
            assert one.cosine[4] == pytest.approx(1.0)
            assert -1 <= one.cosine[2] <= 1
            assert 1 / math.sqrt(8) <= one.concentration <= 1
            assert set(one.accuracy) == set(weight_change.VERSIONS)
