"""Rollouts with top-p < 1, with the sampled token and with teacher top-K matching.

Fu et al., arXiv 2603.25562 Table 3 and Fig. 6: local support matching (teacher top-K, renormalised) needs rollouts with
top-p 0.9, the sampled token gains little from it, and a larger K is better.
"""

from __future__ import annotations

from opd.studies import ablation
from opd.studies.ablation import START, Numbers, Setting, Size
from opd.studies.lab import LONGEST, Lab
from opd.studies.outcome import Check, Finding, Outcome, differences, finding

TOP_PS = (1.0, 0.9)
KS = (2, 4)
SETTINGS = {
    f"{name}, top-p {top_p:g}": Setting(
        method=method, options=options, stage={"sampling": {"max_completion_length": LONGEST, "top_p": top_p}}
    )
    for name, method, options in (
        ("sampled", "opd", {}),
        *((f"K={k}", "topk_reverse_kl", {"k": k, "form": "renormalised"}) for k in KS),
    )
    for top_p in TOP_PS
}
# The rules, fixed before the run; shares of right answers, greedy.
HELPS = 0.0
LEARNED = 0.05


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """All settings for all seeds; see the file's docstring."""
    size = size or Size()
    numbers = ablation.measure(lab, SETTINGS, size)
    return Outcome(
        setup=(
            f"Two-digit addition, V = 17, {len(size.seeds)} pairs of their own seeds, {size.steps} updates of "
            f"{size.prompts_per_step} responses each; accuracy on 200 held-out sums, sampled without truncation."
        ),
        findings=judge(numbers),
        figure=ablation.draw(
            numbers,
            {
                "greedy accuracy": "greedy accuracy, share",
                "sampled accuracy": "sampled accuracy, share",
                "entropy": "entropy, nats a token",
            },
            height=2.6,
        ),
        table=ablation.table(
            numbers, ("greedy accuracy", "sampled accuracy", "entropy", "length", "repeat ratio", "P_S", "Q_S")
        ),
    )


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The claims against the numbers."""

    def gap(first: str, second: str, what: str, **side: float) -> Check:
        accuracy = "greedy accuracy"
        return Check(what=what, interval=differences(numbers[first][accuracy], numbers[second][accuracy]), **side)

    return (
        finding(
            "Top-K matching is better with rollouts at top-p 0.9 than at 1",
            "2603.25562 Table 3, Fig. 6",
            [gap("K=4, top-p 0.9", "K=4, top-p 1", "accuracy, K=4: top-p 0.9 minus 1", above=HELPS)],
            [gap("K=2, top-p 0.9", "K=2, top-p 1", "accuracy, K=2: top-p 0.9 minus 1", above=HELPS)],
        ),
        finding(
            "A larger K is better",
            "2603.25562 Fig. 6",
            [
                gap("K=4, top-p 0.9", START, "accuracy, K=4 minus start", above=LEARNED),
                gap("K=4, top-p 0.9", "K=2, top-p 0.9", "K=4 minus K=2, at top-p 0.9", above=HELPS),
            ],
        ),
    )
