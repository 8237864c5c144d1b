"""One row becomes a `Prompt`. What it converts or leaves out on the way, it says, so that `opd check` can count it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opd.data.files import ArrowRow
from opd.data.images import folder_of, image_column, images_in, placed, taken
from opd.errors import DataError, nearest
from opd.files import is_unicode
from opd.messages import conversation, text_of, text_or_none
from opd.recipe.schema import DataSection
from opd.types import Message, Prompt

TEXTS = ("response", "privileged_context", "teacher_id")


FOR_TEMPLATE = ("tools", "chat_template_kwargs")


# opd's columns. `system` is read only if `columns` maps it; the others also under their own name, `images` also as
# `image`.
COLUMNS = ("prompt", "answer", *TEXTS, *FOR_TEMPLATE, "images", "privileged_images", "system")
MAPPED = ("system", "images")


PROMPT_LIKE = ("question", "problem", "instruction", "query", "input", "text", "messages", "conversations")


SYSTEM_LIKE = ("system", "system_prompt")


ASKS_ABOUT = ("question", "instruction")  # columns whose text may be about that of a column `context`


CONTEXT = "have a column `context` that is not in the prompt: a function `package.module:function` can put it there"


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A conversion of the rows of `source`: `count` of `rows` rows do or have `what`."""

    source: str
    count: int
    rows: int
    what: str

    def __str__(self) -> str:
        return f"{self.source}: {self.count} of {self.rows} rows {self.what}"


def prompt_of(index: int, where: str, row: Mapping[str, Any], section: DataSection) -> tuple[Prompt, list[str]]:
    """(the prompt of a row, what was converted or left out). Raises DataError, beginning with `where`."""
    source = source_of(row, section)
    if source["prompt"] not in row:
        guess = next((name for name in PROMPT_LIKE if name in row), "THE_COLUMN")
        raise DataError(
            f"{where} has no column {source['prompt']!r}.{nearest(source['prompt'], map(str, row))} Its columns: "
            f"{', '.join(map(str, row))}. Name the one that holds the prompt: `columns: {{prompt: {guess}}}`."
        )
    value, said = _question(row, source)
    system = text_or_none(row.get(source["system"]), f"{where}: `{source['system']}`") if "system" in source else None
    content = conversation(
        value,
        f"{where}: `{source['prompt']}`",
        chat=section.chat or "system" in source,
        system=system or section.system,
    )
    turns = turns_of(row, source["response"], content, where) if section.assistant_turns != "last" else ()
    texts = {
        name: None
        if name == "response" and turns
        else text_or_none(row.get(source[name]), f"{where}: `{source[name]}`")
        for name in TEXTS
    }
    unread = [name for name in SYSTEM_LIKE if name not in source.values() and _is_text(row.get(name))]
    said += [f"have a column `{n}` that is not in the prompt: `columns: {{system: {n}}}` puts it there" for n in unread]
    if source["prompt"] in ASKS_ABOUT and "context" not in source.values() and _is_text(row.get("context")):
        said.append(CONTEXT)
    idle = [source[name] for name in FOR_TEMPLATE if isinstance(content, str) and row.get(source[name])]
    said += [f"have `{one}`, which only a chat template shows, and a prompt of text: set `chat: true`" for one in idle]
    for_template, dropped = ({}, False) if isinstance(content, str) else _for_template(row, source, where)
    said += [NULLS] if dropped else []
    said += [] if turns else _left_of_completion(row.get(source["response"]))
    pictured = source.get("images", image_column(row))
    kept = {column for column in source.values() if column not in idle} | ({pictured} if pictured else set())
    folder = folder_of(section.path)
    prompt = Prompt(
        id=index,
        content=content,
        answer=row.get(source["answer"]),
        response=texts["response"],
        turns=turns,
        privileged_context=texts["privileged_context"],
        teacher_id=texts["teacher_id"],
        metadata={str(key): one for key, one in row.items() if key not in kept},
        images=images_in(row.get(pictured), f"{where}: `{pictured}`", folder) if pictured else (),
        privileged_images=images_in(
            row.get(source["privileged_images"]), f"{where}: `{source['privileged_images']}`", folder
        ),
        **for_template,
    )
    prompt, of_images = with_places(prompt, where, folder)
    said += of_images
    prompt, of_answer = without_answer(prompt, where, section)
    return prompt, list(dict.fromkeys([*said, *of_answer]))


def check_unicode(prompt: Prompt, where: str) -> None:
    """Raise DataError, beginning with `where`, for half of a surrogate pair in a text of the prompt.

    JSON may hold one, such as the first half of a cut emoji. Tokenizers and UTF-8 files do not.
    """
    texts = (prompt.content, prompt.turns, prompt.answer, prompt.response, prompt.privileged_context, prompt.prefill)
    bad = next((text for value in (*texts, *prompt.tools) for text in _texts_of(value) if not is_unicode(text)), None)
    if bad is not None:
        raise DataError(
            f"{where}: the text {bad!r:.80} holds half of a surrogate pair, most often of a cut emoji, and no "
            "tokenizer reads it. Correct the text, or leave the row out."
        )


def _texts_of(value: Any) -> Iterator[str]:
    """All texts in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for one in value.values() for text in _texts_of(one))
    elif isinstance(value, (list, tuple)):
        yield from (text for one in value for text in _texts_of(one))


def _for_template(row: Mapping[str, Any], source: Mapping[str, str], where: str) -> tuple[dict[str, Any], bool]:
    """(the fields of a Prompt that its chat template reads, whether nulls of Arrow were taken away)."""
    found: dict[str, Any] = {}
    dropped = False
    for name, checked in (("tools", _tools), ("chat_template_kwargs", _variables)):
        if given := row.get(source[name]):
            value, lost = _parsed(given, f"{where}: `{source[name]}`", arrow=isinstance(row, ArrowRow))
            found[name], dropped = checked(value, f"{where}: `{source[name]}`"), dropped or lost
    return found, dropped


def source_of(row: Mapping[str, Any], section: DataSection) -> dict[str, str]:
    """opd's column -> the row's; without `system` and `images`, unless they are mapped."""
    source = {
        name: section.columns.get(name, name) for name in COLUMNS if name not in MAPPED or name in section.columns
    }
    if "response" not in section.columns and "response" not in row:
        source["response"] = "completion"
    return source


def without_answer(prompt: Prompt, where: str, section: DataSection) -> tuple[Prompt, list[str]]:
    """The prompt without the assistant's turn at its end, which goes where `last_assistant` says; or without all turns.

    Raises DataError for a conversation of this turn alone, for a second response, and as `with_turns`.
    """
    if section.assistant_turns != "last" or prompt.turns:
        prompt, said = with_turns(prompt, where, split=section.assistant_turns != "last")
        if prompt.turns and section.assistant_turns == "each" and isinstance(prompt.content, str):
            raise DataError(
                f"{where}: the response has {len(prompt.turns)} turns, and the prompt is a text, in which no token "
                "ends a turn. Set `assistant_turns: all`, or give the turns as messages and set `chat: true`."
            )
        return prompt, [one.format(way=section.assistant_turns) for one in said]
    if isinstance(prompt.content, str) or not prompt.content or prompt.content[-1]["role"] != "assistant":
        return prompt, []
    *rest, last = prompt.content
    if not rest:
        raise DataError(
            f"{where}: the conversation is one message of the assistant, so there is no prompt. Leave the row out."
        )
    prompt, text, ends = replace(prompt, content=tuple(rest)), text_of(last["content"]), "end with the assistant's turn"
    if section.last_assistant == "drop":
        return prompt, [f"{ends}, which is left out"]
    if last.get("tool_calls") or not text:
        what = "calls a tool" if last.get("tool_calls") else "is empty" if text == "" else "has parts that are not text"
        return prompt, [f"{ends}, which {what}, so it is left out"]
    also = [f"lose `{key}` of that turn" for key in last if key not in ("role", "content", "name")]
    if section.last_assistant == "continue":
        begun = replace(prompt, prefill=prompt.prefill + text)
        return begun, [f"{ends}, which is the beginning of the answer: the model continues it", *also]
    if prompt.response not in (None, "", text):
        raise DataError(
            f"{where}: the conversation ends with the assistant's turn {text!r:.40}, and the row has the response "
            f"{prompt.response!r:.40}. Set `last_assistant: continue` if the turn is the beginning of the answer, or "
            "`last_assistant: drop` to leave it out."
        )
    became = "which is their `response` and not in the prompt (`last_assistant: continue` makes it the beginning"
    return replace(prompt, response=text), [f"{ends}, {became} of the answer)", *also]


def turns_of(
    row: Mapping[str, Any], column: str, content: str | tuple[Message, ...], where: str
) -> tuple[Message, ...]:
    """A response of several turns: messages, or texts of which every second is the assistant's, from the first on.

    Empty for a response that is a text. Raises DataError, beginning with `where`.
    """
    value: Any = row.get(column)
    if not isinstance(value, (list, tuple)) or not value:
        return ()
    if not all(isinstance(one, str) for one in value):
        found = conversation(without_nulls_of(value, row), f"{where}: `{column}`")
        assert not isinstance(found, str)
        return found
    if not isinstance(content, str):
        raise DataError(
            f"{where}: `{column}` is a list of texts, and the prompt is a conversation. Give a list of messages."
        )
    return tuple({"role": ("assistant", "user")[i % 2], "content": text} for i, text in enumerate(value))


def with_turns(prompt: Prompt, where: str, *, split: bool = True) -> tuple[Prompt, list[str]]:
    """The prompt with the turns of its response, checked. What others say behind the assistant's last turn is left out.

    `split`: the prompt ends before the assistant's first turn, and all from there on are put before its `turns`. One
    turn of text alone is a `response` without turns. Raises DataError for a conversation without a prompt, for turns
    that do not begin with the assistant's, for one that says nothing, and for an image in them.
    """
    content, turns = prompt.content, prompt.turns
    if split and not isinstance(content, str):
        roles = [message["role"] for message in content]
        first = roles.index("assistant") if "assistant" in roles else len(roles)
        if first < len(roles) and prompt.response and not turns:
            raise DataError(
                f"{where}: the conversation has turns of the assistant, and the row has the response "
                f"{prompt.response!r:.40} too. Put it at the end of the conversation, or set `assistant_turns: last`."
            )
        content, turns = content[:first], (*content[first:], *turns)
        if not content:
            raise DataError(
                f"{where}: the conversation begins with the assistant, so there is no prompt. Leave the row out."
            )
    if not turns:
        return prompt, []
    if turns[0]["role"] != "assistant":
        raise DataError(
            f"{where}: the turns of the response have the roles {', '.join(turn['role'] for turn in turns)}. They "
            "begin with the assistant's: put what stands before it into the prompt."
        )
    if prompt.prefill:
        raise DataError(
            f"{where}: the response has turns, and the row has the beginning of an answer too, {prompt.prefill!r:.40}. "
            "Leave one of them out."
        )
    own = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    said = ["are conversations of which all turns of the assistant are responses (`assistant_turns: {way}`)"]
    said += ["lose what follows the assistant's last turn"] if own[-1] < len(turns) - 1 else []
    turns = tuple(_turn(turn, i, where, text=isinstance(content, str)) for i, turn in enumerate(turns[: own[-1] + 1]))
    plain = len(turns) == 1 and isinstance(turns[0]["content"], str) and not _beside_text(turns[0])
    last = text_of(turns[-1]["content"]) or ""
    return replace(prompt, content=content, response=last, turns=() if plain else turns), said


def each_turn(prompt: Prompt) -> list[Prompt]:
    """A prompt for each turn of the assistant, with what stands before the turn; the turn is its response.

    `metadata` has the row (the prompt's id) and the turn, from 0, under those names where the data have no such column.
    A prompt without turns stays as it is.
    """
    own = [i for i, turn in enumerate(prompt.turns) if turn["role"] == "assistant"]
    if not own or isinstance(prompt.content, str):
        return [prompt]
    return [
        replace(
            prompt,
            content=(*prompt.content, *prompt.turns[:i]),
            turns=(prompt.turns[i],) if _beside_text(prompt.turns[i]) else (),
            response=text_of(prompt.turns[i]["content"]) or "",
            metadata={"row": prompt.id, "turn": number, **prompt.metadata},
        )
        for number, i in enumerate(own)
    ]


def _turn(turn: Message, i: int, where: str, *, text: bool) -> Message:
    """A turn of a response, checked; to a prompt that is a `text`, with its parts as one text. Raises DataError."""
    words, about = text_of(turn["content"]), f"{where}: turn {i} of the response ({turn['role']})"
    if not isinstance(turn["content"], str) and any(part.get("type") == "image" for part in turn["content"] or ()):
        raise DataError(
            f"{about} holds an image, and images are read in the prompt alone. Set `assistant_turns: last`, or leave "
            "the row out."
        )
    if text and (words is None or turn.get("tool_calls")):
        raise DataError(
            f"{about} calls a tool or has no text, and the prompt is a text, which no chat template writes. Set "
            "`chat: true`, or write the call into the text."
        )
    if turn["role"] == "assistant" and not _beside_text(turn) and not (words if text else (words or "").strip()):
        raise DataError(
            f"{about} says nothing, and would teach the student to end at once. Leave the turn out, or the row."
        )
    return {**turn, "content": words} if text else turn


def _beside_text(turn: Message) -> list[str]:
    """What a turn has beside its text, such as calls or reasoning."""
    return [key for key, value in turn.items() if value and key not in ("role", "content", "name")]


NULLS = (
    "lose nulls in tool calls or tools: Arrow gives each object the keys of all. Write a null of your own into "
    "arguments that are JSON text"
)


def _question(row: Mapping[str, Any], source: Mapping[str, str]) -> tuple[Any, list[str]]:
    """(the value of the prompt's column, what was done to it): Alpaca's input added, nulls of Arrow taken away."""
    value, more = row[source["prompt"]], row.get("input")
    if isinstance(value, str):
        if source["prompt"] != "instruction" or "input" in source.values() or not _is_text(more):
            return value, []
        return f"{value}\n\n{more}", ["have an `input`, which follows the `instruction` after an empty line"]
    if not isinstance(value, Sequence):
        return value, []
    messages: list[Any] = list(value)
    said = (
        [SHAREGPT] if any(isinstance(one, Mapping) and "from" in one and "role" not in one for one in messages) else []
    )
    bare = without_nulls_of(messages, row)
    return bare, [*said, *([NULLS] if bare != messages else [])]


def without_nulls_of(messages: Sequence[Any], row: Mapping[str, Any]) -> list[Any]:
    """The messages without the nulls that Arrow gives their tool calls, if the row is Arrow's."""
    return [
        {**one, "tool_calls": without_nulls(one["tool_calls"])}
        if isinstance(row, ArrowRow) and isinstance(one, Mapping) and one.get("tool_calls")
        else one
        for one in messages
    ]


SHAREGPT = "have ShareGPT's messages, whose `from` and `value` are read as `role` and `content`"


def without_nulls(value: Any) -> Any:
    """The value without the keys of its objects, at any depth, that hold None."""
    if isinstance(value, Mapping):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, (list, tuple)) else value


def _parsed(value: Any, where: str, *, arrow: bool) -> tuple[Any, bool]:
    """(a value given as JSON text or as objects, whether nulls of Arrow were taken away)."""
    if isinstance(value, str):
        try:
            return json.loads(value), False
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where} is not valid JSON: {error}, got {value!r:.80}. The chat template reads this column: give "
                "JSON, or rename the column if it holds something else."
            ) from error
    bare = without_nulls(value) if arrow else value
    return bare, bare != value


def _tools(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """Tools as JSON schemas; each may be JSON text. Raises DataError."""
    tools = [_parsed(one, where, arrow=False)[0] for one in value] if isinstance(value, (list, tuple)) else [value]
    for tool in tools:
        if not isinstance(tool, Mapping) or not {"name", "function"} & {*tool}:
            raise DataError(
                f"{where} holds {tool!r:.80}. Tools are a list of JSON schemas, each with a `function` or a `name`; "
                "`transformers.utils.get_json_schema` makes one of a Python function."
            )
    return tuple(tools)


def _variables(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where} is a {type(value).__name__}, got {value!r:.80}. Give an object of the template's names."
        )
    return {str(key): one for key, one in value.items()}


def with_places(prompt: Prompt, where: str, folder: Path) -> tuple[Prompt, list[str]]:
    """The prompt with its images and a place for each: `images.taken` and `images.placed`. Raises DataError."""
    return placed(taken(prompt, where, folder), where)


def _left_of_completion(completion: Any) -> list[str]:
    """The keys of TRL's completion message that a response, a text, does not have."""
    if not isinstance(completion, (list, tuple)):
        return []
    keys = [key for one in completion for key, value in one.items() if value is not None]
    return [f"lose `{key}` of the completion's message" for key in keys if key not in ("role", "content", "name")]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
