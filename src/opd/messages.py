"""Texts: templates with fields in braces, checked chat messages, and the ids of a text that continues another. Pure."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opd.errors import ConfigError, DataError
from opd.types import Message, Prompt

# Control, zero-width and direction characters: they would change what is around them.
_CONTROL = re.compile(
    "[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
)

IMAGE = "<image>"  # the place of an image in a text; in a message it is a part {"type": "image"}


MEDIA = ("image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio")


# ShareGPT's names of roles, the values of `from`.
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}


def fields_of(what: str, pattern: str, known: Sequence[str], needed: str | None = None) -> set[str]:
    """The fields of a pattern. Raises ConfigError for an unknown field, a format, or without the needed field."""
    listed = ", ".join(f"{{{name}}}" + (" (needed)" if name == needed else "") for name in known)
    try:
        found = [part for part in string.Formatter().parse(pattern) if part[1] is not None]
    except ValueError as error:
        raise ConfigError(
            f"{what} has braces that do not match: {error}, in {pattern!r:.80}. Write a literal brace twice. "
            f"The fields are {listed}."
        ) from error
    fields = {str(name) for _, name, _, _ in found}
    for _, name, form, conversion in found:
        if form or conversion:
            raise ConfigError(
                f"{what} formats the field {{{name}}} with {f'!{conversion}' if conversion else f':{form}'!r}: a model "
                f"would read another text than the data's. Write {{{name}}} alone."
            )
    if fields - set(known) or (needed is not None and needed not in fields):
        raise ConfigError(f"{what} has the fields {listed}; got {sorted(fields)}. Write a literal brace twice.")
    return fields


def with_question(
    content: str | tuple[Message, ...], rewrite: Callable[[str], str], where: str
) -> str | tuple[Message, ...]:
    """The prompt with its text, or its last user message, rewritten; parts of text become one text.

    Raises DataError, beginning with `where`, without a user message, or if a part of it is not text.
    """
    if isinstance(content, str):
        return rewrite(content)
    messages = list(content)
    user_turns = [i for i, message in enumerate(messages) if message["role"] == "user"]
    text = shown_text(messages[user_turns[-1]]["content"]) if user_turns else None
    if text is None:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"{where} has no user message of text, and the template needs one to rewrite (roles: {roles}). Leave the "
            "template out, or give a prompt with text as its last user message."
        )
    last = user_turns[-1]
    rewritten = {**messages[last], "content": rewrite(text)}
    messages[last] = as_parts(rewritten) if text_of(messages[last]["content"]) is None else rewritten
    return tuple(messages)


def shown_text(content: Any) -> str | None:
    """`text_of` with `<image>` where an image is; parts are joined by nothing then, because a place is in the text."""
    if isinstance(content, str) or not any(part.get("type") == "image" for part in content or ()):
        return text_of(content)
    texts = [IMAGE if part.get("type") == "image" else text_of([part]) for part in content]
    known = [text for text in texts if text is not None]
    return "".join(known) if len(known) == len(texts) else None


def as_parts(message: Message) -> Message:
    """The message with a part for each `<image>` of a user's text; without one, as it is."""
    said = message.get("content")
    if not isinstance(said, str) or IMAGE not in said or message["role"] != "user":
        return message
    first, *rest = said.split(IMAGE)
    parts: list[dict[str, str]] = [{"type": "text", "text": first}] if first else []
    for text in rest:
        parts += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
    return {**message, "content": parts}


def text_of(content: Any) -> str | None:
    """A message's content as text, its parts joined by line breaks; None if there is none, or a part is not text."""
    if isinstance(content, str):
        return content
    texts = [part.get("text") if part.get("type", "text") == "text" else None for part in content or ()]
    known = [text for text in texts if isinstance(text, str)]
    return "\n".join(known) if texts and len(known) == len(texts) else None


def question_of(content: str | tuple[Message, ...]) -> str:
    """The question of a prompt: its text, or the texts of all user messages, one per line."""
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


def conversation(value: Any, where: str, *, chat: bool = False, system: str | None = None) -> str | tuple[Message, ...]:
    """A data row's prompt, checked: text, or messages with `role` and `content` (text, or parts).

    Messages of ShareGPT (`from`, `value`) get `role` and `content`. `chat` makes text one user message; `system` is put
    before the messages and implies `chat`. Raises DataError, beginning with `where`, for another type, an empty prompt,
    a message with other keys, a video, sound or a second system message.
    """
    if isinstance(value, str) and value.strip():
        if not chat and system is None:
            return value
        value = [{"role": "user", "content": value}]
    if not isinstance(value, Sequence) or isinstance(value, bytes) or not value or isinstance(value, str):
        problem = (
            "is empty" if isinstance(value, (str, list, tuple)) else f"is a {type(value).__name__}, got {value!r:.80}"
        )
        raise DataError(f"{where} {problem}. A prompt is text, or a list of messages with `role` and `content`.")
    messages = tuple(_message(message, f"{where}, message {i}") for i, message in enumerate(value))
    if system is None:
        return messages
    if messages[0]["role"] == "system":
        raise DataError(f"{where} begins with a system message, but `system` adds a second one. Leave one out.")
    return ({"role": "system", "content": system}, *messages)


def text_or_none(value: Any, where: str) -> str | None:
    """A data row's text column, checked. TRL's conversational completion, one assistant message, becomes its text.

    Raises DataError, beginning with `where`, for anything else.
    """
    if value is None or isinstance(value, str):
        return value
    message = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else None
    if isinstance(message, Mapping) and message.get("role") == "assistant" and _is_content(message.get("content")):
        text = text_of(message["content"])
        if text is not None:
            return text
    remedy = ""
    if isinstance(value, (list, tuple)) and len(value) > 1:
        remedy = "; for several turns, set `assistant_turns: all` or `each` in a data section, or leave the column out"
    raise DataError(
        f"{where} is a {type(value).__name__}, got {value!r:.80}. Give text, or one assistant message{remedy}."
    )


def is_chat(prompts: Sequence[Prompt]) -> bool:
    """Whether any prompt is a conversation, so that responses are turns, not continuations of a text."""
    return any(not isinstance(prompt.content, str) for prompt in prompts)


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is a {type(message).__name__}, got {message!r:.80}. It needs `role` and `content`.")
    if "from" in message and "value" in message and not {"role", "content"} & {*message}:
        message = _from_sharegpt(message, where)
    if "role" not in message or "content" not in message:
        raise DataError(f"{where} has the keys {sorted(map(str, message))}, but needs `role` and `content`.")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not role:
        raise DataError(f"{where} has the role {role!r}. A role is text such as 'user'.")
    if not (_is_content(content) or (content is None and message.get("tool_calls"))):
        raise DataError(
            f"{where} has a content of type {type(content).__name__}, got {content!r:.80}. Give text or parts."
        )
    if not isinstance(content, str) and content is not None:
        media = [part["type"] for part in content if part.get("type") in MEDIA]
        if media:
            raise DataError(
                f"{where} has a part of type {media[0]!r}, and opd reads text and images. Give an image as a part "
                "{'type': 'image'} and a file in the column `images`, or leave the row out."
            )
        content = [_filled(part) for part in content]
    return {**_filled(message), "content": content}


def _is_content(content: Any) -> bool:
    """Text, or a list of parts."""
    parts = isinstance(content, (list, tuple)) and content and all(isinstance(part, Mapping) for part in content)
    return isinstance(content, str) or bool(parts)


def _filled(value: Mapping[Any, Any]) -> dict[str, Any]:
    """The keys with a value. Arrow adds keys with None that only other messages or parts have."""
    return {str(key): one for key, one in value.items() if one is not None}


def _from_sharegpt(message: Mapping[Any, Any], where: str) -> dict[Any, Any]:
    name = message["from"]
    if name not in ROLES:
        raise DataError(f"{where} is from {name!r}, which is no role. Its `from` is one of {', '.join(ROLES)}.")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": ROLES[name], "content": message["value"], **rest}


# Texts to continue. Of a word-level tokenizer none fits; then the ids are those of the text alone.
BEFORE = ("\n", ".", "a")


def ids_after(text: str, tokenizer: Any, **options: Any) -> list[int]:
    """The ids of a text in the middle of another, without special tokens. `options` are the tokenizer's.

    A SentencePiece tokenizer puts a space before a text, which would separate a response from its prompt: there
    `decode(prompt_ids + ids)` is not the prompt's text and the response's. Encoded behind another text, and without its
    ids, the response has no such space.
    """

    def encode(given: str) -> list[int]:
        return tokenizer(given, add_special_tokens=False, **options).input_ids

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    alone = encode(text)
    for before in BEFORE:
        try:
            first = encode(before)
        except Exception as error:
            if type(error) is not Exception:  # the bare type that `tokenizers` raises for a character without a token
                raise
            continue
        start, spaced = decode(first), decode(first + alone)
        if spaced == start + text:
            return alone
        joined = encode(before + text)
        fits = first and joined[: len(first)] == first and spaced.startswith(f"{start} ")
        if fits and decode(joined) == start + spaced[len(start) + 1 :]:
            return joined[len(first) :]
    return alone


def text_after(before: Sequence[int], ids: Sequence[int], tokenizer: Any) -> str:
    """The text of `ids` behind `before`, without special tokens: with the space between them, if there is one.

    Decoded alone, tokens of SentencePiece lose their first space (`▁`), which the decoder takes for the one that the
    tokenizer puts before a text. Behind an added token, which begins a text anew for some tokenizers, it may be that.
    """
    alone = tokenizer.decode(ids, skip_special_tokens=True)
    first = tokenizer.convert_ids_to_tokens(int(ids[0])) if before and ids else None
    if first is None or not first.startswith("▁"):  # None: an id between the tokenizer's that has no token
        return alone
    last = int(before[-1])
    if last in tokenizer.added_tokens_decoder:
        return alone
    start = tokenizer.decode([last], skip_special_tokens=True)
    joined = tokenizer.decode([last, *ids], skip_special_tokens=True)
    return joined[len(start) :] if joined.startswith(start) else alone


def visible(text: str) -> str:
    """A text in which control, zero-width and direction characters are written out, such as U+202E in angle quotes."""
    return _CONTROL.sub(lambda found: f"\u2039U+{ord(found[0]):04X}\u203a", text)
