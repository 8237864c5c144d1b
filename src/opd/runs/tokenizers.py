"""Check prompts, templates and tokenizers before weights are loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from opd.errors import ConfigError, DataError
from opd.messages import is_chat
from opd.method import Method
from opd.models.endings import Endings
from opd.models.language_model import check_ids
from opd.models.preview import known_endings, known_rows, tokenizer_of
from opd.models.processors import refuse_images
from opd.models.unknown import unknown_id, unknown_lines
from opd.pieces.needs import needs_of
from opd.recipe.schema import Recipe, StageSpec, origin_name, origin_of
from opd.runs.examples import Reader, example_lines
from opd.runs.lengths import check_lengths
from opd.runs.served import with_template
from opd.types import Message, Prompt, TeacherRule, teachers_in

if TYPE_CHECKING:
    from opd.models.language_model import LanguageModel
    from opd.runs.prepare import Prepared

BASE_RULE = TeacherRule(kind="external")  # a base has the student's tokens, whatever the teacher may have


def check_tokenizers(
    recipe: Recipe, spec: StageSpec, prepared: Prepared, given: Mapping[str, LanguageModel] | None = None
) -> list[str]:
    """Render the prompts for student and teachers, bind the method, compare token maps and lengths. Returns lines.

    Leaves out models with a tokenizer that needs their weights. `given`: models loaded already. Raises DataError,
    ConfigError or AlignmentError.
    """
    from opd.models.render import render_checked

    lines: list[str] = []
    tokenizers: dict[str, Any] = {}
    given, prompts, method = given or {}, prepared.all_prompts, prepared.method
    check_images(recipe, spec, prompts)
    for name in (spec.train, *spec.scoring):
        loaded = given.get(name)
        tokenizer = tokenizer_of(origin_of(recipe, name), name) if loaded is None else loaded.tokenizer
        server = recipe.models[name].server
        if server is not None and server.start is None and tokenizer is None:
            tokenizer = with_template(recipe.models[name], tokenizers.get(spec.train))
        if recipe.models[name].scorer is not None:
            lines.append(f"model {name}: it is your own scorer, so what it reads is not shown")
            continue
        if tokenizer is None:
            lines.append(
                f"model {name}: its tokenizer comes with its weights, so what it reads is checked and shown when they "
                "load"
            )
        else:
            tokenizers[name] = tokenizer
    rows = rows_of(recipe, tokenizers, given)
    lines += [line for name, tokenizer in tokenizers.items() for line in absent_tokens(name, tokenizer, rows[name])]
    lengths: list[int] = []
    if spec.train in tokenizers:
        options = origin_of(recipe, spec.train).template_options
        ids = render_checked(
            prompts, tokenizers[spec.train], max_prompt_length=spec.max_prompt_length, template_options=options
        )
        check_ids(spec.train, tokenizers[spec.train], ids, rows[spec.train], "prompt")
        check_differ(spec.train, prompts, ids)
        lengths = list(map(len, ids))
        lines.append(f"longest prompt: {max(lengths)} tokens")
        lines += unknown_in_prompts(spec.train, tokenizers[spec.train], prompts, ids, options)
        lines += unused_template(spec.train, tokenizers[spec.train], prompts)
        lines += template_lines(spec.train, tokenizers[spec.train], prompts, options)
        if is_chat(prompts):
            loaded, origin = given.get(spec.train), origin_of(recipe, spec.train)
            ends = loaded.endings if loaded else known_endings(origin, spec.train, tokenizers[spec.train])
            lines += ending_lines(spec.train, tokenizers[spec.train], ends)
        method = method.with_tokenizer(tokenizers[spec.train])
        check_vocabulary(spec, method, tokenizers[spec.train])
    lines += check_teachers_prompts(recipe, spec, prompts, tokenizers, rows)
    lines += compared(recipe, spec, prepared, tokenizers)
    responses, unknown = check_responses(recipe, spec, prepared, tokenizers, rows)
    lines += unknown
    if lengths:
        check_lengths(recipe, spec, prepared, lengths, responses, tokenizers, given)
    readers = readers_of(recipe, tokenizers, given)
    return [*lines, *example_lines(spec, replace(prepared, method=method), readers)]


def check_images(recipe: Recipe, spec: StageSpec, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts with images for models on servers. Raises ConfigError."""
    for name in spec.scoring:
        if recipe.models[name].server is not None:
            refuse_images(prompts, f"models.{name}, a served teacher,")
    if spec.engine is not None:
        refuse_images(prompts, f"{spec.where(None)}: `engine`, a vLLM server,")


def readers_of(recipe: Recipe, tokenizers: Mapping[str, Any], given: Mapping[str, LanguageModel]) -> dict[str, Reader]:
    """The models with a known tokenizer, by name."""
    readers: dict[str, Reader] = {}
    for name, tokenizer in tokenizers.items():
        if name in given:
            readers[name] = Reader.of(given[name])
            continue
        spec = origin_of(recipe, name)
        endings = known_endings(spec, name, tokenizer)
        readers[name] = Reader(tokenizer=tokenizer, options=spec.template_options, endings=endings)
    return readers


def rows_of(recipe: Recipe, tokenizers: Mapping[str, Any], given: Mapping[str, LanguageModel]) -> dict[str, float]:
    """By model, the ids below which it has rows in its layers; infinite if its config does not say."""
    return {
        name: given[name].rows if name in given else known_rows(origin_of(recipe, name), name, tokenizer)
        for name, tokenizer in tokenizers.items()
    }


def check_teachers_prompts(
    recipe: Recipe,
    spec: StageSpec,
    prompts: Sequence[Prompt],
    tokenizers: Mapping[str, Any],
    rows: Mapping[str, float],
) -> list[str]:
    """Refuse a missing template, one that refuses a prompt, and tokens that a teacher lacks. Returns notes.

    Raises DataError or ConfigError.
    """
    from opd.models.render import render

    lines: list[str] = []
    taught_by = {task: part.teacher for task, part in spec.by_task.items()}
    for name in spec.scoring:
        if name not in tokenizers:
            continue
        tokenizer, options = tokenizers[name], origin_of(recipe, name).template_options
        mine = [prompt for prompt in prompts if name in (*teachers_in(taught_by[prompt.task]), spec.base)]
        lacks = bool(absent_tokens(name, tokenizer, rows[name]))
        lines += taught_lines(name, tokenizer, [one for one in mine if not isinstance(one.content, str)], options)
        student = tokenizers.get(spec.train)
        other = student is not None and student.get_vocab() != tokenizer.get_vocab()  # else the student's line says it
        if lacks or (other and unknown_id(tokenizer) is not None):
            read = [render(one, tokenizer, options) for one in mine]
            check_ids(name, tokenizer, read, rows[name], "prompt")
            lines += unknown_in_prompts(name, tokenizer, mine, read, options) if other else []
    return lines


def compared(recipe: Recipe, spec: StageSpec, prepared: Prepared, tokenizers: Mapping[str, Any]) -> list[str]:
    """What the student's tokenizer shares with those of the teachers, in words. Raises AlignmentError."""
    rule = prepared.method.teacher
    names = [name for name in spec.scoring if name in tokenizers and spec.train in tokenizers]
    ours = origin_of(recipe, spec.train).template_options
    found = [
        check_tokens(
            BASE_RULE if name == spec.base else rule,
            tokenizers[spec.train],
            tokenizers[name],
            (spec.train, name),
            chat=prepared.chat,
            options=(ours, origin_of(recipe, name).template_options),
        )
        for name in names
    ]
    if names and rule.tokenizer == "students" and not any(found):
        return [f"student and {' and '.join(names)} map every token to the same id"]
    return [line for some in found for line in some]


def check_responses(
    recipe: Recipe, spec: StageSpec, prepared: Prepared, tokenizers: Mapping[str, Any], rows: Mapping[str, float]
) -> tuple[list[int], list[str]]:
    """The lengths of the data's responses to the training prompts, in tokens; empty if no writer reads them. And notes.

    Raises DataError for a response that the student cannot read as `models.references.reference_of` says, or with
    tokens that the student or a teacher lacks.
    """
    from opd.models.endings import endings_of
    from opd.models.references import reference_of
    from opd.models.vocabularies import check_same_tokens

    method, student = prepared.method, tokenizers.get(spec.train)
    if student is None or "response" not in needs_of(method.source).columns:
        return [], []
    students = method.teacher.tokenizer == "students"
    others = [name for name in spec.scoring if name in tokenizers and (students or name == spec.base)]
    sizes = [check_same_tokens(student, tokenizers[name]).size for name in others]
    size = min([rows[spec.train], *sizes, *(rows[name] for name in others)])
    options = origin_of(recipe, spec.train).template_options
    endings = endings_of(student, options, below=size)
    prompts = [prompt for task in prepared.tasks.values() for prompt in task.prompts]
    responses = [reference_of(prompt, student, endings, options).ids for prompt in prompts]
    if absent_tokens(spec.train, student, size):
        check_ids(spec.train, student, responses, size, "response")

    def text(row: int) -> str:
        said = prompts[row].turns or ({"content": prompts[row].response or ""},)
        return "".join(str(message["content"]) for message in said)

    return list(map(len, responses)), unknown_lines(spec.train, student, responses, text, "responses of the data")


def check_vocabulary(spec: StageSpec, method: Method, tokenizer: Any) -> None:
    """Refuse a support or a comparison of more tokens than the tokenizer has. Raises ConfigError."""
    from opd.pieces.supports import check_fits

    vocabulary = max(tokenizer.get_vocab().values()) + 1
    check_fits(max(method.support.k, method.top_k), vocabulary)
    if spec.diagnostics.every:
        from opd.evaluation.compare import check_k

        check_k(spec.diagnostics.k, vocabulary)


# --- chat templates --------------------------------------------------------------------------------------------------
def unused_template(
    name: str, tokenizer: Any, prompts: Sequence[Prompt], *, chat: str = "set data.chat: true"
) -> list[str]:
    """A warning if the tokenizer has a chat template and no prompt is a conversation; else no line.

    `chat`: how the prompts become conversations.
    """
    if not tokenizer.chat_template or is_chat(prompts):
        return []
    return [
        f"{name} has a chat template, which nothing uses: the prompts are text, and are read as they are. For answers "
        f"as in a chat, {chat}"
    ]


def unknown_in_prompts(
    name: str, tokenizer: Any, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], options: Mapping[str, Any]
) -> list[str]:
    """A line if prompts, which were rendered to `ids`, hold text that the tokenizer does not know."""
    from opd.models.render import chat_text

    def text(row: int) -> str:
        content = prompts[row].content
        return content if isinstance(content, str) else chat_text(prompts[row], tokenizer, options)

    return unknown_lines(name, tokenizer, ids, text, "prompts")


def taught_lines(name: str, tokenizer: Any, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> list[str]:
    """`template_lines` of a teacher, after its template has rendered every prompt."""
    from opd.models.render import render

    check_differ(name, prompts, [render(prompt, tokenizer, options) for prompt in prompts])
    return template_lines(name, tokenizer, prompts, options)


def check_differ(
    name: str, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], *, template: str | None = None
) -> None:
    """Raise DataError if different prompts all render to the same `ids`: the model would not read the data.

    `template` names its chat template in the remedy; default: the recipe's key.
    """
    contents = {repr(prompt.content) for prompt in prompts}
    if len(contents) > 1 and len(set(map(tuple, ids))) == 1:
        raise DataError(
            f"{name}: {len(contents)} different prompts all render to the same {len(ids[0])} tokens, so it would not "
            f"read what differs in them. Correct {template or key_of_template(name)} or the data."
        )


def key_of_template(name: str) -> str:
    return f"models.{name}.chat_template"


def template_lines(
    name: str,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    options: Mapping[str, Any],
    *,
    template: str | None = None,
) -> list[str]:
    """What a model reads otherwise than it is in the data, and what its chat template lacks; prompts that render.

    `template` names the chat template in remedies; default: the recipe's key.
    """
    from opd.models.render import template_for
    from opd.models.templates import content_form, generation_prompt, joined_parts, reads_clock, unfrozen_clock

    lines: list[str] = []
    key = template or key_of_template(name)
    begin = tokenizer.bos_token
    begun = [p for p in prompts if isinstance(p.content, str) and begin and p.content.startswith(begin)]
    if begun:
        lines.append(f"{name}: {len(begun)} prompts begin with {begin}, which the tokenizer does not add again")
    chats = [(p.content, *template_for(p, tokenizer, options)) for p in prompts if not isinstance(p.content, str)]
    joined = sum(joined_parts(messages, content_form(text, tokenizer)) for messages, text, _ in chats)
    written = [
        ((*p.content, *p.turns), template_for(p, tokenizer, options)[0])
        for p in prompts
        if not isinstance(p.content, str)
    ]
    lines += unwritten_keys(name, written)
    if joined:
        lines.append(
            f"{name}: {joined} conversations have messages in parts, which are joined to text: its chat template does "
            "not read parts"
        )
    for messages, text, variables in chats[:1]:
        if not generation_prompt(messages, text, tokenizer, variables):
            lines.append(
                f"{name}: its chat template has no generation prompt (`add_generation_prompt` changes nothing), so a "
                f"response begins with the header of the assistant's turn. Set {key}"
            )
        if reads_clock(messages, text, tokenizer, variables):
            lines.append(f"{name}: its chat template writes the date; a run keeps the time of its first start")
        if unfrozen_clock(text):
            lines.append(
                f"{name}: its chat template calls strftime_now with a format that is not text, so a resumed run may "
                f"render other prompts. Set {key} to one that states the format"
            )
    return lines


def unwritten_keys(name: str, chats: Iterable[tuple[Sequence[Message], str]]) -> list[str]:
    """A note for each key beside `content` that messages have and their template does not name."""
    lost: Counter[str] = Counter()
    for messages, template in chats:
        keys = {key for message in messages for key, value in message.items() if value}
        lost.update(sorted(key for key in keys - {"role", "content", "name", "tool_call_id"} if key not in template))
    return [
        f"{name}: {count} conversations have messages with `{key}`, which its chat template does not write"
        for key, count in lost.items()
    ]


def ending_lines(name: str, tokenizer: Any, endings: Endings) -> list[str]:
    """What ends a response in a chat, if it is not the end-of-sequence token; else no line."""
    if endings.turn is None or endings.turn == endings.text:
        return []
    others = [repr(tokenizer.decode([i])) for i in sorted(endings.stops - {endings.turn})]
    also = f"; {' and '.join(others)} also stop{'s' if len(others) == 1 else ''} sampling" if others else ""
    return [
        f"{name}: a response ends with {tokenizer.decode([endings.turn])!r}, as its chat template ends a turn{also}"
    ]


def check_template_options(recipe: Recipe, prepared: Mapping[str, Prepared]) -> None:
    """Refuse `template_options` of a model that reads no conversation. Raises ConfigError.

    `prepared` is by stage. Judges pass, because they read other texts than the prompts.
    """
    idle: dict[str, list[str]] = {}
    used: set[str] = set()
    for spec in recipe.stages:
        prompts = prepared[spec.name].all_prompts
        taught_by = {task: part.teacher for task, part in spec.by_task.items()}
        used |= {origin_name(recipe, name) for name in spec.judge_models}
        for name in (spec.train, *spec.scoring):
            reads = [p for p in prompts if name in (spec.train, spec.base, *teachers_in(taught_by[p.task]))]
            if is_chat(reads):
                used.add(origin_name(recipe, name))
            elif recipe.models[name].template_options:
                idle.setdefault(name, []).append(repr(spec.name))
    for name, stages in idle.items():
        if origin_name(recipe, name) not in used:
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
    absent = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    if not absent:
        return []
    from opd.models.wrapping import rows_note

    return [rows_note(name, sorted(absent, key=lambda token: absent[token]), int(rows))]
