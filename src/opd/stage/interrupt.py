"""SIGINT, in the middle of a run: finish the step, save, say how to go on."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from opd.errors import OPDError


class Stopped(OPDError):  # noqa: N818  what happened is no error
    """A run that was asked to stop; the same command goes on with it."""


def stopped_after(stage: str, step: int, steps: int) -> Stopped:
    return Stopped(
        f"Stopped after step {step} of {steps} of stage {stage!r}; everything is saved. "
        "The same command goes on from there."
    )


class Interrupt:
    """While active, the first SIGINT sets `asked`; the second one is an ordinary KeyboardInterrupt.

    Of several processes one `speaks`; that all of them were asked is for them to agree on.
    """

    def __init__(self, *, speaks: bool = True) -> None:
        self.requested = False
        self._speaks = speaks

    def __enter__(self) -> Interrupt:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._speaks:
            print("\nStopping after this step; once more to stop at once.", flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)
