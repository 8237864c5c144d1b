"""Ids as text in which every token can be seen: special tokens, parts of characters, doubled tokens."""

from __future__ import annotations

from typing import Any

import pytest
from support.models import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd.models.shown import end_texts, text_of_ids, token_texts


def metaspace_tokenizer(*, decoder: Any) -> Any:
    """Words with SentencePiece's mark for a space, after <s>, </s> and the bytes of é."""
    tokens = ["<s>", "</s>", "<0xC3>", "<0xA9>", "\u2581a", "b"]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


LLAMA = decoders.Sequence(
    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


@pytest.mark.parametrize("text", ["a é😀b\n<eos>", "<user>hi<assistant>", ""])
def test_token_texts_join_to_decoded_text(text: str):
    tokenizer = byte_tokenizer()
    (texts,) = token_texts([tokenizer(text).input_ids], tokenizer)
    assert "".join(texts) == text == text_of_ids(tokenizer(text).input_ids, tokenizer)


def test_token_texts_put_character_at_its_last_token():
    tokenizer = byte_tokenizer()
    assert token_texts([tokenizer("é<eos>").input_ids], tokenizer) == [["", "é", "<eos>"]]


def test_token_texts_show_unfinished_characters():
    tokenizer = byte_tokenizer()
    first, last = tokenizer("é").input_ids
    ends = tokenizer.eos_token_id
    rows = [[first, ends], [first], [last, ends]]
    assert token_texts(rows, tokenizer) == [["", "\ufffd<eos>"], ["\ufffd"], ["\ufffd", "<eos>"]]
    for row in rows:
        assert "".join(token_texts([row], tokenizer)[0]) == text_of_ids(row, tokenizer)


def test_token_texts_keep_spaces_of_sentencepiece():
    tokenizer = metaspace_tokenizer(decoder=LLAMA)
    assert token_texts([[4, 5, 4, 2, 3, 1]], tokenizer) == [[" a", "b", " a", "", "é", "</s>"]]


def test_token_texts_decode_alone_when_bytes_are_unknown():
    tokenizer = metaspace_tokenizer(decoder=decoders.BPEDecoder(suffix="\u2581"))
    assert token_texts([[5, 1]], tokenizer) == [["b", "</s>"]]


def test_text_of_ids_shows_doubled_beginning():
    tokenizer = metaspace_tokenizer(decoder=LLAMA)
    assert text_of_ids([0, 0, 4], tokenizer) == "<s><s> a"


def test_end_texts_name_the_tokenizers_end_first():
    tokenizer = byte_tokenizer()
    newline = tokenizer("\n").input_ids[0]
    assert end_texts({0, tokenizer.eos_token_id, newline}, tokenizer) == f"<eos> (1) or <pad> (0) or '\\n' ({newline})"
