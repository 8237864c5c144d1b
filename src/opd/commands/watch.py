"""`opd watch`: a run in the terminal, drawn again each second until q or Ctrl-C. It reads files alone."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.live import Live

from opd.viewer.read import read_again, read_run
from opd.viewer.terminal import screen

EVERY = 1.0  # seconds


def watch_run(path: str | Path, *, stage: str | None, once: bool, console: Console | None = None) -> None:
    """Show a run. `once`, or an output that is no terminal: one screen. Raises as `read_run` and `screen`."""
    console = console or Console(highlight=False)
    colour = console.color_system is not None and not console.no_color
    run = read_run(path)
    if once or not console.is_terminal:
        console.print(screen(run, stage, console.width, colour=colour))
        return
    with (
        _keys() as pressed,
        Live(screen(run, stage, console.width, colour=colour), console=console, screen=True) as live,
    ):
        while not pressed(EVERY):
            run = read_again(run)
            live.update(screen(run, stage, console.width, colour=colour))
    console.print(screen(run, stage, console.width, colour=colour))


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """A function that waits so many seconds and tells whether q or Ctrl-C was pressed. Keys are not shown."""
    try:
        import termios
        import tty
    except ImportError:  # Windows: Ctrl-C alone

        def _sleep(seconds: float) -> bool:
            try:
                time.sleep(seconds)
            except KeyboardInterrupt:
                return True
            return False

        yield _sleep
        return
    before = termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
    if before is not None:
        tty.setcbreak(sys.stdin)

    def _pressed(seconds: float) -> bool:
        try:
            if before is None:
                time.sleep(seconds)
                return False
            ready = select.select([sys.stdin], [], [], seconds)[0]
            return bool(ready) and os.read(sys.stdin.fileno(), 1) in (b"q", b"Q", b"")
        except KeyboardInterrupt:
            return True

    try:
        yield _pressed
    finally:
        if before is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
