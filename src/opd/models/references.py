"""The data's responses as ids: a text, or the turns of a conversation, of which the assistant's are its own.

A conversation of the data is read as one that is led (`environments.between`): the ids of a turn are those of its text
behind what stands before it, up to and with the token that ends it, and what follows until the next turn was heard.
Where the template ends a turn with text alone, or with a token at which the model does not stop, the turn ends as a
response does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opd.errors import DataError
from opd.messages import ids_after
from opd.models.endings import Endings
from opd.models.render import chat_text, encode_response
from opd.types import Prompt


@dataclass(slots=True)
class Reference:
    """A response of the data, one entry per token: its id, whether the assistant wrote it, and the number of the turn.

    What was heard has the number of the turn behind it.
    """

    ids: list[int] = field(default_factory=list[int])
    own: list[bool] = field(default_factory=list[bool])
    turn: list[int] = field(default_factory=list[int])

    def add(self, ids: Sequence[int], turn: int, *, own: bool) -> None:
        """Append the tokens of a turn, or of what was heard before it."""
        self.ids += ids
        self.own += [own] * len(ids)
        self.turn += [turn] * len(ids)


@dataclass(frozen=True, slots=True)
class Part:
    """A turn of the assistant, or what was heard between two of them. `ends`: a token that ends a turn follows."""

    text: str
    own: bool
    ends: bool = False


def reference_of(
    prompt: Prompt, tokenizer: Any, endings: Endings, template_options: Mapping[str, Any] = {}
) -> Reference:
    """The data's response to a prompt: `turns` if it has them, else `response`.

    Raises DataError for a response of zero tokens, for a turn that the chat template writes otherwise than behind its
    generation prompt, and for a template that rewrites an earlier turn; ConfigError as `encode_response`.
    """
    found = Reference()
    if not prompt.turns:
        found.add(encode_response(prompt.response or "", prompt, tokenizer, endings), 0, own=True)
        return found
    parts = (
        _text_parts(prompt) if isinstance(prompt.content, str) else _parts(prompt, tokenizer, endings, template_options)
    )
    turn = 0
    written = replace(prompt, turns=(), prefill=" ")  # the template's white space before a turn is in its text
    for part in parts:
        turn += not part.own
        if part.ends:
            found.add(encode_response(part.text, written, tokenizer, endings), turn, own=part.own)
        else:
            found.add(ids_after(part.text, tokenizer) if part.text else [], turn, own=part.own)
    return found


def _text_parts(prompt: Prompt) -> list[Part]:
    """The turns of a prompt that is a text: the assistant's as they are, and what was heard between them."""
    parts: list[Part] = []
    for message in prompt.turns:
        own, text = message["role"] == "assistant", message["content"]
        if parts and parts[-1].own == own:
            parts[-1] = Part(parts[-1].text + text, own)
        else:
            parts.append(Part(text, own))
    parts[-1] = replace(parts[-1], ends=True)  # a token ends the response, and none the turns before
    return parts


def _parts(prompt: Prompt, tokenizer: Any, endings: Endings, template_options: Mapping[str, Any]) -> Iterator[Part]:
    """The turns of a chat as the template writes them, and between them what was heard."""
    stops = [tokenizer.decode([i]) for i in sorted(endings.stops)]

    def shown(count: int, *, goes_on: bool) -> str:
        known = replace(prompt, content=(*prompt.content, *prompt.turns[:count]), prefill="")
        return chat_text(known, tokenizer, template_options, goes_on=goes_on)

    own_turns = [i for i, message in enumerate(prompt.turns) if message["role"] == "assistant"]
    before = shown(0, goes_on=True)
    for place, following in zip(own_turns, [*own_turns[1:], None], strict=True):
        after = shown(place + 1, goes_on=False)
        said = _behind(after, before, prompt, "an assistant's turn otherwise than behind its generation prompt")
        words, end = _ended(said, endings.trail, stops)
        spelt = words.rstrip().endswith(tuple(stops))  # the row's own text has an end: one is enough
        yield Part(words if spelt else words + end, own=True, ends=True)
        if following is None:
            return
        before_next = shown(following, goes_on=True)
        what = "an earlier turn otherwise when a later one follows"
        yield Part(_without_end(_behind(before_next, before + words, prompt, what), end, stops), own=False)
        before = before_next


def _ended(said: str, trail: str, stops: Sequence[str]) -> tuple[str, str]:
    """(a turn's words, the token behind them at which the model stops; "" if the template writes none)."""
    if trail and said.endswith(trail):
        return said[: -len(trail)], min((end for end in stops if end in trail), key=trail.find, default="")
    place, end = max(((said.rfind(end), end) for end in stops if end in said), default=(len(said), ""))
    return said[:place], end


def _without_end(behind: str, end: str, stops: Sequence[str]) -> str:
    """What stands behind a turn's words, without the token that ends the turn: the turn has it, or another one."""
    for token in (end, *stops):
        place = behind.find(token) if token else -1
        if place >= 0 and not behind[:place].strip():
            return behind[place + len(token) :]
    return behind


def _behind(text: str, before: str, prompt: Prompt, what: str) -> str:
    """What `text` has behind `before`. Raises DataError if it does not begin with it: the template writes `what`."""
    if text.startswith(before):
        return text[len(before) :]
    raise DataError(
        f"Prompt {prompt.id}: the chat template writes {what}, so its turns have no ids of their own. Set "
        "`assistant_turns: each`, a prompt for each turn, or `last`, or a template that keeps earlier turns, "
        "`models.NAME.chat_template`."
    )
