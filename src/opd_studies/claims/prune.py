"""Responses that end where the teacher is lost cost fewer tokens and leave the student as near to it.

Prune-OPD, arXiv 2605.07804: weights fall with every token at which the teacher is lost, and a budget limits the length
of the next step's responses; training takes 37.6 % to 68.0 % less time, at the same or a better accuracy. Its budget is
per batch; `stop="rollout"` ends each response separately during sampling.

The student is that of study `length` that never learned to end: after the answer it adds other rows, up to 48 tokens,
which its teacher never saw. Setting A: the overlap of both models' most likely tokens decides that a token is lost.
Setting B: a token outside the teacher's top-p is lost. The hardest control is a fixed limit on responses with about as
many tokens as with the stop.

A decoding step costs nearly the same for few responses as for many, and the teacher's scoring costs extra. So a stop
saves less time than tokens.
"""

from __future__ import annotations

from typing import Any

from opd_studies.lab import ablation
from opd_studies.lab.ablation import START, Numbers, Setting, Size
from opd_studies.lab.distilling import Distillation, Trained, distil_all, held_out
from opd_studies.lab.lab import Lab, Pair
from opd_studies.lab.rambling_students import LONG, ROWS, pairs_of
from opd_studies.page import comparison, report
from opd_studies.page.outcome import Check, Finding, Outcome, finding, over_seeds

USE = (
    "Try a fixed `sampling.max_completion_length` first: at about as many tokens the stop of `prune_opd` was "
    "better in B only. If no limit is known, its budget or stop saves tokens at no loss; time is saved mostly by "
    "the budget."
)


K = 12  # of 17 tokens; with a few the released form runs away (recipe rethinking_opd)


SHORT = 12  # tokens; a right response has six


BASE = {"k": K}


JUDGES: dict[str, dict[str, Any]] = {
    "A": {"metric": "overlap", "threshold": 0.7, "drop": 0.25},
    "B": {"metric": "teacher_top_p_accept", "threshold": 0.9, "drop": 0.25},
}


ENDS: dict[str, dict[str, Any]] = {
    "budget": {
        "stop": "budget",
        "budget": LONG // 2,
        "budget_min": SHORT // 2,
        "budget_max": LONG,
        "budget_step": 2,
        "margin": 2,
    },
    "stop": {"stop": "rollout", "every": 4},
}


UNPRUNED = Setting(method="rethinking_opd", options={**BASE, "form": "released"})


SETTINGS: dict[str, Setting] = {
    "unpruned": UNPRUNED,
    f"cap {SHORT}": Setting(
        method=UNPRUNED.method, options=UNPRUNED.options, stage={"sampling": {"max_completion_length": SHORT}}
    ),
    **{
        f"{setting}: {name}": Setting(method="prune_opd", options={**BASE, **judge, **ends})
        for setting, judge in JUDGES.items()
        for name, ends in ENDS.items()
        if setting == "A" or name == "stop"
    },
}


SIZE = Size(seeds=(0, 1, 2, 3, 4), steps=100)


# Thresholds: shares of the unpruned run's tokens and seconds, nats per token, shares of right answers.
TOKENS = 0.7


SECONDS = 1 - 0.376  # the paper's smallest saving


SAME_KL = 0.05


SAME_ACCURACY = -0.05


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Run all settings from every pair, with their cost."""
    size = size or SIZE
    numbers = measure(lab, size)
    return Outcome(
        setup=(
            f"Sorting of five digits by a student that continues to {LONG} tokens, the student's top {K} of 17 tokens, "
            f"{len(size.seeds)} pairs of their own seeds, {size.steps} updates of {size.prompts_per_step} responses. "
            f"Tokens are those generated in training, seconds those of CPU in training. Exact reverse KL and "
            f"accuracy on 200 held-out rows at temperature 1 with at most {LONG} tokens; text after the first answer "
            "does not count as wrong, but counts in the KL."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=comparison.table(numbers, ("KL", "sampled accuracy", "length", "tokens", "seconds", "lost")),
    )


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""

    def share(name: str, what: str, below: float) -> Check:
        ratios = [a / b for a, b in zip(numbers[name][what], numbers["unpruned"][what], strict=True)]
        return Check(what=f"{what}, {name} over unpruned", interval=over_seeds(ratios), below=below)

    def saves(name: str) -> list[Check]:
        return [share(name, "tokens", TOKENS), comparison.gap(numbers, name, "unpruned", "KL", below=SAME_KL)]

    def hastens(name: str) -> list[Check]:
        kept = comparison.gap(numbers, name, "unpruned", above=SAME_ACCURACY)
        return [share(name, "seconds", SECONDS), kept]

    return (
        finding(
            "Ended while they are written, drifted responses cost 30 % fewer tokens at an equal divergence",
            "2605.07804, released code, with a stop inside the response",
            saves("A: stop"),
            saves("B: stop"),
        ),
        finding(
            "So they do with the budget, which ends all of a step's",
            "2605.07804, released code",
            saves("A: budget"),
        ),
        finding(
            "The budget takes 37.6 % off the time of training, and accuracy is kept",
            "2605.07804, results as reported",
            hastens("A: budget"),
        ),
        finding(
            "So does the stop inside the response, the teacher's looks included",
            "2605.07804, results as reported, with a stop inside the response",
            hastens("A: stop"),
            hastens("B: stop"),
        ),
        finding(
            "The stop is better than a fixed limit by which as many tokens are written",
            "2605.07804, released code, with a control",
            [comparison.gap(numbers, "A: stop", f"cap {SHORT}", "KL", below=0.0)],
            [comparison.gap(numbers, "B: stop", f"cap {SHORT}", "KL", below=0.0)],
        ),
    )


def measure(lab: Lab, size: Size) -> Numbers:
    """Numbers by "start", the initial KL and accuracy, and by setting, the results and cost of its runs."""
    pairs = pairs_of(lab, [("B", seed) for seed in size.seeds], size.pair)
    wanted = [
        (name, distillation(pair, seed, size, setting, first=name == "unpruned"))
        for pair, seed in zip(pairs, size.seeds, strict=True)
        for name, setting in SETTINGS.items()
    ]
    numbers: Numbers = {START: {}}
    for (name, _), trained in zip(wanted, distil_all(lab, [one for _, one in wanted]), strict=True):
        ablation.append(numbers, START, ablation.held_out_of(trained.before, "eval/"))
        ablation.append(numbers, name, ablation.numbers_of(trained) | cost(trained, size))
    return numbers


def distillation(pair: Pair, seed: int, size: Size, setting: Setting, *, first: bool) -> Distillation:
    """One run; the first one of a pair also measures the student before."""
    sampled: dict[str, Any] = {"sampled": {"temperature": 1, "max_completion_length": LONG}}
    return Distillation(
        pair=pair,
        seed=seed,
        method=setting.method,
        task=ROWS,
        options=setting.options,
        stage={
            "steps": size.steps,
            "prompts_per_step": size.prompts_per_step,
            "sampling": {"max_completion_length": LONG},
            "evaluate": held_out(ROWS, sampling=sampled, before=first),
            **setting.stage,
        },
    )


def cost(trained: Trained, size: Size) -> dict[str, float]:
    """Tokens generated, CPU seconds without evaluations, and the share of tokens at which the teacher was lost."""
    from opd.stage.folder import RunDir

    timings = RunDir(trained.model.parents[1]).stage(trained.model.parent.name).read_timings()
    written = sum(row["rollout/length"] for row in trained.rows) * size.prompts_per_step
    lost = [row["drift/lost_share"] for row in trained.rows if "drift/lost_share" in row]
    watched = {"lost": sum(lost) / len(lost)} if lost else {}
    return {"tokens": written, "seconds": sum(row["cpu"] for row in timings), **watched}


def draw(numbers: Numbers) -> report.Figure:
    """Each setting's final divergence against its cost in tokens and in seconds."""
    figure, axes = report.figure(2, width=4.0, height=3.2)
    labels = {"tokens": ("thousand tokens generated in training", 1e3), "seconds": ("CPU seconds of training", 1.0)}
    for panel, (what, (label, unit)) in zip(axes[0], labels.items(), strict=True):
        for colour, name in zip(report.COLOURS, SETTINGS, strict=False):
            spent = [value / unit for value in numbers[name][what]]
            panel.plot(spent, numbers[name]["KL"], "o", color=colour, markersize=4, label=name)
        panel.set(xlabel=label, xlim=(0, None), ylim=(0, None))
    axes[0][0].set_ylabel("held-out reverse KL, nats a token")
    axes[0][1].legend(fontsize=7)
    return figure
