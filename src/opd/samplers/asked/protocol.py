"""The protocol of a judge: questions and replies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from opd.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A text, or a conversation, that a judge continues.

    `about` has the values that the text is built from, for judges that are programs. `number` distinguishes equal
    questions that need different answers. `attempt` counts the unreadable answers to this question so far.
    """

    content: str | tuple[Message, ...]
    temperature: float
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    number: int = 0
    attempt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The text, or None and `failure`, the reason. `cut`: the text ended at the judge's `max_tokens`."""

    text: str | None = None
    failure: str | None = None
    cut: bool = False
    requests: int = 1  # requests sent for it


class Judge(Protocol):
    """Answers questions with texts: `endpoint.Endpoint`, `local.LocalJudge`, `program.Program`."""

    @property
    def identity(self) -> Mapping[str, Any]: ...  # all that its answers depend on besides the question, as JSON

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """(index of the question, reply) in the order of arrival, so that each is cached before the next arrives."""
        ...


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a question has no readable answer."""

    why: str


class UnreadableError(ValueError):
    """An answer that the question's parser rejects; the message says why."""
