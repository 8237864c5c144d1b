"""Forward passes: the hidden states that predict the tokens of responses, with little repeated work or padding.

Three layouts of the same rows, prompt and response each:

    padded   one row per sequence, ends padded; batches hold rows of similar length
    shared   a common prefix is read once and its cache repeated: a system prompt, or the prompt of a group of
             responses
    packed   all sequences in one row, one after another, if the attention separates them by their positions
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd.models.language_model import LanguageModel, cache_in
from opd.models.pictures import cut_before_picture

SHORTEST_SHARED_PREFIX = 16  # tokens, on average; a shorter prefix costs more in cache copies than it saves


@dataclass(frozen=True, slots=True)
class ResponseStates:
    """Hidden states [b, L, H]; `hidden[row[i], first[i] + t]` predicts token t of response i."""

    hidden: Tensor
    row: Tensor  # [n]
    first: Tensor  # [n]

    def at(self, row: Tensor, step: Tensor) -> Tensor:
        """[N, H]: the states that predict the tokens `step` [N] of the responses `row` [N]."""
        return self.hidden[self.row[row], self.first[row] + step]

    def of(self, i: int, tokens: int) -> Tensor:
        """[tokens, H]: the states that predict the first `tokens` of response i."""
        start = int(self.first[i])
        return self.hidden[int(self.row[i]), start : start + tokens]


def response_states(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> ResponseStates:
    """The states of prompts and responses. A response's last token is not read, because it predicts nothing.

    Raises DataError for a token that the model lacks.
    """
    lm.check_ids(prompts, responses)
    rows = [(*prompt, *response[:-1]) for prompt, response in zip(prompts, responses, strict=True)]
    before = [len(prompt) - 1 for prompt in prompts]  # the position that predicts the first token of the response
    if lm.packs:
        return _packed(lm, rows, before)
    prefixes = shared_prefixes(prompts) if lm.caches else None
    if prefixes is not None:
        return _after_prefixes(lm, rows, before, prefixes)
    device = lm.device
    return ResponseStates(
        states_of(lm, rows), torch.arange(len(rows), device=device), torch.tensor(before, device=device)
    )


def reads_of(lm: LanguageModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[Tensor]:
    """For each forward of `response_states`, in order, the number of sequences that read each place [b * L].

    A place of a shared prefix counts once per sequence that shares it, padding 0 times. So over all forwards each token
    of each sequence, without the response's last, counts once, whatever the layout.
    """
    lengths = [len(prompt) + len(response) - 1 for prompt, response in zip(prompts, responses, strict=True)]
    if lm.packs:
        return [torch.ones(sum(lengths), dtype=torch.long, device=lm.device)]
    prefixes = shared_prefixes(prompts) if lm.caches else None
    if prefixes is not None:
        shared = Counter(prefixes)  # in the order of the forward's rows
        longest = max(map(len, shared))
        before = [[0] * (longest - len(prefix)) + [count] * len(prefix) for prefix, count in shared.items()]
        own = [[1] * (n - len(prefix)) for n, prefix in zip(lengths, prefixes, strict=True)]
        return [torch.tensor(before, device=lm.device).reshape(-1), right_padded(own, lm.device).reshape(-1)]
    if lm.reading.together:
        return [right_padded([[1] * n for n in lengths], lm.device).reshape(-1)]
    return [torch.ones(n, dtype=torch.long, device=lm.device) for n in lengths]


def states_of(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """[b, L, H]: the states of whole rows; those after a row's end may hold anything.

    One forward for all rows, or one per row where a row's states depend on its batch.
    """
    if lm.reading.together:
        return lm.hidden(right_padded(rows, lm.device))
    alone = [lm.hidden(right_padded([row], lm.device))[0] for row in rows]
    return torch.nn.utils.rnn.pad_sequence(alone, batch_first=True)


def last_states(lm: LanguageModel, rows: Sequence[Sequence[int]], n: int) -> Tensor:
    """[b, n, H]: the states after the last `n` tokens of each row, read without a cache."""
    states = states_of(lm, rows)
    return torch.stack([states[i, len(row) - n : len(row)] for i, row in enumerate(rows)])


def shared_prefixes(prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]] | None:
    """The prefix of each row that is read once for all rows that share it; None if sharing would not pay off.

    Either every prompt up to its last token, shared by the rows of a group, or the common prefix of all rows: whichever
    leaves fewer tokens to read. The last token of a prompt is never included, because its state predicts.
    """
    if not prompts:  # a filter left no response of this step
        return None
    by_group = [tuple(prompt[: cut_before_picture(prompt, len(prompt) - 1)]) for prompt in prompts]
    everyone = common_prefix(by_group[0], *by_group[1:])
    best: list[tuple[int, ...]] | None = None
    saved = 0
    for prefixes in (by_group, [everyone] * len(prompts)):
        different = set(prefixes)
        spared = sum(map(len, prefixes)) - sum(map(len, different))
        pays = spared > 0 and spared >= SHORTEST_SHARED_PREFIX * (len(prefixes) - len(different))
        if pays and spared > saved and () not in different:
            best, saved = prefixes, spared
    return best


def common_prefix(*rows: tuple[int, ...]) -> tuple[int, ...]:
    """The leading tokens that all rows share. It ends outside of a picture, if each row does."""
    first, last = min(rows), max(rows)
    n = 0
    while n < min(len(first), len(last)) and first[n] == last[n]:
        n += 1
    return first[:n]


def _after_prefixes(
    lm: LanguageModel, rows: Sequence[tuple[int, ...]], before: list[int], prefixes: list[tuple[int, ...]]
) -> ResponseStates:
    """Read each distinct prefix once, repeat its cache, then read the rest. Gradients flow through the cache."""
    device = lm.device
    different = list(dict.fromkeys(prefixes))
    place = {prefix: i for i, prefix in enumerate(different)}
    ids, mask, positions = left_padded(different, device)
    padded = len({len(prefix) for prefix in different}) > 1
    cache = cache_in(
        lm.forward(
            ids, attention_mask=mask if padded else None, position_ids=positions if padded else None, use_cache=True
        )
    )
    index = torch.tensor([place[prefix] for prefix in prefixes], device=device)
    select(cache, index)
    own = right_padded([row[len(prefix) :] for row, prefix in zip(rows, prefixes, strict=True)], device)
    lengths = torch.tensor([len(prefix) for prefix in prefixes], device=device)
    out = lm.forward(
        own,
        attention_mask=torch.cat([mask[index], torch.ones_like(own)], 1) if padded else None,
        position_ids=lengths[:, None] + torch.arange(own.shape[1], device=device) if padded else None,
        past_key_values=cache,
        use_cache=True,
    )
    return ResponseStates(
        out.last_hidden_state, torch.arange(len(rows), device=device), torch.tensor(before, device=device) - lengths
    )


def _packed(lm: LanguageModel, rows: Sequence[tuple[int, ...]], before: list[int]) -> ResponseStates:
    device = lm.device
    starts = torch.tensor([0, *(len(row) for row in rows[:-1])], device=device).cumsum(0)
    ids = torch.tensor([[token for row in rows for token in row]], device=device)
    positions = torch.cat([torch.arange(len(row), device=device) for row in rows])[None]
    hidden = lm.forward(ids, position_ids=positions, use_cache=False).last_hidden_state
    return ResponseStates(hidden, torch.zeros_like(starts), starts + torch.tensor(before, device=device))


def batches(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], responses: Sequence[int], tokens: int
) -> list[list[int]]:
    """Row indices in batches of at most `tokens` tokens, padding included (and at least one row).

    `responses` are lengths. A batch has rows of similar length, and where `lm` caches rows of the same prefix, which
    counts once. Each different picture of a batch counts the positions that its encoder reads, beside its placeholders.
    """
    prefixes = (shared_prefixes(prompts) if lm.caches else None) or [()] * len(prompts)
    own = [len(p) + r - len(prefix) for p, r, prefix in zip(prompts, responses, prefixes, strict=True)]
    group: dict[tuple[int, ...], int] = {}
    for i, prefix in enumerate(prefixes):
        group[prefix] = max(own[i], group.get(prefix, 0))
    order = sorted(range(len(own)), key=lambda i: (-group[prefixes[i]], prefixes[i], -own[i]))
    out: list[list[int]] = []
    pictures: dict[int, int] = {}  # of the last batch
    for i in order:
        grown = [*out[-1], i] if out else [i]
        different = {prefixes[j] for j in grown}
        size = max(map(len, different)) * len(different) + max(own[j] for j in grown) * len(grown)
        seen = lm.encoded(prompts[i])
        pictures |= seen
        if out and size + sum(pictures.values()) <= tokens:
            out[-1].append(i)
        else:
            out.append([i])
            pictures = dict(seen)
    return out


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[b, L] ids, zeros after each row's end, which a causal model's valid positions never see."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *([0] * (longest - len(row)))] for row in rows], device=device)


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, attention_mask, position_ids), each [b, L], the rows' ends aligned."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def prefix_of(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The common prefix of prompts without their last tokens; empty if too short to pay off."""
    begun = [prompt[: cut_before_picture(prompt, len(prompt) - 1)] for prompt in prompts]
    shared = common_prefix(*begun) if len(begun) > 1 else ()
    return shared if len(shared) >= SHORTEST_SHARED_PREFIX else ()


def select(cache: Any, index: Tensor) -> None:
    """Keep the rows `index` of a cache, in place."""
    from transformers import Cache

    if type(cache).batch_select_indices is not Cache.batch_select_indices:
        cache.batch_select_indices(index)  # a cache with states outside its layers
    else:  # a layer's `batch_select_indices` selects its keys and values alone, without a recurrent state
        cache.reorder_cache(index)
