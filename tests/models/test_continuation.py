"""The ids of a response continue its prompt: no space between them that neither text has."""

from __future__ import annotations

from typing import Any

import pytest
from support.models import byte_tokenizer
from support.pairs import byte_bpe, sentence_piece, trained_bpe
from tokenizers import decoders

from opd.models.continuation import ids_after
from opd.models.new import character_tokenizer
from opd.models.endings import endings_of
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
    asked = Prompt(id=0, content="6+6=")
    prompt = render(asked, tokenizer)
    ids = encode_response(response, asked, tokenizer, endings_of(tokenizer))
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
