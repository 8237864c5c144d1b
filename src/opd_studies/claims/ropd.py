"""A rubric from a teacher's texts as the reward: number of texts, one rubric or many, blind verifier or not.

arXiv 2605.07396: results and ablations on AIME24. The judge is a program (`opd_studies.worlds.graders`) that misreads a
tenth of all statements; if it knows the source of an answer, it denies half of the true statements about a student's.
Setting A sorts digits: students that learn from texts of a trained teacher; and a table, a policy over a fixed list of
answers of known quality, with a teacher that is right six times of ten. Setting B is a table of letters
(`opd_studies.worlds.rubric_table`).

Changed after the first results of the table of digits: the judge required a criterion to be true of three quarters of
the teacher's texts, and one text ranked better than four; now it requires half. Equal texts count once, as in the
paper. So 4 texts of sorted digits are 2.5 in the table and 1.1 for the trained teacher, while the paper's long ones
differ: the table of letters was added for that. With 32 tasks per table and five seeds, intervals of quality in B
contained 0 for one text and for a verifier that is not blind, and were above 0 for one rubric per response (0.0847
[0.0356, 0.134]); then the number of tasks was doubled. The students' learning rate was chosen on seed 0.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_studies.lab import ablation
from opd_studies.lab.ablation import START, TEACHER, Numbers, Setting, Size
from opd_studies.lab.lab import SORTING, Lab
from opd_studies.page import comparison, report
from opd_studies.page.comparison import gap
from opd_studies.page.outcome import Check, Finding, Outcome, finding
from opd_studies.worlds.graders import ALPHABET
from opd_studies.worlds.rubric_table import Table, played

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USE = (
    "If you may train on the teacher's texts, compare with `sft` on them, which did better. With the reward "
    "`rubric` keep `blind` and `shared` on; four texts rank answers better than one, and the student ended no "
    "better."
)


# The judge: share of misread statements, bias against the student, least share of texts that meet a criterion.
GRADING = {"noise": 0.1, "bias": 0.5, "share": 0.5}


# With digits only the rewards of first draws are measured, without training.
TABLES = {"digits": Table(answers="digits", updates=0), "letters": Table(answers="letters")}


RUBRIC, ONE, TOLD, OWN, TEXTS = "rubric", "one text", "not blind", "own rubrics", "sft on the texts"


OPTIONS: Mapping[str, Mapping[str, Any]] = {
    RUBRIC: {},
    ONE: {"answers": 1},
    TOLD: {"blind": False},
    OWN: {"shared": False},
}


# Thresholds.
LEARNS = 0.1  # sampled accuracy minus that of the student before


BETTER = 0.0  # accuracy, quality, rank correlation, variance


def trained_by(options: Mapping[str, Any]) -> Setting:
    """A distillation by `ropd`: 16 prompts with 8 responses; the teacher writes its texts during the run."""
    judge = {"function": "opd_studies.worlds.graders:grader", "options": GRADING}
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


SIZE = Size(steps=160, prompts_per_step=16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Held-out numbers of students; numbers of tables by setting and "table: measure", one per seed."""

    students: Numbers
    tables: Numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of both settings."""

    students: Size = SIZE
    tables: Mapping[str, Table] = field(default_factory=lambda: TABLES)
    table_seeds: Sequence[int] = (0, 1, 2, 3, 4)


def run(lab: Lab, size: Sizes | None = None) -> Outcome:
    """Run students and both tables for all seeds; see the file's docstring."""
    size = size or Sizes()
    measured = Measured(students=ablation.measure(lab, SETTINGS, size.students), tables=tables(lab, size))
    digits, letters = size.tables["digits"], size.tables["letters"]
    return Outcome(
        setup=(
            f"A: sorting five digits, {len(size.students.seeds)} pairs of their own seeds, {size.students.steps} "
            f"updates of {size.students.prompts_per_step} prompts with 8 responses; the teacher writes 4 texts per "
            "prompt at temperature 1, and does nothing else. SFT gets as many texts and updates, at the same "
            f"learning rate. Beside it a table of digits: {digits.prompts} tasks with {digits.arms} answers each, "
            f"{digits.group} draws per task by an untrained policy, {len(size.table_seeds)} seeds, a teacher that is "
            f"right {digits.right} of the time. B: a table of letters, as large, trained for {letters.updates} "
            f"updates. A task wants {letters.wanted} of {len(ALPHABET)} letters; each is in a share of "
            f"{letters.held} of the teacher's texts, the others in half of them. The judge misreads with probability "
            f"{GRADING['noise']}, and if it knows the source, it denies what is true of a student's answer with "
            f"probability {GRADING['bias']}. Its criteria are statements that are true of at least half of the "
            "teacher's texts and of fewer of the student's; it required three quarters before the first results of the "
            "table of digits; then B was added. Equal texts count once: 4 that sort digits are 2.5 in the table and "
            "1.1 of the trained teacher, those of letters all differ. The number of tasks was doubled after results "
            "with 32, with which the claim on a rubric for each response held in B. A policy trained on the table of "
            "digits ended at a quality of 0.67 with 4 texts, 0.68 with one."
        ),
        findings=judge(measured),
        figure=draw(measured),
        table=comparison.table(
            beside(measured),
            (
                *("sampled accuracy", "greedy accuracy", "KL"),
                *("letters: quality", "digits: rank correlation", "letters: rank correlation"),
            ),
        ),
    )


def tables(lab: Lab, size: Sizes) -> Numbers:
    """Numbers of all tables by setting; `START` is the untrained policy, `TEACHER` the teacher's texts."""
    numbers: Numbers = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, table in size.tables.items():
            for name, options in OPTIONS.items():
                lab.note(f"table of {kind}: {name}")
                for seed in size.table_seeds:
                    found = played(table, seed, options, GRADING, Path(folder) / kind / name / str(seed))
                    before, texts = found.pop("quality before"), found.pop("quality of the texts")
                    ablation.append(numbers, name, {f"{kind}: {what}": value for what, value in found.items()})
                    if name == RUBRIC:
                        ablation.append(numbers, START, {f"{kind}: quality": before})
                        ablation.append(numbers, TEACHER, {f"{kind}: quality": texts})
    return numbers


def judge(measured: Measured) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""
    students, both = measured.students, measured.tables

    def ends(second: str) -> tuple[list[Check], list[Check]]:
        return (
            [gap(students, RUBRIC, second, above=BETTER)],
            [gap(both, RUBRIC, second, "letters: quality", above=BETTER)],
        )

    def tells(second: str, what: str, **side: float) -> tuple[list[Check], list[Check]]:
        first, other = (gap(both, RUBRIC, second, f"{kind}: {what}", **side) for kind in TABLES)
        return [first], [other]

    return (
        finding(
            "A rubric of a teacher's texts teaches, without a logit of the teacher",
            "2605.07396 results",
            [gap(students, RUBRIC, START, above=LEARNS)],
            [gap(both, RUBRIC, START, "letters: quality", above=LEARNS)],
        ),
        finding(
            "It teaches more than imitation of the same texts (B: more than the texts' own quality)",
            "2605.07396 results",
            [gap(students, RUBRIC, TEXTS, above=BETTER)],
            [gap(both, RUBRIC, TEACHER, "letters: quality", above=BETTER)],
        ),
        finding(
            "With one text of the teacher instead of four the student ends worse",
            "2605.07396 ablations",
            *ends(ONE),
        ),
        finding(
            "A rubric from four texts ranks answers better than one from one text",
            "2605.07396 ablations",
            *tells(ONE, "rank correlation", above=BETTER),
        ),
        finding(
            "With a judge that is partial, a verifier that is not blind leaves the student worse",
            "2605.07396 ablations",
            *ends(TOLD),
        ),
        finding(
            "With a rubric for each response the student ends worse than with one for all",
            "2605.07396 ablations",
            *ends(OWN),
        ),
        finding(
            "One rubric for all gives advantages of less variance over the judge's mistakes than one for each response",
            "2605.07396 ablations",
            *tells(OWN, "variance of the advantage", below=BETTER),
        ),
    )


def beside(measured: Measured) -> Numbers:
    """Numbers of students and tables together, by setting."""
    names = [START, TEACHER, *SETTINGS]
    return {name: {**measured.students.get(name, {}), **measured.tables.get(name, {})} for name in names}


def draw(measured: Measured) -> Figure:
    """Final numbers of students and tables, and the tables' numbers for each way to make and apply rubrics."""
    figure, axes = report.figure(3, 2, width=3.2, height=2.4)
    shown = beside(measured)
    told = {
        "rank correlation": "rank correlation of\nreward and quality",
        "variance of the advantage": "variance of the",
    }
    told["variance of the advantage"] += "\nadvantage over the judge's mistakes"
    ends = {
        "sampled accuracy": "students: sampled accuracy, share",
        "letters: quality": "quality after training, share",
    }
    for row, kind, (what, label) in zip(axes, TABLES, ends.items(), strict=True):
        setting = "A" if kind == "digits" else "B"
        panels = {what: label} | {f"{kind}: {name}": f"table of {kind}: {text}" for name, text in told.items()}
        comparison.points(row, shown, {name: f"{setting}, {text}" for name, text in panels.items()})
    return figure
