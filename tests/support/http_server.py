"""A real HTTP server on a port of its own, which answers as a function says, or misbehaves."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, slots=True)
class Said:
    """One response of the server; a body of bytes goes out as it is."""

    status: int = 200
    body: Any = None
    headers: tuple[tuple[str, str], ...] = ()
    wait_s: float = 0.0  # before the first byte
    trickle_s: float = 0.0  # between bytes
    hang_up: bool = False
    cut: int = 0  # bytes that the header promises and that do not come
    then_close: bool = False  # the connection, without a word in the answer


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request; `request` is its JSON, empty for a GET."""

    target: str
    headers: dict[str, str]
    request: dict[str, Any]


@contextmanager
def listening(
    answer: Callable[[Arrived], Said], connected: Callable[[], None] = lambda: None, *, keeps_connections: bool = False
) -> Iterator[str]:
    """A server in a thread until the block ends; its address. `connected` is called at each new connection."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1" if keeps_connections else "HTTP/1.0"

        def setup(self) -> None:
            super().setup()
            connected()

        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, request: dict[str, Any]) -> None:
            said = answer(Arrived(self.path, dict(self.headers), request))
            with suppress(BrokenPipeError, ConnectionResetError):  # a client that has given up
                self._say(said)
            self.close_connection |= said.then_close or said.cut > 0

        def _say(self, said: Said) -> None:
            if said.hang_up:
                self.close_connection = True
                self.connection.close()
                return
            body = said.body if isinstance(said.body, bytes) else json.dumps(said.body).encode()
            self.send_response(said.status)
            for name, value in (("Content-Length", str(len(body) + said.cut)), *said.headers):
                self.send_header(name, value)
            self.end_headers()
            if not said.trickle_s:
                self.wfile.write(body)
                return
            for i in range(len(body)):
                self.wfile.write(body[i : i + 1])
                self.wfile.flush()
                time.sleep(said.trickle_s)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
