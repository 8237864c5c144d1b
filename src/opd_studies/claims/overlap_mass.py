"""How much mass the tokens hold that are among the top k of both models: is it 97 to 99 %, and what does that show?

Li et al., arXiv 2604.13016 Fig. 18: on the student's responses the overlap of both top k holds 97 to 99 % of the mass
of either model, in the run that succeeds and in the one that fails, while the overlap ratio rises from 72 to 91 %.

The failing teacher is of the student's pipeline: a larger model, trained on as few rows for as many updates. The
control is a teacher of the opposite habit, which sorts in falling order: a mass that is as high there would show
nothing.

Setting A: k = 8 of 17 tokens, so that the top k of each model holds nearly all of its mass, as k = 16 does for the
paper's models. Setting B: k = 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from opd_studies.lab.distilling import Distillation, Trained, distil_all, held_out
from opd_studies.lab.lab import SORTERS, SORTING, Lab, Pair, PairSize, Task, teacher_recipe
from opd_studies.page import report
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding, over_seeds, short

USE = (
    "Read the mass on the overlap (`compare/student_mass_on_overlap`) before the overlap ratio: with fitting teachers "
    "it began at 0.95, with a teacher of the opposite habit at 0.59; the ratios were 0.67 and 0.53. A high mass does "
    "not say that the teacher can teach."
)


K, SMALLER = 8, 4  # of setting A and B; the vocabulary has 17 tokens


OWN, SAME_ROWS, OPPOSITE = "better teacher", "teacher of the same pipeline", "teacher of the opposite habit"


FALLING = Task(
    data="opd_studies.worlds.bad_habit_data:sorting_both_ways",
    reward=SORTING.reward,
    longest=SORTING.longest,
    options={"falling": 1.0},
)


TEACHERS: Mapping[str, PairSize] = {
    OWN: SORTERS,
    SAME_ROWS: replace(SORTERS, teacher_rows=SORTERS.student_rows, teacher_steps=SORTERS.student_steps),
    OPPOSITE: replace(SORTERS, task=FALLING),
}


# Thresholds.
NEARLY_ALL = 0.97  # of each model's mass


RISES = 0.1  # of the overlap ratio; the paper's rises by 0.19


STAYS = 0.03  # of the mass; the paper's stays within 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds (one pair each), updates, prompts per update, and updates between measurements."""

    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    steps: int = 100
    prompts_per_step: int = 32
    every: int = 9  # includes the last of 100 updates
    held_out: int = 200  # prompts
    teachers: Mapping[str, PairSize] = field(default_factory=lambda: TEACHERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """One distillation; shares by update, on the responses of training. Accuracies are of held-out responses."""

    overlap: Mapping[int, float]
    student_mass: Mapping[int, float]
    teacher_mass: Mapping[int, float]
    before: float
    after: float
    teacher: float

    def change(self, what: str) -> float:
        """The last measured share minus the first."""
        values: Mapping[int, float] = getattr(self, what)
        return values[max(values)] - values[min(values)]


Numbers = Mapping[tuple[str, int], Sequence[Course]]  # by teacher and k, one course per seed


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Distil from every teacher for all seeds; see the file's docstring."""
    size = size or Size()
    numbers = measure(lab, size)
    return Outcome(
        setup=(
            f"Sorting five digits, V = 17, k = {K} (A) or {SMALLER} (B); {len(size.seeds)} students of their own "
            f"seeds, {size.steps} updates of {size.prompts_per_step} responses with the exact reverse KL from three "
            "teachers: one that saw many rows, one of the same size that saw as few rows as the student, and one that "
            "saw many rows in falling order. The overlap is measured on the responses of training, every "
            f"{size.every} updates; accuracies are of {size.held_out} held-out prompts, sampled at temperature 1."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def measure(lab: Lab, size: Size) -> Numbers:
    """Train students and teachers, then all distillations."""
    students = [pair.student for pair in lab.pairs(size.seeds, size.teachers[OWN])]
    recipes = [teacher_recipe(seed, one) for one in size.teachers.values() for seed in size.seeds]
    made = iter(lab.run_all(recipes))
    teachers = {name: [next(made) / "teacher" / "model" for _ in size.seeds] for name in size.teachers}
    settings = [(OWN, K), (SAME_ROWS, K), (OPPOSITE, K), (OWN, SMALLER), (SAME_ROWS, SMALLER), (OPPOSITE, SMALLER)]
    runs = [
        Distillation(
            pair=Pair(teacher=teachers[name][place], student=students[place]),
            seed=seed,
            method="reverse_kl",
            task=SORTING,
            stage={
                "steps": size.steps,
                "prompts_per_step": size.prompts_per_step,
                "diagnostics": {"every": size.every, "k": k},
                "evaluate": held_out(
                    SORTING,
                    data=SORTING.rows(size.held_out, part="held_out"),
                    before=True,
                    teacher=True,
                    kl=False,
                ),
            },
        )
        for name, k in settings
        for place, seed in enumerate(size.seeds)
    ]
    trained = iter(distil_all(lab, runs))
    return {setting: [course(next(trained)) for _ in size.seeds] for setting in settings}


def course(one: Trained) -> Course:
    """The numbers of a finished distillation."""

    def measured(name: str) -> dict[int, float]:
        return {int(row["step"]): row[f"compare/{name}"] for row in one.rows if f"compare/{name}" in row}

    return Course(
        overlap=measured("overlap_ratio"),
        student_mass=measured("student_mass_on_overlap"),
        teacher_mass=measured("teacher_mass_on_overlap"),
        before=one.before["eval/sampled/reward"],
        after=one.after["eval/sampled/reward"],
        teacher=one.before["eval/teacher/sampled/reward"],
    )


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""
    figure = "2604.13016 Fig. 18"
    return (
        finding(
            "From the first update to the last the overlap holds nearly all mass of both models",
            figure,
            _nearly_all(numbers, OWN, K),
            _nearly_all(numbers, OWN, SMALLER),
        ),
        finding(
            "It does so with a teacher of the student's own pipeline too",
            figure,
            _nearly_all(numbers, SAME_ROWS, K),
            _nearly_all(numbers, SAME_ROWS, SMALLER),
        ),
        finding(
            "While the student learns, the overlap ratio rises and the mass stays",
            figure,
            _moves(numbers, K),
            _moves(numbers, SMALLER),
        ),
        finding(
            "The mass is lower with a teacher of the opposite habit",
            f"{figure} (the control is ours)",
            _tells_apart(numbers, K),
            _tells_apart(numbers, SMALLER),
        ),
    )


def _nearly_all(numbers: Numbers, teacher: str, k: int) -> list[Check]:
    return [
        Check(
            what=f"least {model}'s mass on the overlap, k={k}, {teacher}",
            interval=over_seeds([min(getattr(one, f"{model}_mass").values()) for one in numbers[teacher, k]]),
            above=NEARLY_ALL,
        )
        for model in ("student", "teacher")
    ]


def _moves(numbers: Numbers, k: int) -> list[Check]:
    runs = numbers[OWN, k]
    stays = [
        Check(
            what=f"{model}'s mass on the overlap, k={k}, after minus before",
            interval=over_seeds([one.change(f"{model}_mass") for one in runs]),
            above=-STAYS,
            below=STAYS,
        )
        for model in ("student", "teacher")
    ]
    rises = over_seeds([one.change("overlap") for one in runs])
    return [Check(what=f"overlap ratio, k={k}, after minus before", interval=rises, above=RISES), *stays]


def _tells_apart(numbers: Numbers, k: int) -> list[Check]:
    own, opposite = ([one.student_mass[min(one.student_mass)] for one in numbers[t, k]] for t in (OWN, OPPOSITE))
    what = f"student's mass at the first update, k={k}, {OPPOSITE}"
    return [
        Check(what=f"{what}, minus {OWN}", interval=differences(opposite, own), below=0.0),
        Check(what=what, interval=over_seeds(opposite), below=NEARLY_ALL),
    ]


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """One row per teacher and k: means over seeds."""
    header = ("teacher", "k", "its accuracy", "accuracy", "overlap ratio", "student's mass", "teacher's mass")
    rows: list[tuple[str, ...]] = [header]

    def mean(values: Sequence[float]) -> str:
        return short(sum(values) / len(values))

    for (teacher, k), runs in numbers.items():
        shares = [[getattr(one, what) for one in runs] for what in ("overlap", "student_mass", "teacher_mass")]
        ends = [(mean([one[min(one)] for one in each]), mean([one[max(one)] for one in each])) for each in shares]
        accuracy = f"{mean([one.before for one in runs])} to {mean([one.after for one in runs])}"
        cells = [f"{first} to {last}" for first, last in ends]
        rows.append((teacher, str(k), mean([one.teacher for one in runs]), accuracy, *cells))
    return tuple(rows)


def draw(numbers: Numbers) -> report.Figure:
    """Overlap ratio and both masses by update, one line per teacher at the k of setting A."""
    panels = {"overlap": f"overlap ratio of both top {K}", "student_mass": "student's mass on it"}
    panels["teacher_mass"] = "teacher's mass on it"
    figure, axes = report.figure(len(panels), width=3.0, height=3.2)
    at_k = {teacher: runs for (teacher, k), runs in numbers.items() if k == K}
    for panel, (what, label) in zip(axes[0], panels.items(), strict=True):
        for (teacher, runs), colour in zip(at_k.items(), report.COLOURS, strict=False):
            steps = sorted(getattr(runs[0], what))
            means = [sum(getattr(one, what)[step] for one in runs) / len(runs) for step in steps]
            panel.plot(steps, means, "o-", markersize=3, color=colour, label=teacher)
        panel.set(xlabel="update", ylabel=label)
        if what != "overlap":
            panel.axhline(NEARLY_ALL, color="black", linewidth=0.7)
    axes[0][0].legend(fontsize=7)
    return figure
