"""The calls of tools in a turn's text, by the format that a family of models writes.

    hermes       <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>      Hermes, Qwen 2.5 and 3
    qwen3_coder  <tool_call><function=f><parameter=x>1</parameter></function></tool_call>    Qwen 3 Coder, Qwen 3.5
    llama3       {"name": "f", "parameters": {"x": 1}}, several separated by ;    Llama 3.1 to 3.3, also behind
                 <|python_tag|>, where another text is code for the tool `python`
    mistral      [TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}]               Mistral; since Ministral 2410
                 [TOOL_CALLS]f[ARGS]{"x": 1}
    harmony      <|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}<|call|>       gpt-oss
    text         [1+2], or [f: 1+2] with several tools                            a prompt without a chat template

A tokenizer with a `response_template` (transformers 5) says itself how its model's text is read, and then does it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from opd.environments.protocol import Call
from opd.errors import ConfigError

Tools: TypeAlias = Sequence[Mapping[str, Any]]  # their JSON schemas

FORMATS = ("hermes", "qwen3_coder", "llama3", "mistral", "harmony", "text")
THINKING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))  # what stands inside is no answer, and no call


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """A turn's text in its parts. `unreadable`: why a call in it cannot be read."""

    content: str  # the text besides the calls
    calls: tuple[Call, ...] = ()
    unreadable: str | None = None


def format_of(tokenizer: Any, *, chat: bool, where: str) -> str:
    """The format that a model writes calls in, from its chat template. Raises ConfigError if that names none."""
    if not chat:
        return "text"
    if getattr(tokenizer, "response_template", None) is not None:
        return "library"
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    signs = {
        "hermes": "<tool_call>",
        "mistral": "[TOOL_CALLS]",
        "harmony": "<|channel|>",
        "llama3": "<|python_tag|>",
    }
    found = [name for name, sign in signs.items() if sign in template]
    if found[:1] == ["hermes"] and "<function=" in template and "<parameter=" in template:
        found = ["qwen3_coder"]
    if not found and '"parameters"' in template and "ipython" in template:
        found = ["llama3"]
    if found:
        return found[0]
    raise ConfigError(
        f"{where}: the chat template writes no tool call in a format that opd knows ({', '.join(FORMATS[:-1])}), so no "
        "call could be read. Set `environment.format` to the one that the model writes, or use a model that was "
        "trained to call tools."
    )


def parsed(text: str, how: str, tokenizer: Any, tools: Sequence[Mapping[str, Any]]) -> Parsed:
    """The calls in a turn's text, which has its special tokens, without the token that ended it."""
    if how == "library":
        return _by_library(text, tokenizer, tools)
    thought, spoken = ("", text) if how in ("harmony", "text") else _thought(text)
    found = PARSERS[how](spoken, tools)
    return replace(found, content=thought + found.content)


def _thought(text: str) -> tuple[str, str]:
    """(a turn's thinking with its marks, what it says), which is empty where the thinking does not end."""
    for begin, end in THINKING:
        thought, ended, spoken = text.partition(end)
        if ended:
            return thought + ended, spoken
        if text.lstrip().startswith(begin):
            return text, ""
    return "", text


def name_of(tool: Mapping[str, Any]) -> str:
    """The name in a tool's JSON schema."""
    return str(tool.get("function", tool).get("name"))


def _hermes(text: str, _: Tools) -> Parsed:
    parts = re.split(r"<tool_call>", text)
    content, calls = parts[0], list[Call]()
    for part in parts[1:]:
        body, closed, rest = part.partition("</tool_call>")
        if not closed and body.strip().count("{") != body.strip().count("}"):
            return Parsed(content=text, unreadable="<tool_call> is not closed")
        try:
            calls.append(_call(_json(body), "arguments"))
        except ValueError as error:
            return Parsed(content=text, unreadable=str(error))
        content += rest
    return Parsed(content=content if calls else text, calls=tuple(calls))


_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>|$)\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|$)", re.DOTALL)


def _qwen3_coder(text: str, tools: Tools) -> Parsed:
    content, *parts = text.split("<tool_call>")
    calls: list[Call] = []
    for part in parts:
        body, _, rest = part.partition("</tool_call>")
        found = _FUNCTION.fullmatch(body)
        if found is None:
            return Parsed(content=text, unreadable="a call is <function=NAME> with its parameters")
        kinds = _kinds(tools, found[1].strip())
        given = {name.strip(): _value(value, kinds.get(name.strip())) for name, value in _PARAMETER.findall(found[2])}
        calls.append(Call(name=found[1].strip(), arguments=given))
        content += rest
    return Parsed(content=content, calls=tuple(calls))


def _kinds(tools: Tools, name: str) -> dict[str, Any]:
    """The types of a tool's parameters in its JSON schema."""
    schema = next((tool.get("function", tool) for tool in tools if name_of(tool) == name), {})
    properties = (schema.get("parameters") or {}).get("properties") or {}
    return {key: one.get("type") for key, one in properties.items()}


def _value(text: str, kind: Any) -> Any:
    """A parameter's text as the type that its schema has: a text stays one, and others are JSON if they can be read."""
    if kind in ("string", None):
        return text
    known = {"True": True, "False": False, "None": None}
    try:
        return known[text] if text in known else _json(text)
    except ValueError:
        return text


def _llama3(text: str, _: Tools) -> Parsed:
    before, tag, after = text.partition("<|python_tag|>")
    body = (after if tag else text).strip()
    if not tag and not (body.startswith("{") and '"name"' in body):
        return Parsed(content=text)
    if tag and not body.startswith("{"):
        return Parsed(content=before, calls=(Call(name="python", arguments={"code": body}),))
    calls, place, decoder = list[Call](), 0, json.JSONDecoder()
    while place < len(body):
        try:
            value, place = decoder.raw_decode(body, place)
            calls.append(_call(value, "parameters", "arguments"))
        except (ValueError, RecursionError) as error:
            return Parsed(content=text, unreadable=_why(error))
        behind = body[place:].lstrip()
        if behind and not behind.startswith(";"):
            return Parsed(content=text, unreadable=f"behind the call stands {behind[:40]!r}")
        rest = behind[1:].lstrip()
        place = len(body) - len(rest)
    return Parsed(content=before if tag else "", calls=tuple(calls))


def _mistral(text: str, _: Tools) -> Parsed:
    content, tag, body = text.partition("[TOOL_CALLS]")
    if not tag:
        return Parsed(content=text)
    try:
        if "[ARGS]" in body:
            calls = [
                Call(
                    name=re.sub(r"\[CALL_ID\].*", "", name, flags=re.DOTALL).strip(), arguments=_arguments(_json(given))
                )
                for one in body.split("[TOOL_CALLS]")
                for name, _, given in [one.partition("[ARGS]")]
            ]
        else:
            found = _json(body)
            calls = [_call(one, "arguments") for one in (found if isinstance(found, list) else [found])]
    except ValueError as error:
        return Parsed(content=text, unreadable=str(error))
    if not calls:
        return Parsed(content=text, unreadable="[TOOL_CALLS] is followed by no call")
    return Parsed(content=content, calls=tuple(calls))


# A message: its header, in which a call names its tool, and its body.
_HARMONY = re.compile(
    r"((?:(?!<\|message\|>|<\|start\|>|<\|end\|>|<\|call\|>).)*)<\|message\|>(.*?)"
    r"(?:<\|call\|>|<\|end\|>|<\|return\|>|(?=<\|start\|>)|$)",
    re.DOTALL,
)
_TO = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")


def _harmony(text: str, _: Tools) -> Parsed:
    calls: list[Call] = []
    said: list[str] = []
    for header, body in _HARMONY.findall(text):
        to = _TO.search(header)
        if to and to[1] != "assistant":  # to which a tool answers
            try:
                calls.append(Call(name=to[1], arguments=_arguments(_json(body))))
            except ValueError as error:
                return Parsed(content=text, unreadable=str(error))
        elif "<|channel|>final" in header:
            said.append(body)
    return Parsed(content=said[-1] if said else "" if calls else text, calls=tuple(calls))


def _text(text: str, tools: Tools) -> Parsed:
    found = re.search(r"\[([^\[\]]*)\]\s*$", text)
    if found is None:
        return Parsed(content=text)
    name, colon, argument = found[1].partition(":")
    names = [name_of(tool) for tool in tools]
    if not colon:
        name, argument = (names[0] if len(names) == 1 else ""), found[1]
    if not name:
        return Parsed(content=text, unreadable=f"a call names its tool: [{'|'.join(names)}: argument]")
    return Parsed(content=text[: found.start()], calls=(Call(name=name.strip(), arguments=argument.strip()),))


PARSERS: dict[str, Callable[[str, Tools], Parsed]] = {
    "hermes": _hermes,
    "qwen3_coder": _qwen3_coder,
    "llama3": _llama3,
    "mistral": _mistral,
    "harmony": _harmony,
    "text": _text,
}


def _by_library(text: str, tokenizer: Any, tools: Sequence[Mapping[str, Any]]) -> Parsed:
    try:
        message = tokenizer.parse_response(text, prefix="", tools=[dict(tool) for tool in tools] or None)
        calls = [_call(one.get("function", one), "arguments") for one in message.get("tool_calls") or ()]
        return Parsed(content=str(message.get("content") or ""), calls=tuple(calls))
    except Exception as error:  # of a malformed text, transformers raises any type
        return Parsed(content=text, unreadable=_why(error))


def _json(text: str) -> Any:
    try:
        return json.loads(text.strip())
    except (ValueError, RecursionError) as error:
        raise ValueError(_why(error)) from error


def _call(value: Any, *keys: str) -> Call:
    """The call of a JSON object with `name` and one of `keys`. Raises ValueError."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError('a call is an object with "name" and ' + " or ".join(f'"{key}"' for key in keys))
    given = next((value[key] for key in keys if key in value), {})
    return Call(name=value["name"], arguments=_arguments(given))


def _arguments(given: Any) -> dict[str, Any]:
    """Arguments by name, also from a text of JSON. Raises ValueError."""
    found = _json(given) if isinstance(given, str) else given
    if found is None:  # of a tool without parameters
        return {}
    if not isinstance(found, Mapping):
        raise ValueError(f"the arguments of a call are an object, got {type(found).__name__}")
    return {str(key): value for key, value in found.items()}


def _why(error: Exception) -> str:
    return f"the call is no JSON: {' '.join(str(error).split()) or type(error).__name__:.200}"
