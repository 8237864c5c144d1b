"""The ids of a text that continues another, and the text of such ids. Of any tokenizer of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Texts to continue. Of a word-level tokenizer none fits; then the ids are those of the text alone.
BEFORE = ("\n", ".", "a")


def ids_after(text: str, tokenizer: Any, **options: Any) -> list[int]:
    """The ids of a text in the middle of another, without special tokens. `options` are the tokenizer's.

    A SentencePiece tokenizer puts a space before a text, which would separate a response from its prompt: there
    `decode(prompt_ids + ids)` is not the prompt's text and the response's. Encoded behind another text, and without its
    ids, the response has no such space.
    """

    def encode(given: str) -> list[int]:
        return tokenizer(given, add_special_tokens=False, **options).input_ids

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    alone = encode(text)
    for before in BEFORE:
        try:
            first = encode(before)
        except Exception:  # the type that `tokenizers` raises for a character without a token
            continue
        start, spaced = decode(first), decode(first + alone)
        if spaced == start + text:
            return alone
        joined = encode(before + text)
        fits = first and joined[: len(first)] == first and spaced.startswith(f"{start} ")
        if fits and decode(joined) == start + spaced[len(start) + 1 :]:
            return joined[len(first) :]
    return alone


def text_after(before: Sequence[int], ids: Sequence[int], tokenizer: Any) -> str:
    """The text of `ids` behind `before`, without special tokens: with the space between them, if there is one.

    Decoded alone, tokens of SentencePiece lose their first space (`▁`), which the decoder takes for the one that the
    tokenizer puts before a text. Behind an added token, which begins a text anew for some tokenizers, it may be that.
    """
    alone = tokenizer.decode(ids, skip_special_tokens=True)
    if not before or not ids or not tokenizer.convert_ids_to_tokens(int(ids[0])).startswith("▁"):
        return alone
    last = int(before[-1])
    if last in tokenizer.added_tokens_decoder:
        return alone
    start = tokenizer.decode([last], skip_special_tokens=True)
    joined = tokenizer.decode([last, *ids], skip_special_tokens=True)
    return joined[len(start) :] if joined.startswith(start) else alone
