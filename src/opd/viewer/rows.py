"""Responses with their numbers per token, as rows of a block that a page opens."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opd.viewer.images import Album, images_of, place_of
from opd.viewer.pack import Packer, rounded
from opd.viewer.read import Columns
from opd.viewer.texts import conversation, difference, placeholders_counted, shortened
from opd.viewer.thin import Budget, kept_tokens, strongest

# What a page reads of a file; it shows what is there.
COLUMNS = (
    *("task", "prompt_id", "sample", "part", "prompt", "prompt_messages", "student_reads", "teacher_reads"),
    *("response", "reward", "finished", "response_ids", "response_tokens", "policy_logp", "teacher_logp", "weight"),
    *("advantage", "when", "sampling", "answer", "extracted", "trained", "turn", "signal", "student_entropy"),
    *("teacher_entropy", "teacher_rank", "student_top_ids", "teacher_top_ids", "student_top_logp", "teacher_top_logp"),
    *("student_top_tokens", "teacher_top_tokens", "pick", "units", "teacher_tokens", "images", "teacher_images", "box"),
    *("turn_rewards", "turn_errors", "conversation"),
)
NUMBERS = {  # name in the page -> column
    "p": "policy_logp",
    "q": "teacher_logp",
    "signal": "signal",
    "hp": "student_entropy",
    "hq": "teacher_entropy",
}
CONSTANT = {"weight": "weight", "advantage": "advantage"}  # often one number for a whole response


@dataclass(slots=True)
class Block:
    """Rows of one block of a page, added one after the other."""

    budget: Budget
    album: Album = field(default_factory=Album)  # of the page
    packer: Packer = field(default_factory=Packer)
    rows: list[dict[str, Any]] = field(default_factory=list)
    texts: list[Any] = field(default_factory=list)
    _known: dict[Any, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.album.begin()

    def add(
        self,
        columns: Columns,
        i: int,
        *,
        by_teacher: bool = False,
        old: bool = False,
        place: tuple[str, int] | None = None,
        parts: Sequence[tuple[int, int]] | None = None,
    ) -> int:
        """Add a row of a file; its place in the block.

        `by_teacher`: a teacher wrote it. `old`: the file has no format, and a response's log-probs are its writer's.
        `place`: file and row, by which a live page loads what is left out. `parts`: the tokens to keep, [start, end).
        """
        numbers = {name: columns.numbers(column, i) for name, column in NUMBERS.items()}
        if numbers["p"] is not None and not numbers["p"].any():
            numbers["p"] = None  # a greedy response of an earlier version has no log-probs but zeros
        if by_teacher and old:
            numbers["p"], numbers["q"] = None, numbers["p"]
        ids = columns.value("response_ids", i) or []
        values = largest(numbers)
        parts = kept_tokens(len(ids), self.budget.cap, values) if parts is None else within(parts, len(ids))
        kept = np.concatenate([np.arange(a, b) for a, b in parts]) if parts else np.zeros(0, dtype=np.int64)
        row = self._described(columns, i) | self._images(columns, i)
        row |= {"length": len(ids), "n": {}}
        if place is not None and len(kept) < len(ids):
            row["place"] = list(place)
        if parts != [(0, len(ids))]:
            row["parts"] = [list(part) for part in parts]
        self._tokens(row, columns, i, ids, kept)
        for name, found in numbers.items():
            if found is not None and len(found) == len(ids):
                self.packer.add(row["n"], name, "hundredths", found[kept])
        self._constants(row, columns, i, kept)
        self._flags(row, columns, i, kept)
        self._tops(row, columns, i, kept, values)
        self._units(row, columns, i, parts)
        self.rows.append(row)
        return len(self.rows) - 1

    def bytes(self, **content: Any) -> bytes:
        """The block, with `content` beside its rows."""
        return self.packer.bytes({"rows": self.rows, "texts": self.texts, **content})

    def text(self, key: Any, value: Any) -> int:
        """The place of a text in the block; equal keys have one place."""
        if key not in self._known:
            self._known[key] = len(self.texts)
            self.texts.append(value)
        return self._known[key]

    def _described(self, columns: Columns, i: int) -> dict[str, Any]:
        """The row's texts and what it is, without numbers per token."""
        get = lambda name: columns.value(name, i)  # noqa: E731
        reward, prompt = get("reward"), get("prompt")
        row: dict[str, Any] = {
            "id": get("prompt_id"),
            "sample": get("sample"),
            "prompt": self.text(prompt, shortened(prompt or "")),
            "reward": None if reward is None else rounded(float(reward)),
            "finished": bool(get("finished")),
        }
        for name in ("task", "sampling", "pick", "part", "answer", "extracted"):
            value = get(name)
            if value is not None:
                row[name] = shortened(str(value))
        said = conversation(get("prompt_messages"))
        if said is not None:
            clipped = [[role, shortened(text)] for role, text in said]
            row["said"] = self.text(("said", get("prompt_messages")), clipped)
        if (talk := talk_of(columns, i)) is not None:
            row["talk"] = talk
        reads = (get("student_reads"), get("teacher_reads"))
        if reads != (None, None):
            key = ("reads", *reads)
            if key not in self._known and any(get(name) for name in ("images", "teacher_images")):
                reads = (placeholders_counted(reads[0]), placeholders_counted(reads[1]))
            row["reads"] = self._known[key] if key in self._known else self.text(key, difference(*reads))
        return row

    def _images(self, columns: Columns, i: int) -> dict[str, Any]:
        """What was seen before a response, and the places in it."""
        row: dict[str, Any] = {}
        for name, column in (("images", "images"), ("theirs", "teacher_images")):
            if images := images_of(columns, column, i):
                self.album.add(images, columns.stage)
                row[name] = self.text(("images", *map(tuple, images)), images)
        if row and (box := columns.value("box", i)) is not None:
            row["box"] = box
            if (place := place_of(columns, i)) is not None:
                row["click"] = place
        return row

    def _tokens(self, row: dict[str, Any], columns: Columns, i: int, ids: Sequence[int], kept: np.ndarray) -> None:
        texts = columns.value("response_tokens", i)
        if texts is None:  # version 0.1.0 had none in some files: ids, and the text beside them
            texts = [f"⟨{one}⟩" for one in ids]
            row["response"] = shortened(columns.value("response", i) or "")
        self.packer.add(row["n"], "token", "index", [self.packer.token(ids[t], texts[t] or "") for t in kept])

    def _constants(self, row: dict[str, Any], columns: Columns, i: int, kept: np.ndarray) -> None:
        for name, column in CONSTANT.items():
            values = columns.numbers(column, i)
            if values is None or not len(values):
                continue
            if np.unique(values).size == 1:
                row.setdefault("same", {})[name] = rounded(float(values[0]))
            else:
                self.packer.add(row["n"], name, "hundredths", values[kept])

    def _flags(self, row: dict[str, Any], columns: Columns, i: int, kept: np.ndarray) -> None:
        """Which tokens are not trained, and their turns, where there is more than one kind."""
        trained, turn, rank = (columns.numbers(name, i) for name in ("trained", "turn", "teacher_rank"))
        if trained is not None and not np.nan_to_num(trained, nan=1.0).all():
            self.packer.add(row["n"], "trained", "small", np.nan_to_num(trained, nan=1.0)[kept])
        if turn is not None and np.nan_to_num(turn).any():
            self.packer.add(row["n"], "turn", "small", np.clip(np.nan_to_num(turn), 0, 255)[kept])
        if rank is not None:
            self.packer.add(row["n"], "rank", "index", np.nan_to_num(rank, nan=-1.0)[kept] + 1)  # 0: unknown

    def _tops(self, row: dict[str, Any], columns: Columns, i: int, kept: np.ndarray, values: np.ndarray | None) -> None:
        """The most likely tokens of both models, at the tokens where the budget allows them."""
        found = [name for name in ("student", "teacher") if columns.value(f"{name}_top_ids", i) is not None]
        if not found:
            return
        at = strongest(None if values is None else values[kept], len(kept), self.budget.tops)
        self.packer.add(row["n"], "at", "index", at)
        places = kept[at]
        for name in found:
            ids, logp, texts = (_at(columns, f"{name}_top_{what}", i, places) for what in ("ids", "logp", "tokens"))
            self.packer.add(row["n"], f"{name}_k", "small", [len(one) for one in ids])
            tokens = [
                self.packer.token(i, text or "")
                for one, strings in zip(ids, texts, strict=True)
                for i, text in zip(one, strings or [f"⟨{i}⟩" for i in one], strict=True)
            ]
            self.packer.add(row["n"], f"{name}_top", "index", tokens)
            self.packer.add(row["n"], f"{name}_logp", "hundredths", [v for one in logp for v in one])

    def _units(self, row: dict[str, Any], columns: Columns, i: int, parts: Sequence[tuple[int, int]]) -> None:
        """[start, end, the teacher's tokens] of each unit that touches a part of the response."""
        units, texts = columns.value("units", i), columns.value("teacher_tokens", i) or []
        if units:
            row["units"] = [
                [one["student_start"], one["student_end"], texts[one["teacher_start"] : one["teacher_end"]]]
                for one in units
                if any(one["student_start"] < b and one["student_end"] > a for a, b in parts)
            ]


def talk_of(columns: Columns, i: int) -> dict[str, Any] | None:
    """What happened in a conversation: its counts, rewards by turn, failures by turn, own tokens; None without one."""
    turns, trained = columns.numbers("turn", i), columns.numbers("trained", i)
    rewards, counts = columns.value("turn_rewards", i), json_object(columns.value("conversation", i))
    if rewards is None and not counts and (turns is None or not np.nan_to_num(turns).any()):
        return None
    found: dict[str, Any] = {"counts": {str(name): value for name, value in counts.items() if _is_number(value)}}
    if turns is not None and len(turns):
        found["turns"] = int(np.nanmax(turns)) + 1
    if trained is not None:
        found["heard"] = int((np.nan_to_num(trained, nan=1.0) == 0).sum())
    if rewards is not None and any(one is not None for one in rewards):
        found["rewards"] = [None if one is None else rounded(float(one)) for one in rewards]
    if errors := columns.value("turn_errors", i):
        found["errors"] = errors
    return found


def json_object(text: str | None) -> dict[str, Any]:
    """The object that a text holds in JSON; empty for another text."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def within(parts: Sequence[tuple[int, int]], n: int) -> list[tuple[int, int]]:
    """Parts [start, end) of n tokens in order: cut at the end, joined where they touch, empty ones dropped."""
    out: list[tuple[int, int]] = []
    for start, end in sorted((max(0, a), min(n, b)) for a, b in parts):
        if start >= end:
            continue
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def largest(numbers: Mapping[str, np.ndarray | None]) -> np.ndarray | None:
    """What tells the important tokens of a response: log q - log p, else the signal, else log p; None without any."""
    p, q, signal = numbers.get("p"), numbers.get("q"), numbers.get("signal")
    if p is not None and q is not None and len(p) == len(q):
        return q - p
    return next((one for one in (signal, p, q) if one is not None), None)


def _at(columns: Columns, name: str, i: int, places: np.ndarray) -> list[list[Any]]:
    """The inner lists of a row's list of lists at some places; empty ones for null and for an absent column."""
    if name not in columns.table.column_names or not (one := columns.table[name][i]).is_valid:
        return [[] for _ in places]
    import pyarrow as pa

    return [inner or [] for inner in one.values.take(pa.array(places)).to_pylist()]
