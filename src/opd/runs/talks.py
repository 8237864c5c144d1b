"""Whether a stage's conversations with an environment can be led: checked before weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from opd.environments.acting import begun, ended
from opd.environments.between import Transcript
from opd.environments.conversations import Rules
from opd.environments.formats import format_of, name_of
from opd.environments.protocol import Call
from opd.errors import ConfigError
from opd.method import Method
from opd.models.language_model import LanguageModel
from opd.models.preview import known_endings, tokenizer_of
from opd.models.render import render_checked
from opd.pieces import sources
from opd.pieces.needs import Input, Trait, needs_of
from opd.recipe.schema import Recipe, SamplingSection, StageSpec, TaskSection, origin_of
from opd.runs.prepare import Prepared
from opd.types import Prompt

THOUGHT = "<think>\nthought\n</think>\n\n"  # what a template may drop from an earlier turn


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
            lines += [
                f'{key}.stop has no "]", so a call [...] ends a turn only with the end-of-sequence token'
                for key, sampling in settings.items()
                if not any("]" in stop for stop in sampling.stop)
            ]
        origin = origin_of(recipe, spec.train)
        tokenizer = tokenizer_of(origin, spec.train) if student is None else student.tokenizer
        if tokenizer is None:
            continue
        options = origin.template_options
        render_checked([first], tokenizer, max_prompt_length=spec.max_prompt_length, template_options=options)
        endings = student.endings if student is not None else known_endings(origin, spec.train, tokenizer)
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
    role = "user"
    if prompt.tools:
        how = format_of(tokenizer, chat=True, where=where) if rules.format == "auto" else rules.format
        calls, role = (Call(name=name_of(prompt.tools[0]), arguments={"value": "words"}),), "tool"
        line = [f"tool calls are read in the format {how!r}"]
    else:
        line = []
    ids = [] if end is None else [end]
    for thought in ("", THOUGHT):
        transcript = Transcript(prompt=prompt, tokenizer=tokenizer, template_options=options, stop_ids=stops)
        for _ in range(2):
            between = transcript.after(ids, f"{thought}words", f"{thought}words", calls, ["observation"], role)
            if between.refused is not None:
                raise ConfigError(
                    f"{where}: the chat template writes no turn behind a message of role {role!r}, which an "
                    f"observation of the environment is: {between.refused} Set the model's template, "
                    "`models.NAME.chat_template`."
                )
            if not between.rewritten:
                continue
            if rules.keeps_rewritten:
                return [*line, "the chat template rewrites earlier turns of a conversation; their tokens are kept"]
            what = "the thinking of an earlier turn (<think>)" if thought else "an earlier turn"
            raise ConfigError(
                f"{where}: the chat template writes {what} otherwise when a later turn follows, and a conversation's "
                "tokens are never encoded again. Set `environment.rewritten: keep` to train on the tokens as they were "
                "written, or a template that keeps them, `models.NAME.chat_template`."
            )
    return line
