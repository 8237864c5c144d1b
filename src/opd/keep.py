"""Keep: rollouts -> rollouts, some of them not trained. After the rewards, before the teacher scores.

A response or token that is not kept has `trained` False: it has no gradient and counts in no denominator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TypeAlias

import torch

from opd import filters
from opd import sequences as token_sequences
from opd.binding import binding, bound, unbound
from opd.needs import needing, needs_of
from opd.types import Keep, Rollout

Test: TypeAlias = Callable[[Rollout], bool]


@cache
def everything() -> Keep:
    """What was written is trained."""
    return needing(lambda rollouts: list(rollouts))


def first_passing(*tests: Test) -> Keep:
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

    return needing(keep, "filtered", *needs_of(*tests))


def correct() -> Test:
    """The reward is a pass: at least `filters.PASS` (arXiv 2605.11182 App. A.23)."""
    return needing(lambda rollout: rollout.reward is not None and rollout.reward >= filters.PASS, "reward")


def clean(must_contain: str | None = None) -> Test:
    """The response ended by itself, does not run in circles, and contains `must_contain`: `filters.degenerate`.

    arXiv 2604.13016 App. C.1 and its released filters, where `must_contain` is a backslash and "boxed".
    """

    def test(rollout: Rollout) -> bool:
        if not rollout.finished or (must_contain is not None and must_contain not in rollout.text):
            return False
        return not filters.degenerate(rollout.text)

    return needing(test)


def without_tokens(
    sequences: Sequence[token_sequences.Given], occurrences: token_sequences.Occurrences = "first"
) -> Keep:
    """The tokens of given sequences (texts, or lists of ids) are not trained: arXiv 2603.25562 section 4.

    `first` takes the first occurrence of each sequence in a response, as the paper's released code does, `every` all of
    them. They count in no denominator; with `weights.mask_tokens` they do. The piece has to be bound to a tokenizer
    (`Method.bound`) before it is called. Raises ConfigError for an empty sequence, and when it is bound for one that
    the tokenizer does not know.
    """
    token_sequences.check(sequences, occurrences)

    def bind(tokenizer: object) -> Keep:
        ids = token_sequences.encoded(sequences, tokenizer)

        def keep(rollouts: Sequence[Rollout]) -> list[Rollout]:
            masked = [token_sequences.covered_tokens(r.response_ids, ids, occurrences) for r in rollouts]
            return [
                replace(r, trained=r.trained & ~torch.tensor(row, dtype=torch.bool))
                for r, row in zip(rollouts, masked, strict=True)
            ]

        return needing(keep, "sampled_token")

    return binding(needing(unbound("keep.without_tokens"), "sampled_token"), bind)


def in_turn(*keeps: Keep) -> Keep:
    """One after the other."""

    def keep(rollouts: Sequence[Rollout]) -> list[Rollout]:
        kept = list(rollouts)
        for one in keeps:
            kept = one(kept)
        return kept

    return binding(
        needing(keep, *needs_of(*keeps)), lambda tokenizer: in_turn(*(bound(one, tokenizer) for one in keeps))
    )
