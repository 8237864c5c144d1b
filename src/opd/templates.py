"""Texts with fields in braces, and the message of a conversation that they rewrite. Pure."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

from opd.errors import ConfigError, DataError
from opd.types import Message


def fields_of(what: str, pattern: str, known: Sequence[str], needed: str | None = None) -> set[str]:
    """The fields of a pattern. Raises ConfigError for one that is not known, or without the needed one."""
    listed = ", ".join(f"{{{name}}}" + (" (needed)" if name == needed else "") for name in known)
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None}
    except ValueError as error:
        raise ConfigError(
            f"{what} has braces that do not match: {error}, in {pattern!r:.80}. Write a brace of the text "
            f"as two. It has the fields {listed}."
        ) from error
    if fields - set(known) or (needed is not None and needed not in fields):
        raise ConfigError(f"{what} has the fields {listed}; got {sorted(fields)}. Write a brace of the text as two.")
    return fields


def with_question(
    content: str | tuple[Message, ...], rewrite: Callable[[str], str], where: str
) -> str | tuple[Message, ...]:
    """The prompt with its text, or its last user message, rewritten.

    Raises DataError, beginning with `where`, when no user speaks in it, or in parts (images) instead of a text.
    """
    if isinstance(content, str):
        return rewrite(content)
    messages = list(content)
    asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not asked or not isinstance(messages[asked[-1]]["content"], str):
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"{where} has no text of a user that a template could rewrite (roles: {roles}). Leave the template out, "
            "or give a prompt whose last user message is text."
        )
    last = asked[-1]
    messages[last] = {**messages[last], "content": rewrite(messages[last]["content"])}
    return tuple(messages)


def question_of(content: str | tuple[Message, ...]) -> str:
    """What the user says in a prompt: its text, or the texts of all user messages, a line each."""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for message in content:
        if message["role"] != "user":
            continue
        said: Any = message["content"]
        parts: list[Any] = [{"text": said}] if isinstance(said, str) else list(said or ())
        texts += [part["text"] for part in parts if isinstance(part.get("text"), str)]
    return "\n".join(texts)
