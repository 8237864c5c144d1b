"""A judge with a cache: writes each answer to disk on arrival, and requests unreadable answers again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from opd.errors import RunError
from opd.files import append_row, read_rows, refused, write_atomically
from opd.models.ticks import counting
from opd.samplers.asked.protocol import Failure, Judge, Question, Reply, UnreadableError

T = TypeVar("T")


class AnswerCache:
    """Answers by the hash of their question, in memory and in `folder`: one JSON Lines file per process.

    A process reads the files of all and appends to its own. A kill leaves at most one partial last line, which is
    removed.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        """Read the files. Raises RunError if one cannot be read or written, or a line of it is damaged."""
        self.file = folder / f"answers-{rank}.jsonl"
        self.texts: dict[str, str] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise refused(folder, error) from error
        for file in sorted(folder.glob("answers-*.jsonl")):
            rows = read_rows(file)
            try:
                self.texts |= {row["key"]: str(row["text"]) for _, row in rows}
            except (KeyError, TypeError) as error:
                raise RunError(
                    f"{file} holds a line that is not an answer ({error!r}). Remove the file to continue."
                ) from error
            if file == self.file:
                write_atomically(file, b"".join(line for line, _ in rows))

    def add(self, key: str, text: str) -> None:
        """Store an answer. Raises RunError if it cannot be written."""
        append_row(self.file, {"key": key, "text": text}, "an answer")
        self.texts[key] = text


@dataclass(slots=True, kw_only=True)
class CachedJudge:
    """A judge with its cache; an unreadable answer is requested again up to `retries` times.

    `counts` has: requests sent, retries (requests for a question after its first), unreadable and cached answers,
    failed questions, and seconds.
    """

    judge: Judge
    cache: AnswerCache
    retries: int
    counts: dict[str, float] = field(default_factory=dict[str, float])

    def ask(
        self, questions: Sequence[Question], read: Callable[[Question, str], T], *, whole: bool = False
    ) -> list[T | Failure]:
        """Each answer as `read` parses it, or the Failure. `read` raises UnreadableError for an answer it rejects.

        With `whole`, an answer that was cut at `max_tokens` counts as unreadable. Only readable answers are cached: a
        resumed run sends the failed questions again. Equal questions are sent once.
        """
        started = time.perf_counter()
        found: dict[str, T | Failure] = {}
        pending: dict[str, Question] = {}
        keys = [self.key(question) for question in questions]
        for key, question in zip(keys, questions, strict=True):
            cached = self._cached(key, question, read)
            if cached is None:
                pending[key] = question
            else:
                found[key] = cached[0]
        for attempt in range(self.retries + 1):
            if not pending:
                break
            self.count("retries", len(pending) if attempt else 0)
            batch = [(key, replace(question, attempt=attempt)) for key, question in pending.items()]
            again: set[str] = set()
            with counting("answers of a judge", len(batch)) as count:
                for i, reply in self.judge.ask([question for _, question in batch]):
                    count.add(1)
                    key, question = batch[i]
                    found[key] = self._read(key, question, reply, read, whole)
                    if isinstance(found[key], Failure) and reply.text is not None:
                        again.add(key)
            pending = {key: question for key, question in batch if key in again}
        self.count("failed", sum(isinstance(one, Failure) for one in found.values()))
        self.count("seconds", time.perf_counter() - started)
        return [found[key] for key in keys]

    def key(self, question: Question) -> str:
        """The hash of the judge's identity and the question."""
        parts = [dict(self.judge.identity), question.content, question.temperature, question.number]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=dict).encode()).hexdigest()

    def count(self, name: str, number: float) -> None:
        """Add to a count."""
        self.counts[name] = self.counts.get(name, 0.0) + number

    def _cached(self, key: str, question: Question, read: Callable[[Question, str], T]) -> tuple[T] | None:
        """The cached answer as `read` parses it, in a 1-tuple; None without a cached answer that `read` accepts."""
        if key not in self.cache.texts:
            return None
        try:
            made = read(question, self.cache.texts[key])
        except UnreadableError:  # cached by an earlier version of `read`
            return None
        self.count("cached", 1)
        return (made,)

    def _read(
        self, key: str, question: Question, reply: Reply, read: Callable[[Question, str], T], whole: bool
    ) -> T | Failure:
        self.count("requests", reply.requests)
        self.count("retries", max(0, reply.requests - 1))
        if reply.text is None:
            return Failure(reply.failure or "there was no answer")
        try:
            if reply.cut and whole:
                raise UnreadableError("the answer is incomplete")
            made = read(question, reply.text)
        except UnreadableError as error:
            self.count("unreadable", 1)
            return Failure(f"{error}" + ("; the answer was cut: raise max_tokens" if reply.cut else ""))
        self.cache.add(key, reply.text)
        return made
