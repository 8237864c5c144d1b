"""An HTTP client for a model on a JSON server: retries, waits, and no message that shows the key.

Transient failures (no connection, a time-out, a 5xx, an unusable body) are retried `retries` times, at growing
intervals. A busy server (429, or 503 with Retry-After) is waited for, as long as it says, up to `patience_s` in total;
waits do not count as retries. Other failures (a wrong key, a bad request) are final. Redirects are not followed: they
would send the key to another host. Cookies are not kept.

A connection is reused only within `IDLE_S` after its last answer, and only if the server has not closed it, which the
client checks before it sends. If a connection is lost later, the server may have read the request, so the request
counts as failed.
"""

from __future__ import annotations

import email.utils
import functools
import json
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2

from opd.errors import ConfigError

T = TypeVar("T")

LARGEST_BODY = 64 << 20  # bytes of an answer
LARGEST_ERROR = 64 << 10  # bytes read of an error's body
SHOWN = 300  # characters of a server's text in a message
IDLE_S = 1.0  # below the 5 s (uvicorn) to 75 s (nginx) after which servers close idle connections


class BodyError(Exception):
    """The body of an answer cannot be used; the message says why."""


class WrongServerError(BodyError):
    """No answer of this server can be used, now or later; that of another one may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(Generic[T]):
    """The value read from an answer's body, or None and the reason."""

    value: T | None = None
    failure: str | None = None
    requests: int = 1  # requests sent
    transient: bool = field(default=False, compare=False)  # of a failure: the same request may succeed later
    lost: bool = field(default=False, compare=False)  # of a transient one: the server gave no answer at all
    wrong: bool = field(default=False, compare=False)  # of a transient one: from another server alone
    sent: int = field(default=0, compare=False)  # bytes
    received: int = field(default=0, compare=False)  # bytes of the answer's body
    waits: int = field(default=0, compare=False)  # for a busy server


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trouble:
    """Why a request got no answer, and whether to try again."""

    why: str
    passes: bool = False  # transient: retry
    lost: bool = False  # no answer at all: no connection, or a time-out
    wrong: bool = False  # the server is the wrong one
    busy: bool = False  # the server is busy: wait
    after_s: float | None = None  # seconds to wait, if the server says so


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The address of a model, with retries and time limits. Times are in seconds.

    Raises:
        ConfigError: the key does not fit into an HTTP header.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    retries: int = 2
    timeout_s: float = 300.0  # for each wait for the server, and for a whole answer
    patience_s: float = 300.0
    concurrency: int = 8  # threads that share the connections
    backoff_s: float = 1.0  # before the first retry, then doubled; also the shortest wait for a busy server

    def __post_init__(self) -> None:
        if self.key and not fits_header(self.key):
            raise ConfigError("The key of the server has white space or a character that an HTTP header cannot hold.")

    @contextmanager
    def connected(self) -> Iterator[Connection]:
        """Connections that `concurrency` threads share, closed at the end of the block.

        Raises:
            ConfigError: the environment's proxy for this address cannot be used.
        """
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        with httpx2.Client(
            headers=headers,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            follow_redirects=False,
            verify=_certificates(),
            proxy=proxy_of(self.url),
            trust_env=False,
            timeout=self.timeout_s,  # for each read and write; `_within` limits the whole
            limits=httpx2.Limits(
                max_connections=self.concurrency, max_keepalive_connections=self.concurrency, keepalive_expiry=IDLE_S
            ),
        ) as client:
            yield Connection(self, client)

    def shown(self, said: bytes) -> str:
        """The beginning of a server's text, on one line and without the key, which it may repeat."""
        without = said.replace(self.key.encode(), b"[key]") if self.key else said
        return self.without_key(" ".join(without[: 4 * SHOWN].decode(errors="replace").split()))[:SHOWN]

    def without_key(self, text: str) -> str:
        """The text with the key replaced by "[key]"."""
        return text.replace(self.key, "[key]") if self.key else text


@dataclass(frozen=True, slots=True)
class Connection:
    """A connected server. Threads may share it."""

    server: Server
    client: httpx2.Client = field(repr=False)

    def post(self, path: str, fields: Mapping[str, Any], read: Callable[[bytes], T]) -> Answer[T]:
        """Send `fields` to URL/path until an answer or a final failure; `read` parses the body.

        `read` raises BodyError for a body that it cannot use.
        """
        return self._answered("POST", path, json.dumps(fields).encode(), read)

    def get(self, path: str, read: Callable[[bytes], T]) -> Answer[T]:
        """Get URL/path, as `post` does."""
        return self._answered("GET", path, b"", read)

    def _answered(self, verb: str, path: str, body: bytes, read: Callable[[bytes], T]) -> Answer[T]:
        server = self.server
        waited, busy, failed = 0.0, 0, 0
        while True:
            requests = 1 + busy + failed
            size: dict[str, Any] = {"requests": requests, "sent": requests * len(body), "waits": busy}
            sent = self._sent(verb, f"{server.url.rstrip('/')}/{path}", body)
            if isinstance(sent, bytes):
                try:
                    return Answer(value=read(sent), received=len(sent), **size)
                except BodyError as error:
                    wrong = isinstance(error, WrongServerError)
                    sent = _Trouble(why=server.without_key(str(error)), passes=True, wrong=wrong)
            if sent.busy and sent.after_s is not None:  # at least backoff_s: 0 or a past date would use no patience
                pause = max(sent.after_s, server.backoff_s)
            else:
                pause = server.backoff_s * 2 ** (busy if sent.busy else failed)
            if sent.busy:
                if waited + pause > server.patience_s:
                    why = (
                        f"{sent.why}; it requests {pause:.3g} s more, after {waited:.3g} s of `patience_s` "
                        f"{server.patience_s:.3g}"
                    )
                    return Answer(failure=why, transient=True, **size)
                waited, busy = waited + pause, busy + 1
            elif sent.passes and not sent.wrong and failed < server.retries:
                failed += 1
            else:
                return Answer(failure=sent.why, transient=sent.passes, lost=sent.lost, wrong=sent.wrong, **size)
            time.sleep(pause)

    def _sent(self, verb: str, url: str, body: bytes) -> bytes | _Trouble:
        """Send one request: the body of its answer, or the trouble, without the key in its text."""
        until = time.monotonic() + self.server.timeout_s
        late = _Trouble(why=f"no answer within {self.server.timeout_s:.3g} s", passes=True, lost=True)
        try:
            with self.client.stream(verb, url, content=body or None) as response:
                if not response.is_success:
                    return self._refused(response, until)
                parts: list[bytes] = []
                size = 0
                for part in _within(response, until):
                    parts.append(part)
                    size += len(part)
                    if size > LARGEST_BODY:
                        return _Trouble(why=f"the answer has more than {LARGEST_BODY} bytes", passes=True)
                return b"".join(parts)
        except (httpx2.TimeoutException, TimeoutError):
            return late
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, UnicodeError, OverflowError) as error:
            cause = _cause(error)  # UnicodeError and OverflowError: an invalid host or port
            if isinstance(cause, TimeoutError):
                return late
            why = self.server.without_key(f"no connection ({type(cause).__name__}: {cause})")[:SHOWN]
            return _Trouble(why=why, passes=True, lost=True)

    def _refused(self, response: httpx2.Response, until: float) -> _Trouble:
        """The trouble of a status other than success."""
        said = b""
        with suppress(httpx2.HTTPError, TimeoutError):  # the part received is enough
            for part in _within(response, until):
                said += part
                if len(said) > LARGEST_ERROR:
                    break
        code = response.status_code
        why = self.server.without_key(f"HTTP {code}: {self.server.shown(said) or response.reason_phrase}")[:SHOWN]
        after = _seconds(response.headers.get("Retry-After"))
        busy = code == 429 or (code == 503 and after is not None)
        return _Trouble(why=why, passes=code >= 500 or code == 408, busy=busy, after_s=after)


@functools.cache
def _certificates() -> ssl.SSLContext:
    """The trusted certificates, read once: that takes longer than a request to the loopback."""
    return httpx2.create_ssl_context()


def in_turn(*sends: Callable[[], Answer[Any]]) -> Answer[Any]:
    """Send one request after the other: the last answer, or the first failure, with the counts of all."""
    found: list[Answer[Any]] = []
    for send in sends:
        found.append(send())
        if found[-1].value is None:
            break
    totals = {name: sum(getattr(one, name) for one in found) for name in ("requests", "sent", "received", "waits")}
    return replace(found[-1], **totals)


def fits_header(key: str) -> bool:
    """Whether a key fits into an HTTP header: printable ASCII without white space."""
    return re.fullmatch(r"[!-~]+", key) is not None


def proxy_of(url: str) -> httpx2.Proxy | None:
    """The environment's proxy for an address: `http_proxy`, `https_proxy` and `no_proxy`.

    Raises:
        ConfigError: not the address of an HTTP proxy. The message does not show it, since it may hold a password.
    """
    parts = urlsplit(url)
    address = None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)
    if not address:
        return None
    with suppress(ValueError, httpx2.InvalidURL):  # refused below; these errors would show the address
        proxy = httpx2.Proxy(address if "://" in address else f"http://{address}")
        if proxy.url.scheme in ("http", "https"):
            return proxy
    raise ConfigError(
        f"The environment variable {parts.scheme}_proxy is not the address of an HTTP proxy (http://host:port), but "
        f"requests to {parts.hostname} would use it. Correct it, or add that host to no_proxy."
    )


def _within(response: httpx2.Response, until: float) -> Iterator[bytes]:
    """The body in parts. Raises TimeoutError if the whole body has not arrived by `until`."""
    for part in response.iter_raw():
        yield part
        if time.monotonic() > until:
            raise TimeoutError


def _cause(error: BaseException) -> BaseException:
    """The operating system's error in the client's error, if any."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, OSError):
        inner = inner.__cause__ or inner.__context__
    return inner or error


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds from now, from a number or a date. None for anything else."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
