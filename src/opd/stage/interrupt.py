"""SIGINT during a run: finish the step, save, and say how to continue."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from opd.errors import OPDError


class Stopped(OPDError):  # noqa: N818  a requested stop is not an error
    """The run stopped on request; the same command continues it."""


def stopped_after(stage: str, step: int, steps: int) -> Stopped:
    return Stopped(
        f"Stopped after step {step} of {steps} of stage {stage!r}; everything is saved. "
        "The same command continues from there."
    )


class Interrupt:
    """While active, the first SIGINT sets `requested`; the second one raises KeyboardInterrupt.

    `speaks`: whether this process prints the message. Processes have to agree on `requested` themselves.
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
            print("\nStopping after this step; press Ctrl-C again to stop at once.", flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)
