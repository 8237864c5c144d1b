"""Filters: rollouts -> rollouts, some of them not trained. After the rewards, before the teacher scores.

A response or token that is not kept has `trained` False: it has no gradient and counts in no denominator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TypeAlias

import torch

from opd.pieces import token_sequences
from opd.pieces.needs import Input, Needs, Piece, Trait, needing, needing_tokenizer, needs_of, with_tokenizer
from opd.types import Filter, Rollout

Test: TypeAlias = Callable[[Rollout], bool]


@cache
def everything() -> Filter:
    """What was written is trained."""

    def keep(rollouts: Sequence[Rollout]) -> list[Rollout]:
        return list(rollouts)

    return needing(keep)


def first_passing(*tests: Test) -> Filter:
    """Of the responses to a prompt, the first that passes all tests is trained, the others are not.

    The number of attempts is the writer's `sampling.n`. Where none passes the prompt teaches nothing in this step; a
    step in which nothing passes makes no update and is counted (`train/update_skipped`).
    """

    def keep(rollouts: Sequence[Rollout]) -> list[Rollout]:
        out: list[Rollout] = []
        found = False
        for rollout in rollouts:
            found = found and rollout.sample > 0  # sample 0 begins the attempts at another prompt
            passed = not found and all(test(rollout) for test in tests)
            found = found or passed
            out.append(rollout if passed else replace(rollout, trained=torch.zeros_like(rollout.trained)))
        return out

    return Piece(keep, needs_of(*tests) | Needs(traits=frozenset({Trait.FILTERS})))


def correct() -> Test:
    """The reward is a pass: at least `PASS` (arXiv 2605.11182 App. A.23)."""

    def test(rollout: Rollout) -> bool:
        return rollout.reward is not None and rollout.reward >= PASS

    return needing(test, Input.REWARD)


def clean(must_contain: str | None = None) -> Test:
    """The response ended by itself, does not run in circles, and contains `must_contain`: `degenerate`.

    arXiv 2604.13016 App. C.1 and its released filters, where `must_contain` is a backslash and "boxed".
    """

    def test(rollout: Rollout) -> bool:
        if not rollout.finished or (must_contain is not None and must_contain not in rollout.text):
            return False
        return not degenerate(rollout.text)

    return needing(test)


def without_tokens(
    sequences: Sequence[token_sequences.TokenSequence], occurrences: token_sequences.Occurrences = "first"
) -> Filter:
    """The tokens of given sequences (texts, or lists of ids) are not trained: arXiv 2603.25562 section 4.

    `first` takes the first occurrence of each sequence in a response, as the paper's released code does, `every` all of
    them. They count in no denominator; with `weights.mask_tokens` they do. The piece needs the student's tokenizer
    (`Method.with_tokenizer`) before it is called. Raises ConfigError for an empty sequence, and when it gets the
    tokenizer for one that it does not know.
    """
    token_sequences.check(sequences, occurrences)

    def make(tokenizer: object) -> Filter:
        ids = token_sequences.encoded(sequences, tokenizer)

        def keep(rollouts: Sequence[Rollout]) -> list[Rollout]:
            masked = [token_sequences.covered_tokens(r.response_ids, ids, occurrences) for r in rollouts]
            return [
                replace(r, trained=r.trained & ~torch.tensor(row, dtype=torch.bool))
                for r, row in zip(rollouts, masked, strict=True)
            ]

        return needing(keep, Trait.LOOKS_AT_SAMPLED_TOKEN)

    return needing_tokenizer("filters.without_tokens", make, Trait.LOOKS_AT_SAMPLED_TOKEN)


def in_turn(*filters: Filter) -> Filter:
    """One after the other."""

    def keep(rollouts: Sequence[Rollout]) -> list[Rollout]:
        kept = list(rollouts)
        for one in filters:
            kept = one(kept)
        return kept

    def make(tokenizer: object) -> Filter:
        return in_turn(*(with_tokenizer(one, tokenizer) for one in filters))

    return Piece(keep, needs_of(*filters), make)


PASS = 1.0  # the least reward that counts as correct; the verifiers in `rewards` give 0 or 1


def repeats_a_line(text: str, *, length: int = 20, times: int = 5) -> bool:
    """A line of at least `length` characters, white space around it apart, occurs `times` times or more."""
    lines = Counter(line.strip() for line in text.splitlines() if len(line.strip()) >= length)
    return any(count >= times for count in lines.values())


def repeats_a_window(text: str, *, size: int = 100, stride: int = 10, times: int = 3) -> bool:
    """A window of `size` characters, taken every `stride`, occurs `times` times or more.

    A repetition whose period is no multiple of `stride` is seen where the windows meet it again: every `stride`
    periods at the latest.
    """
    windows = Counter(text[start : start + size] for start in range(0, len(text) - size + 1, stride))
    return any(count >= times for count in windows.values())


def repeats_a_block(text: str, *, beyond: int = 5000, size: int = 50, times: int = 3) -> bool:
    """In a text longer than `beyond`: a block of `size` characters stands `times` times in a row."""
    if len(text) <= beyond:
        return False
    run = 0  # how many characters in a row equal the one `size` before them
    for here, before in zip(text[size:], text, strict=False):
        run = run + 1 if here == before else 0
        if run >= size * (times - 1):
            return True
    return False


def degenerate(text: str) -> bool:
    """Any of the three, or nothing but white space."""
    return not text.strip() or repeats_a_line(text) or repeats_a_window(text) or repeats_a_block(text)
