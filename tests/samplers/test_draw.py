"""Drawing without sorting: the sets, the inversion and the log-probs against plain Python in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import opd.models.head
from opd.samplers.draw import BLOCK, draw, invert, largest, nucleus, sums_of_blocks

BELOW_ONE = float(np.nextafter(1.0, 0.0))
ROUNDING = 1e-12  # of a float64 sum, relative to the whole


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ROWS: dict[str, Tensor] = {
    "random": normal(4, 1000),
    "steep": 12.0 * normal(4, 1000),
    "nearly flat": 1e-3 * normal(4, 1000),
    "flat": torch.zeros(2, 50_000),
    "large": 3.0 * normal(2, 50_000),
    "peaked": torch.full((2, 700), -30.0).index_fill(1, torch.tensor([7]), 20.0),
    "few values": (2.0 * normal(4, 600)).round(),
    "two values": (normal(4, 600) > 0).float(),
    "half without mass": normal(4, 300).masked_fill(normal(4, 300, seed=1) > 0, -torch.inf),
    "one-hot": torch.full((3, 200), -torch.inf).scatter(1, torch.tensor([[0], [99], [199]]), 3.0),
    "different rows": normal(6, 500) * torch.tensor([0.0, 1e-3, 0.3, 1.0, 5.0, 40.0])[:, None],
    "less than a block": normal(5, 37),
    "a block": normal(5, BLOCK),
    "a block and one": normal(5, BLOCK + 1),
    "two": normal(5, 2),
    "one": normal(5, 1),
    "hardly any mass": torch.linspace(0, -104, 400).expand(2, -1),  # down to subnormal numbers
}
every_row = pytest.mark.parametrize("logits", ROWS.values(), ids=ROWS.keys())


def mass_of(logits: Tensor) -> Tensor:
    """What `draw` hands to the filters: exp(z - max), the vocabulary filled up to whole blocks with nothing."""
    mass = torch.zeros(len(logits), -(-logits.shape[1] // BLOCK) * BLOCK)
    mass[:, : logits.shape[1]] = (logits - logits.amax(-1, keepdim=True)).exp()
    return mass


def order(mass: Sequence[float]) -> list[int]:
    """Ids by falling mass; of equals the lower id first."""
    return sorted(range(len(mass)), key=lambda v: (-mass[v], v))


def chosen(mass: Tensor, kept: Tensor) -> list[list[int]]:
    """The ids that each row keeps; what is kept keeps its mass to the bit."""
    assert kept.shape == mass.shape
    assert torch.equal(kept, mass.where(kept > 0, 0.0))
    return [row.nonzero()[:, 0].tolist() for row in kept]


# --- the sets -------------------------------------------------------------------------------------------------------


@every_row
@pytest.mark.parametrize("k", [1, 2, 10, 127, 128, 129, 599])
def test_largest_keeps_k_most_likely(logits: Tensor, k: int):
    mass = mass_of(logits)
    k = min(k, logits.shape[1])
    for row, ids in zip(mass.tolist(), chosen(mass, largest(mass.clone(), k)), strict=True):
        assert ids == sorted(v for v in order(row)[:k] if row[v] > 0)


def assert_nucleus(mass: Sequence[float], ids: list[int], top_p: float) -> None:
    """The most likely tokens, enough of them and not one more; a sum that equals top_p up to rounding may go two ways.

    Sufficiency and minimality are asserted of the set that was found; that it is a prefix of the order says the rest.
    """
    ranked = order(mass)
    assert ids == sorted(ranked[: len(ids)]), "the most likely ones, of equals those with the lower ids"
    total = math.fsum(mass)
    kept = [mass[v] for v in ranked[: len(ids)]]
    assert len(kept) >= 1
    assert math.fsum(kept) >= (top_p - ROUNDING) * total, "enough"
    assert math.fsum(kept[:-1]) < (top_p + ROUNDING) * total, "not one more"


@every_row
@pytest.mark.parametrize("top_p", [1e-9, 0.05, 0.5, 0.8, 0.9, 0.95, 0.999, 1 - 1e-9])
def test_nucleus_is_smallest_set_with_top_p_mass(logits: Tensor, top_p: float):
    mass = mass_of(logits)
    for row, ids in zip(mass.tolist(), chosen(mass, nucleus(mass.clone(), top_p)), strict=True):
        assert_nucleus(row, ids, top_p)


@every_row
def test_nucleus_and_largest_leave_mass_unchanged(logits: Tensor):
    mass = mass_of(logits)
    before = mass.clone()
    nucleus(mass, 0.7)
    largest(mass, 1)
    assert torch.equal(mass, before)


@pytest.mark.parametrize("v", [10, 1000, 50_000])
@pytest.mark.parametrize("top_p", [0.1, 0.25, 0.5, 0.9])
def test_nucleus_keeps_lower_ids_when_masses_are_equal(v: int, top_p: float):
    """Where float64 sums are exact there is no tolerance: a share of v equal tokens, those with the lower ids."""
    mass = mass_of(torch.zeros(2, v))
    wanted = list(range(math.ceil(round(top_p * v, 6))))
    assert chosen(mass, nucleus(mass, top_p)) == [wanted, wanted]
    uneven = mass_of(torch.tensor([0.0, *[-math.log(2.0)] * 2, *[-math.log(4.0)] * 8]).expand(1, -1))  # 1, 1/2, 1/4
    assert [len(ids) for p in (0.24, 0.26, 0.51, 0.57) for ids in chosen(uneven, nucleus(uneven, p))] == [1, 2, 4, 5]


@given(
    rows=st.integers(1, 140).flatmap(
        lambda v: st.lists(
            st.lists(
                st.one_of(st.floats(-20, 20, width=32), st.sampled_from([-math.inf, -1.0, 0.0, 1.0])),
                min_size=v,
                max_size=v,
            ).filter(lambda row: max(row) > -math.inf),
            min_size=1,
            max_size=2,
        )
    ),
    top_p=st.floats(1e-6, 1.0, exclude_max=True),
    k=st.integers(1, 140),
)
@settings(max_examples=60, deadline=None)
def test_nucleus_and_largest_are_exact_on_any_rows(rows: list[list[float]], top_p: float, k: int):
    mass = mass_of(torch.tensor(rows))
    for row, ids in zip(mass.tolist(), chosen(mass, nucleus(mass, top_p)), strict=True):
        assert_nucleus(row, ids, top_p)
    k = min(k, len(rows[0]))
    for row, ids in zip(mass.tolist(), chosen(mass, largest(mass, k)), strict=True):
        assert ids == sorted(v for v in order(row)[:k] if row[v] > 0)


# --- the inversion ---------------------------------------------------------------------------------------------------


def inverse(mass: Sequence[float], uniform: float) -> set[int]:
    """The first index whose running sum exceeds u times the total; two where rounding decides."""
    target = uniform * math.fsum(mass)
    near = ROUNDING * math.fsum(mass)
    up_to = list(itertools.accumulate(mass))
    first = next((i for i, value in enumerate(up_to) if value > target - near and mass[i] > 0), None)
    last = next((i for i, value in enumerate(up_to) if value > target + near and mass[i] > 0), None)
    with_mass = [i for i, value in enumerate(mass) if value > 0]
    low = with_mass[-1] if first is None else first
    high = with_mass[-1] if last is None else last
    return {i for i in with_mass if low <= i <= high}


@every_row
def test_invert_gives_token_of_uniform_number(logits: Tensor):
    mass = mass_of(logits)
    numbers = [0.0, 5e-324, 1e-17, 1e-9, *np.random.default_rng(0).random(20).tolist(), 1 - 1e-12, BELOW_ONE]
    blocks = sums_of_blocks(mass)
    torch.testing.assert_close(blocks.sum(-1), mass.double().sum(-1), rtol=1e-14, atol=0)
    for uniform in numbers:
        got = invert(mass, blocks, torch.full((len(mass),), uniform, dtype=torch.float64))
        for row, index in zip(mass.tolist(), got.tolist(), strict=True):
            assert row[index] > 0
            assert index in inverse(row, uniform)


def test_invert_gives_first_and_last_token_at_ends():
    logits = normal(50, 300).masked_fill(normal(50, 300, seed=1) > 0, -torch.inf)
    mass = mass_of(logits)
    for uniform, end in ((0.0, 0), (BELOW_ONE, -1)):
        got = invert(mass, sums_of_blocks(mass), torch.full((50,), uniform, dtype=torch.float64))
        assert got.tolist() == [row.nonzero()[end].item() for row in mass]


def test_invert_draws_no_massless_token_at_block_edge():
    """The sum of a block and the running sum in it may differ in the last bit: the end of a block has no mass here."""
    mass = mass_of(3.0 * normal(500, 8 * BLOCK))
    mass.view(500, 8, BLOCK)[:, :, 100:] = 0.0
    blocks = sums_of_blocks(mass)
    up_to = blocks.cumsum(-1)
    for block in range(8):
        edge = (up_to[:, block] / up_to[:, -1]).clamp(max=BELOW_ONE)
        for uniforms in (edge, torch.nextafter(edge, torch.zeros(()).double()), edge.clamp(min=1.0)):
            ids = invert(mass, blocks, uniforms)
            assert bool((mass.gather(1, ids[:, None]) > 0).all())


def test_invert_gives_each_token_its_share():
    """Over an even grid, frequencies are the distribution up to one draw a token; across blocks too."""
    logits, n = 2.0 * normal(1, 300), 40_000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    mass = mass_of(logits).expand(n, -1)
    counts = torch.bincount(invert(mass, sums_of_blocks(mass), grid), minlength=300)
    share = logits.double().softmax(-1)[0] * n
    assert float((counts - share).abs().max()) <= 1.0 + 1e-6


# --- drawing ---------------------------------------------------------------------------------------------------------


def reference(scaled: Tensor, top_k: int, top_p: float) -> tuple[list[float], list[float]]:
    """Log-probs [V] after temperature alone, and after top-k, then top-p; -inf outside.

    Which tokens are kept is decided by float32 masses, as equal masses are equal; everything else is float64.
    """
    z, ranked = scaled.tolist(), order(mass_of(scaled[None])[0, : len(scaled)].tolist())
    peak = max(z)
    mass = [math.exp(value - peak) for value in z]
    kept = ranked[: top_k or len(z)]
    if top_p < 1.0:
        sums = list(itertools.accumulate(mass[v] for v in kept))
        kept = kept[: next(i + 1 for i, value in enumerate(sums) if value >= top_p * sums[-1])]
    everything, inside = math.log(math.fsum(mass)), math.log(math.fsum(mass[v] for v in kept))
    among = set(kept)
    policy = [value - peak - everything for value in z]
    return policy, [value - peak - inside if v in among else -math.inf for v, value in enumerate(z)]


FILTERS = [(0, 1.0), (5, 1.0), (0, 0.7), (40, 0.9)]


@pytest.mark.parametrize("name", ["random", "steep", "peaked", "half without mass", "one-hot", "two", "one"])
@pytest.mark.parametrize("temperature", [1e-6, 0.3, 1.0, 2.0, 100.0])  # above, float32 has many equals
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_draw_log_probs_equal_reference(name: str, temperature: float, top_k: int, top_p: float):
    logits = ROWS[name]
    for uniform in (0.0, 0.123, 0.9, BELOW_ONE):
        uniforms = torch.full((len(logits),), uniform, dtype=torch.float64)
        got = draw(logits, uniforms, temperature=temperature, top_k=top_k, top_p=top_p)
        assert got.entropy is None
        assert got.sampler_logp.dtype == got.policy_logp.dtype == torch.float32
        for i, token in enumerate(got.ids.tolist()):
            policy, sampler = reference(logits[i] / temperature, top_k, top_p)
            assert sampler[token] > -math.inf
            assert got.policy_logp[i].item() == pytest.approx(policy[token], rel=1e-5, abs=1e-5)
            assert got.sampler_logp[i].item() == pytest.approx(sampler[token], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    "name", ["random", "steep", "nearly flat", "flat", "large", "peaked", "hardly any mass", "one"]
)
@pytest.mark.parametrize("temperature", [0.0, 1e-6, 0.5, 1.0, 3.0, 1e6])
def test_draw_entropy_is_before_truncation(name: str, temperature: float):
    """At temperature 0, that of temperature 1."""
    logits = ROWS[name]
    got = draw(logits, torch.zeros(len(logits)).double(), temperature=temperature, top_p=0.5, top_k=3, entropy=True)
    log_p = (logits / (temperature or 1.0)).double().log_softmax(-1)
    assert got.entropy is not None
    assert got.entropy.dtype == torch.float32
    torch.testing.assert_close(got.entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["half without mass", "one-hot"])
def test_draw_entropy_is_finite_when_tokens_are_impossible(name: str):
    logits = ROWS[name]
    got = draw(logits, torch.zeros(len(logits)).double(), temperature=1.0, entropy=True)
    p = logits.double().softmax(-1)
    assert got.entropy is not None
    torch.testing.assert_close(got.entropy.double(), -p.xlogy(p).sum(-1), rtol=1e-5, atol=1e-6)


def test_draw_is_greedy_when_cold_and_uniform_when_hot():
    logits = normal(8, 700)
    grid = torch.linspace(0, BELOW_ONE, 8, dtype=torch.float64)
    assert torch.equal(draw(logits, grid, temperature=1e-7).ids, logits.argmax(-1))
    assert torch.equal(draw(logits, grid, temperature=0.0).ids, logits.argmax(-1))
    hot = draw(logits, grid, temperature=1e7)
    assert hot.ids.tolist() == pytest.approx([min(699, 700 * u) for u in grid.tolist()], abs=1.01)
    torch.testing.assert_close(hot.policy_logp, torch.full((8,), -math.log(700)))


@every_row
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 0.9), (1.3, 30, 0.95)])
def test_draw_is_unchanged_by_tile_boundaries(
    logits: Tensor, temperature: float, top_k: int, top_p: float, monkeypatch: pytest.MonkeyPatch
):
    uniforms = torch.rand(len(logits), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    whole = draw(logits, uniforms, entropy=True, **options)
    assert whole.entropy is not None
    for rows in (1, 2, 3):
        monkeypatch.setattr(opd.models.head, "TILE_ENTRIES", rows * logits.shape[1])
        got = draw(logits, uniforms, entropy=True, **options)
        assert got.entropy is not None
        assert torch.equal(got.ids, whole.ids)
        torch.testing.assert_close(got.sampler_logp, whole.sampler_logp)
        torch.testing.assert_close(got.policy_logp, whole.policy_logp)
        torch.testing.assert_close(got.entropy, whole.entropy, equal_nan=True)


def test_draw_leaves_logits_unchanged():
    for name, logits in ROWS.items():
        before = logits.clone()
        for temperature in (0.0, 0.5, 1.0):
            draw(logits, torch.zeros(len(logits)).double(), temperature=temperature, top_k=2, top_p=0.5, entropy=True)
        assert torch.equal(logits, before), name
