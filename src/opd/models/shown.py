"""Token ids as text that shows every token, special tokens included."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from opd.errors import AlignmentError
from opd.models.vocabularies import reader_of


def text_of_ids(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of the ids with its special tokens, as the tokenizer decodes it."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_texts(rows: Sequence[Sequence[int]], tokenizer: Any) -> list[list[str]]:
    """One text per token; joined, they are the text of the row with its special tokens.

    A character of several tokens is at the last of them. Bytes that are no character are U+FFFD. Unlike in
    `text_of_ids`, the first token keeps a space that SentencePiece puts before a word. If the bytes of the tokenizer's
    tokens are unknown, each token is decoded alone, so the joined text may lack spaces.
    """
    pieces = _pieces({i for row in rows for i in row}, tokenizer)
    return [_texts(row, pieces) for row in rows]


def texts_alone(ids: Collection[int], tokenizer: Any) -> dict[int, str]:
    """The text of each token by itself; the vocabulary's own string for bytes that are no text alone."""
    out: dict[int, str] = {}
    for i, piece in _pieces(ids, tokenizer).items():
        try:
            out[i] = piece.decode()
        except UnicodeDecodeError:
            out[i] = str(tokenizer.convert_ids_to_tokens([i])[0])
    return out


def end_texts(ids: Collection[int], tokenizer: Any) -> str:
    """Tokens with their ids, the tokenizer's end-of-sequence token first: `<|im_end|> (2) or <|endoftext|> (0)`."""
    ordered = sorted(ids, key=lambda i: (i != tokenizer.eos_token_id, i))
    texts = [text for (text,) in token_texts([[i] for i in ordered], tokenizer)]
    named = [text if text.strip() == text and text.isprintable() else repr(text) for text in texts]
    return " or ".join(f"{text} ({i})" for text, i in zip(named, ordered, strict=True))


def _texts(row: Sequence[int], pieces: Mapping[int, bytes]) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(pieces[i], final=t == len(row)) for t, i in enumerate(row, start=1)]


def _pieces(ids: Collection[int], tokenizer: Any) -> dict[int, bytes]:
    """The bytes of each token, of an added token those of its name; none for an id without a token."""
    try:
        read = reader_of(tokenizer)
    except AlignmentError:
        return {i: text_of_ids([i], tokenizer).encode() for i in ids}
    added, ordered = tokenizer.added_tokens_decoder, list(ids)
    tokens = zip(ordered, tokenizer.convert_ids_to_tokens(ordered), strict=True)
    return {i: b"" if token is None else token.encode() if i in added else read(token) for i, token in tokens}
