"""Is a response fit to be learned from? Pure functions of its text; True is bad.

The three signs of a response that runs in circles are those of the released rollout filters of arXiv 2604.13016
(App. C.1), with their thresholds as defaults. Lengths are in characters.
"""

from __future__ import annotations

from collections import Counter

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
