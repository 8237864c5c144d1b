"""Models of one family for two studies: trained on mixed examples by SFT, and then by GRPO.

`base` is a small model trained on examples, half of them with a bad habit (`opd_studies.worlds.bad_habit_data`). The
others are:

    base + GRPO     `base` after reinforcement learning on right answers (arXiv 2402.03300)
    larger          a larger model trained on examples of the same kind: the same pipeline
    larger, early   `larger` stopped earlier, only a little better than the base
    larger + GRPO   `larger` after reinforcement learning
    larger, clean   a larger model trained on right examples only: as good as base + GRPO, but of another origin
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opd.method import Method
from opd.methods.reverse_kl import reverse_kl
from opd.pieces.teacher_rules import self_frozen
from opd_studies.lab.distilling import Distillation, Trained, distil_all, held_out
from opd_studies.lab.lab import SORTING, Lab, Pair, PairSize, Task, optimizer, student_recipe, teacher_recipe

BASE, BASE_RL = "base", "base + GRPO"


LARGER, EARLY, LARGER_RL, CLEAN = "larger", "larger, early", "larger + GRPO", "larger, clean"


FALLING = 0.5  # share of the examples in falling order, which is wrong


MIXED = Task(
    data="opd_studies.worlds.bad_habit_data:sorting_both_ways",
    reward=SORTING.reward,
    longest=SORTING.longest,
    options={"falling": FALLING},
)


TOP = 4  # most likely tokens in comparisons of two models; the vocabulary has 17


def _imitators(task: Task, steps: int) -> PairSize:
    """Sizes and training lengths for examples of `task`; `steps`: of the larger model."""
    return PairSize(
        task=task,
        teacher={"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3},
        student={"hidden_size": 48, "intermediate_size": 144, "num_hidden_layers": 2},
        teacher_rows=20_000,
        teacher_steps=steps,
        student_rows=20_000,
        student_steps=200,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySize:
    """The family's training lengths. GRPO has 16 prompts with 16 responses per step."""

    mixed: PairSize = field(default_factory=lambda: _imitators(MIXED, 300))
    clean: PairSize = field(default_factory=lambda: _imitators(SORTING, 150))
    early_steps: int = 180  # of `larger, early`
    base_updates: int = 100  # of GRPO
    larger_updates: int = 60
    learning_rate: float = 1e-3
    group: int = 16


def family(lab: Lab, seeds: Sequence[int], size: FamilySize, names: Sequence[str]) -> dict[str, list[Path]]:
    """Folders of the models `names`, each in the order of `seeds`. Raises the kinds of `opd.errors`."""
    imitators = {
        BASE: [student_recipe(seed, size.mixed) for seed in seeds],
        LARGER: [teacher_recipe(seed, size.mixed) for seed in seeds],
        EARLY: [teacher_recipe(seed, replace(size.mixed, teacher_steps=size.early_steps)) for seed in seeds],
        CLEAN: [teacher_recipe(seed, size.clean) for seed in seeds],
    }
    wanted = [name for name in imitators if any(name in (one, one.removesuffix(" + GRPO")) for one in names)]
    made = iter(lab.run_all([recipe for name in wanted for recipe in imitators[name]]))
    models = {name: [next(made) / imitators[name][0]["stages"][0]["name"] / "model" for _ in seeds] for name in wanted}
    updates = {BASE_RL: size.base_updates, LARGER_RL: size.larger_updates}
    reinforced = [name for name in updates if name in names]
    recipes = [
        grpo_recipe(start, seed, updates[name], size)
        for name in reinforced
        for seed, start in zip(seeds, models[name.removesuffix(" + GRPO")], strict=True)
    ]
    made = iter(lab.run_all(recipes))
    models |= {name: [next(made) / "reinforce" / "model" for _ in seeds] for name in reinforced}
    return {name: models[name] for name in names}


def grpo_recipe(start: Path, seed: int, updates: int, size: FamilySize) -> dict[str, Any]:
    """A recipe that trains `start` by GRPO on right answers."""
    return {
        "name": f"grpo-{seed}",
        "seed": seed,
        "models": {"teacher": {"path": str(start)}},
        "stages": [
            {
                "name": "reinforce",
                "train": "teacher",
                "method": "grpo",
                "data": SORTING.rows(3000, seed=4),
                "reward": {"name": SORTING.reward},
                "sampling": {"n": size.group, "max_completion_length": SORTING.longest},
                "prompts_per_step": 16,
                "steps": updates,
                "optimizer": {"learning_rate": size.learning_rate, "betas": [0.9, 0.99], "schedule": "linear"},
                "checkpoint": {"every": 100_000, "keep": 1},
                "samples_every": 0,
            }
        ],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Teaching:
    """One distillation within the family: exact reverse KL on the student's own responses."""

    teacher: Path
    student: Path
    seed: int
    learning_rate: float = 2e-3
    steps: int = 60
    every: int = 15  # updates between evaluations


def teach(lab: Lab, lessons: Sequence[Teaching]) -> list[Trained]:
    """Run all distillations, with held-out numbers of teachers and students. Raises the kinds of `opd.errors`."""
    return distil_all(lab, [distillation(one) for one in lessons])


def distillation(one: Teaching) -> Distillation:
    """The recipe of one distillation; without a teacher's model if the student is its own teacher."""
    sampling = {"max_completion_length": SORTING.longest}
    evaluate = held_out(
        SORTING,
        sampling={"sampled": {**sampling, "temperature": 1, "n": 4}, "greedy": {**sampling, "temperature": 0}},
        every=one.every,
        before=True,
        teacher=True,
        kl=False,
    )
    itself = one.teacher == one.student  # the control: a teacher with the student's path is refused as a mistake
    return Distillation(
        pair=Pair(teacher=one.teacher, student=one.student),
        seed=one.seed,
        method="opd_studies.lab.rl_teachers:from_itself" if itself else "reverse_kl",
        task=SORTING,
        stage={
            **({"teacher": None} if itself else {}),
            "steps": one.steps,
            "optimizer": optimizer(one.learning_rate, 5),
            "evaluate": evaluate,
            "diagnostics": {"every": one.steps, "k": TOP},  # the first update only
        },
    )


def from_itself() -> Method:
    """The exact reverse KL from the student's own weights at the start: the control of reverse distillation."""
    return replace(reverse_kl(), teacher=self_frozen())


def curve(one: Trained, sampling: str = "sampled") -> dict[int, float]:
    """Held-out accuracy by update, including the start."""
    return {int(row["step"]): row[f"eval/{sampling}/reward"] for row in one.evaluations}


def teacher_accuracy(row: Mapping[str, float], sampling: str = "sampled") -> float:
    """The teacher's own held-out accuracy, from the numbers before training."""
    return row[f"eval/teacher/{sampling}/reward"]
