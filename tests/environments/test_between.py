"""What stands between two turns: the chat template's own text, behind the student's own tokens."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from support.chat_templates import CHATML, HARMONY, HERMES_CALL, LLAMA, MISTRAL, THINKING, TOOLS, templated
from support.models import byte_tokenizer

from opd.environments.between import Transcript
from opd.environments.formats import parsed
from opd.environments.protocol import Call
from opd.messages import ids_after
from opd.models.render import chat_text
from opd.types import Prompt

CALLED = [
    # template, format, the student's words, its end, what is between
    (
        CHATML,
        "hermes",
        f"Hm.{HERMES_CALL}",
        "<|im_end|>",
        "\n<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        LLAMA,
        "llama3",
        '{"name": "f", "parameters": {"x":1}}',
        "<|eot_id|>",
        "<|start|>ipython<|end|>\n\n7<|eot_id|><|start|>assistant<|end|>\n\n",
    ),
    (MISTRAL, "mistral", '[TOOL_CALLS][{"name":"f","arguments":{}}]', "</s>", "[TOOL_RESULTS]7[/TOOL_RESULTS]"),
    (
        HARMONY,
        "harmony",
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x":1}',
        "<|call|>",
        "<|start|>functions.f to=assistant<|message|>7<|end|><|start|>assistant",
    ),
]


def transcript(template: str, ends: str = "") -> Transcript:
    tokenizer = templated(template)
    prompt = Prompt(id=0, content=({"role": "user", "content": "What is 1?"},), tools=tuple(TOOLS))
    stops = frozenset(tokenizer.convert_tokens_to_ids([ends] if ends else ["<|im_end|>", "<eos>"]))
    return Transcript(prompt=prompt, tokenizer=tokenizer, template_options={}, stop_ids=stops)


def after(one: Transcript, words: str, end: str, how: str, said: str = "7", role: str = "tool") -> Any:
    found = parsed(words, how, one.tokenizer, TOOLS)
    ids = one.tokenizer(words + end, add_special_tokens=False).input_ids
    return one.after(ids, words, found.content, found.calls, [said], role)


@pytest.mark.parametrize(("template", "how", "words", "end", "expected"), CALLED)
def test_answer_to_a_call_is_the_templates_text(template: str, how: str, words: str, end: str, expected: str):
    """Turn after turn: the ids behind the student's own end token are those of the template's text."""
    one = transcript(template, end)
    for _ in range(3):
        between = after(one, words, end, how)
        assert between.refused is None
        assert not between.rewritten
        assert one.tokenizer.decode(between.ids) == expected
    # Behind the words as the student wrote them, the whole is what the template writes of a first turn.
    whole = one.tokenizer(expected, add_special_tokens=False).input_ids
    assert list(between.ids) == whole


@pytest.mark.parametrize(
    ("template", "words", "end", "expected"),
    [
        (CHATML, "four", "<|im_end|>", "\n<|im_start|>user\nlower<|im_end|>\n<|im_start|>assistant\n"),
        (CHATML, "four", "", "<|im_end|>\n<|im_start|>user\nlower<|im_end|>\n<|im_start|>assistant\n"),
        (LLAMA, " four \n", "<|eot_id|>", "<|start|>user<|end|>\n\nlower<|eot_id|><|start|>assistant<|end|>\n\n"),
        (MISTRAL, "four", "</s>", "[INST]lower[/INST]"),
        (
            HARMONY,
            "<|channel|>final<|message|>four",
            "<|end|>",
            "<|start|>user<|message|>lower<|end|><|start|>assistant",
        ),
    ],
)
def test_message_of_a_game_is_the_templates_text(template: str, words: str, end: str, expected: str):
    """Also where the student ended with a stop string: then the template's end token is the environment's."""
    one = transcript(template, end)
    how = "harmony" if template == HARMONY else "hermes"
    for _ in range(3):
        between = after(one, words, end, how, "lower", "user")
        assert between.refused is None
        assert not between.rewritten
        assert one.tokenizer.decode(between.ids) == expected


def test_template_that_drops_thinking_is_found():
    kept, dropped = transcript(CHATML, "<|im_end|>"), transcript(THINKING, "<|im_end|>")
    words = "<think>hm</think>four"
    assert not after(kept, words, "<|im_end|>", "hermes", "lower", "user").rewritten
    assert after(dropped, words, "<|im_end|>", "hermes", "lower", "user").rewritten
    assert not after(transcript(THINKING, "<|im_end|>"), "four", "<|im_end|>", "hermes", "lower", "user").rewritten


def test_template_that_refuses_a_role_says_why():
    template = CHATML.replace("{% if m.role == 'tool' %}", "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}")
    between = after(transcript(template, "<|im_end|>"), HERMES_CALL, "<|im_end|>", "hermes")
    assert between.ids == ()
    assert between.refused is not None
    assert "no tools" in between.refused


def test_unreadable_call_is_answered_as_the_template_allows():
    """Mistral's template has no answer of a tool without a call: a user says it."""
    between = after(transcript(MISTRAL, "</s>"), "[TOOL_CALLS]f(1)", "</s>", "mistral", "error")
    assert between.refused is None
    assert byte_text(between.ids) == "[INST]error[/INST]"
    between = after(transcript(CHATML, "<|im_end|>"), "<tool_call>f(1)</tool_call>", "<|im_end|>", "hermes", "error")
    assert "<tool_response>\nerror" in byte_text(between.ids)


def byte_text(ids: Any) -> str:
    return transcript(CHATML).tokenizer.decode(ids)


def test_words_with_the_mark_are_no_place():
    one = transcript(CHATML, "<|im_end|>")
    for words in ("opdturn", "opdturnx and opdturn"):
        between = after(one, words, "<|im_end|>", "hermes", "opdturn", "user")
        expected = "\n<|im_start|>user\nopdturn<|im_end|>\n<|im_start|>assistant\n"
        assert one.tokenizer.decode(between.ids) == expected


def test_calls_have_their_own_ids_in_a_conversation():
    one = transcript(MISTRAL, "</s>")
    words = '[TOOL_CALLS][{"name":"f","arguments":{}},{"name":"f","arguments":{}}]'
    ids = one.tokenizer(words + "</s>", add_special_tokens=False).input_ids
    for _ in range(2):
        calls = parsed(words, "mistral", one.tokenizer, TOOLS).calls
        assert one.after(ids, words, "", calls, ["1", "2"], "tool").refused is None
    ids = [call["id"] for message in one.messages for call in message.get("tool_calls", ())]
    assert len(set(ids)) == len(ids) == 4
    assert all(len(i) == 9 for i in ids)


def test_text_prompt_is_continued_by_the_observation_alone():
    tokenizer = byte_tokenizer()
    one = Transcript(
        prompt=Prompt(id=0, content="1+2="), tokenizer=tokenizer, template_options={}, stop_ids=frozenset()
    )
    between = one.after([5], "[1+2]", "", (Call(name="f", arguments="1+2"),), ["3", ";"], "tool")
    assert tokenizer.decode(between.ids) == "3;"


def test_two_answers_are_in_the_order_of_the_calls():
    one = transcript(CHATML, "<|im_end|>")
    ids = one.tokenizer(HERMES_CALL * 2 + "<|im_end|>", add_special_tokens=False).input_ids
    calls = parsed(HERMES_CALL * 2, "hermes", one.tokenizer, TOOLS).calls
    text = one.tokenizer.decode(one.after(ids, HERMES_CALL * 2, "", calls, ["first", "second"], "tool").ids)
    assert text.index("first") < text.index("second")
    assert list(itertools.chain.from_iterable(m.get("tool_call_id", "") for m in one.messages[-1:])) == list(
        "000000001"
    )


def test_turn_without_calls_renders_twice_and_encodes_once(monkeypatch: pytest.MonkeyPatch):
    """Most of what an environment costs: the conversation with the turn, and with the mark in its place."""
    rendered: list[str] = []
    encoded: list[str] = []

    def chat_text_counted(*given: Any, **options: Any) -> str:
        rendered.append(chat_text(*given, **options))
        return rendered[-1]

    def ids_after_counted(text: str, tokenizer: Any) -> list[int]:
        encoded.append(text)
        return ids_after(text, tokenizer)

    monkeypatch.setattr("opd.environments.between.chat_text", chat_text_counted)
    monkeypatch.setattr("opd.environments.between.ids_after", ids_after_counted)
    one = transcript(CHATML)
    found = [after(one, words, "<|im_end|>", "hermes", "lower", "user") for words in ("four", "three")]
    assert len(rendered) == 4
    assert found[0].ids == found[1].ids
    assert encoded == ["\n<|im_start|>user\nlower<|im_end|>\n<|im_start|>assistant\n"]
