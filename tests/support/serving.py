"""The server of `opd view` in a thread of the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opd.viewer.live import Live
from opd.viewer.serve import Server


@contextmanager
def serving(run: Path) -> Iterator[Server]:
    """Serves the run's folder while the block runs."""
    with Server(Live(run)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
