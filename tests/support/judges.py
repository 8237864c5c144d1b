"""A real HTTP server that speaks OpenAI's protocol, for tests: it answers by rule, or misbehaves as it is told."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias

SECRET = "sk-the-key-that-nobody-may-read-8472"


@dataclass(frozen=True, slots=True)
class Said:
    """One response of the server; a body of bytes goes out as it is."""

    status: int = 200
    body: Any = None
    headers: tuple[tuple[str, str], ...] = ()
    wait_s: float = 0.0  # before the first byte
    trickle_s: float = 0.0  # between bytes
    hang_up: bool = False
    then_close: bool = False  # the connection, without a word in the answer


def completion(text: Any, finish: str = "stop") -> Said:
    return Said(body={"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]})


@dataclass
class Server:
    """What came in, and what goes out: the next of `script`, then whatever `rule` says of the request's text."""

    url: str
    rule: Callable[[str], Said]
    script: list[Said] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)  # paths, or whole addresses where this is a proxy
    connections: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    at_once: int = 0
    most_at_once: int = 0

    def answer(self, request: dict[str, Any], headers: dict[str, str], target: str) -> Said:
        with self.lock:
            self.requests.append(request)
            self.headers.append(headers)
            self.targets.append(target)
            if self.script:
                return self.script.pop(0)
        return self.rule(request["messages"][-1]["content"])


Rule: TypeAlias = Callable[[str], Said]


def judging(text: str) -> Said:
    """A rubric of four criteria; verdicts that depend on the answer alone."""
    asked = re.search(r"(\d+) criteria and (\d+) answers", text)
    if asked is None:
        return completion(json.dumps({"criteria": [{"criterion": f"c{i}", "points": 5 - i} for i in range(4)]}))
    answers = re.split(r"## Answer \d+.*\n", text)[1:]
    assert len(answers) == int(asked[2])
    digests = [hashlib.sha256(answer.strip().encode()).digest() for answer in answers]
    return completion(json.dumps({"verdicts": [[d[k] % 2 for k in range(int(asked[1]))] for d in digests]}))


@contextmanager
def serving(rule: Rule = judging, *, keeps_connections: bool = False) -> Iterator[Server]:
    """A server on a port of its own, in a thread, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1" if keeps_connections else "HTTP/1.0"

        def setup(self) -> None:
            super().setup()
            with server.lock:
                server.connections += 1

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path.endswith("/v1/chat/completions")
            with server.lock:
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            try:
                said = server.answer(json.loads(body), dict(self.headers), self.path)
                time.sleep(said.wait_s)
            finally:  # before the answer goes out: a client that has it may ask again before this thread runs on
                with server.lock:
                    server.at_once -= 1
            with suppress(BrokenPipeError, ConnectionResetError):  # a client that has given up
                self._say(said)
            self.close_connection |= said.then_close

        def _say(self, said: Said) -> None:
            if said.hang_up:
                self.close_connection = True
                self.connection.close()
                return
            body = said.body if isinstance(said.body, bytes) else json.dumps(said.body).encode()
            self.send_response(said.status)
            for name, value in (("Content-Length", str(len(body))), *said.headers):
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
    server = Server(url=f"http://127.0.0.1:{http.server_address[1]}/v1", rule=rule)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


# The source of a judge that a recipe names: it counts answers and letters.
COUNTING_JUDGE = """
import json


def judge(question):
    about = question.about
    if about["ask"] == "rubric":
        points = min(len(about["teacher"]), 5)
        return json.dumps({"criteria": [{"criterion": str(i), "points": points} for i in range(4)]})
    return json.dumps({"verdicts": [[len(answer) % 2, 0, 1, 1] for answer in about["answers"]]})
"""
