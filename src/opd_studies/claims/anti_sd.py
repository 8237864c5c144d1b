"""Towards or away from the self that reads the solution, and the effect of the gate on its entropy.

Shen et al., arXiv 2605.11609. Table 1: on five models self-distillation from a solution-conditioned self ends below
GRPO, because it rewards the shortcut that the solution makes likely. Ascending the divergence instead (AntiSD) reaches
GRPO's accuracy in 2 to 10 times fewer steps and ends above it. Fig. 5: without the gate some models collapse after the
teacher's entropy has fallen.

The model is a table in a made-up world where thinking pays (`opd_studies.worlds.waiting_world`). The methods are the
library's: `anti_sd`, with and without its gate; `anti_sd` of strength 0, which equals GRPO; and the same with the sign
of self-distillation. Accuracy is exact, over all responses to held-out problems.

Setting A has two parameters per length of thought, setting B three in all, which couples early and late waits as a
network would. The paper trains everything at one learning rate. Here every method is also compared at the best of
several learning rates, chosen on a seed that is not reported. The sizes of both settings and their common learning
rates were chosen on unreported seeds, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opd.methods.anti_sd import anti_sd
from opd_studies.lab.lab import Lab
from opd_studies.page import report
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding, over_seeds, ranged, short
from opd_studies.worlds.methods import self_distillation
from opd_studies.worlds.waiting_world import ANSWERS, GROUP, HELD_OUT, KNOWLEDGE, LONGEST, PROBLEMS, Course, Made, train

USE = (
    "If you have a reward, do not imitate the self that reads the solution. `anti_sd` beats `grpo` at one "
    "small learning rate; tune `grpo`'s rate before you compare. A benefit of the gate did not show."
)


GRPO, TOWARDS, AWAY, UNGATED = "GRPO", "self-distillation", "AntiSD", "AntiSD, no gate"


METHODS: dict[str, Made] = {
    GRPO: lambda: anti_sd(0.0, gate=False),  # the teacher's entropy is still measured
    TOWARDS: self_distillation,
    AWAY: anti_sd,
    UNGATED: lambda: anti_sd(gate=False),
}


A, TUNED, B = "A", "A, best rates", "B"


TUNING_SEED = 1000


# Thresholds.
CLOSES_BELOW = 0.93  # of the teacher's entropy in the warm-up: the paper's threshold


LAST = 10  # updates for the teacher's final entropy


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds, updates, and learning rates: of A, of B, and candidates for each method's best."""

    seeds: Sequence[int] = (1, 2, 3, 4, 5)
    steps: int = 160
    every: int = 10
    rates: Mapping[str, float]
    tried: Sequence[float]


SIZE = Size(rates={A: 0.03, B: 0.1}, tried=(0.05, 0.1, 0.2, 0.4))


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Numbers by setting, then by method; lists hold one number, or course, per seed."""

    accuracy: dict[str, dict[str, list[dict[int, float]]]]  # share, held out, by update
    length: dict[str, dict[str, list[float]]]  # tokens, held out, at the end
    entropy: dict[str, dict[str, list[float]]]  # of the teacher at the end, over that of the warm-up
    rate: dict[str, dict[str, float]]

    def end(self, setting: str, method: str) -> list[float]:
        """Accuracy after the last update."""
        return [one[max(one)] for one in self.accuracy[setting][method]]

    def share_of_updates(self, setting: str, method: str) -> list[float]:
        """Updates until GRPO's final accuracy, over those of GRPO itself; infinite if never reached."""
        pairs = zip(self.accuracy[setting][GRPO], self.accuracy[setting][method], strict=True)
        return [first_at(other, base[max(base)]) / first_at(base, base[max(base)]) for base, other in pairs]


def first_at(curve: Mapping[int, float], level: float) -> float:
    """The first update at which the accuracy is at least `level`; infinite if there is none."""
    return min((float(update) for update, accuracy in curve.items() if accuracy >= level), default=float("inf"))


def run(lab: Lab, size: Size = SIZE) -> Outcome:
    """Run both settings, and the best rates; see the file's docstring."""
    numbers = measure(lab, size)
    best = ", ".join(f"{name} {rate:g}" for name, rate in numbers.rate[TUNED].items())
    return Outcome(
        setup=(
            f"A table that waits or gives one of {ANSWERS} answers, at most {LONGEST} tokens; the solution adds "
            f"{KNOWLEDGE:g} to the logit of the right one. {len(size.seeds)} seeds, {size.steps} updates of "
            f"{PROBLEMS} new problems with {GROUP} responses each, Adam; accuracy exact on {HELD_OUT} held-out "
            f"problems. A: separate numbers for every length of thought, learning rate {size.rates[A]:g} for all, "
            f"and the best of {', '.join(f'{rate:g}' for rate in size.tried)} on seed {TUNING_SEED} ({best}). B: three "
            f"numbers in all, rate {size.rates[B]:g}. The warm-up, at strength 0, has 5 updates."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def measure(lab: Lab, size: Size) -> Numbers:
    """Run all courses and collect their numbers."""
    numbers = Numbers(accuracy={}, length={}, entropy={}, rate={})
    tuning = {(name, rate): _course(name, TUNING_SEED, rate, A, size) for name in METHODS for rate in size.tried}
    lab.note("learning rates found")
    ends = {key: one.exams[size.steps].accuracy for key, one in tuning.items()}
    best = {name: max(size.tried, key=lambda rate: ends[name, rate]) for name in METHODS}
    for setting in (A, TUNED, B):
        rates = best if setting == TUNED else dict.fromkeys(METHODS, size.rates[setting])
        courses = {name: [_course(name, seed, rates[name], setting, size) for seed in size.seeds] for name in METHODS}
        lab.note(f"setting {setting} trained")
        numbers.rate[setting] = rates
        numbers.accuracy[setting] = {
            name: [{update: exam.accuracy for update, exam in one.exams.items()} for one in ones]
            for name, ones in courses.items()
        }
        numbers.length[setting] = {
            name: [one.exams[size.steps].length for one in ones] for name, ones in courses.items()
        }
        numbers.entropy[setting] = {name: [entropy_left(one) for one in ones] for name, ones in courses.items()}
    return numbers


def _course(name: str, seed: int, rate: float, setting: str, size: Size) -> Course:
    return train(METHODS[name], seed, rate, shared=setting == B, steps=size.steps, every=size.every)


def entropy_left(course: Course) -> float:
    """The teacher's median entropy over the last updates, over that of the warm-up."""
    last = [row["gate/teacher_entropy"] for row in course.logged[-LAST:]]
    return sum(last) / len(last) / course.logged[-1]["gate/warm_entropy"]


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""

    def below(setting: str) -> Check:
        interval = differences(numbers.end(setting, TOWARDS), numbers.end(setting, GRPO))
        return Check(what=f"accuracy at the end, {TOWARDS} minus {GRPO}", interval=interval, below=0.0)

    def faster(setting: str) -> list[Check]:
        """Fewer updates, and a higher end."""
        shares = numbers.share_of_updates(setting, AWAY)
        return [
            Check(what=f"updates to GRPO's last accuracy, {AWAY} over {GRPO}", interval=over_seeds(shares), below=1.0),
            Check(
                what=f"accuracy at the end, {AWAY} minus {GRPO}",
                interval=differences(numbers.end(setting, AWAY), numbers.end(setting, GRPO)),
                above=0.0,
            ),
        ]

    def gate(setting: str) -> list[Check]:
        """The teacher's entropy without the gate, and the accuracy with it against without."""
        return [
            Check(
                what="teacher's entropy at the end over that of the warm-up, no gate",
                interval=over_seeds(numbers.entropy[setting][UNGATED]),
                below=CLOSES_BELOW,
            ),
            Check(
                what="accuracy at the end, with gate minus without",
                interval=differences(numbers.end(setting, AWAY), numbers.end(setting, UNGATED)),
                above=0.0,
            ),
        ]

    return (
        finding(
            "Self-distillation from the self that has read the solution ends below the reward alone, at one learning "
            "rate and at the best ones",
            "2605.11609 Table 1",
            [below(A), below(TUNED)],
            [below(B)],
        ),
        finding(
            "At one small learning rate, AntiSD reaches GRPO's accuracy in fewer updates and ends above it",
            "2605.11609 Table 1",
            faster(A),
            faster(B),
        ),
        finding(
            "So it does when every method has its best learning rate", "2605.11609 Table 1 (control)", faster(TUNED)
        ),
        finding(
            "Without the gate the teacher's entropy falls through the threshold, and accuracy ends lower than with it",
            "2605.11609 Fig. 5",
            gate(A),
            gate(B),
        ),
    )


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """One row per method and setting: means over seeds."""
    rows: list[tuple[str, ...]] = [
        ("setting", "method", "learning rate", "accuracy at the end", "tokens", "teacher's entropy / warm-up")
    ]
    for setting, methods in numbers.accuracy.items():
        for name in methods:
            end = over_seeds(numbers.end(setting, name))
            rows.append(
                (
                    setting,
                    name,
                    f"{numbers.rate[setting][name]:g}",
                    ranged(end),
                    short(over_seeds(numbers.length[setting][name]).mean),
                    short(over_seeds(numbers.entropy[setting][name]).mean),
                )
            )
    return tuple(rows)


def draw(numbers: Numbers) -> report.Figure:
    """Accuracy by update, mean and range of seeds, one panel per setting."""
    figure, axes = report.figure(len(numbers.accuracy), width=3.2, height=3.0)
    titles = {
        A: "A: numbers for each length of thought",
        TUNED: "A, every method at its best rate",
        B: "B: three numbers in all",
    }
    for panel, (setting, methods) in zip(axes[0], numbers.accuracy.items(), strict=True):
        for (name, curves), colour in zip(methods.items(), report.COLOURS, strict=False):
            updates = sorted(curves[0])
            by_update = [[one[update] for one in curves] for update in updates]
            panel.plot(updates, [sum(v) / len(v) for v in by_update], color=colour, label=name)
            panel.fill_between(
                updates, [min(v) for v in by_update], [max(v) for v in by_update], color=colour, alpha=0.15
            )
        panel.set(xlabel="updates", title=titles[setting], ylim=(0.15, 0.85))
    axes[0][0].set_ylabel("held-out accuracy, share")
    axes[0][0].legend(fontsize=7, loc="upper left")
    return figure
