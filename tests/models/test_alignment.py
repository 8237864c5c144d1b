"""Two tokenisations of one text: bytes of tokens, units, and what a teacher reads of a response."""

from __future__ import annotations

import itertools
import random
from typing import Any

import oracle
import pytest
from support.models import byte_tokenizer
from support.pairs import byte_bpe, ids_of, sentence_piece, trained_bpe, wrapped

from opd.errors import AlignmentError
from opd.models.alignment import TeacherTokens, TokenizerPair, Unit, pair_of, retokenise
from opd.models.new import character_tokenizer
from opd.models.vocabularies import Vocabulary, vocabulary_of

TEXT = "happy people say 42! ¡Qué bueno! 你好世界 🙂👩‍🚀 naïve café e\u0301"
HAP_PY = byte_bpe("h a", "ha p", "p y")
HA_PP_Y = byte_bpe("h a", "p p", last=True)


def texts(units: list[Unit] | tuple[Unit, ...], pieces: list[bytes]) -> list[bytes]:
    return [b"".join(pieces[i] for i in unit.student) for unit in units]


def read(student: Any, teacher: Any, text: str) -> tuple[list[bytes], TeacherTokens, TokenizerPair]:
    """The student's pieces of a text, and its reading by the teacher."""
    pair = pair_of(student, teacher)
    ids = student(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return [pair.student.pieces[i] for i in ids], retokenise(ids, pair), pair


# --- cuts -----------------------------------------------------------------------------------------------------------


def units(student: list[bytes], teacher: list[bytes]) -> list[tuple[list[int], list[int]]]:
    """Units of one text in two tokenisations that are given: student tokens and teacher tokens of each."""

    def vocabulary(pieces: list[bytes]) -> Vocabulary:
        return Vocabulary(pieces=dict(enumerate(pieces)), special={}, written_as={})

    def write(text: str) -> range:
        assert text.encode() == b"".join(student) == b"".join(teacher)
        return range(len(teacher))

    pair = TokenizerPair(
        student=vocabulary(student), teacher=vocabulary(teacher), shared={}, ends={}, same=False, write=write
    )
    return [(list(unit.student), list(unit.teacher)) for unit in retokenise(range(len(student)), pair).units]


def test_reread_keeps_mismatch_apart_from_next_token():
    """hap|py|! and ha|pp|y|!: the greedy rule of the released code merges the mark."""
    assert units([b"hap", b"py", b"!"], [b"ha", b"pp", b"y", b"!"]) == [([0, 1], [0, 1, 2]), ([2], [3])]


def test_reread_gives_unit_when_mismatch_is_last():
    """4|2 and 42: the greedy rule of the released code loses it."""
    assert units([b"4", b"2"], [b"42"]) == [([0, 1], [0])]


def test_reread_gives_one_token_units_when_cuts_are_equal():
    assert units([b"a", b"bcde", b"fg"], [b"a", b"bcde", b"fg"]) == [([t], [t]) for t in range(3)]


def test_reread_joins_empty_token_to_next_or_last_unit():
    assert units([b"ab", b"", b"c"], [b"ab", b"c"]) == [([0], [0]), ([1, 2], [1])]
    assert units([b"ab", b"c", b""], [b"", b"ab", b"c"]) == [([0], [0, 1]), ([1, 2], [2])]


@pytest.mark.parametrize("seed", range(20))
def test_reread_gives_finest_common_units(seed: int):
    generator = random.Random(seed)
    text = bytes(generator.randrange(3) for _ in range(generator.randrange(1, 25)))

    def cut() -> list[bytes]:
        places = sorted({0, len(text), *(generator.randrange(len(text) + 1) for _ in range(8))})
        return [text[a:b] for a, b in itertools.pairwise(places)]

    student, teacher = cut(), cut()
    assert units(student, teacher) == oracle.aligned_units(student, teacher)


# --- what tokens stand for ------------------------------------------------------------------------------------------


def test_vocabulary_of_gives_bytes_when_byte_level():
    vocabulary = vocabulary_of(byte_bpe("Ġ t", "Ġt h"))
    ids = {piece: i for i, piece in vocabulary.pieces.items()}
    assert len(ids) == 256 + 2
    assert {b" t", b" th", b"\n", b"\xff"} <= set(ids)
    assert vocabulary.special == {0: "<pad>", 1: "<eos>"}


def test_vocabulary_of_gives_bytes_when_sentence_piece():
    tokenizer = sentence_piece("▁ t", characters="é")
    vocabulary = vocabulary_of(tokenizer)
    by_name = {token: vocabulary.pieces.get(i) for token, i in tokenizer.get_vocab().items()}
    assert by_name["▁t"] == b" t"
    assert by_name["é"] == "é".encode()
    assert by_name["<0x74>"] == b"t"
    assert by_name["<unk>"] is None
    assert vocabulary.written_as[b"t"] == tokenizer.get_vocab()["t"], "not its fallback"


def test_vocabulary_of_gives_bytes_of_added_tokens():
    tokenizer = character_tokenizer("ab🙂")
    tokenizer.add_tokens(["Ġab"])
    pieces = set(vocabulary_of(tokenizer).pieces.values())
    assert pieces == {b"a", b"b", "🙂".encode(), "Ġab".encode()}


def test_vocabulary_of_refuses_decoder_that_hides_bytes():
    from tokenizers import Tokenizer, decoders, models

    core = Tokenizer(models.WordPiece({"<pad>": 0, "<eos>": 1, "a": 2, "##b": 3}, unk_token="<pad>"))
    core.decoder = decoders.WordPiece()  # type: ignore[assignment]
    with pytest.raises(AlignmentError, match=r"decodes with WordPiece, so .* Tokens of byte-level BPE"):
        vocabulary_of(wrapped(core))
    core.decoder = None  # type: ignore[assignment]
    with pytest.raises(AlignmentError, match=r"no decoder of the `tokenizers` library.* Use a fast tokenizer"):
        vocabulary_of(wrapped(core))


# --- what both have -------------------------------------------------------------------------------------------------


def test_pair_of_shares_tokens_by_bytes():
    student, teacher = byte_bpe("Ġ t", "h a"), sentence_piece("▁ t", "p y", characters="ha")
    pair = pair_of(student, teacher)
    both = {pair.student.pieces[i] for i in pair.shared if i in pair.student.pieces}
    assert b" t" in both
    assert b"ha" not in both
    assert b"\xf0" in both, "a byte fallback is a token of that byte"
    a, b = ids_of(student, "h")[0], ids_of(teacher, "h")[0]
    assert pair.shared[a] == b


def named(pair: TokenizerPair) -> dict[str, str]:
    return {
        pair.student.special[s]: pair.teacher.special[t] for s, t in pair.shared.items() if s in pair.student.special
    }


def test_pair_of_shares_ends_by_role_and_specials_by_name():
    student = byte_bpe(special=("<pad>", "<|im_end|>", "<tool>", "<only>"))
    teacher = byte_bpe(special=("<pad>", "<eos>", "<tool>", "<|im_end|>"), last=True)
    assert named(pair_of(student, teacher)) == {"<pad>": "<pad>", "<|im_end|>": "<eos>", "<tool>": "<tool>"}


def turns(end: str) -> str:
    return "{% for m in messages %}{{ m.role }}:{{ m.content }}" + end + "{% endfor %}"


@pytest.mark.parametrize("text", [False, True], ids=["a special token", "an added token of text"])
def test_pair_of_shares_end_of_turn_first_when_chat(text: bool):
    """As of models that end a turn with a token of its own, and a sequence with another."""
    student = byte_bpe(special=("<pad>", "<|im_end|>"))
    student.chat_template = turns("<|im_end|>\n")
    teacher = byte_bpe(special=("<pad>", "<eos>") if text else ("<pad>", "<eos>", "<end_of_turn>"), last=True)
    if text:
        teacher.add_tokens(["<end_of_turn>"])
    teacher.chat_template = turns("<end_of_turn>\n")
    over = teacher.get_vocab()["<end_of_turn>"]
    pair = pair_of(student, teacher, chat=True)
    assert pair.ends == {1: over}
    assert named(pair) == {"<pad>": "<pad>", "<|im_end|>": "<end_of_turn>"}
    assert pair_of(student, teacher).ends == {1: teacher.eos_token_id}
    reading = retokenise([*ids_of(student, "h", "i"), 1], pair)
    assert reading.teacher_ids[-1] == over
    assert len(reading.units) == 3
    back = pair_of(teacher, student, chat=True)
    assert back.ends == {over: 1}, "nothing is left for the teacher's own end of a sequence"
    assert retokenise([*ids_of(teacher, "h", "i"), over], back).teacher_ids[-1] == 1


def test_pair_of_shares_eos_when_turn_ends_with_text():
    student, teacher = byte_bpe(), byte_bpe(special=("<pad>", "<end>"))
    student.chat_template = turns("\n")
    teacher.chat_template = turns("<end>")
    assert pair_of(student, teacher, chat=True).ends == {1: 1}


def test_pair_of_refuses_tokenizers_without_common_token():
    with pytest.raises(AlignmentError, match=r"\(2 tokens of text\) and .* \(3\) have no token of text in common"):
        pair_of(character_tokenizer("ab"), character_tokenizer("cde"))


# --- what a teacher reads of a response -----------------------------------------------------------------------------


def test_reread_gives_paper_units_when_tokenizers_are_real():
    pieces, reading, pair = read(HAP_PY, HA_PP_Y, "happy!")
    assert pieces == [b"hap", b"py", b"!"]
    assert [pair.teacher.pieces[i] for i in reading.teacher_ids] == [b"ha", b"pp", b"y", b"!"]
    assert texts(reading.units, pieces) == [b"happy", b"!"]
    ids = ids_of(HAP_PY, "hap", "py", "!")
    assert [pair.shares(unit, ids, reading.teacher_ids) for unit in reading.units] == [False, True]
    pieces, reading, _ = read(byte_bpe(), byte_bpe("4 2"), "x42")
    assert texts(reading.units, pieces) == [b"x", b"42"]


@pytest.mark.parametrize(
    "teacher",
    [
        byte_bpe("h a", "Ġ p", last=True),
        sentence_piece("h a", "▁ p", characters="你好世界é"),
        sentence_piece("h a", "▁ p", characters="你好世界é", prefix=True),
        trained_bpe(TEXT * 3, 330),
    ],
    ids=["byte_level", "fallback", "prefix", "trained"],
)
@pytest.mark.parametrize("student", [HAP_PY, sentence_piece("p p"), trained_bpe(TEXT, 290)], ids=["bpe", "sp", "train"])
def test_reread_covers_every_byte_and_equals_oracle(student: Any, teacher: Any):
    pieces, reading, pair = read(student, teacher, TEXT)
    assert b"".join(texts(reading.units, pieces)) == TEXT.encode()
    theirs = [pair.teacher.pieces[i] for i in reading.teacher_ids]
    if b"".join(theirs) == TEXT.encode():
        got = [(list(unit.student), list(unit.teacher)) for unit in reading.units]
        assert got == oracle.aligned_units(pieces, theirs)
    else:  # a space before the text, which is in its first token
        assert b"".join(theirs) == b" " + TEXT.encode()
        assert reading.units[0].teacher.start == 0
        assert sum(len(unit.teacher) for unit in reading.units) == len(theirs)


def test_reread_gives_one_unit_when_emoji_spans_tokens():
    pieces, reading, pair = read(byte_bpe(), sentence_piece(characters="🙂a"), "a🙂a")
    assert texts(reading.units, pieces) == [b"a", "🙂".encode(), b"a"]
    assert [len(unit.student) for unit in reading.units] == [1, 4, 1]
    assert [pair.teacher.pieces[i] for i in reading.teacher_ids] == [b"a", "🙂".encode(), b"a"]


def test_reread_writes_no_space_before_response():
    """SentencePiece puts a space before a text; a response follows its prompt, and the student wrote no space."""
    for merges in (["▁ t"], []):
        pieces, reading, pair = read(byte_bpe(), sentence_piece(*merges, characters="te", prefix=True), "te")
        assert [pair.teacher.pieces[i] for i in reading.teacher_ids] == [b"t", b"e"]
        assert texts(reading.units, pieces) == [b"t", b"e"]
        assert [list(unit.teacher) for unit in reading.units] == [[0], [1]]


def test_reread_leaves_invalid_bytes_out_of_units():
    student, teacher = byte_bpe(), sentence_piece("a b", characters="abc🙂")
    pair = pair_of(student, teacher)
    alone = {piece: i for i, piece in pair.student.pieces.items()}
    ids = [alone[bytes([b])] for b in b"ab\xf0\x9fc" + "🙂".encode()[:3]]  # half of a character, twice
    reading = retokenise(ids, pair)
    assert [(list(unit.student), list(unit.teacher)) for unit in reading.units] == [([0, 1], [0]), ([4], [4])]
    assert pair.teacher.pieces[reading.teacher_ids[0]] == b"ab"
    shown = b"".join(pair.teacher.pieces[i] for i in reading.teacher_ids)
    assert shown.decode() == "ab\ufffdc\ufffd"
    assert reading.student_bytes == (1,) * 8


def test_reread_leaves_half_text_token_out_of_units():
    student, teacher = byte_bpe("a ð"), sentence_piece(characters="ab")
    pair = pair_of(student, teacher)
    reading = retokenise(ids_of(student, "b", "að", "b"), pair)
    assert [list(unit.student) for unit in reading.units] == [[0], [2]]


def test_reread_pairs_or_hides_special_tokens():
    student = byte_bpe(special=("<pad>", "<|im_end|>", "<tool>", "<only>"))
    teacher = byte_bpe("a b", special=("<pad>", "<eos>", "<tool>"), last=True)
    pair = pair_of(student, teacher)
    ids = ids_of(student, "a", "<tool>", "a", "<only>", "b", "<|im_end|>")
    reading = retokenise(ids, pair)
    assert list(reading.teacher_ids) == ids_of(teacher, "a", "<tool>", "a", "b", "<eos>"), "not joined over <only>"
    assert [(list(u.student), list(u.teacher)) for u in reading.units] == [
        ([i], [j]) for i, j in zip([0, 1, 2, 4, 5], range(5), strict=True)
    ]
    assert reading.student_bytes == (1, 0, 1, 0, 1, 0)
    assert all(pair.shares(unit, ids, reading.teacher_ids) for unit in reading.units)


def test_reread_takes_spelt_special_token_as_text():
    pieces, reading, pair = read(byte_bpe(), byte_bpe("< e", last=True), "<eos>")
    assert pieces == [b"<", b"e", b"o", b"s", b">"]
    assert [pair.teacher.pieces[i] for i in reading.teacher_ids] == [b"<e", b"o", b"s", b">"]


def test_reread_gives_no_unit_when_teacher_normalises_text():
    from tokenizers import normalizers

    teacher = byte_bpe(last=True)
    teacher.backend_tokenizer.normalizer = normalizers.NFC()
    student = byte_bpe(special=("<pad>", "<eos>"))
    _, reading, pair = read(student, teacher, "e\u0301")
    assert reading.units == ()
    assert b"".join(pair.teacher.pieces[i] for i in reading.teacher_ids) == "é".encode()


def test_reread_leaves_only_normalised_text_out_of_units():
    from tokenizers import normalizers

    teacher = byte_bpe("b c", last=True)
    teacher.backend_tokenizer.normalizer = normalizers.NFC()
    student = byte_bpe(special=("<pad>", "<eos>"))
    pieces, reading, pair = read(student, teacher, "abce\u0301 e\u0301bc")
    assert b"".join(pair.teacher.pieces[i] for i in reading.teacher_ids) == "abcé ébc".encode()
    assert texts(reading.units, pieces) == [b"a", b"bc", b"bc"], "what lies between two changes counts as changed"
    for unit in reading.units:
        theirs = b"".join(pair.teacher.pieces[reading.teacher_ids[i]] for i in unit.teacher)
        assert theirs == b"".join(pieces[i] for i in unit.student)


@pytest.mark.parametrize("seed", range(30))
def test_reread_units_have_equal_text_when_teacher_normalises(seed: int):
    from tokenizers import normalizers

    generator = random.Random(seed)
    teacher = generator.choice([byte_bpe("a a", "b a", last=True), sentence_piece("a a", "b a", characters="é ")])
    normalizer = generator.choice([normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace("a", "bb")])
    core = teacher.backend_tokenizer
    core.normalizer = normalizer if core.normalizer is None else normalizers.Sequence([normalizer, core.normalizer])
    text = "".join(generator.choice(["a", "b", "aa", "B", "e\u0301", " ", "🙂"]) for _ in range(12))
    pieces, reading, pair = read(byte_bpe("a b", "b b"), teacher, text)
    for unit in reading.units:
        theirs = b"".join(pair.teacher.pieces[reading.teacher_ids[i]] for i in unit.teacher)
        ours = b"".join(pieces[i] for i in unit.student)
        assert theirs in (ours, b" " + ours)
        assert theirs == ours or unit.student.start == 0
    inside = [i for unit in reading.units for i in unit.student]
    assert inside == sorted(set(inside))


def test_reread_is_empty_when_response_is_unshared_specials():
    student = byte_bpe(special=("<pad>", "<eos>", "<only>"))
    pair = pair_of(student, byte_bpe(last=True))
    reading = retokenise(ids_of(student, "<only>", "<only>"), pair)
    assert (reading.teacher_ids, reading.units) == ((), ())


def test_reread_keeps_ids_when_tokenizers_are_the_same():
    """Not those that it would write itself: here h|a|p, where the tokenizer makes one token."""
    pair = pair_of(HAP_PY, byte_bpe("h a", "ha p", "p y"))
    ids = ids_of(HAP_PY, "h", "a", "p", "<eos>")
    reading = retokenise(ids, pair)
    assert pair.same
    assert list(reading.teacher_ids) == ids
    assert all(pair.shares(unit, ids, reading.teacher_ids) for unit in reading.units)
    assert len(reading.units) == 4
    assert len(pair.shared) == len(HAP_PY.get_vocab())


def test_reread_covers_text_when_student_reads_bytes():
    pieces, reading, _ = read(byte_tokenizer(), trained_bpe(TEXT * 5, 340), TEXT)
    assert len(reading.units) < len(pieces)
    assert b"".join(texts(reading.units, pieces)) == TEXT.encode()
