"""A reward for the direction, a self with a hint for the size: speed, and the sizes at other tokens.

"VISD", arXiv 2605.06094: a group-relative advantage of a response is made larger on tokens where a self that reads
feedback agrees with its sign; nearly twice as fast as reinforcement learning alone, and more accurate (abstract). The
paper's bounds let a token's advantage differ from its response's by 10 % at most. Controls that the paper does not
have: the log-ratios D_t given to other tokens of their response, so that only a response's mean size is left; a wide
bound (l = 1, b = 3), which few sizes reach; and rewards given to other responses of their group, so that all that is
learned comes from the sizes. If the reward gives the direction, that is little.

Tables in a made-up world (`opd_studies.worlds.wrong_habits`, `hinted_self`), and the library's `visd` and `grpo`. The
teacher is the moving average of the student, with a hint that adds to the logit of the right token; in setting B the
hint names a wrong token at 30 % of the positions. Each token counts for itself, and the reward is the share of right
ones: the reward of a response says little about a token, which is where sizes can help. In C, without a claim, a
policy has logits for each prefix, and only whole responses have a reward: a right response has no wrong token. The
support is the whole vocabulary, so D_t is the whole log-ratio. The paper's 1200 updates, with l > 0 in half of them,
are shortened to a tenth, and the memory of the moving average with them.

Every method has its own learning rate, by the mean accuracy over a training on seeds that are not reported; with
rewards of other responses it is that of the same method with its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd.method import Method
from opd.methods.grpo import grpo
from opd.methods.visd import visd
from opd_studies.lab.lab import Lab
from opd_studies.page import report
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding, over_seeds, ranged, short
from opd_studies.worlds.hinted_self import BONUS, HintedSelf
from opd_studies.worlds.methods import shuffled_visd, with_measured_size, with_shuffled_rewards
from opd_studies.worlds.wrong_habits import GROUP, LETTERS, PER_STEP, PROMPTS, Course, Kind, train

USE = (
    "With a reward and a hint, expect `visd` at its defaults to save some updates, not half of them. Raise `bound` "
    "only where hints are right: with some wrong ones a wide bound was slower than `grpo`, and what it learns comes "
    "from the hint."
)


GRPO, VISD, WIDE = "GRPO", "VISD", "VISD, wide"
OTHER_TOKENS = {name: f"{name}, sizes at other tokens" for name in (VISD, WIDE)}
OTHER_REWARDS = {name: f"{name}, rewards of other responses" for name in (VISD, WIDE)}


WIDE_OPTIONS = {"share": 1.0, "bound": 3.0}


LEVEL = 0.5  # the accuracy that updates are counted to


NEARLY_TWICE = 1.5  # nearer to twice as fast than to as fast


MOST = 0.5  # of what is learned


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A table, and the share of hinted tokens that are wrong."""

    kind: Kind
    wrong: float
    what: str


SETTINGS = {
    "A": Setting(kind=Kind(tokens=8, head_start=0.0, separate=True), wrong=0.0, what="right hints"),
    "B": Setting(kind=Kind(tokens=8, head_start=0.0, separate=True), wrong=0.3, what="30 % of hints wrong"),
    "C": Setting(kind=Kind(tokens=4, head_start=1.0), wrong=0.0, what="reward of whole responses"),
}
CLAIMED = ("A", "B")  # the settings that the claims are judged in


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds, updates, updates between two measurements, and the learning rates that are tried on the tuning seeds."""

    seeds: Sequence[int] = (1, 2, 3, 4, 5)
    tuning: Sequence[int] = (1000, 1001)
    steps: int = 120
    every: int = 2
    rates: Sequence[float] = (0.2, 0.3, 0.4, 0.6, 0.9)

    @property
    def fades(self) -> int:
        """Updates with l > 0: half of them, as in the paper."""
        return self.steps // 2

    @property
    def decay(self) -> float:
        """Of the moving average: over a twelfth of the updates, as .99 in the paper's 1200."""
        return 1.0 - 12.0 / self.steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """By setting, then by method: one course of accuracies by update and part, per seed; their metrics; the rate."""

    accuracy: dict[str, dict[str, list[dict[int, dict[str, float]]]]]
    sizes: dict[str, dict[str, list[list[dict[str, float]]]]]
    rates: dict[str, dict[str, float]]

    def end(self, setting: str, method: str) -> list[float]:
        """Accuracy after the last update."""
        return [course[max(course)]["all"] for course in self.accuracy[setting][method]]

    def updates(self, setting: str, method: str) -> list[float]:
        """Updates to an accuracy of `LEVEL`; NaN in a training that did not reach it."""
        return [updates_to(LEVEL, course) for course in self.accuracy[setting][method]]

    def speed(self, setting: str, method: str, than: str) -> list[float]:
        """Updates that `than` takes, as a multiple of those that `method` takes."""
        pairs = zip(self.updates(setting, than), self.updates(setting, method), strict=True)
        return [slow / fast for slow, fast in pairs]

    def learned(self, setting: str, method: str) -> list[float]:
        """The largest gain in the mean probability of a right token, over the measurements of a training."""
        return [
            max(exam["tokens"] for exam in course.values()) - course[0]["tokens"]
            for course in self.accuracy[setting][method]
        ]

    def size(self, setting: str, method: str, name: str) -> float:
        """Mean of a metric of sizes over the updates that have it, and over seeds; NaN for a method without sizes."""
        means = [[row[name] for row in rows if name in row] for rows in self.sizes[setting][method]]
        return sum(sum(one) / len(one) for one in means) / len(means) if all(means) else math.nan


def updates_to(level: float, course: Mapping[int, Mapping[str, float]]) -> float:
    """The update at which the accuracy first reaches a level, on a line between measurements; NaN if it does not."""
    before, last = 0, 0.0
    for update in sorted(course):
        reached = course[update]["all"]
        if reached >= level:
            return before + (update - before) * (level - last) / (reached - last)
        before, last = update, reached
    return math.nan


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Tune the learning rates, and run all methods in all settings."""
    size = size or Size()
    numbers = measure(lab, size)
    return Outcome(
        setup=(
            f"Tables, {len(size.seeds)} seeds: {PROMPTS} prompts with one right response each, over {LETTERS} letters. "
            f"{size.steps} updates of {PER_STEP} prompts with {GROUP} responses each, Adam; accuracy is the exact mass "
            f"of right responses. The teacher is the student's moving average (decay {size.decay:g}), with a hint that "
            f"adds {BONUS:g} to a logit; l falls to 0 in {size.fades} updates. A: {SETTINGS['A'].kind.tokens} tokens "
            f"that count one by one, the hint is right; B: at {SETTINGS['B'].wrong:.0%} of the positions it names a "
            f"wrong token; C, without a claim: {SETTINGS['C'].kind.tokens} tokens, and reward for a wholly right "
            f"response alone. Wide: l = {WIDE_OPTIONS['share']:g}, bound {WIDE_OPTIONS['bound']:g}. Learning rates of "
            f"{', '.join(f'{rate:g}' for rate in size.rates)}, by the mean accuracy over the trainings of seeds "
            f"{' and '.join(map(str, size.tuning))}; those of the table were chosen."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def methods(size: Size) -> dict[str, Callable[[], Method]]:
    """The methods by name, those with rewards of other responses last."""

    def sized(make: Callable[..., Method], **options: float) -> Callable[[], Method]:
        shared = {"fades": size.fades, "k": LETTERS, "decay": size.decay, "hint": "privileged_context"}
        return lambda: with_measured_size(make(**shared, **options))

    return {
        GRPO: grpo,
        VISD: sized(visd),
        OTHER_TOKENS[VISD]: sized(shuffled_visd),
        WIDE: sized(visd, **WIDE_OPTIONS),
        OTHER_TOKENS[WIDE]: sized(shuffled_visd, **WIDE_OPTIONS),
        OTHER_REWARDS[VISD]: sized(unrewarded),
        OTHER_REWARDS[WIDE]: sized(unrewarded, **WIDE_OPTIONS),
    }


def unrewarded(**options: Any) -> Method:
    """`visd` with the rewards of other responses."""
    return with_shuffled_rewards(visd(**options))


def measure(lab: Lab, size: Size) -> Numbers:
    """Tune the learning rates, run all courses, and collect their accuracies and metrics."""
    numbers = Numbers(accuracy={}, sizes={}, rates={})
    same = {other: name for name, other in OTHER_REWARDS.items()}
    for name, setting in SETTINGS.items():
        rates = numbers.rates[name] = dict[str, float]()
        trained: dict[str, list[Course]] = {}
        for method, made in methods(size).items():
            rates[method] = rates[same[method]] if method in same else _best_rate(made, setting, size)
            trained[method] = [_course(made, setting, seed, rates[method], size) for seed in size.seeds]
        numbers.accuracy[name] = {method: [one.exams for one in seeds] for method, seeds in trained.items()}
        numbers.sizes[name] = {method: [one.logged for one in seeds] for method, seeds in trained.items()}
        lab.note(f"setting {name} trained")
    return numbers


def _course(made: Callable[[], Method], setting: Setting, seed: int, rate: float, size: Size) -> Course:
    tutor = HintedSelf(wrong=setting.wrong, decay=size.decay)
    return train(made, setting.kind, seed, rate, steps=size.steps, every=size.every, tutor=tutor)


def _best_rate(made: Callable[[], Method], setting: Setting, size: Size) -> float:
    """The rate with the largest mean accuracy over the measurements of the tuning seeds."""

    def total(rate: float) -> float:
        courses = [_course(made, setting, seed, rate, size).exams for seed in size.tuning]
        return math.fsum(exam["all"] for course in courses for exam in course.values())

    return max(size.rates, key=total)


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""
    abstract, control = "2605.06094 abstract", "2605.06094 abstract (control)"
    ends = [
        Check(
            what="accuracy at the end, VISD minus GRPO",
            interval=differences(numbers.end(setting, VISD), numbers.end(setting, GRPO)),
            above=0.0,
        )
        for setting in CLAIMED
    ]
    return (
        finding("VISD with the paper's bounds is faster than GRPO", abstract, *_faster(numbers, VISD, GRPO, 1.0)),
        finding("It is nearly twice as fast", abstract, *_faster(numbers, VISD, GRPO, NEARLY_TWICE)),
        finding("It ends at a higher accuracy than GRPO", abstract, *([check] for check in ends)),
        finding(
            "It is faster than the same sizes at other tokens of their responses",
            control,
            *_faster(numbers, VISD, OTHER_TOKENS[VISD], 1.0),
        ),
        finding(
            "With a wide bound VISD is nearly twice as fast as GRPO",
            control,
            *_faster(numbers, WIDE, GRPO, NEARLY_TWICE),
        ),
        finding(
            "With a wide bound it is faster than the same sizes at other tokens of their responses",
            control,
            *_faster(numbers, WIDE, OTHER_TOKENS[WIDE], 1.0),
        ),
        finding(
            "The reward gives the direction: rewards of other responses teach less than half as much",
            control,
            *_directed(numbers, VISD),
        ),
        finding("The reward gives the direction with a wide bound too", control, *_directed(numbers, WIDE)),
    )


def _faster(numbers: Numbers, method: str, than: str, above: float) -> list[list[Check]]:
    """By claimed setting, a check of the ratio of updates."""
    what = f"updates to an accuracy of {LEVEL:g}, {than}, as a multiple of {method}"
    return [
        [Check(what=what, interval=over_seeds(numbers.speed(setting, method, than)), above=above)]
        for setting in CLAIMED
    ]


def _directed(numbers: Numbers, method: str) -> list[list[Check]]:
    """By claimed setting, a check of the gain that rewards of other responses leave."""
    other = OTHER_REWARDS[method]
    what = f"gain in right tokens, {other}, as a share of {method}"
    checks: list[list[Check]] = []
    for setting in CLAIMED:
        pairs = zip(numbers.learned(setting, other), numbers.learned(setting, method), strict=True)
        checks.append([Check(what=what, interval=over_seeds([a / b for a, b in pairs]), below=MOST)])
    return checks


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """One row per method and setting: means over seeds; those of sizes over the updates with l > 0, too."""
    rows: list[tuple[str, ...]] = [
        (
            "setting",
            "method",
            "learning rate",
            f"updates to {LEVEL:g}",
            "accuracy at the end",
            "gain in right tokens",
            "tokens at a bound",
            "mean of A_t / A_i - 1, without sign",
            "largest",
        )
    ]
    for setting, found in numbers.accuracy.items():
        for name in found:
            sizes = [numbers.size(setting, name, f"size/{one}") for one in ("clipped_share", "change")]
            largest = [
                row.get("size/largest_change", math.nan) for rows in numbers.sizes[setting][name] for row in rows
            ]
            rows.append(
                (
                    setting,
                    name,
                    f"{numbers.rates[setting][name]:g}",
                    _interval(numbers.updates(setting, name)),
                    _interval(numbers.end(setting, name)),
                    _interval(numbers.learned(setting, name)),
                    *map(_number, (*sizes, max((one for one in largest if not math.isnan(one)), default=math.nan))),
                )
            )
    return tuple(rows)


def _interval(values: Sequence[float]) -> str:
    if any(map(math.isnan, values)):
        return f"not reached on {sum(map(math.isnan, values))} of {len(values)} seeds"
    found = over_seeds(values)
    return ranged(found)


def _number(value: float) -> str:
    return "" if math.isnan(value) else short(value)


def draw(numbers: Numbers) -> report.Figure:
    """Accuracy by update, mean and range of seeds, one panel per setting."""
    figure, axes = report.figure(len(numbers.accuracy), width=3.6, height=3.0)
    for panel, (setting, courses) in zip(axes[0], numbers.accuracy.items(), strict=True):
        report.courses(panel, courses, "all")
        panel.set(xlabel="updates", title=f"{setting}: {SETTINGS[setting].what}", ylim=(0.0, 1.0))
    axes[0][0].set_ylabel("accuracy, share")
    axes[0][-1].legend(fontsize=6, loc="lower right")
    return figure
