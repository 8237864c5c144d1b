"""Calls of tools, as each family of models writes them."""

from __future__ import annotations

from typing import Any

import pytest
from support.models import byte_tokenizer

from opd.environments.formats import format_of, parsed
from opd.errors import ConfigError

TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f"}}]
KINDS = {"a": {"type": "string"}, "n": {"type": "integer"}, "o": {"type": "object"}, "b": {"type": "boolean"}}
TYPED = {"type": "function", "function": {"name": "h", "parameters": {"properties": KINDS}}}
TWO = [*TOOLS, {"type": "function", "function": {"name": "g"}}]

READ = [
    # format, text, [(name, arguments)], the text besides the calls
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', [("f", {"x": 1})], ""),
    ("hermes", 'Hm. <tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', [("f", {"x": 1})], "Hm. "),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "g"}</tool_call>',
        [("f", {}), ("g", {})],
        "\n",
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}}', [("f", {"x": 1})], ""),  # ended by its end token
    ("hermes", "The answer is 4.", [], "The answer is 4."),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', [("f", {})], ""),
    # a call that the thinking mentions is none
    (
        "hermes",
        '<think>\nA <tool_call> is next.\n</think>\n\n<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        [("f", {})],
        "<think>\nA <tool_call> is next.\n</think>\n\n",
    ),
    ("hermes", '<think>\n<tool_call>{"name": "f"}</tool_call>', [], '<think>\n<tool_call>{"name": "f"}</tool_call>'),
    (
        "hermes",
        '<tool_call>{"name": "g"}</tool_call>\n</think>\n4',
        [],
        '<tool_call>{"name": "g"}</tool_call>\n</think>\n4',
    ),
    ("llama3", '<think>\nhm\n</think>\n\n{"name": "f", "parameters": {}}', [("f", {})], "<think>\nhm\n</think>"),
    ("mistral", "[THINK]or [TOOL_CALLS][/THINK][TOOL_CALLS]f[ARGS]{}", [("f", {})], "[THINK]or [TOOL_CALLS][/THINK]"),
    (
        "qwen3_coder",
        "Hm.\n\n<tool_call>\n<function=h>\n<parameter=a>\n1\n2\n</parameter>\n<parameter=n>\n3\n</parameter>\n"
        '<parameter=o>\n{"k": [true]}\n</parameter>\n<parameter=b>\nFalse\n</parameter>\n</function>\n</tool_call>',
        [("h", {"a": "1\n2", "n": 3, "o": {"k": [True]}, "b": False})],
        "Hm.\n\n",
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<function=f>\n</function>\n</tool_call>\n<tool_call>\n<function=h>\n<parameter=n>\nx\n</parameter>",
        [("f", {}), ("h", {"n": "x"})],
        "\n",
    ),
    ("qwen3_coder", "4", [], "4"),
    ("llama3", '{"name": "f", "parameters": {"x": "a;b"}}', [("f", {"x": "a;b"})], ""),
    ("llama3", '<|python_tag|>{"name": "f", "parameters": {"x": 1}}', [("f", {"x": 1})], ""),
    ("llama3", '{"name": "f", "parameters": {}}; {"name": "g", "arguments": {}}', [("f", {}), ("g", {})], ""),
    ("llama3", "Hm. <|python_tag|>print(1)", [("python", {"code": "print(1)"})], "Hm. "),
    ("llama3", '{"answer": 4}', [], '{"answer": 4}'),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}, "id": "abcdefghi"}]', [("f", {"x": 1})], ""),
    ("mistral", '[TOOL_CALLS] {"name": "f", "arguments": {"x": 1}}', [("f", {"x": 1})], ""),
    ("mistral", 'Hm.[TOOL_CALLS]f[ARGS]{"x": 1}', [("f", {"x": 1})], "Hm."),
    ("mistral", "[TOOL_CALLS]f[CALL_ID]abc[ARGS]{}[TOOL_CALLS]g[ARGS]{}", [("f", {}), ("g", {})], ""),
    ("mistral", "4", [], "4"),
    (
        "harmony",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"x": 1}<|call|>',
        [("f", {"x": 1})],
        "",
    ),
    (
        "harmony",
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"x": 1}',
        [("f", {"x": 1})],
        "",
    ),
    ("harmony", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>4", [], "4"),
    (
        "harmony",  # thinking and an answer that mention a call
        "<|channel|>analysis<|message|>I write to=functions.g first<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.f <|constrain|>json<|message|>{"x": 1}<|call|>',
        [("f", {"x": 1})],
        "",
    ),
    ("harmony", "<|channel|>final<|message|>write to=functions.f", [], "write to=functions.f"),
    ("text", "1+2 is [1+2]", [("f", "1+2")], "1+2 is "),
    ("text", "[f: 1+2]", [("f", "1+2")], ""),
    ("text", "3.", [], "3."),
]


@pytest.mark.parametrize(("how", "text", "calls", "content"), READ)
def test_calls_are_read(how: str, text: str, calls: list[tuple[str, Any]], content: str):
    found = parsed(text, how, None, [*TOOLS, TYPED] if how == "qwen3_coder" else TOOLS)
    assert found.unreadable is None
    assert [(one.name, one.arguments) for one in found.calls] == calls
    assert found.content == content


UNREADABLE = [
    ("hermes", "<tool_call>f(1)</tool_call>", "the call is no JSON"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": ', "is not closed"),
    ("hermes", "<tool_call>[1]</tool_call>", 'an object with "name" and "arguments"'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "are an object, got list"),
    ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>", "the call is no JSON"),
    ("llama3", '{"name": "f", "parameters": {"x": 1}', "the call is no JSON"),
    ("llama3", '{"name": "f", "parameters": {}} and more', "behind the call stands"),
    ("mistral", "[TOOL_CALLS]f(1)", "the call is no JSON"),
    ("mistral", "[TOOL_CALLS][]", "followed by no call"),
    ("mistral", "[TOOL_CALLS]f[ARGS]x", "the call is no JSON"),
    ("harmony", "<|channel|>commentary to=functions.f<|message|>x", "the call is no JSON"),
    ("qwen3_coder", '<tool_call>{"name": "f"}</tool_call>', "a call is <function=NAME> with its parameters"),
]


@pytest.mark.parametrize(("how", "text", "why"), UNREADABLE)
def test_call_that_cannot_be_read_says_why(how: str, text: str, why: str):
    found = parsed(text, how, None, TOOLS)
    assert not found.calls
    assert found.unreadable is not None
    assert why in found.unreadable
    assert len(found.unreadable) < 300


def test_text_names_its_tool_when_there_are_two():
    assert parsed("[g: 1]", "text", None, TWO).calls[0].name == "g"
    assert parsed("[1]", "text", None, TWO).unreadable == "a call names its tool: [f|g: argument]"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("{{ '<tool_call><function=' }}{{ '<parameter=' }}", "qwen3_coder"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("{{ '<|channel|>' }}", "harmony"),
        ("{{ '<|python_tag|>' }}", "llama3"),
        ("{{ '\"parameters\": ' }}ipython", "llama3"),
    ],
)
def test_format_is_that_of_the_template(template: str, expected: str):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    if expected == "llama3" and "python_tag" not in template:
        tokenizer.chat_template = '{{ \'{"name": "f", "parameters"\' }}ipython'
    assert format_of(tokenizer, chat=True, where="stage") == expected
    assert format_of(tokenizer, chat=False, where="stage") == "text"


def test_format_of_unknown_template_names_remedy():
    with pytest.raises(ConfigError, match=r"stage: the chat template writes no tool call.*hermes.*environment\.format"):
        format_of(byte_tokenizer(), chat=True, where="stage")


def test_library_reads_calls_where_the_tokenizer_has_a_template():
    """transformers 5 reads a model's text itself where the tokenizer says how."""
    tokenizer = byte_tokenizer()
    if not hasattr(tokenizer, "parse_response"):
        pytest.skip("this transformers has no parse_response")
    tokenizer.response_template = {"not": "a template"}
    assert format_of(tokenizer, chat=True, where="stage") == "library"
    found = parsed("text", "library", tokenizer, TOOLS)
    assert found.calls == ()
    assert found.unreadable is not None
