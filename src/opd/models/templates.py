"""What a chat template reads, found by rendering with it, and the clock that it reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError

from opd.errors import ConfigError
from opd.messages import shown_text
from opd.types import Message

# What a template raises that refuses messages, or an expression in it that they do not fit.
UNRENDERED = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
WORD = "opdprobe"  # a text that no template writes itself


_CLOCK = re.compile(r"""\bstrftime_now\(\s*(?:format\s*=\s*)?("[^"]*"|'[^']*')\s*\)""")


_started: list[datetime] = []  # the time of the runs in progress, the innermost last


@contextmanager
def clock_at(when: datetime) -> Iterator[None]:
    """In this block templates read this time: a run that goes on another day renders the same prompts."""
    _started.append(when)
    try:
        yield
    finally:
        _started.pop()


def dated(template: str) -> str:
    """The template with the time in place of its calls of `strftime_now`: that of `clock_at`, else the present."""
    when = _started[-1] if _started else datetime.now()
    return _CLOCK.sub(lambda call: json.dumps(when.strftime(call[1][1:-1])), template)


def unfrozen_clock(template: str) -> bool:
    """Whether a call of `strftime_now` has a format that `dated` cannot read, such as a variable."""
    return re.search(r"\bstrftime_now\s*\(", dated(template)) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The forms of a message's content that a template shows."""

    text: bool
    parts: bool


def content_form(template: str, tokenizer: Any) -> Form:
    """What the template shows of a content of text and of parts. Raises ConfigError for a template that shows neither.

    A template that refuses the short conversations of this test counts as one that reads text.
    """
    if template not in _FORMS:
        text = _shown(template, tokenizer, WORD)
        parts = _shown(template, tokenizer, [{"type": "text", "text": WORD}])
        if not text:
            _FORMS[template] = Form(text=True, parts=False)
        else:
            # A template that prints its content as it is prints the parts as Python does, or as JSON.
            split = [WORD in shown and "'text'" not in shown and '"text"' not in shown for shown in parts]
            _FORMS[template] = Form(text=any(WORD in shown for shown in text), parts=any(split))
    form = _FORMS[template]
    if not form.text and not form.parts:
        raise ConfigError(
            "The chat template shows no message: different conversations all render the same, so the model would not "
            "read the prompts. Set a template with `messages`, `models.NAME.chat_template`."
        )
    return form


_FORMS: dict[str, Form] = {}  # by template


def in_form(messages: Sequence[Message], form: Form) -> list[dict[str, Any]]:
    """The messages as a template of this form shows them: parts of text as one text, or text as a part."""
    return [{**message, "content": _content(message["content"], form)} for message in messages]


def joined_parts(messages: Sequence[Message], form: Form) -> bool:
    """Whether `in_form` joins parts of a message."""
    return any(in_form([one], form)[0]["content"] != one["content"] for one in messages if not _is_text(one))


def generation_prompt(messages: Sequence[Message], template: str, tokenizer: Any, options: Mapping[str, Any]) -> bool:
    """Whether the template writes all that stands between the messages and the assistant's words.

    It does so for `add_generation_prompt`, or has nothing there, as the templates of Llama 2 and Mistral.
    """
    form = content_form(template, tokenizer)
    shown = in_form(messages, form)
    before = _render(template, tokenizer, shown, False, options)
    if _render(template, tokenizer, shown, True, options) != before:
        return True
    try:
        answer = {"role": "assistant", "content": _content(WORD, form)}
        answered = _render(template, tokenizer, [*shown, answer], False, options)
    except UNRENDERED:
        return False
    return answered.startswith(before) and not answered.removeprefix(before).partition(WORD)[0].strip()


def reads_clock(messages: Sequence[Message], template: str, tokenizer: Any, options: Mapping[str, Any]) -> bool:
    """Whether the messages render otherwise at another time."""
    shown = in_form(messages, content_form(template, tokenizer))
    texts: set[str] = set()
    for when in (datetime(2001, 2, 3, 4, 5, 6), datetime(2012, 11, 10, 9, 8, 7)):
        with clock_at(when):
            texts.add(_render(template, tokenizer, shown, True, options))
    return len(texts) > 1


def _content(content: Any, form: Form) -> Any:
    if isinstance(content, str):
        return content if form.text else [{"type": "text", "text": content}]
    return content if form.parts or shown_text(content) is None else shown_text(content)


def _is_text(message: Message) -> bool:
    return isinstance(message["content"], str)


def _shown(template: str, tokenizer: Any, content: Any) -> list[str]:
    """What the template renders of conversations of such a content; without those it refuses."""
    said = {role: {"role": role, "content": content} for role in ("system", "user", "assistant")}
    tried = (["user"], ["system", "user"], ["user", "assistant", "user"])
    shown: list[str] = []
    for roles in tried:
        try:
            shown.append(_render(template, tokenizer, [said[role] for role in roles], True, {}))
        except UNRENDERED:  # a form of content that the template refuses
            continue
    return shown


def _render(
    template: str, tokenizer: Any, messages: Sequence[Message], generate: bool, options: Mapping[str, Any]
) -> str:
    given = [dict(message) for message in messages]
    return tokenizer.apply_chat_template(
        given, chat_template=dated(template), tokenize=False, add_generation_prompt=generate, **options
    )
