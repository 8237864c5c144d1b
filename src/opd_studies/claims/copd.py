"""Two models that learn a task each and teach each other: against one model on both tasks, and finished experts.

CoPD, arXiv 2604.27083: models that alternate reinforcement learning on their own data with distillation from each
other, and then become their mean, end above one model on mixed data, above static distillation from finished experts,
and above each expert on its own task, because they stay near each other.

Here one tiny model answers with the smallest or the largest digit of four, as a sign in the prompt asks, and often
confuses the two. In setting A the signs ask for different digits, so that what an expert learns alone spoils the other
task; in B both signs ask for the smallest one, and the tasks help each other. Updates are counted as in the paper, over
all models. Controls: mixed data for as many generated tokens, and the mean of experts that never teach each other.
Learning rates and beta were chosen on a seed that is not reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opd_studies.lab import ablation, branches
from opd_studies.lab.ablation import START, Numbers
from opd_studies.lab.branches import FIRST, PAIRS, SECOND, WRONG, Size
from opd_studies.lab.distilling import Trained, read
from opd_studies.lab.lab import Lab
from opd_studies.page import comparison, report
from opd_studies.page.comparison import gap
from opd_studies.page.outcome import Check, Finding, Outcome, finding

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USE = (
    "Train one model with `grpo` on all tasks first: it ended above `copd` at equal updates and at equal tokens, where "
    "tasks conflict and where they agree. Where they agree, the mean of experts without teaching was better too."
)


MIXED, MIXED_MORE, STATIC, STATIC_EXPERT, MERGED, EXPERTS, COPD, ONE, OTHER = (
    *("mixed RL", "mixed RL, as many tokens", "static, from the start", "static, from an expert"),
    *("mean of experts", "experts, each on its task", "CoPD", "CoPD, first model", "CoPD, second model"),
)


BOTH, APART = "both tasks", "KL of the two models"


# Thresholds: differences of sampled accuracy in shares, and of KL in nats per token.
BETTER = 0.0


NEARER = 0.0


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Train all arms in both settings for all seeds; see the file's docstring."""
    size = size or Size()
    numbers = measure(lab, size)
    return Outcome(setup=setup(size), findings=judge(numbers), figure=draw(numbers), table=table(numbers))


def setup(size: Size) -> str:
    """The study's setting in words."""
    return (
        f"The smallest or largest of four digits, {len(size.seeds)} seeds, each with its own start, trained "
        f"{size.start.student_steps} updates on rows of which {WRONG:.0%} have the other task's answer. "
        f"{size.prompts * size.group} responses per update of a model. CoPD: {size.updates} updates of each of two "
        f"models, in cycles of {size.cycle[0]} alone and {size.cycle[1]} in which each also writes as many responses "
        f"to the other's prompts, beta {size.beta:g}. Mixed RL: {2 * size.updates} updates, and {size.total} for as "
        f"many responses. Experts: {size.updates} updates each; then {size.total - 2 * size.updates} updates of "
        "distillation, from both experts into the start, or from the second into the first. Mean of experts: of "
        f"experts with {size.total // 2} updates each. So all but the first mixed RL generate as many tokens. Learning "
        f"rates {', '.join(f'{name} {rate:g}' for name, rate in size.rates.items())}: the best in A on an unreported "
        "seed with 30 updates, of 6e-4 and 1e-3 for grpo, and of 3e-4, 6e-4 and 1e-3 for distillation (opd). For CoPD "
        "6e-4 with beta 1 and 3 and 1e-3 with beta 3 differed by 0.01, and the method's own beta was kept. Sampled "
        f"accuracy at temperature 1: two responses to each of {size.held_out} held-out prompts per task."
    )


def measure(lab: Lab, size: Size) -> dict[str, Numbers]:
    """Train every arm from every seed's start; numbers by setting."""
    started = branches.starts(lab, size)
    places = [(setting, seed, start) for setting in PAIRS for seed, start in zip(size.seeds, started, strict=True)]
    kinds = (branches.mixed, branches.apart, branches.together)
    first = lab.run_all([kind(*place, size) for place in places for kind in kinds])
    runs = [first[at : at + len(kinds)] for at in range(0, len(first), len(kinds))]
    second = lab.run_all(
        [
            branches.static(setting, seed, start if both else experts[FIRST], experts, size, both=both)
            for (setting, seed, start), (_, apart, _) in zip(places, runs, strict=True)
            for experts in [branches.experts_of(apart, start, size.updates)]
            for both in (True, False)
        ]
    )
    numbers: dict[str, Numbers] = {setting: {} for setting in PAIRS}
    for at, ((setting, _, _), folders) in enumerate(zip(places, runs, strict=True)):
        for name, values in arms(folders, second[2 * at : 2 * at + 2], size).items():
            ablation.append(numbers[setting], name, values)
    return numbers


def arms(learned: Sequence[Path], taught: Sequence[Path], size: Size) -> dict[str, dict[str, float]]:
    """The numbers of one seed: from the runs `mixed`, `apart`, `together`, and from both static ones."""
    mixed, apart, together = learned
    whole = read(mixed, "mixed")
    one, other = read(together, "together"), read(together, "together", peer=SECOND)
    static, from_expert = (read(folder, "distil") for folder in taught)
    own = {FIRST: at(read(apart, "apart"), size.updates), SECOND: at(read(apart, "apart", peer=SECOND), size.updates)}
    kl = f"eval/{SECOND}/reverse_kl"
    return {
        START: accuracies(whole.before),
        MIXED: accuracies(at(whole, 2 * size.updates)),
        MIXED_MORE: accuracies(whole.after),
        STATIC: accuracies(static.after),
        STATIC_EXPERT: accuracies(from_expert.after),
        MERGED: accuracies(read(apart, "examine").after),
        EXPERTS: accuracies(own[FIRST] | own[SECOND]) | {APART: from_expert.before[kl]},
        ONE: accuracies(one.after),
        OTHER: accuracies(other.after),
        COPD: accuracies(read(together, "examine").after) | {APART: one.after[kl]},
    }


def at(one: Trained, step: int) -> dict[str, float]:
    """The held-out numbers after `step` updates."""
    return next(dict(row) for row in one.evaluations if row["step"] == step)


def accuracies(row: Mapping[str, float]) -> dict[str, float]:
    """Sampled accuracy on each task, and its mean."""
    found = {task: row[f"eval/{task}/sampled/reward"] for task in (FIRST, SECOND)}
    return found | {BOTH: sum(found.values()) / len(found)}


def judge(numbers: Mapping[str, Numbers]) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""

    def above(*others: str) -> list[list[Check]]:
        return [[gap(one, COPD, other, BOTH, above=BETTER) for other in others] for one in numbers.values()]

    own = [[gap(one, COPD, EXPERTS, task, above=BETTER) for task in (FIRST, SECOND)] for one in numbers.values()]
    nearer = [[gap(one, COPD, EXPERTS, APART, below=NEARER)] for one in numbers.values()]
    return (
        finding("CoPD ends above mixed RL at equal updates", "2604.27083 results", *above(MIXED)),
        finding("So it does at equal generated tokens", "2604.27083 results (control)", *above(MIXED_MORE)),
        finding(
            "CoPD ends above static distillation from finished experts at equal generated tokens",
            "2604.27083 results",
            *above(STATIC, STATIC_EXPERT),
        ),
        finding(
            "CoPD ends above the mean of experts that never teach each other, at equal generated tokens",
            "2604.27083 results (control)",
            *above(MERGED),
        ),
        finding("CoPD ends above each expert on the expert's own task", "2604.27083 abstract", *own),
        finding("Models that teach each other stay nearer than experts", "2604.27083 ablations", *nearer),
        finding(
            "The mean ends above each of the models that it is made of", "2604.27083 ablations", *above(ONE, OTHER)
        ),
    )


def table(numbers: Mapping[str, Numbers]) -> tuple[tuple[str, ...], ...]:
    """One row per setting and arm: means over seeds."""
    columns = (BOTH, FIRST, SECOND, APART)
    rows = [("setting", "arm", *columns)]
    for setting, measured in numbers.items():
        rows += [(setting, *row) for row in comparison.table(measured, columns)[1:]]
    return tuple(rows)


def draw(numbers: Mapping[str, Numbers]) -> Figure:
    """Sampled accuracy by arm, on both tasks and on each, in both settings."""
    figure, axes = report.figure(3, 2, width=3.0, height=2.8)
    panels = {BOTH: "accuracy, both tasks, share", FIRST: "first task, share", SECOND: "second task, share"}
    for row, (setting, measured) in zip(axes, numbers.items(), strict=True):
        comparison.points(row, measured, {what: f"{setting}: {label}" for what, label in panels.items()})
    return figure
