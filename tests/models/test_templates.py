"""What chat templates read: parts, tools, the prompt's own variables, the clock; and what those without it are told."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from models.test_render import TEMPLATE, chat, text, word_tokenizer, words
from support.models import byte_tokenizer

from opd.errors import ConfigError
from opd.models.render import render
from opd.models.templates import clock_at, content_form, dated, generation_prompt, in_form
from opd.types import Prompt

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BOTH = """{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}
{%- for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"""
PARTS = "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"


def shown(template: str, content: Any, **columns: Any) -> str:
    """The text that is rendered of one user message."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    prompt = Prompt(id=0, content=({"role": "user", "content": content},), **columns)
    return tokenizer.decode(render(prompt, tokenizer))


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": one} for one in texts]


# --- forms of content ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        (PLAIN, parts("hi"), "<user>hi<assistant>"),
        (PLAIN, parts("hi", "there"), "<user>hi\nthere<assistant>"),
        (PLAIN, "hi", "<user>hi<assistant>"),
        ("{{ messages[-1].content | tojson }}", parts("hi"), '"hi"'),
        ("{{ messages[-1]['content'] + '!' }}", parts("hi"), "hi!"),
        (BOTH, parts("hi", "there"), "<user>hithere"),
        (BOTH, "hi", "<user>hi"),
        (PARTS, parts("hi", "there"), "<user>hithere"),
        (PARTS, "hi", "<user>hi"),
    ],
)
def test_render_shows_content_in_form_that_template_reads(template, content, expected):
    assert shown(template, content) == expected


def test_in_form_keeps_content_of_tool_calls_and_other_parts():
    form = content_form(PLAIN, byte_tokenizer())
    messages = [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": [{"type": "file"}]},
    ]
    assert in_form(messages, form) == messages


@pytest.mark.parametrize(
    "template", ["./file.jinja", "<user>question<assistant>", "{{ bos_token }}{{ messages | length }}"]
)
def test_render_refuses_template_that_shows_no_message(template):
    with pytest.raises(ConfigError, match="shows no message: different conversations all render the same"):
        shown(template, "hi")


def test_content_form_accepts_template_that_needs_system_or_other_turns():
    for template in (
        "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[1].content }}",
        "{% for m in messages[1:] %}{{ m.content }}{% endfor %}",
        "{{ raise_exception('always') }}",
    ):
        assert content_form(template, byte_tokenizer()).text


def test_generation_prompt_is_seen_by_rendering():
    hi = ({"role": "user", "content": "hi"},)
    assert generation_prompt(hi, PLAIN, byte_tokenizer(), {})
    assert not generation_prompt(hi, BOTH, byte_tokenizer(), {})


@pytest.mark.parametrize("blank", ["", " "])
def test_generation_prompt_is_empty_without_header_of_turns(blank: str):
    """Mistral's turns of the assistant follow [/INST] at once, or after a blank."""
    mistral = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
        "{% else %}{{ '" + blank + "' + m.content + '</s>' }}{% endif %}{% endfor %}"
    )
    assert generation_prompt([{"role": "user", "content": "hi"}], mistral, byte_tokenizer(), {})
    headed = mistral.replace("{% else %}", "{% else %}<assistant>")
    assert not generation_prompt([{"role": "user", "content": "hi"}], headed, byte_tokenizer(), {})


# --- the prompt's own variables --------------------------------------------------------------------------------------


def test_render_overrides_template_options_with_prompts_own():
    tokenizer = word_tokenizer(template=TEMPLATE)
    prompt = Prompt(id=0, content=chat(("user", "hi")).content, chat_template_kwargs={"enable_thinking": True})
    on = render(prompt, tokenizer, {"enable_thinking": False})
    assert words(tokenizer, on)[-1] == "<think>"
    assert words(tokenizer, render(chat(("user", "hi")), tokenizer, {"enable_thinking": False}))[-1] == "<assistant>"


def test_render_gives_tools_to_template():
    tools = ({"name": "add", "parameters": {}}, {"name": "sub"})
    template = "{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}{{ messages[0].content }}"
    assert shown(template, "hi", tools=tools) == "[add][sub]hi"
    assert shown(template, "hi") == "hi"


def test_render_uses_tool_template_of_named_templates():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {
        "default": "{{ messages[0].content }}",
        "tool_use": "{{ tools[0].name }}{{ messages[0].content }}",
    }
    prompt = Prompt(id=0, content=({"role": "user", "content": "hi"},), tools=({"name": "add"},))
    assert tokenizer.decode(render(prompt, tokenizer)) == "addhi"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tools": ({"name": "add"},)}, "does not mention the option 'tools', .* Remove it from the data of prompt 0"),
        ({"chat_template_kwargs": {"thinking": True}}, "does not mention the option 'thinking'.*the data of prompt 0"),
        ({"chat_template_kwargs": {"tokenize": True}}, "The data of prompt 0 cannot set 'tokenize'"),
    ],
)
def test_render_refuses_variables_that_template_ignores(columns, message):
    with pytest.raises(ConfigError, match=message):
        shown("{{ messages[0].content }}", "hi", **columns)


# --- the beginning of a text -----------------------------------------------------------------------------------------


def test_render_does_not_double_bos_of_text():
    tokenizer, appending = word_tokenizer(), word_tokenizer(appends_eos=True)
    for one in (tokenizer, appending):
        assert words(one, render(text("<bos> hi"), one)) == ["<bos>", "hi"]
        assert words(one, render(text("<bos> <bos> hi"), one)) == ["<bos>", "<bos>", "hi"]
        assert words(one, render(text("hi <bos>"), one)) == ["<bos>", "hi", "<bos>"]
    assert words(tokenizer, render(text("<bos> hi"), word_tokenizer(bos=False))) == ["<bos>", "hi"]


# --- the clock -------------------------------------------------------------------------------------------------------

CLOCK = (
    "{{ strftime_now('%d %b %Y') }}{% if strftime_now is defined %}|{{ strftime_now( \"%H 'h'\" ) }}{% endif %}"
    "|{{ messages[0].content }}"
)


def test_render_writes_time_of_clock_at():
    with clock_at(datetime(2024, 2, 29, 7)):
        assert shown(CLOCK, "hi") == "29 Feb 2024|07 'h'|hi"
        with clock_at(datetime(2025, 1, 1)):
            assert shown(CLOCK, "hi") == "01 Jan 2025|00 'h'|hi"
        assert shown(CLOCK, "hi") == "29 Feb 2024|07 'h'|hi"


def test_dated_writes_present_outside_of_runs():
    before = datetime.now()
    year = dated("{{ strftime_now('%Y') }}")
    assert year in {f'{{{{ "{when.year}" }}}}' for when in (before, datetime.now())}
    assert dated(TEMPLATE) == TEMPLATE
