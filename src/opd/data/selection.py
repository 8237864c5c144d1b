"""Selects rows of a data section by similarity to another data set, and removes repeats.

Teacher-aligned prompts of arXiv 2604.13016 5.2: `near` keeps questions similar to the teacher's training prompts. `far`
removes them: the paper's de-duplication (App. C.3: equal text, then a cosine of at least 0.6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opd.data.similarity import Vectors, grams, nearest_cosine, normalised, repeats
from opd.errors import ConfigError, DataError
from opd.plugins import np
from opd.recipe.schema import SelectSection

THRESHOLD = 0.6  # default of `threshold`: arXiv 2604.13016 App. C.3, for all-mpnet-base-v2


GRAM = 3  # default of `n`: words or characters per n-gram


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """The selection from `source`: `kept` of `read` rows, and the number dropped for each reason."""

    source: str
    read: int
    kept: int
    dropped: dict[str, int]
    cut: int = 0  # questions longer than the encoder's limit

    def __str__(self) -> str:
        reasons = "; ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        said = f"{self.source}: {self.kept} of {self.read} rows selected" + (f" ({reasons})" if reasons else "")
        return said + (f"; the encoder read only the beginning of {self.cut} questions" if self.cut else "")


def check_selection(selection: SelectSection) -> None:
    """Raise ConfigError for fields that contradict each other or have no effect."""
    s = selection
    if (s.by is None) != (s.keep is None):
        has, lacks = ("by", "keep") if s.keep is None else ("keep", "by")
        raise ConfigError(
            f"`select` has `{has}` but not `{lacks}`. Give both: `by` is the data set to compare with, `keep` is "
            "`near` for similar questions, or `far` for the others."
        )
    if s.by is None and not s.distinct:
        raise ConfigError("`select` selects nothing. Give `by` and `keep`, or `distinct: true`.")
    if s.threshold is not None and s.measure == "exact":
        raise ConfigError(
            f"`select.threshold` is the least cosine of similar questions, above 0 and at most 1, and `measure: exact` "
            f"takes none; got {s.threshold} with `measure: {s.measure}`. Correct it, or leave it out."
        )
    if s.n is not None and s.measure not in ("words", "characters"):
        raise ConfigError(
            f"`select.n` is the length of n-grams of words or characters, at least 1; got {s.n} with "
            f"`measure: {s.measure}`. Correct it, or leave it out."
        )
    if (s.encoder is None) == (s.measure == "encoder"):
        raise ConfigError(
            f"`select.encoder` is the model of `measure: encoder`; got {s.encoder!r} with `measure: {s.measure}`. "
            "Give both, or neither."
        )


def select(
    questions: Sequence[str], others: Sequence[str] | None, selection: SelectSection, source: str
) -> tuple[list[int], Selected]:
    """(positions of the kept questions, in order; the report of the selection).

    First `keep` by `others`, then `distinct` among the rest, then `limit`. Raises DataError if no question is left.
    """
    texts = [normalised(question) for question in questions]
    compare = _Comparison(selection, texts)
    kept, dropped = list(range(len(texts))), dict[str, int]()
    how = "equal text" if selection.measure == "exact" else f"{selection.measure}, cosine {compare.threshold:g}"
    closest = np.zeros(0)
    if others is not None and selection.by is not None:
        near, closest = compare.near([normalised(other) for other in others])
        kept = [i for i in kept if bool(near[i]) == (selection.keep == "near")]
        what = "not near" if selection.keep == "near" else "near"
        dropped[f"{what} those of {selection.by.path} by {how}"] = len(texts) - len(kept)
    if selection.distinct:
        again = compare.again(kept)
        kept = [i for i, repeated in zip(kept, again, strict=True) if not repeated]
        dropped[f"like an earlier one by {how}"] = int(again.sum())
    if not kept:
        lowest, middle, highest = np.quantile(closest, (0, 0.5, 1)).tolist()
        raise DataError(
            f"`select` leaves no row of {source}: {'; '.join(f'{count} {why}' for why, count in dropped.items())}. "
            f"The nearest cosines of its questions are {lowest:.2f} to {highest:.2f}, half of them below {middle:.2f}. "
            "Change `threshold`, `measure` or `keep`."
        )
    if selection.limit is not None and len(kept) > selection.limit:
        dropped["beyond the limit"] = len(kept) - selection.limit
        kept = kept[: selection.limit]
    dropped = {reason: count for reason, count in dropped.items() if count}
    return kept, Selected(source=source, read=len(texts), kept=len(kept), dropped=dropped, cut=compare.cut)


class _Comparison:
    """Questions with their vectors, computed once."""

    def __init__(self, selection: SelectSection, texts: Sequence[str]) -> None:
        self.texts = texts
        self.threshold = selection.threshold or THRESHOLD
        self.cut = 0
        self._vectors_of = self._maker(selection)
        self._vectors = None if self._vectors_of is None else self._vectors_of(texts)

    def near(self, others: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """([n] bool: equal to one of the others, or within the threshold; [n] the largest cosine)."""
        known = set(others)
        equal = np.array([text in known for text in self.texts])
        if self._vectors_of is None or self._vectors is None:
            return equal, equal.astype(np.float64)
        cosine = nearest_cosine(self._vectors, self._vectors_of(others))
        return equal | (cosine >= self.threshold), cosine

    def again(self, rows: Sequence[int]) -> np.ndarray:
        """[rows] bool: equal to an earlier row, or within the threshold of an earlier kept row."""
        seen = set[str]()
        different: list[int] = []  # positions in `rows`
        for at, i in enumerate(rows):
            if self.texts[i] not in seen:
                different.append(at)
            seen.add(self.texts[i])
        out = np.ones(len(rows), dtype=bool)
        out[different] = False
        if self._vectors is not None:
            out[different] = repeats(self._vectors.take([rows[at] for at in different]), self.threshold)
        return out

    def _maker(self, selection: SelectSection) -> Callable[[Sequence[str]], Vectors] | None:
        """A function from texts to vectors; None if only equal texts count as similar."""
        if selection.measure == "exact":
            return None
        if selection.measure != "encoder":
            unit, n = selection.measure, selection.n or GRAM
            return lambda texts: grams(texts, unit, n)

        from opd.data.encoder import load_encoder

        assert selection.encoder is not None
        encoder = load_encoder(selection.encoder)

        def encoded(texts: Sequence[str]) -> Vectors:
            vectors, cut = encoder.embed(texts)
            self.cut += cut
            return vectors

        return encoded
