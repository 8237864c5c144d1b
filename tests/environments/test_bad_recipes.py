"""Recipes with environments that cannot work: each is refused before weights are loaded, with what, why and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import talking
from support.runs import command, one_stage, prepare

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLS_CHAT = "{% if tools %}{% endif %}{{ '' if true else '<tool_call>' }}" + CHAT
NO_TOOL_ROLE = TOOLS_CHAT.replace(
    "{% for m in messages %}", "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no') }}{% endif %}"
)
CALLS = (
    "{% if tools %}{% endif %}{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}WRITTEN"
    "{% else %}{{ m.content }}{% endif %}<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = "{% set f = m.tool_calls[0].function %}"
# GLM 4.5 has <tool_call> too, and writes no JSON in it.
GLM = CALLS.replace("WRITTEN", CALL + "<tool_call>{{ f.name }}<arg_key>value</arg_key></tool_call>")
# Llama 3.1 and Mistral write calls alone.
BARE = CALLS.replace(
    "WRITTEN",
    CALL + '<tool_call>{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}</tool_call>',
)
THINKS = BARE.replace("{% if m.tool_calls %}", "{% if m.tool_calls %}{{ '' if '<think>' in m.content else m.content }}")
# The generation prompt of Qwen 3.5 begins the thinking.
BEGUN = BARE.replace("{% if m.tool_calls %}", "{% if m.tool_calls %}<think>\n{{ m.content }}").replace(
    "<assistant>", "<assistant><think>\n"
)
DROPS = CHAT.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
TALKER = {"name": "talking:talker"}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(Path(talking.__file__).parent))
    monkeypatch.chdir(tmp_path)


def checked(stage: dict[str, Any], template: str | None = None) -> Any:
    made = one_stage(**{"environment": {"tools": ["calculator"]}, **stage})
    if template is not None:
        for model in made["models"].values():
            model["chat_template"] = template
            model["tokenizer"] = {"characters": "".join(map(chr, range(32, 127))) + "\n"}
        made["stages"][0]["data"] = {"path": "train.jsonl", "chat": True}
    prepare(Path(), made)
    return command("check", "recipe.yaml")


BAD: list[Any] = [
    # keys
    ({"environment": {}}, None, "it names no tool: set `tools`, e.g. [calculator]"),
    ({"environment": {"tools": ["calculater"]}}, None, "no tool 'calculater'. Did you mean 'calculator'?"),
    ({"environment": {"tools": ["calculator", "calculator"]}}, None, "two tools have the name 'calculator'"),
    ({"environment": {"tools": ["calculator"], "max_turns": 0}}, None, "greater than or equal to 1"),
    ({"environment": {"tools": ["calculator"], "timeout_s": 0}}, None, "greater than 0"),
    ({"environment": {"tools": ["calculator"], "max_turn": 3}}, None, "max_turns"),
    ({"environment": {"tools": ["calculator"], "format": "qwen"}}, None, "hermes"),
    ({"environment": {**TALKER, "tools": ["calculator"]}}, None, "does not read it: leave it out"),
    ({"environment": {"tools": ["calculator"], "options": {"python": {}}}}, None, "there is no tool 'python'"),
    ({"environment": {"tools": ["calculator"], "options": {"calculator": {"x": 1}}}}, None, "which has no options"),
    ({"environment": {"tools": ["python"], "options": {"python": {"timeout_s": -1}}}}, None, "`timeout_s` above 0"),
    ({"environment": {"tools": ["python"], "options": {"python": {"time": 1}}}}, None, "cannot be made with"),
    ({"environment": {"tools": ["bad_tools:raise"]}}, None, "Did you mean 'raises'?"),
    ({"environment": {"tools": ["bad_toolz:raises"]}}, None, "importing 'bad_toolz' failed"),
    ({"environment": {"tools": ["bad_tools:no_docstring"]}}, None, "has no JSON schema"),
    ({"environment": {"tools": ["bad_tools:no_types"]}}, None, "has no JSON schema"),
    ({"environment": {"name": "tool"}}, None, "no environment 'tool'. Did you mean 'tools'?"),
    ({"environment": {"name": "bad_tools:no_environment"}}, None, "returned a object, not an Environment: it lacks"),
    ({"environment": {"name": "bad_tools:cannot_be_made"}}, None, "raised RuntimeError: size 1"),
    ({"environment": {"name": "bad_tools:cannot_be_made", "options": {"sise": 1}}}, None, "Did you mean 'size'?"),
    ({"environment": {"name": "bad_tools:cannot_begin"}}, None, "cannot begin prompt 0: ValueError: no such game"),
    ({"environment": {"name": "bad_tools:begins_with_state"}}, None, "`begin` returned a dict, not a Begun"),
    ({"environment": {"name": "bad_tools:deferred"}}, None, "`act` of Deferred is a coroutine or a generator"),
    (
        {"environment": {"tools": ["calculator"], "error": "{reason}"}},
        None,
        "`error` holds {reason}, and only {why}",
    ),
    ({"environment": {"tools": ["bad_tools:adds"]}}, None, "the tool 'adds' takes no such call (missing a required"),
    ({"environment": {"tools": ["bad_tools:Adds"]}}, None, "the tool 'Adds' takes no such call (missing a required"),
    ({"environment": {"tools": ["bad_tools:now"]}}, None, "the tool 'now' takes no such call (too many positional"),
    # tools of which no call can be made
    ({"environment": {"tools": ["bad_tools:waits"]}}, None, "the tool bad_tools:waits is a coroutine"),
    # methods and stages
    ({"method": "sft", "teacher": None, "evaluate": None}, None, "the environment takes part in the evaluation alone"),
    ({"method": "forward_kl"}, None, "others write responses too"),
    ({"method": "simct"}, None, "the teacher has its own tokenizer"),
    ({"method": "prune_opd", "options": {"budget": 2, "budget_max": 3}}, None, "budget"),
    ({"ahead": 1}, None, "`ahead: 1`"),
    ({"method": "grpo", "teacher": None, "sampling": {"n": 2}}, None, "needs a reward"),
    # templates
    ({}, CHAT, "does not mention the option 'tools'"),
    ({}, CHAT + "{% if tools %}{% endif %}", "writes no tool call in a format that opd knows"),
    ({}, GLM, "writes a call as '<tool_call>calculator<arg_key>value</arg_key></tool_call>', which is not the format"),
    ({}, THINKS, "the thinking of an earlier turn (<think>) otherwise"),
    ({}, NO_TOOL_ROLE, "writes no turn behind a message of role 'tool'"),
    ({"environment": TALKER}, DROPS, "the thinking of an earlier turn (<think>) otherwise"),
]


@pytest.mark.parametrize(("stage", "template", "message"), BAD, ids=[f"{i:02d}" for i in range(len(BAD))])
def test_check_refuses_with_a_message(stage: dict[str, Any], template: str | None, message: str):
    ended = checked(stage, template)
    assert ended.code != 0
    assert message in " ".join((ended.out + ended.err).split())
    assert "Traceback" not in ended.err


GOOD: list[Any] = [
    ({}, None, "each response is a conversation with tools with the tools calculator: up to 8 turns, 3 tokens in all"),
    ({}, None, 'sampling.stop has no "]", so a call [...] ends a turn only with the end-of-sequence token'),
    ({}, TOOLS_CHAT, "tool calls are read in the format 'hermes'"),
    ({}, BARE, "tool calls are read in the format 'hermes'"),
    ({}, BARE, "the chat template drops what is said beside a call from an earlier turn"),
    ({}, BEGUN, "tool calls are read in the format 'hermes'"),
    ({"environment": {"tools": ["calculator"], "format": "hermes"}}, GLM, "which is not the format 'hermes'"),
    ({"environment": TALKER}, CHAT, "each response is a conversation with talker: up to 8 turns"),
    ({"environment": {**TALKER, "rewritten": "keep"}}, DROPS, "rewrites earlier turns of a conversation; their tokens"),
    (
        {"environment": TALKER, "method": "grpo", "teacher": None, "sampling": {"n": 2}},
        None,
        "conversation with talker",
    ),
]


@pytest.mark.parametrize(("error", "said"), [(None, True), ("=", False), ("+{why}", True)])
def test_check_says_that_a_failed_call_cannot_be_read(error: str | None, said: bool):
    """A tokenizer of a few characters read the default text as padding."""
    ended = checked({"environment": {"tools": ["calculator"], **({} if error is None else {"error": error})}})
    assert ended.code == 0, ended.err
    line = "of a failed call the model reads '"
    assert (line in ended.out) == said, ended.out
    assert ("<pad>" in ended.out) == said


def test_check_names_settings_in_which_no_call_ends_a_turn():
    """Of an evaluation it said nothing, and every call there ran on to the limit."""
    sampling = {"max_completion_length": 9, "stop": ["]"]}
    evaluate = {"data": {"path": "held_out.jsonl"}, "sampling": {"drawn": sampling, "greedy": {"temperature": 0}}}
    ended = checked({"sampling": sampling, "evaluate": evaluate})
    assert ended.code == 0, ended.err
    said = " ".join(ended.out.split())
    assert said.count('stop has no "]"') == 1
    assert 'evaluate.sampling.greedy.stop has no "]", so a call' in said


def test_check_reads_the_evaluations_settings_of_traces():
    draws = {
        "drawn": {"max_completion_length": 40, "stop": ["]"]},
        "greedy": {"temperature": 0, "max_completion_length": 9},
    }
    evaluate = {"data": {"path": "held_out.jsonl"}, "sampling": draws}
    ended = checked({"method": "sft", "teacher": None, "evaluate": evaluate})
    assert ended.code == 0, ended.err
    said = " ".join(ended.out.split())
    assert "each evaluated response is a conversation" in said
    assert "up to 8 turns, 40 or 9 tokens in all" in said
    assert 'evaluate.sampling.greedy.stop has no "]", so a call' in said
    assert "evaluate.sampling.drawn.stop" not in said
    assert " sampling.stop" not in said, "nothing is drawn in training"


@pytest.mark.parametrize(("stage", "template", "line"), GOOD, ids=[f"{i:02d}" for i in range(len(GOOD))])
def test_check_says_how_conversations_are_led(stage: dict[str, Any], template: str | None, line: str):
    ended = checked(stage, template)
    assert ended.code == 0, ended.err
    assert line in " ".join((ended.out + ended.err).split())


def test_probe_refuses_stage_with_environment():
    prepare(Path(), one_stage(environment=TALKER))
    ended = command("probe", "recipe.yaml")
    assert ended.code != 0
    assert "stages.distil.environment=null" in " ".join(ended.err.split())
