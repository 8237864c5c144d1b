"""Progress of a run: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from opd.models.ticks import running
from opd.stage.pace import spoken
from opd.stage.progress_file import ProgressFile
from opd.stage.quiet import write_nowhere

# Metrics of a progress line, in this order, if present.
SHOWN = {
    "train/loss": "loss",
    "rollout/reward": "reward",
    "rollout/kept_share": "kept",
    "rollout/length": "length",
    "optim/grad_norm": "grad",
}


class RunConsole(Console):
    """A console whose closed pipe is no reason to end the run; rich would exit with status 1."""

    def on_broken_pipe(self) -> None:
        """Stop writing."""
        self.quiet = True
        write_nowhere(self.file)


class Progress:
    """Shows the progress of a run's stages; `quiet` shows nothing. Use as a context manager."""

    def __init__(
        self,
        *,
        quiet: bool = False,
        console: Console | None = None,
        seconds_between_lines: float = 5.0,
        longest_silence: float = 15.0,
    ) -> None:
        self.console = console or RunConsole(stderr=False, quiet=quiet)
        self._live: RichProgress | None = None
        self._task: dict[str, int] = {}
        self._steps: dict[str, int] = {}
        self._between = seconds_between_lines
        self._last_line = self._last_note = 0.0  # of steps, of any kind
        self._silence = longest_silence
        self._phase, self._since = "", time.monotonic()
        self._ended = threading.Event()
        self._file: ProgressFile | None = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal and not self.console.quiet:
            self._live = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
            )
            self._live.start()
        if not self.console.quiet:
            self._ended.clear()
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self.record(None)
        if self._live is not None:
            self._live.stop()
            self._live = None

    def phase(self, text: str) -> None:
        """State what begins now. If it takes long without a line, a line shows it with the count of its loop."""
        self._phase, self._since = text, time.monotonic()
        if self._file is not None:
            self._file.phase(text)

    def record(self, file: Path | None, steps: int = 0) -> None:
        """Write the progress of a stage to `file` from now on; None ends it."""
        if self._file is not None:
            self._file.close()
            if self._file.trouble:
                self.note(f"{self._file.trouble}: the run went on without it")
        self._file = None if file is None else ProgressFile(file, steps)

    def _watch(self) -> None:
        """Print a line whenever none was printed for `longest_silence` seconds."""
        while not self._ended.wait(min(1.0, self._silence / 4)):
            now = time.monotonic()
            if not self._phase or now - max(self._since, self._last_note) < self._silence:
                continue
            count = running()
            text = f"{self._phase}: {count + ', ' if count else ''}{spoken(now - self._since)} so far"
            if self._live is not None and self._task:
                self._live.update(list(self._task.values())[-1], numbers=text)  # type: ignore[arg-type]
                self._last_note = now
            else:
                self.note(text)

    def stage(self, name: str, steps: int) -> None:
        """Begin a stage of `steps` updates."""
        self._steps[name] = steps
        if self._live is not None:
            self._task[name] = self._live.add_task(name, total=steps, numbers="")
        else:
            self.note(f"{name}: {steps} steps")

    def step(
        self, stage: str, step: int, metrics: Mapping[str, float], *, rate: float = 0.0, left: float = 0.0
    ) -> None:
        """Show numbers after `step` updates of a stage; evaluations are always shown.

        `rate`: response tokens per second. `left`: seconds to the end of the stage.
        """
        if self._file is not None:
            self._file.step(step, left)
        evaluated = {k: v for k, v in metrics.items() if k.startswith("eval/") and k.endswith(("/reward", "_kl"))}
        if evaluated:
            shown = "  ".join(
                f"{k.removeprefix('eval/').removesuffix('/reward')} {v:.3g}" for k, v in evaluated.items()
            )
            self.note(f"{stage}: after step {step}, held out: {shown}")
            return
        numbers = "  ".join(f"{label} {metrics[key]:.3g}" for key, label in SHOWN.items() if key in metrics)
        numbers += f"  {rate:,.0f} tokens/s" if rate else ""
        numbers += f"  {spoken(left)} left" if left >= 1 else ""
        if self._live is not None and stage in self._task:
            self._live.update(self._task[stage], completed=step, numbers=numbers)  # type: ignore[arg-type]
        elif time.monotonic() - self._last_line >= self._between or step == self._steps.get(stage):
            self._last_line = time.monotonic()
            self.note(f"{stage}: step {step}/{self._steps.get(stage, '?')}  {numbers}")

    def note(self, text: str) -> None:
        """Print a line that stays above the live display."""
        self._last_note = time.monotonic()
        console = self._live.console if self._live is not None else self.console
        try:
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        except OSError:  # a terminal that was closed
            write_nowhere(console.file)
