"""The figures of studies: what is drawn lies inside its panel, one colour has one meaning, no legend covers a panel."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from opd_studies import STUDIES, use
from opd_studies.page import comparison, intervals, numbers, report
from opd_studies.page.outcome import Check, Finding, SeedInterval
from opd_studies.page.table import finding, shown

ROOT = Path(__file__).parents[2]


def check(mean: float, half: float, **side: float) -> Check:
    return Check(what="accuracy, a minus b", interval=SeedInterval(mean, mean - half, mean + half), **side)


FINDINGS = (
    Finding(claim="a is better", citation="1", checks=(check(0.5, 0.1, above=0.0), check(0.1, 0.3, above=0.0))),
    Finding(claim="a is as good", citation="2", checks=(check(-2.0, 0.5, above=-0.2, below=0.2),), second=()),
)


def test_draw_has_a_panel_per_claim_and_a_row_per_check():
    figure = intervals.draw(FINDINGS, "Take `a`")
    assert [len(panel.get_yticks()) for panel in figure.axes] == [2, 1]
    assert {"Take a", "a is better: undecided", "a is as good: contradicted"} <= {
        one.get_text() for one in figure.texts
    }


def test_draw_holds_every_interval_inside_its_panel():
    for panel, claimed in zip(intervals.draw(FINDINGS, "t").axes, FINDINGS, strict=True):
        low, high = panel.get_xlim()
        for one in claimed.checks:
            assert low < one.interval.low <= one.interval.high < high


def test_draw_colours_by_what_an_interval_says_of_the_claim():
    first, second = intervals.draw(FINDINGS, "t").axes
    drawn = [[line.get_color() for line in panel.lines if line.get_marker() in "osD"] for panel in (first, second)]
    colours = {state: colour for state, (colour, _) in intervals.MARKS.items()}
    assert drawn == [[colours["holds"], colours["undecided"]], [colours["contradicted"]]]
    assert len({*intervals.MARKS.values()}) == 3


def test_draw_leaves_out_an_interval_that_is_not_finite():
    one = Finding(claim="c", citation="1", checks=(check(math.nan, 0.1, above=0.0),))
    (panel,) = intervals.draw([one], "t").axes
    assert [line for line in panel.lines if line.get_marker() == "D"] == []


def test_save_writes_the_same_text_twice(tmp_path: Path):
    first = intervals.save(tmp_path / "a", "x", FINDINGS, "t").read_text()
    assert first == intervals.save(tmp_path / "b", "x", FINDINGS, "t").read_text()
    assert "a is better: undecided" in first  # text, not outlines


def test_every_study_in_docs_has_its_figure_of_claims():
    results = report.load(ROOT / "docs", list(STUDIES))
    for name, result in results.items():
        drawn = intervals.image(ROOT / "docs", name).read_text()
        for claimed in result["findings"]:
            assert claimed.claim.split()[0].replace("&", "&amp;") in drawn, name
        assert use(name).split()[0] in drawn, name


@pytest.mark.parametrize("different", [True, False])
def test_legends_apart_puts_legends_outside_of_panels(different: bool):
    figure, axes = report.figure(2)
    for i, panel in enumerate(axes[0]):
        panel.plot([0, 1], [0, 1], label=f"line {i * different}")
        panel.plot([0, 1], [1, 0], label="other")
        panel.set_xlabel("x")
        panel.legend()
    report.legends_apart(figure)
    figure.canvas.draw()
    legends = [*(panel.get_legend() for panel in axes[0] if panel.get_legend()), *figure.legends]
    assert len(legends) == 1 + different
    for legend in legends:
        assert not any(legend.get_window_extent().overlaps(panel.patch.get_window_extent()) for panel in axes[0])
        assert [text.get_text() for text in legend.get_texts()][1] == "other"


def test_points_groups_settings_and_holds_all_seeds():
    numbers = {name: {"KL": [0.0, 0.2, 4.0]} for name in ("start", "raw, K=1", "raw, K=2", "tail, K=1")}
    figure = comparison.draw(numbers, {"KL": "nats"})
    (panel,) = figure.axes
    assert list(panel.get_yticks()) == pytest.approx([0.0, 1.4, 2.4, 3.8])
    low, high = panel.get_xlim()
    assert low < 0.0
    assert high > 4.0


def test_bars_draw_intervals_within_their_range():
    _, axes = report.figure(1)
    report.bars(axes[0][0], ["g"], {"a": [[0.9, 1.0, 1.0]]}, most=1.0)
    (line,) = axes[0][0].containers[0].lines[2][0].get_segments()
    assert [y for _, y in line] == pytest.approx([0.9667 - 0.1434, 1.0], abs=1e-3)


TABLE = (
    ("setting", "arm", "steps", "sampled accuracy", "KL"),
    ("A", "start", "", "0.3 [0.2, 0.4]", "1.1"),
    ("A", "teacher", "", "0.98 [0.93, 1.03]", ""),
    ("A", "plain", "5", "0.4 [0.3, 0.5]", "0.9"),
    ("B", "plain", "5", "0.05 [-0.02, 0.12]", "2.5"),
    ("B", "other", "5", "0.5 [0.4, 0.6]", "0.4"),
)


def test_shown_takes_columns_with_intervals_and_the_divergence():
    drawn = shown(TABLE)
    assert drawn is not None
    assert drawn.columns == ("sampled accuracy", "KL")
    assert [(one.group, one.name, one.reference) for one in drawn.rows[1:4]] == [
        ("A", "teacher", True),
        ("A", "plain", False),
        ("B", "plain", False),
    ]
    assert drawn.rows[3].values == ((0.05, -0.02, 0.12), (2.5, 2.5, 2.5))
    assert drawn.rows[1].values[1] is None
    assert finding(drawn) == "Highest sampled accuracy: plain (0.4) in A, other (0.5) in B"


def test_shown_is_none_for_tables_of_something_else():
    assert shown(()) is None
    assert shown((("method", "accuracy"), ("a", "0.5 [0.4, 0.6]"))) is None
    assert shown((("setting", "accuracy"), ("a", "0.5"))) is None
    assert shown((("setting", "KL"), ("a", "0.5 [0.4, 0.6]"))) is None


def test_draw_of_numbers_keeps_intervals_of_shares_within_0_and_1():
    drawn = shown(TABLE)
    assert drawn is not None
    accuracy, divergence = numbers.draw(drawn).axes
    ends = [line.get_xdata() for line in accuracy.lines if line.get_marker() == "None" and line.get_linewidth() > 1]
    assert [[float(x) for x in pair] for pair in ends][1:4:2] == [[0.93, 1.0], [0.0, 0.12]]
    assert [one.get_text() for one in accuracy.get_yticklabels()][2:4] == ["A: plain", "B: plain"]
    assert list(accuracy.get_yticks()) == pytest.approx([0.0, 1.0, 2.0, 3.6, 4.6])
    assert divergence.get_xlim()[0] < 0.4
    assert divergence.get_xlim()[1] > 2.5
