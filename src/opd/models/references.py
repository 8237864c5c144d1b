"""The data's responses as ids: a text, or the turns of a conversation, of which the assistant's are its own.

A conversation of the data is read as one that is led (`environments.between`): the ids of a turn are those of its text
behind what stands before it, up to and with the token that ends it, and what follows until the next turn was heard.
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
    text: str = ""

    def add(self, ids: Sequence[int], text: str, turn: int, *, own: bool) -> None:
        """Append the tokens of a turn, or of what was heard before it."""
        self.ids += ids
        self.own += [own] * len(ids)
        self.turn += [turn] * len(ids)
        self.text += text


def reference_of(
    prompt: Prompt, tokenizer: Any, endings: Endings, template_options: Mapping[str, Any] = {}
) -> Reference:
    """The data's response to a prompt: `turns` if it has them, else `response`.

    Raises DataError for a response of zero tokens, for a turn that the chat template writes otherwise than behind its
    generation prompt, and for a template that rewrites an earlier turn; ConfigError as `encode_response`.
    """
    found = Reference()
    if not prompt.turns:
        text = prompt.response or ""
        found.add(encode_response(text, prompt, tokenizer, endings), text, 0, own=True)
        return found
    parts = (
        _text_parts(prompt) if isinstance(prompt.content, str) else _parts(prompt, tokenizer, endings, template_options)
    )
    turn = 0
    *before, last = parts
    for text, own in before:
        found.add(ids_after(text, tokenizer) if text else [], text, turn + (not own), own=own)
        turn += not own
    # The last turn ends as a response does: it may be all that a tokenizer's end-of-sequence token follows.
    alone = replace(prompt, turns=(), prefill=prompt.prefill if not before else " ")
    found.add(encode_response(last[0], alone, tokenizer, endings), last[0], turn, own=True)
    return found


def _text_parts(prompt: Prompt) -> list[tuple[str, bool]]:
    """The turns of a prompt that is a text: the assistant's as they are, and what was heard between them."""
    parts: list[tuple[str, bool]] = []
    for message in prompt.turns:
        own, text = message["role"] == "assistant", str(message["content"])
        if parts and parts[-1][1] == own:
            parts[-1] = (parts[-1][0] + text, own)
        else:
            parts.append((text, own))
    return parts


def _parts(
    prompt: Prompt, tokenizer: Any, endings: Endings, template_options: Mapping[str, Any]
) -> Iterator[tuple[str, bool]]:
    """The turns of a chat as the template writes them: (the assistant's words with their end, True), (heard, False)."""
    ends = [one for one in tokenizer.convert_ids_to_tokens(sorted(endings.stops)) if one]

    def shown(count: int, *, goes_on: bool) -> str:
        known = replace(prompt, content=(*prompt.content, *prompt.turns[:count]), prefill="")
        return chat_text(known, tokenizer, template_options, goes_on=goes_on)

    own_turns = [i for i, message in enumerate(prompt.turns) if message["role"] == "assistant"]
    before = shown(0, goes_on=True)
    for place, following in zip(own_turns, [*own_turns[1:], None], strict=True):
        after = shown(place + 1, goes_on=False)
        said = _behind(after, before, prompt, "an assistant's turn otherwise than behind its generation prompt")
        cut = max((said.rfind(end) + len(end) for end in ends if end in said), default=len(said))
        yield said[:cut], True
        if following is None:
            return
        before_next = shown(following, goes_on=True)
        written = after[: len(after) - len(said) + cut]
        yield _behind(before_next, written, prompt, "an earlier turn otherwise when a later one follows"), False
        before = before_next


def _behind(text: str, before: str, prompt: Prompt, what: str) -> str:
    """What `text` has behind `before`. Raises DataError if it does not begin with it: the template writes `what`."""
    if text.startswith(before):
        return text[len(before) :]
    raise DataError(
        f"Prompt {prompt.id}: the chat template writes {what}, so its turns have no ids of their own. Set "
        "`assistant_turns: last`, or a template that keeps earlier turns, `models.NAME.chat_template`."
    )
