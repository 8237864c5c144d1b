"""Two tokenisations of one text: where each token lies in its bytes, and the smallest pieces that both cut out.

Bytes, because tokens need not end between characters: an emoji may be four tokens. What a token's bytes are is read
from the tokenizer's own decoder, never found by decoding a token alone, which turns half of a character into U+FFFD.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

from opd.errors import AlignmentError
from opd.render import turn_end

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
UNREADABLE = "\ufffd"  # what a teacher reads where bytes are no text

# GPT-2's printable stand-ins for bytes, as characters of a byte-level vocabulary.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [b for b in range(0x100) if b not in _PRINTABLE]
BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + n): b for n, b in enumerate(_OTHERS)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What the tokens of a tokenizer stand for, by id."""

    pieces: Mapping[int, bytes]  # tokens of text
    special: Mapping[int, str]  # tokens of no text, by name
    written_as: Mapping[bytes, int]  # the token for these bytes: of several, not the one of a byte fallback


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece that both tokenisations cut out: which student tokens it is, and which teacher tokens."""

    student: range
    teacher: range


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A response in the teacher's tokens, and the units of both, in order. A token may be in none."""

    teacher_ids: tuple[int, ...]
    units: tuple[Unit, ...]
    student_bytes: tuple[int, ...]  # of text, in each student token


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two vocabularies, and how the teacher's tokenizer writes a text."""

    student: Vocabulary
    teacher: Vocabulary
    shared: Mapping[int, int]  # student id -> id of the same token in the teacher's vocabulary
    ends: Mapping[int, int]  # of these, the tokens that end a response
    same: bool  # every token has the same id in both
    write: Callable[[str], Sequence[int]]

    def shares(self, unit: Unit, student_ids: Sequence[int], teacher_ids: Sequence[int]) -> bool:
        """Whether a unit is one token on either side, and the same one."""
        one = len(unit.student) == len(unit.teacher) == 1
        return one and self.shared.get(student_ids[unit.student[0]]) == teacher_ids[unit.teacher[0]]


def pair_of(
    student: Any, teacher: Any, *, chat: bool = False, options: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {})
) -> Pair:
    """Two tokenizers, compared token by token.

    What ends a response is the same token, whatever its names: both end-of-sequence tokens, and before these, where
    responses are turns of a `chat`, the tokens with which the templates, with their `options`, end a turn.

    Raises AlignmentError for a tokenizer whose tokens' bytes cannot be told, and for two without a common token.
    """
    turns = [_turn_end(one, given) if chat else None for one, given in zip((student, teacher), options, strict=True)]
    ends: dict[int, int] = {}
    for end, its in (turns, (student.eos_token_id, teacher.eos_token_id)):
        if end is not None and its is not None and end not in ends and its not in ends.values():
            ends[end] = its
    ours, theirs = vocabulary_of(student, ends), vocabulary_of(teacher, ends.values())
    same = student.get_vocab() == teacher.get_vocab() and all(end == its for end, its in ends.items())
    shared = {i: i for i in (*ours.pieces, *ours.special)} if same else shared_tokens(ours, theirs, ends)
    if not any(i in ours.pieces for i in shared):
        raise AlignmentError(
            f"The tokenizers {_name(student)} ({len(ours.pieces)} tokens of text) and {_name(teacher)} "
            f"({len(theirs.pieces)}) have no token of text in common, so there is nothing on which to compare student "
            "and teacher. Use a teacher that writes the same language in the same script."
        )

    def write(text: str) -> Sequence[int]:
        """Ids of a text; what looks like a special token in it is text."""
        return teacher(text, add_special_tokens=False, split_special_tokens=True).input_ids

    return Pair(student=ours, teacher=theirs, shared=shared, ends=ends, same=same, write=write)


def vocabulary_of(tokenizer: Any, ends: Collection[int] = ()) -> Vocabulary:
    """The bytes of each token; `ends` are no text.

    Raises AlignmentError for a tokenizer that does not say what its tokens stand for.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(core, "decoder", None)
    if decoder is None:
        raise AlignmentError(
            f"The tokenizer {_name(tokenizer)} has no decoder of the `tokenizers` library, so the bytes of its tokens "
            "cannot be told. Use a fast tokenizer (PreTrainedTokenizerFast) with a decoder."
        )
    read = _reader(json.loads(decoder.__getstate__()), tokenizer)
    added = tokenizer.added_tokens_decoder
    special = {i: token.content for i, token in added.items() if token.special or i in ends}
    pieces: dict[int, bytes] = {}
    written_as: dict[bytes, int] = {}
    fallback: dict[bytes, int] = {}
    for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if i not in special:
            pieces[i] = token.encode() if i in added else read(token)
            (fallback if BYTE.fullmatch(token) else written_as).setdefault(pieces[i], i)
    return Vocabulary(pieces=pieces, special=special, written_as={**fallback, **written_as})


def shared_tokens(student: Vocabulary, teacher: Vocabulary, ends: Mapping[int, int]) -> dict[int, int]:
    """Student id -> teacher id of tokens of the same bytes, of special tokens of the same name, and of the `ends`."""
    names = {name: i for i, name in teacher.special.items() if i not in ends.values()}
    named = {i: names[name] for i, name in student.special.items() if i not in ends and name in names}
    text = {i: teacher.written_as[b] for b, i in student.written_as.items() if b in teacher.written_as}
    return dict(sorted({**text, **named, **ends}.items()))


def units_of(student: Sequence[int], teacher: Sequence[int]) -> list[Unit]:
    """The smallest pieces that both tokenisations of one text cut out, from the bytes of their tokens, in order.

    A cut is every offset at which both have a token's end (arXiv 2605.07711). A token of no bytes goes with what
    follows it. Raises AlignmentError when the texts have different lengths.
    """
    if sum(student) != sum(teacher):
        raise AlignmentError(
            f"The student's tokens have {sum(student)} bytes and the teacher's {sum(teacher)}: they are not two "
            "tokenisations of the same text. Encode the text of the response with the teacher's tokenizer."
        )
    ours, theirs = _offsets(student), _offsets(teacher)
    return _between(sorted({*ours} & {*theirs}), ours[:-1], theirs[:-1])


def reread(ids: Sequence[int], pair: Pair) -> Reading:
    """A response of the student in the teacher's tokens, with the units of both.

    Bytes that are no UTF-8, and a text that the teacher's tokenizer changes, are shown to the teacher as it writes
    them, and no unit reaches into them. A special token that only the student has is not shown to it.
    """
    widths = [len(pair.student.pieces.get(i, b"")) for i in ids]
    if pair.same:
        each = tuple(Unit(range(t, t + 1), range(t, t + 1)) for t in range(len(ids)))
        return Reading(teacher_ids=tuple(ids), units=each, student_bytes=tuple(widths))
    ours = _offsets([w if i in pair.student.pieces else 1 for i, w in zip(ids, widths, strict=True)])
    teacher_ids: list[int] = []
    starts: list[int] = []
    bounds, blocked, at = {0}, list[tuple[int, int]](), 0
    for part in _parts(ids, pair):
        teacher_ids += part.ids
        places = [at + w for w in _offsets(part.widths)]
        starts += places[:-1]
        bounds |= {*places, at + part.width}
        if not part.comparable:
            blocked.append((at, at + part.width))
        at += part.width
    units = _between(sorted({*ours} & bounds), ours[:-1], starts)
    found = [
        unit
        for unit in units
        if unit.teacher and not any(a < ours[unit.student.stop] and ours[unit.student.start] < b for a, b in blocked)
    ]
    return Reading(teacher_ids=tuple(teacher_ids), units=tuple(found), student_bytes=tuple(widths))


@dataclass(frozen=True, slots=True)
class _Part:
    """A stretch of the response, special tokens counted as one byte, and how the teacher reads it."""

    width: int
    ids: Sequence[int]
    widths: Sequence[int]  # of the teacher's tokens
    comparable: bool


def _turn_end(tokenizer: Any, options: Mapping[str, Any]) -> int | None:
    """The token that ends a turn; None where the template ends it with mere text, such as a line's end."""
    end = turn_end(tokenizer, options)
    return end if end in tokenizer.added_tokens_decoder or end == tokenizer.eos_token_id else None


def _parts(ids: Sequence[int], pair: Pair) -> Iterator[_Part]:
    run = b""
    for i in ids:
        if i in pair.student.pieces:
            run += pair.student.pieces[i]
            continue
        yield from _of_text(run, pair)
        run = b""
        if i in pair.shared:
            yield _Part(1, [pair.shared[i]], [1], True)
        else:
            yield _Part(1, [], [], False)
    yield from _of_text(run, pair)


def _of_text(data: bytes, pair: Pair) -> Iterator[_Part]:
    for text, width, readable in _readable(data):
        ids = pair.write(text)
        pieces = [pair.teacher.pieces.get(i) for i in ids]
        widths = [len(piece or b"") for piece in pieces]
        written = None if None in pieces else b"".join(piece or b"" for piece in pieces)
        if readable and written == b" " + text.encode() and pieces[0]:  # SentencePiece's space before a text
            yield _Part(width, ids, [widths[0] - 1, *widths[1:]], True)
        elif readable and written == text.encode():
            yield _Part(width, ids, widths, True)
        else:
            yield _Part(width, ids, [0] * len(ids), False)


def _readable(data: bytes) -> Iterator[tuple[str, int, bool]]:
    """(text, its bytes, whether they are that text) of consecutive stretches; what is no UTF-8 is U+FFFD."""
    while data:
        try:
            text, bad = data.decode(), range(len(data), len(data))
        except UnicodeDecodeError as error:
            text, bad = data[: error.start].decode(), range(error.start, error.end)
        if text:
            yield text, bad.start, True
        if bad:
            yield UNREADABLE, len(bad), False
        data = data[bad.stop :]


def _offsets(widths: Sequence[int]) -> list[int]:
    return list(accumulate(widths, initial=0))


def _between(cuts: Sequence[int], student: Sequence[int], teacher: Sequence[int]) -> list[Unit]:
    """The tokens between consecutive cuts, from where tokens start; those of no bytes at the end go with the last."""
    units: list[Unit] = []
    i = j = 0
    for _, stop in pairwise(cuts):
        last = stop == cuts[-1]
        first, other = i, j
        while i < len(student) and (last or student[i] < stop):
            i += 1
        while j < len(teacher) and (last or teacher[j] < stop):
            j += 1
        units.append(Unit(range(first, i), range(other, j)))
    return units


Reader: TypeAlias = Callable[[str], bytes]


def _reader(decoder: Mapping[str, Any], tokenizer: Any) -> Reader:
    """How a decoder of the `tokenizers` library turns one token into bytes."""
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    spaces = [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
    for step in steps:
        if step["type"] == "Replace" and "String" in step["pattern"]:
            spaces.append((step["pattern"]["String"], step["content"]))
        elif step["type"] not in ("ByteLevel", "ByteFallback", "Metaspace", "Fuse", "Strip"):
            raise AlignmentError(
                f"The tokenizer {_name(tokenizer)} decodes with {step['type']}, which joins tokens in a way that hides "
                "what each stands for. Tokens of byte-level BPE, SentencePiece and characters can be aligned; use a "
                "model with such a tokenizer."
            )
    kinds = {step["type"] for step in steps}

    def read(token: str) -> bytes:
        if "ByteLevel" in kinds:  # a token with other characters stands for itself, as in the library's decoder
            return bytes(BYTE_OF[c] for c in token) if all(c in BYTE_OF for c in token) else token.encode()
        if "ByteFallback" in kinds and (match := BYTE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for mark, text in spaces:
            token = token.replace(mark, text)
        return token.encode()

    return read


def _name(tokenizer: Any) -> str:
    return repr(tokenizer.name_or_path) if tokenizer.name_or_path else f"({type(tokenizer).__name__})"
