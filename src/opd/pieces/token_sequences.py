"""Finds token sequences in a response. Pure Python: ids in, bools out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from opd.errors import ConfigError
from opd.messages import ids_after

TokenSequence: TypeAlias = str | Sequence[int]  # a text, or ids


Occurrences: TypeAlias = Literal["first", "every"]


def check(sequences: Sequence[TokenSequence], occurrences: str) -> None:
    """Raise ConfigError for an empty sequence, no sequence at all, or another rule than `first` and `every`."""
    if isinstance(sequences, str) or not sequences:
        raise ConfigError(f"Token sequences to mask must be a list with at least one entry, got {sequences!r}.")
    if any(len(sequence) == 0 for sequence in sequences):
        raise ConfigError(f"A token sequence to mask is empty in {list(sequences)!r}. Remove it.")
    if occurrences not in ("first", "every"):
        raise ConfigError(f"Token sequences are masked at their 'first' or at 'every' occurrence, got {occurrences!r}.")


def encoded(sequences: Sequence[TokenSequence], tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """The ids of each sequence; given ids are checked against the tokenizer.

    A text is encoded as it is behind another: for every tokenizer "wait" is the word at the beginning of a line, and
    " wait" the word behind a space. Inside a word some tokenizers use other ids for it: give these ids instead. Raises
    ConfigError for a text that the tokenizer cannot encode, or an id that it does not have.
    """
    return tuple(
        _encoded(sequence, tokenizer) if isinstance(sequence, str) else _known(tuple(sequence), tokenizer)
        for sequence in sequences
    )


def covered(ids: Sequence[int], sequences: Sequence[Sequence[int]], occurrences: Occurrences) -> list[bool]:
    """Whether each of the tokens `ids` is in the first (or any) occurrence of one of the sequences, [T]."""
    out = [False] * len(ids)
    for sequence in sequences:
        n = len(sequence)
        wanted = list(sequence)
        for start in range(len(ids) - n + 1):
            if list(ids[start : start + n]) == wanted:
                out[start : start + n] = [True] * n
                if occurrences == "first":
                    break
    return out


def covered_tokens(response_ids: Any, sequences: Sequence[Sequence[int]], occurrences: Occurrences) -> list[bool]:
    """`covered` for ids in a tensor, [T]."""
    return covered(response_ids.tolist(), sequences, occurrences)


def _encoded(text: str, tokenizer: Any) -> tuple[int, ...]:
    ids = tuple(ids_after(text, tokenizer))
    # An unknown character decodes to the unknown token, to another token, or to nothing.
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False) if ids else ""
    if not ids or back.strip() != text.strip():
        raise ConfigError(
            f"The tokenizer {_name(tokenizer)} cannot encode the text to mask {text!r}: it decodes to {back!r}. "
            "Correct the text, give token ids, or leave it out of the masked tokens."
        )
    return ids


def _known(ids: tuple[int, ...], tokenizer: Any) -> tuple[int, ...]:
    largest = max(tokenizer.get_vocab().values())
    if bad := [i for i in ids if not 0 <= i <= largest]:
        raise ConfigError(
            f"The tokenizer {_name(tokenizer)} has the ids 0 to {largest}, but the tokens to mask include {bad}. "
            "Correct the ids, or give the text."
        )
    return ids


def _name(tokenizer: Any) -> str:
    return repr(tokenizer.name_or_path) if tokenizer.name_or_path else f"({type(tokenizer).__name__})"
