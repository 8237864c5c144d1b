"""Rows that occur several times: which, with which ids, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opd.data.prompts import load_selected
from opd.errors import ConfigError, DataError
from opd.recipe.load import parse_section
from opd.recipe.schema import DataSection

SHARES = [0.0, 0.25, 1.0, 0.5, 0]


def loaded(folder: Path, rows: list[dict[str, Any]], **section: Any) -> Any:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_selected(parse_section(DataSection, {"path": str(path), **section}, "data"))


def rows() -> list[dict[str, Any]]:
    return [{"prompt": f"p{i}", "pass_rate": share} for i, share in enumerate(SHARES)]


def test_upsample_repeats_rows_within_bounds(tmp_path: Path):
    prompts, reports = loaded(tmp_path, rows(), upsample={"times": 3})
    assert [p.content for p in prompts] == ["p0", "p1", "p2", "p3", "p4", "p1", "p3", "p1", "p3"]
    assert len({p.id for p in prompts}) == 9
    assert [p.id for p in prompts[:5]] == [0, 1, 2, 3, 4]
    assert str(reports[-1]).endswith("2 of 5 rows occur 3 times (pass_rate above 0 and below 1)")


def test_upsample_bounds_may_include_their_ends(tmp_path: Path):
    prompts, _ = loaded(tmp_path, rows(), upsample={"above": 0, "below": 2})
    assert [p.content for p in prompts[5:]] == ["p1", "p2", "p3"]
    prompts, _ = loaded(tmp_path, rows(), upsample={"above": -1, "below": 0.25})
    assert [p.content for p in prompts[5:]] == ["p0", "p4"]


def test_upsample_follows_skip_and_select(tmp_path: Path):
    doubled = [*rows(), {"prompt": "p1", "pass_rate": 0.25}]
    prompts, _ = loaded(tmp_path, doubled, skip=1, select={"distinct": True}, upsample={})
    assert [p.id for p in prompts] == [1, 2, 3, 4, 6, 8]
    assert [p.content for p in prompts[4:]] == ["p1", "p3"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"row 1 has None"),
        ("0.5", r"row 1 has '0\.5'"),
        (True, r"row 1 has True"),
        (1.5, r"row 1 has 1\.5.*opd eval --responses"),
    ],
)
def test_upsample_refuses_row_without_share(tmp_path: Path, value: Any, message: str):
    with pytest.raises(DataError, match=message):
        loaded(tmp_path, [rows()[0], {"prompt": "x", "pass_rate": value}], upsample={})


def test_upsample_refuses_missing_column_and_empty_choice(tmp_path: Path):
    with pytest.raises(DataError, match=r"no such column\. Did you mean 'pass_rate'"):
        loaded(tmp_path, rows(), upsample={"column": "pass_rates"})
    with pytest.raises(DataError, match=r"above 0\.5 and below 0\.9: the values are 0 to 1"):
        loaded(tmp_path, rows(), upsample={"above": 0.5, "below": 0.9})
    with pytest.raises(ConfigError, match=r"above 0\.5 and below 0\.5: there are none"):
        loaded(tmp_path, rows(), upsample={"above": 0.5, "below": 0.5})
