"""Teachers that debate a prompt before they score it, against the same teachers without, and against one of them.

MAD-OPD, arXiv 2605.01347: teachers that answer, read each other and answer again, then score the student together,
teach more than one teacher (OPD) and than several without a debate (MT-OPD).

Here two small teachers each know half of a key from digits to letters (`opd_studies.worlds.half_keys`), and have
learned to complete each other: who does not know a digit takes the other's letter. In setting A both are sure of wrong
letters where they do not know; in B they guess. Controls that the paper does not have: the debate of another prompt;
one teacher with the same transcript; one teacher that writes as many turns alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_studies.lab import ablation
from opd_studies.lab.ablation import START, TEACHER, Numbers
from opd_studies.lab.distilling import HELD_OUT, read
from opd_studies.lab.lab import Lab, optimizer
from opd_studies.page import comparison, report
from opd_studies.page.comparison import gap
from opd_studies.page.outcome import Finding, Outcome, finding
from opd_studies.worlds.half_keys import ALONE, CHARACTERS, DIGITS, LONGEST, TEXTS

USE = (
    "Let teachers that each know a part debate (`mad_opd`), above all if they are sure where they are wrong. One "
    "teacher that reads the debate taught as much, at one forward less. So did another prompt's debate: a gain is no "
    "proof that the teachers used what was said."
)


DEBATE, NONE, SHUFFLED, READER, LONG, ONE = (
    "debate",
    "no debate",
    "another prompt's debate",
    "one reads the debate",
    "one, as many turns",
    "one teacher",
)


METHODS = "opd_studies.worlds.methods"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A method with its options, and the teachers."""

    method: str = "mad_opd"
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    teacher: str = "l+r"


SETTINGS = {
    DEBATE: Setting(options=TEXTS),
    NONE: Setting(options={"rounds": 0}),
    SHUFFLED: Setting(method=f"{METHODS}:shuffled_debate", options=TEXTS),
    READER: Setting(method=f"{METHODS}:one_reader", options=TEXTS),
    LONG: Setting(options={**TEXTS, "rounds": ALONE}, teacher="l"),
    ONE: Setting(options={"rounds": 0}, teacher="l"),
}
GUESSING = (DEBATE, NONE, ONE)  # the settings of B


KINDS = {"A": True, "B": False}  # whether the teachers are sure of wrong letters


# Thresholds, differences of accuracy: shares of right answers.
MORE = 0.1


SAME = 0.05


MODEL = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds, each with its own key, teachers and student; updates, and prompts per step."""

    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    steps: int = 100
    prompts_per_step: int = 32
    teacher_steps: int = 160
    student_steps: int = 160
    model: Mapping[str, int] = field(default_factory=lambda: MODEL)


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Train all settings for all seeds; see the file's docstring."""
    size = size or Size()
    numbers = measure(lab, size)
    return Outcome(
        setup=(
            f"Letters of {DIGITS} digits by a key, {len(size.seeds)} seeds, each with its own key, two teachers and a "
            "student that knows the form of an answer and nothing of the key. A teacher knows the letters of five "
            f"digits. {size.steps} updates of {size.prompts_per_step} prompts, reverse KL (beta 1); debates of two "
            f"rounds at temperature 0.7, four turns in all; alone a teacher writes {ALONE} turns. In A a teacher is "
            "sure of a wrong letter where it does not know, in B it guesses. Both learned in training to take the "
            "other's letters in a debate for the digits that they do not know, so whether a debate can be resolved is "
            f"given here. Held out: {HELD_OUT} prompts, one response each at temperature 1; an answer is right if all "
            f"{DIGITS} letters are. After seed 0 showed no learning at first, the student was given rows of another "
            "key with half of the letters replaced, more updates and a higher rate, and the teachers rows with 3 % of "
            "the letters replaced; the thresholds were set before. Another prompt's debate gives a teacher wrong "
            "letters for the digits that it does not know, but other ones for every prompt, while its own letters are "
            "always the right ones: over many prompts that is enough for the student."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=comparison.table(numbers, ("sampled accuracy", "greedy accuracy")),
    )


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""

    def more(setting: str, first: str, second: str) -> list[Any]:
        return [gap(numbers, f"{setting}: {first}", f"{setting}: {second}", above=MORE)]

    return (
        finding(
            "A student of teachers that debate becomes better than either teacher is alone",
            "2605.01347 results",
            *([*more(kind, DEBATE, f"{TEACHER} l"), *more(kind, DEBATE, f"{TEACHER} r")] for kind in KINDS),
        ),
        finding(
            "It becomes better than a student of one teacher",
            "2605.01347 results (OPD)",
            *(more(kind, DEBATE, ONE) for kind in KINDS),
        ),
        finding(
            "Teachers that debate teach more than the same teachers without a debate",
            "2605.01347 results (MT-OPD)",
            *(more(kind, DEBATE, NONE) for kind in KINDS),
        ),
        finding(
            "The debate helps by what it says about the prompt: that of another prompt teaches less",
            "2605.01347 results, control",
            more("A", DEBATE, SHUFFLED),
        ),
        finding(
            "Two teachers that read the debate teach more than one of them that reads it",
            "2605.01347 results, control",
            [gap(numbers, f"A: {DEBATE}", f"A: {READER}", above=SAME)],
        ),
        finding(
            "The debate teaches more than one teacher that writes as many turns alone",
            "2605.01347 results, control",
            more("A", DEBATE, LONG),
        ),
    )


def measure(lab: Lab, size: Size) -> Numbers:
    """Train all settings of both kinds for all seeds; also start and teachers, by kind."""
    models = models_of(lab, size)
    planned = [
        (kind, name, seed) for seed in size.seeds for kind in KINDS for name in (SETTINGS if kind == "A" else GUESSING)
    ]
    folders = lab.run_all([distillation(*one, models, size) for one in planned])
    measured = lab.run_all([examination(kind, seed, who, models) for kind, seed, who in _examined(size)])
    numbers: Numbers = {}
    for (kind, _, who), folder in zip(_examined(size), measured, strict=True):
        before = read(folder, "examine").before
        if who == "l":
            ablation.append(numbers, f"{kind}: {START}", ablation.held_out_of(before, "eval/"))
        ablation.append(numbers, f"{kind}: {TEACHER} {who}", ablation.held_out_of(before, "eval/teacher/"))
    for (kind, name, _), folder in zip(planned, folders, strict=True):
        ablation.append(numbers, f"{kind}: {name}", ablation.held_out_of(read(folder, "distil").after, "eval/"))
    return dict(sorted(numbers.items(), key=lambda one: one[0][0]))


def _examined(size: Size) -> list[tuple[str, int, str]]:
    return [(kind, seed, who) for seed in size.seeds for kind in KINDS for who in ("l", "r")]


Models = Mapping[tuple[str, int, str], Path]


def models_of(lab: Lab, size: Size) -> Models:
    """Folders by kind, seed and name: of the teachers l and r, and of the student."""
    planned = [(kind, seed, who) for seed in size.seeds for kind in KINDS for who in ("l", "r", "student")]
    folders = lab.run_all([_learner(*one, size) for one in planned])
    return {one: folder / "learn" / "model" for one, folder in zip(planned, folders, strict=True)}


def _learner(kind: str, seed: int, who: str, size: Size) -> dict[str, Any]:
    """The recipe of a teacher, from rows of its half of the key; or of a student, which knows only the form."""
    if who == "student":
        data = {"path": "opd_studies.worlds.half_keys:formed", "options": {"count": 2000, "seed": seed}}
    else:
        options = {"count": 10_000, "key": seed, "writer": who, "sure": KINDS[kind], "seed": 1}
        data = {"path": "opd_studies.worlds.half_keys:taught", "options": options}
    init = {"model_type": "llama", "num_attention_heads": 4, "max_position_embeddings": 80, "tie_word_embeddings": True}
    return {
        "name": f"{who}-{seed}",
        "seed": seed,
        "models": {who: {"init": {**init, **size.model}, "tokenizer": {"characters": CHARACTERS}}},
        "stages": [
            {
                "name": "learn",
                "train": who,
                "method": "sft",
                "data": data,
                "prompts_per_step": 64,
                "steps": size.student_steps if who == "student" else size.teacher_steps,
                "optimizer": optimizer(3e-3, 20),
                "checkpoint": {"every": 100_000, "keep": 1},
                "samples_every": 0,
            }
        ],
    }


def distillation(kind: str, name: str, seed: int, models: Models, size: Size) -> dict[str, Any]:
    """The recipe of one setting."""
    setting = SETTINGS[name]
    stage = {
        "name": "distil",
        "method": setting.method,
        "options": dict(setting.options),
        "prompts_per_step": size.prompts_per_step,
        "steps": size.steps,
        "optimizer": optimizer(3e-3, 10),
        "teacher_sampling": {"max_completion_length": LONGEST, "temperature": 0.7},
        "evaluate": evaluated(seed, before=False),
    }
    return _with_models(kind, seed, setting.teacher, models, stage, f"{kind}-{name}-{seed}")


def examination(kind: str, seed: int, who: str, models: Models) -> dict[str, Any]:
    """A recipe that measures the start and a teacher. Its one update is not read."""
    stage = {
        "name": "examine",
        "method": "reverse_kl",
        "prompts_per_step": 1,
        "steps": 1,
        "optimizer": optimizer(1e-9, 1),
        "evaluate": evaluated(seed, before=True),
    }
    return _with_models(kind, seed, who, models, stage, f"examine-{kind}-{who}-{seed}")


def _with_models(
    kind: str, seed: int, teacher: str, models: Models, stage: Mapping[str, Any], name: str
) -> dict[str, Any]:
    names = ["student", *teacher.split("+")]
    common = {
        "train": "student",
        "teacher": teacher,
        "data": {"path": "opd_studies.worlds.half_keys:asked", "options": {"count": 4000, "key": seed, "seed": 3}},
        "sampling": {"max_completion_length": DIGITS + 1},
        "reward": {"name": "exact"},
        "checkpoint": {"every": 100_000, "keep": 1},
        "samples_every": 0,
    }
    return {
        "name": name.replace(", ", "-").replace(" ", "-").replace("'", ""),
        "seed": seed,
        "models": {one: {"path": str(models[kind, seed, one])} for one in names},
        "stages": [{**common, **stage}],
    }


def evaluated(key: int, before: bool) -> dict[str, Any]:
    """An evaluate section; `before`: also of the start and the teacher."""
    options = {"count": HELD_OUT, "key": key, "part": "held_out"}
    longest = {"max_completion_length": DIGITS + 1}
    return {
        "data": {"path": "opd_studies.worlds.half_keys:asked", "options": options},
        "sampling": {"sampled": {"temperature": 1, **longest}, "greedy": {"temperature": 0, **longest}},
        "before": before,
        "teacher": before,
    }


def draw(numbers: Numbers) -> report.Figure:
    """Accuracy of start, teachers and students, in both settings."""
    figure, axes = report.figure(2, width=3.6, height=3.2)
    for panel, (kind, sure) in zip(axes[0], KINDS.items(), strict=True):
        own = {name.removeprefix(f"{kind}: "): one for name, one in numbers.items() if name.startswith(kind)}
        comparison.points([panel], own, {"sampled accuracy": "sampled accuracy, share"})
        panel.set_title(f"{kind}: teachers that are sure of wrong letters" if sure else f"{kind}: teachers that guess")
        panel.set_xlim(0, 1.03)
    return figure
