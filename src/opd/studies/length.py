"""How long a response may be while training: too short and there is too little signal, too long and it goes wrong late.

Li et al., arXiv 2604.13016 section 6.1: of caps between 0.5K and 15K tokens, 3K to 7K are best; the shortest teach too
little, the longest collapse late. A right response to a two-digit sum has 22 tokens, so the caps here are 4, 8, 16, 28
and 56; all are evaluated at 28.
"""

from __future__ import annotations

from opd.studies import ablation
from opd.studies.ablation import START, Numbers, Setting, Size
from opd.studies.lab import Lab
from opd.studies.outcome import Check, Finding, Outcome, differences, finding

CAPS = (4, 8, 16, 28, 56)
ENOUGH = 28
SETTINGS = {
    f"at most {cap}": Setting(method="reverse_kl", stage={"sampling": {"max_completion_length": cap}}) for cap in CAPS
}
# The rules, fixed before the run; shares of right answers, greedy.
LITTLE = -0.1
COLLAPSE = -0.1
LEARNED = 0.05


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """All caps for all seeds; see the file's docstring."""
    size = size or Size()
    numbers = ablation.measure(lab, SETTINGS, size)
    return Outcome(
        setup=(
            f"Two-digit addition, full reverse KL, {len(size.seeds)} pairs of their own seeds, {size.steps} updates of "
            f"{size.prompts_per_step} responses each; accuracy on 200 held-out sums with at most 28 tokens."
        ),
        findings=judge(numbers),
        figure=ablation.draw(
            numbers,
            {
                "greedy accuracy": "greedy accuracy, share",
                "entropy": "entropy, nats a token",
                "length": "length, tokens",
            },
            height=2.6,
        ),
        table=ablation.table(
            numbers, ("greedy accuracy", "sampled accuracy", "entropy", "length", "cut", "gradient norm")
        ),
    )


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The claims against the numbers."""

    def gap(first: str, second: str, what: str, **side: float) -> Check:
        accuracy = "greedy accuracy"
        return Check(what=what, interval=differences(numbers[first][accuracy], numbers[second][accuracy]), **side)

    enough = f"at most {ENOUGH}"
    return (
        finding(
            "Short responses give too little signal",
            "2604.13016 section 6.1",
            [
                gap(enough, START, f"accuracy, cap {ENOUGH} minus start", above=LEARNED),
                gap("at most 4", enough, f"cap 4 minus cap {ENOUGH}", below=LITTLE),
                gap("at most 8", enough, f"cap 8 minus cap {ENOUGH}", below=LITTLE),
            ],
        ),
        finding(
            "A cap far above the task's length makes training collapse late",
            "2604.13016 section 6.1",
            [gap("at most 56", enough, f"accuracy, cap 56 minus cap {ENOUGH}", below=COLLAPSE)],
        ),
    )
