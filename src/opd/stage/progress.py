"""Progress of a run: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

# Metrics of a progress line, in this order, if present.
SHOWN = {
    "train/loss": "loss",
    "rollout/reward": "reward",
    "rollout/kept_share": "kept",
    "rollout/length": "length",
    "optim/grad_norm": "grad",
}


def quiet_libraries() -> None:
    """Turn off progress bars and advice of other libraries, which would break the display."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    if "transformers" in sys.modules:  # it reads the variables above when it is imported
        sys.modules["transformers"].utils.logging.disable_progress_bar()


def write_nowhere(stream: IO[str]) -> None:
    """Throw away what is written to a stream of this process from now on."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class RunConsole(Console):
    """A console whose closed pipe is no reason to end the run; rich would exit with status 1."""

    def on_broken_pipe(self) -> None:
        """Stop writing."""
        self.quiet = True
        write_nowhere(self.file)


class Progress:
    """Shows the progress of a run's stages; `quiet` shows nothing. Use as a context manager."""

    def __init__(
        self, *, quiet: bool = False, console: Console | None = None, seconds_between_lines: float = 5.0
    ) -> None:
        self.console = console or RunConsole(stderr=False, quiet=quiet)
        self._live: RichProgress | None = None
        self._task: dict[str, int] = {}
        self._steps: dict[str, int] = {}
        self._between = seconds_between_lines
        self._last_line = 0.0

    def __enter__(self) -> Progress:
        if self.console.is_terminal and not self.console.quiet:
            self._live = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def stage(self, name: str, steps: int) -> None:
        """Begin a stage of `steps` updates."""
        self._steps[name] = steps
        if self._live is not None:
            self._task[name] = self._live.add_task(name, total=steps, numbers="")
        else:
            self.note(f"{name}: {steps} steps")

    def step(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Show numbers after `step` updates of a stage; evaluations are always shown."""
        evaluated = {k: v for k, v in metrics.items() if k.startswith("eval/") and k.endswith(("/reward", "_kl"))}
        if evaluated:
            shown = "  ".join(
                f"{k.removeprefix('eval/').removesuffix('/reward')} {v:.3g}" for k, v in evaluated.items()
            )
            self.note(f"{stage}: after step {step}, held out: {shown}")
            return
        numbers = "  ".join(f"{label} {metrics[key]:.3g}" for key, label in SHOWN.items() if key in metrics)
        if self._live is not None and stage in self._task:
            self._live.update(self._task[stage], completed=step, numbers=numbers)  # type: ignore[arg-type]
        elif time.monotonic() - self._last_line >= self._between or step == self._steps.get(stage):
            self._last_line = time.monotonic()
            self.note(f"{stage}: step {step}/{self._steps.get(stage, '?')}  {numbers}")

    def note(self, text: str) -> None:
        """Print a line that stays above the live display."""
        console = self._live.console if self._live is not None else self.console
        try:
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        except OSError:  # a terminal that was closed
            write_nowhere(console.file)
