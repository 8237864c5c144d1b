"""`STAGE/progress.json`: what a stage does now, for other programs. At most one write a second, at least one in 30."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from opd.models.ticks import innermost

EVERY = 1.0  # seconds
BEAT = 30.0  # seconds after which it is written although nothing has changed: readers see that the run is alive


class ProgressFile:
    """The file of one stage, written by a thread of its own where something has changed; `close` ends it."""

    def __init__(self, file: Path, steps: int) -> None:
        self.file = file
        self._phase, self._since = "", time.time()
        self._step, self._steps, self._left = 0, steps, 0.0
        self._written: dict[str, Any] = {}
        self._at = 0.0  # when
        self._ended = threading.Event()
        self.trouble = ""  # why the file cannot be written; the run goes on without it
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def phase(self, text: str) -> None:
        """State what begins now."""
        self._phase, self._since = text, time.time()

    def step(self, done: int, left: float) -> None:
        """State the number of updates so far, and the seconds to the end of the stage."""
        self._step, self._left = done, left

    def close(self) -> None:
        """Write what there is, and end the thread."""
        self._ended.set()
        self._thread.join()
        self._write()

    def _watch(self) -> None:
        while not self._ended.wait(EVERY):
            self._write()

    def _write(self) -> None:
        count = innermost()
        what = {
            "phase": self._phase if count is None else f"{self._phase}, {count.what}",
            "done": None if count is None else count.done,
            "of": None if count is None else count.total,
            "since": self._since,
            "step": self._step,
            "steps": self._steps,
            "eta_seconds": self._left or None,
        }
        now = time.time()
        if (what == self._written and now - self._at < BEAT) or self.trouble:
            return
        part = self.file.with_name(f".{self.file.name}.writing-{os.getpid()}")
        try:
            part.write_text(json.dumps({**what, "updated": now}) + "\n")
            part.replace(self.file)
        except FileNotFoundError as error:  # a run that continues removes unfinished files, also this one: next time
            self.trouble = "" if self.file.parent.exists() else f"{self.file} cannot be written ({error.strerror})"
            return
        except OSError as error:
            self.trouble = f"{self.file} cannot be written ({error.strerror or error})"
        self._written, self._at = what, now
