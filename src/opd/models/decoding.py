"""Decoding: rows that grow token by token, read with a cache where that is exact, else as a whole at every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from opd.models.forward import last_states, left_padded, prefix_of, select
from opd.models.kv_cache import grow_in_place
from opd.models.language_model import LanguageModel, cache_in

Item = TypeVar("Item")


@dataclass(slots=True, kw_only=True)
class Decoder:
    """Rows of one batch. Make it with `begin`, which reads the prompts."""

    lm: LanguageModel
    hidden: Tensor  # [b, H]: the states that predict the next tokens
    last: Tensor  # [b, 1]: the positions of the last tokens read
    mask: Tensor | None = None  # [b, L]; None if all rows have the same length: without a mask a model is faster
    cache: Any = None
    rows: list[list[int]] | None = None  # all tokens so far, where no cache is exact

    def keep(self, places: Sequence[int]) -> None:
        """Keep these rows, in this order, and drop the others."""
        if list(places) == list(range(len(self.hidden))):
            return
        index = torch.tensor(places, device=self.hidden.device)
        self.hidden, self.last = self.hidden[index], self.last[index]
        self.mask = None if self.mask is None else self.mask[index]
        if self.rows is not None:
            self.rows = [list(self.rows[place]) for place in places]
        else:
            select(self.cache, index)

    def read(self, ids: Tensor) -> Tensor:
        """Append `ids` [b, n] to the rows; the states [b, n, H] after each of them."""
        n = ids.shape[1]
        if self.rows is not None:
            for row, new in zip(self.rows, ids.tolist(), strict=True):
                row += new
            states = last_states(self.lm, self.rows, n)
            self.last = self.last + n
        elif self.lm.reading.continues:
            states = self._advance(ids)
        else:
            states = torch.cat([self._advance(ids[:, t : t + 1]) for t in range(n)], 1)
        self.hidden = states[:, -1]
        return states

    def _advance(self, ids: Tensor) -> Tensor:
        positions = self.last + torch.arange(1, ids.shape[1] + 1, device=ids.device)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
        out = self.lm.forward(
            ids,
            attention_mask=self.mask,
            position_ids=positions if self.lm.reading.positions or self.mask is not None else None,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache, self.last = cache_in(out), positions[:, -1:]
        return out.last_hidden_state


def begin(lm: LanguageModel, prompts: Sequence[Sequence[int]], *, more: int | None = None) -> Decoder:
    """Read prompts: equal prompts once, and their common prefix, such as a system prompt, once.

    `more` is the most tokens that will follow, where that is known: the cache then makes no room for others.
    Prompts of one call must fit together: see `batches_of`.
    """
    different = list(dict.fromkeys(map(tuple, prompts)))
    lm.check_length(max(map(len, different)), "Leave out the longest prompts.")
    lm.check_ids(different)
    decoder = _begin(lm, different, more) if lm.reading.cache else _begin_without_cache(lm, different)
    if len(different) < len(prompts):
        place = {prompt: i for i, prompt in enumerate(different)}
        decoder.keep([place[tuple(prompt)] for prompt in prompts])
    return decoder


def _begin(lm: LanguageModel, prompts: list[tuple[int, ...]], more: int | None) -> Decoder:
    shared = prefix_of(prompts) if lm.sees_everything and lm.reading.continues else ()
    cache = None
    if shared:
        cache = cache_in(lm.forward(torch.tensor([shared], device=lm.device), use_cache=True))
        select(cache, torch.zeros(len(prompts), dtype=torch.long, device=lm.device))
    ids, mask, positions = left_padded([prompt[len(shared) :] for prompt in prompts], lm.device)
    padded = not bool(mask.all())
    assert lm.reading.padding or not padded, "`batches_of` puts prompts of one length together"
    mask = torch.cat([mask.new_ones(len(prompts), len(shared)), mask], 1)
    positions = positions + len(shared)
    out = lm.forward(
        ids,
        attention_mask=mask if padded else None,
        position_ids=positions if padded else None,
        past_key_values=cache,
        use_cache=True,
    )
    grow_in_place(cache_in(out), None if more is None else mask.shape[1] + more)
    return Decoder(
        lm=lm,
        hidden=out.last_hidden_state[:, -1],
        last=positions[:, -1:],
        mask=mask if padded else None,
        cache=cache_in(out),
    )


def _begin_without_cache(lm: LanguageModel, prompts: list[tuple[int, ...]]) -> Decoder:
    rows = [list(prompt) for prompt in prompts]
    last = torch.tensor([[len(row) - 1] for row in rows], device=lm.device)
    return Decoder(lm=lm, hidden=last_states(lm, rows, 1)[:, -1], last=last, rows=rows)


def batches_of(lm: LanguageModel, items: Sequence[Item], lengths: Sequence[int], most: int) -> Iterator[list[Item]]:
    """Items in batches that one `begin` can read, at most `most` each, by rising length.

    Without padding, a batch has one length; where a row's states depend on its batch, each row is a batch.
    """
    order = sorted(range(len(items)), key=lambda i: lengths[i])  # stable: a prompt's rows stay together
    apart = lm.reading.cache and not lm.reading.padding
    most = most if lm.reading.together else 1
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == most or (apart and lengths[i] != lengths[batch[0]])):
            yield [items[j] for j in batch]
            batch = []
        batch.append(i)
    if batch:
        yield [items[j] for j in batch]
