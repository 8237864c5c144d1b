"""A judge behind a server that speaks OpenAI's protocol: POST URL/chat/completions.

What passes (no connection, a time-out, a 5xx, an answer that is none) is tried again `retries` times, at growing
distances. A server that is too busy (429, or 503 with Retry-After) is waited for, as long as it says, up to
`patience_s` in all; that uses up no retry. Everything else (a wrong key, a bad request) is a failure at once.
Redirects are not followed: they would carry the key to another host.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from opd.samplers.asked.protocol import Question, Reply

LARGEST_ANSWER = 64 << 20  # bytes


SHOWN = 300  # characters of what a server says, in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """Why a request gave no answer, and what may be done about it."""

    why: str
    passes: bool = False  # it may work another time
    busy: bool = False  # it will
    after_s: float | None = None  # when, if the server says so


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error like any other status."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """None: not followed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Asks a server, `concurrency` questions at a time. Times are in seconds."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    body: Mapping[str, Any] = field(default_factory=dict[str, Any])
    max_tokens: int = 4096
    retries: int = 2
    timeout_s: float = 300.0
    patience_s: float = 300.0
    concurrency: int = 8
    backoff_s: float = 1.0  # before the first retry, doubled for each that follows; the shortest wait for a busy server

    @property
    def identity(self) -> Mapping[str, Any]:
        """The server, the model, and the fields of a request. The key is no part of it."""
        return {"url": self.url, "model": self.model, "max_tokens": self.max_tokens, "body": dict(self.body)}

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """Replies as they come in."""
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            running = {pool.submit(self._answered, question): i for i, question in enumerate(questions)}
            for done in as_completed(running):
                yield running[done], done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _answered(self, question: Question) -> Reply:
        """One question, until there is an answer or no hope."""
        content = question.content
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else [dict(m) for m in content]
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "temperature": question.temperature,
            "max_tokens": self.max_tokens,
            **self.body,
        }
        body = json.dumps({name: value for name, value in fields.items() if value is not None}).encode()
        waited, busy, failed = 0.0, 0, 0
        while True:
            sent = self._sent(body)
            if isinstance(sent, tuple):
                text, cut = sent
                return Reply(text=text, cut=cut, requests=1 + busy + failed)
            if sent.busy and sent.after_s is not None:  # 0, or a date that is past, would use up no patience
                pause = max(sent.after_s, self.backoff_s)
            else:
                pause = self.backoff_s * 2 ** (busy if sent.busy else failed)
            if sent.busy:
                if waited + pause > self.patience_s:
                    return Reply(
                        failure=f"{sent.why}; it asks for {pause:.3g} s more, after {waited:.3g} s of `patience_s` "
                        f"{self.patience_s:.3g}",
                        requests=1 + busy + failed,
                    )
                waited, busy = waited + pause, busy + 1
            elif sent.passes and failed < self.retries:
                failed += 1
            else:
                return Reply(failure=sent.why, requests=1 + busy + failed)
            time.sleep(pause)

    def _sent(self, body: bytes) -> tuple[str, bool] | Trouble:
        """One request: (text, whether it was cut), or what went wrong. The key appears in neither."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", data=body, headers=headers)
        until = time.monotonic() + self.timeout_s
        try:
            with urllib.request.build_opener(NoRedirects).open(request, timeout=self.timeout_s) as response:
                return self._read(_until(response, until))
        except urllib.error.HTTPError as error:
            return self._refused(error)
        except TimeoutError:
            return Trouble(why=f"no answer within {self.timeout_s:.3g} s", passes=True)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                return Trouble(why=f"no answer within {self.timeout_s:.3g} s", passes=True)
            return Trouble(why=self._clean(f"no connection ({type(reason).__name__}: {reason})"), passes=True)

    def _refused(self, error: urllib.error.HTTPError) -> Trouble:
        """What a status other than 200 means."""
        try:
            said = error.read(4 * SHOWN).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            said = ""
        why = self._clean(f"HTTP {error.code}: {' '.join(said.split()) or error.reason}")
        after = _seconds(error.headers.get("Retry-After"))
        busy = error.code == 429 or (error.code == 503 and after is not None)
        return Trouble(why=why, passes=error.code >= 500 or error.code == 408, busy=busy, after_s=after)

    def _read(self, raw: bytes) -> tuple[str, bool] | Trouble:
        """The text of a completion."""
        shown = self._clean(" ".join(raw[: 4 * SHOWN].decode(errors="replace").split()))
        try:
            choice = json.loads(raw)["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, RecursionError, KeyError, IndexError, TypeError):
            return Trouble(why=f"the server's answer is no completion: {shown!r}", passes=True)
        if not isinstance(text, str):
            return Trouble(why=f"the completion has no text: {shown!r}", passes=True)
        return text if not self.key else text.replace(self.key, "[key]"), choice.get("finish_reason") == "length"

    def _clean(self, text: str) -> str:
        """Without the key, which a server may repeat; no longer than is shown."""
        return (text.replace(self.key, "[key]") if self.key else text)[:SHOWN]


def _until(response: Any, until: float) -> bytes:
    """The whole body. Raises TimeoutError when it is not there in time, however it trickles."""
    parts: list[bytes] = []
    size = 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > LARGEST_ANSWER:
            raise http.client.HTTPException(f"more than {LARGEST_ANSWER} bytes")
        if time.monotonic() > until:
            raise TimeoutError
    return b"".join(parts)


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds from now: a number, or a date. None where it says neither."""
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
