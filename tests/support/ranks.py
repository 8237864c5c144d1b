"""What torchrun starts for the tests: `ranks.py FOLDER...` runs the recipe of each folder, one after the other.

Also the pieces that recipes of these tests name as `ranks:NAME`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from opd import methods
from opd.method import Method
from opd.pieces import sources
from opd.pieces.updates import extrapolation, kept_weights
from opd.types import Prompt, Rollout, Source, Writers


def some_masked() -> Method:
    """Reverse KL on the responses to prompts of even id alone: a process may be left without a trained token."""
    student = sources.on_policy()

    def source(prompts: Sequence[Prompt], writers: Writers, seed: tuple[int, int], student_top_k: int) -> list[Rollout]:
        written = student(prompts, writers, seed, student_top_k)
        return [r if r.prompt.id % 2 == 0 else replace(r, trained=torch.zeros_like(r.trained)) for r in written]

    declared: Source = source
    return replace(methods.build("reverse_kl", {"average": "token"}), source=declared)


def all_masked() -> Method:
    """As `some_masked`, with no trained token at all."""
    method = some_masked()
    some = method.source

    def source(prompts: Sequence[Prompt], writers: Writers, seed: tuple[int, int], student_top_k: int) -> list[Rollout]:
        return [replace(r, trained=torch.zeros_like(r.trained)) for r in some(prompts, writers, seed, student_top_k)]

    return replace(method, source=source)


def jumping_average() -> Method:
    """A student taught by its own moving average, which follows its jumps."""
    options = {"k": None, "template": "{privileged_context}{prompt}", "teacher": "ema", "decay": 0.7}
    jumps = extrapolation(by="teacher_kl", prompts=5, candidates=3, ties=False)
    method = methods.build("context_distillation", options)
    return replace(method, update=jumps, memory={"extrapolation": kept_weights()})


calls = 0


def odd(prompt: Prompt, response: str) -> float:
    """A reward that differs between the responses to a prompt.

    With JUDGE=out, process 1 fails in its 35th call. With JUDGE=slow, a call takes 50 ms.
    """
    global calls
    calls += 1
    if os.environ.get("JUDGE") == "out" and os.environ.get("RANK") == "1" and calls == 35:
        raise RuntimeError("the judge is out")
    if os.environ.get("JUDGE") == "slow":
        time.sleep(0.05)
    return float(sum(map(ord, response)) % 5)


def rare(prompt: Prompt, response: str) -> float:
    """A reward that is 1 for a fifth of what a model of random weights writes."""
    return float(sum(map(ord, response)) % 5 == 0)


def main(folders: Sequence[str]) -> None:
    from opd.parallel import join
    from opd.recipe.load import load_recipe
    from opd.runs.stages import run_recipe
    from opd.stage.progress import Progress
    from opd.stage.quiet import quiet_libraries
    from support.runs import import_all

    quiet_libraries()
    import_all()  # in all processes at once
    with join() as world:
        for folder in folders:
            os.chdir(Path(folder))
            run_recipe(load_recipe("recipe.yaml"), progress=Progress(quiet=True), world=world)


if __name__ == "__main__":
    main(sys.argv[1:])
