"""The study of scarce labels: the two budgets, the rows with labels, the counted tokens, and a run at reduced size."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.study_numbers.sparse import sparse_numbers

from opd.data.prompts import load_prompts
from opd.recipe.schema import DataSection
from opd_studies.claims import sparse_to_dense as study
from opd_studies.claims.sparse_to_dense import Leg, Size, numbers_of
from opd_studies.lab.distilling import Trained
from opd_studies.lab.lab import Lab, Pair
from opd_studies.page import report
from opd_studies.page.outcome import state

PAIR = Pair(teacher=Path("teacher"), student=Path("student"))


@pytest.mark.parametrize("setting", ["A", "B"])
def test_arms_have_the_updates_of_their_budget(setting: str):
    size = Size(first=50, forward=7, reverse=9, last=14, slack=1.1)
    arms = {name: sum(leg.steps for leg in legs) for name, legs in size.arms(setting).items()}
    student = (study.GRPO, study.BRIDGE_RAW, study.ON_POLICY, study.BRIDGE)
    assert {arms[name] for name in student} == {7 + 9}
    assert arms[study.WHOLE] + 50 == arms[study.LATER] == 50 + 7 + 9 + 14
    assert arms[study.GRPO_MORE] == 88
    assert [arms.get(name) for name in study.ONLY_A] == ([88, 30] if setting == "A" else [None, None])


def test_arms_that_begin_alike_have_equal_recipes():
    arms = Size().arms("A")
    for first, second in ((study.BRIDGE, study.REPLAY), (study.BRIDGE_RAW, study.LATER), (study.GRPO, study.GRPO_MORE)):
        shared = zip(arms[first], arms[second], strict=False)
        assert all(study.stage(PAIR, 0, a).recipe == study.stage(PAIR, 0, b).recipe for a, b in shared)


def test_labels_are_two_halves_apart_with_sorted_answers():
    def rows(labels: dict[str, int]) -> list[str]:
        leg = Leg(method="grpo", steps=1, rate=1e-3, labels=labels)
        (section,) = (one["data"] for one in study.stage(PAIR, 0, leg).recipe["stages"])
        prompts = load_prompts(DataSection(**section))
        assert all(one.answer == "".join(sorted(str(one.content).rstrip(">"))) for one in prompts)
        return [str(one.content) for one in prompts]

    first, second = rows(study.L1), rows(study.L2)
    assert len(first) == len(second) == study.LABELS
    assert first + second == rows(study.ALL)
    assert len({*first, *second}) == 2 * study.LABELS


def trained(tokens: list[float], differs: list[float], accuracy: float) -> Trained:
    signal = [{study.DIFFERS: share} for share in differs] or [{} for _ in tokens]
    return Trained(
        model=Path("model"),
        before={},
        after={"eval/sampled/reward": accuracy},
        last={},
        rows=[{"train/tokens": n, **more} for n, more in zip(tokens, signal, strict=True)],
        evaluations=[],
    )


def test_numbers_count_tokens_of_all_stages_and_updates_of_the_student():
    teacher = trained([1000.0, 500.0, 500.0], [1.0, 1.0, 1.0], 0.9)
    bridge, last = trained([300.0], [], 0.2), trained([200.0, 100.0], [0.25, 0.75], 0.3)
    got = numbers_of([bridge, last], [teacher])
    assert got == {
        "sampled accuracy": 0.3,
        study.UPDATES: 3.0,
        study.TOKENS: pytest.approx(2.6),
        study.SIGNAL: pytest.approx(0.5),
    }
    assert study.SIGNAL not in numbers_of([bridge], [teacher])


@pytest.mark.parametrize(
    ("arm", "accuracy", "failing"),
    [
        (study.GRPO, 0.65, [0]),
        (study.GRPO_MORE, 0.75, [1]),
        (study.BRIDGE_RAW, 0.35, [2]),
        (study.BRIDGE_RAW_MORE, 0.65, [4]),
        (study.LATER, 0.75, [5]),
        (study.ON_POLICY, 0.65, [6]),
        (study.REPLAY, 0.75, [8]),
    ],
)
def test_judge_rejects_what_a_control_does_as_well(arm: str, accuracy: float, failing: list[int]):
    numbers = sparse_numbers(True, True)
    assert [state(one.checks) for one in study.judge(numbers)] == ["holds"] * 9
    numbers["A"][arm] = {"sampled accuracy": [accuracy + 0.001 * i for i in range(5)]}
    states = [state(one.checks) for one in study.judge(numbers)]
    assert [i for i, one in enumerate(states) if one != "holds"] == failing


def test_table_and_figure_show_arms_of_both_settings():
    numbers = sparse_numbers(True, True)
    rows = study.table(numbers)
    assert [row[:2] for row in rows[1:]] == [(setting, arm) for setting in "AB" for arm in Size().arms(setting)]
    with report.style():
        axes = study.draw(numbers).axes
    assert [panel.get_xlabel().partition(":")[0] for panel in axes] == ["A", "A", "B", "B"]


def test_study_runs_at_reduced_size(tmp_path: Path):
    small = {"num_hidden_layers": 1, "num_attention_heads": 2}
    size = Size(
        seeds=(0,),
        **dict.fromkeys(("first", "forward", "reverse", "last", "teacher_steps", "student_steps"), 1),
        model=small,
        teacher=8,
        student=8,
    )
    lab = Lab(folder=tmp_path, workers=1)
    numbers = study.measure(lab, "B", size)
    assert list(numbers) == [study.START, study.RAW, study.REINFORCED, *size.arms("B")]
    (first, *_) = study.models_of(lab, "B", size)
    spent = sum(study.RESPONSES * row["rollout/length"] for row in first.reinforced.rows)
    assert numbers[study.REINFORCED][study.TOKENS] == pytest.approx([spent / 1000])
    alone = [numbers[name][study.TOKENS][0] for name in (study.BRIDGE, study.BRIDGE_RAW)]
    assert alone[0] > spent / 1000 > 0 < alone[1] < alone[0] + spent / 1000
    assert {name for name, of in numbers.items() if study.SIGNAL in of} == {
        *(study.REINFORCED, study.GRPO, study.GRPO_MORE, study.LATER, study.WHOLE)
    }
