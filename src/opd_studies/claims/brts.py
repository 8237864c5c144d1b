"""The best of N teacher responses beside one's own: is it better than plain distillation, and what makes it so?

Best-of-N teacher rollout selection (BRTS), arXiv 2605.09725: a forward KL on a right teacher response that overlaps
most with the student, beside the reverse KL on the student's own responses. The paper compares N = 1, 2 and 4 and tier
2 with plain distillation at equal updates. Controls here: plain distillation on as many generated tokens, a random
right response and the shortest right one in place of the largest overlap.

The task is sorting digits. In setting A a right answer can be written in three styles; the teacher mixes them, and the
student, which has seen few examples, knows one. In setting B there is one style, so that all right responses to a
prompt are equal and the choice among them has no effect. Half of the teacher's examples begin with the solution, so
that it can read tier 2's hint. Learning rate and lambda were chosen on a seed that is not reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opd_studies.lab import ablation
from opd_studies.lab.ablation import Numbers
from opd_studies.lab.distilling import Distillation, Trained, distil_all, held_out
from opd_studies.lab.lab import Lab, Pair, PairSize, Task, optimizer, student_recipe, teacher_recipe
from opd_studies.page import comparison, report
from opd_studies.page.comparison import gap
from opd_studies.page.outcome import Finding, Outcome, finding

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USE = (
    "Before you pay for a teacher's responses, spend the tokens on plain distillation: it ended far above `brts`. How "
    "many teacher responses there were, and how one was chosen, had no clear effect."
)


LONGEST = 14  # tokens
CHARACTERS = "0123456789=;>"
PLAIN, MORE, ONE, ONE_TIER_2, TWO, FOUR, RANDOM, SHORTEST = (
    *("plain", "plain, as many tokens", "N = 1, no tier 2", "N = 1", "N = 2", "N = 4"),
    *("N = 4, random right", "N = 4, shortest right"),
)
OWN = {"k": 6, "by": "student", "form": "tail", "average": "token"}
HINT = {"hint": "{answer}={prompt}", "marker": "="}
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    ONE: {"n": 1, "hinted": 0},
    ONE_TIER_2: {"n": 1},
    TWO: {"n": 2},
    FOUR: {"n": 4},
    RANDOM: {"n": 4, "pick": "first"},
    SHORTEST: {"n": 4, "pick": "shortest"},
}
ARMS = {"A": (PLAIN, MORE, *OPTIONS), "B": (PLAIN, MORE, ONE, ONE_TIER_2, FOUR)}
STYLES = {"A": (("direct", "late", "copied"), ("copied",)), "B": (("direct",), ("direct",))}  # teacher, student

# Thresholds.
BETTER = 0.0  # sampled accuracy, share


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds (one pair each), updates, prompts per step; both models' training; lambda and the learning rates."""

    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    steps: int = 60
    prompts_per_step: int = 32
    more: int = 5  # times the updates, for plain distillation on as many tokens
    teacher_steps: Mapping[str, int] = field(default_factory=lambda: {"A": 170, "B": 110})
    student_steps: int = 70
    weight: float = 10.0
    rates: Mapping[str, float] = field(default_factory=lambda: {PLAIN: 4e-3, MORE: 4e-3, FOUR: 4e-3})


def task_of(setting: str, *, teacher: bool) -> Task:
    """Sorting in the styles of that model."""
    styles = STYLES[setting][0 if teacher else 1]
    options: dict[str, Any] = {"styles": list(styles)}
    data = "opd_studies.worlds.answer_styles:styled"
    return Task(data=data, reward="final_number", longest=LONGEST, options=options, characters=CHARACTERS)


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Train all arms in both settings for all seeds; see the file's docstring."""
    size = size or Size()
    numbers = {setting: measure(lab, setting, size) for setting in ARMS}
    return Outcome(
        setup=setup(size),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def setup(size: Size) -> str:
    """The study's setting in words."""
    return (
        f"Sorting five digits, {len(size.seeds)} pairs of their own seeds; {size.steps} updates of "
        f"{size.prompts_per_step} prompts with one response of the student; k = {OWN['k']} of "
        f"{len(CHARACTERS) + 2} tokens, lambda {size.weight:g}; the teacher writes at temperature 0.7 and top-p 0.95. "
        f"The student learned {size.student_steps} updates on 256 rows. `{MORE}`: {size.more} times the updates, and "
        f"so at least as many generated tokens as N = 4. Learning rates "
        f"{', '.join(f'{name} {rate:g}' for name, rate in size.rates.items())}; those and lambda were chosen on an "
        "unreported seed. Sampled accuracy at temperature 1, on 200 held-out prompts."
    )


def pairs_of(lab: Lab, setting: str, size: Size) -> list[Pair]:
    """A teacher that mixes the styles and reads solutions, and a student of one style, for each seed."""
    common: dict[str, Any] = {"student_rows": 256, "student_steps": size.student_steps, "prompts_per_step": 64}
    sorters = {
        "teacher": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2},
        "student": {"hidden_size": 48, "intermediate_size": 144, "num_hidden_layers": 2},
    }
    recipes: list[dict[str, Any]] = []
    for seed in size.seeds:
        taught = PairSize(
            task=task_of(setting, teacher=True),
            teacher_rows=20_000,
            teacher_steps=size.teacher_steps[setting],
            **sorters,
            **common,
        )
        recipe = teacher_recipe(seed, taught)
        recipe["stages"][0]["data"]["options"]["knowing"] = 0.5
        recipes.append(recipe)
        recipes.append(
            student_recipe(seed, PairSize(task=task_of(setting, teacher=False), **sorters, **common)),
        )
    made = lab.run_all(recipes)
    return [
        Pair(teacher=teacher / "teacher" / "model", student=student / "warm-up" / "model")
        for teacher, student in zip(made[::2], made[1::2], strict=True)
    ]


def measure(lab: Lab, setting: str, size: Size) -> Numbers:
    """Train every arm from every seed's pair; held-out numbers, and what brts measured of the chosen responses."""
    task = task_of(setting, teacher=False)
    pairs = pairs_of(lab, setting, size)
    arms = ARMS[setting]
    runs: list[Distillation] = []
    for seed, pair in zip(size.seeds, pairs, strict=True):
        for name in arms:
            own = name in (PLAIN, MORE)
            runs.append(
                Distillation(
                    pair=pair,
                    seed=seed,
                    method="topk_reverse_kl" if own else "brts",
                    task=task,
                    options=OWN if own else {"k": OWN["k"], "weight": size.weight, **HINT, **OPTIONS[name]},
                    stage={
                        "steps": size.steps * (size.more if name == MORE else 1),
                        "prompts_per_step": size.prompts_per_step,
                        "optimizer": optimizer(size.rates.get(name, size.rates[FOUR]), 10),
                        "reward": {"name": "final_number"},
                        "teacher_sampling": {"temperature": 0.7, "top_p": 0.95, "max_completion_length": LONGEST},
                        "evaluate": held_out(task, before=name == PLAIN, teacher=name == PLAIN),
                    },
                )
            )
    trained = distil_all(lab, runs)
    by_arm = {name: trained[place :: len(arms)] for place, name in enumerate(arms)}
    numbers = ablation.collect(by_arm)
    for name, seeds in by_arm.items():
        for one in seeds:
            ablation.append(numbers, name, chosen(one))
    return numbers


CHOSEN = {
    "right of the chosen": "part/teacher/right",
    "tier 1": "part/teacher/tier_1",
    "tier 2": "part/teacher/tier_2",
    "positional overlap": "part/teacher/overlap_positional",
    "forced overlap": "part/teacher/overlap_forced",
    "tokens of the chosen": "part/teacher/length",
}


def chosen(one: Trained) -> dict[str, float]:
    """Means over all updates of the numbers of the chosen teacher responses; empty for plain distillation."""
    found: dict[str, float] = {}
    for what, name in CHOSEN.items():
        values = [row[name] for row in one.rows if name in row]
        if values:
            found[what] = sum(values) / len(values)
    return found


def judge(numbers: Mapping[str, Numbers]) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""

    def both(first: str, second: str) -> tuple[list[Any], list[Any]]:
        a, b = (
            [gap(numbers[setting], first, second, above=BETTER)] if {first, second} <= set(ARMS[setting]) else []
            for setting in ("A", "B")
        )
        return a, b

    table_1 = "2605.09725 results"
    return (
        finding(
            "The best of four teacher responses beside one's own ends above plain distillation",
            table_1,
            *both(FOUR, PLAIN),
        ),
        finding(
            "So it does when plain distillation generates as many tokens", f"{table_1} (control)", *both(FOUR, MORE)
        ),
        finding("The best of four ends above one teacher response as it comes", table_1, *both(FOUR, ONE)),
        finding(
            "With one response, tier 2 (the answer shown to the teacher) ends above none",
            table_1,
            *both(ONE_TIER_2, ONE),
        ),
        finding(
            "The largest overlap ends above a random right response", f"{table_1} (control)", both(FOUR, RANDOM)[0]
        ),
        finding(
            "The largest overlap ends above the shortest right response",
            f"{table_1} (control)",
            both(FOUR, SHORTEST)[0],
        ),
    )


def table(numbers: Mapping[str, Numbers]) -> tuple[tuple[str, ...], ...]:
    """One row per setting and arm: means over seeds."""
    columns = ("sampled accuracy", "greedy accuracy", "KL", *CHOSEN)
    rows = [("setting", "arm", *columns)]
    for setting, measured in numbers.items():
        rows += [(setting, *row) for row in comparison.table(measured, columns)[1:]]
    return tuple(rows)


def draw(numbers: Mapping[str, Numbers]) -> Figure:
    """Sampled accuracy by arm in both settings, and the overlaps of the chosen responses in A."""
    figure, axes = report.figure(3, rows=2, width=3.0, height=2.6)
    panels = {
        "sampled accuracy": "sampled accuracy, share",
        "right of the chosen": "chosen that are right, share",
        "positional overlap": "positional overlap, share",
    }
    for row, (setting, measured) in zip(axes, numbers.items(), strict=True):
        comparison.points(row, measured, {what: f"{setting}: {label}" for what, label in panels.items()})
    return figure
