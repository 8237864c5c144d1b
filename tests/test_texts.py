"""The ids of a response continue its prompt: no space between them that neither text has."""

from __future__ import annotations

from typing import Any

import pytest
from support.models import byte_tokenizer
from support.pairs import byte_bpe, sentence_piece, trained_bpe
from tokenizers import decoders

from opd.messages import ids_after, text_after
from opd.models.endings import endings_of
from opd.models.new import character_tokenizer
from opd.models.render import encode_response, render
from opd.types import Prompt

CHARACTERS = "0123456789+= abcdef.\n"


def llama(*, strip: bool) -> Any:
    """SentencePiece with a space before each text; `strip`: a text's first space is not decoded, as of Llama 2."""
    tokenizer = sentence_piece("▁ 1", "1 2", "▁ a", characters="0123456789+=abcdef.", prefix=True)
    if strip:
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.backend_tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


@pytest.mark.parametrize("response", ["12", "1", " 12", "a1\n2", "\n\n12", "é"])
@pytest.mark.parametrize("strip", [True, False])
def test_encode_response_continues_prompt_of_sentence_piece(strip, response):
    tokenizer = llama(strip=strip)
    question = Prompt(id=0, content="6+6=")
    prompt = render(question, tokenizer)
    ids = encode_response(response, question, tokenizer, endings_of(tokenizer))
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(prompt + ids[:-1]) == tokenizer.decode(prompt) + response
    assert tokenizer.decode(prompt).lstrip(" ") == "6+6="


def test_ids_after_has_no_prefix_token_of_sentence_piece():
    tokenizer = llama(strip=True)
    assert tokenizer.convert_ids_to_tokens(tokenizer("12", add_special_tokens=False).input_ids) == ["▁1", "2"]
    assert tokenizer.convert_ids_to_tokens(ids_after("12", tokenizer)) == ["12"]


@pytest.mark.parametrize(
    "tokenizer",
    [byte_tokenizer(), byte_bpe("1 2", "Ġ 1"), trained_bpe("12 + 12 = 24", 270), character_tokenizer(CHARACTERS)],
    ids=["bytes", "bpe", "trained", "characters"],
)
@pytest.mark.parametrize("text", ["12", " 12", "\n", "", "a 12\n"])
def test_ids_after_equals_tokenizer_without_prefix_space(tokenizer, text):
    assert ids_after(text, tokenizer) == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("strip", [True, False])
@pytest.mark.parametrize(
    ("before", "pieces", "text"),
    [
        ("6+6=", ["▁1", "2"], " 12"),
        ("6+6=", ["12"], "12"),
        ("6+6=", ["▁", "▁1"], "  1"),
        ("6+6=", ["▁1", "2", "<eos>"], " 12"),
        ("6+6=", ["<0x0A>", "▁1"], "\n 1"),
    ],
)
def test_text_after_has_space_behind_prompt(strip: bool, before: str, pieces: list[str], text: str):
    tokenizer = llama(strip=strip)
    prompt, ids = tokenizer(before).input_ids, tokenizer.convert_tokens_to_ids(pieces)
    assert text_after(prompt, ids, tokenizer) == text


def test_text_after_has_no_space_behind_added_token():
    """There the tokenizer puts a space before a text, as at the beginning: `▁12` is how it writes 12."""
    tokenizer = llama(strip=True)
    ids = tokenizer("<eos>12", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<eos>", "▁1", "2"]
    assert text_after(ids[:1], ids[1:], tokenizer) == "12"


@pytest.mark.parametrize("make", [lambda: llama(strip=True), lambda: character_tokenizer(CHARACTERS)])
def test_text_after_reads_id_without_token_as_nothing(make: Any):
    """A student can draw such an id: its vocabulary reaches to the largest one, and tokenizers have gaps."""
    tokenizer = make()
    beyond = max(tokenizer.get_vocab().values()) + 1
    prompt, ids = tokenizer("1=").input_ids, tokenizer("12", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(beyond) is None
    assert text_after(prompt, [beyond, *ids], tokenizer) == tokenizer.decode(ids)


@pytest.mark.parametrize("response", ["12", " 12", "\n", "", "a 12\n", "é", "▁1"])
@pytest.mark.parametrize(
    "tokenizer",
    [byte_tokenizer(), byte_bpe("1 2", "Ġ 1"), trained_bpe("12 + 12 = 24", 270), character_tokenizer(CHARACTERS)],
    ids=["bytes", "bpe", "trained", "characters"],
)
def test_text_after_equals_decode_without_sentence_piece(tokenizer: Any, response: str):
    ids = [*tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert text_after(tokenizer("1=").input_ids, ids, tokenizer) == tokenizer.decode(ids, skip_special_tokens=True)
