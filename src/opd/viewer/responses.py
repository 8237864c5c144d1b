"""Which responses of a stage a page holds: of the held-out prompts, of the steps, and of the same prompts over time."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from opd.viewer.images import Album
from opd.viewer.pack import rounded
from opd.viewer.read import Columns, StageView
from opd.viewer.rows import COLUMNS, Block
from opd.viewer.thin import FILES, FOLLOWED, HELD_OUT, Budget, evenly, picked, spread

Key: TypeAlias = tuple[str | None, str | None, Any, int]  # task, sampling setting, prompt, sample

SCORED = 64  # at most the first rows of a setting have log-probs of both models
MATRIX = 40  # steps of the table of positions
PLACES = 64  # its columns
SURVEYED = ("pick", "response_ids", "policy_logp", "teacher_logp", "signal")


@dataclass(slots=True)
class Survey:
    """What one reading of a file of samples tells: which rows to show, and where the models differ."""

    step: int
    of: int  # responses in the file that were trained on
    rows: list[int]
    followed: list[int]
    lengths: list[int]  # of `rows` and `followed`
    what: str = ""  # of `sums`: log q - log p, or the signal
    sums: np.ndarray = field(default_factory=lambda: np.zeros(0))  # by position
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0))


def survey(stage: StageView, step: int, most: int) -> Survey:
    """Read what decides about the rows of a step's file. Raises RunError if it cannot be read."""
    columns = stage.samples(step, SURVEYED)
    assert columns is not None, f"no samples of step {step}"
    picks, lengths = columns.values("pick"), columns.lengths("response_ids").tolist()
    trained = [i for i, pick in enumerate(picks) if pick != "follow"]
    what, values = differences(columns)
    if any(picks[i] is not None for i in trained):
        rows = [i for i in picked(picks, most + picks.count("follow")) if picks[i] != "follow"][:most]
    else:
        means = [_mean(values[i]) for i in trained]
        rows = [trained[i] for i in spread(means, most)]
    found = Survey(step, len(trained), rows, [i for i, pick in enumerate(picks) if pick == "follow"], [], what)
    found.lengths = [lengths[i] for i in (*rows, *found.followed)]
    longest = max((lengths[i] for i in trained), default=0)
    found.sums, found.counts = np.zeros(longest), np.zeros(longest)
    for i in trained:
        one = values[i]
        if one is not None:
            here = np.isfinite(one)
            found.sums[: len(one)] += np.where(here, one, 0.0)
            found.counts[: len(one)] += here
    return found


def differences(columns: Columns) -> tuple[str, list[np.ndarray | None]]:
    """What the values are, and each row's: log q - log p where any row has both, else the signal."""
    ratios: list[np.ndarray | None] = []
    for i in range(len(columns)):
        p, q = columns.numbers("policy_logp", i), columns.numbers("teacher_logp", i)
        ratios.append(q - p if p is not None and q is not None and len(p) == len(q) else None)
    if any(one is not None for one in ratios):
        return "ratio", ratios
    signals = [columns.numbers("signal", i) for i in range(len(columns))]
    return ("signal" if any(one is not None for one in signals) else ""), signals


def _mean(values: np.ndarray | None) -> float:
    return 0.0 if values is None or not np.isfinite(values).any() else float(np.nanmean(values))


def matrix(surveys: Sequence[Survey]) -> dict[str, Any] | None:
    """Means by step and position, at most `MATRIX` steps and `PLACES` columns; None without numbers."""
    held = [one for one in surveys if one.counts.sum()]
    held = [held[i] for i in evenly(len(held), MATRIX)]
    if not held:
        return None
    longest = max(len(one.sums) for one in held)
    width = max(1, math.ceil(longest / PLACES))
    starts = np.arange(0, longest, width)
    means: list[list[float | None]] = []
    counts: list[list[int]] = []
    for one in held:
        sums, n = (np.pad(x, (0, longest - len(x))) for x in (one.sums, one.counts))
        total, number = np.add.reduceat(sums, starts), np.add.reduceat(n, starts)
        means.append([rounded(float(a / b), 4) if b else None for a, b in zip(total, number, strict=True)])
        counts.append([int(b) for b in number])
    return {"width": width, "steps": [one.step for one in held], "mean": means, "count": counts, "what": held[0].what}


def sample_block(
    stage: StageView, step: int, rows: Sequence[int] | None, budget: Budget, album: Album | None = None
) -> bytes:
    """Some rows of a step's file (None: all but those of `follow`) as a block of a page."""
    if rows is None:
        picks = stage.samples(step, ["pick", "prompt_id"])
        rows = [] if picks is None else [i for i, pick in enumerate(picks.values("pick")) if pick != "follow"]
    columns = stage.samples(step, COLUMNS, rows)
    block = Block(budget, album or Album())
    for i in range(0 if columns is None else len(columns)):
        assert columns is not None
        block.add(columns, i, place=(f"s{step}", rows[i]))
    return block.bytes(step=step)


def row_block(stage: StageView, file: str, row: int, parts: Sequence[tuple[int, int]]) -> bytes | None:
    """One response with the tokens of these parts [start, end): of `s120` or `held_before`; None if it is absent."""
    read = stage.samples if file.startswith("s") else stage.held_out
    which = int(file[1:]) if file.startswith("s") else file.removeprefix("held_")
    count = read(which, ["response_ids"])  # type: ignore[arg-type]
    if count is None or row >= len(count):
        return None
    columns = read(which, COLUMNS, [row])  # type: ignore[arg-type]
    assert columns is not None
    block = Block(Budget(cap=1, tops=10**9))
    teacher, old = file == "held_teacher", "format" not in columns.metadata
    block.add(columns, 0, by_teacher=teacher, old=old, parts=parts, place=(file, row))
    return block.bytes()


def follow_block(
    stage: StageView, followed: Mapping[int, Sequence[int]], budget: Budget, album: Album | None = None
) -> bytes:
    """The same prompts over time: rows by step, of at most `FOLLOWED` steps, and [step, row] of each prompt."""
    block = Block(budget, album or Album())
    groups: dict[Key, list[list[int]]] = {}
    steps = list(followed)
    for step in [steps[i] for i in evenly(len(steps), FOLLOWED)]:
        columns = stage.samples(step, COLUMNS, followed[step])
        if columns is None:
            continue
        for i, key in enumerate(keys_of(columns)):
            row = block.add(columns, i, place=(f"s{step}", followed[step][i]))
            groups.setdefault(key, []).append([step, row])
    found = [{"task": task, "setting": setting, "id": i, "at": at} for (task, setting, i, _), at in groups.items()]
    return block.bytes(groups=found)


KEYED = ("task", "sampling", "prompt_id", "sample", "prompt", "prompt_messages", "images")  # what `keys_of` reads


def keys_of(columns: Columns, by: str = "id") -> list[Key]:
    """What tells one held-out response from another, by row: task, setting, prompt and sample.

    `by` "id": the prompt's id. "prompt": a hash of its messages, or of its text in files that have none, and of its
    images; the last part then counts the rows of equal prompts.
    """
    tasks, settings, ids, samples = (columns.values(name) for name in KEYED[:4])
    if by == "id":
        return [(task, setting, i, n or 0) for task, setting, i, n in zip(tasks, settings, ids, samples, strict=True)]
    said = zip(*(columns.values(name) for name in ("prompt_messages", "prompt", "images")), strict=True)
    seen: Counter[tuple[Any, ...]] = Counter()
    keys: list[Key] = []
    for task, setting, (messages, prompt, images) in zip(tasks, settings, said, strict=True):
        pictures = "".join(f"\n{image['image']}" for image in images or ())
        digest = hashlib.sha256(f"{messages or prompt or ''}{pictures}".encode()).hexdigest()[:16]
        keys.append((task, setting, digest, seen[task, setting, digest]))
        seen[task, setting, digest] += 1
    return keys


@dataclass(slots=True)
class HeldOut:
    """One evaluation in the page: its label, and the rows of its file that are shown, by key."""

    label: str
    stage: StageView
    when: str
    rows: dict[Key, int]
    lengths: dict[Key, int]
    old: bool


def held_out(label: str, stage: StageView, when: str, by: str = "id") -> HeldOut | None:
    """The keys and lengths of an evaluation's responses; None if it has no file. `by` as for `keys_of`."""
    columns = stage.held_out(when, [*KEYED, "response_ids"])
    if columns is None:
        return None
    keys = keys_of(columns, by)
    lengths = dict(zip(keys, columns.lengths("response_ids").tolist(), strict=True))
    rows = {key: i for i, key in enumerate(keys)}
    return HeldOut(label, stage, when, rows, lengths, "format" not in columns.metadata)


def shown_keys(measured: Sequence[HeldOut], most: int = HELD_OUT) -> list[Key]:
    """The responses that a page holds: of each setting the first, which are scored, then evenly over the rest."""
    every = list(dict.fromkeys(key for one in measured for key in one.rows))
    groups: dict[tuple[str | None, str | None], list[Key]] = {}
    for key in every:
        groups.setdefault(key[:2], []).append(key)
    share = max(1, most // max(1, len(groups)))
    chosen: set[Key] = set()
    for keys in groups.values():
        first, rest = keys[: min(SCORED, share)], keys[min(SCORED, share) :]
        chosen |= {*first, *(rest[i] for i in (evenly(len(rest), share - len(first)) if share > len(first) else []))}
    return [key for key in every if key in chosen]


def held_block(measured: Sequence[HeldOut], keys: Sequence[Key], budget: Budget, album: Album | None = None) -> bytes:
    """Held-out responses as a block: rows, and groups with the row of each evaluation by its label."""
    block = Block(budget, album or Album())
    groups = [{"task": task, "setting": setting, "id": i, "rows": {}} for task, setting, i, _ in keys]
    for one in measured:
        here = [(n, one.rows[key]) for n, key in enumerate(keys) if key in one.rows]
        columns = one.stage.held_out(one.when, COLUMNS, [row for _, row in here])
        assert columns is not None
        for i, (n, row) in enumerate(here):
            place = (f"held_{one.when}", row)
            added = block.add(columns, i, by_teacher=one.when == "teacher", old=one.old, place=place)
            groups[n]["rows"][one.label] = added
    return block.bytes(groups=groups)


def sampled_steps(stage: StageView) -> list[int]:
    """The steps of which a page holds responses: all, or `FILES` of them."""
    steps = stage.sample_steps
    return [steps[i] for i in evenly(len(steps), FILES)]
