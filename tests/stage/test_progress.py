"""The display of a run: what it says when a phase takes long, and the time that is left."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from opd.models.ticks import counted, counting, running
from opd.stage.pace import Pace, spoken
from opd.stage.progress import Progress


def test_long_phase_shows_its_count():
    out = io.StringIO()
    progress = Progress(console=Console(file=out, width=200), longest_silence=0.1)
    with progress:
        progress.phase("distil: held out (before), greedy")
        with counting("responses", 40) as count:
            count.add(12, tokens=1000)
            deadline = time.monotonic() + 30
            while out.getvalue().count("\n") < 2:
                assert time.monotonic() < deadline
                time.sleep(0.02)
    line = r"distil: held out \(before\), greedy: 12/40 responses, [\d,]+ tokens/s, \d+ s so far"
    assert re.fullmatch(line, out.getvalue().splitlines()[0])


def test_short_phases_and_quiet_runs_show_nothing():
    out = io.StringIO()
    with Progress(console=Console(file=out), longest_silence=60) as progress:
        progress.phase("distil: loading teacher")
    with Progress(console=Console(file=out, quiet=True), longest_silence=0.01) as progress:
        progress.phase("distil: loading teacher")
        time.sleep(0.1)
    assert out.getvalue() == ""


def test_count_of_inner_loop_is_shown():
    with counting("responses", 4):
        assert [running() for _ in counted("micro-batches", [1, 2])] == ["0/2 micro-batches", "1/2 micro-batches"]
        assert running() == "0/4 responses"
    assert running() == ""


def test_pace_counts_steps_and_evaluations_to_come():
    pace = Pace(10, lambda done: done % 3 == 0)
    assert pace.left(0) == 0
    pace.recent.extend([1.0, 3.0])
    pace.exam = 50.0
    assert pace.left(2) == 8 * 2.0 + 4 * 50.0  # after 3, 6, 9 and at the end
    assert pace.left(10) == 0


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (720, "12 min"), (12600, "3.5 h")])
def test_spoken(seconds: float, text: str):
    assert spoken(seconds) == text
