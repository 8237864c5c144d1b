"""A judge that is a Python function, for studies and for criteria that a program can check."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opd.errors import TrainingError
from opd.plugins import RAISED, contained
from opd.samplers.asked.protocol import Question, Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Calls `function(question, **options)`, which returns a text, or None for no answer.

    A call that raises or exits is repeated `retries` times, at growing intervals from `backoff_s` seconds, as a failed
    request to a server is (`opd.engines.server`). Then the question has no answer.
    """

    function: Callable[..., str | None]
    name: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    retries: int = 2
    backoff_s: float = 1.0

    @property
    def identity(self) -> Mapping[str, Any]:
        """The function's name and options."""
        return {"function": self.name, "options": dict(self.options)}

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """Replies in the order of the questions. Raises TrainingError if the function returns another type."""
        for i, question in enumerate(questions):
            yield i, self._answered(question)

    def _answered(self, question: Question) -> Reply:
        for failed in range(self.retries + 1):
            try:
                with contained():
                    text = self.function(question, **self.options)
            except RAISED as error:  # a user's function may raise anything
                if failed == self.retries:
                    why = f"the judge {self.name} raised {type(error).__name__}: {error}"
                    return Reply(failure=why, requests=failed + 1)
                time.sleep(self.backoff_s * 2**failed)
                continue
            if text is not None and not isinstance(text, str):
                raise TrainingError(f"The judge {self.name} returned a {type(text).__name__}. Return a text, or None.")
            return Reply(text=text, failure="it returned no answer" if text is None else None, requests=failed + 1)
        raise AssertionError("the loop returns")
