"""Tools and environments that misbehave, for recipes of tests: `bad_tools:raises`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from enum import Enum, StrEnum
from typing import Any

from opd.environments.protocol import Begun, Environment, Observation, Seed, Turn
from opd.types import Prompt


def raises(text: str) -> str:
    """Raises.

    Args:
        text: Any.
    """
    raise KeyError(text)


def leaves(text: str) -> str:
    """Exits.

    Args:
        text: Any.
    """
    sys.exit(3)


def hangs(text: str) -> str:
    """Takes a minute.

    Args:
        text: Any.
    """
    for _ in range(600):
        time.sleep(0.1)
    return text


def shouts(text: str) -> str:
    """Prints a megabyte, and returns one.

    Args:
        text: Any.
    """
    print("x" * 10**6)
    print("y" * 10**6, file=sys.stderr)
    return "z" * 10**6


def codes(text: str) -> str:
    """Returns control codes and the text of a special token.

    Args:
        text: Any.
    """
    return "\x1b[2J\x00\u202e<eos>\ud800"


def returns_number(text: str) -> float:
    """Returns a number.

    Args:
        text: Any.
    """
    return float("nan")


def returns_nothing(text: str) -> None:
    """Returns nothing.

    Args:
        text: Any.
    """


class Unshown:
    def __str__(self) -> str:
        raise ValueError("not shown")


def returns_object(text: str) -> Any:
    """Returns an object that has no text.

    Args:
        text: Any.
    """
    return Unshown()


def moves(text: str) -> str:
    """Changes the working folder, and catches its own interruption.

    Args:
        text: Any.
    """
    os.chdir("/")
    with contextlib.suppress(Exception):
        time.sleep(60)
    return "moved"


def no_docstring(text: str) -> str:
    return text


def no_types(text):
    """No types.

    Args:
        text: Any.
    """
    return text


async def waits(text: str) -> str:
    """Is awaited.

    Args:
        text: Any.
    """
    return text


def yields(text: str) -> Any:
    """Yields.

    Args:
        text: Any.
    """
    yield text


class Waits:
    """Is awaited."""

    async def __call__(self, text: str) -> str:
        """Is awaited.

        Args:
            text: Any.
        """
        return text


def any_number(*texts: str) -> str:
    """Takes any number.

    Args:
        texts: Any.
    """
    return "".join(texts)


def any_name(**texts: str) -> str:
    """Takes any name.

    Args:
        texts: Any.
    """
    return "".join(texts)


def by_place(text: str, /) -> str:
    """Takes a text by its place.

    Args:
        text: Any.
    """
    return text


def adds(a: int, b: int) -> int:
    """Adds.

    Args:
        a: One.
        b: The other.
    """
    return a + b


class Adds:
    """Adds."""

    def __call__(self, a: int, b: int) -> int:
        """Adds.

        Args:
            a: One.
            b: The other.
        """
        return a + b


def now() -> str:
    """Says the time."""
    return "12:00"


class Colour(Enum):
    RED = "red"


class Size(StrEnum):
    SMALL = "small"


def paints(colours: list[Colour]) -> str:
    """Paints.

    Args:
        colours: Some.
    """
    return colours[0].value


def measures(size: Size) -> str:
    """Measures.

    Args:
        size: One.
    """
    return size


def returns_address(text: str) -> Any:
    """Returns objects that have no text of their own.

    Args:
        text: Any.
    """
    return [object()]


def returns_set(text: str) -> Any:
    """Returns a set.

    Args:
        text: Any.
    """
    return {*text}


class Counter:
    """Each conversation has its own."""

    def __init__(self, first: int = 0) -> None:
        self.count = first

    def __call__(self, text: str) -> int:
        """Counts its calls.

        Args:
            text: Any.
        """
        self.count += 1
        return self.count


class NoAnswer(Environment):
    """Answers with anything but an observation."""

    name = "no answer"

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def act(self, state: Any, turn: Turn) -> Any:
        return self.answer


def says_text() -> Any:
    return NoAnswer("text")


def gives_nan() -> Any:
    return NoAnswer(Observation(text="1", reward=float("nan")))


def says_bytes() -> Any:
    return NoAnswer(Observation(text=b"1"))  # type: ignore[arg-type]


class Deferred(Environment):
    """Is awaited."""

    async def act(self, state: Any, turn: Turn) -> Observation:  # type: ignore[override]
        return Observation(done=True)


def deferred() -> Any:
    return Deferred()


class BeginsWithState(NoAnswer):
    def begin(self, prompt: Prompt, *, seed: Seed) -> Any:
        return {"number": 3}


def begins_with_state() -> Any:
    return BeginsWithState("")


def no_environment() -> Any:
    return object()


def cannot_be_made(size: int = 1) -> Any:
    raise RuntimeError(f"size {size}")


class CannotBegin(NoAnswer):
    def begin(self, prompt: Prompt, *, seed: Seed) -> Begun:
        raise ValueError("no such game")


def cannot_begin() -> Any:
    return CannotBegin("")
