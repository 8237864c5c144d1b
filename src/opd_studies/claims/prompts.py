"""Which prompts to distil on: in the teacher's own template or another, with its own content or other content.

The teacher sorts rows of digits 0 to 6, written as "52014>". A few of its rows have another sign ("52014=,;=,;"), and a
few have the digits 3 to 9; the student saw a little of all three. Li et al., arXiv 2604.13016 section 5.2: distilling
on the same problems in the teacher's template recovers more of the gap (about 80 to 85 %). Content like the teacher's
own is better than as much other content, at a lower overlap ratio of the most likely tokens, a higher mass on the
overlap and a much lower entropy of the student; against the latter the paper advises to mix in other prompts. Setting
A: a teacher that saw a little of the other kinds; it still answers most prompts in the other template, and few of the
other content. Setting B: a teacher that saw none of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from opd_studies.lab.after_training import look
from opd_studies.lab.distilling import Distillation, distil_all
from opd_studies.lab.lab import SORTERS, SORTING, Lab, Pair, PairSize, Task, student_recipe, teacher_recipe
from opd_studies.page import report
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding, over_seeds, short

USE = (
    "Distil on prompts in the teacher's own template and content (`data.template`, `data.select`); mix in other "
    "content where the student's entropy matters (docs/prompts.md)."
)


OWN: dict[str, Any] = {"lowest": 0, "highest": 6, "sign": ">"}


KINDS: dict[str, dict[str, Any]] = {
    "own": OWN,
    "template": {**OWN, "sign": "=,;=,;"},  # the same problems in another template
    "content": {**OWN, "lowest": 3, "highest": 9},
}


SHARES = {"A": 0.02, "B": 0.0}  # of each other kind among the teacher's rows


TRAINED_ON = {  # shares of the prompts of a distillation, by kind
    "own": {"own": 1.0},
    "other template": {"template": 1.0},
    "other content": {"content": 1.0},
    "mixed content": {"own": 0.5, "content": 0.5},
}


ASKED = {"own": "own prompts", "template": "other template", "content": "other content"}


SHARE_TICKS = (0, 0.2, 0.4, 0.6, 0.8, 1)


START, TEACHER = "start", "teacher"


K = 4  # most likely tokens of each model that are compared, of a vocabulary of 18


# Thresholds; 0 is for "more" and "less".
MUCH_LOWER = 0.75  # student's entropy on its own prompts, that of own content over that of other content


# By training prompts, by kind of held-out prompts, by measurement: one number per seed.
Numbers: TypeAlias = dict[str, dict[str, dict[str, list[float]]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds (one teacher and one student each), updates, prompts to train on and held-out prompts of each kind."""

    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 100
    prompts: int = 3000
    held_out: int = 300
    pair: PairSize = field(
        default_factory=lambda: replace(SORTERS, teacher_rows=7000, student_rows=192, prompts_per_step=64)
    )


def task(shares: Mapping[str, float]) -> Task:
    """Rows of several kinds, by their share."""
    kinds = [{**KINDS[name], "share": share} for name, share in shares.items() if share]
    return replace(SORTING, data="opd_studies.worlds.sorting_kinds:sorting_of_kinds", options={"kinds": kinds})


def measure(lab: Lab, size: Size, share: float) -> Numbers:
    """Run all distillations from teachers with a `share` of rows of each other kind, and measure them."""
    pairs = pairs_of(lab, size, share)
    runs = [
        Distillation(
            pair=pair,
            seed=seed,
            method="reverse_kl",
            task=task(shares),
            stage={"steps": size.steps, "data": task(shares).rows(size.prompts, seed=3), "evaluate": None},
        )
        for seed, pair in zip(size.seeds, pairs, strict=True)
        for shares in TRAINED_ON.values()
    ]
    trained = iter(distil_all(lab, runs))
    numbers: Numbers = {}
    for seed, pair in zip(size.seeds, pairs, strict=True):
        lab.note(f"looking at seed {seed}")
        models = {START: pair.student, **{name: next(trained).model for name in TRAINED_ON}, TEACHER: pair.teacher}
        for name, model in models.items():
            for kind in KINDS:
                one = task({kind: 1.0})
                held_out = one.rows(size.held_out, part="held_out")
                seen = look(model, pair.teacher, one, held_out, seed=seed, k=K)
                for what, value in seen.items():
                    numbers.setdefault(name, {}).setdefault(kind, {}).setdefault(what, []).append(value)
    return numbers


def pairs_of(lab: Lab, size: Size, share: float) -> list[Pair]:
    """For each seed, a teacher with a `share` of rows of each other kind, and a student with equal shares of all."""
    others = dict.fromkeys(("template", "content"), share)
    of_teacher = replace(size.pair, task=task({"own": 1.0 - 2 * share, **others}))
    of_student = replace(size.pair, task=task(dict.fromkeys(KINDS, 1 / len(KINDS))))
    recipes = [recipe for s in size.seeds for recipe in (teacher_recipe(s, of_teacher), student_recipe(s, of_student))]
    made = lab.run_all(recipes)
    return [
        Pair(teacher=teacher / "teacher" / "model", student=student / "warm-up" / "model")
        for teacher, student in zip(made[::2], made[1::2], strict=True)
    ]


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Run both settings: every kind of prompts, from the same pairs."""
    size = size or Size()
    numbers = {setting: measure(lab, size, share) for setting, share in SHARES.items()}
    return Outcome(
        setup=(
            f"Sorting five digits, {len(size.seeds)} pairs of their own seeds. The teacher saw "
            f"{size.pair.teacher_rows} rows, of which a share of {SHARES['A']:g} (A) or {SHARES['B']:g} (B) had "
            "the other template, and as many had other content; the student saw "
            f"{size.pair.student_rows // len(KINDS)} rows of each kind. Exact reverse KL, {size.steps} updates of "
            f"{size.pair.prompts_per_step} prompts, {size.prompts} different ones, in every run; {size.held_out} "
            f"held-out prompts of each kind, responses at temperature 1; overlap of the {K} likeliest tokens. "
            "Recovery: accuracy minus the student's at the start, over that of the teacher on its own prompts."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def judge(numbers: Mapping[str, Numbers]) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers of both settings."""
    return (
        finding(
            "Distilling on the same problems in the teacher's own template recovers more of the gap than in another",
            "2604.13016 section 5.2",
            *(_template_checks(numbers[setting]) for setting in SHARES),
        ),
        finding(
            "Content like the teacher's own is better than as much other content",
            "2604.13016 section 5.2",
            *(_content_checks(numbers[setting]) for setting in SHARES),
        ),
        finding(
            "On content like the teacher's own the overlap ratio ends lower, and the mass on the overlap higher",
            "2604.13016 section 5.2, eq. 6, 9 and 10",
            *(_overlap_checks(numbers[setting]) for setting in SHARES),
        ),
        finding(
            "On content like the teacher's own the student's entropy ends much lower",
            "2604.13016 section 5.2",
            *(_entropy_checks(numbers[setting]) for setting in SHARES),
        ),
        finding(
            "Mixing in other content keeps more of the student's entropy on prompts like the teacher's own",
            "2604.13016 section 5.2 (its advice)",
            *(_mix_checks(numbers[setting]) for setting in SHARES),
        ),
    )


def recovery(numbers: Numbers, name: str, kind: str) -> list[float]:
    """(accuracy - start) / (teacher's on its own prompts - start) on `kind`, one number per seed; NaN: no gap."""
    after, start = numbers[name][kind]["accuracy"], numbers[START][kind]["accuracy"]
    teacher = numbers[TEACHER]["own"]["accuracy"]
    return [(a - s) / (t - s) if t != s else math.nan for a, s, t in zip(after, start, teacher, strict=True)]


def _template_checks(numbers: Numbers) -> list[Check]:
    own = recovery(numbers, "own", "own")
    other = "other template"
    return [
        Check(
            what="recovery, own minus other template, each asked as it was trained",
            interval=differences(own, recovery(numbers, other, "template")),
            above=0.0,
        ),
        Check(
            what="both asked in the teacher's template",
            interval=differences(own, recovery(numbers, other, "own")),
            above=0.0,
        ),
    ]


def _content_checks(numbers: Numbers) -> list[Check]:
    def accuracy(name: str, *kinds: str) -> list[float]:
        columns = [numbers[name][kind]["accuracy"] for kind in kinds]
        return [sum(values) / len(values) for values in zip(*columns, strict=True)]

    what = "accuracy, own minus other content, measured on"
    return [
        Check(
            what=f"{what} the teacher's own",
            interval=differences(accuracy("own", "own"), accuracy("other content", "own")),
            above=0.0,
        ),
        Check(
            what="on both equally",
            interval=differences(accuracy("own", "own", "content"), accuracy("other content", "own", "content")),
            above=0.0,
        ),
    ]


def _overlap_checks(numbers: Numbers) -> list[Check]:
    own, other = numbers["own"]["own"], numbers["other content"]["content"]
    what = "own minus other content, each on its own prompts: overlap ratio"
    return [
        Check(what=what, interval=differences(own["overlap ratio"], other["overlap ratio"]), below=0.0),
        *(
            Check(
                what=f"{mass} mass",
                interval=differences(own[f"{mass} mass on overlap"], other[f"{mass} mass on overlap"]),
                above=0.0,
            )
            for mass in ("student", "teacher")
        ),
    ]


def _entropy_checks(numbers: Numbers) -> list[Check]:
    own, other = numbers["own"]["own"]["student entropy"], numbers["other content"]["content"]["student entropy"]
    ratios = over_seeds([a / b for a, b in zip(own, other, strict=True)])
    return [
        Check(
            what="student's entropy, own over other content, each on its own prompts", interval=ratios, below=MUCH_LOWER
        )
    ]


def _mix_checks(numbers: Numbers) -> list[Check]:
    mixed, own = (numbers[name]["own"]["student entropy"] for name in ("mixed content", "own"))
    return [
        Check(
            what="student's entropy, nats, mixed minus own content alone", interval=differences(mixed, own), above=0.0
        )
    ]


def table(numbers: Mapping[str, Numbers]) -> tuple[tuple[str, ...], ...]:
    """Means over seeds: accuracy by kind of held-out prompt, and the rest on a run's own prompts."""
    columns = ("overlap ratio", "student mass on overlap", "teacher mass on overlap", "student entropy", "KL")
    rows: list[tuple[str, ...]] = [("prompts", *(f"accuracy on {name}" for name in KINDS), "measured on", *columns)]
    for setting, one in numbers.items():
        for name, seen in one.items():
            kind = next(iter(TRAINED_ON.get(name, {"own": 1.0})))
            rows.append(
                (
                    f"{setting}: {name}",
                    *(short(over_seeds(seen[other]["accuracy"]).mean) for other in KINDS),
                    kind,
                    *(short(over_seeds(seen[kind][what]).mean) for what in columns),
                )
            )
    return tuple(rows)


def draw(numbers: Mapping[str, Numbers]) -> report.Figure:
    """One row per setting: accuracy by kind of prompt; overlap on a run's own prompts; the student's entropy."""
    figure, axes = report.figure(3, len(numbers), width=4.2, height=2.9)
    content = ("own", "other content", "mixed content")
    for row, (setting, one) in zip(axes, numbers.items(), strict=True):
        accuracy, overlap, entropy = row
        asked = {ASKED[kind]: [one[name][kind]["accuracy"] for name in one] for kind in KINDS}
        report.bars(accuracy, [name.replace(" ", "\n") for name in one], asked, most=1.0)
        accuracy.set(ylabel="held-out accuracy, share", yticks=SHARE_TICKS, xlabel="distilled on")
        accuracy.set_title(f"{setting}: the others are {100 * SHARES[setting]:g} % of the teacher's rows")
        masses = ("overlap ratio", "student mass on overlap", "teacher mass on overlap")
        pairs = (("own", "own"), ("other content", "content"))
        shares = {what: [one[name][kind][what] for name, kind in pairs] for what in masses}
        report.bars(overlap, [f"{name},\nits own prompts" for name, _ in pairs], shares, most=1.0)
        overlap.set(ylabel=f"share, top {K}", yticks=SHARE_TICKS, xlabel="distilled on, measured on")
        overlap.set_title(f"{setting}: both models' likeliest tokens")
        entropies = {ASKED[k]: [one[n][k]["student entropy"] for n in content] for k in ("own", "content")}
        report.bars(entropy, [name.replace(" ", "\n") for name in content], entropies)
        entropy.set(ylabel="entropy, nats a token", xlabel="distilled on")
        entropy.set_title(f"{setting}: the student's entropy")
        for panel in row:
            panel.set_ylim(0, 1.04 if panel is not entropy else None)
            panel.legend(fontsize=7)
    return figure
