"""One scored token per position: the sampled one, in a policy gradient or as a loss, or the most likely one.

Zhu et al., arXiv 2605.11182 Fig. 12 (the log-ratio as a loss, as a policy gradient, and stop-gradient top-1); Fu et
al., arXiv 2603.25562 Table 1 (teacher top-K, renormalised, against the sampled token); Li et al., arXiv 2604.13016
section 6.3 (sampled, student's top-1 and top-4, as released). The noise of one token per position falls with the number
of prompts per step, 32 in setting A. Setting B has 64 for claims that one token is as good as more or on its behaviour,
and 8 for claims that more are better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opd_studies.lab import ablation
from opd_studies.lab.ablation import NUCLEUS, SMOOTHED, START, Numbers, Setting, Size
from opd_studies.lab.distilling import Trained
from opd_studies.lab.lab import Lab
from opd_studies.lab.truncated_losses import LONGEST, REWARDED, SAMPLED_TOKEN, SIZE, truncated
from opd_studies.page import comparison, report
from opd_studies.page.comparison import collapses, gap, stable
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding

USE = (
    "Use the sampled token inside a policy gradient (method `opd`) and with many prompts per step; with few, "
    "score several tokens. Never differentiate the log-ratio itself, and never score the student's likeliest "
    "token alone."
)


FEW, MANY = 8, 64  # prompts per step in settings B


def with_prompts(setting: Setting, prompts: int) -> Setting:
    """A setting with another number of prompts per step."""
    return Setting(method=setting.method, options=setting.options, stage={**setting.stage, "prompts_per_step": prompts})


AT_32 = {
    "sampled": SAMPLED_TOKEN,
    "log-ratio, differentiated": Setting(method="opd_studies.worlds.methods:differentiated_log_ratio", stage=REWARDED),
    "stop-gradient, K=1": truncated("stop-gradient", 1),
    "renormalised, K=4": truncated("renormalised", 4),
    "released, student's K=1": truncated("released", 1, "student"),
    "released, student's K=4": truncated("released", 4, "student"),
}


OTHERS = {
    FEW: ("sampled", "renormalised, K=4"),
    MANY: ("sampled", "stop-gradient, K=1", "released, student's K=1", "released, student's K=4"),
}


SETTINGS = AT_32 | {
    f"{name}, {prompts} prompts": with_prompts(AT_32[name], prompts)
    for prompts, names in OTHERS.items()
    for name in names
}


# Thresholds, in addition to those of `comparison`.
LEARNED = 0.0  # accuracy of sampled responses minus that of the student before


BETTER = 0.0  # accuracy


FALLS = 0.0  # share of right answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Held-out numbers, and the course of training; lists hold one number per seed."""

    end: Numbers
    fall: Mapping[str, Sequence[float]]  # by setting: largest fall of training accuracy below its earlier best
    curve: Mapping[str, Sequence[Sequence[float]]]  # by setting, one list per seed: training accuracy, smoothed


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Train all settings for all seeds; see the file's docstring."""
    size = size or SIZE
    measured = read(ablation.train(lab, SETTINGS, size))
    columns = (
        "sampled accuracy",
        NUCLEUS,
        "greedy accuracy",
        "KL",
        "entropy",
        "length",
        "repeat ratio",
        "largest fall",
        "gradient norm",
    )
    return Outcome(
        setup=(
            f"Sorting five digits, V = 17, responses of at most {LONGEST} tokens; {len(size.seeds)} pairs of their own "
            f"seeds, {size.steps} updates of {size.prompts_per_step} responses each unless stated otherwise, 200 "
            "held-out prompts. KL(student || teacher) is exact, on sampled responses. Largest fall: of the training "
            f"accuracy, a mean over {SMOOTHED} updates, below its best before."
        ),
        findings=judge(measured),
        figure=draw(measured),
        table=comparison.table(measured.end, columns),
    )


def judge(measured: Measured) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""
    end, few, many = measured.end, f", {FEW} prompts", f", {MANY} prompts"
    one, four = (f"released, student's K={k}" for k in (1, 4))

    def more(prompts: str) -> list[Check]:
        return [gap(end, f"renormalised, K=4{prompts}", f"sampled{prompts}", NUCLEUS, above=BETTER)]

    def falls(prompts: str) -> list[Check]:
        interval = differences(measured.fall[one + prompts], measured.fall[four + prompts])
        what = f"largest fall of training accuracy{prompts}, student's K=1 minus K=4"
        return [Check(what=what, interval=interval, above=FALLS)]

    return (
        finding(
            "As a plain loss the sampled log-ratio collapses",
            "2605.11182 Fig. 12",
            collapses(end, "log-ratio, differentiated"),
        ),
        finding(
            "Inside a policy gradient the same log-ratio teaches",
            "2605.11182 Fig. 12",
            [gap(end, "sampled", START, above=LEARNED)],
            [gap(end, f"sampled{many}", START, above=LEARNED)],
        ),
        finding(
            "The sampled policy gradient and stop-gradient top-1 learn alike",
            "2605.11182 Fig. 12",
            stable(end, "stop-gradient, K=1", "sampled"),
            stable(end, f"stop-gradient, K=1{many}", f"sampled{many}"),
        ),
        finding(
            "Teacher top-K matching, renormalised, is better than the sampled token",
            "2603.25562 Table 1",
            more(""),
            more(few),
        ),
        finding(
            "The student's likeliest token alone ends worse than its four likeliest",
            "2604.13016 section 6.3",
            [gap(end, four, one, above=BETTER)],
            [gap(end, four + many, one + many, above=BETTER)],
        ),
        finding(
            "The student's likeliest token alone falls back more on the way than its four likeliest",
            "2604.13016 section 6.3",
            falls(""),
            falls(many),
        ),
        finding(
            "The sampled token learns as much as the student's top-K",
            "2604.13016 section 6.3",
            stable(end, "sampled", four),
            stable(end, f"sampled{many}", four + many),
        ),
    )


def read(trained: Mapping[str, Sequence[Trained]]) -> Measured:
    """The numbers that the claims need, from finished distillations."""
    end = ablation.collect(trained)
    curve = ablation.accuracy_curves(trained)
    fall = {name: [largest_fall(one) for one in seeds] for name, seeds in curve.items()}
    for name, values in fall.items():
        end[name]["largest fall"] = list(values)
    return Measured(end=end, fall=fall, curve=curve)


def largest_fall(values: Sequence[float]) -> float:
    """The largest fall of a value below an earlier maximum; 0 for rising or empty `values`."""
    return max((max(values[: i + 1]) - value for i, value in enumerate(values)), default=0.0)


def draw(measured: Measured) -> report.Figure:
    """Bars of final numbers, and the course of those with the usual number of prompts."""
    figure, axes = report.figure(3, width=3.2, height=3.6)
    panels = {"sampled accuracy": "sampled accuracy, share", "KL": "KL(student || teacher), nats"}
    comparison.points(axes[0][:2], measured.end, panels)
    comparison.curves(axes[0][2], measured.curve, list(AT_32), f"training accuracy, share,\nmean of {SMOOTHED} updates")
    return figure
