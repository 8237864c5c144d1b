"""What `opd view` serves of a run at work: its page, its state, new points of its curves, and blocks of responses.

The run's files are opened for reading alone, and no lock is taken. Lines that were read are not read again; a file of
responses is read when a reader of the page opens it.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd.messages import visible
from opd.viewer import page
from opd.viewer.content import block_of, live_content, run_shown
from opd.viewer.curves import axes_of, compact, evaluated_of, series_of
from opd.viewer.facts import head_of, opened_first, silent, state_of
from opd.viewer.images import copy_in
from opd.viewer.read import RunView, StageView, read_again, read_run
from opd.viewer.report import stages_of
from opd.viewer.responses import row_block

CHUNK = 2048  # tokens of a long response that a page loads at a time
KEPT = 16  # blocks that stay in memory
BLOCK = re.compile(r"(\d{1,4})-(curves|held|follow|s\d{1,12})")
ROW = re.compile(r"(\d{1,4})-(s\d{1,12}|held_[a-z0-9_]{1,40})-(\d{1,9})")
IMAGE = re.compile(r"(\d{1,4})-([0-9a-f]{32})")
SPANS = re.compile(r"\d{1,9}-\d{1,9}(,\d{1,9}-\d{1,9}){0,2000}")


class Live:
    """A run's folder as it is now. Several threads may call it. Raises RunError where a file cannot be read."""

    def __init__(self, path: str | Path) -> None:
        self.run: RunView = read_run(path)
        stages_of(self.run, None)  # refuses a run without a step
        self._lock = threading.Lock()  # of what is read again
        self._blocks_lock = threading.Lock()  # a large block must not hold up the state
        self._blocks: dict[tuple[Any, ...], bytes] = {}

    @property
    def stages(self) -> list[StageView]:
        """The stages that have begun, in the order of the page."""
        return list(self.run.stages.values())

    def _stage(self, n: int) -> StageView | None:
        """Stage n of the page. `run` is replaced as a whole, so that no lock is needed."""
        stages = self.stages
        return stages[n] if n < len(stages) else None

    def page(self) -> str:
        """The page without blocks; what it shows without a script is of now."""
        with self._lock:
            self.run = read_again(self.run)
            contents = [live_content(self.run, stage) for stage in self.stages]
            first, name = opened_first(self.stages), visible(self.run.name)
            return page.render(name, [run_shown(self.run)], contents, first=first, live=True, scripts=["live"])

    def state(self) -> dict[str, Any]:
        """What a page compares with what it shows: of each stage its steps, files, phase and state."""
        with self._lock:
            self.run = read_again(self.run)
            return {"chunk": CHUNK, "stages": [self._state(stage) for stage in self.stages]}

    def data(self, n: int) -> dict[str, Any] | None:
        """What the page's script knows of stage n, as of now; None without such a stage."""
        with self._lock:
            stage = self._stage(n)
            return None if stage is None else live_content(self.run, stage).data

    def since(self, n: int, step: int) -> dict[str, Any] | None:
        """The points of the curves of stage n after a step, as in the block `curves`; None without such a stage."""
        with self._lock:
            stage = self._stage(n)
            if stage is None:
                return None
            new = StageView(
                stage.name,
                stage.path,
                stage.spec,
                [row for row in stage.metrics if row["step"] > step],
                [row for row in stage.timings if row["step"] > step],
                stage.keys,
            )
            return {
                "made": stage.steps_done,
                "lines": compact(series_of(new)),
                "points": compact(evaluated_of(new)),
                "axes": [axes_of(stage)],
            }

    def block(self, name: str) -> bytes | None:
        """A block of the page by name (`0-curves`, `0-held`, `0-follow`, `0-s120`); None if there is none."""
        found = BLOCK.fullmatch(name)
        stage = None if found is None else self._stage(int(found[1]))
        if found is None or stage is None:
            return None
        what = found[2]
        if what == "curves":
            with self._lock:
                return block_of(stage, what)
        files = tuple(stage.whens) if what == "held" else tuple(stage.sample_steps)
        if what.startswith("s") and int(what[1:]) not in files:
            return None
        # A resumed run writes the file of a step again.
        written = self._time(stage, int(what[1:])) if what.startswith("s") else hash(files)
        with self._blocks_lock:
            return self._kept((stage.name, what, written), lambda: block_of(stage, what))

    def row(self, name: str, spans: str) -> bytes | None:
        """One response with chosen tokens, `0-s120-5` and `0-64,4096-6144`, as a block of one row; None if absent."""
        found = ROW.fullmatch(name)
        stage = None if found is None or SPANS.fullmatch(spans) is None else self._stage(int(found[1]))
        if found is None or stage is None:
            return None
        parts = [(int(a), int(b)) for a, b in (span.split("-") for span in spans.split(","))]
        with self._blocks_lock:
            return row_block(stage, found[2], int(found[3]), parts)

    def image(self, name: str) -> bytes | None:
        """The copy of an image by stage and name, `0-` and 32 hexadecimal digits, as PNG; None if there is none."""
        found = IMAGE.fullmatch(name)
        stage = None if found is None else self._stage(int(found[1]))
        return None if found is None or stage is None else copy_in(stage.path, found[2])

    def _state(self, stage: StageView) -> dict[str, Any]:
        progress, planned = stage.progress or {}, int(stage.spec.get("steps") or 0)
        state = state_of(stage)
        says = "finished" if state == "finished" else f"{state}, step {stage.steps_done} of {planned}"
        if state == "running":  # a process that does not say that it works has no time left to count down
            late = silent(stage)
            says += "".join(f", {part}" for part in (_phase(progress), late or _left(progress)) if part)
        return {
            "name": stage.name,
            "made": stage.steps_done,
            "state": state,
            "says": says,
            "facts": head_of(self.run, stage)["facts"],
            "samples": stage.sample_steps[-1:],
            "count": len(stage.sample_steps),
            "whens": stage.whens,
        }

    def _time(self, stage: StageView, step: int) -> int:
        """When the file of a step was written: a resumed run writes it again."""
        try:
            return (stage.path / "samples" / f"step_{step:06d}.parquet").stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _kept(self, key: tuple[Any, ...], make: Callable[[], bytes | None]) -> bytes | None:
        """The block under `key`, made once; the oldest ones are dropped."""
        if key not in self._blocks:
            made = make()
            if made is None:
                return None
            self._blocks[key] = made
            while len(self._blocks) > KEPT:
                self._blocks.pop(next(iter(self._blocks)))
        return self._blocks[key]


def _phase(progress: dict[str, Any]) -> str:
    """What the run does now: `held out (before) 12 of 40`."""
    done, of = progress.get("done"), progress.get("of")
    return str(progress.get("phase") or "") + (f" {done} of {of}" if done is not None and of else "")


def _left(progress: dict[str, Any]) -> str:
    """The time to the stage's end, less what has passed since the run wrote it."""
    eta, updated = progress.get("eta_seconds"), progress.get("updated")
    if not isinstance(eta, int | float) or not isinstance(updated, int | float):
        return ""
    left = max(0.0, eta - (time.time() - updated))
    return f"{left:.0f} s left" if left < 100 else f"{left / 60:.0f} min left"


def as_json(value: Any) -> bytes:
    """JSON for the page's script."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
