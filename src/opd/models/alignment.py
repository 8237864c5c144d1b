"""Aligns two tokenisations of one text by byte offsets, into the smallest pieces that both share.

Bytes, because tokens need not end between characters: an emoji may be four tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from opd.errors import AlignmentError
from opd.messages import ids_after
from opd.models.vocabularies import Vocabulary, ends_of, name_of, shared_tokens, vocabulary_of

UNREADABLE = "\ufffd"  # replaces bytes that are not UTF-8 in the teacher's input


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of text that ends at a token end in both tokenisations: its student tokens and its teacher tokens."""

    student: range
    teacher: range


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherTokens:
    """A response in the teacher's tokens, and its units in order. A token may belong to no unit."""

    teacher_ids: tuple[int, ...]
    units: tuple[Unit, ...]
    student_bytes: tuple[int, ...]  # bytes of text in each student token


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerPair:
    """Two vocabularies, and the teacher's encoding of a text."""

    student: Vocabulary
    teacher: Vocabulary
    shared: Mapping[int, int]  # student id -> id of the same token in the teacher's vocabulary
    ends: Mapping[int, int]  # the tokens of `shared` that end a response
    same: bool  # every token has the same id in both
    write: Callable[[str], Sequence[int]]

    def shares(self, unit: Unit, student_ids: Sequence[int], teacher_ids: Sequence[int]) -> bool:
        """Whether a unit is one token in both vocabularies, and the same token."""
        one = len(unit.student) == len(unit.teacher) == 1
        return one and self.shared.get(student_ids[unit.student[0]]) == teacher_ids[unit.teacher[0]]


def pair_of(
    student: Any, teacher: Any, *, chat: bool = False, options: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {})
) -> TokenizerPair:
    """Two tokenizers, compared token by token.

    `chat` and the templates' `options` determine the tokens that end a response: `vocabularies.ends_of`. Raises
    AlignmentError if the bytes of a tokenizer's tokens are unknown, and for two tokenizers without a common token.
    """
    ends = ends_of(student, teacher, chat=chat, options=options)
    ours, theirs = vocabulary_of(student, ends), vocabulary_of(teacher, ends.values())
    same = student.get_vocab() == teacher.get_vocab() and all(end == its for end, its in ends.items())
    shared = {i: i for i in (*ours.pieces, *ours.special)} if same else shared_tokens(ours, theirs, ends)
    if not any(i in ours.pieces for i in shared):
        raise AlignmentError(
            f"The tokenizers {name_of(student)} ({len(ours.pieces)} tokens of text) and {name_of(teacher)} "
            f"({len(theirs.pieces)}) have no token of text in common, so student and teacher cannot be compared. "
            "Use a teacher that writes the same language in the same script."
        )

    def write(text: str) -> Sequence[int]:
        """Ids of a text; the spelling of a special token in it counts as text."""
        return ids_after(text, teacher, split_special_tokens=True)

    return TokenizerPair(student=ours, teacher=theirs, shared=shared, ends=ends, same=same, write=write)


def retokenise(ids: Sequence[int], pair: TokenizerPair) -> TeacherTokens:
    """A response of the student in the teacher's tokens, with its units.

    Units are the smallest pieces of text between byte offsets at which both tokenisations have a token end (arXiv
    2605.07711). A token without bytes joins the next unit, at the end of the response the last one.

    The teacher reads bytes that are not UTF-8, and text that its tokenizer changes, as its tokenizer writes them; no
    unit covers them. It does not read special tokens that only the student has.
    """
    widths = [len(pair.student.pieces.get(i, b"")) for i in ids]
    if pair.same:
        each = tuple(Unit(range(t, t + 1), range(t, t + 1)) for t in range(len(ids)))
        return TeacherTokens(teacher_ids=tuple(ids), units=each, student_bytes=tuple(widths))
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
    return TeacherTokens(teacher_ids=tuple(teacher_ids), units=tuple(found), student_bytes=tuple(widths))


@dataclass(frozen=True, slots=True)
class _Part:
    """A stretch of the response, with its teacher tokens. A special token counts as one byte."""

    width: int
    ids: Sequence[int]
    widths: Sequence[int]  # of the teacher's tokens
    comparable: bool


def _parts(ids: Sequence[int], pair: TokenizerPair) -> Iterator[_Part]:
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


def _of_text(data: bytes, pair: TokenizerPair) -> Iterator[_Part]:
    for text, width, readable in _readable(data):
        ids, given = pair.write(text), text.encode()
        pieces = [pair.teacher.pieces.get(i, b"") for i in ids]
        if not readable:
            yield _Part(width, ids, [0] * len(ids), False)
            continue
        if b"".join(pieces).startswith(b" ") and (b"".join(pieces) == b" " + given or given[:1] != b" "):
            pieces[0] = pieces[0][1:]  # the space that SentencePiece adds before a text
        yield from _as_written(given, ids, pieces)


def _as_written(given: bytes, ids: Sequence[int], pieces: Sequence[bytes]) -> Iterator[_Part]:
    """A text and its teacher tokens, compared from both ends as far as they agree.

    The part in between, which the tokenizer changed (such as a letter and its accent into one character), is not
    comparable.
    """
    ends, written = _offsets([len(piece) for piece in pieces]), b"".join(pieces)
    if written == given:
        yield _Part(len(given), ids, [len(piece) for piece in pieces], True)
        return
    same = _agree(written, given)
    first = next(k for k in reversed(range(len(ends))) if ends[k] <= same)
    first = ends.index(ends[first])  # a token without bytes, such as the unknown token, does not agree
    same = min(_agree(written[::-1], given[::-1]), len(written) - ends[first], len(given) - ends[first])
    last = next(k for k in range(len(ends)) if len(written) - ends[k] <= same)
    last = len(ends) - 1 - ends[::-1].index(ends[last])
    rest = len(written) - ends[last]
    for start, stop, width, comparable in (
        (0, first, ends[first], True),
        (first, last, len(given) - ends[first] - rest, False),
        (last, len(ids), rest, True),
    ):
        widths = [len(piece) if comparable else 0 for piece in pieces[start:stop]]
        yield _Part(width, ids[start:stop], widths, comparable)


def _agree(one: bytes, other: bytes) -> int:
    """The number of equal bytes at the start."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _readable(data: bytes) -> Iterator[tuple[str, int, bool]]:
    """(text, number of bytes, whether the bytes are UTF-8) of consecutive stretches; other bytes become U+FFFD."""
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
    """The units between consecutive cuts, given the tokens' starts. Final tokens without bytes join the last unit."""
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
