"""What tells runs of one name apart: the few keys of their recipes that differ, else their folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from opd.messages import visible

KEYS = 2  # keys in a name at most
LONGEST = 32  # characters of a key with its value


def apart(names: Sequence[str], paths: Sequence[Path], keys: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """A short text for each run whose name is also another's, such as `seed 1`; empty for the others.

    `keys` are the keys that differ, each with the value of every run. Of more than two of them, or of long ones, the
    folders are shorter: their last parts, as many as it takes.
    """
    counts = Counter(names)
    shared = [i for i, name in enumerate(names) if counts[name] > 1]
    if not shared:
        return [""] * len(names)
    own = [(key.rpartition(".")[2], values) for key, values in keys if not key.startswith("environment.")]
    parts = [[f"{key} {values[i]}" if values[i] else f"no {key}" for key, values in own] for i in shared]
    texts = [", ".join(part) for part in parts]
    short = len(own) <= KEYS and all(len(one) <= LONGEST for part in parts for one in part)
    if not short or len(set(texts)) < len(shared):
        texts = folders([paths[i] for i in shared])
    found = dict(zip(shared, texts, strict=True))
    return [visible(found.get(i, "")) for i in range(len(names))]


def folders(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that differ, as texts; of a folder that is given twice its own name."""
    every = [path.resolve().parts for path in paths]
    for n in range(1, max(map(len, every)) + 1):
        ends = ["/".join(parts[-n:]) for parts in every]
        if len(set(ends)) == len(ends):
            return ends
    return [path.resolve().name for path in paths]
