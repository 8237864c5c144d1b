"""Values of metrics that call for a look: which rows a rule reads, when it fires, and the table of the page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opd.evaluation.learned import warnings_of
from opd.evaluation.thresholds import RULES, Rule, fired, markdown

PAGE = Path(__file__).parents[2] / "docs" / "diagnostics.md"


def rows(metric: str, *values: float | None) -> list[dict[str, Any]]:
    return [{"step": i, **({} if value is None else {metric: value})} for i, value in enumerate(values, start=1)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.metric} {rule.window}")
def test_rule_fires_beyond_its_limit_and_not_at_it(rule: Rule):
    beyond = {">": rule.limit + 0.01, "<": rule.limit - 0.01, "abs<": -rule.limit / 2}[rule.op]
    (found,) = fired(rows(rule.metric, *[beyond] * 8))
    assert found.rule is rule
    assert found.value == pytest.approx(beyond)
    assert found.sentence.startswith(f"{rule.metric}: ")
    assert "{" not in found.sentence
    assert fired(rows(rule.metric, *[rule.limit] * 8)) == []
    assert fired([]) == []


def test_fired_reads_first_or_last_rows_that_have_the_metric():
    ends = rows("rollout/cut_share", *[1.0] * 5, None, *[0.0] * 5, None)
    assert fired(ends) == []
    (found,) = fired(ends[::-1])
    assert found.value == 1.0
    (found,) = fired(rows("teacher/log_ratio_p01", None, -30.0, -30.0, -30.0, -30.0, -30.0, 0.0))
    assert "-30.0 nats" in found.sentence
    assert fired(rows("teacher/log_ratio", -0.5, 0.0, 0.0)) == []
    assert [one.value for one in fired(rows("teacher/log_ratio", 0.0, -0.5))] == [0.0]


def test_fired_gives_one_sentence_with_number_and_remedy():
    (found,) = fired(rows("rollout/cut_share", 0.5, *[0.95] * 5))
    assert found.sentence == (
        "rollout/cut_share: 95% of the responses end at the limit. Raise max_completion_length, or lower it to the "
        "depth at which the teacher still helps (opd probe) (docs/diagnostics.md#responses)"
    )
    assert warnings_of(rows("rollout/cut_share", 0.95)) == [found.sentence]


def test_page_has_table_of_rules_and_their_anchors():
    page = PAGE.read_text()
    assert markdown() in page
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert {rule.anchor for rule in RULES} <= anchors
    assert all(f"`{rule.metric}`" in page.replace(markdown(), "") for rule in RULES)


def test_thresholds_import_no_torch():
    code = "import sys, opd.evaluation.thresholds; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
