"""Tokenizers that cut differently, and pairs of tiny models over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opd.models.language_model import LanguageModel
from support.models import CHAT_TEMPLATE, tiny

SPECIAL = ("<pad>", "<eos>")


def wrapped(core: Any, special: Sequence[str] = SPECIAL) -> Any:
    """A transformers tokenizer: the first special token pads, the second ends."""
    from transformers import PreTrainedTokenizerFast

    core.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=special[0], eos_token=special[1])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def byte_bpe(*merges: str, special: Sequence[str] = SPECIAL, last: bool = False) -> Any:
    """Byte-level BPE over all bytes; a merge is two tokens and a blank between them, Ġ for a space.

    `last` puts the special tokens behind all others.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    text = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]
    tokens = [*text, *special] if last else [*special, *text]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return wrapped(core, special)


def sentence_piece(*merges: str, characters: str = "", prefix: bool = False, special: Sequence[str] = SPECIAL) -> Any:
    """BPE as SentencePiece writes it: ▁ for a space, <0xNN> for the bytes of characters that it does not know.

    `prefix` puts a space before every text.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    pairs = [tuple(merge.split(" ")) for merge in merges]
    single = dict.fromkeys(["▁", *characters, *(c for pair in pairs for part in pair for c in part)])
    pieces = [*(f"<0x{b:02X}>" for b in range(256)), *single, *("".join(pair) for pair in pairs)]
    tokens = [*special, "<unk>", *dict.fromkeys(pieces)]
    core = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)}, merges=pairs, unk_token="<unk>", byte_fallback=True
        )
    )
    spaces = [normalizers.Replace(" ", "▁")]
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if prefix else spaces)  # type: ignore[assignment]
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])  # type: ignore[assignment]
    return wrapped(core, (*special, "<unk>"))


def trained_bpe(text: str, size: int) -> Any:
    """Byte-level BPE that is trained on a text, of `size` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        ),
    )
    return wrapped(core)


def ids_of(tokenizer: Any, *pieces: str) -> list[int]:
    """The ids of tokens by what they stand for in a byte-level vocabulary."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[piece] for piece in pieces]


def renumbered(lm: LanguageModel, tokenizer: Any) -> LanguageModel:
    """The same model over a tokenizer with the same tokens in another order."""
    other = tiny(tokenizer=tokenizer, hidden=lm.head().weight.shape[1], name="renumbered")
    old, new = lm.tokenizer.get_vocab(), tokenizer.get_vocab()
    place = torch.zeros(len(new), dtype=torch.long)
    for token, i in new.items():
        place[i] = old[token]
    theirs = dict(lm.model.named_parameters())
    with torch.no_grad():
        for name, parameter in other.model.named_parameters():
            moved: Tensor = theirs[name]
            parameter.copy_(moved[place] if name.endswith(("embed_tokens.weight", "lm_head.weight")) else moved)
    return other
