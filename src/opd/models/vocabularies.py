"""The bytes of a tokenizer's tokens, and the tokens that two tokenizers share.

Bytes, because tokens need not end between characters: an emoji may be four tokens. A token's bytes follow from the
tokenizer's decoder; decoding a single token would turn a part of a character into U+FFFD.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from opd.errors import AlignmentError
from opd.models.endings import endings_of
from opd.models.language_model import LanguageModel

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


# GPT-2's printable stand-ins for bytes, as characters of a byte-level vocabulary.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]


_OTHERS = [b for b in range(0x100) if b not in _PRINTABLE]


BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + n): b for n, b in enumerate(_OTHERS)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The meaning of a tokenizer's tokens, by id."""

    pieces: Mapping[int, bytes]  # tokens of text
    special: Mapping[int, str]  # tokens without text, by name
    written_as: Mapping[bytes, int]  # the token of these bytes; of several, not the byte fallback


def vocabulary_of(tokenizer: Any, ends: Collection[int] = ()) -> Vocabulary:
    """The bytes of each token; `ends` count as special tokens.

    Raises AlignmentError if the tokens' bytes are unknown.
    """
    read = reader_of(tokenizer)
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


def ends_of(
    student: Any, teacher: Any, *, chat: bool, options: tuple[Mapping[str, Any], Mapping[str, Any]]
) -> dict[int, int]:
    """The tokens that end a response, student id -> teacher id; they count as the same token, whatever their names.

    The end-of-sequence tokens, preceded, for responses that are turns of a `chat`, by the tokens with which the
    models, given the `options` of their templates, end a turn (`endings.Endings.turn`).
    """
    ours, theirs = (endings_of(one, given) for one, given in zip((student, teacher), options, strict=True))
    ends: dict[int, int] = {}
    for end, its in (*([(ours.turn, theirs.turn)] if chat else []), (ours.text, theirs.text)):
        if end is not None and its is not None and end not in ends and its not in ends.values():
            ends[end] = its
    return ends


def shared_tokens(student: Vocabulary, teacher: Vocabulary, ends: Mapping[int, int]) -> dict[int, int]:
    """Student id -> teacher id of tokens of equal bytes, of special tokens of equal names, and of the `ends`."""
    names = {name: i for i, name in teacher.special.items() if i not in ends.values()}
    named = {i: names[name] for i, name in student.special.items() if i not in ends and name in names}
    text = {i: teacher.written_as[b] for b, i in student.written_as.items() if b in teacher.written_as}
    return dict(sorted({**text, **named, **ends}.items()))


Reader: TypeAlias = Callable[[str], bytes]


def reader_of(tokenizer: Any) -> Reader:
    """A function from one token of text to its bytes. Raises AlignmentError if the tokens' bytes are unknown."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(core, "decoder", None)
    if decoder is None:
        raise AlignmentError(
            f"The tokenizer {name_of(tokenizer)} has no decoder of the `tokenizers` library, so the bytes of its "
            "tokens are unknown. Use a fast tokenizer (PreTrainedTokenizerFast) with a decoder."
        )
    return _reader(json.loads(decoder.__getstate__()), tokenizer)


def _reader(decoder: Mapping[str, Any], tokenizer: Any) -> Reader:
    """A function from one token to its bytes, as the decoder of the `tokenizers` library defines it."""
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    spaces = [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
    for step in steps:
        if step["type"] == "Replace" and "String" in step["pattern"]:
            spaces.append((step["pattern"]["String"], step["content"]))
        elif step["type"] not in ("ByteLevel", "ByteFallback", "Metaspace", "Fuse", "Strip"):
            raise AlignmentError(
                f"The tokenizer {name_of(tokenizer)} decodes with {step['type']}, so the bytes of a single token are "
                "unknown. Tokens of byte-level BPE, SentencePiece and characters can be aligned; use a model with such "
                "a tokenizer."
            )
    kinds = {step["type"] for step in steps}

    def read(token: str) -> bytes:
        if "ByteLevel" in kinds:  # a token with other characters is its own text, as in the library's decoder
            return bytes(BYTE_OF[c] for c in token) if all(c in BYTE_OF for c in token) else token.encode()
        if "ByteFallback" in kinds and (match := BYTE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for mark, text in spaces:
            token = token.replace(mark, text)
        return token.encode()

    return read


def digest_of(tokenizer: Any) -> str:
    """The SHA-256 of all tokens with their ids: equal for two tokenizers whose ids mean the same."""
    return hashlib.sha256(json.dumps(_by_id(tokenizer.get_vocab())).encode()).hexdigest()


def name_of(tokenizer: Any) -> str:
    return repr(tokenizer.name_or_path) if tokenizer.name_or_path else f"({type(tokenizer).__name__})"


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonTokens:
    """The ids 0 to `size` - 1, which two tokenizers give to the same tokens; special tokens may have other names."""

    size: int
    renamed: Mapping[int, tuple[str, str]]  # id -> the names of a special token in both
    only: tuple[Sequence[str], Sequence[str]]  # the tokens from `size` on, of the student and of the teacher

    def differences(self, names: tuple[str, str]) -> list[str]:
        """One line for each kind of difference."""
        found = [
            f"{len(tokens)} tokens of {name} are not compared, and never written ({_some(tokens)})"
            for name, tokens in zip(names, self.only, strict=True)
            if tokens
        ]
        if self.renamed:
            pairs = [f"{i}: {one!r} and {other!r}" for i, (one, other) in self.renamed.items()]
            first = f"{'; '.join(pairs[:3])}{'; ...' if len(pairs) > 3 else ''}"
            found.append(
                f"{len(self.renamed)} special tokens of {names[0]} and {names[1]} have one id and two names, and count "
                f"as the same ({first})"
            )
        return found


def check_same_tokens(
    student: Any, teacher: Any, names: tuple[str, str] = ("the student", "the teacher")
) -> CommonTokens:
    """The tokens that have the same id in both tokenizers.

    All tokens of text must; added tokens may have another name at the same id, or exist in one tokenizer alone after
    the last common id. Raises AlignmentError, with the differing tokens, for tokenizers that differ otherwise.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    ours_added, theirs_added = student.added_tokens_decoder, teacher.added_tokens_decoder
    moved = [t for t, i in _by_id(ours) if t in theirs and theirs[t] != i]
    only_student = [t for t, _ in _by_id(ours) if t not in theirs]
    only_teacher = [t for t, _ in _by_id(theirs) if t not in ours]
    alone = {*ours.values()} ^ {*theirs.values()}
    size = min([*alone, max(ours.values()) + 1, max(theirs.values()) + 1])
    text = any(ours[t] not in ours_added or theirs[t] not in theirs_added for t in moved)
    text = text or any(ours[t] not in ours_added for t in only_student)
    text = text or any(theirs[t] not in theirs_added for t in only_teacher)
    text = text or any(i >= size and i not in ours_added for i in ours.values())
    if not text and not any(min(ours[t], theirs[t]) < size for t in moved):
        name_of_id = {i: t for t, i in theirs.items()}
        return CommonTokens(
            size=size,
            renamed={ours[t]: (t, name_of_id[ours[t]]) for t in only_student if ours[t] < size},
            only=([t for t, i in _by_id(ours) if i >= size], [t for t, i in _by_id(theirs) if i >= size]),
        )
    parts = [
        f"{len(tokens)} tokens {what} ({_some(tokens)})"
        for tokens, what in (
            (moved, "have another id"),
            (only_student, "exist only in the student"),
            (only_teacher, "exist only in the teacher"),
        )
        if tokens
    ]
    raise AlignmentError(
        f"The tokenizers of {names[0]} ({len(ours)} tokens) and {names[1]} ({len(theirs)}) differ: "
        f"{'; '.join(parts)}. So the models cannot be compared token by token. Use a teacher of the student's "
        "family, give both the same tokenizer files, or use a method for two tokenizers, such as simct."
    )


def on_common_tokens(
    student: LanguageModel, teachers: Mapping[str, LanguageModel]
) -> tuple[LanguageModel, dict[str, LanguageModel]]:
    """Student and teachers with one vocabulary: the ids 0 to n - 1, which all of them give to the same tokens.

    Every softmax of the stage is over these ids: each model's probabilities are divided by their sum over them. Ids
    from n on have no share, so the student cannot write them either, and what is sampled, scored and trained is one
    distribution. Prompts may hold every id that their model reads. Raises AlignmentError if the tokenizers differ in
    more (`check_same_tokens`), and if no token that ends a response is common.
    """
    found = {
        name: check_same_tokens(student.tokenizer, t.tokenizer, (student.name, name)) for name, t in teachers.items()
    }
    size = min(one.vocabulary for one in (student, *teachers.values()))
    size = min([size, *(common.size for common in found.values())])
    if not any(i < size for i in student.stop_ids):
        ends = ", ".join(repr(student.tokenizer.decode([i])) for i in sorted(student.stop_ids))
        raise AlignmentError(
            f"{student.name} ends a response with {ends}, which {' or '.join(teachers)} does not have, so no response "
            "could end. Use a teacher of the student's family, or a method for two tokenizers, such as simct."
        )
    notes = [line for name, common in found.items() for line in common.differences((student.name, name))]
    # Tokens of images have no mass in any of the distributions, also where one of the models reads text alone.
    unwritten = student.unwritten.union(*(one.unwritten for one in teachers.values()))
    student, teachers = _silenced(student, unwritten), {n: _silenced(one, unwritten) for n, one in teachers.items()}
    return _narrowed(student, size, notes), {name: _narrowed(one, size, []) for name, one in teachers.items()}


def same_ids(student: LanguageModel, teacher: LanguageModel) -> bool:
    """Whether an id that the teacher writes is the same token for the student."""
    if student.tokenizer.get_vocab() == teacher.tokenizer.get_vocab():
        return True
    try:
        return check_same_tokens(student.tokenizer, teacher.tokenizer).size >= teacher.vocabulary
    except AlignmentError:
        return False


def _silenced(lm: LanguageModel, unwritten: frozenset[int]) -> LanguageModel:
    return lm if lm.unwritten == unwritten else replace(lm, unwritten=unwritten)


def _narrowed(lm: LanguageModel, size: int, notes: Sequence[str]) -> LanguageModel:
    return replace(lm, vocabulary=size, notes=(*lm.notes, *notes)) if notes or lm.vocabulary != size else lm


def _some(tokens: Sequence[str]) -> str:
    return f"{', '.join(map(repr, tokens[:3]))}{', ...' if len(tokens) > 3 else ''}"


def _by_id(vocabulary: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(vocabulary.items(), key=lambda item: item[1])
