"""The tokens that end a response: what stops sampling, and what is written before and after a text.

A response to a text ends with the tokenizer's end-of-sequence token. A turn of a chat ends as the chat template ends
it, whatever the tokenizer's `eos_token` is: Gemma's template writes `<end_of_turn>`, ChatML `<|im_end|>`, Llama 3's
`<|eot_id|>`. A model that learned another token there would not stop in a chat.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from opd.errors import ConfigError
from opd.messages import ids_after
from opd.models.templates import WORD, content_form, dated, in_form
from opd.types import Message, Prompt

QUESTION: Message = {"role": "user", "content": "question"}
ANSWER: Message = {"role": "assistant", "content": WORD}


@dataclass(frozen=True, slots=True, kw_only=True)
class Endings:
    """The tokens that end a response.

    All of `stops` stop sampling, for prompts of text as well: no model continues a text after the end of a turn.
    """

    stops: frozenset[int]
    text: int | None  # written after a response to a text; None without an end-of-sequence token
    turn: int | None  # written after a response in a chat
    lead: str = ""  # white space that the template writes before an assistant's text, behind its generation prompt
    trail: str = ""  # what the template writes behind an assistant's text at the end of a conversation

    def before(self, prompt: Prompt) -> str:
        """The white space to write before a response to this prompt; none behind the beginning of an answer."""
        return "" if isinstance(prompt.content, str) or prompt.prefill else self.lead

    def after(self, prompt: Prompt) -> int | None:
        """The token to write after a response to this prompt."""
        return self.text if isinstance(prompt.content, str) else self.turn


def endings_of(
    tokenizer: Any,
    template_options: Mapping[str, Any] = {},
    *,
    generation: Iterable[int] = (),
    below: float = math.inf,
) -> Endings:
    """The endings of a model, from its tokenizer, its template's options and the ids of its generation config.

    A template that ends a turn with text alone, such as a line break, or with nothing, leaves the end-of-sequence
    token. So does one whose token is not `below` the number of tokens that the model has.
    """
    text = tokenizer.eos_token_id
    turn = turn_end(tokenizer, template_options)
    if turn is None or turn >= below:
        turn = text
    stops = frozenset(i for i in (text, turn, *generation) if i is not None)
    lead = lead_of(tokenizer, template_options)
    trail = _after_answer(tokenizer, template_options, goes_on=False) if tokenizer.chat_template else ""
    return Endings(stops=stops, text=text, turn=turn, lead=lead, trail=trail)


def generation_ids(config: Any) -> list[int]:
    """The ids of `eos_token_id` in a generation config (or another config, or None)."""
    ids = getattr(config, "eos_token_id", None)
    return list(ids) if isinstance(ids, (list, tuple)) else [] if ids is None else [ids]


def turn_end(tokenizer: Any, template_options: Mapping[str, Any] = {}) -> int | None:
    """The token that the template writes after an assistant's text, white space apart.

    It is an added token, or the end-of-sequence token. A token that a further message would replace ends no turn: it is
    the header of the next one. None if the template writes no such token there, or refuses the conversation.
    """
    if not tokenizer.chat_template:
        return None
    end = _next_token(_after_answer(tokenizer, template_options, goes_on=False), tokenizer)
    if end is None or end == tokenizer.eos_token_id:
        return end
    between = _next_token(_after_answer(tokenizer, template_options, goes_on=True), tokenizer)
    return end if end == between and end in tokenizer.added_tokens_decoder else None


def lead_of(tokenizer: Any, template_options: Mapping[str, Any] = {}) -> str:
    """The white space between the generation prompt and an assistant's text: Llama 2's template writes a blank."""
    if not tokenizer.chat_template:
        return ""
    prompt = _rendered(tokenizer, template_options, [QUESTION], add_generation_prompt=True)
    whole = _rendered(tokenizer, template_options, [QUESTION, ANSWER])
    between = whole.removeprefix(prompt).partition(WORD)[0]
    return between if prompt and whole.startswith(prompt) and not between.strip() else ""


def _after_answer(tokenizer: Any, options: Mapping[str, Any], *, goes_on: bool) -> str:
    """What the template writes after an assistant's text; "" if it refuses. `goes_on`: a user's message follows."""
    text = _rendered(tokenizer, options, [QUESTION, ANSWER, *([QUESTION] if goes_on else [])])
    return text.rpartition(WORD)[2] if WORD in text else ""


def _rendered(tokenizer: Any, options: Mapping[str, Any], messages: list[Message], **settings: bool) -> str:
    """The text of a conversation; "" if the template refuses it."""
    try:
        template = tokenizer.get_chat_template()
        shown = in_form(messages, content_form(template, tokenizer))
        return tokenizer.apply_chat_template(
            shown, chat_template=dated(template), tokenize=False, **settings, **options
        )
    except (ConfigError, TemplateError, TypeError, ValueError, KeyError, AttributeError):
        return ""


def _next_token(text: str, tokenizer: Any) -> int | None:
    """The first token of a text that is not white space, such as the space that SentencePiece puts before a text."""
    return next((i for i in ids_after(text, tokenizer) if tokenizer.decode([i]).strip()), None) if text else None
