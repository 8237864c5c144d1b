"""Scarce labels: on the teacher, whose dense signal then trains the student, or all of them on the student?

Sparse-to-Dense, arXiv 2605.12483: with few checkable labels, reinforce the teacher (stage 1, GRPO on labels L1), train
the student on the forward KL of the teacher's responses (2a) and on the reverse KL of its own (2b), and last reinforce
the student on held-out labels L2 (3). The paper reports this above GRPO on the student with all labels, above the same
bridge from the raw teacher, and above 2b alone; the bridge from the raw teacher below GRPO; and stage 3 above a replay
of L1.

Here the task is sorting four digits with 64 labels in each of L1 and L2. The raw teacher sorts half of its rows in
falling order, which is wrong. The student does so with nearly all in setting A, and almost never gets the reward; in
setting B with fewer. Every update of every stage has 64 responses. Arms are compared at as many updates of the student,
and at as many generated tokens as the whole recipe; the tokens of stage 1 count, those of evaluations do not. Controls:
GRPO on the student, and the raw teacher's bridge, on that many tokens; and the raw teacher's bridge with GRPO on the
student after it, which spends all labels on the student in as many updates. Sizes and learning rates were chosen on a
seed that is not reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeAlias

from opd.evaluation.learned import DIFFERS
from opd_studies.lab import ablation
from opd_studies.lab.ablation import START, TEACHER, Numbers
from opd_studies.lab.distilling import HELD_OUT, Distillation, Trained, distil_all, held_out
from opd_studies.lab.lab import SORTING, Lab, Pair, PairSize, optimizer, student_recipe, teacher_recipe
from opd_studies.page import comparison, report
from opd_studies.page.comparison import gap
from opd_studies.page.outcome import Check, Finding, Outcome, finding

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USE = (
    "Where the student almost never gets the reward, spend scarce labels on the teacher, then use `forward_kl` and "
    "`reverse_kl`. Where it sometimes does, compare with `grpo` on the student, alone and after the raw teacher, at as "
    "many generated tokens."
)


TASK = replace(SORTING, longest=6, characters="0123456789>", options={"digits": 4})


MIXED = replace(
    TASK, data="opd_studies.worlds.bad_habit_data:sorting_both_ways", options={**TASK.options, "falling": 0.5}
)


RESPONSES, GROUP = 64, 8  # of an update; of a prompt in GRPO


LABELS = 64  # of L1, and of L2


L1, L2, ALL = {"limit": LABELS}, {"skip": LABELS}, dict[str, int]()


RAW, REINFORCED = f"{TEACHER}, raw", f"{TEACHER}, after stage 1"


GRPO, GRPO_MORE, BRIDGE_RAW, BRIDGE_RAW_MORE, LATER, ON_POLICY, BRIDGE, WHOLE, REPLAY = (
    *("GRPO", "GRPO, as many tokens", "raw: 2a 2b", "raw: 2a 2b, as many tokens", "raw: 2a 2b, then GRPO"),
    *("stage 1: 2b", "stage 1: 2a 2b", "stage 1: 2a 2b 3", "stage 1: 2a 2b 3, L1 again"),
)


ONLY_A = (BRIDGE_RAW_MORE, REPLAY)  # for the study's cost


UPDATES, TOKENS, SIGNAL = "updates", "thousand tokens", "prompts with a signal"


# Thresholds.
BETTER = 0.0  # sampled accuracy, share


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """One stage of one model: method, updates, learning rate, and the teacher or, for GRPO, the labels."""

    method: str
    steps: int
    rate: float
    teacher: str | None = None
    labels: Mapping[str, int] = field(default_factory=dict[str, int])
    before: bool = False  # measure the model before the stage, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds, updates and learning rates of the stages, and how the models before them are made."""

    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    first: int = 40  # updates of stage 1
    forward: int = 20  # of stage 2a
    reverse: int = 20  # of stage 2b
    last: int = 16  # of stage 3
    slack: float = 1.05  # of the arms with as many tokens, because a student's first responses may be shorter
    rates: Mapping[str, float] = field(
        default_factory=lambda: {"first": 5e-4, "forward_kl": 4e-3, "reverse_kl": 2e-3, "grpo": 6e-4}
    )
    model: Mapping[str, int] = field(default_factory=lambda: {"num_hidden_layers": 2})
    teacher: int = 64  # hidden size
    student: int = 48
    teacher_steps: int = 150
    student_steps: int = 150
    falling: Mapping[str, float] = field(default_factory=lambda: {"A": 0.9, "B": 0.7})  # the student's wrong rows

    def arms(self, setting: str) -> dict[str, tuple[Leg, ...]]:
        """The stages of the student in each arm. Arms with equal first stages share their models."""
        bridge = self.forward + self.reverse
        many = math.ceil(self.slack * (self.first + bridge + self.last)) - bridge

        def dense(method: str, steps: int, teacher: str) -> Leg:
            return Leg(method=method, steps=steps, rate=self.rates[method], teacher=teacher)

        def both(teacher: str) -> tuple[Leg, ...]:
            return dense("forward_kl", self.forward, teacher), dense("reverse_kl", self.reverse, teacher)

        def grpo(steps: int, labels: Mapping[str, int]) -> Leg:
            return Leg(method="grpo", steps=steps, rate=self.rates["grpo"], labels=labels)

        begun = replace(grpo(bridge, ALL), before=True)
        arms = {
            GRPO: (begun,),
            GRPO_MORE: (begun, grpo(many, ALL)),
            BRIDGE_RAW: both(RAW),
            BRIDGE_RAW_MORE: (*both(RAW), dense("reverse_kl", many, RAW)),
            LATER: (*both(RAW), grpo(self.first + self.last, ALL)),
            ON_POLICY: (dense("reverse_kl", bridge, REINFORCED),),
            BRIDGE: both(REINFORCED),
            WHOLE: (*both(REINFORCED), grpo(self.last, L2)),
            REPLAY: (*both(REINFORCED), grpo(self.last, L1)),
        }
        return {name: legs for name, legs in arms.items() if setting == "A" or name not in ONLY_A}

    def pair(self, setting: str) -> PairSize:
        """How both models are made; the data of the student has the setting's share of wrong responses."""
        teacher, student = (
            {"hidden_size": hidden, "intermediate_size": 3 * hidden, **self.model}
            for hidden in (self.teacher, self.student)
        )
        return PairSize(
            task=replace(MIXED, options={**MIXED.options, "falling": self.falling[setting]}),
            teacher=teacher,
            student=student,
            student_rows=2000,
            student_steps=self.student_steps,
            teacher_rows=4000,
            teacher_steps=self.teacher_steps,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The student, the raw teacher, and stage 1, which trained it further."""

    student: Path
    raw: Path
    reinforced: Trained


Arms: TypeAlias = dict[str, list[list[Trained]]]  # by arm, then by seed, then by stage


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Train all arms in both settings for all seeds; see the file's docstring."""
    size = size or Size()
    numbers = {setting: measure(lab, setting, size) for setting in size.falling}
    return Outcome(setup=setup(size), findings=judge(numbers), figure=draw(numbers), table=table(numbers))


def setup(size: Size) -> str:
    """The study's setting in words."""
    rates = ", ".join(f"{name} {rate:g}" for name, rate in size.rates.items())
    falling = ", ".join(f"{share:g} in {setting}" for setting, share in size.falling.items())
    return (
        f"Sorting four digits, {len(size.seeds)} seeds, each with its own teacher and students; wrong rows in the "
        f"teacher's training {MIXED.options['falling']:g}, in the student's {falling}. {LABELS} labels in L1 and in "
        f"L2; GRPO on the student has all {2 * LABELS}. {RESPONSES} responses an update, in GRPO {GROUP} of each "
        f"prompt. Updates: stage 1 {size.first}, 2a {size.forward}, 2b {size.reverse}, 3 {size.last}. As many tokens: "
        f"{size.slack:g} times the updates of all stages. Learning rates, chosen on an unreported seed: {rates}. "
        f"Sampled accuracy at temperature 1, two responses to each of {HELD_OUT} held-out prompts. {SIGNAL}: share of "
        "GRPO's prompts on the student whose responses have different rewards."
    )


def stage(pair: Pair, seed: int, leg: Leg) -> Distillation:
    """A recipe of one stage that trains `pair.student`, with `pair.teacher` or on labels."""
    data = TASK.rows(2 * LABELS, seed=3) | dict(leg.labels) if leg.teacher is None else TASK.rows(1000, seed=4)
    sampling = {"max_completion_length": TASK.longest}
    common: dict[str, Any] = {
        "data": data,
        "steps": leg.steps,
        "sampling": sampling,
        "prompts_per_step": RESPONSES,
        "optimizer": optimizer(leg.rate, 10),
        "evaluate": None
        if leg.method == "forward_kl"
        else held_out(TASK, before=leg.before, kl=False, sampling={"sampled": {**sampling, "n": 2}}),
    }
    if leg.teacher is None:
        common |= {
            "teacher": None,
            "reward": {"name": TASK.reward},
            "prompts_per_step": RESPONSES // GROUP,
            "sampling": {**sampling, "n": GROUP},
        }
    return Distillation(pair=pair, seed=seed, method=leg.method, task=TASK, stage=common)


def models_of(lab: Lab, setting: str, size: Size) -> list[Models]:
    """The setting's student, the raw teacher and its stage 1, which no setting changes, for each seed."""
    made = size.pair(setting)
    taught = replace(made, task=MIXED)
    recipes = [recipe for seed in size.seeds for recipe in (teacher_recipe(seed, taught), student_recipe(seed, made))]
    folders = lab.run_all(recipes)
    teachers = [folder / "teacher" / "model" for folder in folders[::2]]
    students = [folder / "warm-up" / "model" for folder in folders[1::2]]
    leg = Leg(method="grpo", steps=size.first, rate=size.rates["first"], labels=L1, before=True)
    stages = [stage(Pair(teacher=one, student=one), seed, leg) for seed, one in zip(size.seeds, teachers, strict=True)]
    return [
        Models(student=student, raw=raw, reinforced=reinforced)
        for student, raw, reinforced in zip(students, teachers, distil_all(lab, stages), strict=True)
    ]


def train(lab: Lab, arms: Mapping[str, Sequence[Leg]], size: Size, models: Sequence[Models]) -> Arms:
    """The finished stages by arm and seed: the first stages of all arms, then the second ones, and so on."""
    done: Arms = {name: [[] for _ in size.seeds] for name in arms}
    for place in range(max(map(len, arms.values()))):
        due = [(name, i) for name, legs in arms.items() if place < len(legs) for i in range(len(size.seeds))]
        stages: list[Distillation] = []
        for name, i in due:
            leg = arms[name][place]
            student = done[name][i][-1].model if place else models[i].student
            teacher = models[i].reinforced.model if leg.teacher == REINFORCED else models[i].raw
            stages.append(stage(Pair(teacher=teacher, student=student), size.seeds[i], leg))
        for (name, i), one in zip(due, distil_all(lab, stages), strict=True):
            done[name][i].append(one)
    return done


def measure(lab: Lab, setting: str, size: Size) -> Numbers:
    """Train stage 1 and all arms of a setting for every seed, and collect the numbers."""
    models, arms = models_of(lab, setting, size), size.arms(setting)
    done = train(lab, arms, size, models)
    numbers: Numbers = {}
    for one, (begun, *_) in zip(models, done[GRPO], strict=True):
        ablation.append(numbers, START, ablation.held_out_of(begun.before, "eval/"))
        ablation.append(numbers, RAW, ablation.held_out_of(one.reinforced.before, "eval/"))
        ablation.append(numbers, REINFORCED, numbers_of([one.reinforced]))
    for name, legs in arms.items():
        taught = any(leg.teacher == REINFORCED for leg in legs)
        for one, trained in zip(models, done[name], strict=True):
            ablation.append(numbers, name, numbers_of(trained, [one.reinforced] if taught else []))
    return numbers


def numbers_of(trained: Sequence[Trained], before: Sequence[Trained] = ()) -> dict[str, float]:
    """Held-out numbers of the last stage; updates and generated tokens of all, with those of the stages `before`.

    Every token that was generated was trained on. `SIGNAL`: mean share over the updates of GRPO on the student.
    """
    updates = [row for one in (*before, *trained) for row in one.rows]
    numbers = ablation.held_out_of(trained[-1].after, "eval/") | {
        UPDATES: float(sum(len(one.rows) for one in trained)),
        TOKENS: sum(row["train/tokens"] for row in updates) / 1000,
    }
    differs = [row[DIFFERS] for one in trained for row in one.rows if DIFFERS in row]
    return numbers | ({SIGNAL: fmean(differs)} if differs else {})


def judge(numbers: Mapping[str, Numbers]) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""

    def both(high: str, low: str) -> list[list[Check]]:
        return [[gap(one, high, low, above=BETTER)] for one in numbers.values() if {high, low} <= set(one)]

    results, ablations = "2605.12483 results", "2605.12483 ablation"
    return (
        finding(
            "Half of the labels on the teacher, then 2a and 2b, end above GRPO on the student with all labels, in as "
            "many updates of the student",
            results,
            *both(BRIDGE, GRPO),
        ),
        finding(
            "The whole recipe ends above GRPO on the student with the same labels and as many generated tokens",
            f"{results} (control)",
            *both(WHOLE, GRPO_MORE),
        ),
        finding("From the raw teacher, 2a and 2b end below GRPO", ablations, *both(GRPO, BRIDGE_RAW)),
        finding(
            "From the teacher after stage 1, 2a and 2b end above those from the raw teacher, in as many updates of the "
            "student",
            ablations,
            *both(BRIDGE, BRIDGE_RAW),
        ),
        finding(
            "So they do when the raw teacher's student generates as many tokens as the whole recipe",
            f"{ablations} (control)",
            *both(BRIDGE, BRIDGE_RAW_MORE),
        ),
        finding(
            "The whole recipe ends above the raw teacher's 2a and 2b with GRPO on the student after them, at the same "
            "updates, labels and responses",
            f"{results} (control)",
            *both(WHOLE, LATER),
        ),
        finding("2a and 2b end above as many updates of 2b alone", ablations, *both(BRIDGE, ON_POLICY)),
        finding("Stage 3 on held-out labels L2 raises the student after 2b", ablations, *both(WHOLE, BRIDGE)),
        finding("Stage 3 on held-out labels L2 ends above a replay of L1", ablations, *both(WHOLE, REPLAY)),
    )


COLUMNS = ("sampled accuracy", UPDATES, TOKENS, SIGNAL)


def table(numbers: Mapping[str, Numbers]) -> tuple[tuple[str, ...], ...]:
    """One row per setting and arm: means over seeds."""
    rows = [("setting", "arm", *COLUMNS)]
    for setting, measured in numbers.items():
        rows += [(setting, *row) for row in comparison.table(measured, COLUMNS)[1:]]
    return tuple(rows)


def draw(numbers: Mapping[str, Numbers]) -> Figure:
    """Sampled accuracy and generated tokens by arm in both settings."""
    figure, axes = report.figure(2, len(numbers), width=3.6, height=2.8)
    panels = {"sampled accuracy": "sampled accuracy, share", TOKENS: f"{TOKENS}, stage 1 included"}
    for row, (setting, measured) in zip(axes, numbers.items(), strict=True):
        comparison.points(row, measured, {what: f"{setting}: {label}" for what, label in panels.items()})
    return figure
