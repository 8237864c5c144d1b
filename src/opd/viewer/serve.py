"""The server of `opd view`: on this machine alone, with a token, for reading.

Only 127.0.0.1 is bound. The address holds a token of 192 bits once; the answer moves it to a cookie that no script and
no other site can use. A request with another Host is refused, so a name that resolves to this machine (DNS rebinding)
reaches nothing. Paths are names in fixed forms, never paths of files. For a run on another machine use `ssh -L`.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from opd.errors import OPDError, RunError
from opd.viewer.live import Live, as_json

HOSTS = ("127.0.0.1", "localhost")
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the page's own policy is in the page
}
HTML, JSON, BYTES, TEXT = "text/html; charset=utf-8", "application/json", "application/octet-stream", "text/plain"
PNG = "image/png"


class Server(ThreadingHTTPServer):
    """Serves one run. `address` is what a browser opens. Raises RunError if the port cannot be bound."""

    daemon_threads = True
    allow_reuse_address = False

    def __init__(self, live: Live, port: int = 0) -> None:
        self.live, self.token = live, secrets.token_urlsafe(24)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise RunError(
                f"Port {port} of 127.0.0.1 cannot be used ({error.strerror or error}). Leave --port out for a free one."
            ) from error

    @property
    def port(self) -> int:
        """The port that is bound."""
        return int(self.server_address[1])

    @property
    def address(self) -> str:
        """The page's address, with the token."""
        return f"http://127.0.0.1:{self.port}/?token={self.token}"

    @property
    def cookie(self) -> str:
        """The cookie's name; one for each port, because browsers share cookies between ports."""
        return f"opd{self.port}"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "opd", ""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
        """No log: the terminal keeps the address."""

    def do_GET(self) -> None:
        """Answer a request of the page."""
        try:
            self._answer()
        except (BrokenPipeError, ConnectionResetError):  # the reader closed the page
            self.close_connection = True
        except OPDError as error:
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, str(error).encode(), TEXT)

    def _answer(self) -> None:
        asked = urlsplit(self.path)
        query = parse_qs(asked.query)
        token = query.get("token", [""])[0]
        if not self._from_here():
            self._send(HTTPStatus.MISDIRECTED_REQUEST, b"This server answers to 127.0.0.1 alone.", TEXT)
        elif asked.path == "/" and token and self._equal(token):
            cookie = f"{self.server.cookie}={self.server.token}; HttpOnly; SameSite=Strict; Path=/"
            self._send(HTTPStatus.SEE_OTHER, b"", TEXT, {"Location": "/", "Set-Cookie": cookie})
        elif not self._equal(self._cookie()):
            text = b"Open the address that opd view printed: it holds a token."
            self._send(HTTPStatus.UNAUTHORIZED, text, TEXT)
        else:
            self._content(*self._found(asked.path, query))

    def _content(self, kind: str, body: bytes | None) -> None:
        """Send what was found, unless the reader has it."""
        if body is None:
            self._send(HTTPStatus.NOT_FOUND, b"There is nothing under this address.", TEXT)
            return
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        if self.headers.get("If-None-Match") == tag:
            self._send(HTTPStatus.NOT_MODIFIED, b"", kind, {"ETag": tag})
        else:
            self._send(HTTPStatus.OK, body, kind, {"ETag": tag})

    def _found(self, path: str, query: dict[str, list[str]]) -> tuple[str, bytes | None]:
        """The type and content under an address of the fixed forms."""
        live, parts = self.server.live, path.strip("/").split("/")
        if path == "/":
            return HTML, live.page().encode()
        if parts == ["state"]:
            return JSON, as_json(live.state())
        if parts[0] == "since" and len(parts) == 3 and all(part.isascii() and part.isdigit() for part in parts[1:]):
            found = live.since(int(parts[1][:9]), int(parts[2][:12]))
            return JSON, None if found is None else as_json(found)
        if parts[0] == "data" and len(parts) == 2 and parts[1].isascii() and parts[1].isdigit():
            found = live.data(int(parts[1][:9]))
            return JSON, None if found is None else as_json(found)
        if parts[0] == "block" and len(parts) == 2:
            return BYTES, live.block(parts[1])
        if parts[0] == "image" and len(parts) == 2:
            return PNG, live.image(parts[1])
        if parts[0] == "row" and len(parts) == 2:
            return BYTES, live.row(parts[1], query.get("tokens", [""])[0])
        return TEXT, None

    def _from_here(self) -> bool:
        host, _, port = (self.headers.get("Host") or "").rpartition(":")
        return host in HOSTS and port == str(self.server.port)

    def _cookie(self) -> str:
        try:
            found = SimpleCookie(self.headers.get("Cookie") or "").get(self.server.cookie)
        except CookieError:
            return ""
        return "" if found is None else found.value

    def _equal(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.server.token.encode())

    def _send(self, status: HTTPStatus, body: bytes, kind: str, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **HEADERS, **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
