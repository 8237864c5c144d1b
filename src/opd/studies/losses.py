"""Losses side by side on a small pair: which truncated forms are stable, and which token signal is worth how much.

The comparisons of arXiv 2605.11182 (Fig. 4, 11, 12) and 2603.25562 (Table 1).
Each setting distils the same students from the same teachers on the same prompts, on policy, for as many updates. The
raw form is tried at K = 4 of 17 tokens (setting A, where the teacher's mass is practically all on the support, as in
the papers) and K = 1 (setting B, where its bias is largest).
"""

from __future__ import annotations

from opd.studies import ablation
from opd.studies.ablation import START, Numbers, Setting, Size
from opd.studies.lab import Lab
from opd.studies.outcome import Check, Finding, Outcome, differences, finding

SETTINGS = {
    "sampled": Setting(method="opd"),
    "log-ratio, differentiated": Setting(method="opd.studies.methods:differentiated_log_ratio"),
    "forward KL, full": Setting(method="gkd", options={"beta": 0.0}),
    **{
        f"{form.replace('_', '-')}, K={k}": Setting(method="topk_reverse_kl", options={"k": k, "form": form})
        for form, ks in {"raw": (1, 4), "stop_gradient": (1, 4), "renormalised": (4,), "tail": (4,)}.items()
        for k in ks
    },
}
# The rules, fixed before the run; shares of right answers, greedy, unless said otherwise.
COLLAPSE = -0.2
LEAK = -0.1  # of the student's mass on the support
SIMILAR = 0.15
LEARNED = 0.05


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """All settings for all seeds; see the file's docstring."""
    size = size or Size()
    numbers = ablation.measure(lab, SETTINGS, size)
    return Outcome(
        setup=(
            f"Two-digit addition, {len(size.seeds)} pairs of their own seeds, {size.steps} updates of "
            f"{size.prompts_per_step} responses each; accuracy on 200 held-out sums. Training numbers are means over "
            "the last ten updates: entropy in nats a token, P_S and Q_S the masses on the support."
        ),
        findings=judge(numbers),
        figure=ablation.draw(
            numbers,
            {
                "greedy accuracy": "greedy accuracy, share",
                "entropy": "entropy, nats a token",
                "length": "length, tokens",
                "P_S": "student's mass on S",
            },
        ),
        table=ablation.table(
            numbers,
            ("greedy accuracy", "sampled accuracy", "entropy", "length", "repeat ratio", "P_S", "Q_S", "gradient norm"),
        ),
    )


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The claims against the numbers."""

    def gap(first: str, second: str, what: str, side: dict[str, float], name: str = "greedy accuracy") -> Check:
        return Check(what=what, interval=differences(numbers[first][name], numbers[second][name]), **side)

    def raw(k: int) -> list[Check]:
        pair = (f"raw, K={k}", f"stop-gradient, K={k}")
        return [
            gap(*pair, f"K={k}: accuracy of raw minus stop-gradient", {"below": COLLAPSE}),
            gap(*pair, "P_S of raw minus stop-gradient", {"below": LEAK}, "P_S"),
        ]

    same = {"above": -SIMILAR, "below": SIMILAR}
    return (
        finding(
            "Raw top-K reverse KL collapses where stop-gradient is stable",
            "2605.11182 Fig. 4 and 11",
            raw(4),
            raw(1),
        ),
        finding(
            "Stop-gradient and renormalised top-K are both stable, and similar",
            "2605.11182 Fig. 11",
            [
                gap("stop-gradient, K=4", START, "accuracy, stop-gradient K=4 minus start", {"above": LEARNED}),
                gap("renormalised, K=4", START, "renormalised K=4 minus start", {"above": LEARNED}),
                gap("renormalised, K=4", "stop-gradient, K=4", "renormalised minus stop-gradient", same),
            ],
        ),
        finding(
            "The sampled log-ratio teaches inside a policy gradient and not as a loss",
            "2605.11182 Fig. 12",
            [
                gap("sampled", START, "accuracy, policy gradient minus start", {"above": LEARNED}),
                gap("log-ratio, differentiated", START, "as a loss minus start", {"below": LEARNED}),
            ],
        ),
        finding(
            "The sampled policy gradient and stop-gradient top-1 learn alike",
            "2605.11182 Fig. 12",
            [gap("stop-gradient, K=1", "sampled", "accuracy, stop-gradient K=1 minus sampled", same)],
        ),
        finding(
            "Teacher top-K matching, renormalised, is better than the sampled token",
            "2603.25562 Table 1",
            [gap("renormalised, K=4", "sampled", "accuracy, renormalised K=4 minus sampled", {"above": 0.0})],
        ),
    )
