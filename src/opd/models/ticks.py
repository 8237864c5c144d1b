"""The count of the loop that is running, for a display that shows long phases; loops only count.

with counting("responses", len(rows)) as count:
    for batch in batches:
        ...
        count.add(len(batch), tokens=...)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(slots=True)
class Count:
    """`done` of `total` things named `what`, and the tokens so far."""

    what: str
    total: int
    done: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, done: int = 0, *, tokens: int = 0) -> None:
        self.done += done
        self.tokens += tokens

    def __str__(self) -> str:
        seconds = time.monotonic() - self.started
        rate = f", {self.tokens / seconds:,.0f} tokens/s" if self.tokens and seconds > 0 else ""
        return f"{self.done:,}/{self.total:,} {self.what}{rate}"


_running: list[Count] = []  # the innermost last


@contextlib.contextmanager
def counting(what: str, total: int) -> Iterator[Count]:
    """Count a loop of `total` things."""
    count = Count(what, total)
    _running.append(count)
    try:
        yield count
    finally:
        _running.remove(count)


def counted(what: str, items: Sequence[Item]) -> Iterator[Item]:
    """The items, counted."""
    with counting(what, len(items)) as count:
        for item in items:
            yield item
            count.add(1)


def innermost() -> Count | None:
    """The count of the innermost loop; None outside of a loop that counts. Read by another thread."""
    return next(iter(_running[-1:]), None)


def running() -> str:
    """The count of the innermost loop; empty outside of a loop that counts."""
    return str(_running[-1]) if _running else ""
