"""The growing cache: the same keys and values as transformers' layer, written into memory that stays."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny
from transformers.cache_utils import DynamicCache, DynamicLayer

from opd.models import kv_cache
from opd.models.decoding import begin
from opd.models.kv_cache import GrowingLayer, grow_in_place


def states(n: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, n, 4)


def layers() -> tuple[DynamicLayer, GrowingLayer]:
    """A plain layer and a growing one with the same 5 tokens."""
    plain = DynamicLayer()
    plain.update(states(5), states(5))
    return plain, GrowingLayer(plain)


def assert_equal(plain: DynamicLayer, growing: GrowingLayer) -> None:
    assert growing.get_seq_length() == plain.get_seq_length()
    assert torch.equal(growing.keys, plain.keys)
    assert torch.equal(growing.values, plain.values)


@pytest.mark.parametrize("room", [1, 2, 256])
def test_growing_layer_equals_dynamic_layer(monkeypatch, room: int):
    monkeypatch.setattr(kv_cache, "ROOM", room)
    plain, growing = layers()
    for n in (1, 1, 3, 1):
        new = states(n), states(n)
        for a, b in zip(plain.update(*new), growing.update(*new), strict=True):
            assert torch.equal(a, b)
    assert_equal(plain, growing)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.reorder_cache(torch.tensor([1])),
        lambda layer: layer.batch_select_indices(torch.tensor([1, 0, 1])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.crop(-2),
        lambda layer: layer.reset(),
    ],
    ids=["reorder", "select", "repeat", "crop", "reset"],
)
def test_growing_layer_changes_as_dynamic_layer(change):
    plain, growing = layers()
    for n in (1, 2):
        new = states(n), states(n)
        plain.update(*new)
        growing.update(*new)
    change(plain)
    change(growing)
    rows = 2 if plain.keys is None else len(plain.keys)
    new = states(2, rows), states(2, rows)
    plain.update(*new)
    growing.update(*new)
    assert_equal(plain, growing)


def test_growing_layer_keeps_its_memory():
    _, growing = layers()
    growing.update(states(1), states(1))
    place = growing.keys.data_ptr()
    for _ in range(kv_cache.ROOM):
        growing.update(states(1), states(1))
    assert growing.keys.data_ptr() == place
    growing.update(states(1), states(1))
    assert growing.keys.data_ptr() != place


def test_growing_layer_makes_no_room_beyond_its_length():
    plain, _ = layers()
    growing = GrowingLayer(plain, longest=8)
    for length in (6, 7, 8, 9):  # 9 is past the length that was announced: the layer grows as without one
        growing.update(states(1), states(1))
        assert growing.memory is not None
        assert growing.memory[0].shape[-2] == (8 if length <= 8 else 9 + kv_cache.ROOM)
        assert growing.get_seq_length() == length


def test_grow_in_place_changes_plain_layers_alone():
    class Other(DynamicLayer):
        pass

    cache = DynamicCache()
    cache.layers = [DynamicLayer(), Other(), DynamicLayer()]
    for layer in cache.layers[:2]:
        layer.update(states(1), states(1))
    grow_in_place(cache)
    assert [type(layer) for layer in cache.layers] == [GrowingLayer, Other, DynamicLayer]


def test_decoder_uses_growing_layers():
    lm = tiny()
    with torch.no_grad():
        decoder = begin(lm, [[5, 6, 7], [8, 9]])
        decoder.read(torch.tensor([[3], [4]]))
        assert {type(layer) for layer in decoder.cache.layers} == {GrowingLayer}


def test_sampler_makes_room_for_its_responses_alone():
    lm = tiny()
    with torch.no_grad():
        decoder = begin(lm, [[5, 6, 7], [8, 9]], more=4)
        for _ in range(4):
            decoder.read(torch.tensor([[3], [4]]))
        assert {layer.memory[0].shape[-2] for layer in decoder.cache.layers} == {3 + 4}
