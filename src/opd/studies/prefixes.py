"""A teacher that continues the student's prefixes: does it get worse, and how deep is it still of use?

The student writes a response; the teacher takes over at a share of its length and writes on, greedily. At depth 0 that
is the teacher alone. Zhu et al., arXiv 2605.11182 A.22 (prefix distortion): accuracy falls when the prefix is a
student's. Li et al., arXiv 2604.13016 section 6.1:
the gain over the student's own end shrinks with depth, and with it the signal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from opd.studies import report
from opd.studies.lab import LONGEST, Lab, PairSize, sums
from opd.studies.outcome import Check, Finding, Outcome, differences, finding, over_seeds, short

DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.9)  # share of the student's response
# The rules, fixed before the run; shares of right answers.
WORSE = -0.1  # teacher from half of a response, minus teacher alone
SHRINKS = -0.1  # gain at the deepest cut minus gain at a quarter


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds (a pair each) and held-out sums."""

    seeds: Sequence[int] = (0, 1, 2)
    prompts: int = 200
    pair: PairSize | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Shares of right answers; lists hold one number a seed."""

    student: list[float]  # of the student's own responses, sampled
    continued: dict[float, list[float]]  # of the teacher's continuations, by depth
    right_to_wrong: list[float]  # of prompts that the teacher alone solves and does not from depth 0.5
    wrong_to_right: list[float]


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Responses of each pair's student, and the teacher's continuations of them at every depth."""
    size = size or Size()
    numbers = measure(lab, size)
    return Outcome(
        setup=(
            f"Two-digit addition, {len(size.seeds)} pairs of their own seeds, {size.prompts} held-out sums. The "
            "student after warm-up samples at temperature 1; the teacher continues greedily. Special tokens inside "
            "of a prefix are left out."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The claims against the numbers."""
    continued = numbers.continued
    gains = {
        depth: [after - own for after, own in zip(continued[depth], numbers.student, strict=True)] for depth in DEPTHS
    }
    return (
        finding(
            "A teacher that continues a student's prefix is worse than the teacher alone",
            "2605.11182 A.22",
            [
                Check(
                    what="accuracy from half of the student's response minus alone",
                    interval=differences(continued[0.5], continued[0.0]),
                    below=WORSE,
                )
            ],
        ),
        finding(
            "The gain of the teacher's continuation over the student's own end shrinks with depth",
            "2604.13016 section 6.1",
            [
                Check(what="gain at depth 0.25", interval=over_seeds(gains[0.25]), above=0.0),
                Check(
                    what="gain at depth 0.9 minus at 0.25",
                    interval=differences(gains[0.9], gains[0.25]),
                    below=SHRINKS,
                ),
            ],
        ),
    )


def measure(lab: Lab, size: Size) -> Numbers:
    """All seeds, all depths."""
    numbers = Numbers(student=[], continued={d: [] for d in DEPTHS}, right_to_wrong=[], wrong_to_right=[])
    for seed in size.seeds:
        own, by_depth = outcomes(lab, seed, size)
        numbers.student.append(_share(own))
        for depth, right in by_depth.items():
            numbers.continued[depth].append(_share(right))
        changes = list(zip(by_depth[0.0], by_depth[0.5], strict=True))
        numbers.right_to_wrong.append(_share([alone and not half for alone, half in changes]))
        numbers.wrong_to_right.append(_share([half and not alone for alone, half in changes]))
    return numbers


def outcomes(lab: Lab, seed: int, size: Size) -> tuple[list[bool], dict[float, list[bool]]]:
    """Whether each prompt's answer was right: the student's own, and the teacher's by depth."""
    from opd.data import DataSpec, load_prompts
    from opd.loading import load_model
    from opd.recipe import ModelSpec
    from opd.rewards import load_reward
    from opd.samplers.hf import TransformersSampler
    from opd.types import Sampling

    pair = lab.pair(seed, size.pair)
    student = load_model(ModelSpec(path=str(pair.student)), name="student")
    teacher = load_model(ModelSpec(path=str(pair.teacher)), name="teacher")
    reward = load_reward("final_number", {})
    prompts = load_prompts(DataSpec(**sums(size.prompts, part="held_out")))
    written = TransformersSampler(lm=student, sampling=Sampling(max_completion_length=LONGEST))(prompts, seed=(seed, 0))
    greedy = TransformersSampler(lm=teacher, sampling=Sampling(max_completion_length=LONGEST, temperature=0.0))
    by_depth: dict[float, list[bool]] = {}
    for depth in DEPTHS:
        begun = [
            student.tokenizer.decode(r.response_ids[: int(depth * len(r.response_ids))], skip_special_tokens=True)
            for r in written
        ]
        asked = [replace(p, content=f"{p.content}{start}") for p, start in zip(prompts, begun, strict=True)]
        ends = greedy(asked, seed=(seed, 1))
        by_depth[depth] = [
            bool(reward(prompt, start + end.text)) for prompt, start, end in zip(prompts, begun, ends, strict=True)
        ]
    return [bool(reward(r.prompt, r.text)) for r in written], by_depth


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """Means over seeds by depth, and what changed between alone and half."""
    rows = [("who writes the end", "accuracy")]
    rows.append(("student", short(over_seeds(numbers.student).mean)))
    rows += [(f"teacher from depth {d:g}", short(over_seeds(numbers.continued[d]).mean)) for d in DEPTHS]
    rows.append(("right alone, wrong from depth 0.5", short(over_seeds(numbers.right_to_wrong).mean)))
    rows.append(("wrong alone, right from depth 0.5", short(over_seeds(numbers.wrong_to_right).mean)))
    return tuple(rows)


def draw(numbers: Numbers) -> report.Figure:
    """Accuracy by depth, with the student's own as a line."""
    figure, axes = report.figure(1, width=4.2)
    panel = axes[0][0]
    intervals = [over_seeds(numbers.continued[depth]) for depth in DEPTHS]
    panel.errorbar(
        DEPTHS,
        [one.mean for one in intervals],
        yerr=[[one.mean - one.low for one in intervals], [one.high - one.mean for one in intervals]],
        fmt="o-",
        color=report.COLOURS[0],
        capsize=2,
        label="teacher continues (95 % interval over seeds)",
    )
    panel.axhline(over_seeds(numbers.student).mean, color=report.COLOURS[1], label="student's own end")
    panel.set(xlabel="depth of the cut, share of the student's response", ylabel="accuracy, share", ylim=(0, None))
    panel.legend(fontsize=7)
    return figure


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)
