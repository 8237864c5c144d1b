"""The environment of tools: the calls in a turn are made, and a turn without a call ends the conversation."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, get_args, get_type_hints

from opd.environments.calculator import calculator
from opd.environments.formats import name_of
from opd.environments.protocol import Begun, Call, Environment, Observation, Seed, Turn
from opd.environments.python_tool import PythonTool
from opd.errors import ConfigError, OPDError, nearest
from opd.plugins import RAISED, import_function, is_deferred
from opd.types import Prompt

# By name. A class is made anew for each conversation; its `__call__` is the tool.
TOOLS: dict[str, Callable[..., Any]] = {"calculator": calculator, "python": PythonTool}
ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")  # in the text that Python gives an object without one


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools(Environment):
    """Tools by the names that the student calls them by."""

    made: Mapping[str, Callable[..., Any]]  # functions, and classes of which each conversation has its own
    tools: tuple[Mapping[str, Any], ...]
    name: str = "tools"
    rewards: bool = False
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])  # of the classes
    error: str = "error: {why}"  # what the student reads for a call that failed

    def begin(self, prompt: Prompt, *, seed: Seed) -> Begun:
        """The tools of one conversation; those of the row's own `tools` column, if it has one, by name."""
        named = [name_of(tool) for tool in prompt.tools]
        if unknown := [name for name in named if name not in self.made]:
            raise ConfigError(
                f"prompt {prompt.id} offers the tool {unknown[0]!r}, which the environment does not have. Its tools: "
                f"{', '.join(self.made)}. Add it to `environment.tools`, or leave the column `tools` out."
            )
        own = {
            name: one(**self.options.get(name, {})) if inspect.isclass(one) else one for name, one in self.made.items()
        }
        return Begun(
            state={name: one for name, one in own.items() if not named or name in named},
            tools=prompt.tools or self.tools,
        )

    def act(self, state: Any, turn: Turn) -> Observation:
        if turn.unreadable is not None:
            return Observation(text=self._error(turn.unreadable), role="tool", counts={"tool_errors": 1})
        if not turn.calls:
            return Observation(done=True)
        answers = [self._answer(state, call) for call in turn.calls]
        errors = sum(failed for _, failed in answers)
        return Observation(texts=tuple(text for text, _ in answers), role="tool", counts={"tool_errors": errors})

    def end(self, state: Any) -> None:
        for tool in state.values():
            if callable(close := getattr(tool, "close", None)):
                close()

    def _answer(self, own: Mapping[str, Callable[..., Any]], call: Call) -> tuple[str, bool]:
        """The tool's answer as a text, and whether it is an error."""
        tool = own.get(call.name)
        if tool is None:
            return self._error(f"no tool {call.name[:80]!r}.{nearest(call.name, own)} Tools: {', '.join(own)}"), True
        try:
            found = tool(**call.arguments) if isinstance(call.arguments, Mapping) else tool(call.arguments)
            return as_text(found), False
        except RAISED as error:  # a tool may raise anything, and exit
            return self._error(f"{type(error).__name__}: {error}"), True

    def _error(self, why: str) -> str:
        return self.error.replace("{why}", why)


def as_text(value: Any) -> str:
    """What a tool returned as a text: JSON, where it is none.

    Raises TypeError for an object whose text is its address in memory, which differs from run to run.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, (set, frozenset)):  # whose order differs from run to run
        value = sorted(value, key=repr)
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = str(value)
    if ADDRESS.search(text):
        raise TypeError(f"the tool returned a {type(value).__name__}, which has no text")
    return text


def tools_of(
    names: Sequence[str], options: Mapping[str, Mapping[str, Any]], where: str, error: str = "error: {why}"
) -> Tools:
    """The environment of some tools: names of `TOOLS`, or functions and classes of yours, `my_module:function`.

    Raises ConfigError.
    """
    if not names:
        raise ConfigError(f"{where}: it names no tool. Set `environment.tools`, e.g. [calculator].")
    made: dict[str, Callable[..., Any]] = {}
    schemas: list[Mapping[str, Any]] = []
    for reference in names:
        if ":" not in reference and reference not in TOOLS:
            raise ConfigError(
                f"{where}: there is no tool {reference!r}.{nearest(reference, TOOLS)} Give one of {', '.join(TOOLS)}, "
                "or a function of yours as my_module:function."
            )
        tool = TOOLS[reference] if ":" not in reference else import_function(reference)
        schema = schema_of(tool, f"{where}: the tool {reference}")
        name = name_of(schema) if ":" in reference else reference
        if name in made:
            raise ConfigError(f"{where}: two tools have the name {name!r}. Rename one of the functions.")
        made[name] = tool
        schemas.append({"type": "function", "function": {**schema["function"], "name": name}})
    if unknown := sorted(set(options) - set(made)):
        raise ConfigError(
            f"{where}: `environment.options` are by tool, and there is no tool {unknown[0]!r}."
            f"{nearest(unknown[0], made)} Tools: {', '.join(made)}."
        )
    _check_options(made, options, where)
    return Tools(made=made, tools=tuple(schemas), options=options, error=error)


def _check_options(
    made: Mapping[str, Callable[..., Any]], options: Mapping[str, Mapping[str, Any]], where: str
) -> None:
    """Make each class once, so that wrong options are found before training. Raises ConfigError."""
    for name, tool in made.items():
        given = options.get(name, {})
        if not inspect.isclass(tool):
            if given:
                raise ConfigError(f"{where}: the tool {name!r} is a function, which has no options. Leave them out.")
            continue
        try:
            tool(**given)
        except OPDError:
            raise
        except RAISED as error:
            raise ConfigError(
                f"{where}: the tool {name!r} cannot be made with the options {dict(given)}: {type(error).__name__}: "
                f"{error}. Correct `environment.options`."
            ) from error


def schema_of(tool: Callable[..., Any], what: str) -> dict[str, Any]:
    """The JSON schema of a typed function with a docstring, as transformers makes it. Raises ConfigError."""
    from transformers.utils.chat_template_utils import get_json_schema

    function = tool.__call__ if inspect.isclass(tool) else tool
    try:
        schema = get_json_schema(function)
    except Exception as error:  # of a docstring or a type that it cannot read, transformers raises any type
        raise ConfigError(
            f"{what} has no JSON schema: {' '.join(str(error).split()).rstrip('.')}. A tool has typed parameters, and "
            "a docstring with a line for each below `Args:`."
        ) from error
    _check_called_by_name(function, what)
    return {**schema, "function": {**schema["function"], "name": tool.__name__}}


def _check_called_by_name(function: Callable[..., Any], what: str) -> None:
    """Refuse a function that no call of JSON arguments by name can be made of. Raises ConfigError."""
    if is_deferred(function):
        raise ConfigError(
            f"{what} is a coroutine or a generator, and a call of it gives no answer. Give a plain function: it may "
            "call asyncio.run, and with `environment.workers` several calls run at once."
        )
    forms = {"VAR_POSITIONAL": "*{}", "VAR_KEYWORD": "**{}", "POSITIONAL_ONLY": "{}, /"}
    for name, one in inspect.signature(function).parameters.items():
        if one.kind.name in forms and name != "self":
            raise ConfigError(
                f"{what} has the parameter `{forms[one.kind.name].format(name)}`, and a call gives each argument by "
                "its name. Name its parameters: a list takes several values."
            )
    for name, hint in get_type_hints(function).items():
        if name != "return" and (made := _enum_in(hint)) is not None:
            raise ConfigError(
                f"{what}: `{name}` is the enum {made.__name__}, of which a call gives the value, a text. Give "
                "`typing.Literal` of the values."
            )


def _enum_in(hint: Any) -> type[Enum] | None:
    """An enum in a type hint whose members are no texts or numbers themselves."""
    if inspect.isclass(hint) and issubclass(hint, Enum) and not issubclass(hint, (str, int)):
        return hint
    return next((found for one in get_args(hint) if (found := _enum_in(one)) is not None), None)


def unfit_for_text(environment: Environment) -> str | None:
    """Which of the environment's tools cannot be called with one text, as in a prompt without a template, and why."""
    for name, tool in environment.made.items() if isinstance(environment, Tools) else ():
        given = (None, "") if inspect.isclass(tool) else ("",)  # of a class `__call__`, whose first is `self`
        try:
            inspect.signature(tool.__call__ if inspect.isclass(tool) else tool).bind(*given)
        except TypeError as error:
            return f"the tool {name!r} takes no such call ({error})"
    return None
