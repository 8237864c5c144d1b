"""Which tokens carry the signal: the student's likeliest ones, those that both models share, or those that they do not.

Li et al., arXiv 2604.13016 section 4.2, top-k of the student against its overlap with the teacher's and the symmetric
difference. The released code renormalises the student's weights on the first two and not on the third, which makes that
one's signal small by itself (setting A); in setting B its weights are renormalised too.
"""

from __future__ import annotations

from opd.studies import ablation
from opd.studies.ablation import START, Numbers, Setting, Size
from opd.studies.lab import Lab
from opd.studies.outcome import Check, Finding, Outcome, differences, finding

K = 4
RELEASED = "opd.studies.methods:released_code"
SETTINGS = {
    "student's": Setting(method=RELEASED, options={"k": K, "by": "student"}),
    "overlap": Setting(method=RELEASED, options={"k": K, "by": "intersection"}),
    "non-overlap, raw weights": Setting(
        method="topk_reverse_kl", options={"k": K, "by": "symmetric_difference", "form": "stop_gradient"}
    ),
    "non-overlap, normalised": Setting(method=RELEASED, options={"k": K, "by": "symmetric_difference"}),
    "union": Setting(method=RELEASED, options={"k": K, "by": "union"}),
}
# The rules, fixed before the run; shares of right answers, greedy.
SIMILAR = 0.15
WEAKER = -0.1
LEARNED = 0.05


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """All supports for all seeds; see the file's docstring."""
    size = size or Size()
    numbers = ablation.measure(lab, SETTINGS, size)
    return Outcome(
        setup=(
            f"Two-digit addition, k = {K} of 17 tokens, {len(size.seeds)} pairs of their own seeds, {size.steps} "
            f"updates of {size.prompts_per_step} responses each; accuracy on 200 held-out sums. P_S and Q_S are the "
            "masses on the support, means over the last ten updates."
        ),
        findings=judge(numbers),
        figure=ablation.draw(
            numbers,
            {
                "greedy accuracy": "greedy accuracy, share",
                "P_S": "student's mass on the support",
                "Q_S": "teacher's mass on the support",
            },
            height=2.6,
        ),
        table=ablation.table(
            numbers, ("greedy accuracy", "sampled accuracy", "entropy", "P_S", "Q_S", "gradient norm")
        ),
    )


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The claims against the numbers."""

    def gap(first: str, second: str, what: str, **side: float) -> Check:
        accuracy = "greedy accuracy"
        return Check(what=what, interval=differences(numbers[first][accuracy], numbers[second][accuracy]), **side)

    return (
        finding(
            "The overlap of both top-k is enough: it teaches as much as the student's whole top-k",
            "2604.13016 section 4.2",
            [
                gap("student's", START, "accuracy, student's minus start", above=LEARNED),
                gap("overlap", "student's", "overlap minus student's", above=-SIMILAR, below=SIMILAR),
            ],
        ),
        finding(
            "The tokens outside of the overlap teach less",
            "2604.13016 section 4.2",
            [gap("non-overlap, raw weights", "student's", "accuracy, non-overlap minus student's", below=WEAKER)],
            [gap("non-overlap, normalised", "student's", "normalised non-overlap minus student's", below=WEAKER)],
        ),
    )
