"""What ends a response, of templates in the shapes of published models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.models import build, byte_tokenizer, tiny
from support.pairs import byte_bpe, sentence_piece
from tokenizers import AddedToken

from opd.models import saving, wrapping
from opd.models.endings import endings_of, turn_end
from opd.models.loading import load_model
from opd.models.preview import known_endings
from opd.models.render import encode_response, render
from opd.recipe.schema import ModelSpec
from opd.runs.tokenizers import ending_lines
from opd.types import Prompt

TEXT = Prompt(id=0, content="hi")
CHAT = Prompt(id=0, content=({"role": "user", "content": "hi"},))
NAMES = ("<pad>", "<eos>", "<bos>", "<start>", "<end>", "<return>", "</s>")
GENERATE = "{% if add_generation_prompt %}<start>assistant\n{% endif %}"


def messages(body: str) -> str:
    return "{% for m in messages %}" + body + "{% endfor %}"


GEMMA = "<bos>" + messages("<start>{{ m.role }}\n{{ m.content | trim }}<end>\n") + GENERATE
LLAMA_2 = messages(
    "{% if m.role == 'user' %}<bos>[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} <end>{% endif %}"
)
HARMONY = messages(
    "<start>{{ m.role }}:{{ m.content }}{% if loop.last and m.role == 'assistant' %}<return>{% else %}<end>{% endif %}"
)
THINKING = messages(
    "<start>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}<end>\n"
)
PARTS = messages("<start>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}<end>\n")
HEADER = messages("<end>{{ m.role }}\n{{ m.content }}") + "<start>"  # a generation prompt whether wanted or not
LINES = messages("{{ m.role }}: {{ m.content }}\n")
SPELT = messages("{{ m.role }}: {{ m.content }}</turn>\n")
NOTHING = messages("<start>{{ m.role }}\n{{ m.content }}") + GENERATE
SILENT = "<bos>" + messages("{% if m.role == 'user' %}<start>{{ m.content }}<end>{% endif %}")
REFUSES = messages("{% if m.role == 'assistant' %}{{ raise_exception('one turn') }}{% endif %}{{ m.content }}<end>")


def with_template(template: Any, tokenizer: Any = None) -> Any:
    tokenizer = tokenizer or byte_bpe(special=NAMES)
    tokenizer.chat_template = template
    return tokenizer


def encoded(response: str, prompt: Prompt, tokenizer: Any, **options: Any) -> list[str]:
    ids = encode_response(response, prompt, tokenizer, endings_of(tokenizer, **options))
    return tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (GEMMA, "<end>"),
        (GEMMA.replace("<end>", "<eos>"), "<eos>"),
        (LLAMA_2, "<end>"),
        (LLAMA_2.replace("<end>", "<eos>"), "<eos>"),
        (HARMONY.replace("<return>", "<eos>"), "<eos>"),
        (THINKING, "<end>"),
        (PARTS, "<end>"),
        ({"default": GEMMA, "tool_use": LINES}, "<end>"),
        (HEADER, None),
        (HARMONY, None),  # <end> in the middle, <return> at the end, neither is eos
        (LINES, None),
        (SPELT, None),
        (NOTHING, None),
        (SILENT, None),
        (REFUSES, None),
        ({"tool_use": GEMMA}, None),
        (None, None),
    ],
)
def test_turn_end_is_token_after_answer(template: Any, end: str | None):
    tokenizer = with_template(template)
    vocabulary = tokenizer.get_vocab()
    assert turn_end(tokenizer) == (None if end is None else vocabulary[end])
    found = endings_of(tokenizer, generation=[vocabulary["</s>"]])
    assert found.text == found.after(TEXT) == vocabulary["<eos>"]
    assert found.turn == found.after(CHAT) == vocabulary[end or "<eos>"]
    assert found.stops == {vocabulary[name] for name in ("<eos>", "</s>", end or "<eos>")}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_turn_end_skips_prefix_space_of_sentence_piece(prefix: bool, special: bool):
    names = ("<pad>", "<eos>", "<end>") if special else ("<pad>", "<eos>")
    tokenizer = sentence_piece("▁ a", characters="abc\n", prefix=prefix, special=names)
    if not special:
        tokenizer.add_tokens([AddedToken("<end>", normalized=False)])
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert turn_end(with_template(GEMMA.replace("<start>", "").replace("<bos>", ""), tokenizer)) == end
    assert turn_end(with_template(LLAMA_2.replace("<bos>", ""), tokenizer)) == end


def test_turn_end_is_no_added_token_of_white_space():
    tokenizer = with_template(LINES)
    tokenizer.add_tokens(["\n"])
    assert turn_end(tokenizer) is None


def test_turn_end_reads_template_options():
    tokenizer = with_template(GEMMA.replace("<end>", "{{ '<end>' if closes else '<eos>' }}"))
    vocabulary = tokenizer.get_vocab()
    assert turn_end(tokenizer) == vocabulary["<eos>"]
    assert turn_end(tokenizer, {"closes": True}) == vocabulary["<end>"]
    assert endings_of(tokenizer, {"closes": True}).turn == vocabulary["<end>"]


def test_endings_of_leaves_eos_when_model_lacks_turn_token():
    tokenizer = byte_bpe()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>", "<end>"]})
    end = with_template(GEMMA, tokenizer).get_vocab()["<end>"]
    assert endings_of(tokenizer, below=end + 1).turn == end
    assert endings_of(tokenizer, below=end).turn == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("response", "in_chat", "in_text"),
    [
        ("ab", "ab<end>", "ab<eos>"),
        ("ab<end>", "ab<end>", "ab<end>"),  # <end> stops sampling, so nothing follows it
        ("ab<end>\n", "ab<end>", "ab<end>Ċ<eos>"),
        ("ab<eos>", "ab<end>", "ab<eos>"),
        ("ab<end><eos>\n", "ab<end>", "ab<end>"),
        ("ab</s>", "ab</s>", "ab</s>"),  # of the generation config, as <|eom_id|> of Llama 3
        ("ab\n", "abĊ<end>", "abĊ<eos>"),
        ("a<end>b", "a<end>b<end>", "a<end>b<eos>"),
    ],
)
def test_encode_response_ends_once(response: str, in_chat: str, in_text: str):
    tokenizer = with_template(GEMMA)
    generation = [tokenizer.get_vocab()["</s>"]]
    assert "".join(encoded(response, CHAT, tokenizer, generation=generation)) == in_chat
    assert "".join(encoded(response, TEXT, tokenizer, generation=generation)) == in_text


TEMPLATES_AND_LEADS = [(LLAMA_2, " "), (GEMMA, ""), (THINKING, ""), (LINES, ""), (REFUSES, "")]


@pytest.mark.parametrize("make", [lambda: byte_bpe(special=NAMES), lambda: sentence_piece(special=NAMES)])
@pytest.mark.parametrize(("template", "lead"), TEMPLATES_AND_LEADS)
def test_encode_response_begins_as_template_writes_answer(make: Any, template: str, lead: str):
    """Prompt and response together are the conversation that the template writes."""
    tokenizer = with_template(template, make())
    endings = endings_of(tokenizer)
    assert endings.lead == lead
    answer = ({"role": "assistant", "content": "is ab"},)
    for response in ("is ab", " is ab"):
        ids = encode_response(response, CHAT, tokenizer, endings)
        if lead:
            whole = tokenizer.apply_chat_template([*CHAT.content, *answer], tokenize=False)
            assert whole.startswith(tokenizer.decode([*render(CHAT, tokenizer), *ids[:-1]]).strip())
            assert ids == encode_response(f" {response.strip()}", TEXT, tokenizer, endings)[:-1] + ids[-1:]
    assert (
        encode_response("is ab", replace(CHAT, prefill="it "), tokenizer, endings)[:-1]
        == (encode_response("is ab", TEXT, tokenizer, endings)[:-1])
    )


def test_wrap_stops_at_end_of_turn():
    """A base model with a chat template: neither its eos token nor its generation config has the end of turn."""
    tokenizer = with_template(GEMMA)
    lm = tiny(tokenizer=tokenizer)
    vocabulary = tokenizer.get_vocab()
    assert lm.stop_ids == {vocabulary["<eos>"], vocabulary["<end>"]}
    assert lm.endings.turn == vocabulary["<end>"]
    plain = tiny(tokenizer=byte_tokenizer())
    assert plain.stop_ids == {plain.tokenizer.eos_token_id}


def test_wrap_reads_options_of_template():
    tokenizer = with_template(GEMMA.replace("<end>", "{{ '<end>' if closes else '' }}"))
    lm = wrapping.wrap(build(tokenizer=tokenizer), tokenizer, template_options={"closes": True})
    assert lm.stop_ids == {tokenizer.eos_token_id, tokenizer.get_vocab()["<end>"]}
    assert tiny(tokenizer=tokenizer).stop_ids == {tokenizer.eos_token_id}


def test_save_writes_end_of_turn(tmp_path):
    tokenizer = with_template(GEMMA)
    lm = tiny(tokenizer=tokenizer)
    saving.save(lm, tmp_path)
    tokenizer.chat_template = None
    again = load_model(ModelSpec(path=str(tmp_path)), name="again")
    assert again.model.generation_config.eos_token_id == sorted(lm.stop_ids)  # type: ignore[union-attr]
    assert again.stop_ids == lm.stop_ids


def test_known_endings_equal_those_of_loaded_model(tmp_path):
    tokenizer = with_template(GEMMA)
    model: Any = build(tokenizer=tokenizer)
    model.generation_config.eos_token_id = tokenizer.get_vocab()["</s>"]
    saving.save(wrapping.wrap(model, tokenizer), tmp_path)
    spec = ModelSpec(path=str(tmp_path))
    lm = load_model(spec, name="m")
    found = known_endings(spec, "m", lm.tokenizer)
    assert found == lm.endings
    assert found.stops == {tokenizer.get_vocab()[name] for name in ("<eos>", "</s>", "<end>")}
    (tmp_path / "generation_config.json").unlink()
    bare = load_model(spec, name="m")
    assert known_endings(spec, "m", lm.tokenizer) == bare.endings
    assert bare.endings.stops == {tokenizer.get_vocab()[name] for name in ("<eos>", "<end>")}


def test_ending_lines_name_end_of_turn_that_is_not_eos():
    tokenizer = with_template(GEMMA)
    ends = endings_of(tokenizer, generation=[tokenizer.get_vocab()["</s>"]])
    assert ending_lines("m", tokenizer, ends) == [
        "m: a response ends with '<end>', as its chat template ends a turn; '<eos>' and '</s>' also stop sampling"
    ]
    assert ending_lines("m", tokenizer, endings_of(with_template(LINES))) == []
