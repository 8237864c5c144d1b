"""Two tasks and one start: recipes of two models with a task each, apart or together, and of one model on both tasks.

S is the number of updates that each of two models makes. An update trains on as many responses to the model's own
prompts in every recipe; where a peer teaches, on as many again to the peer's prompts.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opd_studies.lab.distilling import HELD_OUT
from opd_studies.lab.lab import SORTERS, Lab, PairSize, Task
from opd_studies.lab.two_tasks import CHARACTERS, NEVER, beginner

LONGEST = 2  # tokens: a digit and the end


WRONG = 0.4  # share of the start's examples with the other task's answer


FIRST, SECOND = "first", "second"  # the tasks, and the models that begin with one of them


def _task(sign: str, **options: Any) -> Task:
    """The smallest of four digits, or the largest."""
    return Task(
        data="opd_studies.worlds.two_signs:extremes",
        reward="exact",
        longest=LONGEST,
        options={"sign": sign, **options},
        characters=CHARACTERS,
    )


# What the start learns: what each sign asks for, often confused with the other.
CONFUSED = {FIRST: _task(">", wrong=WRONG), SECOND: _task("<", largest=True, wrong=WRONG)}


# By setting, the tasks. In A the signs ask for different answers to the same digits, in B for the same answer.
PAIRS: Mapping[str, Mapping[str, Task]] = {
    "A": {FIRST: _task(">"), SECOND: _task("<", largest=True)},
    "B": {FIRST: _task(">"), SECOND: _task("<")},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds, S, a model's own prompts per update and responses per prompt, the start, learning rates and `copd`."""

    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    updates: int = 25
    prompts: int = 8
    group: int = 8
    rows: int = 400  # prompts per task
    held_out: int = HELD_OUT
    start: PairSize = field(default_factory=lambda: replace(SORTERS, student_rows=3000, student_steps=100))
    rates: Mapping[str, float] = field(default_factory=lambda: {"grpo": 6e-4, "copd": 6e-4, "opd": 1e-3})
    beta: float = 1.0
    cycle: tuple[int, int] = (3, 2)  # updates of `copd` without and with teaching: the paper's 1.5 to 1

    @property
    def taught(self) -> int:
        """Of S updates of `copd`, those with teaching."""
        return self.updates * self.cycle[1] // sum(self.cycle)

    @property
    def total(self) -> int:
        """Updates of one model with as many responses as both of `copd` write: 2 S, and 2 for each with teaching."""
        return 2 * (self.updates + self.taught)


def starts(lab: Lab, size: Size) -> list[Path]:
    """The start of each seed, which answers each sign's task right or with the other task's answer."""
    made = lab.run_all([beginner(seed, size.start, CONFUSED) for seed in size.seeds])
    return [folder / "warm-up" / "model" for folder in made]


def mixed(setting: str, seed: int, start: Path, size: Size) -> dict[str, Any]:
    """GRPO of one model on both tasks, measured before, after 2 S updates and at the end."""
    tasks = _sections(setting, size, before=True, every=2 * size.updates)
    return _recipe("mixed", seed, {"both": start}, _stage(size, "mixed", "grpo", size.total, train="both", tasks=tasks))


def apart(setting: str, seed: int, start: Path, size: Size) -> dict[str, Any]:
    """An expert of each task by GRPO, with checkpoints after S updates and at the end, and the mean of both."""
    made = _stage(size, "apart", "grpo", size.total // 2, tasks=_owned(_sections(setting, size, every=size.updates)))
    made |= {"train": FIRST, "peers": [SECOND], "topology": "none", "checkpoint": {"every": size.updates, "keep": 2}}
    return _recipe("apart", seed, {FIRST: start, SECOND: start, "mean": "apart"}, made, _examined(setting, size))


def together(setting: str, seed: int, start: Path, size: Size) -> dict[str, Any]:
    """`copd`: a model of each task, which teach each other, and the mean of both."""
    made = _stage(size, "together", "copd", size.updates, tasks=_owned(_sections(setting, size, kl=True)))
    made |= {"train": FIRST, "peers": [SECOND], "prompts_per_step": 2 * size.prompts}
    made["options"] = {"alone": size.cycle[0], "together": size.cycle[1], "beta": size.beta}
    return _recipe("together", seed, {FIRST: start, SECOND: start, "mean": "together"}, made, _examined(setting, size))


def static(
    setting: str, seed: int, student: Path, experts: Mapping[str, Path], size: Size, *, both: bool
) -> dict[str, Any]:
    """Finished experts teach a student, each on its own prompts; without `both` the second expert alone."""
    tasks = _sections(setting, size, before=not both, kl=not both)  # of the expert: its distance from the other one
    for name, section in tasks.items():
        section |= {"teacher": f"{name}-expert", "share": 1.0 if both or name == SECOND else NEVER}
    made = _stage(size, "distil", "opd", size.total - 2 * size.updates, train="student", tasks=tasks)
    made["task_order"] = "mixed" if both else "alternate"
    models = {"student": student, **{f"{name}-expert": folder for name, folder in experts.items()}}
    return _recipe("static", seed, models, made)


def _sections(setting: str, size: Size, **evaluate: Any) -> dict[str, dict[str, Any]]:
    """The tasks of a stage, each with its held-out evaluation."""
    sampled = {"temperature": 1, "n": 2, "max_completion_length": LONGEST}
    return {
        name: {
            "data": task.rows(size.rows, seed=3),
            "reward": {"name": task.reward},
            "evaluate": {
                "data": task.rows(size.held_out, part="held_out"),
                "sampling": {"sampled": sampled},
                "before": False,
                **evaluate,
            },
        }
        for name, task in PAIRS[setting].items()
    }


def _owned(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The tasks, each of the model with its name."""
    return {name: {**section, "train": name} for name, section in tasks.items()}


def _stage(size: Size, name: str, method: str, steps: int, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "method": method,
        "task_order": "mixed",
        "prompts_per_step": size.prompts,
        "steps": steps,
        "sampling": {"max_completion_length": LONGEST, "n": size.group},
        "optimizer": {"learning_rate": size.rates[method], "betas": [0.9, 0.99]},
        "checkpoint": {"every": 100_000, "keep": 1},
        "samples_every": 0,
        **more,
    }


def _examined(setting: str, size: Size) -> dict[str, Any]:
    """A stage that measures the mean of the models on both tasks. Its one update is too small to matter."""
    made = _stage(size, "examine", "grpo", 1, train="mean", tasks=_sections(setting, size))
    return made | {"prompts_per_step": 2, "optimizer": {"learning_rate": 1e-9}}


def _recipe(name: str, seed: int, models: Mapping[str, Path | str], *stages: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe; a model is a folder or the name of an earlier stage."""
    sections = {key: {"path" if isinstance(of, Path) else "from_stage": str(of)} for key, of in models.items()}
    return {"name": f"{name}-{seed}", "seed": seed, "models": sections, "stages": list(stages)}


def experts_of(run: Path, start: Path, step: int) -> dict[str, Path]:
    """Folders, by task, of the experts of a run of `apart` after `step` updates; written beside its stages.

    Raises RunError if the checkpoint is missing or damaged.
    """
    from safetensors.torch import load_file, save_file

    from opd.stage.checkpoint import load

    groups = load(run / "apart" / "checkpoints" / f"step_{step:06d}").tensors
    saved = load_file(start / "model.safetensors")  # tied weights are in it once
    folders: dict[str, Path] = {}
    for name, group in ((FIRST, "student"), (SECOND, "peer0.student")):
        folders[name] = shutil.copytree(start, run / f"{name}-expert", dirs_exist_ok=True)
        weights = {key: groups[group][key].contiguous() for key in saved}
        save_file(weights, folders[name] / "model.safetensors", metadata={"format": "pt"})
    return folders
