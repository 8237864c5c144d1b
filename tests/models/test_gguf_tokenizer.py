"""The tokenizers of GGUF files: where text is cut, merges, special tokens, and what is said of unknown rules.

The expected pieces follow from llama.cpp's patterns. `benchmarks/gguf_tokenizers.py` compares whole vocabularies.
"""

import re

import pytest
from support.gguf_files import CONTROL, USER_DEFINED, byte_level, model_file, spelled, write_file

from opd.models import gguf
from opd.models.gguf_file import read_gguf
from opd.models.gguf_splits import SPLITS
from opd.models.gguf_tokenizer import end_ids, read_tokenizer
from opd.models.loading import load_model, load_tokenizer
from opd.models.preview import known_weights
from opd.recipe.schema import ModelSpec

# The first of two words that overlap is merged first.
WORDS = (
    "\n\n",
    "\n\n\n",
    "  ",
    "   ",
    " 12",
    "1234567",
    "12",
    "'s",
    "'S",
    " b",
    "HelloWorld",
    "Hello",
    "World",
    " ½",
    "½",
)
WORDS += ("::", "!\n", "ab", *("1234567"[i:j] for i in range(7) for j in range(i + 2, 8)))


def tokenizer_of(folder, metadata):
    return read_tokenizer(read_gguf(write_file(folder / "vocabulary.gguf", metadata)))[0]


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))


def test_splits_have_patterns_of_the_library(tmp_path):
    from tokenizers import Regex

    assert all(Regex(pattern) for split in SPLITS.values() for pattern in split.patterns)
    assert len(SPLITS) > 70


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("smollm", "a:\n\n1. b", ["a", ":", "\n\n", "1", ".", " b"]),
        ("gpt-2", "a:\n\n1. b", ["a", ":", "\n", "\n", "1", ".", " b"]),
        ("smollm", "x 12", ["x", " ", "1", "2"]),
        ("gpt-2", "x 12", ["x", " 12"]),
        ("qwen2", "x 12", ["x", " ", "1", "2"]),
        ("llama-bpe", "x 12", ["x", " ", "12"]),
        ("llama-bpe", "1234567", ["123", "456", "7"]),
        ("default", "1234567", ["123", "456", "7"]),
        ("falcon", "1234567", ["123", "456", "7"]),
        ("tiny_aya", "1234567", ["1", "234", "567"]),
        ("deepseek-v3", "1234567", ["123", "456", "7"]),
        ("deepseek-llm", "1234567", ["1234567"]),
        ("deepseek-coder", "1234567", list("1234567")),
        ("viking", "1234567", list("1234567")),
        ("bloom", "1234567", ["1234567"]),
        ("gpt-2", "a'S", ["a", "'", "S"]),
        ("llama-bpe", "a'S", ["a", "'S"]),
        ("gpt-2", "a's", ["a", "'s"]),
        ("ufakzeka", "a's", ["a", "'s"]),
        ("tekken", "HelloWorld", ["Hello", "World"]),
        ("gpt-4o", "HelloWorld", ["Hello", "World"]),
        ("qwen2", "HelloWorld", ["HelloWorld"]),
        ("smollm", "4 ½", ["4", " ", "½"]),
        ("gpt-2", "4 ½", ["4", " ½"]),
        ("deepseek-llm", "a\n\n\nb", ["a", "\n", "\n", "\n", "b"]),
        ("qwen2", "a\n\n\nb", ["a", "\n\n\n", "b"]),
        ("qwen2", "!\n", ["!\n"]),
        ("smollm", "!\n", ["!", "\n"]),
        ("stablelm2", "a   b", ["a", "  ", " b"]),
        ("chatglm-bpe", "1234", ["123", "4"]),
        ("falcon", "::a", ["::", "a"]),
        ("superbpe", "1234567", ["1", "234", "567"]),
    ],
)
def test_read_tokenizer_cuts_text_as_named(tmp_path, name, text, expected):
    tokenizer = tokenizer_of(tmp_path, byte_level(WORDS) | {"tokenizer.ggml.pre": name})
    assert pieces(tokenizer, text) == [spelled(piece) for piece in expected]
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize(("name", "expected"), [("llama-bpe", ["xyz"]), ("smollm", ["x", "y", "z"])])
def test_read_tokenizer_ignores_merges_as_named(tmp_path, name, expected):
    vocabulary = byte_level(["ab"]) | {"tokenizer.ggml.pre": name}
    vocabulary["tokenizer.ggml.tokens"].append("xyz")  # no merge makes it
    vocabulary["tokenizer.ggml.token_type"].append(1)
    assert pieces(tokenizer_of(tmp_path, vocabulary), "xyz") == expected


@pytest.mark.parametrize(
    ("name", "stated", "adds"),
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("smollm", None, False), ("smollm", True, True)],
)
def test_read_tokenizer_adds_bos_as_stated(tmp_path, name, stated, adds):
    vocabulary = byte_level(["ab"], **{"<bos>": CONTROL, "<eos>": CONTROL}) | {"tokenizer.ggml.pre": name}
    vocabulary["tokenizer.ggml.bos_token_id"] = vocabulary["tokenizer.ggml.eos_token_id"] - 1
    if stated is not None:
        vocabulary["tokenizer.ggml.add_bos_token"] = stated
    tokenizer = tokenizer_of(tmp_path, vocabulary)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab").input_ids) == ["<bos>"] * adds + ["ab"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<eos>")


def test_read_tokenizer_keeps_special_tokens_whole(tmp_path):
    end, two_spaces = "<\uff5cend\u2581of\u2581sentence\uff5c>", "  "
    vocabulary = byte_level(["ab"], **{two_spaces: USER_DEFINED, end: CONTROL}) | {"tokenizer.ggml.pre": "qwen2"}
    tokenizer = tokenizer_of(tmp_path, vocabulary)
    ids = tokenizer.encode(f"ab  ab{end}", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["ab", "  ", "ab", end]
    assert len(tokenizer) == len(vocabulary["tokenizer.ggml.tokens"])  # no token was added
    assert tokenizer.decode(ids) == f"ab  ab{end}"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab  ab"


def sentencepiece(**settings):
    """<unk>, <s>, </s>, bytes, and pieces, of which the later ones have a lower score."""
    parts = ["\u2581", "a", "b", "c", "\u2581a", "ab", "bc", "\u2581\u2581"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *parts]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(parts))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(parts),
        **settings,
    }


@pytest.mark.parametrize(
    ("prefix", "text", "expected"),
    [
        (None, "abc", ["<s>", "\u2581a", "bc"]),  # "▁a" has a higher score than "ab"
        (True, "abc", ["<s>", "\u2581a", "bc"]),
        (False, "abc", ["<s>", "ab", "c"]),
        (None, " ab", ["<s>", "\u2581", "\u2581a", "b"]),  # a leading space is a second one
        (None, "  b", ["<s>", "\u2581", "\u2581\u2581", "b"]),
        (False, "\u00e9", ["<s>", "<0xC3>", "<0xA9>"]),
        (False, "\n", ["<s>", "<0x0A>"]),
    ],
)
def test_read_tokenizer_merges_sentencepiece_by_score(tmp_path, prefix, text, expected):
    stated = {} if prefix is None else {"tokenizer.ggml.add_space_prefix": prefix}
    tokenizer = tokenizer_of(tmp_path, sentencepiece(**stated))
    ids = tokenizer(text).input_ids
    assert sorted(tokenizer.convert_ids_to_tokens(ids)) == sorted(expected)
    assert tokenizer.decode(ids[1:]) == text


@pytest.mark.parametrize("name", [None, "of-next-year"])
def test_load_model_notes_that_cuts_are_unknown(tmp_path, monkeypatch, name):
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    file, _ = model_file(tmp_path / "model.gguf", add={"tokenizer.ggml.pre": name or ""})
    if name is None:
        monkeypatch.setattr("opd.models.gguf_file.GGUFFile.get", lambda self, key: _without_pre(self, key))
    for _ in range(2):  # a converted file, too
        notes = load_model(ModelSpec(path=str(file)), name="student").notes
        (note,) = (note for note in notes if "pre-tokenizer" in note)
        assert re.match(r"student: .*model\.gguf states (no pre-tokenizer|the pre-tokenizer 'of-next-year')", note)
        assert note.removeprefix("student: ") in known_weights(ModelSpec(path=str(file)), "student")[0]
    folder = gguf.convert_gguf(file)
    tokenizer = load_tokenizer(folder, trust_remote_code=False, where="student")
    assert pieces(tokenizer, "x 12") == ["x", "Ġ", "1", "2"]


def _without_pre(file, key):
    return None if key == "tokenizer.ggml.pre" else file.metadata.get(key)


def test_load_tokenizer_keeps_cuts_when_kind_has_own_class(tmp_path, monkeypatch):
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    file, _ = model_file(tmp_path / "model.gguf", "qwen2", vocabulary=byte_level(["1234"], **{"<eos>": CONTROL}))
    folder = gguf.convert_gguf(file)
    tokenizer = load_tokenizer(folder, trust_remote_code=False, where="student")
    assert pieces(tokenizer, "1234") == ["1234"]  # AutoTokenizer cuts a qwen2's digits apart
    tokenizer.save_pretrained(tmp_path / "trained")
    (tmp_path / "trained/config.json").write_text((folder / "config.json").read_text())
    again = load_tokenizer(tmp_path / "trained", trust_remote_code=False, where="student")
    assert pieces(again, "1234") == ["1234"]


@pytest.mark.parametrize(
    ("special", "stated", "expected"),
    [
        (("<|im_end|>", "<eos>"), {}, {"<|im_end|>", "<eos>"}),
        (("<turn>", "<eos>"), {"eot": "<turn>"}, {"<turn>", "<eos>"}),
        (("<turn>", "<tool>", "<eos>"), {"eot": "<turn>", "eom": "<tool>"}, {"<turn>", "<tool>", "<eos>"}),
        (("<|end|>", "<|call|>", "<|return|>"), {}, {"<|call|>", "<|return|>"}),
        (("<unrelated>", "<eos>"), {}, {"<eos>"}),
    ],
)
def test_end_ids_are_all_tokens_that_end_a_turn(tmp_path, special, stated, expected):
    vocabulary = byte_level(["ab"], **dict.fromkeys(special, CONTROL))
    tokens = vocabulary["tokenizer.ggml.tokens"]
    vocabulary |= {f"tokenizer.ggml.{role}_token_id": tokens.index(token) for role, token in stated.items()}
    ids = end_ids(read_gguf(write_file(tmp_path / "vocabulary.gguf", vocabulary)))
    assert {tokens[i] for i in ids} == expected
