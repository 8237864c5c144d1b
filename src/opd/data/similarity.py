"""Similarity of questions: equal texts, cosines of n-gram counts, cosines of an encoder's states. Only numpy.

Vectors of both kinds have norm 1, so that a product is a cosine.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from opd.plugins import np

BLOCK = 256  # questions compared at once


Unit: TypeAlias = Literal["words", "characters"]


Cosines: TypeAlias = Callable[["Vectors"], "np.ndarray"]


class Vectors(Protocol):
    """One vector per question."""

    def __len__(self) -> int: ...

    def take(self, rows: Sequence[int]) -> Vectors: ...

    def cosines(self) -> Cosines: ...


def normalised(text: str) -> str:
    """The text in Unicode form NFKC, without case, with single blanks.

    Punctuation stays: `2+2` and `2-2` are different questions.
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@dataclass(frozen=True, slots=True)
class Grams:
    """Counts of n-grams, divided by their norm: one mapping per question."""

    rows: Sequence[dict[str, float]]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Sequence[int]) -> Grams:
        """Those of some questions."""
        return Grams([self.rows[i] for i in rows])

    def cosines(self) -> Cosines:
        """A function from other vectors [n] to their cosines [n, M] with these, through an index by n-gram."""
        listed: dict[str, tuple[list[int], list[float]]] = {}
        for i, row in enumerate(self.rows):
            for gram, weight in row.items():
                where, weights = listed.setdefault(gram, ([], []))
                where.append(i)
                weights.append(weight)
        index = {gram: (np.array(where), np.array(weights)) for gram, (where, weights) in listed.items()}

        def cosines(others: Vectors) -> np.ndarray:
            """[n, M]"""
            assert isinstance(others, Grams)
            out = np.zeros((len(others.rows), len(self.rows)))
            for line, row in zip(out, others.rows, strict=True):
                for gram, weight in row.items():
                    if gram in index:
                        where, weights = index[gram]
                        line[where] += weight * weights
            return out

        return cosines


@dataclass(frozen=True, slots=True)
class Embeddings:
    """An encoder's vectors."""

    values: np.ndarray  # [n, H] of length 1

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: Sequence[int]) -> Embeddings:
        """Those of some questions."""
        return Embeddings(self.values[np.asarray(rows, dtype=np.int64)])

    def cosines(self) -> Cosines:
        """A function from other vectors [n] to their cosines [n, M] with these."""

        def cosines(others: Vectors) -> np.ndarray:
            """[n, M]"""
            assert isinstance(others, Embeddings)
            return others.values @ self.values.T

        return cosines


def grams(texts: Sequence[str], unit: Unit, n: int) -> Grams:
    """The n-grams of texts, of characters or of words; a sign such as + counts as a word.

    A text with fewer than n units is one n-gram.
    """
    assert n >= 1
    rows: list[dict[str, float]] = []
    for text in texts:
        units = re.findall(r"\w+|[^\w\s]", text) if unit == "words" else list(text)
        counts = Counter("\x1f".join(units[i : i + n]) for i in range(max(len(units) - n + 1, 1)))
        norm = math.sqrt(sum(count * count for count in counts.values()))
        rows.append({gram: count / norm for gram, count in counts.items()})
    return Grams(rows)


def nearest_cosine(questions: Vectors, others: Vectors) -> np.ndarray:
    """[n]: the largest cosine of each question with any of `others`."""
    assert len(others) > 0
    compare = others.cosines()
    blocks = [compare(questions.take(rows)).max(axis=1) for rows in _blocks(len(questions))]
    return np.concatenate(blocks) if blocks else np.zeros(0)


def repeats(questions: Vectors, threshold: float) -> np.ndarray:
    """[n] bool: a repeat has a cosine of at least `threshold` with an earlier question that is not a repeat."""
    compare = questions.cosines()
    first = np.zeros(len(questions), dtype=bool)
    for rows in _blocks(len(questions)):
        near = compare(questions.take(rows)) >= threshold  # [block, n]
        for row, i in zip(near, rows, strict=True):
            first[i] = not (row[:i] & first[:i]).any()
    return ~first


def _blocks(count: int) -> Iterator[list[int]]:
    for start in range(0, count, BLOCK):
        yield list(range(start, min(start + BLOCK, count)))
