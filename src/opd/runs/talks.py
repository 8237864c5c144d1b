"""Whether a stage's conversations with an environment can be led: checked before weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from opd.environments.acting import begun, ended
from opd.environments.between import Transcript
from opd.environments.conversations import Rules
from opd.environments.formats import FORMATS, format_of, name_of, parsed
from opd.environments.protocol import Call
from opd.environments.tools import unfit_for_text
from opd.errors import ConfigError, DataError
from opd.method import Method
from opd.models.language_model import LanguageModel
from opd.models.preview import known_endings, tokenizer_of
from opd.models.render import chat_text, render_checked, template_for
from opd.models.unknown import unknown_id
from opd.pieces import sources
from opd.pieces.needs import Input, Trait, needs_of
from opd.recipe.schema import Recipe, SamplingSection, StageSpec, TaskSection, origin_of
from opd.runs.prepare import Prepared
from opd.types import Prompt


def check_talks(recipe: Recipe, spec: StageSpec, prepared: Prepared, student: LanguageModel | None) -> list[str]:
    """Refuse conversations that cannot be led, and begin one of each task. Returns lines to report.

    `student`: the model, if it is loaded already. Raises ConfigError, DataError.
    """
    lines: list[str] = []
    for name, task in prepared.tasks.items():
        rules, section = task.rules, spec.by_task[name].environment
        if rules is None or section is None:
            continue
        where = spec.where(name)
        check_method(spec, prepared.method, where, evaluates=spec.by_task[name].evaluate is not None)
        if any(prompt.images for prompt in task.prompts):
            raise ConfigError(
                f"{where}: its prompts have images, and conversations with an environment are of text alone. Remove "
                "`environment`, or the column of images."
            )
        one = begun(rules.environment, task.prompts[0], (recipe.seed, 0, task.prompts[0].id, 0))
        content = task.prompts[0].content if one.content is None else one.content
        first = replace(task.prompts[0], content=content, tools=tuple(one.tools))
        ended(rules.environment, one.state, rules.limits)
        tools = f" with the tools {', '.join(map(name_of, one.tools))}" if one.tools else ""
        settings = settings_of(spec.by_task[name], prepared.method)
        most = " or ".join(map(str, dict.fromkeys(one.max_completion_length for one in settings.values())))
        lines.append(
            f"{'' if name is None else f'task {name}: '}each {'evaluated ' * by_data(prepared.method)}response is a "
            f"conversation with {rules.environment.name}"
            f"{tools}: up to {rules.max_turns} turns, {most} tokens in all"
        )
        if isinstance(first.content, str) and one.tools:
            lines += without_stop(spec.by_task[name], settings)
            if rules.format in ("auto", "text") and (why := unfit_for_text(rules.environment)) is not None:
                raise ConfigError(
                    f"{where}: the prompts are texts, whose calls give one text, [f: 1+2], and {why}. Set `data.chat: "
                    "true` for calls with names, or write a function of one text."
                )
        origin = origin_of(recipe, spec.train)
        tokenizer = tokenizer_of(origin, spec.train) if student is None else student.tokenizer
        if tokenizer is None:
            continue
        options = origin.template_options
        render_checked([first], tokenizer, max_prompt_length=spec.max_prompt_length, template_options=options)
        endings = student.endings if student is not None else known_endings(origin, spec.train, tokenizer)
        lines += unknown_error(rules, tokenizer) if one.tools else []
        lines += check_template(first, rules, tokenizer, options, endings.stops, endings.turn, where)
    return lines


def check_method(spec: StageSpec, method: Method, where: str, *, evaluates: bool) -> None:
    """Refuse a stage in which not the student alone writes, turn by turn. Raises ConfigError.

    The data's responses may be trained if the task `evaluates`, in the environment.
    """
    source = needs_of(method.source)
    if by_data(method):
        if not evaluates:
            raise ConfigError(
                f"{where}: in method {spec.method!r} the data's responses are trained, so that the environment takes "
                "part in the evaluation alone, and there is none. Set `evaluate`, or remove `environment`."
            )
        return
    if Trait.OFF_POLICY in source or source.inputs & {Input.TEACHER_MODEL, Input.PEERS} or method.parts:
        raise ConfigError(
            f"{where}: it has an environment, which the student talks with, and in method {spec.method!r} others write "
            "responses too. Use a method in which the student writes, such as opd or grpo, or remove `environment`."
        )
    if source.response_tokens:
        raise ConfigError(
            f"{where}: method {spec.method!r} has a budget of tokens per response, which would be one per turn of a "
            "conversation. Leave its `budget` out, or remove `environment`."
        )
    if method.teacher.tokenizer == "any":
        raise ConfigError(
            f"{where}: in method {spec.method!r} the teacher has its own tokenizer and reads the text of a response, "
            "which does not say where a turn of a conversation ends. Use a method for the student's tokenizer, or "
            "remove `environment`."
        )
    if spec.ahead:
        raise ConfigError(
            f"{where}: `ahead: 1` draws the next step's responses in one request each, and a conversation with an "
            "environment takes several. Remove `ahead`, or `environment`."
        )
    if spec.peers:
        raise ConfigError(f"{where}: `environment` is not supported in a stage with `peers`. Remove one of them.")


def unknown_error(rules: Rules, tokenizer: Any) -> list[str]:
    """A line if the tokenizer, such as one of a few characters, does not know the text of a failed call."""
    ids = tokenizer(rules.limits.error.replace("{why}", "no tool"), add_special_tokens=False).input_ids
    if unknown_id(tokenizer) not in ids:
        return []
    return [
        f"of a failed call the model reads {tokenizer.decode(ids)!r:.80}: set `environment.error` to a text it knows"
    ]


def without_stop(task: TaskSection, settings: Mapping[str, SamplingSection]) -> list[str]:
    """A line for each of the `settings`, and of the evaluation's, in which no call in a text ends a turn."""
    held_out = {} if task.evaluate is None else task.evaluate.sampling
    named = {**settings, **{f"evaluate.sampling.{name}": one for name, one in held_out.items()}}
    return [
        f'{key}.stop has no "]", so a call [...] ends a turn only with the end-of-sequence token'
        for key, sampling in named.items()
        if not any("]" in stop for stop in sampling.stop)
    ]


def settings_of(task: TaskSection, method: Method) -> dict[str, SamplingSection]:
    """How the conversations of a task are drawn, by the keys of the recipe: in training, or in the evaluation alone."""
    if not by_data(method):
        return {"sampling": task.sampling}
    assert task.evaluate is not None  # `check_method`
    return {f"evaluate.sampling.{name}": one for name, one in task.evaluate.sampling.items()}


def by_data(method: Method) -> bool:
    """Whether the data's responses are trained and no model writes: conversations are led in the evaluation alone."""
    return method.source is sources.dataset()


def check_template(
    prompt: Prompt,
    rules: Rules,
    tokenizer: Any,
    options: Any,
    stops: frozenset[int],
    end: int | None,
    where: str,
) -> list[str]:
    """Try the chat template on two turns. Returns lines; raises ConfigError for one that writes no second turn."""
    if isinstance(prompt.content, str):
        return []
    calls: Sequence[Call] = ()
    lines: list[str] = []
    if prompt.tools:
        how = format_of(tokenizer, chat=True, where=where) if rules.format == "auto" else rules.format
        calls = (Call(name=name_of(prompt.tools[0]), arguments={"value": "words"}),)
        other = unread(prompt, calls[0], how, tokenizer, options, stops)
        if other and rules.format == "auto":
            raise ConfigError(
                f"{where}: {other[0]}, so no call of the model could be read. Use a model that writes calls in one of "
                f"the formats {', '.join(FORMATS[:-1])}, or set `environment.format` to the one that it writes."
            )
        lines = [f"tool calls are read in the format {how!r}", *other]
    ids = [] if end is None else [end]
    for said, what, ends in tried(prompt, tokenizer, options, calls=bool(calls)):
        transcript = Transcript(prompt=prompt, tokenizer=tokenizer, template_options=options, stop_ids=stops)
        if not rewrites(said, calls, ids, transcript, where):
            continue
        if rules.keeps_rewritten:
            return [*lines, "the chat template rewrites earlier turns of a conversation; their tokens are kept"]
        if not ends:
            lines.append(
                f"the chat template drops {what} from an earlier turn: a conversation with such a turn ends there "
                "(`rewritten`), unless `environment.rewritten` is keep"
            )
            continue
        raise ConfigError(
            f"{where}: the chat template writes {what} otherwise when a later turn follows, and a conversation's "
            "tokens are never encoded again. Set `environment.rewritten: keep` to train on the tokens as they were "
            "written, or a template that keeps them, `models.NAME.chat_template`."
        )
    return lines


def tried(prompt: Prompt, tokenizer: Any, options: Any, *, calls: bool) -> list[tuple[str, str, bool]]:
    """(what a turn says beside its calls, its name, whether a model often says it) for each kind of turn to try."""
    template, _ = template_for(prompt, tokenizer, options)
    turns = [("", "an earlier turn", True), ("first", "what is said beside a call", False)]
    turns = turns if calls else [("words", "an earlier turn", True)]
    head = chat_text(replace(prompt, prefill=""), tokenizer, options).rstrip()
    if "think" not in template or head.endswith("</think>"):  # nothing of it is special, or the thinking is over
        return turns
    begun = "" if head.endswith("<think>") else "<think>\n"
    thought = (f"{begun}thought\n</think>\n\nwords", "the thinking of an earlier turn (<think>)", True)
    return [*turns, thought, (f"{begun}\n</think>\n\nwords", "an empty <think></think>", False)]


def rewrites(said: str, calls: Sequence[Call], ids: Sequence[int], transcript: Transcript, where: str) -> bool:
    """Whether the template writes one of two such turns otherwise later. Raises ConfigError if it writes no second."""
    role = "tool" if calls else "user"
    for _ in range(2):
        between = transcript.after(ids, said or "words", said, calls, ["observation"], role)
        if between.refused is not None:
            raise ConfigError(
                f"{where}: the chat template writes no turn behind a message of role {role!r}, which an observation of "
                f"the environment is: {between.refused} Set the model's template, `models.NAME.chat_template`."
            )
        if between.rewritten:
            return True
    return False


def unread(prompt: Prompt, call: Call, how: str, tokenizer: Any, options: Any, stops: frozenset[int]) -> list[str]:
    """A line if a call that the chat template writes is not read as this call: the format is another one."""
    assert not isinstance(prompt.content, str)
    function = {"name": call.name, "arguments": call.arguments}
    said = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "000000000", "type": "function", "function": function}],
    }
    try:
        before = chat_text(replace(prompt, prefill=""), tokenizer, options)
        whole = chat_text(
            replace(prompt, content=(*prompt.content, said), prefill=""), tokenizer, options, goes_on=False
        )
    except DataError:  # it has no such message, which `Transcript` sees
        return []
    same = next((i for i, (one, other) in enumerate(zip(before, whole, strict=False)) if one != other), len(before))
    written = whole[same:]
    for end in map(tokenizer.decode, sorted(stops)):
        written = written.partition(end)[0]
    found = parsed(written, how, tokenizer, prompt.tools)
    if call.name not in written or found.calls == (call,) or how == "library":
        return []
    return [f"the chat template writes a call as {written.strip()!r:.120}, which is not the format {how!r}"]
