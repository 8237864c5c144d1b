"""Filters: rollouts -> rollouts, some of them untrained. Called after the rewards and before the teacher scores.

A filtered response or token has `trained` False: it has no gradient and is not counted in the denominator.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Literal, TypeAlias

from opd.errors import ConfigError
from opd.pieces import token_sequences
from opd.pieces.needs import Input, Needs, Piece, Trait, needing, needing_tokenizer, needs_of, with_tokenizer
from opd.plugins import np, torch
from opd.types import Filter, Rollout

Test: TypeAlias = Callable[[Rollout], bool]
PASS = 1.0  # the least reward that counts as correct; the verifiers in `rewards` give 0 or 1


@cache
def everything() -> Filter:
    """All responses are trained."""

    def keep(rollouts: Sequence[Rollout]) -> list[Rollout]:
        return list(rollouts)

    return needing(keep)


def first_passing(*tests: Test) -> Filter:
    """The first response to a prompt that passes all tests is trained, the others are not.

    The number of attempts is the writer's `sampling.n`. A prompt without a passing response trains no token. A step
    without a passing response makes no update and is counted (`train/update_skipped`).
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
    """The reward is at least `PASS` (arXiv 2605.11182 App. A.23)."""

    def test(rollout: Rollout) -> bool:
        return rollout.reward is not None and rollout.reward >= PASS

    return needing(test, Input.REWARD)


def clean(must_contain: str | None = None) -> Test:
    """The response is finished, is not `degenerate`, and contains `must_contain`.

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

    `first`: the first occurrence of each sequence in a response, as in the paper's released code; `every`: all
    occurrences. Masked tokens are not counted in the denominator; with `weights.mask_tokens` they are. The piece needs
    the student's tokenizer (`Method.with_tokenizer`) before it is called. Raises ConfigError for an empty sequence,
    and, given the tokenizer, for a sequence that it does not know.
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


def balanced(ratio: float = 1.0, passes: float = PASS, seed: int = 0) -> Filter:
    """Right to wrong responses of a prompt are trained in `ratio`: surplus ones of one class are left out at random.

    The online balance of arXiv 2605.03677, within a prompt's group. A response is right if its reward is at least
    `passes`. The number that stays is rounded down, and at least 1. A group without a right or without a wrong response
    stays whole, and a response without a reward is trained. The choice depends on `seed`, the step and the prompt.
    Raises ConfigError for a ratio that is not positive and finite, and for a `seed` below 0.
    """
    if not 0.0 < ratio < math.inf:
        raise ConfigError(f"The balance is right to wrong responses, above 0 and finite, got {ratio}.")
    if seed < 0:
        raise ConfigError(f"The seed of the balance must be at least 0, got {seed}.")

    def surplus(places: Sequence[int], rollouts: Sequence[Rollout]) -> set[int]:
        """Of a prompt's responses, given by their places, those that are left out."""
        rewards = {i: rollouts[i].reward for i in sorted(places, key=lambda i: rollouts[i].sample)}
        right = [i for i, reward in rewards.items() if reward is not None and reward >= passes]
        wrong = [i for i, reward in rewards.items() if reward is not None and reward < passes]
        if not right or not wrong:
            return set()
        rights, wrongs = max(1, int(len(wrong) * ratio)), max(1, int(len(right) / ratio))
        many, stay = (right, rights) if len(right) > rights else (wrong, wrongs)
        first = rollouts[places[0]]
        order = np.random.default_rng((seed, first.sampler_version, first.prompt.id)).permutation(len(many))
        return {many[i] for i in order[stay:]}

    def keep(rollouts: Sequence[Rollout]) -> list[Rollout]:
        groups: dict[int, list[int]] = {}
        for i, rollout in enumerate(rollouts):
            groups.setdefault(rollout.prompt.id, []).append(i)
        out = set[int]().union(*(surplus(places, rollouts) for places in groups.values()))
        return [replace(r, trained=torch.zeros_like(r.trained)) if i in out else r for i, r in enumerate(rollouts)]

    return needing(keep, Input.REWARD, Input.GROUP, Trait.LOOKS_AT_SAMPLED_TOKEN)


def in_turn(*filters: Filter) -> Filter:
    """Several filters, one after another."""

    def keep(rollouts: Sequence[Rollout]) -> list[Rollout]:
        kept = list(rollouts)
        for one in filters:
            kept = one(kept)
        return kept

    def make(tokenizer: object) -> Filter:
        return in_turn(*(with_tokenizer(one, tokenizer) for one in filters))

    return Piece(keep, needs_of(*filters), make)


def repeats_a_line(text: str, *, length: int = 20, times: int = 5) -> bool:
    """A line of at least `length` characters, stripped, occurs `times` times or more."""
    lines = Counter(line.strip() for line in text.splitlines() if len(line.strip()) >= length)
    return any(count >= times for count in lines.values())


def repeats_a_window(text: str, *, size: int = 100, stride: int = 10, times: int = 3) -> bool:
    """A window of `size` characters, taken every `stride`, occurs `times` times or more.

    If its period is not a multiple of `stride`, a repetition is found where windows align with it again: after at most
    `stride` periods.
    """
    windows = Counter(text[start : start + size] for start in range(0, len(text) - size + 1, stride))
    return any(count >= times for count in windows.values())


def repeats_a_block(text: str, *, beyond: int = 5000, size: int = 50, times: int = 3) -> bool:
    """In a text longer than `beyond`: a block of `size` characters occurs `times` times in a row."""
    if len(text) <= beyond:
        return False
    run = 0  # how many characters in a row equal the one `size` before them
    for here, before in zip(text[size:], text, strict=False):
        run = run + 1 if here == before else 0
        if run >= size * (times - 1):
            return True
    return False


def degenerate(text: str) -> bool:
    """Any of the three repetitions, or only white space."""
    return not text.strip() or repeats_a_line(text) or repeats_a_window(text) or repeats_a_block(text)


def turns_up_to(first: int, every: int, most: int, end: Literal["front", "back"] = "front") -> Filter:
    """The first, or last, min(first + s // every, most) turns of a response are trained in step s: arXiv 2604.24005.

    s counts from 0; it is the version of the weights that wrote the response. A turn without own tokens does not count.
    Raises ConfigError for numbers below 1, and for `most` below `first`.
    """
    if min(first, every, most) < 1 or most < first:
        raise ConfigError(
            f"A curriculum of turns begins with at least 1, adds one every 1 or more steps, and ends at least where it "
            f"begins; got first {first}, every {every}, most {most}."
        )

    def keep(rollouts: Sequence[Rollout]) -> list[Rollout]:
        out: list[Rollout] = []
        for rollout in rollouts:
            known = sorted({int(turn) for turn in rollout.turn[rollout.trained]})
            allowed = min(first + rollout.sampler_version // every, most)
            kept = torch.tensor(known[:allowed] if end == "front" else known[-allowed:], dtype=torch.long)
            out.append(replace(rollout, trained=rollout.trained & torch.isin(rollout.turn, kept)))
        return out

    return needing(keep, *([Trait.LOOKS_AT_SAMPLED_TOKEN] if end == "back" else []))
