"""Work in threads that the process does not wait for at its end: requests, and collectives without a time limit.

A pool's threads are waited for at exit, so that a server that never answers would keep an ended run alive.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_thread(work: Callable[[], T], name: str = "opd-draw") -> Future[T]:
    """`work` in a thread that does not keep the process alive."""
    future: Future[T] = Future()

    def _run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=_run, daemon=True, name=name).start()
    return future
