"""A probe of a model, when it is wrapped: which ways of reading give a row the states that it has alone.

The reference is a forward of one whole row, in eval(), without padding, mask or cache. Sampling, scoring and training
have faster ways, and each of them is wrong for some architectures: positions that count padding, states that go on
through padding, routers with noise in train(), caches of another kind. A way that differs is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd.errors import ConfigError
from opd.models.decoding import begin
from opd.models.forward import states_of
from opd.models.language_model import LanguageModel, Reading, evaluating
from opd.models.processors import noise_picture

TOKENS = (8, 12, 12)  # of the rows
AMPLIFIED = 8.0  # the layers' roundings together, in units of one rounding of the embeddings
MOST = 10.0  # times the limit of a model that amplifies nothing: a router may change its choice by a rounding
WRITTEN = 3  # the last tokens of each row, which are read one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Rows, and their log-probs [tokens, V] when each is read alone."""

    rows: Sequence[list[int]]
    log_probs: Sequence[Tensor]
    limit: float  # a difference in nats that rounding may cause


@torch.no_grad()
def probe(lm: LanguageModel) -> Reading:
    """The ways of reading that are exact for this model. Raises ConfigError for a model that is not causal."""
    lm = replace(lm, autocast=False)  # its rounding would hide small differences
    rows = rows_for(lm)
    with evaluating(lm.model):
        expected = [log_probs(lm, hidden) for hidden in alone(lm, rows)]
        reference = Reference(rows=rows, log_probs=expected, limit=rounding(lm, rows, expected))
        check_causal(lm, reference)

        def exact(places: Sequence[int], read: Callable[[list[list[int]]], Sequence[Tensor]]) -> bool:
            return difference(lm, reference, places, read) <= reference.limit

        def decodes(places: Sequence[int], *, padding: bool = False, continues: bool = False, positions: bool) -> bool:
            reading = Reading(together=together, padding=padding, continues=continues, positions=positions)
            return exact(places, lambda rows: decoded(replace(lm, reading=reading), rows))

        together = exact((0, 1, 2), lambda rows: list(states_of(replace(lm, reading=Reading()), rows)))
        equal = (1, 2) if together else (1,)  # rows of one length
        positions = decodes(equal, positions=True)
        cache = positions or decodes(equal, positions=False)
        training = trains_as_it_evaluates(lm, reference)
        if not training:
            check_trains(lm, rows[-1])
        return Reading(
            together=together,
            cache=cache,
            padding=cache and together and decodes((0, 1), padding=True, positions=positions),
            continues=cache and decodes(equal, continues=True, positions=positions),
            positions=positions or not cache,
            recurrent=cache and keeps_a_state(begin(lm, rows[:1]).cache),
            training=training,
        )


def notes_on(lm: LanguageModel) -> tuple[str, ...]:
    """What the user sees of a model that is read in slower ways than usual."""
    reading, name = lm.reading, f"{lm.name}: {type(lm.causal_lm).__name__}"
    notes: list[str] = []
    if not reading.together:
        notes.append(f"{name} gives a row other states in a batch than alone, so each row is read alone, which is slow")
    if not reading.cache:
        notes.append(
            f"{name} gives other states with a cache, or keeps none, so sampling reads each row again for every token, "
            "which is slow for long responses"
        )
    elif reading.together and not reading.padding:
        notes.append(f"{name} gives a padded row other states, so only prompts of one length are sampled together")
    if not reading.training:
        # transformers computes layers again in train() alone
        without = ", and gradient checkpointing has no effect" if lm.checkpointing else ""
        notes.append(f"{name} gives other states in train() than in eval(), so it trains in eval(){without}")
    if lm.sees and not lm.patch_values:
        notes.append(
            f"{name} has no patch size in its vision config, so micro_batch_tokens counts its images' placeholders "
            "alone, and the encoder takes memory beside them"
        )
    return tuple(notes)


def rows_for(lm: LanguageModel) -> list[list[int]]:
    """Rows of random text tokens, no longer than the model's positions."""
    special = {*lm.tokenizer.all_special_ids, *lm.stop_ids, *lm.unwritten}
    text = [i for i in range(lm.vocabulary) if i not in special] or list(range(lm.vocabulary))
    order = torch.randint(len(text), (sum(TOKENS),), generator=torch.Generator().manual_seed(0)).tolist()
    most = max(WRITTEN + 1, int(min(lm.positions, max(TOKENS))))
    ids = iter(order)
    rows = [[text[next(ids)] for _ in range(tokens)][:most] for tokens in TOKENS]
    return with_pictures(lm, rows) if lm.sees else rows


def with_pictures(lm: LanguageModel, rows: Sequence[list[int]]) -> list[list[int]]:
    """The rows with a picture of noise in each, another one in another place; the last ids stay text."""
    shown = [noise_picture(lm.tokenizer, place).ids for place in range(len(rows))]
    return [
        [*row[: place + 1], *picture, *row[place + 1 :]]
        for place, (row, picture) in enumerate(zip(rows, shown, strict=True))
    ]


def alone(lm: LanguageModel, rows: Sequence[list[int]]) -> list[Tensor]:
    """The states [tokens, H] of each row, read alone."""
    return [lm.hidden(torch.tensor([row], device=lm.device))[0] for row in rows]


def log_probs(lm: LanguageModel, hidden: Tensor) -> Tensor:
    """[n, H] -> [n, V]."""
    return lm.head().logits(hidden).log_softmax(-1)


def rounding(lm: LanguageModel, rows: Sequence[list[int]], expected: Sequence[Tensor]) -> float:
    """The largest difference of log-probs, in nats, that is put down to rounding; `expected`: those of the rows.

    How much rounding a model amplifies is measured: the rows are read with each number of the embeddings changed by one
    rounding, as every layer changes them. Of SmolLM2-135M this moves log-probs by up to 1.2e-4 in float32; its layouts
    differ by 6e-5 on one processor and by 1.8e-4 on another. In bfloat16 they differ by .3.
    """
    dtype = lm.head().weight.dtype
    eps = torch.finfo(dtype).eps
    least = 1e-4 + 4 * eps * max(float(lm.head().logits(hidden).abs().max()) for hidden in alone(lm, rows[-1:]))
    if dtype not in (torch.float32, torch.float64):  # the limit is wide already
        return least
    return min(max(least, AMPLIFIED * amplified(lm, rows, expected, eps)), MOST * least)


def amplified(lm: LanguageModel, rows: Sequence[list[int]], expected: Sequence[Tensor], eps: float) -> float:
    """The largest change of a log-prob, in nats, when each number of the embeddings changes by the factor 1 +- eps."""
    draws = torch.Generator().manual_seed(0)

    def changed(module: Any, given: Any, embeddings: Tensor) -> Tensor:
        signs = torch.randint(0, 2, embeddings.shape, generator=draws).to(embeddings) * 2 - 1
        return embeddings * (1 + eps * signs)

    model: Any = lm.causal_lm
    hook = model.get_input_embeddings().register_forward_hook(changed)
    try:
        read = [log_probs(lm, hidden) for hidden in alone(lm, rows)]
    finally:
        hook.remove()
    return max(distance(got, wanted) for got, wanted in zip(read, expected, strict=True))


def difference(
    lm: LanguageModel,
    reference: Reference,
    places: Sequence[int],
    read: Callable[[list[list[int]]], Sequence[Tensor]],
) -> float:
    """The largest difference of log-probs between rows read by `read` and alone, in nats; infinite for an error.

    `read` returns the states of each row's first tokens, or of its last.
    """
    rows = [reference.rows[i] for i in places]
    try:
        states = read(rows)
    except Exception:  # an architecture without this way of reading may raise anything
        return float("inf")
    worst = 0.0
    for i, hidden in zip(places, states, strict=True):
        expected = reference.log_probs[i]
        n = min(len(hidden), len(expected))
        expected = expected[:n] if len(hidden) >= len(expected) else expected[-n:]
        worst = max(worst, distance(log_probs(lm, hidden[:n]), expected))
    return worst


def distance(got: Tensor, expected: Tensor) -> float:
    """The largest absolute difference of log-probs; -inf equals -inf, NaN differs from everything."""
    return float(torch.where(got == expected, 0.0, (got - expected).abs()).nan_to_num(nan=torch.inf).max())


def decoded(lm: LanguageModel, rows: list[list[int]]) -> list[Tensor]:
    """The states of each row's last tokens, read as the sampler reads them; the rows change places on the way."""
    decoder = begin(lm, [row[:-WRITTEN] for row in rows])
    new = torch.tensor([row[-WRITTEN:] for row in rows], device=lm.device)
    first, last = new[:, :-1], new[:, -1:]
    states = [decoder.hidden[:, None]]
    states += [decoder.read(ids) for ids in ([first] if lm.reading.continues else first.split(1, 1))]
    turned = list(reversed(range(len(rows))))
    decoder.keep(turned)
    return list(torch.cat([*states, decoder.read(last[turned])[turned]], 1))


def keeps_a_state(cache: Any) -> bool:
    """Whether a cache holds more than the keys and values of all tokens."""
    from transformers import Cache

    layers = any(hasattr(layer, "conv_states") for layer in cache.layers)
    return layers or type(cache).batch_select_indices is not Cache.batch_select_indices


def check_causal(lm: LanguageModel, reference: Reference) -> None:
    """Raise ConfigError if a token's distribution depends on later tokens."""
    row, expected = reference.rows[-1], reference.log_probs[-1]
    (hidden,) = alone(lm, [row[:-WRITTEN]])
    if (worst := distance(log_probs(lm, hidden), expected[:-WRITTEN])) > reference.limit:
        raise ConfigError(
            f"{lm.name}: {type(lm.causal_lm).__name__} predicts a token with the help of later tokens: without the "
            f"last {WRITTEN} tokens of a row, its earlier log-probs change by up to {worst:.3g} nats. So it cannot "
            "write responses. Use a causal language model; for a BERT-like model that is one, set is_decoder in its "
            "config."
        )


def trains_as_it_evaluates(lm: LanguageModel, reference: Reference) -> bool:
    """Whether train() gives the log-probs of eval(), whatever the global random state."""

    def as_alone(rows: list[list[int]]) -> list[Tensor]:
        lm.model.train()
        try:
            return alone(lm, rows)
        finally:
            lm.model.eval()

    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        for seed in (0, 1):
            torch.manual_seed(seed)
            if difference(lm, reference, (2,), as_alone) > reference.limit:
                return False
    return True


def check_trains(lm: LanguageModel, row: list[int]) -> None:
    """Raise ConfigError if no gradient can be computed in eval(), where the model computes what it samples from."""
    with torch.enable_grad():
        total = alone(lm, [row])[0].sum()
        if not total.requires_grad:
            return
        try:
            torch.autograd.grad(total, [p for p in lm.model.parameters() if p.requires_grad], allow_unused=True)
        except Exception as error:  # an architecture may raise anything
            raise ConfigError(
                f"{lm.name}: {type(lm.causal_lm).__name__} computes other log-probs in train() than in eval(), and has "
                f"no gradient in eval() ({error!r:.200}). So it cannot train on what it samples. Use another "
                "architecture."
            ) from error
