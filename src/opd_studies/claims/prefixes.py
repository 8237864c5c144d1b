"""A teacher that continues the student's prefixes: does it get worse, and to which depth does it still help?

The student writes a response; the teacher continues it greedily from a share of its length. At depth 0 that is the
teacher alone. Zhu et al., arXiv 2605.11182 A.22 (prefix distortion): accuracy falls when the prefix is a
student's. Li et al., arXiv 2604.13016 section 6.1:
the gain over the student's own end shrinks with depth, and with it the signal. Setting A: the student samples at
temperature 1, as in training. Setting B: it writes greedily, which gives its best prefixes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from opd_studies.lab.lab import LONGEST, Lab, PairSize, sums
from opd_studies.page import report
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding, over_seeds, short

USE = (
    "A teacher is worse after a student's prefix than alone. Let `opd doctor` measure how deep it still gains "
    "(`headroom/continuation`) and set `sampling.max_completion_length` there."
)


TEMPERATURES = {"A": 1.0, "B": 0.0}  # of the student


DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.9)  # share of the student's response


# Thresholds: shares of right answers.
WORSE = -0.1  # teacher from half of a response, minus teacher alone


SHRINKS = -0.1  # gain at the deepest cut minus gain at a quarter


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds (one pair each) and held-out sums."""

    seeds: Sequence[int] = (0, 1, 2)
    prompts: int = 200
    pair: PairSize | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Shares of right answers in one setting; lists hold one number per seed."""

    student: list[float]  # of the student's own responses
    continued: dict[float, list[float]]  # of the teacher's continuations, by depth
    right_to_wrong: list[float]  # share of prompts solved by the teacher alone but not from depth 0.5
    wrong_to_right: list[float]


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Sample responses of each pair's student, and the teacher's continuations at every depth."""
    size = size or Size()
    numbers = {name: measure(lab, size, temperature) for name, temperature in TEMPERATURES.items()}
    return Outcome(
        setup=(
            f"Two-digit addition, {len(size.seeds)} pairs of their own seeds, {size.prompts} held-out sums. The "
            "student after warm-up writes at temperature 1 (A) or greedily (B); the teacher continues greedily. "
            "Special tokens inside of a prefix are left out."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def judge(numbers: Mapping[str, Numbers]) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers of both settings."""
    return (
        finding(
            "A teacher that continues a student's prefix is worse than the teacher alone",
            "2605.11182 A.22",
            *(_distortion_checks(numbers[name]) for name in TEMPERATURES),
        ),
        finding(
            "The gain of the teacher's continuation over the student's own end shrinks with depth",
            "2604.13016 section 6.1",
            *(_gain_checks(numbers[name]) for name in TEMPERATURES),
        ),
    )


def _distortion_checks(numbers: Numbers) -> list[Check]:
    half, alone = numbers.continued[0.5], numbers.continued[0.0]
    what = "accuracy from half of the student's response minus alone"
    return [Check(what=what, interval=differences(half, alone), below=WORSE)]


def _gain_checks(numbers: Numbers) -> list[Check]:
    early, late = numbers.continued[0.25], numbers.continued[0.9]  # the student's own share cancels
    return [
        Check(what="gain at depth 0.25", interval=differences(early, numbers.student), above=0.0),
        Check(what="gain at depth 0.9 minus at 0.25", interval=differences(late, early), below=SHRINKS),
    ]


def measure(lab: Lab, size: Size, temperature: float) -> Numbers:
    """Measure all seeds and depths; the student samples at `temperature`."""
    numbers = Numbers(student=[], continued={d: [] for d in DEPTHS}, right_to_wrong=[], wrong_to_right=[])
    for seed in size.seeds:
        own, by_depth = outcomes(lab, seed, size, temperature)
        numbers.student.append(_share(own))
        for depth, right in by_depth.items():
            numbers.continued[depth].append(_share(right))
        changes = list(zip(by_depth[0.0], by_depth[0.5], strict=True))
        numbers.right_to_wrong.append(_share([alone and not half for alone, half in changes]))
        numbers.wrong_to_right.append(_share([half and not alone for alone, half in changes]))
    return numbers


def outcomes(lab: Lab, seed: int, size: Size, temperature: float) -> tuple[list[bool], dict[float, list[bool]]]:
    """Whether each prompt's answer was right: the student's own, and the teacher's by depth."""
    from opd.data.prompts import load_prompts
    from opd.models.loading import load_model
    from opd.recipe.schema import DataSection, ModelSpec
    from opd.rewards.registry import one_by_one
    from opd.samplers.hf import TransformersSampler
    from opd.types import Sampling

    pair = lab.pair(seed, size.pair)
    student = load_model(ModelSpec(path=str(pair.student)), name="student")
    teacher = load_model(ModelSpec(path=str(pair.teacher)), name="teacher")
    reward = one_by_one("final_number")
    prompts = load_prompts(DataSection(**sums(size.prompts, part="held_out")))
    settings = Sampling(max_completion_length=LONGEST, temperature=temperature)
    written = TransformersSampler(lm=student, sampling=settings)(prompts, seed=(seed, 0))
    greedy = TransformersSampler(lm=teacher, sampling=replace(settings, temperature=0.0))
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


def table(numbers: Mapping[str, Numbers]) -> tuple[tuple[str, ...], ...]:
    """Means over seeds by depth, and changes between alone and half; one column per setting."""
    lines: dict[str, list[list[float]]] = {
        "accuracy, student": [one.student for one in numbers.values()],
        **{f"accuracy, teacher from depth {d:g}": [one.continued[d] for one in numbers.values()] for d in DEPTHS},
        "right alone, wrong from depth 0.5": [one.right_to_wrong for one in numbers.values()],
        "wrong alone, right from depth 0.5": [one.wrong_to_right for one in numbers.values()],
    }
    rows: list[tuple[str, ...]] = [
        ("share of prompts", *(f"{name}: temperature {TEMPERATURES[name]:g}" for name in numbers))
    ]
    rows += [(what, *(short(over_seeds(values).mean) for values in columns)) for what, columns in lines.items()]
    return tuple(rows)


def draw(numbers: Mapping[str, Numbers]) -> report.Figure:
    """Accuracy by depth, with the student's own as a line; one panel per setting."""
    figure, axes = report.figure(len(numbers), width=3.6)
    for panel, (name, one) in zip(axes[0], numbers.items(), strict=True):
        intervals = [over_seeds(one.continued[depth]) for depth in DEPTHS]
        panel.errorbar(
            DEPTHS,
            [i.mean for i in intervals],
            yerr=[[i.mean - max(i.low, 0.0) for i in intervals], [min(i.high, 1.0) - i.mean for i in intervals]],
            fmt="o-",
            color=report.COLOURS[0],
            capsize=2,
            label="teacher continues (95 % interval)",
        )
        panel.axhline(over_seeds(one.student).mean, color=report.COLOURS[1], label="student's own end")
        panel.set(xlabel="depth of the cut, share of the student's response", ylim=(-0.05, 1.05))
        panel.set_title(f"{name}: student at temperature {TEMPERATURES[name]:g}")
    axes[0][0].set_ylabel("accuracy, share")
    axes[0][0].legend(fontsize=7)
    return figure


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)
