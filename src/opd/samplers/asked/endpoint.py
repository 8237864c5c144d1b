"""A judge on a server with OpenAI's protocol: POST URL/chat/completions.

`opd.engines.server` defines failures, retries and waits. An answer that is not a completion is a transient failure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from opd.engines.server import BodyError, Connection, Server
from opd.engines.threads import as_ended
from opd.samplers.asked.protocol import Question, Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint(Server):
    """Sends questions to a server, `concurrency` at a time."""

    model: str
    body: Mapping[str, Any] = field(default_factory=dict[str, Any])
    max_tokens: int = 4096

    @property
    def identity(self) -> Mapping[str, Any]:
        """The server, the model, and the fields of a request, without the key."""
        return {"url": self.url, "model": self.model, "max_tokens": self.max_tokens, "body": dict(self.body)}

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """Replies in the order of arrival. When the caller leaves the loop, no other question is sent."""
        with self.connected() as connection:
            yield from as_ended(partial(self._answered, connection), questions, self.concurrency)

    def _answered(self, connection: Connection, question: Question) -> Reply:
        """Send one question until an answer or a final failure."""
        content = question.content
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else [dict(m) for m in content]
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "temperature": question.temperature,
            "max_tokens": self.max_tokens,
            **self.body,
        }
        given = {name: value for name, value in fields.items() if value is not None}
        answer = connection.post("chat/completions", given, self._completion)
        if answer.value is None:
            return Reply(failure=answer.failure, requests=answer.requests)
        text, cut = answer.value
        return Reply(text=text, cut=cut, requests=answer.requests)

    def _completion(self, raw: bytes) -> tuple[str, bool]:
        """The text of a completion without the key, and whether it was cut. Raises BodyError without a text."""
        try:
            choice = json.loads(raw)["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, RecursionError, KeyError, IndexError, TypeError) as error:
            raise BodyError(f"the server's answer is not a completion: {self.shown(raw)!r}") from error
        if not isinstance(text, str):
            raise BodyError(f"the completion has no text: {self.shown(raw)!r}")
        return self.without_key(text), choice.get("finish_reason") == "length"
