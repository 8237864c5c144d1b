"""A proxy on the loopback that stands before a server: it spoils chosen answers, or leads to another server."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2

from support.http_server import Arrived, Said, listening

CONTROL = 24  # tokens of the fixed sequence by which a server's model is recognised
MODE, DRAWN = 8, 16  # tokens of the prompt and of the response that prove what an engine draws from

CLIENT = httpx2.Client(timeout=300.0, verify=False, trust_env=False)  # to the loopback alone


def kind_of(arrived: Arrived) -> str:
    """What a request is for: scores, scores by position, a response, the fixed sequence, weights, or else about."""
    request, ids = arrived.request, arrived.request.get("prompt") or arrived.request.get("token_ids") or ()
    if arrived.target in ("/collective_rpc", "/v1/load_lora_adapter"):
        return "load"
    if arrived.target == "/update_weight_version":
        return "name"
    if arrived.target == "/v1/completions":
        return "control" if len(ids) == CONTROL else "scores"
    if arrived.target != "/inference/v1/generate":
        return "about"
    if "prompt_logprob_token_ids" in request["sampling_params"]:
        return "about" if len(ids) == CONTROL else "positions"
    return "about" if len(ids) == MODE and request["sampling_params"]["max_tokens"] == DRAWN else "response"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoilt:
    """The requests of a kind whose answers are spoilt, counted from 1, and what becomes of an answer's JSON.

    A change to None leads this and all later requests of every kind to `instead`.
    """

    kind: str
    at: tuple[int, ...] = (5, 8)
    change: Callable[[Any], Any] | None = None  # to a JSON body, or to a whole answer
    instead: str | None = None  # the address of another server; None: no server


@dataclass
class Proxy:
    """Passes requests to `upstream`, and answers back. `url` is its own address."""

    upstream: str
    spoilt: Spoilt | None = None
    url: str = ""
    seen: Counter[str] = field(default_factory=Counter)
    spoiled: int = 0  # answers
    switched: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def heal(self) -> None:
        """Pass everything to `upstream` again."""
        self.spoilt, self.switched = None, False

    def answer(self, arrived: Arrived) -> Said:
        """The server's answer, spoilt if it is one of those."""
        spoilt, kind = self.spoilt, kind_of(arrived)
        with self.lock:
            self.seen[kind] += 1
            hit = spoilt is not None and spoilt.kind == kind and self.seen[kind] in spoilt.at
            self.switched |= hit and spoilt is not None and spoilt.change is None
            self.spoiled += hit
            root = self.upstream if not self.switched or spoilt is None else spoilt.instead
        if root is None:
            return Said(hang_up=True)
        said = self._passed(root, arrived)
        if not hit or spoilt is None or spoilt.change is None or said.status != 200:
            return said
        changed = spoilt.change(json.loads(said.body) if said.body.startswith(b"{") else said.body)
        said = changed if isinstance(changed, Said) else Said(body=changed)
        time.sleep(said.wait_s)
        return said

    def _passed(self, root: str, arrived: Arrived) -> Said:
        verb = "POST" if arrived.request else "GET"
        body = json.dumps(arrived.request).encode() if arrived.request else None
        headers = {"Content-Type": "application/json"}
        answer = CLIENT.request(verb, root + arrived.target, content=body, headers=headers)
        return Said(status=answer.status_code, body=answer.content)


@contextmanager
def before(upstream: str, spoilt: Spoilt | None = None) -> Iterator[Proxy]:
    """A proxy before a server, until the block ends."""
    one = Proxy(upstream, spoilt)
    with listening(one.answer) as url:
        one.url = url
        yield one
