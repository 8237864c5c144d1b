"""Cold start: responses of the teacher first, then on-policy distillation, against either alone.

The base has seen a little of the task: it knows the digits, but cannot sort them. Two stages learn the teacher's
filtered responses to some prompts and then distil on policy on others (Li et al., arXiv 2604.13016 section 5.1: better
than on-policy distillation from the base, with a higher overlap and a smaller entropy gap; Zhu et al., arXiv 2605.11182
Fig. 14 and Table 3: stable, and teacher responses become more likely under the student, 0.640 to 0.335 nats per token).
All runs have the same total number of updates, also the control, the first stage alone. Setting A: the student's 4 most
likely tokens, as in 2604.13016 eq. 5. Setting B: the exact reverse KL; for the claim on the start of distillation, a
cold start of twice as many updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opd_studies.lab.after_training import look
from opd_studies.lab.distilling import Distillation, Trained, distil_all, held_out
from opd_studies.lab.lab import SORTERS, Lab, Pair, PairSize, optimizer
from opd_studies.page import report
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding, over_seeds, ranged, short

USE = (
    "Where the student starts near zero, try `sft` on the teacher's filtered responses first, and compare with "
    "as many updates of `sft` alone, which on-policy distillation after the cold start did not beat here. Whether "
    "the cold start beats on-policy distillation alone is undecided."
)


OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {"A": ("rethinking_opd", {"k": 4}), "B": ("reverse_kl", {})}


TOP = 4  # most likely tokens of each model that are compared, of a vocabulary of 17


MASSES = ("student mass on overlap", "teacher mass on overlap")


EVERY = 25  # updates between measurements


BASE, COLD, SFT, TEACHER = "base", "cold start", "SFT alone", "teacher"


# Thresholds; 0 is for "better", "higher" and "smaller".
LIKELIER = -0.1  # nats per token: NLL of teacher responses after the cold start minus before


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds (one pair each), updates of the cold start and of all, prompts per update, and learning rates."""

    seeds: Sequence[int] = (0, 1, 2)
    cold_steps: int = 75
    keep: str = "both"  # filter of the teacher's responses in the cold start; "all" if the teacher is never right
    steps: int = 150
    prompts_per_step: int = 64
    held_out: int = 300
    rates: Mapping[str, float] = field(default_factory=lambda: {"sft": 2e-3, "opd": 2e-3})
    pair: PairSize = field(default_factory=lambda: replace(SORTERS, student_steps=30))


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Lists hold one number per seed."""

    seen: dict[str, dict[str, list[float]]]  # by model, `after_training.look` on its own held-out responses
    teacher_nll: dict[str, list[float]]  # by model, nats per token of the teacher's held-out responses
    accuracy: dict[str, dict[int, list[float]]]  # by model, by updates in total
    overlap: dict[str, dict[int, list[float]]]  # the ratio on the step's responses, by model, by updates in total


def alone(setting: str) -> str:
    """The name of on-policy distillation from the base."""
    return f"{setting}: OPD alone"


def both(setting: str) -> str:
    """The name of the two stages."""
    return f"{setting}: two stages"


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Run both objectives, from the base and after a cold start, and the control."""
    size = size or Size()
    numbers = measure(lab, size)
    cold, rest = size.cold_steps, size.steps - size.cold_steps
    return Outcome(
        setup=(
            f"Five digits to put in order, {len(size.seeds)} pairs of their own seeds; the base after "
            f"{size.pair.student_steps} steps on {size.pair.student_rows} rows. {size.prompts_per_step} new prompts "
            f"per update. Two stages: {cold} updates on the teacher's responses that are right and end, {rest} on "
            f"policy on other prompts; OPD alone and SFT alone: {size.steps}. Learning rates {size.rates['sft']:g} for "
            f"responses and {size.rates['opd']:g} on policy, not tuned. A: the student's {TOP} likeliest tokens; B: "
            f"exact reverse KL. {size.held_out} held-out prompts, responses at temperature 1; overlap of the {TOP} "
            "likeliest tokens."
        ),
        findings=judge(numbers),
        figure=draw(numbers, cold),
        table=table(numbers),
    )


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""
    return (
        finding(
            "A cold start on filtered teacher responses and then OPD is better than OPD from the base, in as many "
            "updates",
            "2604.13016 section 5.1; 2605.11182 Fig. 14",
            *(_against_base(numbers, setting) for setting in OBJECTIVES),
        ),
        finding(
            "OPD adds to its cold start: both stages are better than as many updates on teacher responses alone",
            "control of 2604.13016 section 5.1 and 2605.11182 A.23",
            *(_against_sft(numbers, setting) for setting in OBJECTIVES),
        ),
        finding(
            "After a cold start OPD begins at a higher overlap ratio",
            "2604.13016 section 5.1, eq. 6",
            *(_higher_checks(numbers, name, ("overlap ratio",)) for name in (COLD, SFT)),
        ),
        finding(
            "After a cold start OPD begins with more of both models' mass on the overlap, and a smaller entropy gap",
            "2604.13016 section 5.1, eq. 8-10",
            *([*_higher_checks(numbers, name, MASSES), _gap_check(numbers, name)] for name in (COLD, SFT)),
        ),
        finding(
            "Teacher responses to other prompts become likelier under the student through the cold start",
            "2605.11182 Table 3",
            [
                Check(
                    what="NLL of teacher responses, nats a token, cold start minus base",
                    interval=differences(numbers.teacher_nll[COLD], numbers.teacher_nll[BASE]),
                    below=LIKELIER,
                )
            ],
        ),
    )


def _higher_checks(numbers: Numbers, name: str, columns: Sequence[str]) -> list[Check]:
    base, cold = numbers.seen[BASE], numbers.seen[name]
    return [
        Check(what=f"{what}, {name} minus base", interval=differences(cold[what], base[what]), above=0.0)
        for what in columns
    ]


def _gap_check(numbers: Numbers, name: str) -> Check:
    interval = differences(numbers.seen[name]["entropy gap"], numbers.seen[BASE]["entropy gap"])
    return Check(what=f"entropy gap, nats, {name} minus base", interval=interval, below=0.0)


def _against_base(numbers: Numbers, setting: str) -> list[Check]:
    two, one = both(setting), alone(setting)
    ours, theirs = numbers.accuracy[two], numbers.accuracy[one]
    shared = [updates for updates in ours if updates in theirs]  # after the cold start
    means = [
        [sum(of[updates][seed] for updates in shared) / len(shared) for seed in range(len(of[shared[0]]))]
        for of in (ours, theirs)
    ]
    return [
        Check(
            what="accuracy at the end, two stages minus OPD alone",
            interval=differences(numbers.seen[two]["accuracy"], numbers.seen[one]["accuracy"]),
            above=0.0,
        ),
        Check(what="mean over the second stage", interval=differences(*means), above=0.0),
    ]


def _against_sft(numbers: Numbers, setting: str) -> list[Check]:
    interval = differences(numbers.seen[both(setting)]["accuracy"], numbers.seen[SFT]["accuracy"])
    return [Check(what="accuracy at the end, two stages minus SFT alone", interval=interval, above=0.0)]


def measure(lab: Lab, size: Size) -> Numbers:
    """Train everything, and measure every model on held-out prompts."""
    pairs = dict(zip(size.seeds, lab.pairs(size.seeds, size.pair), strict=True))
    first: dict[tuple[str, int], Distillation] = {}
    for seed, pair in pairs.items():
        first[COLD, seed] = _sft(size, pair, seed, size.cold_steps)
        first[SFT, seed] = _sft(size, pair, seed, size.steps)
        for setting in OBJECTIVES:
            first[alone(setting), seed] = _opd(size, pair, seed, setting, 0)
    trained = dict(zip(first, distil_all(lab, list(first.values())), strict=True))
    second = {
        (both(setting), seed): _opd(
            size, replace(pair, student=trained[COLD, seed].model), seed, setting, size.cold_steps
        )
        for seed, pair in pairs.items()
        for setting in OBJECTIVES
    }
    trained |= zip(second, distil_all(lab, list(second.values())), strict=True)
    numbers = Numbers(seen={}, teacher_nll={}, accuracy={}, overlap={})
    for (name, _), one in trained.items():
        add_curves(numbers, name, one, size.cold_steps if name in map(both, OBJECTIVES) else 0)
    for seed, pair in pairs.items():
        lab.note(f"looking at seed {seed}")
        look_at(numbers, size, pair, {name: one for (name, s), one in trained.items() if s == seed}, seed)
    return numbers


def add_curves(numbers: Numbers, name: str, one: Trained, before: int) -> None:
    """Add a seed's accuracy and overlap by total updates, of which an earlier stage made `before`."""
    for row in one.evaluations:
        at = numbers.accuracy.setdefault(name, {}).setdefault(before + int(row["step"]), [])
        at.append(row["eval/sampled/reward"])
    for row in one.rows:
        if "compare/overlap_ratio" in row:  # of the responses before that update
            at = numbers.overlap.setdefault(name, {}).setdefault(before + int(row["step"]) - 1, [])
            at.append(row["compare/overlap_ratio"])


def look_at(numbers: Numbers, size: Size, pair: Pair, trained: Mapping[str, Trained], seed: int) -> None:
    """Add one seed's numbers of every model."""
    data = size.pair.task.rows(size.held_out, part="held_out")
    models = {BASE: pair.student, **{name: one.model for name, one in trained.items()}, TEACHER: pair.teacher}
    for name, model in models.items():
        seen = look(model, pair.teacher, size.pair.task, data, seed=seed, k=TOP)
        for what, value in seen.items():
            numbers.seen.setdefault(name, {}).setdefault(what, []).append(value)
        if name != TEACHER:
            taught = look(model, pair.teacher, size.pair.task, data, seed=seed, k=TOP, writer="teacher")
            numbers.teacher_nll.setdefault(name, []).append(taught["NLL"])


def _sft(size: Size, pair: Pair, seed: int, steps: int) -> Distillation:
    """SFT on the teacher's right and finished responses to the prompts of the first `steps` updates."""
    task = size.pair.task
    stage = {
        "data": _prompts(size) | {"limit": steps * size.prompts_per_step},
        "teacher_sampling": {"max_completion_length": task.longest},
        "reward": {"name": task.reward},
    }
    return _stage(size, pair, seed, "sft", {"source": "teacher", "keep": size.keep}, stage, steps)


def _opd(size: Size, pair: Pair, seed: int, setting: str, before: int) -> Distillation:
    """On-policy distillation on the prompts after those of `before` earlier updates."""
    method, options = OBJECTIVES[setting]
    stage = {
        "data": _prompts(size) | {"skip": before * size.prompts_per_step},
        "diagnostics": {"every": EVERY, "k": TOP},
    }
    return _stage(size, pair, seed, method, options, stage, size.steps - before)


def _prompts(size: Size) -> dict[str, Any]:
    return size.pair.task.rows(size.steps * size.prompts_per_step, seed=3)


def _stage(
    size: Size, pair: Pair, seed: int, method: str, options: Mapping[str, Any], stage: Mapping[str, Any], steps: int
) -> Distillation:
    task = size.pair.task
    sampling = {"sampled": {"temperature": 1, "max_completion_length": task.longest}}
    common = {
        "steps": steps,
        "prompts_per_step": size.prompts_per_step,
        "optimizer": optimizer(size.rates["sft" if method == "sft" else "opd"], 10),
        "evaluate": held_out(task, sampling=sampling, kl=False, every=EVERY),
    }
    return Distillation(pair=pair, seed=seed, method=method, task=task, options=options, stage={**common, **stage})


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """Means over seeds, the accuracy with its interval."""
    columns = ("overlap ratio", *MASSES, "entropy gap", "KL")
    rows: list[tuple[str, ...]] = [("model", "accuracy", *columns, "NLL of teacher responses")]
    for name, seen in numbers.seen.items():
        accuracy = over_seeds(seen["accuracy"])
        nll = numbers.teacher_nll.get(name)
        rows.append(
            (
                name,
                ranged(accuracy),
                *(short(over_seeds(seen[what]).mean) for what in columns),
                "" if nll is None else short(over_seeds(nll).mean),
            )
        )
    return tuple(rows)


def draw(numbers: Numbers, cold_steps: int) -> report.Figure:
    """Accuracy by updates in both settings; overlap while distilling; NLL of teacher responses under the student."""
    figure, axes = report.figure(4, width=3.0, height=3.0)
    *curves, overlap, nll = axes[0]
    begun = {cold_steps: numbers.accuracy[COLD][cold_steps]}
    for panel, setting in zip(curves, OBJECTIVES, strict=True):
        lines = ((alone(setting), {}, 1), (both(setting), begun, 0), (COLD, {}, 2), (SFT, {}, 5))
        for name, before, colour in lines:
            label = name.removeprefix(f"{setting}: ")
            _line(panel, before | numbers.accuracy[name], label, colour)
        panel.axvline(cold_steps, color="black", linestyle=":", linewidth=0.8)
        panel.set(xlabel="updates in total", ylabel="held-out accuracy, share", ylim=(-0.03, 1.03))
        panel.set_title({"A": f"A: student's top {TOP}", "B": "B: exact reverse KL"}[setting])
        panel.legend(fontsize=7, loc="upper left")
    for setting, dashes in zip(OBJECTIVES, ("-", "--"), strict=True):
        for name, colour in ((alone(setting), 1), (both(setting), 0)):
            _line(overlap, numbers.overlap[name], name, colour, linestyle=dashes)
    overlap.set(xlabel="updates in total", ylabel=f"overlap ratio, share of the top {TOP}")
    overlap.set_title("the student's responses in training")
    low, high = overlap.get_ylim()
    overlap.set_ylim(low, high + 0.3 * (high - low))  # room for the legend
    overlap.legend(fontsize=7, loc="upper left", ncols=2)
    models = (BASE, COLD, SFT)
    report.bars(nll, models, {"": [numbers.teacher_nll[name] for name in models]})
    nll.set(ylabel="NLL, nats a token", title="teacher's responses, held out")
    return figure


def _line(panel: Any, by_updates: Mapping[int, list[float]], label: str, colour: int, **more: Any) -> None:
    means = [sum(values) / len(values) for values in by_updates.values()]
    panel.plot(list(by_updates), means, color=report.COLOURS[colour], label=label, marker="o", markersize=3, **more)
