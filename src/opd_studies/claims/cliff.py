"""Beyond the teacher: does the format improve up to lambda*, and break right after it?

The Extrapolation Cliff, arXiv 2605.08737: with the weight min(c, q/p), a lambda above 1 makes a student's format
stricter than its teacher's, until a limit in closed form, lambda*(p, b, c), beyond which it breaks.

A student copies five ids into a JSON list; its separators are sloppy, its teacher's hardly. Measured: the share of
held-out responses that parse. Controls: a quarter of the step size with four times the updates; no weight, with the
sampled token and with the whole vocabulary; lambda* from p and b at the wrong positions, those of the ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from opd_studies.lab.beyond_teacher import EVERY_END, Setting, Size, limit, masses, parse_shares
from opd_studies.lab.lab import Lab
from opd_studies.page import report
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding, over_seeds, short

USE = (
    "Compare `clip: none` first: with the weight min(c, q/p) single runs lost the format altogether, at scattered "
    "lambdas that lambda* did not predict; without it none did. No lambda up to 2.5 was clearly better than 1."
)


GRID = {
    1.5: (1.0, 1.25, 1.5, 2.0, 2.5),
    5.0: (1.0, 1.25, 1.5, 1.75, 2.0, 2.5),
    20.0: (1.0, 1.25, 1.5, 2.0, 2.5),
}  # by c


PLAIN, FAR, MIDDLE = 1.0, 2.5, 1.5


SLOWER = 4


def named(strength: float, bound: float) -> str:
    """A setting with the weight."""
    return f"c {bound:g}, lambda {strength:g}"


SETTINGS = {
    **{named(s, c): Setting(strength=s, bound=c) for c, grid in GRID.items() for s in grid},
    **{f"no weight, lambda {s:g}": Setting(strength=s, weight="none") for s in (PLAIN, MIDDLE, 2.0, FAR)},
    **{f"whole vocabulary, lambda {s:g}": Setting(strength=s, weight="whole vocabulary") for s in (MIDDLE, FAR)},
    **{f"small steps, c 5, lambda {s:g}": Setting(strength=s, slower=SLOWER) for s in (MIDDLE, FAR)},
}


Where: TypeAlias = Literal["structure", "ids"]


CITED = "2605.08737 results"


# Thresholds, shares of responses that parse.
BREAKS = -0.2


HELPS = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Lists hold one number per seed."""

    parse: dict[str, list[float]]  # by setting
    start: dict[str, list[float]]  # of the student before, and of the teacher
    structure: list[tuple[float, float]]  # p and b of the class with the least lambda*
    content: list[tuple[float, float]]  # p and b at the ids

    def limits(self, bound: float, where: Where = "structure") -> list[float]:
        """lambda* by seed."""
        return [limit(p, b, bound) for p, b in (self.structure if where == "structure" else self.content)]

    def beside(self, bound: float) -> tuple[list[float], list[float]]:
        """The shares at the largest lambda of the grid up to lambda*, and at the next one, by seed."""
        below: list[float] = []
        above: list[float] = []
        for seed, star in enumerate(self.limits(bound)):
            place = sum(s <= star for s in GRID[bound]) - 1
            below.append(self.parse[named(GRID[bound][place], bound)][seed])
            above.append(self.parse[named(GRID[bound][min(place + 1, len(GRID[bound]) - 1)], bound)][seed])
        return below, above

    def onsets(self, bound: float) -> list[float]:
        """The least lambda of the grid with a share `BREAKS` below that at lambda 1, by seed."""
        grid = GRID[bound]
        plain = self.parse[named(PLAIN, bound)]
        return [
            next((s for s in grid if self.parse[named(s, bound)][seed] - plain[seed] < BREAKS), EVERY_END)
            for seed in range(len(plain))
        ]


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Train all settings for all seeds; see the file's docstring."""
    size = size or Size()
    numbers = measure(lab, size)
    stars = ", ".join(f"c {c:g}: {short(over_seeds(numbers.limits(c)).mean)}" for c in GRID)
    p, b = ([one[i] for one in numbers.structure] for i in (0, 1))
    return Outcome(
        setup=(
            f"Copying five digits into a JSON list, {len(size.seeds)} pairs of their own seeds, two models of one "
            f"shape trained on examples in which {size.teacher_sloppy:.0%} (teacher) and {size.student_sloppy:.0%} "
            f"(student, also the base) of the separators do not parse. {size.steps} updates of "
            f"{size.prompts_per_step} responses, learning rate {size.learning_rate:g}; 200 held-out prompts, sampled "
            f"at temperature 1. Mean p {short(over_seeds(p).mean)} and b {short(over_seeds(b).mean)} of the class with "
            f"the least lambda*; mean lambda* at {stars}. A: c = 5; B: another c, named in the check."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def measure(lab: Lab, size: Size) -> Numbers:
    """Train, and measure p and b of each pair."""
    pairs = size.pairs(lab)
    parse, start = parse_shares(lab, SETTINGS, pairs, size)
    found = [masses(pair, seed, size) for seed, pair in zip(size.seeds, pairs, strict=True)]
    return Numbers(
        parse=parse,
        start=start,
        structure=[one["structure"] for one in found],
        content=[one["content"] for one in found],
    )


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""
    return (*_on_claims(numbers), *_on_controls(numbers))


def _on_claims(numbers: Numbers) -> list[Finding]:
    parse = numbers.parse

    def helps(bound: float) -> list[Check]:
        interval = differences(numbers.beside(bound)[0], parse[named(PLAIN, bound)])
        what = f"parse share, last lambda up to lambda* minus lambda 1, c {bound:g}"
        return [Check(what=what, interval=interval, above=HELPS)]

    def breaks(bound: float) -> list[Check]:
        below, above = numbers.beside(bound)
        what = f"parse share, next lambda of the grid minus the last up to lambda*, c {bound:g}"
        return [Check(what=what, interval=differences(above, below), below=BREAKS)]

    def far(bound: float) -> list[Check]:
        interval = differences(parse[named(FAR, bound)], parse[named(PLAIN, bound)])
        return [Check(what=f"parse share, lambda {FAR:g} minus 1, c {bound:g}", interval=interval, below=BREAKS)]

    moved = differences(numbers.onsets(20.0), numbers.onsets(1.5))
    return [
        finding("Up to lambda* the format is stricter than that of plain distillation", CITED, helps(5.0), helps(20.0)),
        finding("At the next lambda beyond lambda* the format breaks", f"{CITED}, onset", breaks(5.0), breaks(1.5)),
        finding("Far beyond lambda* the format breaks", CITED, far(5.0), far(20.0)),
        finding(
            "A larger bound moves the cliff to a larger lambda",
            f"{CITED}, cross-prediction by c",
            [Check(what="lambda of the onset, c 20 minus c 1.5", interval=moved, above=0.0)],
        ),
    ]


def _on_controls(numbers: Numbers) -> list[Finding]:
    def gap(first: str, second: str, **side: float) -> Check:
        interval = differences(numbers.parse[first], numbers.parse[second])
        return Check(what=f"parse share, {first} minus {second}", interval=interval, **side)

    def miss(where: Where) -> list[float]:
        """The distance of onset and lambda*, by seed, mean over c."""
        each = [[abs(a - b) for a, b in zip(numbers.onsets(c), numbers.limits(c, where), strict=True)] for c in GRID]
        return [sum(one) / len(each) for one in zip(*each, strict=True)]

    return [
        finding(
            "The cliff does not come from the step size: with a quarter of it, it is still there",
            f"{CITED}; control",
            [gap(f"small steps, c 5, lambda {FAR:g}", f"small steps, c 5, lambda {MIDDLE:g}", below=BREAKS)],
        ),
        finding(
            "The cliff comes from the weight: without it nothing breaks, sampled or on the whole vocabulary",
            f"{CITED}; control",
            [
                gap(f"no weight, lambda {FAR:g}", f"no weight, lambda {PLAIN:g}", above=BREAKS),
                gap(f"whole vocabulary, lambda {FAR:g}", f"whole vocabulary, lambda {MIDDLE:g}", above=BREAKS),
            ],
        ),
        finding(
            "p and b at structural positions predict the onset better than those at the ids",
            f"{CITED}; control",
            [
                Check(
                    what="distance of onset and lambda*, structure minus ids",
                    interval=differences(miss("structure"), miss("ids")),
                    below=0.0,
                )
            ],
        ),
    ]


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """Parse shares by setting, then onsets and limits by c."""
    rows: list[tuple[str, ...]] = [("setting", "parses", "least", "most")]
    for name, values in {**numbers.start, **numbers.parse}.items():
        rows.append((name, str(over_seeds(values)), short(min(values)), short(max(values))))
    kinds: dict[str, Sequence[float]] = {}
    for bound in GRID:
        kinds[f"lambda of the onset, c {bound:g} ({EVERY_END:g}: none)"] = numbers.onsets(bound)
        kinds[f"lambda*, c {bound:g}, structure"] = numbers.limits(bound)
        kinds[f"lambda*, c {bound:g}, ids (at most {EVERY_END:g})"] = numbers.limits(bound, "ids")
    rows += [(name, str(over_seeds(v)), short(min(v)), short(max(v))) for name, v in kinds.items()]
    return tuple(rows)


def draw(numbers: Numbers) -> report.Figure:
    """Parse share by lambda: mean and range of the seeds, by c; dotted: the mean lambda*. Right: the controls."""
    figure, axes = report.figure(2, width=4.6, height=3.4)
    left, right = axes[0]

    def curve(panel: object, names: Sequence[str], colour: str, label: str) -> None:
        at = [SETTINGS[name].strength for name in names]
        values = [numbers.parse[name] for name in names]
        panel.plot(at, [sum(v) / len(v) for v in values], "o-", color=colour, markersize=3, label=label)  # type: ignore[attr-defined]
        panel.fill_between(at, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15)  # type: ignore[attr-defined]

    for (bound, grid), colour in zip(GRID.items(), report.COLOURS, strict=False):
        curve(left, [named(s, bound) for s in grid], colour, f"c = {bound:g}")
        left.axvline(over_seeds(numbers.limits(bound)).mean, color=colour, linestyle=":", linewidth=1)
    left.set(xlabel="lambda", ylabel="responses that parse, share", title="weight min(c, q/p); dotted: lambda*")
    for kind, colour in zip(("no weight", "whole vocabulary", "small steps"), report.COLOURS[3:], strict=False):
        curve(right, [name for name in SETTINGS if name.startswith(kind)], colour, kind)
    right.set(xlabel="lambda", title="controls")
    for panel in (left, right):
        panel.set(ylim=(-0.02, 1.02))
        panel.legend(fontsize=7)
    return figure
