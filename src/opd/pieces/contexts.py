"""Contexts: the prompts that the teacher reads. A context returns one `Prompt` per rollout.

The teacher renders it with its own chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

from opd.errors import ConfigError, DataError
from opd.messages import fields_of, with_question
from opd.pieces.filters import PASS
from opd.pieces.needs import Input, Need, Trait, needing, needs_of
from opd.pieces.solutions import Solutions, showing
from opd.types import Context, Message, Prompt, Rollout

VERDICTS = ("correct", "incorrect")


FIELDS = ("prompt", "privileged_context", "answer", "attempt", "verdict")


# Arguments of `privileged`: the kinds of privileged information of arXiv 2605.11182 that differ between prompts. The
# content follows the paper, the wording is ours. (For a rule that all prompts share, use `system`.) For a chat template
# that opens the think block itself, pass a `prefill` without the opening tag.
INFORMATION: Mapping[str, Mapping[str, str]] = {
    "answer": {
        "template": "{prompt}\n\nThe final answer is known to be: {answer}\nSolve the problem yourself, step by step, "
        "and arrive at this answer."
    },
    "solution": {
        "template": "{prompt}\n\nA reference solution:\n{privileged_context}\n\nOnce you see why each of its steps is "
        "there, derive the same answer again in your own steps."
    },
    "hint": {"prefill": "<think>\nThe answer to this problem is {answer}.\n</think>\n\n"},
    "history": {
        "template": "{prompt}\n\nEarlier attempts at this problem, in summary:\n{privileged_context}\n\nKeep what led "
        "somewhere, avoid what did not, and solve the problem."
    },
    "feedback": {
        "template": "{prompt}\n\nAn attempt:\n{attempt}\n\nThe attempt was checked and is {verdict}. Keep what is "
        "right in it, correct what is not, and solve the problem."
    },
    # arXiv 2605.11609 (App. C), in its words: another response's solution, and the verdict on this response.
    "verified": {
        "template": "{prompt}\n\nYour previous attempt:\n{privileged_context}\n\nPrevious assessment: Your answer is "
        "{verdict}.\n\nNow solve this problem step by step."
    },
}


# A template of arXiv 2605.06094: the verified answer, and a judge's feedback on the response. The wording is ours.
ADVISED = (
    "{prompt}\n\nThe verified answer is: {answer}\n\nFeedback on an attempt:\n{privileged_context}\n\n"
    "Solve the problem yourself, step by step, with this feedback in mind."
)


# Templates of methods in which the student teaches itself. The last sentence of the first one is that of the released
# code of arXiv 2601.20802, the second one is that of arXiv 2601.19897, and the wording of the third one is ours.
SELF_TAUGHT: Mapping[str, str] = {
    "sdpo": "{prompt}\n\nA correct solution, or feedback on an attempt:\n\n{privileged_context}\n\n"
    "Correctly solve the original question.",
    "sdft": "{prompt}\n\nThis is an example for a response to the question:\n{privileged_context}\n\n"
    "Now answer with a response of your own, including the thinking process.",
    "opsd": "{prompt}\n\nA reference solution of this problem:\n{privileged_context}\n\n"
    "Understand the reason for each of its steps, then derive the answer on your own, step by step.",
}


@cache
def same_prompt() -> Context:
    """The teacher reads the student's prompt."""

    def context(rollouts: Sequence[Rollout]) -> list[Prompt]:
        return [rollout.prompt for rollout in rollouts]

    return needing(context)


def privileged(
    *,
    system: str | None = None,
    examples: Sequence[tuple[str, str]] = (),
    template: str | None = None,
    prefill: str | None = None,
    verdicts: tuple[str, str] = VERDICTS,
    solutions: Solutions | None = None,
    images: bool = False,
) -> Context:
    """The teacher reads more than the student: a rule that is the same for every prompt, or a fact about this prompt.

    `system` replaces the system message. `examples` are (user, assistant) exchanges put before the conversation.
    `template` rewrites the last user message. `prefill` follows the generation prompt, as the beginning of the
    teacher's answer; the prompt's own prefill, which the student continues, follows it. Template and prefill have
    fields:

        {prompt}               the user's message; required in a template, not allowed in a prefill
        {privileged_context}   the data's column, e.g. a solution
        {answer}               the data's column
        {attempt}              the student's response, which the teacher scores
        {verdict}              `verdicts[0]` if the stage's reward is at least `filters.PASS`, else `verdicts[1]`

    `images`: the teacher sees the row's `privileged_images` in place of its `images`, in the same places.

    `solutions`, if given, returns the text of {privileged_context} for each response. For a response without a solution
    the teacher reads only the prompt.

    Raises ConfigError without any argument, for an unknown field, and for solutions that neither text shows.
    """
    if system is None and not examples and template is None and prefill is None and not images:
        raise ConfigError(
            "A privileged context must add text that the student does not read: give `system`, `examples`, "
            "`template` or `prefill`; or show other `images`."
        )
    fields = _fields_in(template, prefill, solutions)

    def context(rollouts: Sequence[Rollout]) -> list[Prompt]:
        def shown(prompt: Prompt, one: Rollout | None) -> Prompt:
            if one is None:
                return prompt
            enriched = _enriched(one, system, examples, template, prefill, verdicts)
            return with_other_images(enriched) if images else enriched

        read = rollouts if solutions is None else showing(rollouts, solutions(rollouts))
        return [shown(rollout.prompt, one) for rollout, one in zip(rollouts, read, strict=True)]

    needs = set[Need]()
    if solutions is not None:
        needs |= {Input.REWARD, Input.GROUP, Trait.READS_ATTEMPT, *needs_of(solutions).inputs}
    if fields & {"attempt", "verdict"}:
        needs |= {Trait.READS_ATTEMPT}
    if "verdict" in fields:
        needs |= {Input.REWARD}
    columns = fields & ({"answer"} if solutions is not None else {"answer", "privileged_context"})
    return needing(context, *needs, columns=columns | ({"privileged_images"} if images else set()))


def _fields_in(template: str | None, prefill: str | None, solutions: Solutions | None) -> set[str]:
    """The fields of both texts. Raises ConfigError for an unknown one, and for solutions that neither text shows."""
    fields = set[str]()
    if template is not None:
        fields |= fields_of("A context's template", template, FIELDS, needed="prompt")
    if prefill is not None:
        fields |= fields_of("A context's prefill", prefill, FIELDS[1:])
    if solutions is not None and "privileged_context" not in fields:
        raise ConfigError(
            "Solutions fill the field {privileged_context}, but neither the template nor the prefill has this field; "
            f"got template {template!r:.80} and prefill {prefill!r:.80}. Add the field to one of them."
        )
    return fields


def with_other_images(prompt: Prompt) -> Prompt:
    """The prompt with its `privileged_images` in place of its images. Raises DataError if it has another number."""
    if len(prompt.privileged_images) != len(prompt.images):
        raise DataError(
            f"Prompt {prompt.id} has {len(prompt.images)} images and {len(prompt.privileged_images)} "
            "`privileged_images`, which the teacher sees in their places. Give as many."
        )
    return replace(prompt, images=prompt.privileged_images)


def informed(
    information: str | None,
    *,
    system: str | None = None,
    examples: Sequence[tuple[str, str]] = (),
    template: str | None = None,
    prefill: str | None = None,
    solutions: Solutions | None = None,
    images: bool = False,
) -> Context:
    """`privileged` with the texts of `INFORMATION[information]`; None: with the given ones alone.

    Raises ConfigError as `privileged`, and for a text that both give.
    """
    words = dict[str, str]() if information is None else INFORMATION[information]
    twice = [name for name, value in (("template", template), ("prefill", prefill)) if value and name in words]
    if twice:
        raise ConfigError(
            f"`information: {information}` sets `{twice[0]}`, but the options set it too. Leave one of the two out."
        )
    return privileged(
        system=system,
        examples=examples,
        template=words.get("template", template),
        prefill=words.get("prefill", prefill),
        solutions=solutions,
        images=images,
    )


def _enriched(
    rollout: Rollout,
    system: str | None,
    examples: Sequence[tuple[str, str]],
    template: str | None,
    prefill: str | None,
    verdicts: tuple[str, str],
) -> Prompt:
    prompt = rollout.prompt
    if prefill is not None:
        prompt = replace(prompt, prefill=_filled(prefill, rollout, verdicts) + prompt.prefill)
    if isinstance(prompt.content, str):
        if examples:
            raise DataError(
                f"Worked examples need a conversation, but prompt {prompt.id} is plain text. "
                "Set `chat: true` in the data section, or write the examples into `system`."
            )
        text = prompt.content if template is None else _filled(template, rollout, verdicts, prompt.content)
        return replace(prompt, content=text if system is None else f"{system}\n\n{text}")
    messages = prompt.content
    if template is not None:
        messages = with_question(
            messages, lambda text: _filled(template, rollout, verdicts, text), f"Prompt {prompt.id}"
        )
        assert not isinstance(messages, str)
    head = [message for message in messages[:1] if message["role"] == "system"]
    rest = messages[len(head) :]
    if system is not None:
        head = [{"role": "system", "content": system}]
    shown: list[Message] = []
    for user, assistant in examples:
        shown += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return replace(prompt, content=(*head, *shown, *rest))


def _filled(pattern: str, rollout: Rollout, verdicts: tuple[str, str], text: str = "") -> str:
    """The pattern with its fields filled; braces inside a value stay unchanged."""
    values: dict[str, str] = {"prompt": text, "attempt": rollout.prompt.prefill + rollout.text}
    for name in ("privileged_context", "answer"):
        if f"{{{name}}}" in pattern:
            values[name] = _column(name, rollout.prompt)
    if "{verdict}" in pattern:
        if rollout.reward is None:
            remedy = "Set the stage's `reward`, or leave {verdict} out."
            if rollout.unjudged is not None:
                remedy = (
                    f"Its reward failed ({rollout.unjudged}). Run the same command again: it continues from the last "
                    "checkpoint and queries a judge again. Or correct the reward, or the row."
                )
            raise DataError(
                f"The response to prompt {rollout.prompt.id} has no reward, but the context shows the teacher its "
                f"verdict. {remedy}"
            )
        values["verdict"] = verdicts[0] if rollout.reward >= PASS else verdicts[1]
    return pattern.format(**values)


def _column(name: str, prompt: Prompt) -> str:
    value = getattr(prompt, name)
    if value is None:
        raise DataError(
            f"Prompt {prompt.id} has no `{name}`, which the context shows. Fill the column, or leave the field out."
        )
    return str(value)
