"""`opd view`: the page of a run over loopback, alive while the run works."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable
from pathlib import Path

from opd.viewer.live import Live
from opd.viewer.serve import Server


def serve_run(path: str | Path, *, port: int, browser: bool, say: Callable[[str], None]) -> None:
    """Serve a run's page until Ctrl-C. Raises RunError: no run, no step of it, or the port is taken."""
    with Server(Live(path), port) as server:
        say(server.address)
        say(
            "This machine alone can open it, with this address. Ctrl-C ends it. From another machine: "
            f"ssh -L {server.port}:127.0.0.1:{server.port} HOST, then open the address there."
        )
        if browser:
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("opd view has ended. The run is not affected.")
