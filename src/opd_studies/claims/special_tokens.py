"""A template marker with different tokens for student and teacher: its share of the signal, and masking it.

Fu et al., arXiv 2603.25562 section 4.3 and Table 1. '<think>' is '<', 'think', '>' for the student and '<th', 'ink',
'>' for the teacher: on its own spelling the student is sure (-0.07 nats), the teacher has -19.16. With the mask the
sampled token gains (36.4 -> 40.7 points), local support matching does not (41.7 -> 41.5).

Here both spellings are three tokens (`boundaries`). The reward ignores them; the teacher has read the student's
spelling but never writes it. Setting A: a student that saw few examples. Setting B: one that saw more and is surer of
its marker. Control: A with a student of the teacher's spelling, for which a mask should not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opd_studies.lab import ablation
from opd_studies.lab.ablation import START, Numbers
from opd_studies.lab.distilling import Distillation, Trained, distil_all, held_out
from opd_studies.lab.lab import SORTERS, Lab, Pair, PairSize, Task, optimizer, student_recipe, teacher_recipe
from opd_studies.lab.signal_shares import of_markers
from opd_studies.page import comparison, report
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding, over_seeds
from opd_studies.worlds.boundaries import CHARACTERS, SPELLINGS

USE = (
    "Let `opd doctor` look for markers that both templates write differently, and mask them with `mask_tokens`, "
    "for the sampled token and for top-k matching alike: without a mask both lost most of their accuracy."
)


K = 8  # of local support matching, of 18 tokens


TOP_P = 0.9  # of its rollouts, as in the paper; the sampled token has 1


LEARNING_RATE = 5e-4  # at four times this rate a student can adopt the teacher's spelling within a run


LSM = "local support matching"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A case: the student's spelling of the marker, its examples, and its runs (by loss, then mask)."""

    spelling: str
    runs: Mapping[str, Sequence[str]]
    student_rows: int = 256
    student_steps: int = 150

    @property
    def task(self) -> Task:
        """The student's task, which also gives the prompts of all runs."""
        return Task(
            data="opd_studies.worlds.boundaries:marked",
            reward="opd_studies.worlds.boundaries:beside_markers",
            longest=12,
            options={"marker": SPELLINGS[self.spelling], "times": 1},
            characters=CHARACTERS,
        )

    def pair(self, size: PairSize) -> tuple[PairSize, PairSize]:
        """Sizes of teacher and student. The teacher has read the other spelling in all cases."""
        reads = {"marker": SPELLINGS["teacher"], "read": SPELLINGS["student"], "times": 1}
        learns = replace(size, task=self.task, student_rows=self.student_rows, student_steps=self.student_steps)
        return replace(size, task=replace(self.task, options=reads)), learns


ALL = {"sampled token": ("none", "first", "every"), LSM: ("none", "first")}


CASES = {
    "A": Case(spelling="student", runs=ALL),
    "B": Case(spelling="student", runs=ALL, student_rows=600, student_steps=200),
    "control": Case(spelling="teacher", runs={"sampled token": ("none", "first")}),
}


METHODS: dict[str, tuple[str, dict[str, Any], float]] = {  # method, options, top-p of rollouts
    "sampled token": ("opd", {}, 1.0),
    LSM: ("local_support_matching", {"k": K}, TOP_P),
}


# The rules. Shares of right answers, log-probs in nats.
SURE, STRANGE = -0.5, -5.0  # log-prob of the marker's first token: student, teacher


DOMINATED = 0.5  # share of the signal


BETTER = 0.0


HARDLY = 0.1


SAME = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds (one pair each per case), updates, prompts per step, and how the pairs learn."""

    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 100
    prompts_per_step: int = 64
    pair: PairSize = SORTERS


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Run the cases' pairs: their initial signal, and all runs."""
    size = size or Size()
    numbers = measure(lab, size)
    return Outcome(
        setup=(
            f"Sorting of five digits, {len(size.seeds)} pairs of their own seeds for each case, {size.steps} updates "
            f"of {size.prompts_per_step} responses each; {LSM} with K = {K} of 18 tokens and top-p {TOP_P}. A mask "
            "has each of the marker's tokens separately. Accuracy of the digits on 200 held-out prompts at temperature "
            f"1, whatever the markers. A: students of {CASES['A'].student_rows} examples; B: of "
            f"{CASES['B'].student_rows}; control: A, equal spelling. Two markers, the second within the answer, were "
            "tried first as B: the sampled token then reached at most 0.005 with any mask, and with every occurrence "
            "masked one student wrote only markers, which stopped its run."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=comparison.table(numbers, ("sampled accuracy", "own marker", "log p", "log q", *SHARES)),
    )


# Initial shares of tokens, of |log-ratio|, and of the gradient on markers.
SHARES = {
    "share of tokens": "tokens",
    "share of log-ratio": "|log-ratio|",
    "share of gradient": "gradient,\nsampled\ntoken",
    f"share of gradient, {LSM}": "gradient,\nLSM",
}


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""

    def accuracy(name: str) -> list[float]:
        return numbers[name]["sampled accuracy"]

    def gain(case: str, mask: str, loss: str = "sampled token", **sides: float) -> Check:
        with_mask, without = accuracy(f"{case}: {loss}, mask {mask}"), accuracy(f"{case}: {loss}, mask none")
        what = f"accuracy of {loss}, mask {mask} minus none"
        return Check(what=what, interval=differences(with_mask, without), **sides)

    def every(case: str) -> list[Check]:
        values = (accuracy(f"{case}: sampled token, mask {mask}") for mask in ("every", "first"))
        what = "accuracy of sampled token, mask every minus first"
        return [Check(what=what, interval=differences(*values), above=-SAME, below=SAME)]

    gains = [accuracy(f"A: sampled token, mask {mask}") for mask in ("first", "none")]
    alike = [accuracy(f"control: sampled token, mask {mask}") for mask in ("first", "none")]
    per_seed = [[a - b for a, b in zip(*pair, strict=True)] for pair in (gains, alike)]
    return (
        finding(
            "On its own spelling of a marker the student is sure, and the teacher all but excludes it",
            "2603.25562 section 4.3",
            begins(numbers, "A"),
            begins(numbers, "B"),
        ),
        finding(
            "These few tokens dominate the one-token signal",
            "2603.25562 section 4.3",
            dominated(numbers, "A"),
            dominated(numbers, "B"),
        ),
        finding(
            "Masking the marker helps the sampled token, and does so because of the mismatch",
            "2603.25562 Table 1",
            [
                gain("A", "first", above=BETTER),
                Check(what="this gain minus the control's", interval=differences(*per_seed), above=BETTER),
            ],
            [gain("B", "first", above=BETTER)],
        ),
        finding(
            "The mask hardly changes local support matching",
            "2603.25562 Table 1",
            [gain("A", "first", LSM, above=-HARDLY, below=HARDLY)],
            [gain("B", "first", LSM, above=-HARDLY, below=HARDLY)],
        ),
        finding(
            "Without a mask local support matching is ahead of the sampled token, with it the lead shrinks",
            "2603.25562 Table 1",
            closes(numbers, "A", "first"),
            closes(numbers, "B", "first"),
        ),
        finding(
            "The marker occurs once, so it does not matter whether its first or every occurrence is masked",
            "2603.25562 section 4.3 and code",
            every("A"),
            every("B"),
        ),
    )


def begins(numbers: Numbers, case: str) -> list[Check]:
    """Checks: log-probs of the student's spelling under student and teacher."""
    of = numbers[f"{case}: {START}"]
    return [
        Check(what="log p of a marker's first token, nats", interval=over_seeds(of["log p"]), above=SURE),
        Check(what="log q", interval=over_seeds(of["log q"]), below=STRANGE),
    ]


def dominated(numbers: Numbers, case: str) -> list[Check]:
    """Checks: shares of the signal on markers."""
    of = numbers[f"{case}: {START}"]
    return [
        Check(what=f"markers' {what}", interval=over_seeds(of[what]), above=DOMINATED)
        for what in ("share of log-ratio", "share of gradient")
    ]


def closes(numbers: Numbers, case: str, mask: str) -> list[Check]:
    """Checks: the lead of local support matching without a mask, and its change by the mask."""

    def lead(of: str) -> list[float]:
        one, other = (numbers[f"{case}: {loss}, mask {of}"]["sampled accuracy"] for loss in METHODS)
        return [b - a for a, b in zip(one, other, strict=True)]

    plain, masked = lead("none"), lead(mask)
    return [
        Check(what=f"accuracy of {LSM} minus sampled token, no mask", interval=over_seeds(plain), above=BETTER),
        Check(what="the same with the mask, minus that", interval=differences(masked, plain), below=BETTER),
    ]


def measure(lab: Lab, size: Size) -> Numbers:
    """Numbers by "CASE: start", of the initial student, and by "CASE: LOSS, mask MASK", of a run."""
    keys = [(name, seed) for name in CASES for seed in size.seeds]
    pairs = dict(zip(keys, pairs_of(lab, keys, size.pair), strict=True))
    numbers: Numbers = {}
    for name, seed in keys:
        case = CASES[name]
        ablation.append(
            numbers, f"{name}: {START}", of_markers(pairs[name, seed], case.task, SPELLINGS[case.spelling], seed, k=K)
        )
    wanted = [
        (f"{name}: {loss}, mask {mask}", distillation(CASES[name], pairs[name, seed], seed, size, loss, mask))
        for name, seed in keys
        for loss, masks in CASES[name].runs.items()
        for mask in masks
    ]
    for (label, _), trained in zip(wanted, distil_all(lab, [one for _, one in wanted]), strict=True):
        spelled = SPELLINGS[CASES[label.partition(":")[0]].spelling]
        ablation.append(numbers, label, ablation.numbers_of(trained) | {"own marker": own_share(trained, spelled)})
    by_case = sorted(numbers, key=lambda label: list(CASES).index(label.partition(":")[0]))  # the start of each first
    return {label: numbers[label] for label in by_case}


def pairs_of(lab: Lab, keys: Sequence[tuple[str, int]], size: PairSize) -> list[Pair]:
    """One pair per case and seed; the control has A's teacher."""
    recipes = [
        recipe(seed, learned)
        for name, seed in keys
        for recipe, learned in zip((teacher_recipe, student_recipe), CASES[name].pair(size), strict=True)
    ]
    made = lab.run_all(recipes)
    return [
        Pair(teacher=teacher / "teacher" / "model", student=student / "warm-up" / "model")
        for teacher, student in zip(made[::2], made[1::2], strict=True)
    ]


def distillation(case: Case, pair: Pair, seed: int, size: Size, loss: str, mask: str) -> Distillation:
    """One run. The mask has each of the marker's tokens separately, as the released code masks ids."""
    method, options, top_p = METHODS[loss]
    masked = {} if mask == "none" else {"mask_tokens": list(SPELLINGS[case.spelling]), "mask": mask}
    sampled = {"sampled": {"temperature": 1, "max_completion_length": case.task.longest}}
    return Distillation(
        pair=pair,
        seed=seed,
        method=method,
        task=case.task,
        options=options | masked,
        stage={
            "steps": size.steps,
            "prompts_per_step": size.prompts_per_step,
            "optimizer": optimizer(LEARNING_RATE, 10),
            "sampling": {"max_completion_length": case.task.longest, "top_p": top_p},
            "evaluate": held_out(case.task, sampling=sampled),
        },
    )


def own_share(trained: Trained, marker: str) -> float:
    """The share of held-out responses that begin with the marker in the student's original spelling."""
    from opd.stage.folder import RunDir

    stage = RunDir(trained.model.parents[1]).stage("distil")
    texts = [row["response"] for row in stage.read_held_out(f"step_{int(trained.after['step']):06d}")]
    return sum(text.startswith(marker) for text in texts) / len(texts)


def draw(numbers: Numbers) -> report.Figure:
    """Left: shares of tokens and signal on markers; right: accuracy of the runs, by case."""
    figure, axes = report.figure(2, width=4.0, height=3.6)
    shares, accuracies = axes[0]
    for i, case in enumerate(("A", "B")):
        for place, what in enumerate(SHARES):
            values = numbers[f"{case}: {START}"][what]
            at = place + 0.36 * (i - 0.5)
            label = f"{case}: {CASES[case].student_rows} examples" if place == 0 else None
            shares.bar(at, over_seeds(values).mean, width=0.34, color=report.COLOURS[i], alpha=0.6, label=label)
            shares.plot([at] * len(values), values, "o", color="black", markersize=2.5)
    shares.set_xticks(range(len(SHARES)), list(SHARES.values()), fontsize=7)
    shares.set(ylabel="share that falls on markers, first batch", ylim=(0, 1.2))
    shares.legend(fontsize=7, loc="upper left", ncols=2)
    for place, name in enumerate(numbers):
        values = numbers[name]["sampled accuracy"]
        case = list(CASES).index(name.partition(":")[0])
        colour = report.COLOURS[5 if START in name else case]
        accuracies.barh(place, over_seeds(values).mean, color=colour, alpha=0.6)
        accuracies.plot(values, [place] * len(values), "o", color="black", markersize=2.5)
    accuracies.set_yticks(range(len(numbers)), [name.replace(LSM, "LSM") for name in numbers], fontsize=7)
    accuracies.set_ylim(len(numbers) - 0.4, -0.6)
    accuracies.set(xlabel="sampled accuracy, share", title="LSM: local support matching")
    return figure
