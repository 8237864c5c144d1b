"""The audit of the reward `reasoning_gym` over all tasks of the package: prints the table of docs/rewards.md.

    python benchmarks/reasoning_gym_rewards.py [--rows 10] [--task NAME ...]

The columns are mean rewards over the rows. "row i + 1" is the share of the rows of seed 1 that are the next rows of
seed 0.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from importlib import metadata

from opd.data.gym import gym_rows
from opd.data.prompts import load_prompts
from opd.errors import OPDError
from opd.recipe.schema import DataSection
from opd.rewards.audit import audit
from opd.rewards.registry import load_reward

SHORT = {
    "the answer": "answer",
    "in a sentence": "sentence",
    "in a box": "box",
    "with a full stop": "full stop",
    "in bold": "bold",
    "an empty text": "empty",
    '"hello"': "hello",
    "another row's answer": "another's",
    "a longer number": "longer",
}


def row_of(task: str, rows: int) -> tuple[str, str]:
    """The task's row of the table, and its level: stop, change, ok or none."""
    try:
        prompts = load_prompts(DataSection(path=f"reasoning_gym:{task}", limit=rows))
        found = audit(load_reward("reasoning_gym", {}), prompts, rows=rows, seconds=60)
        following = [entry["question"] for entry in gym_rows(task, {"seed": 1}, rows)]
    except OPDError as error:
        print(f"{task}: {error}")
        return f"| `{task}` | needs options |" + " |" * (len(SHORT) + 2), "none"
    first = [prompt.content for prompt in prompts]
    shift = sum(a == b for a, b in zip(first[1:], following, strict=False)) / (rows - 1)
    if found is None:
        return f"| `{task}` | no answers |" + " |" * (len(SHORT) + 1) + f" {shift:.2f} |", "none"
    paid = {**found.right, **found.wrong}
    cells = [f"{paid[kind]:.2f}" if kind in paid else "" for kind in SHORT]
    failed = f"{found.failed} of {found.texts}" if found.failed else ""
    return f"| `{task}` | {found.level} | {' | '.join(cells)} | {failed} | {shift:.2f} |", found.level


def main() -> None:
    from reasoning_gym.factory import DATASETS

    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--task", action="append")
    given = parser.parse_args()
    print(f"reasoning_gym {metadata.version('reasoning_gym')}, {given.rows} rows a task, seed 0\n")
    print(f"| task | level | {' | '.join(SHORT.values())} | raised | row i + 1 |")
    print("|---|---|" + "--:|" * (len(SHORT) + 2))
    levels: list[str] = []
    for task in given.task or sorted(DATASETS):
        with redirect_stdout(sys.stderr):  # some tasks print
            row, level = row_of(task, given.rows)
        levels.append(level)
        print(row, flush=True)
    counts = ", ".join(f"{levels.count(level)} {level}" for level in ("stop", "change", "ok", "none"))
    print(f"\n{len(levels)} tasks: {counts}")


if __name__ == "__main__":
    sys.exit(main())
