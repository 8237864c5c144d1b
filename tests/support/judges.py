"""A real HTTP server that speaks OpenAI's protocol, for tests: it answers by rule, or misbehaves as it is told."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from support.http_server import Arrived, Said, listening

SECRET = "sk-the-key-that-no-output-shows-8472"


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
    server = Server(url="", rule=rule)

    def answer(arrived: Arrived) -> Said:
        assert arrived.target.endswith("/v1/chat/completions")
        with server.lock:
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            said = server.answer(arrived.request, arrived.headers, arrived.target)
            time.sleep(said.wait_s)
        finally:  # before the answer goes out: a client that has it may ask again before this thread runs on
            with server.lock:
                server.at_once -= 1
        return said

    def connected() -> None:
        with server.lock:
            server.connections += 1

    with listening(answer, connected, keeps_connections=keeps_connections) as root:
        server.url = f"{root}/v1"
        yield server


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
