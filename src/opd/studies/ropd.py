"""A rubric of a teacher's texts as the reward: how many texts, one rubric or many, a verifier that is blind or not.

arXiv 2605.07396: results and ablations on AIME24. The judge is a program (`opd.studies.graders`) that misreads a tenth
of all statements; told whose an answer is, it denies half of what is true of a student's. Setting A trains students on
digits to sort, from texts of a trained teacher. Setting B is a table: a policy over a fixed list of answers to each
task, whose quality is known, and a teacher that is right six times of ten.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd.studies import ablation, report
from opd.studies.ablation import START, Numbers, Setting, Size, gap
from opd.studies.lab import SORTING, Lab
from opd.studies.outcome import Check, Finding, Outcome, differences, finding
from opd.studies.rubric_table import Table, played

NOISE, BIAS = 0.1, 0.5
RUBRIC, ONE, TOLD, OWN, TEXTS = "rubric", "one text", "not blind", "own rubrics", "sft on the texts"
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    RUBRIC: {},
    ONE: {"answers": 1},
    TOLD: {"blind": False},
    OWN: {"shared": False},
}
# Thresholds.
LEARNS = 0.1  # sampled accuracy over the student before
BETTER = 0.0  # accuracy, quality, rank correlation, variance


def trained_by(options: Mapping[str, Any]) -> Setting:
    """A distillation by `ropd`: 16 prompts of 8 responses, the teacher's texts written when they are asked for."""
    judge = {"function": "opd.studies.graders:grader", "options": {"noise": NOISE, "bias": BIAS}}
    reward = {
        "name": "rubric",
        "options": dict(options),
        "author": {"lm": "teacher", "max_tokens": SORTING.longest},
        "judge": judge,
    }
    sampling = {"n": 8, "max_completion_length": SORTING.longest}
    return Setting(method="ropd", stage={"reward": reward, "sampling": sampling, "optimizer": OPTIMIZER})


OPTIMIZER = {"learning_rate": 5e-4, "betas": [0.9, 0.99], "schedule": "linear", "warmup_steps": 10}
SETTINGS = {name: trained_by(options) for name, options in OPTIONS.items()} | {
    TEXTS: Setting(
        method="sft",
        options={"source": "teacher"},
        stage={"sampling": {"n": 4, "max_completion_length": SORTING.longest}, "optimizer": OPTIMIZER},
    )
}
SIZE = Size(steps=150, prompts_per_step=16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Of students held-out numbers; of the table, by setting and measure, one number a seed."""

    students: Numbers
    table: Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of both settings."""

    students: Size = SIZE
    table: Table = field(default_factory=Table)


def run(lab: Lab, size: Sizes | None = None) -> Outcome:
    """Both settings for all seeds; see the file's docstring."""
    size = size or Sizes()
    students = ablation.measure(lab, SETTINGS, size.students)
    table: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in OPTIONS.items():
            lab.note(f"table: {name}")
            for seed in size.students.seeds:
                place = Path(folder) / name / str(seed)
                ablation.append(table, name, played(size.table, seed, options, NOISE, BIAS, place))
    measured = Measured(students=students, table=table)
    return Outcome(
        setup=(
            f"A: sorting five digits, {len(size.students.seeds)} pairs of their own seeds, {size.students.steps} "
            f"updates of {size.students.prompts_per_step} prompts with 8 responses; the teacher writes 4 texts a "
            "prompt at temperature 1, and is asked for nothing else. SFT gets as many texts and updates, at the same "
            f"learning rate. B: {size.table.prompts} tasks with {size.table.arms} answers each, "
            f"{size.table.updates} updates of {size.table.group} draws a task. The judge misreads with probability "
            f"{NOISE}, and where it is told the source it denies what is true of a student's answer with probability "
            f"{BIAS}."
        ),
        findings=judge(measured),
        figure=draw(measured),
        table=ablation.table(students, ("sampled accuracy", "greedy accuracy", "KL", "length")),
    )


def judge(measured: Measured) -> tuple[Finding, ...]:
    """The claims against the numbers."""
    students = measured.students

    def of_table(first: str, second: str, what: str, **side: float) -> Check:
        interval = differences(measured.table[first][what], measured.table[second][what])
        return Check(what=f"{what}, {first} minus {second}", interval=interval, **side)

    return (
        finding(
            "A rubric of a teacher's texts teaches, without a logit of the teacher",
            "2605.07396 results",
            [gap(students, RUBRIC, START, above=LEARNS)],
        ),
        finding(
            "It teaches more than imitation of the same texts",
            "2605.07396 results",
            [gap(students, RUBRIC, TEXTS, above=BETTER)],
        ),
        finding(
            "With one text of the teacher instead of four the student ends worse",
            "2605.07396 ablations",
            [gap(students, RUBRIC, ONE, above=BETTER)],
            [of_table(RUBRIC, ONE, "quality", above=BETTER)],
        ),
        finding(
            "A rubric from four texts ranks answers better than one from one text",
            "2605.07396 ablations",
            [of_table(RUBRIC, ONE, "rank correlation", above=BETTER)],
        ),
        finding(
            "With a judge that is partial, a verifier that is not blind leaves the student worse",
            "2605.07396 ablations",
            [gap(students, RUBRIC, TOLD, above=BETTER)],
            [of_table(RUBRIC, TOLD, "quality", above=BETTER)],
        ),
        finding(
            "With a rubric for each response the student ends worse than with one for all",
            "2605.07396 ablations",
            [gap(students, RUBRIC, OWN, above=BETTER)],
            [of_table(RUBRIC, OWN, "quality", above=BETTER)],
        ),
        finding(
            "One rubric for all gives advantages of less variance over the judge's mistakes than one for each response",
            "2605.07396 ablations",
            [of_table(RUBRIC, OWN, "variance of the advantage", below=BETTER)],
        ),
    )


def draw(measured: Measured) -> report.Figure:
    """What students end with, and what the table says of each way to make and apply rubrics."""
    figure, axes = report.figure(4, width=2.7, height=3.0)
    names = [START, *SETTINGS]
    shown: Numbers = {name: measured.students[name] for name in names}
    for name, numbers in measured.table.items():
        shown[name] = shown[name] | {what: list(values) for what, values in numbers.items()}
    panels = {
        "sampled accuracy": "A: sampled accuracy, share",
        "quality": "B: quality after training, share",
        "rank correlation": "B: rank correlation of\nreward and quality",
        "variance of the advantage": "B: variance of the advantage\nover the judge's mistakes",
    }
    ablation.bars(axes[0], shown, panels)
    return figure
