"""One action of an environment that may raise, hang, print, or answer with anything: the answer is always a text."""

from __future__ import annotations

import contextlib
import io
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opd.environments.protocol import Begun, Environment, Observation, Turn
from opd.errors import DataError
from opd.messages import visible
from opd.plugins import RAISED
from opd.rewards.calls import TooLongError, called
from opd.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one action."""

    timeout_s: float = 10.0
    characters: int = 2000  # of an observation
    error: str = "error: {why}"  # what the student reads for an action that failed


class Printed(io.TextIOBase):
    """Takes what a block prints, and keeps nothing: the number of characters by thread alone."""

    def __init__(self) -> None:
        self.own = threading.local()
        self.redirected = contextlib.ExitStack()

    def __enter__(self) -> Printed:
        self.redirected.enter_context(contextlib.redirect_stdout(self))
        self.redirected.enter_context(contextlib.redirect_stderr(self))
        return self

    def __exit__(self, *error: object) -> None:
        self.redirected.close()

    def write(self, text: str, /) -> int:
        self.own.characters = self.characters + len(text)
        return len(text)

    @property
    def characters(self) -> int:
        """Printed so far by this thread."""
        return getattr(self.own, "characters", 0)


def acted(
    environment: Environment, state: Any, turn: Turn, limits: Limits, printed: Printed | None = None
) -> Observation:
    """The environment's answer, whatever it does: an action that fails becomes an observation, and is counted.

    `printed` takes what is printed already, for all threads. Counts: `errors` (it raised, or returned no
    `Observation`), `timeouts`, `printed`.
    """
    block = Printed() if printed is None else contextlib.nullcontext(printed)
    with block as taken:
        before = taken.characters
        found = _acted(environment, state, turn, limits)
        return replace(found, counts={**found.counts, "printed": float(taken.characters > before)})


def _acted(environment: Environment, state: Any, turn: Turn, limits: Limits) -> Observation:
    try:
        found = called(lambda: environment.act(state, turn), limits.timeout_s)
        why, kind = _wrong(found), "errors"
    except TooLongError as error:
        found, why, kind = None, str(error), "timeouts"
    except RAISED as error:  # an environment may raise anything, and exit
        found, why, kind = None, f"{type(error).__name__}: {error}", "errors"
    if why is not None:
        return failed(turn, why, kind, limits)
    assert found is not None
    return found


def failed(turn: Turn, why: str, kind: str, limits: Limits) -> Observation:
    """The observation of an action that failed, counted as `kind`."""
    text = limits.error.replace("{why}", why)
    each = (text,) * len(turn.calls)
    return Observation(text=text, texts=each, role="tool" if turn.calls else "user", counts={kind: 1})


def begun(environment: Environment, prompt: Prompt, seed: Any) -> Begun:
    """The beginning of a conversation. Raises DataError if the environment cannot begin it."""
    try:
        with Printed():
            found: Any = called(lambda: environment.begin(prompt, seed=seed), None)
        if not isinstance(found, Begun):
            raise TypeError(f"`begin` returned a {type(found).__name__}, not a Begun")
        return found
    except RAISED as error:
        raise DataError(
            f"The environment {environment.name!r} cannot begin prompt {prompt.id}: {type(error).__name__}: {error}. "
            "Correct the row or the environment's options, or leave the row out."
        ) from error


def ended(environment: Environment, state: Any, limits: Limits) -> bool:
    """End a conversation. Whether that failed: the conversation is over all the same, and no run ends by it."""
    try:
        with Printed():
            called(lambda: environment.end(state), limits.timeout_s)
    except RAISED:  # TooLongError is one
        return True
    return False


def _wrong(found: Any) -> str | None:
    """Why an action's result is no observation; None if it is one."""
    if not isinstance(found, Observation):
        return f"the environment returned a {type(found).__name__}, not an Observation"
    if not all(isinstance(text, str) for text in (found.text, *found.texts)):
        return "the environment's observation is no text"
    reward = found.reward
    if reward is not None and not (isinstance(reward, (int, float)) and math.isfinite(reward)):
        return f"the environment's reward is {reward!r}, not a finite number"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleaner:
    """Makes observations harmless to read: cut, without control characters and without the text of special tokens.

    A tool's text could otherwise end its message and begin another one.
    """

    special: Sequence[str]  # texts of special tokens
    characters: int

    def __call__(self, text: str) -> tuple[str, dict[str, float]]:
        """(the text, what was done to it: `cut`, `cleaned`)."""
        counts: dict[str, float] = {}
        if len(text) > self.characters:
            counts["cut"] = 1
            text = f"{text[: self.characters]}... ({len(text) - self.characters} more characters)"
        clean = visible(text.encode("utf-8", "replace").decode())
        for token in self.special:
            clean = clean.replace(token, f"{token[0]} {token[1:]}")
        if clean != text:
            counts["cleaned"] = 1
        return clean, counts


def cleaner_of(tokenizer: Any, characters: int) -> Callable[[str], tuple[str, dict[str, float]]]:
    """The cleaner of a model's observations."""
    named = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = sorted({*named, *map(str, tokenizer.all_special_tokens)}, key=len, reverse=True)
    return Cleaner(special=[token for token in found if len(token) > 1], characters=characters)
