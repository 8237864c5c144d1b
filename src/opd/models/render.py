"""Prompts and responses -> token ids, with the tokenizer's own chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from opd.errors import ConfigError, DataError, nearest
from opd.messages import ids_after
from opd.models.endings import Endings
from opd.models.processors import sees
from opd.models.templates import content_form, dated, in_form
from opd.types import Prompt

# Set by this file. Templates may mention them, so the check of option names would not refuse them.
RESERVED = (
    *("messages", "conversation", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template"),
    "strftime_now",
)


_SET_TEMPLATE = "set the model's template, `models.NAME.chat_template`"


def render(prompt: Prompt, tokenizer: Any, template_options: Mapping[str, Any] = {}) -> list[int]:
    """The ids that the model reads before it writes. [prompt tokens]

    Text is encoded with the tokenizer's special tokens, but without an appended end-of-sequence token, and without a
    second beginning-of-sequence token; `template_options` have no effect on it. Messages go through the chat template
    with `add_generation_prompt` and the prompt's `tools`. The template writes its own special tokens, so none are
    added. Its variables are `template_options`, and above them the prompt's `chat_template_kwargs`. Parts of text are
    joined for a template that would print them as Python does, and text becomes a part for one that reads only parts.
    A `prefill` is appended and encoded together with the prompt.

    Raises DataError for messages without a chat template and for messages that the template refuses, ConfigError for
    tools or an option that the template does not mention (jinja would ignore it), and for a template without messages.
    """
    encode = _encoder(prompt, tokenizer)
    if isinstance(prompt.content, str):
        return _encode_text(prompt.content + prompt.prefill, tokenizer, encode)
    text = chat_text(prompt, tokenizer, template_options)
    return encode(text + prompt.prefill, add_special_tokens=False)


def _encoder(prompt: Prompt, tokenizer: Any) -> Callable[..., list[int]]:
    """A function from the text of the prompt to its ids, with picture codes for its images."""
    where = f"Prompt {prompt.id}"
    if prompt.images and not sees(tokenizer):
        raise DataError(
            f"{where} has {len(prompt.images)} images, and {_name(tokenizer)} has no processor for them: its model "
            "reads text alone. Use a model that reads images, or leave the column out."
        )
    if not sees(tokenizer):
        return lambda text, **options: tokenizer(text, **options).input_ids
    return lambda text, **options: tokenizer.ids(text, prompt.images, where, **options)


def chat_text(prompt: Prompt, tokenizer: Any, template_options: Mapping[str, Any] = {}, *, goes_on: bool = True) -> str:
    """The text that the chat template writes for a prompt of messages, without its prefill. Raises as `render`.

    `goes_on`: with the generation prompt behind it.
    """
    assert not isinstance(prompt.content, str)
    template, options = template_for(prompt, tokenizer, template_options)
    messages = in_form(prompt.content, content_form(template, tokenizer))
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=dated(template), tokenize=False, add_generation_prompt=goes_on, **options
        )
    except Exception as error:  # any expression of a template may raise
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"The chat template of {_name(tokenizer)} refused prompt {prompt.id} (roles: {roles}): {error}. "
            f"Change the messages, or {_SET_TEMPLATE}."
        ) from error


def template_for(
    prompt: Prompt, tokenizer: Any, template_options: Mapping[str, Any] = {}
) -> tuple[str, dict[str, Any]]:
    """(the chat template of a conversation, its variables with the prompt's own). Raises as `render`."""
    tools = {"tools": [dict(tool) for tool in prompt.tools]} if prompt.tools else {}
    options = {**template_options, **prompt.chat_template_kwargs, **tools}
    template = _template(prompt, tokenizer, options)
    _check_options(template, tokenizer, template_options, "`template_options`")
    _check_options(template, tokenizer, {**prompt.chat_template_kwargs, **tools}, f"the data of prompt {prompt.id}")
    return template, options


def render_checked(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    *,
    max_prompt_length: int | None,
    template_options: Mapping[str, Any] = {},
) -> list[list[int]]:
    """`render` for each prompt; `max_prompt_length` is in tokens, None for no limit.

    Raises DataError for a prompt of zero tokens or longer than the limit, and the errors of `render`.
    """
    rendered = [render(prompt, tokenizer, template_options) for prompt in prompts]
    for prompt, ids in zip(prompts, rendered, strict=True):
        if not ids:
            raise DataError(
                f"Prompt {prompt.id} renders to zero tokens with {_name(tokenizer)}, but a model needs at least one. "
                "Remove the row, or use a tokenizer that knows its characters."
            )
    if max_prompt_length is None:
        return rendered
    lengths = {prompt.id: len(ids) for prompt, ids in zip(prompts, rendered, strict=True)}
    too_long = [key for key, length in lengths.items() if length > max_prompt_length]
    if too_long:
        raise DataError(
            f"Prompt {too_long[0]} has {lengths[too_long[0]]} tokens, but `max_prompt_length` is {max_prompt_length}; "
            f"{len(too_long)} of these {len(prompts)} prompts are longer, the longest has {max(lengths.values())}. "
            "Prompts are never cut: raise `max_prompt_length`, or filter the data."
        )
    return rendered


def encode_response(text: str, prompt: Prompt, tokenizer: Any, endings: Endings) -> list[int]:
    """The ids of a text as a response to the prompt, ended by one token of `endings`. [response tokens]

    The white space that the chat template writes before an assistant's text comes first, as in Llama 2's template.
    An end that the text spells is not doubled: the end of a sequence or of a turn, with white space after it, becomes
    the prompt's ending, and any other token that stops sampling stays the end. Raises DataError if the text has no
    tokens, ConfigError if the tokenizer has no end-of-sequence token.
    """
    end = endings.after(prompt)
    if end is None:
        raise ConfigError(
            f"{_name(tokenizer)} has no end-of-sequence token, so no response can end. Set its eos_token."
        )
    replaced = {end, endings.text}
    named = tokenizer.convert_ids_to_tokens([i for i in replaced if i is not None])
    spelt = tuple(token for token in named if token is not None)
    lead = endings.before(prompt)
    text = text if text.startswith(lead) else lead + text
    ids = ids_after(text.rstrip() if text.rstrip().endswith(spelt) else text, tokenizer)
    ids = ids[: len(ids) - _ends(ids, replaced)]
    if not ids:
        raise DataError(
            f"The response {text!r:.80} has zero tokens with {_name(tokenizer)} besides the end-of-sequence token. "
            "Remove the row, or use a tokenizer that knows its characters."
        )
    return ids if ids[-1] in endings.stops else [*ids, end]


def _encode_text(text: str, tokenizer: Any, encode: Callable[..., list[int]]) -> list[int]:
    ids = encode(text)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    begins_twice = begin is not None and ids[:2] == [begin, begin]
    if not begins_twice and (end is None or not ids or ids[-1] != end):
        return ids
    # Remove only tokens that the tokenizer adds, not those that the text spells.
    spelt = encode(text, add_special_tokens=False)
    appended = 0 if end is None else _ends(ids, {end}) - _ends(spelt, {end})
    return ids[1 if begins_twice and spelt[:1] == [begin] else 0 : len(ids) - appended]


def _ends(ids: Sequence[int], ends: Collection[int | None]) -> int:
    """The number of ids at the end that are `ends`."""
    return next((i for i, token in enumerate(reversed(ids)) if token not in ends), len(ids))


def _template(prompt: Prompt, tokenizer: Any, options: Mapping[str, Any]) -> str:
    remedy = f"Give `prompt` as text (without `chat` and `system`), or {_SET_TEMPLATE}."
    if not tokenizer.chat_template:
        raise DataError(
            f"Prompt {prompt.id} is a list of messages, but {_name(tokenizer)} has no chat template. {remedy}"
        )
    try:
        return tokenizer.get_chat_template(tools=options.get("tools"))
    except ValueError as error:  # several templates, none of them the default
        raise DataError(f"Prompt {prompt.id} cannot be rendered with {_name(tokenizer)}: {error} {remedy}") from error


def _check_options(template: str, tokenizer: Any, options: Mapping[str, Any], where: str) -> None:
    for name in options:
        if name in RESERVED:
            raise ConfigError(
                f"{where[0].upper()}{where[1:]} cannot set {name!r}: opd sets it when it renders. Remove it."
            )
        if not re.search(rf"\b{re.escape(name)}\b", template):
            known = set(re.findall(r"\b[a-z]\w*_\w+\b", template)) - set(RESERVED)
            raise ConfigError(
                f"The chat template of {_name(tokenizer)} does not mention the option {name!r}, so it has no effect."
                f"{nearest(name, known)} Remove it from {where}, or {_SET_TEMPLATE}."
            )


def _name(tokenizer: Any) -> str:
    return f"tokenizer {tokenizer.name_or_path!r}" if tokenizer.name_or_path else type(tokenizer).__name__
