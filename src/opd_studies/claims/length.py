"""The response limit in training: too short gives too little signal, too long collapses late in a response.

Li et al., arXiv 2604.13016 section 6.1: of caps between 0.5K and 15K tokens, 3K to 7K are best. The shortest teach too
little; the longest collapse late, from the end towards the front. The teacher helps less the later in a response (study
`prefixes` has the gain of its continuations by depth).

A right response to five digits to sort has six tokens. Setting A: a student that ends its responses. Setting B: one
that never learned to and adds other rows, so that a long cap fills the batch with irrelevant tokens. Controls: fewer or
more updates, so that two caps see equally many tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd_studies.lab import ablation
from opd_studies.lab.ablation import START, Numbers
from opd_studies.lab.distilling import Distillation, Trained, distil_all, held_out
from opd_studies.lab.lab import SORTERS, SORTING, Lab, Pair, PairSize
from opd_studies.lab.rambling_students import LONG, ROWS, pairs_of
from opd_studies.lab.signal_depth import PARTS, by_depth
from opd_studies.page import comparison, report
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding, over_seeds

USE = (
    "Set `sampling.max_completion_length` a little above what a right response needs. Shorter limits taught "
    "almost nothing; a much longer one did no clear harm at equal updates and lost at equal tokens (B)."
)


ENOUGH = SORTING.longest  # tokens; the cap of all evaluations


# Cap, and updates as a share of the usual number; settings A and B.
CAPS: dict[str, dict[str, tuple[int, float]]] = {
    "A": {
        "cap 1": (1, 1.0),
        "cap 2": (2, 1.0),
        "cap 4": (4, 1.0),
        f"cap {ENOUGH}": (ENOUGH, 1.0),
        f"cap {LONG}": (LONG, 1.0),
        "cap 2, updates x 3": (2, 3.0),  # of the cap of 12 a right response uses six tokens
    },
    "B": {
        "cap 2": (2, 1.0),
        f"cap {ENOUGH}": (ENOUGH, 1.0),
        f"cap {LONG}": (LONG, 1.0),
        f"cap {LONG}, updates / 4": (LONG, ENOUGH / LONG),
    },
}


METHOD = "reverse_kl"


EVERY = 20  # updates between evaluations


# Thresholds: shares of right answers at temperature 1, areas under the ROC curve.
LEARNED = 0.05


LITTLE = -0.1


COLLAPSE = -0.1


BEHIND = 0.0


DIES = -0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds (one pair each), updates, prompts per step, and how the pairs learn."""

    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 100
    prompts_per_step: int = 64
    pair: PairSize = SORTERS


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Train both settings' pairs with all caps, and measure their initial signal by position."""
    size = size or Size()
    numbers = measure(lab, size)
    return Outcome(
        setup=(
            f"Sorting of five digits, full reverse KL, {len(size.seeds)} pairs of their own seeds, {size.steps} "
            f"updates of {size.prompts_per_step} responses each unless stated otherwise. Accuracy on 200 held-out rows "
            f"at temperature 1 with at most {ENOUGH} tokens; text after the first answer is ignored. A: the "
            f"student ends its responses; B: it continues to {LONG} tokens. The last claim is about A's student before "
            "training: A by depth, B before and after its first wrong token."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=comparison.table(numbers, ("sampled accuracy", "fall", "tokens", "length", "cut", "entropy", *DEPTHS)),
    )


DEPTHS = tuple(f"AUROC, {part}" for part in PARTS)


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""

    def gap(setting: str, first: str, second: str, **side: float) -> Check:
        a, b = (numbers[f"{setting}: {name}"]["sampled accuracy"] for name in (first, second))
        return Check(what=f"accuracy, {first} minus {second}", interval=differences(a, b), **side)

    def short(setting: str, *caps: str) -> list[Check]:
        learned = gap(setting, f"cap {ENOUGH}", START, above=LEARNED)
        return [learned, *(gap(setting, cap, f"cap {ENOUGH}", below=LITTLE) for cap in caps)]

    def ends_worse(setting: str) -> list[Check]:
        return [gap(setting, f"cap {LONG}", f"cap {ENOUGH}", below=COLLAPSE)]

    def falls(setting: str) -> list[Check]:
        fall = numbers[f"{setting}: cap {LONG}"]["fall"]
        what = f"accuracy, cap {LONG}: end minus best on the way"
        return [Check(what=what, interval=over_seeds([-one for one in fall]), below=COLLAPSE)]

    return (
        finding(
            "Responses that are cut short teach too little",
            "2604.13016 section 6.1",
            short("A", "cap 1", "cap 2"),
            short("B", "cap 2"),
        ),
        finding(
            "More updates do not make up for it: at equal tokens a short cap is behind",
            "2604.13016 section 6.1, with a control",
            [gap("A", "cap 2, updates x 3", f"cap {ENOUGH}", below=BEHIND)],
        ),
        finding(
            "With a cap far above the task's length training ends worse",
            "2604.13016 section 6.1",
            ends_worse("A"),
            ends_worse("B"),
        ),
        finding(
            "It collapses late: accuracy first rises and then falls",
            "2604.13016 section 6.1",
            falls("A"),
            falls("B"),
        ),
        finding(
            "Tokens behind the answer take the place of useful ones: at equal tokens a long cap is behind",
            "2604.13016 section 6.1, with a control",
            [gap("B", f"cap {LONG}, updates / 4", f"cap {ENOUGH}", below=BEHIND)],
        ),
        finding(
            "The later in a response, and after a wrong token, the less the signal tells right tokens from wrong ones",
            "2604.13016 section 6.1",
            [dies(numbers, PARTS[2], PARTS[0])],
            [dies(numbers, PARTS[4], PARTS[3])],
        ),
    )


def dies(numbers: Numbers, late: str, early: str) -> Check:
    """A check that the initial signal is weaker in the `late` part of responses than in the `early` one."""
    start = numbers[f"A: {START}"]
    return Check(
        what=f"AUROC of log q - log p for right tokens, {late} minus {early}",
        interval=differences(start[f"AUROC, {late}"], start[f"AUROC, {early}"]),
        below=DIES,
    )


def measure(lab: Lab, size: Size) -> Numbers:
    """Numbers by "SETTING: start", the initial signal, and by "SETTING: CAP", the results of a run."""
    keys = [(setting, seed) for setting in CAPS for seed in size.seeds]
    pairs = dict(zip(keys, pairs_of(lab, keys, size.pair), strict=True))
    numbers: Numbers = {}
    for setting, seed in keys:
        ablation.append(numbers, f"{setting}: {START}", by_depth(pairs[setting, seed], ROWS, seed, ENOUGH))
    wanted = [
        (f"{setting}: {name}", distillation(pairs[setting, seed], seed, size, cap, share))
        for setting, seed in keys
        for name, (cap, share) in CAPS[setting].items()
    ]
    for (label, _), trained in zip(wanted, distil_all(lab, [one for _, one in wanted]), strict=True):
        ablation.append(numbers, label, ablation.numbers_of(trained) | over_time(trained))
    return dict(sorted(numbers.items(), key=lambda item: item[0][0]))  # by setting, the start of each first


def distillation(pair: Pair, seed: int, size: Size, cap: int, share: float) -> Distillation:
    """One run: `share` of the usual updates, responses of at most `cap` tokens."""
    sampled: dict[str, Any] = {"sampled": {"temperature": 1, "max_completion_length": ENOUGH}}
    return Distillation(
        pair=pair,
        seed=seed,
        method=METHOD,
        task=ROWS,
        stage={
            "steps": round(share * size.steps),
            "prompts_per_step": size.prompts_per_step,
            "sampling": {"max_completion_length": cap},
            "evaluate": held_out(ROWS, sampling=sampled, every=EVERY),
        },
    )


def over_time(trained: Trained) -> dict[str, float]:
    """The fall of accuracy from its best to the end, and the number of trained tokens."""
    accuracy = [row["eval/sampled/reward"] for row in trained.evaluations]
    return {"fall": max(accuracy) - accuracy[-1], "tokens": sum(row["train/tokens"] for row in trained.rows)}


def draw(numbers: Numbers) -> report.Figure:
    """Accuracy by cap in both settings, and the signal's AUROC by part of the response."""
    figure, axes = report.figure(2, width=4.2, height=3.4)
    accuracies, signal = axes[0]
    runs = [name for name in numbers if "sampled accuracy" in numbers[name]]
    for place, name in enumerate(runs):
        values = numbers[name]["sampled accuracy"]
        colour = report.COLOURS[5] if START in name else report.COLOURS[("A", "B").index(name[0])]
        accuracies.barh(place, over_seeds(values).mean, color=colour, alpha=0.6)
        accuracies.plot(values, [place] * len(values), "o", color="black", markersize=2.5)
    accuracies.set_yticks(range(len(runs)), runs, fontsize=7)
    accuracies.set_ylim(len(runs) - 0.4, -0.6)
    accuracies.set_xlabel("accuracy at temperature 1, share")
    for place, what in enumerate(DEPTHS):
        values = numbers[f"A: {START}"][what]
        signal.bar(place, over_seeds(values).mean, color=report.COLOURS[0], alpha=0.6)
        signal.plot([place] * len(values), values, "o", color="black", markersize=2.5)
    signal.axhline(0.5, color="black", linestyle=":", linewidth=1)
    signal.set_xticks(range(len(PARTS)), [part.replace(" ", "\n", 1) for part in PARTS], fontsize=7)
    signal.set(ylabel="AUROC of log q - log p\nfor right tokens (0.5: says nothing)", ylim=(0, 1.02))
    return figure
