"""The ids of a text that continues another."""

from __future__ import annotations

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
