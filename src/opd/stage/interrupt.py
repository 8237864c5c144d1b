"""SIGINT, SIGTERM and SIGHUP during a run: finish the step, save, and say how to continue."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

from opd.errors import OPDError
from opd.stage.quiet import write_nowhere

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
TWICE = 2.0  # seconds; torchrun passes a terminal's Ctrl-C on to processes that have received it already


class Stopped(OPDError):  # noqa: N818  a requested stop is not an error
    """The run stopped on request; the same command continues it. `signal` is the number of the signal."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal = number


class StopNow(KeyboardInterrupt):
    """A signal outside of a step. Like KeyboardInterrupt, `except Exception` does not catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


def stopped_after(stage: str, step: int, steps: int, number: int) -> Stopped:
    return Stopped(
        f"Stopped after step {step} of {steps} of stage {stage!r}; everything is saved. "
        "The same command continues from there.",
        number,
    )


class Interrupt:
    """Handles the signals while active. Those that the process ignores, as under nohup, stay ignored.

    Inside `after_step` the first signal only sets `requested`, its number, and a second SIGINT raises StopNow; a second
    SIGTERM has no effect, because a scheduler may send it to every process of a job and again to the job. Elsewhere
    each signal raises StopNow. `speaks`: whether this process prints the message. Processes have to agree on
    `requested` themselves. `alone`: without other processes, in which a terminal's Ctrl-C can arrive twice.
    """

    def __init__(self, *, speaks: bool = True, alone: bool = True) -> None:
        self.requested = 0
        self._speaks, self._alone = speaks, alone
        self._waits = False
        self._at = 0.0

    def __enter__(self) -> Interrupt:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            handled = [one for one in SIGNALS if signal.getsignal(one) != signal.SIG_IGN]
            self._before = {one: signal.signal(one, self._handle) for one in handled}
        return self

    @contextlib.contextmanager
    def after_step(self) -> Iterator[None]:
        """While active, a signal waits until the code that is running looks at `requested`."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside `after_step`: while active, a signal raises StopNow, unless other processes wait for this one."""
        self._waits = not self._alone
        try:
            yield
        finally:
            self._waits = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == getattr(signal, "SIGHUP", None):
            _leave_terminal()
        again = bool(self.requested)
        if again and (number != signal.SIGINT or (not self._alone and time.monotonic() - self._at < TWICE)):
            return
        self.requested, self._at = number, time.monotonic()
        if again or not self._waits:
            raise StopNow(number)
        if self._speaks:
            how = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            with contextlib.suppress(OSError):  # not print: the signal may have arrived inside of one
                os.write(1, f"\n{signal.Signals(number).name}: Stopping after this step{how}.\n".encode())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


def _leave_terminal() -> None:
    """A closed terminal refuses every line, which would end the run before it saves."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and stream.isatty():
            write_nowhere(stream)
