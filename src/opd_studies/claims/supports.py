"""Which tokens carry the signal: the student's top-k, its overlap with the teacher's, or the symmetric difference.

Li et al., arXiv 2604.13016 section 4.2: the student's top-k against its overlap with the teacher's and the symmetric
difference, as in the released code (`rethinking_opd`). That code renormalises the student's weights on the first two
but not on the third, which alone makes the third signal small: the control renormalises it too.

Setting A: k = 4 of 17 tokens. Setting B: k = 8, so that the top k of both hold nearly all of their mass, as k = 16 does
for the paper's models (97 to 99 %).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_studies.lab import ablation
from opd_studies.lab.ablation import START, Numbers, Setting, Size
from opd_studies.lab.distilling import Trained
from opd_studies.lab.lab import Lab
from opd_studies.page import comparison, report
from opd_studies.page.comparison import gap
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding

USE = (
    "Do not score the overlap alone (`by: intersection`, released form): accuracy fell to nearly nothing. Score "
    "the student's whole top-k, with a k that holds nearly all of its mass."
)


K, LARGER = 4, 8  # of setting A and B


SIZE = Size(steps=100, prompts_per_step=32)


EVERY = 9  # steps between measurements of the overlap; includes the last of 100 updates


OVERLAP, MASS = "compare/overlap_ratio", "compare/student_mass_on_overlap"


def supported(by: str, k: int = K, **options: Any) -> Setting:
    """The released code on a support, with diagnostics during training."""
    stage = {"diagnostics": {"every": EVERY, "k": k}}
    return Setting(method="rethinking_opd", options={"k": k, "by": by, "form": "released", **options}, stage=stage)


SETTINGS = {
    "student's": supported("student"),
    "overlap": supported("intersection"),
    "non-overlap, raw weights": supported("symmetric_difference"),
    "non-overlap, normalised": supported("symmetric_difference", normalised=True),
    "union": supported("union"),
    f"student's, k={LARGER}": supported("student", LARGER),
    f"overlap, k={LARGER}": supported("intersection", LARGER),
    f"non-overlap, raw weights, k={LARGER}": supported("symmetric_difference", LARGER),
}


# Thresholds.
LEARNED = 0.0  # accuracy of sampled responses minus that of the student before


SIMILAR = 0.2  # nats of KL(student || teacher): a sixth of the initial KL


WEAKER = 0.0  # accuracy


RISES = 0.0  # overlap ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Held-out numbers, and the overlap on the responses of training; lists hold one number per seed."""

    end: Numbers
    before: Mapping[str, Sequence[float]]  # overlap ratio in the first step, by setting
    after: Mapping[str, Sequence[float]]  # in the last one
    course: Mapping[str, Sequence[Mapping[int, float]]]  # by update, one per seed


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Train on all supports for all seeds; see the file's docstring."""
    size = size or SIZE
    measured = read(ablation.train(lab, SETTINGS, size))
    return Outcome(
        setup=(
            f"Sorting five digits, V = 17, k = {K} (A) or {LARGER} (B); {len(size.seeds)} pairs of their own seeds, "
            f"{size.steps} updates of {size.prompts_per_step} responses each, 200 held-out prompts. P_S and Q_S are "
            "the masses on the support, means over the last ten updates. Overlap: the ratio of both top k, and the "
            "student's mass on their intersection, on the responses of the first and of the last update. A token "
            "outside of the support counts as if both models agreed on it: tokens that only the student "
            "prefers are never in the overlap, and the mass moves there."
        ),
        findings=judge(measured),
        figure=draw(measured),
        table=comparison.table(
            measured.end,
            (
                "sampled accuracy",
                "greedy accuracy",
                "KL",
                "entropy",
                "P_S",
                "Q_S",
                "overlap before",
                "overlap after",
                "mass before",
                "mass after",
                "gradient norm",
            ),
        ),
    )


def judge(measured: Measured) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""
    end, larger = measured.end, f", k={LARGER}"

    def enough(k: str) -> list[Check]:
        learned = [gap(end, f"{name}{k}", START, above=LEARNED) for name in ("student's", "overlap")]
        return [*learned, gap(end, f"overlap{k}", f"student's{k}", "KL", above=-SIMILAR, below=SIMILAR)]

    def weaker(name: str, k: str = "") -> list[Check]:
        return [gap(end, f"{name}{k}", f"student's{k}", below=WEAKER)]

    def rise(k: str) -> list[Check]:
        return [
            Check(
                what=f"overlap ratio, {name}{k}, after minus before",
                interval=differences(measured.after[f"{name}{k}"], measured.before[f"{name}{k}"]),
                above=RISES,
            )
            for name in ("student's", "overlap")
        ]

    section = "2604.13016 section 4.2"
    return (
        finding(
            "The overlap of both top-k is enough: it teaches as much as the student's whole top-k",
            section,
            enough(""),
            enough(larger),
        ),
        finding(
            "The tokens outside of the overlap teach less, with their raw weights as released",
            f"{section} and code",
            weaker("non-overlap, raw weights"),
            weaker("non-overlap, raw weights", larger),
        ),
        finding(
            "The tokens outside of the overlap teach less also when their weights are renormalised",
            section,
            weaker("non-overlap, normalised"),
        ),
        finding(
            "Learning from the student's top-k or from the overlap makes the two top-k more alike",
            section,
            rise(""),
            rise(larger),
        ),
    )


def read(trained: Mapping[str, Sequence[Trained]]) -> Measured:
    """The numbers that the claims need, from finished distillations."""
    end = ablation.collect(trained)
    course = {name: [looked_at(one.rows, OVERLAP) for one in seeds] for name, seeds in trained.items()}
    before = {name: [one[min(one)] for one in seeds] for name, seeds in course.items()}
    after = {name: [one[max(one)] for one in seeds] for name, seeds in course.items()}
    for name, seeds in trained.items():
        masses = [looked_at(one.rows, MASS) for one in seeds]
        end[name] |= {
            "overlap before": list(before[name]),
            "overlap after": list(after[name]),
            "mass before": [one[min(one)] for one in masses],
            "mass after": [one[max(one)] for one in masses],
        }
    return Measured(end=end, before=before, after=after, course=course)


def looked_at(rows: Sequence[Mapping[str, float]], name: str) -> dict[int, float]:
    """A metric by update, for steps that have it."""
    return {int(row["step"]): row[name] for row in rows if name in row}


def draw(measured: Measured) -> report.Figure:
    """Bars of final numbers by support, and the overlap ratio during training."""
    figure, axes = report.figure(4, width=2.8, height=3.4)
    comparison.points(
        axes[0][:3],
        measured.end,
        {
            "sampled accuracy": "sampled accuracy, share",
            "KL": "KL(student || teacher), nats",
            "P_S": "student's mass on S",
        },
    )
    panel = axes[0][3]
    at_k = [(name, seeds) for name, seeds in measured.course.items() if not name.endswith(f"k={LARGER}")]
    for (name, seeds), colour in zip(at_k, report.COLOURS, strict=False):
        means = [sum(one[step] for one in seeds) / len(seeds) for step in seeds[0]]
        panel.plot(list(seeds[0]), means, "o-", markersize=3, color=colour, label=name)
    panel.set(xlabel="update", ylabel=f"overlap ratio of both top {K}", ylim=(0, 1), title=f"k = {K}")
    panel.legend(fontsize=6)
    return figure
