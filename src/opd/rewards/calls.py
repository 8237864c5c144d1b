"""One call of a function that may raise, exit or hang: its limit of time, and lines while it is waited for."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from opd.plugins import contained

T = TypeVar("T")

FIRST_LINE_S = 10.0  # how long a call takes before a line says what is waited for; then after twice as long, and so on


class TooLongError(Exception):
    """A call took longer than its limit."""


class _Interrupt(BaseException):
    """Ends the call. No Exception: the function may catch those."""


def called(function: Callable[[], T], timeout_s: float | None) -> T:
    """The result of `function()`. Raises what it raises, `contained`, and TooLongError after `timeout_s` seconds.

    The limit is the signal SIGALRM, which only the main thread can receive. In other threads, on Windows, and while the
    function computes in C without returning to Python, the call is not interrupted: TooLongError is raised at its end.
    """
    started = time.monotonic()
    if timeout_s is None:
        with contained():
            return function()
    try:
        with interrupted(timeout_s, _Interrupt), contained(_Interrupt):
            result = function()
    except _Interrupt:
        raise TooLongError(f"it took longer than {timeout_s:g} s") from None
    if time.monotonic() - started > timeout_s:
        raise TooLongError(f"it took {time.monotonic() - started:.3g} s, longer than {timeout_s:g} s")
    return result


@contextmanager
def interrupted(seconds: float, error: type[BaseException], *, cpu: bool = False) -> Iterator[None]:
    """Raise `error` in the block after `seconds` of wall time, with `cpu` of this process's CPU time.

    There is no limit outside of the main thread and on Windows, which have no such signal.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise error

    number, timer = (signal.SIGVTALRM, signal.ITIMER_VIRTUAL) if cpu else (signal.SIGALRM, signal.ITIMER_REAL)
    before = signal.signal(number, stop)
    signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)
        signal.signal(number, before)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Waiting:
    """Prints what is waited for while it takes long: first after `first_s` seconds, then each time twice as long.

    One thread watches all calls of a block; `now` says what runs.
    """

    def __init__(self, first_s: float = FIRST_LINE_S, out: Callable[[str], None] = say) -> None:
        self.first_s, self.out = first_s, out
        self._what: str | None = None
        self._since = 0.0
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._run, name="opd-waiting", daemon=True)

    def __enter__(self) -> Waiting:
        self._watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._watch.join()

    def now(self, what: str) -> None:
        """The call that begins, e.g. "the reward 'mine:run' on prompt 3"."""
        self._what, self._since = what, time.monotonic()

    def _run(self) -> None:
        after, which = self.first_s, None
        while not self._done.wait(self.first_s / 4):
            what, seconds = self._what, time.monotonic() - self._since
            if which != (what, self._since):
                which, after = (what, self._since), self.first_s
            if what is not None and seconds >= after:
                self.out(f"waiting for {what}: {seconds:.0f} s")
                after = 2 * after
