"""The k largest entries of rows of logits, with one rule for equal entries.

`torch.topk` leaves open which of equal entries it lists, and in what order; in bfloat16 equal logits are common. Its
cost is that of a pass over the row with a comparison per entry. Here each row is cut into blocks, and only the k blocks
with the largest maxima are looked into: they hold the k largest entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64


LEAST_BLOCKS = 8  # blocks per entry of the list: with fewer, the chosen blocks are too much of the row


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row, [n, V] float32 -> values and ids [n, k], in falling order.

    Of equal entries the lower id comes first, so the list for a smaller k is the beginning of that for a larger k.
    """
    n, width = logits.shape
    blocks = width // BLOCK
    if blocks < LEAST_BLOCKS * k:
        places = _first(logits, k)
        return logits.gather(-1, places), places
    cut = blocks * BLOCK
    maxima = logits[:, :cut].view(n, blocks, BLOCK).amax(-1)
    # An entry of a block that is not among the first k has a larger entry, or an equal one of a lower id, in each of
    # these k blocks. In the order of their places, because equal entries are told apart by their ids.
    chosen = _first(maxima, k).sort(-1).values  # [n, k]
    ids = (chosen[:, :, None] * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
    if cut < width:  # the entries after the last block
        ids = torch.cat([ids, torch.arange(cut, width, device=logits.device).expand(n, -1)], 1)
    values = logits.gather(-1, ids)  # [n, C], by rising id
    places = _first(values, k)
    return values.gather(-1, places), ids.gather(-1, places)


def _first(values: Tensor, k: int) -> Tensor:
    """The places [n, k] of the k largest values, in falling order; of equal ones the first comes first."""
    if values.device.type == "cpu":  # elsewhere the test for ties would wait for the device
        top, places = values.topk(min(k + 1, values.shape[1]), dim=-1)
        if not bool((top[:, 1:] == top[:, :-1]).any()):
            return places[:, :k]
    return _keys(values).topk(k, dim=-1).indices


def _keys(values: Tensor) -> Tensor:
    """[n, C] float32 -> int64, no two equal: in the order of the values, of equal ones the first is the largest."""
    assert values.dtype == torch.float32, values.dtype
    bits = (values + 0.0).view(torch.int32)  # -0.0 and 0.0 are equal
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the order of the bits of negative numbers is the opposite
    place = torch.arange(values.shape[1], device=values.device)
    return (rising.long() << 32) - place
