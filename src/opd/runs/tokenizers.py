"""Check prompts, templates and tokenizers before weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opd.errors import ConfigError
from opd.messages import is_chat
from opd.method import Method
from opd.models.language_model import check_ids
from opd.models.preview import known_rows, tokenizer_of
from opd.recipe.schema import ModelSpec, Recipe, StageSpec, origin_of
from opd.runs.lengths import check_lengths
from opd.types import Prompt, TeacherRule

if TYPE_CHECKING:
    from opd.models.language_model import LanguageModel
    from opd.runs.prepare import Prepared


def check_tokenizers(
    recipe: Recipe, spec: StageSpec, prepared: Prepared, given: Mapping[str, LanguageModel] | None = None
) -> list[str]:
    """Render the prompts for student and teachers, bind the method, compare token maps and lengths. Returns lines.

    Leaves out models with a tokenizer that needs their weights. `given`: models loaded already. Raises DataError,
    ConfigError or AlignmentError.
    """
    from opd.models.render import render, render_checked

    lines: list[str] = []
    tokenizers: dict[str, Any] = {}
    given, prompts, method = given or {}, prepared.all_prompts, prepared.method
    for name in (spec.train, *spec.teachers):
        loaded = given.get(name)
        tokenizer = tokenizer_of(origin_of(recipe, name), name) if loaded is None else loaded.tokenizer
        if recipe.models[name].scorer is not None:
            continue
        if tokenizer is None:
            lines.append(f"model {name}: its tokenizer comes with its weights, so it is checked when they load")
        else:
            tokenizers[name] = tokenizer
    limits = {name: known_rows(origin_of(recipe, name), name, tokenizers[name]) for name in tokenizers if name not in given}
    limits |= {name: given[name].rows for name in tokenizers if name in given}
    lines += [line for name, tokenizer in tokenizers.items() for line in absent_tokens(name, tokenizer, limits[name])]
    lengths: list[int] = []
    if spec.train in tokenizers:
        options = origin_of(recipe, spec.train).template_options
        ids = render_checked(
            prompts, tokenizers[spec.train], max_prompt_length=spec.max_prompt_length, template_options=options
        )
        check_ids(spec.train, tokenizers[spec.train], ids, limits[spec.train], "prompt")
        lengths = list(map(len, ids))
        lines.append(f"longest prompt: {max(lengths)} tokens")
        lines += unused_template(spec.train, tokenizers[spec.train], prompts)
        method.with_tokenizer(tokenizers[spec.train])
        check_vocabulary(spec, method, tokenizers[spec.train])
    taught_by = {task: part.teacher for task, part in spec.by_task.items()}
    for name in spec.teachers:
        if name in tokenizers:  # fails now if a template is missing or refuses a prompt
            options = origin_of(recipe, name).template_options
            read = [
                render(prompt, tokenizers[name], options)
                for prompt in prompts
                if taught_by[prompt.task] == name and not isinstance(prompt.content, str)
            ]
            check_ids(name, tokenizers[name], read, limits[name], "prompt")
    compared = [name for name in spec.teachers if name in tokenizers and spec.train in tokenizers]
    ours = origin_of(recipe, spec.train).template_options
    found = [
        check_tokens(
            method.teacher,
            tokenizers[spec.train],
            tokenizers[name],
            (spec.train, name),
            chat=prepared.chat,
            options=(ours, origin_of(recipe, name).template_options),
        )
        for name in compared
    ]
    lines += [line for some in found for line in some]
    if compared and method.teacher.tokenizer == "students" and not any(found):
        lines.append(f"student and {' and '.join(compared)} map every token to the same id")
    if lengths:
        check_lengths(recipe, spec, prepared, lengths, tokenizers, given)
    return lines


def check_vocabulary(spec: StageSpec, method: Method, tokenizer: Any) -> None:
    """Refuse a support or a comparison of more tokens than the tokenizer has. Raises ConfigError."""
    from opd.evaluation.compare import check_k
    from opd.pieces.supports import check_fits

    vocabulary = max(tokenizer.get_vocab().values()) + 1
    check_fits(max(method.support.k, method.top_k), vocabulary)
    if spec.diagnostics.every:
        check_k(spec.diagnostics.k, vocabulary)


# --- chat templates --------------------------------------------------------------------------------------------------
def unused_template(name: str, tokenizer: Any, prompts: Sequence[Prompt]) -> list[str]:
    """A warning if the tokenizer has a chat template and no prompt is a conversation; else no line."""
    if not tokenizer.chat_template or is_chat(prompts):
        return []
    return [
        f"{name} has a chat template, which nothing uses: the prompts are text, and are read as they are. For answers "
        "as in a chat, set data.chat: true"
    ]


def check_template_options(recipe: Recipe, prepared: Mapping[str, Prepared]) -> None:
    """Refuse `template_options` of a model that reads no conversation. Raises ConfigError.

    `prepared` is by stage. Judges pass, because they read other texts than the prompts.
    """
    idle: dict[str, list[str]] = {}
    used: list[ModelSpec] = []
    for spec in recipe.stages:
        prompts = prepared[spec.name].all_prompts
        taught_by = {task: part.teacher for task, part in spec.by_task.items()}
        used += [origin_of(recipe, name) for name in spec.judge_models]
        for name in (spec.train, *spec.teachers):
            reads = [p for p in prompts if name == spec.train or taught_by[p.task] == name]
            if is_chat(reads):
                used.append(origin_of(recipe, name))
            elif recipe.models[name].template_options:
                idle.setdefault(name, []).append(repr(spec.name))
    for name, stages in idle.items():
        if not any(origin_of(recipe, name) is one for one in used):
            raise ConfigError(
                f"models.{name}.template_options is {recipe.models[name].template_options}, and nothing would use it: "
                f"all prompts of {'stage' if len(stages) == 1 else 'the stages'} {', '.join(stages)} are text, which "
                "is read as it is, without the chat template. Set data.chat: true, which makes each prompt a user's "
                f"message, or remove models.{name}.template_options."
            )


def check_tokens(
    rule: TeacherRule,
    student: Any,
    teacher: Any,
    names: tuple[str, str],
    *,
    chat: bool,
    options: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> list[str]:
    """What two tokenizers share or not, in words; empty for all. Raises AlignmentError where the rule needs more.

    `chat` and both templates' `options` are those of `alignment.pair_of`.
    """
    from opd.models.alignment import pair_of
    from opd.models.vocabularies import check_same_tokens

    if rule.tokenizer == "students":
        return check_same_tokens(student, teacher, names).differences(names)
    pair = pair_of(student, teacher, chat=chat, options=options)
    ends = [f"{student.decode([end])!r} is read as {teacher.decode([its])!r}" for end, its in pair.ends.items()]
    return [
        f"{names[0]} ({len(student.get_vocab())} tokens) and {names[1]} ({len(teacher.get_vocab())}) share "
        f"{len(pair.shared)} tokens; the end of a response: {', '.join(ends) or 'is not compared'}"
    ]


def absent_tokens(name: str, tokenizer: Any, rows: float) -> list[str]:
    """A note on added tokens without a row in the model's layers; empty if there are none."""
    from opd.models.wrapping import rows_note

    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    absent = [token for token, i in tokens if i >= rows]
    return [rows_note(name, absent, int(rows))] if absent else []
