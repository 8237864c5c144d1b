"""Runs a server for a process that holds this one's standard input open, and ends both with it. Imports no library.

`python guard.py COMMAND...`: the command runs in a session of its own. When standard input closes, because the other
process has closed it or has died in any way, the command gets SIGTERM, and after `GRACE_S` its whole process group
SIGKILL. Once the command has ended, its other processes have `LINGER_S` to remove their shared memory; then they are
killed, and this ends with the command's exit status.

A program of its own, since a signal on the death of a parent exists on Linux alone, and reaches neither the processes
that a server starts nor one whose parent thread ended first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

GRACE_S = 10.0  # between SIGTERM and SIGKILL
LINGER_S = 3.0


def guard(command: Sequence[str]) -> int:
    """Run the command until it ends, or standard input closes. Returns its exit status; 128 + n after signal n."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # a run that gets one finishes its step first; a child resets handlers
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def stop_when_closed() -> None:
        while os.read(0, 1024):
            pass
        child.terminate()
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            kill_group(child.pid)

    threading.Thread(target=stop_when_closed, daemon=True).start()
    status = child.wait()
    until = time.monotonic() + LINGER_S
    while exists(child.pid) and time.monotonic() < until:
        time.sleep(0.05)
    kill_group(child.pid)
    return status if status >= 0 else 128 - status


def exists(number: int) -> bool:
    """Whether a process group has a process."""
    try:
        os.killpg(number, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def kill_group(number: int) -> None:
    """Kill every process of a group that still exists."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # PermissionError: macOS, for a group of zombies
        os.killpg(number, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1:]))
