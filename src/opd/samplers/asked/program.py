"""A judge that is a Python function, for studies and for criteria that a program can check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opd.errors import TrainingError
from opd.samplers.asked.protocol import Question, Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Calls `function(question, **options)`, which returns a text, or None for no answer."""

    function: Callable[..., str | None]
    name: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def identity(self) -> Mapping[str, Any]:
        """The function's name and options."""
        return {"function": self.name, "options": dict(self.options)}

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """Replies in the order of the questions. Raises TrainingError if the function raises or returns no text."""
        for i, question in enumerate(questions):
            try:
                text = self.function(question, **self.options)
            except Exception as error:  # a user's function may raise anything
                raise TrainingError(
                    f"The judge {self.name} raised {type(error).__name__}: {error}. It must answer every question "
                    "with a text, or None for no answer: correct it."
                ) from error
            if text is not None and not isinstance(text, str):
                raise TrainingError(f"The judge {self.name} returned a {type(text).__name__}. Return a text, or None.")
            yield i, Reply(text=text, failure="it returned no answer" if text is None else None)
