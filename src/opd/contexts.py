"""What the teacher reads. A context returns one `Prompt` a rollout; the teacher renders it with its own template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from opd.errors import ConfigError, DataError
from opd.types import Context, Message, Prompt, Rollout, needing


def same_prompt() -> Context:
    """The teacher reads what the student read."""
    return lambda rollouts: [rollout.prompt for rollout in rollouts]


def privileged(
    *, system: str | None = None, examples: Sequence[tuple[str, str]] = (), template: str | None = None
) -> Context:
    """The teacher reads more than the student: a rule that is the same for every prompt, or a fact about this one.

    `system` replaces the system message, `examples` are exchanges (user, assistant) put before the conversation, and
    `template` rewrites the last user message, with the fields {prompt} and, from the data's column,
    {privileged_context}. Raises ConfigError when nothing is given, or for an unknown field.
    """
    if system is None and not examples and template is None:
        raise ConfigError(
            "A privileged context needs something that the student does not read: give `system`, `examples` or "
            "`template`."
        )
    if template is not None:
        _check_fields(template)

    def context(rollouts: Sequence[Rollout]) -> list[Prompt]:
        return [_enrich(rollout.prompt, system, examples, template) for rollout in rollouts]

    reads_column = template is not None and "{privileged_context}" in template
    return needing(context, *({"privileged_context"} if reads_column else ()))


def _enrich(prompt: Prompt, system: str | None, examples: Sequence[tuple[str, str]], template: str | None) -> Prompt:
    if isinstance(prompt.content, str):
        if examples:
            raise DataError(
                f"Worked examples are exchanges of a conversation, but prompt {prompt.id} is plain text. "
                "Set `chat: true` in the data section, or write the examples into `system`."
            )
        text = _fill(template, prompt.content, prompt)
        return replace(prompt, content=text if system is None else f"{system}\n\n{text}")
    messages = list(prompt.content)
    if template is not None:
        last = max(i for i, message in enumerate(messages) if message["role"] == "user")
        messages[last] = {**messages[last], "content": _fill(template, messages[last]["content"], prompt)}
    head = [message for message in messages[:1] if message["role"] == "system"]
    rest = messages[len(head) :]
    if system is not None:
        head = [{"role": "system", "content": system}]
    shown: list[Message] = []
    for user, assistant in examples:
        shown += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return replace(prompt, content=(*head, *shown, *rest))


def _fill(template: str | None, text: str, prompt: Prompt) -> str:
    if template is None:
        return text
    if "{privileged_context}" in template and prompt.privileged_context is None:
        raise DataError(
            f"Prompt {prompt.id} has no `privileged_context`, which the context's template asks for. "
            "Fill the column, or leave the field out of the template."
        )
    filled = template.replace("{privileged_context}", prompt.privileged_context or "")
    return filled.replace("{prompt}", text)


def _check_fields(template: str) -> None:
    import string

    known = {"prompt", "privileged_context"}
    fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    if fields - known or "prompt" not in fields:
        raise ConfigError(
            f"A context template has the fields {{prompt}} (needed) and {{privileged_context}}; got {sorted(fields)}."
        )
