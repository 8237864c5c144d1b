"""What is asked, what comes back, and the protocol of those who answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from opd.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A text, or a conversation, that somebody goes on with.

    `about` says what it is made of in values: a program reads that. `number` tells equal questions apart that want
    different answers. `attempt` counts from 0 how often an answer to this question could not be read.
    """

    content: str | tuple[Message, ...]
    temperature: float
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    number: int = 0
    attempt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A text, or None and why there is none. `cut` says that it had reached the largest length."""

    text: str | None = None
    failure: str | None = None
    cut: bool = False
    requests: int = 1  # that it took


class Judge(Protocol):
    """Somebody who is asked for texts: `endpoint.Endpoint`, `local.LocalJudge`, `program.Program`."""

    @property
    def identity(self) -> Mapping[str, Any]: ...  # what its answers depend on besides the question; what JSON can hold

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """Each question's index and reply, in the order in which they come: what has come is kept, whatever follows."""
        ...


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a question has no answer that can be read."""

    why: str


class UnreadableError(ValueError):
    """A text that is not what was asked for; the message says what is wrong with it."""
