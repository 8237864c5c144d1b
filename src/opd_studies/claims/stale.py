"""Responses of older weights: what forward KL, reverse KL and the sampled token lose, and whether weights p/m help.

"AsyncOPD: How Stale Can On-Policy Distillation Be?", arXiv 2606.24143. Read were the abstract and the released code
(furiosa-ai/async-opd, `opd/loss/kl.py`, `opd/loss/ppo.py` and its example recipes), not the paper's text. The abstract:
teacher-weighted forward KL is more robust to responses of older weights than student-weighted reverse KL, and for the
latter the methods of asynchronous reinforcement learning do not improve over computing the signal again with the
current student.

The formulas, their gradients and what is old in them are in `opd_studies.worlds.older_weights`. Three kinds of reverse
KL: computed with the step's student at the old prefixes, as this library does (exact); recorded, with the weights and
log-ratios of the student that wrote, and the released code's defaults in addition (p/m clipped at 0.2); and half of it,
the log-ratio computed and the weights recorded, which is what `opd` has without `importance`, and the released code
with `use_importance_sampling: false`. Its example of asynchronous training computes the log-ratio and weighs by p/m
without a bound: in the mean over draws that is the first kind. These are means over the vocabulary, without the noise
of drawing; the token that was drawn is compared with larger batches.

Setting A: responses of the weights one update before, as with `ahead: 1`. Setting B: eight updates before. Controls:
responses of the first weights throughout, without which robustness to old prefixes could mean that prefixes do not
matter; the recorded signal at a lower learning rate, with as many more updates; and the recorded signal less a
baseline, which has the same mean on policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from opd_studies.lab import ablation
from opd_studies.lab.ablation import START, Numbers
from opd_studies.lab.distilling import Distillation, Trained, distil_all, held_out
from opd_studies.lab.lab import SORTERS, Lab, Pair, PairSize
from opd_studies.page import comparison, report
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding

USE = (
    "With responses of older weights use a divergence, or `opd` with `importance: {level: token}`: without it `opd` "
    "collapsed one update late, at the rate that was best on policy. A signal recorded by older weights collapsed too, "
    "unless p/m was clipped, or at an eighth of the rate."
)

WORLD = "opd_studies.worlds.older_weights"
NEVER = None  # the lag of responses of the first weights throughout
LAGS = {"A": 1, "B": 8}
TUNING_SEED = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A method, its options, further fields of the stage, and the family whose learning rate it takes.

    `slower`: divides the rate, and multiplies the number of updates.
    """

    family: str
    method: str
    options: Mapping[str, Any]
    stage: Mapping[str, Any]
    slower: int = 1


def recorded(**options: Any) -> Arm:
    """A signal of the weights that wrote."""
    return Arm(family=REVERSE, method=f"{WORLD}:recorded_reverse_kl", options=options, stage={})


def sampled(**stage: Any) -> Arm:
    """The sampled token."""
    return Arm(family=SAMPLED, method="opd", options={}, stage=stage)


FORWARD, REVERSE, SAMPLED = "forward KL", "reverse KL, computed", "opd"
RECORDED, HALF, CENTRED = "reverse KL, recorded", "log-ratio computed", "recorded, baseline"
WEIGHED, CLIPPED = "recorded, weights p/m", "recorded, clipped p/m"
BY_TOKEN, BY_SEQUENCE = "opd, p/m of the token", "opd, p/m of the response"
HALF_RATE, EIGHTH = "recorded, rate / 2", "recorded, rate / 8"
REVERSE_EIGHTH = "reverse KL, computed, rate / 8"

ARMS = {
    FORWARD: Arm(family=FORWARD, method="gkd", options={"beta": 0.0}, stage={}),
    REVERSE: Arm(family=REVERSE, method="reverse_kl", options={}, stage={}),
    RECORDED: recorded(),
    CENTRED: recorded(centred=True),
    HALF: recorded(log_ratio="computed"),
    WEIGHED: recorded(ratio="token", cap=2.0),
    CLIPPED: recorded(ratio="clip", clip=0.2),
    SAMPLED: sampled(),
    BY_TOKEN: sampled(importance={"level": "token", "cap": 2.0}),
    BY_SEQUENCE: sampled(importance={"level": "sequence", "cap": 2.0}),
    HALF_RATE: replace(recorded(), slower=2),
    EIGHTH: replace(recorded(), slower=8),
    REVERSE_EIGHTH: Arm(family=REVERSE, method="reverse_kl", options={}, stage={}, slower=8),
}
FAMILIES = (FORWARD, REVERSE, SAMPLED)
EXACT = (FORWARD, REVERSE, RECORDED, CENTRED, HALF, WEIGHED, CLIPPED)
CORRECTED = (WEIGHED, CLIPPED)

# Thresholds: differences of the accuracy of sampled responses, by seed.
ROBUST = -0.1  # from lag 0 to a lag, as `comparison.COLLAPSE`
AS_GOOD = -0.05


def name_of(arm: str, lag: int | None) -> str:
    """The name of a setting."""
    return f"{arm}, {'first weights' if lag is NEVER else f'lag {lag}'}"


def settings() -> dict[str, tuple[str, int | None]]:
    """All settings of the reported seeds: the arm and its lag, by name."""
    pairs: list[tuple[str, int | None]] = [(arm, 0) for arm in FAMILIES]
    pairs += [(arm, lag) for lag in LAGS.values() for arm in EXACT]
    pairs += [(arm, LAGS["A"]) for arm in (SAMPLED, BY_TOKEN, BY_SEQUENCE, HALF_RATE, EIGHTH)]
    pairs += [(arm, NEVER) for arm in (FORWARD, REVERSE)] + [(REVERSE_EIGHTH, 0)]
    return {name_of(*one): one for one in pairs}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds (one pair each), updates, prompts per step, and learning rates to choose from."""

    seeds: Sequence[int] = (1, 2, 3, 4, 5)
    steps: int = 50
    prompts_per_step: int = 32
    prompts_of_sampled: int = 128
    rates: Sequence[float] = (1e-3, 2e-3, 4e-3)
    pair: PairSize = SORTERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Held-out numbers by setting, and the chosen learning rate of each family."""

    end: Numbers
    rates: Mapping[str, float]


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Tune the learning rates at lag 0, train all settings for all seeds; see the file's docstring."""
    size = size or Size()
    measured = measure(lab, size)
    rates = ", ".join(f"{family} {rate:g}" for family, rate in measured.rates.items())
    return Outcome(
        setup=(
            f"Sorting five digits, V = 17, {len(size.seeds)} pairs of their own seeds, {size.steps} updates of "
            f"{size.prompts_per_step} responses each, {size.prompts_of_sampled} for `opd`; Adam, 5 updates of warm-up, "
            "then a constant learning rate, as in the released code. Lag n: the responses of an update are of the "
            "weights n updates before, or of the first ones. A: lag 1, B: lag 8. p is the step's student, m the one "
            "that wrote, whose weights and log-ratios a recorded signal has (a mean over its whole vocabulary). The "
            "learning rate of forward KL, of "
            f"reverse KL and of `opd` by KL(student || teacher) at lag 0 on seed {TUNING_SEED}, out of "
            f"{', '.join(f'{rate:g}' for rate in size.rates)} ({rates}); the recorded signals have that of reverse KL. "
            "Rate / n: with n times as many updates. Caps are 2, the clip is 0.2. 200 held-out prompts; accuracy of "
            "responses sampled at temperature 1, KL(student || teacher) exact on them."
        ),
        findings=judge(measured.end),
        figure=draw(measured.end),
        table=comparison.table(measured.end, ("sampled accuracy", "KL", "length", "entropy", "gradient norm")),
    )


def distillation(
    pair: Pair, seed: int, arm: str, lag: int | None, rate: float, size: Size, before: bool
) -> Distillation:
    """One training. `before` also measures the student before it, and the teacher."""
    made, task = ARMS[arm], size.pair.task
    slower = made.slower
    sampling = {"sampled": {"temperature": 1, "max_completion_length": task.longest}}
    return Distillation(
        pair=pair,
        seed=seed,
        method=made.method,
        task=task,
        options=made.options,
        stage={
            "steps": size.steps * slower,
            "prompts_per_step": size.prompts_of_sampled if made.family == SAMPLED else size.prompts_per_step,
            "optimizer": {"learning_rate": rate / slower, "betas": [0.9, 0.99], "warmup_steps": 5 * slower},
            "sampler": f"{WORLD}:older_weights",
            "sampler_options": {"lag": lag, "records": made.method.startswith(WORLD)},
            "evaluate": held_out(task, sampling=sampling, before=before, teacher=before),
            **made.stage,
        },
    )


def measure(lab: Lab, size: Size) -> Measured:
    """Choose the rates, train all settings and collect their numbers."""
    seeds = (TUNING_SEED, *size.seeds)
    pairs = dict(zip(seeds, lab.pairs(seeds, size.pair), strict=True))

    def made(seed: int, arm: str, lag: int | None, rate: float, before: bool = False) -> Distillation:
        return distillation(pairs[seed], seed, arm, lag, rate, size, before)

    tried = [(family, rate) for family in FAMILIES for rate in size.rates]
    tuned = distil_all(lab, [made(TUNING_SEED, family, 0, rate) for family, rate in tried])
    divergence = dict(zip(tried, [one.after["eval/reverse_kl"] for one in tuned], strict=True))
    rates = {family: min(size.rates, key=lambda rate: divergence[family, rate]) for family in FAMILIES}
    lab.note(f"learning rates: {rates}")
    chosen = settings()
    first = next(iter(chosen))
    trained = distil_all(
        lab,
        [
            made(seed, arm, lag, rates[ARMS[arm].family], name == first)
            for seed in size.seeds
            for name, (arm, lag) in chosen.items()
        ],
    )
    by_name: dict[str, Sequence[Trained]] = {name: trained[i :: len(chosen)] for i, name in enumerate(chosen)}
    return Measured(end=ablation.collect(by_name), rates=rates)


def judge(end: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""
    return (*claims(end), *controls(end), *of_sampled(end))


def claims(end: Numbers) -> tuple[Finding, ...]:
    """The paper's, for means over the vocabulary."""

    def less_lost(lag: int) -> list[Check]:
        what = f"accuracy lost from lag 0 to {lag}, {RECORDED} minus {FORWARD}"
        return [Check(what=what, interval=differences(lost(end, RECORDED, lag), lost(end, FORWARD, lag)), above=0.0)]

    def no_lower(arm: str) -> list[list[Check]]:
        return in_both(lambda lag: not_below(end, arm, CORRECTED, lag))

    return (
        finding(
            "Forward KL is robust to responses of older weights",
            "2606.24143 abstract",
            *in_both(lambda lag: change(end, FORWARD, lag, above=ROBUST)),
        ),
        finding(
            "Reverse KL, weighed by the student that wrote, is not",
            "2606.24143 abstract",
            *in_both(lambda lag: change(end, RECORDED, lag, below=ROBUST)),
        ),
        finding("Forward KL loses less than it", "2606.24143 abstract", *in_both(less_lost)),
        finding(
            "Computed with the step's student, reverse KL is robust too",
            "2606.24143 abstract",
            *in_both(lambda lag: change(end, REVERSE, lag, above=ROBUST)),
        ),
        finding(
            "It is enough to compute the log-ratio with the step's student, still weighed by the one that wrote",
            "2606.24143 released code, without importance sampling",
            *in_both(lambda lag: change(end, HALF, lag, above=ROBUST)),
        ),
        finding(
            "Reverse KL computed with the step's student ends no lower than the recorded one with weights p/m",
            "2606.24143 abstract and released code",
            *no_lower(REVERSE),
        ),
        finding(
            "The log-ratio alone, computed with the step's student, ends no lower than they do",
            "2606.24143 abstract and released code",
            *no_lower(HALF),
        ),
    )


def controls(end: Numbers) -> tuple[Finding, ...]:
    """What could explain the claims away: a learning rate, a missing baseline, prefixes that do not matter."""
    return (
        finding(
            "It is not only in need of a lower learning rate: at a half and at an eighth of it, it falls below too",
            "2606.24143 abstract (control)",
            [check for arm in (HALF_RATE, EIGHTH) for check in change(end, arm, LAGS["A"], below=ROBUST)],
        ),
        finding(
            "At an eighth of the rate it still falls below reverse KL computed at that rate on policy",
            "2606.24143 abstract (control)",
            [comparison.gap(end, name_of(EIGHTH, LAGS["A"]), name_of(REVERSE_EIGHTH, 0), below=0.0)],
        ),
        finding(
            "It is not only in need of a baseline: with one, it falls below reverse KL too",
            "2606.24143 abstract (control)",
            *in_both(lambda lag: change(end, CENTRED, lag, below=ROBUST)),
        ),
        finding(
            "Prefixes matter here: with responses of the first weights throughout, both KLs end lower",
            "2606.24143 abstract (control)",
            [check for arm in (FORWARD, REVERSE) for check in change(end, arm, NEVER, below=0.0)],
        ),
    )


def of_sampled(end: Numbers) -> tuple[Finding, ...]:
    """The same for the token that was drawn."""
    return (
        finding(
            "The sampled token, its log-ratio computed with the step's student, bears responses one update older",
            "2606.24143 released code, without importance sampling",
            change(end, SAMPLED, LAGS["A"], above=ROBUST),
        ),
        finding(
            "Weights p/m do not improve it",
            "2606.24143 abstract",
            not_below(end, SAMPLED, (BY_TOKEN, BY_SEQUENCE), LAGS["A"]),
        ),
    )


def in_both(check: Callable[[int], list[Check]]) -> list[list[Check]]:
    """The checks of setting A and of setting B."""
    return [check(lag) for lag in LAGS.values()]


def lost(end: Numbers, arm: str, lag: int | None) -> list[float]:
    """Accuracy of the arm's family at lag 0 minus that of the arm at a lag, by seed."""
    fresh, late = (end[name]["sampled accuracy"] for name in (name_of(ARMS[arm].family, 0), name_of(arm, lag)))
    return [a - b for a, b in zip(fresh, late, strict=True)]


def change(end: Numbers, arm: str, lag: int | None, **side: float) -> list[Check]:
    """A check on the accuracy of an arm at a lag minus that of its family at lag 0."""
    return [comparison.gap(end, name_of(arm, lag), name_of(ARMS[arm].family, 0), "sampled accuracy", **side)]


def not_below(end: Numbers, first: str, others: Sequence[str], lag: int) -> list[Check]:
    """Checks: the first arm is about as accurate as each of the others, or more."""
    return [comparison.gap(end, name_of(first, lag), name_of(one, lag), above=AS_GOOD) for one in others]


def draw(end: Numbers) -> report.Figure:
    """Accuracy and KL by lag for the means over the vocabulary, and accuracies of the sampled token."""
    figure, axes = report.figure(3, width=3.3, height=3.4)
    lags = (0, *LAGS.values(), NEVER)
    labels = {"sampled accuracy": "accuracy, share", "KL": "KL(student || teacher), nats"}
    for panel, (what, label) in zip(axes[0][:2], labels.items(), strict=True):
        for place, (arm, colour) in enumerate(zip(EXACT, report.COLOURS, strict=True)):
            names = [name_of(ARMS[arm].family if lag == 0 else arm, lag) for lag in lags]
            at = [i for i, name in enumerate(names) if name in end]
            values = [end[names[i]][what] for i in at]
            panel.plot(at, [fmean(one) for one in values], color=colour, label=arm, marker="o", markersize=3)
            for x, one in zip(at, values, strict=True):
                panel.plot([x + 0.03 * (place - 3)] * len(one), one, ".", color=colour, markersize=2.5)
        panel.set_xticks(range(len(lags)), ["0", *map(str, LAGS.values()), "first\nweights"])
        panel.set(xlabel="lag, updates", ylabel=label)
    axes[0][0].set_ylim(-0.03, 1.05)
    axes[0][0].legend(fontsize=6.5, loc="upper right")
    axes[0][1].set_yscale("log")
    drawn = [name_of(arm, lag) for arm, lag in ((SAMPLED, 0), *((a, 1) for a in (SAMPLED, BY_TOKEN, BY_SEQUENCE)))]
    rows = {name: end[name] for name in (START, *drawn) if name in end}
    comparison.points(axes[0][2:], rows, {"sampled accuracy": "accuracy, share"})
    return figure
