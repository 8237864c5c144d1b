"""The k largest entries: against a sort in plain Python, with ties, signs and widths that no block divides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opd.maths.largest import BLOCK, largest


def by_sorting(row: Tensor, k: int) -> list[int]:
    values = row.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


WIDTHS = [1, 7, BLOCK, BLOCK + 1, 9 * BLOCK, 9 * BLOCK + 5, 40 * BLOCK + BLOCK - 1]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("k", [1, 2, 8, 20])
def test_largest_equals_torch_topk_when_entries_differ(width: int, k: int):
    logits = torch.randn(6, width, generator=torch.Generator().manual_seed(width))
    if k > width:
        return
    values, ids = largest(logits, k)
    expected = logits.topk(k, dim=-1)
    assert torch.equal(values, expected.values)
    assert torch.equal(ids, expected.indices)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("levels", [1, 2, 5, 40])
def test_largest_lists_lower_ids_first_when_entries_tie(width: int, levels: int):
    """Few different values, as bfloat16 logits have; zeros of both signs are equal."""
    generator = torch.Generator().manual_seed(levels)
    logits = torch.randint(-levels, levels + 1, (5, width), generator=generator) / 4
    logits[torch.rand(logits.shape, generator=generator) < 0.2] = -0.0
    for k in (1, 3, 20):
        if k <= width:
            values, ids = largest(logits, k)
            assert ids.tolist() == [by_sorting(row, k) for row in logits]
            assert torch.equal(values, logits.gather(-1, ids))


def test_largest_of_smaller_k_begins_list_of_larger():
    logits = torch.randn(20, 30 * BLOCK, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert any(len(set(row.topk(20).values.tolist())) < 20 for row in logits), "no ties, so the test shows nothing"
    assert torch.equal(largest(logits, 8)[1], largest(logits, 20)[1][:, :8])


def test_largest_takes_extreme_logits():
    logits = torch.full((1, 20 * BLOCK), -1e30)
    logits[0, [5, 700, 701]] = torch.tensor([-torch.inf, 3e38, -1e-40])
    values, ids = largest(logits, 3)
    assert ids.tolist() == [[700, 701, 0]]
    assert values[0, 2] == -1e30


def test_largest_returns_no_rows_of_no_rows():
    values, ids = largest(torch.zeros(0, 20 * BLOCK), 3)
    assert values.shape == ids.shape == (0, 3)
