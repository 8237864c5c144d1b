"""Rollouts with top-p below 1, with the sampled token and with teacher top-K matching.

Fu et al., arXiv 2603.25562 Table 3 and Fig. 6: local support matching (teacher top-K, renormalised) needs rollouts with
top-p 0.9, the sampled token gains little from it, and a larger K is better. Accuracy is measured as in the paper, on
responses sampled with top-p 0.9; the table also has it on the whole distribution.
"""

from __future__ import annotations

from dataclasses import replace

from opd_studies.lab import ablation
from opd_studies.lab.ablation import NUCLEUS, START, Numbers, Setting, Size
from opd_studies.lab.lab import Lab
from opd_studies.lab.truncated_losses import LONGEST, SAMPLED_TOKEN, SIZE, truncated
from opd_studies.page import comparison
from opd_studies.page.comparison import gap
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding

USE = (
    "With `local_support_matching` use the larger k; between rollouts at `top_p: 0.9` and 1 no difference "
    "showed. Keep `top_p: 1` with the sampled token, whose mean accuracy fell below it."
)


TOP_PS = (1.0, 0.9, 0.8)


KS = (2, 4)


def rolled(setting: Setting, top_p: float) -> Setting:
    """A setting with rollouts of `top_p`."""
    if top_p == 1.0:
        return setting
    sampling = {"max_completion_length": LONGEST, "top_p": top_p}
    return replace(setting, stage={**setting.stage, "sampling": sampling})


LOSSES = {"sampled": SAMPLED_TOKEN, **{f"K={k}": truncated("renormalised", k) for k in KS}}


SETTINGS = {f"{name}, top-p {top_p:g}": rolled(setting, top_p) for name, setting in LOSSES.items() for top_p in TOP_PS}


# Thresholds: accuracies at top-p 0.9.
HELPS = 0.0


LEARNED = 0.0


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Train all settings for all seeds; see the file's docstring."""
    size = size or SIZE
    numbers = ablation.measure(lab, SETTINGS, size)
    return Outcome(
        setup=(
            f"Sorting five digits, V = 17, {len(size.seeds)} pairs of their own seeds, {size.steps} updates of "
            f"{size.prompts_per_step} responses each, 200 held-out prompts. A setting is a loss and the top-p of its "
            "rollouts; K: the renormalised form on the teacher's K likeliest tokens. Entropy in nats per token, P_S "
            "and Q_S the masses on the support: on the rollouts, means over the last ten updates. "
            "KL(student || teacher) is exact, on responses of the whole distribution."
        ),
        findings=judge(numbers),
        figure=comparison.draw(
            numbers,
            {
                NUCLEUS: "accuracy, share\n(evaluated at top-p 0.9)",
                "sampled accuracy": "accuracy, share\n(evaluated at top-p 1)",
                "KL": "KL(student || teacher), nats",
            },
            height=3.2,
        ),
        table=comparison.table(
            numbers, (NUCLEUS, "sampled accuracy", "greedy accuracy", "KL", "entropy", "length", "cut", "P_S", "Q_S")
        ),
    )


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""

    def better(first: str, second: str) -> Check:
        return gap(numbers, first, second, NUCLEUS, above=HELPS)

    def helped(loss: str) -> list[float]:
        pairs = zip(numbers[f"{loss}, top-p 0.9"][NUCLEUS], numbers[f"{loss}, top-p 1"][NUCLEUS], strict=True)
        return [low - whole for low, whole in pairs]

    def more_than_sampled(loss: str) -> Check:
        interval = differences(helped(loss), helped("sampled"))
        return Check(what=f"gain from top-p 0.9, {loss} minus sampled", interval=interval, above=HELPS)

    def better_below_one(loss: str) -> list[Check]:
        return [better(f"{loss}, top-p {top_p}", f"{loss}, top-p 1") for top_p in (0.9, 0.8)]

    return (
        finding(
            "Top-K matching is better with rollouts at top-p 0.9 or 0.8 than at 1",
            "2603.25562 Table 3, Fig. 6",
            better_below_one("K=4"),
            better_below_one("K=2"),
        ),
        finding(
            "Top-K matching gains more from rollouts at top-p 0.9 than the sampled token does",
            "2603.25562 Table 3",
            [more_than_sampled("K=4")],
            [more_than_sampled("K=2")],
        ),
        finding(
            "A larger K is better",
            "2603.25562 Fig. 6",
            [gap(numbers, "K=4, top-p 0.9", START, NUCLEUS, above=LEARNED), better("K=4, top-p 0.9", "K=2, top-p 0.9")],
            [gap(numbers, "K=4, top-p 1", START, NUCLEUS, above=LEARNED), better("K=4, top-p 1", "K=2, top-p 1")],
        ),
        finding(
            "Top-K matching with rollouts at top-p 0.9 is better than the sampled token at top-p 1",
            "2603.25562 Table 1 and 3",
            [better("K=4, top-p 0.9", "sampled, top-p 1")],
            [better("K=4, top-p 0.8", "sampled, top-p 1")],
        ),
    )
