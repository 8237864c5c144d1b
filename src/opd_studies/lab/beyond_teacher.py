"""Distillations beyond a teacher whose certainty of a format is a setting, and their predicted limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from opd_studies.lab.distilling import HELD_OUT, Distillation, distil_all
from opd_studies.lab.lab import Lab, Pair, PairSize, Task, optimizer, student_recipe, teacher_recipe

WORLD = "opd_studies.worlds.lists"

LONGEST = 16  # tokens: a list has 12 with its end

EVERY_END = 3.0  # in place of a limit or an onset beyond the grid

Weight: TypeAlias = Literal["teacher/student", "none", "whole vocabulary"]


def copying(sloppy: float = 0.0) -> Task:
    """Lists of five ids to copy; a share `sloppy` of the separators does not parse."""
    options = {"sloppy": sloppy} if sloppy else {}
    return Task(
        data=f"{WORLD}:lists", reward=f"{WORLD}:parses", longest=LONGEST, options=options, characters="0123456789>[],;"
    )


SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds, the sloppiness of both models' examples, and lengths."""

    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    teacher_sloppy: float = 0.01
    student_sloppy: float = 0.15
    rows: int = 20_000
    warm_up: int = 400  # updates of both models before the distillation
    steps: int = 60
    learning_rate: float = 2e-3
    prompts_per_step: int = 32
    shape: Mapping[str, int] = field(default_factory=lambda: SHAPE)

    def pairs(self, lab: Lab) -> list[Pair]:
        """Teacher and student of each seed: two models of one shape, from examples that are sloppy to other degrees."""
        one = PairSize(
            task=copying(self.teacher_sloppy),
            teacher=self.shape,
            student=self.shape,
            teacher_rows=self.rows,
            teacher_steps=self.warm_up,
            student_rows=self.rows,
            student_steps=self.warm_up,
        )
        other = replace(one, task=copying(self.student_sloppy))
        made = lab.run_all([r for s in self.seeds for r in (teacher_recipe(s, one), student_recipe(s, other))])
        return [
            Pair(teacher=teacher / "teacher" / "model", student=student / "warm-up" / "model")
            for teacher, student in zip(made[::2], made[1::2], strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """lambda, the weight and its bound; `slower` divides the learning rate and multiplies the updates."""

    strength: float
    weight: Weight = "teacher/student"
    bound: float = 5.0
    slower: int = 1

    def distillation(self, pair: Pair, seed: int, size: Size, *, first: bool = False) -> Distillation:
        """The stage. `first`: it also measures the student before, and the teacher."""
        stage: dict[str, Any] = {
            "steps": size.steps * self.slower,
            "prompts_per_step": size.prompts_per_step,
            "optimizer": optimizer(size.learning_rate / self.slower, 5),
            "evaluate": {
                "data": copying().rows(HELD_OUT, part="held_out"),
                "reward": {"name": f"{WORLD}:parses"},
                "sampling": {"sampled": {"temperature": 1, "max_completion_length": LONGEST}},
                "before": first,
                "teacher": first,
            },
        }
        common: dict[str, Any] = {"pair": pair, "seed": seed, "task": copying()}
        if self.weight == "whole vocabulary":
            folders = {"teacher": str(pair.teacher), "base": str(pair.student), "strength": self.strength}
            beyond = {"teacher": {"scorer": f"{WORLD}:beyond", "options": folders}}
            return Distillation(method="reverse_kl", options={"average": "token"}, stage=stage, models=beyond, **common)
        return Distillation(
            method="extrapolated_opd",
            options={"strength": self.strength, "clip": self.weight, "bound": self.bound},
            stage={**stage, "base": "before"},
            models={"before": {"path": str(pair.student)}},
            **common,
        )


def parse_shares(
    lab: Lab, settings: Mapping[str, Setting], pairs: Sequence[Pair], size: Size
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(share of held-out responses that parse, by setting; that of the student before and of the teacher)."""
    first = next(iter(settings))
    runs = [
        one.distillation(pair, seed, size, first=name == first)
        for seed, pair in zip(size.seeds, pairs, strict=True)
        for name, one in settings.items()
    ]
    trained = distil_all(lab, runs)
    shares = {
        name: [one.after["eval/sampled/reward"] for one in trained[place :: len(settings)]]
        for place, name in enumerate(settings)
    }
    measured = trained[:: len(settings)]
    start = {
        "student before": [one.before["eval/sampled/reward"] for one in measured],
        "teacher": [one.before["eval/teacher/sampled/reward"] for one in measured],
    }
    return shares, start


def masses(pair: Pair, seed: int, size: Size) -> dict[str, tuple[float, float]]:
    """p and b of the class with the least limit among structural tokens, and their means over the ids.

    As `opd doctor` measures them, on the student's own held-out responses before the stage.
    """
    import torch

    from opd.commands.doctor import cliff
    from opd.commands.doctor.subject import load, subject_of
    from opd.maths.extrapolation import largest_strength
    from opd.recipe.load import parse_recipe
    from opd.runs.build import comparable
    from opd.runs.prepare import Given, prepare

    recipe = parse_recipe(Setting(strength=1.0).distillation(pair, seed, size).recipe)
    spec, given = recipe.stages[0], Given()
    prepared = prepare(spec, given, recipe.seed)
    student, others = comparable(spec, prepared.method, *load(recipe, spec, given))
    subject = subject_of(recipe, spec, prepared, student, others, given, prompts=64, seed=seed)
    assert subject.held_out is not None
    rollouts = subject.student_responses(subject.held_out.prompts[:64])
    found = [one for one in cliff.measured(subject, rollouts) if one.measurable and one.positions >= cliff.FEWEST]
    sharp = min(found, key=lambda one: largest_strength(one.teacher, one.base, 5.0))
    texts = [student.tokenizer.decode([i]) for i in range(student.vocabulary)]
    digits = torch.tensor([int(text) if text.isdigit() else cliff.CONTENT for text in texts])
    ids = cliff.measured(subject, rollouts, (digits, [str(i) for i in range(10)]))
    total = math.fsum(one.positions for one in ids)
    return {
        "structure": (sharp.teacher, sharp.base),
        "content": (
            math.fsum(one.positions * one.teacher for one in ids) / total,
            math.fsum(one.positions * one.base for one in ids) / total,
        ),
    }


def limit(p: float, b: float, bound: float) -> float:
    """lambda*, at most `EVERY_END`."""
    from opd.maths.extrapolation import largest_strength

    return min(largest_strength(p, b, bound), EVERY_END)
