"""The tokenizer that a GGUF file describes: its tokens, merges and scores, and how text is cut before they apply.

llama.cpp defines what the metadata means. transformers 5.23 differs from it: most names of `tokenizer.ggml.pre` change
nothing, control tokens with characters outside the byte alphabet are cut into pieces, a user-defined token of spaces is
not found, and a SentencePiece text that begins with a space loses one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd.models.gguf_file import GGUFFile
from opd.models.gguf_splits import SPLITS, Split

CONTROL, USER_DEFINED = 3, 4  # of `tokenizer.ggml.token_type`
SPACE = "\u2581"  # SentencePiece's space

# The tokens that end a turn or a text, which llama.cpp finds by name, because most files do not state them.
ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>"),
    *("<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~["),
)
# Tokens of Phi-3 after which white space is kept; after its other special tokens, white space is part of the token.
KEEPS_SPACE = ("<unk>", "<s>", "<|endoftext|>")


def read_tokenizer(file: GGUFFile) -> tuple[Any, list[str]]:
    """The tokenizer of a GGUF file, and notes on what could not be read as llama.cpp reads it."""
    from transformers import PreTrainedTokenizerFast

    get = file.get
    kind, name = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")
    split = SPLITS.get(name or "")
    if kind == "llama":
        core = _sentencepiece(file)
    elif kind == "gpt2" and split is not None:
        core = _byte_level(file, split)
    else:
        notes = [] if kind != "gpt2" else [_unknown(file.path.name, name)]
        return PreTrainedTokenizerFast.from_pretrained(file.path.parent, gguf_file=file.path.name), notes
    tokens: list[str] = get("tokenizer.ggml.tokens")
    for special, added in _added_tokens(file).items():
        (core.add_special_tokens if special else core.add_tokens)(added)
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if kind == "llama" else {}
    ids = {role: get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "unknown", "padding")}
    ids = {role: defaults.get(role) if i is None else i for role, i in ids.items()}
    named = {role: tokens[i] if i is not None and i < len(tokens) else None for role, i in ids.items()}
    adds_bos = get("tokenizer.ggml.add_bos_token")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=named["bos"],
        eos_token=named["eos"],
        unk_token=named["unknown"],
        pad_token=named["padding"],
        add_bos_token=(kind == "llama" or (split is not None and split.adds_bos)) if adds_bos is None else adds_bos,
        add_eos_token=bool(get("tokenizer.ggml.add_eos_token")),
        chat_template=get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )
    return tokenizer, []


def reads(file: GGUFFile) -> bool:
    """Whether `read_tokenizer` reads the tokenizer itself, and does not leave it to transformers."""
    kind = file.get("tokenizer.ggml.model")
    return kind == "llama" or (kind == "gpt2" and (file.get("tokenizer.ggml.pre") or "") in SPLITS)


def end_ids(file: GGUFFile) -> list[int]:
    """The ids that end a response: the tokens that the file states, and its control tokens with a name of `ENDS`."""
    tokens, types = file.get("tokenizer.ggml.tokens") or [], file.get("tokenizer.ggml.token_type") or []
    control = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=False)) if kind == CONTROL}
    named = {control[name] for name in ENDS if name in control}
    if {"<|return|>", "<|flush|>"} & control.keys():  # there, `<|end|>` is the end of a part of a turn
        named -= {control.get("<|end|>", -1)}
    stated = (file.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom"))
    return sorted(named | {i for i in stated if i is not None and i < len(tokens)})


def _unknown(file: str, name: str | None) -> str:
    states = "no pre-tokenizer (tokenizer.ggml.pre)" if name is None else f"the pre-tokenizer {name!r}"
    return (
        f"{file} states {states}, for which opd has no rule, so its text is cut into tokens as transformers does "
        "it, and the token ids may differ from those that the model was trained on. Compare them with the model's own "
        "tokenizer, or use the model's Hugging Face folder."
    )


def _byte_level(file: GGUFFile, split: Split) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(file.get("tokenizer.ggml.tokens"))}
    merges: list[tuple[str, str]] = []
    for text in file.get("tokenizer.ggml.merges") or ():
        cut = text.index(" ", 1)
        if {text[:cut], text[cut + 1 :], text[:cut] + text[cut + 1 :]} <= vocabulary.keys():
            merges.append((text[:cut], text[cut + 1 :]))
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.ignore_merges))
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns]
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    return core


def _sentencepiece(file: GGUFFile) -> Any:
    """Byte-pair merges by score: a pair may merge if the file has its token, the highest score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens: list[str] = file.get("tokenizer.ggml.tokens")
    scores: list[float] = file.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    unknown = file.get("tokenizer.ggml.unknown_token_id") or 0
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token, i in sorted(vocabulary.items(), key=lambda item: (-scores[item[1]], item[1]))
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    core = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    prefix = file.get("tokenizer.ggml.add_space_prefix") is not False
    spaces = normalizers.Replace(" ", SPACE)
    core.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    core.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return core


def _added_tokens(file: GGUFFile) -> Mapping[bool, list[Any]]:
    """The tokens that are matched as whole texts before the text is cut, by whether they are special."""
    from tokenizers import AddedToken

    phi3 = any(name in (file.get("general.name") or "").lower() for name in ("phi-3", "phi3"))
    found: dict[bool, list[Any]] = {True: [], False: []}
    types = file.get("tokenizer.ggml.token_type") or ()
    for token, kind in zip(file.get("tokenizer.ggml.tokens"), types, strict=False):
        if token and kind in (CONTROL, USER_DEFINED):
            strip = phi3 and token not in KEEPS_SPACE
            added = AddedToken(token, normalized=False, special=kind == CONTROL, rstrip=strip)
            found[kind == CONTROL].append(added)
    return found
