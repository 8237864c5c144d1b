"""Threads that wait for servers. None keeps the process alive: an error, or a second Ctrl-C, ends it at once.

The threads of `concurrent.futures.ThreadPoolExecutor` are joined at the end of its block and of the process, so a
request that a server does not answer would hold up both until its time limit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, wait
from itertools import islice
from typing import TypeVar

A = TypeVar("A")
T = TypeVar("T")


def in_thread(work: Callable[[], T]) -> Future[T]:
    """The result of `work`, which runs in a thread of its own."""
    future: Future[T] = Future()

    def _run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=_run, daemon=True, name="opd-server").start()
    return future


def results(futures: Sequence[Future[T]]) -> list[T]:
    """The results in order. Raises the first error at once, and leaves the others."""
    for one in wait(futures, return_when=FIRST_EXCEPTION).done:
        one.result()
    return [one.result() for one in futures]


def as_ended(work: Callable[[A], T], items: Sequence[A], at_once: int) -> Iterator[tuple[int, T]]:
    """(number of the item, result) of `work` on each item, in the order in which they end; `at_once` run at a time.

    Raises the error of an item. When the caller leaves the loop, the items that run are left, and no other is begun.
    """
    running: dict[Future[T], int] = {}
    left = iter(range(len(items)))

    def begin() -> None:
        for i in islice(left, at_once - len(running)):
            running[in_thread(lambda i=i: work(items[i]))] = i

    begin()
    while running:
        for one in wait(running, return_when=FIRST_COMPLETED).done:
            i = running.pop(one)
            begin()
            yield i, one.result()
