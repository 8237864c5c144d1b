"""What stands between two turns of the student, as ids: the end of the one, the observation, the head of the next.

A conversation's ids are extended, never encoded again: the student wrote its tokens, and a text has more than one
encoding. The chat template writes the conversation with a mark in place of the student's last words, and what it
writes behind the mark is the extension. Earlier turns are not touched, so a template that would write them otherwise
now, such as one that drops earlier thinking, is found by comparing what it writes of them: see `Between.rewritten`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opd.environments.protocol import Call
from opd.errors import DataError
from opd.messages import ids_after
from opd.models.render import chat_text
from opd.types import Message, Prompt

MARK = "opdturn"  # stands for the words of the student's last turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Between:
    """The ids that the environment adds. `refused`: why the template writes no further turn; then there are none."""

    ids: tuple[int, ...] = ()
    rewritten: bool = False  # the template writes an earlier turn otherwise now
    refused: str | None = None


@dataclass(slots=True, kw_only=True)
class Transcript:
    """One conversation as the chat template reads it. A prompt that is a text has none: observations are appended."""

    prompt: Prompt
    tokenizer: Any
    template_options: Mapping[str, Any]
    stop_ids: frozenset[int]
    encoded: dict[str, tuple[int, ...]] = field(
        default_factory=dict[str, "tuple[int, ...]"]
    )  # of one tokenizer: shared
    messages: list[Message] = field(init=False)
    shown: str = field(default="", init=False)  # what the template wrote up to the last generation prompt
    calls: int = field(default=0, init=False)  # so far, for their ids

    def __post_init__(self) -> None:
        self.messages = [] if isinstance(self.prompt.content, str) else list(self.prompt.content)

    @property
    def is_text(self) -> bool:
        """Whether the prompt is a text, without a template."""
        return isinstance(self.prompt.content, str)

    def after(
        self,
        ids: Sequence[int],
        words: str,
        content: str,
        calls: Sequence[Call],
        observations: Sequence[str],
        role: str,
    ) -> Between:
        """What follows a turn of the student, and the observations as messages of `role`.

        `ids` are the turn's, `words` its text without its end token, `content` the text without the calls in it.
        """
        if self.is_text:
            return Between(ids=self._ids("".join(observations)))
        ended = bool(ids) and ids[-1] in self.stop_ids
        given = self.prompt.prefill if len(self.messages) == len(self.prompt.content) else ""
        why = ""
        # What is said of a call that cannot be read answers no call, and some templates have no such message.
        roles = (role, "user") if role == "tool" and not calls else (role,)
        forms = self._forms(given + words, given + content, calls, ended)
        for form, own in itertools.product(forms, roles):
            said = self._said(form, observations, own)
            try:
                text = self._behind(form, said, self.tokenizer.decode([ids[-1]]) if ended else "")
                shown = self._text([*self.messages, form, *said])
            except (DataError, _NoPlaceError) as error:
                why = why or str(error)
                continue
            rewritten = not _extends(shown, self.shown, form)
            self.messages += [form, *said]
            self.shown = shown
            self.calls += len(calls)
            return Between(ids=self._ids(text), rewritten=rewritten)
        return Between(refused=why)

    def _ids(self, text: str) -> tuple[int, ...]:
        """The ids of what stands between two turns. An environment says the same to many conversations."""
        if text not in self.encoded:
            self.encoded[text] = tuple(ids_after(text, self.tokenizer))
        return self.encoded[text]

    def _forms(self, words: str, content: str, calls: Sequence[Call], ended: bool) -> list[dict[str, Any]]:
        """The turn as a message, the better form first: with its calls as data, or all of it as text."""
        text = {"role": "assistant", "content": words}
        if not calls:  # harmony's template wants what was said, without the marks around it
            return [text] if words == content else [text, {"role": "assistant", "content": content}]
        made = [
            {
                "id": f"{self.calls + i:09d}",  # Mistral's template wants nine letters or digits
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for i, call in enumerate(calls)
        ]
        data = {"role": "assistant", "content": content, "tool_calls": made}
        return [data, text] if ended else [text, data]

    def _said(self, form: Mapping[str, Any], observations: Sequence[str], role: str) -> list[dict[str, Any]]:
        """The observations as messages; the answers to calls name them."""
        messages: list[dict[str, Any]] = [{"role": role, "content": text} for text in observations]
        made = form.get("tool_calls", ())
        if role == "tool" and len(made) == len(messages):
            for message, call in zip(messages, made, strict=True):
                message |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
        return messages

    def _behind(self, form: Mapping[str, Any], said: Sequence[Message], end: str) -> str:
        """What the template writes behind the turn's words and their end token. Raises `_NoPlaceError`, DataError."""
        mark = MARK
        while mark in json.dumps([*map(dict, self.messages), dict(form), *map(dict, said)], default=str):
            mark += "x"
        marked, calls = _marked(form, mark), "tool_calls" in form
        _, found, behind = self._text([*self.messages, marked, *said]).partition(mark)
        if not found:
            raise _NoPlaceError("the template does not write the assistant's words")
        if not end:
            return behind
        # Rendering is what a turn costs: only a turn with calls can have more than white space before its end token.
        alone = self._text([*self.messages, marked], goes_on=False).partition(mark)[2] if calls else ""
        # First the student's own end token. Where a chat goes on, a template may write another one: one is enough.
        for token in (end, *(self.tokenizer.decode([i]) for i in sorted(self.stop_ids))):
            place = behind.find(token)
            between = behind[: max(place, 0)]
            if place >= 0 and (not between.strip() or (calls and alone.startswith(between))):
                return behind[place + len(token) :]
        if calls:
            raise _NoPlaceError("the template writes no end token behind a call")
        return behind

    def _text(self, messages: Sequence[Message], *, goes_on: bool = True) -> str:
        """What the template writes; `goes_on`: and the head of the student's next turn. Raises DataError."""
        options = {} if goes_on else {"goes_on": False}
        return chat_text(
            replace(self.prompt, content=tuple(messages), prefill=""), self.tokenizer, self.template_options, **options
        )


class _NoPlaceError(Exception):
    """A form of a turn that the template does not write."""


def _marked(form: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """The turn with the mark in place of its words; in the last call, in place of its arguments."""
    if "tool_calls" not in form:
        return {**form, "content": mark}
    *others, last = form["tool_calls"]
    function = {**last["function"], "arguments": {"value": mark}}
    return {**form, "tool_calls": [*others, {**last, "function": function}]}


def _extends(shown: str, before: str, form: Mapping[str, Any]) -> bool:
    """Whether what the template writes now begins with what it wrote before, and goes on with the turn's text.

    White space aside, which templates trim and place by what follows.
    """
    now, then, said = (_bare(text) for text in (shown, before, str(form["content"])))
    return now.startswith(then) and said in now[len(then) :]


def _bare(text: str) -> str:
    return "".join(text.split())
