"""How much of the teacher's gap a stage recovered, as its end says it, from the responses that it kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.runs import EVALUATE, command, one_stage, prepare

from opd.commands.report.console import held_out_table, recoveries
from opd.evaluation.recovery import as_metrics, recovered
from opd.maths.intervals import Recovery, gap_recovery
from opd.recipe.load import parse_recipe
from opd.recipe.schema import StageSpec
from opd.stage.folder import StageDir

ROWS = [{"step": 0, "eval/greedy/reward": 0.0}, {"step": 8, "eval/greedy/reward": 0.5}]


@pytest.fixture
def spec() -> StageSpec:
    return parse_recipe(one_stage(evaluate=EVALUATE)).stages[0]


@pytest.fixture
def folder(tmp_path: Path) -> StageDir:
    return StageDir(tmp_path)


def keep(folder: StageDir, when: str, rewards: Sequence[Sequence[float | None]], sampling: str = "greedy") -> None:
    """Held-out responses of one evaluation: a list of rewards a prompt."""
    rows = [
        {"when": when, "sampling": sampling, "task": None, "prompt_id": prompt, "reward": reward}
        for prompt, some in enumerate(rewards)
        for reward in some
    ]
    folder.write_held_out(when, rows)


def test_recoveries_gives_share_and_interval(spec: StageSpec, folder: StageDir):
    before, teacher, after = [[0.0]] * 8, [[1.0]] * 7 + [[0.0]], [[1.0, 0.0]] * 4 + [[1.0, 1.0]] * 3 + [[0.0, 0.0]]
    for when, rewards in (("before", before), ("teacher", teacher), ("step_000008", after)):
        keep(folder, when, rewards)
    found = gap_recovery([0.0] * 8, [1.0] * 7 + [0.0], [0.5] * 4 + [1.0] * 3 + [0.0])
    assert found is not None
    assert found.bounds is not None
    low, high = found.bounds
    lines = recoveries(spec, folder, None, ROWS)
    assert lines == [f"greedy: 71% of the teacher's gap recovered [{low:.0%}, {high:.0%}]"]
    assert 0.4 < low < 5 / 7 < high < 1.1
    assert held_out_table(spec, ROWS, lines).caption == lines[0]


def test_recoveries_has_no_interval_when_lead_may_be_chance(spec: StageSpec, folder: StageDir):
    for when, rewards in (("before", [0, 1, 0, 0]), ("teacher", [1, 0, 1, 0]), ("step_000008", [0, 1, 1, 0])):
        keep(folder, when, [[float(reward)] for reward in rewards])
    assert recoveries(spec, folder, None, ROWS) == [
        "greedy: 100% of the teacher's gap recovered (no interval: the lead of the teacher may be chance)"
    ]


def test_recoveries_of_equal_differences_blame_no_chance(spec: StageSpec, folder: StageDir):
    for when, reward in (("before", 0.0), ("teacher", 1.0), ("step_000008", 1.0)):
        keep(folder, when, [[reward]] * 18)
    assert recoveries(spec, folder, None, ROWS) == [
        "greedy: 100% of the teacher's gap recovered (no interval: the differences are equal on all prompts)"
    ]


@pytest.mark.parametrize(
    ("means", "ends", "shown"),
    [
        ((0.5, 1.0), (0.25, 1.0), ["50% [25%, 100%]", "100% [25%, 100%]"]),
        ((4.5, 10.0), (-0.5, 12.0), ["4.50 [-0.50, 12.00]", "10.00 [-0.50, 12.00]"]),
        ((0.5, 10.0), (0.25, 12.0), ["0.50 [0.25, 12.00]", "10.00 [0.25, 12.00]"]),
        ((0.0, 0.9), (-0.1, 1.0), ["0.00 [-0.10, 1.00]", "0.90 [-0.10, 1.00]"]),
    ],
)
def test_reward_beyond_one_is_no_share(spec: StageSpec, means: Any, ends: Any, shown: list[str]):
    """A game's reward of 10 was shown as 1000%."""
    low_high = {f"eval/greedy/reward_{name}": end for name, end in zip(("low", "high"), ends, strict=True)}
    rows = [{"step": 8 * i, "eval/greedy/reward": mean, **low_high} for i, mean in enumerate(means)]
    table = held_out_table(spec, rows)
    assert [next(iter(column.cells)) for column in table.columns[1:]] == shown


@pytest.mark.parametrize("missing", ["before", "teacher"])
def test_recoveries_is_empty_when_evaluation_is_missing(spec: StageSpec, folder: StageDir, missing: str):
    for when, reward in (("before", 0.0), ("teacher", 1.0), ("step_000008", 1.0)):
        if when != missing:
            keep(folder, when, [[reward], [reward]])
    assert recoveries(spec, folder, None, ROWS) == []


def test_recoveries_is_empty_when_reward_or_lead_is_missing(spec: StageSpec, folder: StageDir):
    for when, reward in (("before", 1.0), ("teacher", 0.0), ("step_000008", 1.0)):
        keep(folder, when, [[reward], [reward]])
    assert recoveries(spec, folder, None, ROWS) == []
    for when in ("before", "teacher", "step_000008"):
        keep(folder, when, [[None], [None]])
    assert recoveries(spec, folder, None, ROWS) == []


def test_train_prints_recoveries_of_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(
        prepare(tmp_path / "work", one_stage(evaluate=EVALUATE | {"reward": {"name": "support.named:even"}}))
    )
    ended = command("train", "recipe.yaml")
    assert ended.code == 0, ended.err
    stage = parse_recipe(one_stage(evaluate=EVALUATE)).stages[0]
    folder = StageDir(Path("run/distil"))
    rows = [row for row in folder.read_metrics() if any(key.startswith("eval/") for key in row)]
    lines = recoveries(stage, folder, None, rows)
    measured = [key for key in rows[0] if key.endswith("/reward") and key.startswith("eval/teacher/")]
    assert len(measured) == 2
    for key in measured:  # a line where the teacher is ahead, with the numbers that the table shows
        sampling = key.split("/")[2]
        before, teacher, after = rows[0][f"eval/{sampling}/reward"], rows[0][key], rows[-1][f"eval/{sampling}/reward"]
        mine = [line for line in lines if line.startswith(f"{sampling}:")]
        assert bool(mine) == (teacher > before)
        if mine:
            assert f"{(after - before) / (teacher - before):.0%} of" in mine[0]
            assert mine[0].split(" (no")[0] in ended.out.replace("\n", " ")


# --- in the metrics, at every evaluation -----------------------------------------------------------------------------

LEAD = ("models.teacher.seed=4", "evaluate.every=1", "optimizer.learning_rate=0.03", "steps=3")


def test_gap_recovery_equals_arithmetic_on_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Against plain arithmetic on the rewards of the same rows; in a setting without a lead there is none."""
    recipe = one_stage(evaluate=EVALUATE | {"reward": {"name": "support.named:even"}})
    monkeypatch.chdir(prepare(tmp_path / "work", recipe))
    ended = command("train", "recipe.yaml", *LEAD)
    assert ended.code == 0, ended.err
    folder = StageDir(Path("run/distil"))
    rows = [row for row in folder.read_metrics() if any(key.startswith("eval/") for key in row)]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert not any("gap_recovery" in key for key in rows[0])
    seen = set()
    for row in rows[1:]:
        for sampling in ("greedy", "drawn"):
            name = f"eval/{sampling}/gap_recovery"
            before, teacher = rows[0][f"eval/{sampling}/reward"], rows[0][f"eval/teacher/{sampling}/reward"]
            assert (name in row) == (teacher > before)
            if name in row:
                expected = (row[f"eval/{sampling}/reward"] - before) / (teacher - before)
                assert row[name] == pytest.approx(expected, abs=1e-12)
                assert row.get(f"{name}_low", expected) <= expected + 1e-12
                assert expected - 1e-12 <= row.get(f"{name}_high", expected)
                assert (f"{name}_low" in row) == (f"{name}_high" in row)
                seen.add(row[name])
    assert len(seen) > 1, "the seed gives a lead, and a student that moves"


def test_as_metrics_has_bounds_when_recovery_has_them():
    found = {"greedy": Recovery(0.5, (0.2, 0.9)), "drawn": Recovery(1.5, None)}
    assert as_metrics(found, None) == {
        "eval/greedy/gap_recovery": 0.5,
        "eval/greedy/gap_recovery_low": 0.2,
        "eval/greedy/gap_recovery_high": 0.9,
        "eval/drawn/gap_recovery": 1.5,
    }
    assert as_metrics({"greedy": Recovery(0.5, None)}, "sums") == {"eval/sums/greedy/gap_recovery": 0.5}


def test_recovered_reads_one_task_and_complete_triples():
    def rows(*rewards: tuple[str | None, str, int, float | None]) -> list[dict[str, object]]:
        return [dict(zip(("task", "sampling", "prompt_id", "reward"), row, strict=True)) for row in rewards]

    before = rows(("a", "s", 1, 0.0), ("a", "s", 2, 0.0), ("b", "s", 1, 1.0), ("a", "t", 1, 0.0))
    teacher = rows(("a", "s", 1, 1.0), ("a", "s", 2, 1.0), ("b", "s", 1, 0.0), ("a", "t", 1, None))
    after = rows(("a", "s", 2, 1.0), ("a", "s", 1, 0.0), ("b", "s", 1, 1.0), ("a", "t", 1, 1.0))
    assert {name: found.share for name, found in recovered(before, teacher, after, "a", "st").items()} == {"s": 0.5}
    assert recovered(before, teacher, after, "b", "st") == {}, "its teacher is not ahead"
    assert recovered(before, teacher, after, None, "st") == {}
