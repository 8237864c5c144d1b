"""Prompts to ids with and without a chat template, and what each mistake is told. Tokenizers are made here."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from opd.errors import ConfigError, DataError
from opd.messages import conversation, text_or_none
from opd.models.endings import endings_of
from opd.models.render import encode_response, render, render_checked
from opd.types import Prompt

SPECIAL = ["<bos>", "<eos>", "<user>", "<assistant>", "<think>"]
WORDS = ["hi", "there", "be", "brief", "ho"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<{{ message.role }}> {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{% if enable_thinking %}<think>{% endif %}"
)


def word_tokenizer(*, bos: bool = True, appends_eos: bool = False, template: Any = None) -> Any:
    """One token a word; x, y and z have none. `bos` and `appends_eos` say what it adds around a text."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary))
    core.normalizer = normalizers.Replace(Regex("[xyz]"), "")
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(SPECIAL)
    single = " ".join(["<bos>"] * bos + ["$A"] + ["<eos>"] * appends_eos)
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 0), ("<eos>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = template
    return tokenizer


def byte_tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def words(tokenizer: Any, ids: list[int]) -> list[str]:
    return tokenizer.convert_ids_to_tokens(ids)


def encoded(response: str, tokenizer: Any) -> list[int]:
    return encode_response(response, Prompt(id=0, content="ho"), tokenizer, endings_of(tokenizer))


def text(content: str, key: int = 0) -> Prompt:
    return Prompt(id=key, content=content)


def chat(*messages: tuple[str, str], key: int = 0) -> Prompt:
    return Prompt(id=key, content=tuple({"role": role, "content": content} for role, content in messages))


# --- text ----------------------------------------------------------------------------------------------------------


def test_render_adds_special_tokens_of_tokenizer():
    tokenizer = word_tokenizer()
    assert words(tokenizer, render(text("hi there"), tokenizer)) == ["<bos>", "hi", "there"]
    assert words(tokenizer, render(text("hi"), word_tokenizer(bos=False))) == ["hi"]


def test_render_drops_only_appended_eos():
    appending, plain = word_tokenizer(appends_eos=True), word_tokenizer()
    assert words(appending, render(text("hi"), appending)) == ["<bos>", "hi"]
    assert words(appending, render(text("hi <eos>"), appending)) == ["<bos>", "hi", "<eos>"]
    assert words(plain, render(text("hi <eos>"), plain)) == ["<bos>", "hi", "<eos>"]


def test_render_equals_tokenizer_when_byte_level():
    tokenizer = byte_tokenizer()
    ids = render(text("Grüße\n"), tokenizer)
    assert len(ids) == len("Grüße\n".encode())
    assert ids == tokenizer("Grüße\n").input_ids


# --- messages ------------------------------------------------------------------------------------------------------


def test_render_gives_one_bos_and_generation_prompt_when_chat():
    tokenizer = word_tokenizer(appends_eos=True, template=TEMPLATE)
    ids = render(chat(("user", "hi"), ("assistant", "ho"), ("user", "there")), tokenizer)
    assert words(tokenizer, ids) == ["<bos>", "<user>", "hi", "<assistant>", "ho", "<user>", "there", "<assistant>"]


def test_template_options_reach_chat_template():
    tokenizer = word_tokenizer(template=TEMPLATE)
    off = render(chat(("user", "hi")), tokenizer, {"enable_thinking": False})
    on = render(chat(("user", "hi")), tokenizer, {"enable_thinking": True})
    assert words(tokenizer, on) == [*words(tokenizer, off), "<think>"]


def test_template_options_change_nothing_when_prompt_is_text():
    tokenizer = word_tokenizer(template=TEMPLATE)
    assert render(text("hi"), tokenizer, {"enable_thinking": False}) == render(text("hi"), tokenizer)


def test_render_uses_default_of_named_templates():
    named = word_tokenizer(template={"default": TEMPLATE, "tool_use": "{{ messages[0].content }}{{ tools }}"})
    single = word_tokenizer(template=TEMPLATE)
    assert render(chat(("user", "hi")), named) == render(chat(("user", "hi")), single)


def test_render_raises_data_error_when_chat_template_is_missing():
    with pytest.raises(DataError) as caught:
        render(chat(("user", "hi"), key=7), word_tokenizer())
    for part in ("Prompt 7", "has no chat template", "Give `prompt` as text", "`models.NAME.chat_template`"):
        assert part in str(caught.value)


def test_render_error_names_recipe_key():
    refusing = word_tokenizer(template=TEMPLATE + "{{ raise_exception('no') }}")
    for tokenizer, options in ((refusing, {}), (word_tokenizer(template=TEMPLATE), {"no_such": False})):
        with pytest.raises((DataError, ConfigError), match=r"`models\.NAME\.chat_template`\.$") as caught:
            render(chat(("user", "hi")), tokenizer, options)
        assert "tokenizer.chat_template" not in str(caught.value)


def test_render_error_names_tokenizer():
    tokenizer = word_tokenizer()
    with pytest.raises(DataError, match=r"but TokenizersBackend has no chat|but PreTrainedTokenizerFast has no chat"):
        render(chat(("user", "hi")), tokenizer)
    tokenizer.name_or_path = "some/model"
    with pytest.raises(DataError, match="tokenizer 'some/model' has no chat template"):
        render(chat(("user", "hi")), tokenizer)


def test_render_raises_data_error_without_default_template():
    tokenizer = word_tokenizer(template={"rag": TEMPLATE})
    with pytest.raises(DataError, match=r"Prompt 0 cannot be rendered .*no default.*'rag'"):
        render(chat(("user", "hi")), tokenizer)


def test_render_raises_data_error_when_template_refuses():
    tokenizer = word_tokenizer(template=TEMPLATE)
    with pytest.raises(
        DataError, match=r"refused prompt 3 \(roles: system, user\): no system role. Change the messages"
    ):
        render(chat(("system", "be brief"), ("user", "hi"), key=3), tokenizer)


def test_template_options_refuses_unknown_option():
    tokenizer = word_tokenizer(template=TEMPLATE)
    with pytest.raises(
        ConfigError, match=r"does not mention the option 'enable_thinkin', .*Did you mean 'enable_thinking'"
    ):
        render(chat(("user", "hi")), tokenizer, {"enable_thinkin": False})
    with pytest.raises(ConfigError, match="does not mention the option 'enable', so it has no effect"):
        render(chat(("user", "hi")), tokenizer, {"enable": False})


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "tokenize", "chat_template"])
def test_template_options_refuses_reserved_option(name):
    tokenizer = word_tokenizer(template=TEMPLATE)
    with pytest.raises(ConfigError, match=f"`template_options` cannot set '{name}'"):
        render(chat(("user", "hi")), tokenizer, {name: False})


# --- limits --------------------------------------------------------------------------------------------------------


def test_render_checked_renders_each_prompt():
    tokenizer = word_tokenizer(template=TEMPLATE)
    prompts = [text("hi", 0), chat(("user", "hi"), key=1)]
    expected = [render(prompt, tokenizer) for prompt in prompts]
    options = {"enable_thinking": True}
    assert render_checked(prompts, tokenizer, max_prompt_length=4) == expected
    assert render_checked(prompts, tokenizer, max_prompt_length=None) == expected
    assert len(render_checked(prompts, tokenizer, max_prompt_length=None, template_options=options)[1]) == 5


def test_render_checked_refuses_prompts_over_max_prompt_length():
    prompts = [text("hi", 4), text("hi there", 8), text("hi there be", 9)]
    with pytest.raises(DataError) as caught:
        render_checked(prompts, word_tokenizer(), max_prompt_length=2)
    for part in (
        "Prompt 8 has 3 tokens",
        "`max_prompt_length` is 2",
        "2 of these 3",
        "longest has 4",
        "filter the data",
    ):
        assert part in str(caught.value)


def test_render_checked_refuses_prompt_of_zero_tokens():
    with pytest.raises(DataError, match=r"Prompt 5 renders to zero tokens with .*knows its characters"):
        render_checked([text("xyz", 5)], word_tokenizer(bos=False), max_prompt_length=None)


# --- responses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("appends_eos", [True, False])
def test_encode_response_ends_with_one_eos(appends_eos):
    tokenizer = word_tokenizer(appends_eos=appends_eos)
    assert words(tokenizer, encoded("hi there", tokenizer)) == ["hi", "there", "<eos>"]
    assert words(tokenizer, encoded("hi <eos>", tokenizer)) == ["hi", "<eos>"]


@pytest.mark.parametrize("response", ["", " \n", "xyz", "<eos>"])
def test_encode_response_refuses_response_of_zero_tokens(response):
    with pytest.raises(DataError, match=r"has zero tokens with .* besides the end-of-sequence token. Remove the row"):
        encoded(response, word_tokenizer())


def test_encode_response_raises_config_error_when_eos_is_missing():
    with pytest.raises(ConfigError, match=r"has no end-of-sequence token, so no response can end. Set its eos_token"):
        encoded("hi", byte_tokenizer())


# --- rows ----------------------------------------------------------------------------------------------------------


def test_conversation_keeps_parts_and_tool_calls():
    parts = [{"type": "text", "text": "what"}, {"type": "text", "text": "is this?"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}], "reasoning_content": None}
    messages = conversation([{"role": "user", "content": parts}, call], "Row 0")
    assert messages == (
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]},
    )


def test_text_or_none_accepts_only_text_and_none():
    assert text_or_none(None, "Row 0") is None
    assert text_or_none("", "Row 0") == ""
    for value in (3, [], [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "a"}] * 2):
        with pytest.raises(DataError, match=r"Row 0 is a (int|list).*Give text, or one assistant message"):
            text_or_none(value, "Row 0")
