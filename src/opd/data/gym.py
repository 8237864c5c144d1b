"""Rows of reasoning-gym, by the name of a task and its options: row i is the same whatever else is read.

The package draws row i of most tasks from the seed `seed + i`, so row i of seed s is row i + 1 of seed s - 1. Measured
on all 105 tasks of 0.1.25 that need no options: true of 102. The rows of `acre` depend on the size of the data set, so
rows are taken from blocks of `BLOCK`. `list_functions` draws from Python's global random numbers, which are seeded here
for each row. Tasks in `HASHED` iterate over sets of texts, whose order is that of PYTHONHASHSEED: a process with the
seed 0 makes their rows. `benchmarks/reasoning_gym_rewards.py` measures the first again, tests the rest.
"""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from opd.errors import ConfigError, DataError, nearest
from opd.plugins import _import_extra, np

BLOCK = 500  # rows of a data set of reasoning-gym, its own default
HASHED = frozenset(
    {
        "intermediate_integration",
        "isomorphic_strings",
        "knight_swap",
        "polynomial_multiplication",
        "ransom_note",
        "word_ladder",
    }
)
CHILD = "from opd.data.gym import answer_parent; answer_parent()"


def gym_rows(task: str, options: Mapping[str, Any], stop: int | None) -> Iterator[dict[str, Any]]:
    """The entries of reasoning-gym's task `task`: `size` of the options, else `stop`, else `BLOCK`.

    Without `size`, row i is row i mod `BLOCK` of the data set with the seed `seed` + i - i mod `BLOCK`, so neither
    `stop` nor the number of rows read changes a row. Raises ConfigError as `gym_task`, DataError for a row that the
    task cannot make.
    """
    size = _whole(task, options, "size", stop or BLOCK, least=1)
    count = size if stop is None else min(size, stop)
    if task in HASHED and os.environ.get("PYTHONHASHSEED") != "0":
        yield from _from_child(task, options, count)
    else:
        yield from _entries(task, options, count)


def gym_task(task: str, options: Mapping[str, Any]) -> Any:
    """reasoning-gym's data set of a task. Raises ConfigError for an unknown task, unknown options or bad values."""
    gym = _import_extra("reasoning_gym", "gym")
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise ConfigError(
            f"reasoning-gym has no task {task!r}.{nearest(task, DATASETS)} It has: {', '.join(sorted(DATASETS))}."
        )
    known = [option.name for option in fields(DATASETS[task][1])]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"reasoning_gym:{task} has no option {name!r}.{nearest(name, known)} It has: {', '.join(known)}."
            )
    try:
        with seeded(0):
            return gym.create_dataset(task, **options)
    except Exception as error:  # mostly AssertionError, from the task's own checks
        raise ConfigError(f"reasoning_gym:{task} refuses the options {dict(options)}: {error}. Change them.") from error


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random numbers of Python and numpy for the block; afterwards they are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def answer_parent() -> None:
    """Read (task, options, count) from stdin and write the entries to stdout, both pickled; then end."""
    task, options, count = pickle.load(sys.stdin.buffer)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the task prints does not belong to the answer
    try:
        answer: Any = list(_entries(task, options, count))
    except (ConfigError, DataError) as error:
        answer = error
    pickle.dump(answer, out)
    out.close()


def _entries(task: str, options: Mapping[str, Any], count: int) -> Iterator[dict[str, Any]]:
    seed = _whole(task, options, "seed", 0, least=0)
    size = _whole(task, options, "size", BLOCK, least=1)
    dataset: Any = None
    for row in range(count):
        first = row - row % size
        if row == first:
            dataset = gym_task(task, {**options, "size": size, "seed": seed + first})
        try:
            with seeded(seed + row):
                entry = dataset[row - first]
        except Exception as error:  # a task may raise anything
            raise DataError(
                f"Row {row} of reasoning_gym:{task} cannot be made with the options {dict(options)}: "
                f"{type(error).__name__}: {error}. Change the options, or take fewer rows."
            ) from error
        yield entry


def _whole(task: str, options: Mapping[str, Any], name: str, default: int, *, least: int) -> int:
    """A whole number of the options. Raises ConfigError for anything else."""
    value = options.get(name, default)
    if type(value) is not int or value < least:
        raise ConfigError(f"reasoning_gym:{task} got `{name}: {value!r}`. Give a whole number, at least {least}.")
    return value


def _from_child(task: str, options: Mapping[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """The entries, made in a process with PYTHONHASHSEED=0."""
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    request = pickle.dumps((task, dict(options), count))
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=request, stdout=subprocess.PIPE, env=environment, check=False
    )
    if done.returncode != 0:
        raise DataError(
            f"The process that makes the rows of reasoning_gym:{task} with PYTHONHASHSEED=0 ended with status "
            f"{done.returncode}. Its output is above. Set PYTHONHASHSEED=0 to make the rows in this process."
        )
    answer = pickle.loads(done.stdout)
    if isinstance(answer, Exception):
        raise answer
    yield from answer
