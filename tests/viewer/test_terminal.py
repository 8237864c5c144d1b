"""The screen of `opd watch`: widths, colours and signs, hostile text, and the command on a terminal and on a pipe."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from support.run_folders import FakeRun, write

from opd.commands.watch import watch_run
from opd.errors import ConfigError, RunError
from opd.stage.claim import HOLDER
from opd.viewer.live import Live
from opd.viewer.read import read_again, read_run
from opd.viewer.terminal import marked, spark


def shown(folder: Path, width: int, *, colour: bool = False) -> str:
    console = Console(width=width, force_terminal=colour, color_system="256" if colour else None, no_color=not colour)
    with console.capture() as captured:
        watch_run(folder, stage=None, once=True, console=console)
    return captured.get()


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_screen_fits_its_width(tmp_path: Path, width: int):
    run = write(tmp_path / "run", FakeRun(planned=40, tasks=("sums", "words"), tokens=300))
    progress = {"phase": "train", "done": 3, "of": 8, "eta_seconds": 75, "updated": time.time()}
    (run / "distil" / "progress.json").write_text(json.dumps(progress))
    (run / HOLDER).touch()
    text = shown(run, width)
    assert all(cell_len(line.rstrip()) <= width for line in text.splitlines())
    words = " ".join(text.split())
    assert "fake / distil (reverse_kl) stage 1 of 1 running, step 20 of 40" in words
    assert "held out, sums, greedy, max_words: before" in words
    assert ("█" in text.split("first")[1]) == (width >= 60)


def test_run_that_gave_its_folder_back_has_stopped(tmp_path: Path):
    """A run that ended in an error was `running`, with seconds left, for two minutes."""
    run = write(tmp_path / "run", FakeRun(planned=40))
    file = run / "distil" / "progress.json"
    file.write_text(json.dumps({"phase": "train", "eta_seconds": 75, "updated": time.time()}))
    (run / HOLDER).touch()
    assert "running, step 20 of 40" in shown(run, 100)
    (run / HOLDER).unlink()
    text = shown(run, 100)
    assert "stopped at step 20 of 40" in text
    assert "left" not in text.splitlines()[0]
    assert not any(line.startswith("train") for line in text.splitlines())


def test_killed_run_shows_no_sign_of_life(tmp_path: Path):
    """Its folder stays held, and no time that is left is counted down."""
    run = write(tmp_path / "run", FakeRun(planned=40))
    progress = {"phase": "train", "eta_seconds": 75, "updated": time.time() - 60}
    (run / "distil" / "progress.json").write_text(json.dumps(progress))
    (run / HOLDER).touch()
    text = " ".join(shown(run, 100).split())
    assert "running, step 20 of 40, no sign of life for 1 min 00 s" in text
    assert " left" not in text
    (said,) = Live(run).state()["stages"]
    assert said["says"] == "running, step 20 of 40, train, no sign of life for 1 min 00 s"
    (run / "distil" / "progress.json").write_text(json.dumps(progress | {"updated": time.time() - 121}))
    assert "stopped at step 20 of 40" in shown(run, 100)


def test_finished_run_has_no_bar(tmp_path: Path):
    text = shown(write(tmp_path / "run"), 100)
    assert "finished after 20 steps" in text
    assert "░" not in text


def test_tokens_have_colours_or_signs():
    assert str(marked(" a\n", -2.34, False)) == " a↵[-2.3]"
    assert str(marked("a", 0.99, False)) == "a"
    assert marked("a", 0.1, True).style == ""
    steps = [str(marked("a", value, True).style) for value in (0.2, 0.5, 1.0, 2.0, 4.0)]
    assert len(set(steps)) == 5
    assert steps != [str(marked("a", -value, True).style) for value in (0.2, 0.5, 1.0, 2.0, 4.0)]


def test_control_characters_of_a_response_are_written_out(tmp_path: Path):
    """A response with ESC codes must not paint the terminal, and rich's markup is text."""
    run = write(tmp_path / "run", FakeRun(hostile=("\x1b[31mred\x1b[0m", "[bold]x[/bold]", "\u202eright", "\x07\x9b")))
    text = shown(run, 200)
    assert "\x1b" not in text
    assert not any(character in text for character in "\x07\x9b\u202e")
    assert "\u2039U+001B\u203a" in text


def test_course_is_mean_of_shares_between_least_and_most():
    assert spark([0, 0, 7, 7], 2) == "▁█"
    assert spark([3.0, 3.0], 10) == "▁▁"
    assert spark([1.0, float("nan"), 2.0], 10) == "▁█"
    assert spark([], 10) == spark([1.0], 0) == ""


def test_read_again_reads_new_lines_alone(tmp_path: Path):
    run = read_run(write(tmp_path / "run", planned=40))
    first = run.stages["distil"].metrics[0]
    with (run.path / "distil" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "train/loss": 0.5}\n{"step": 22')
    again = read_again(run)
    assert again.stages["distil"].steps_done == 21
    assert again.stages["distil"].metrics[0] is first


def test_unknown_stage_and_folder_are_refused(tmp_path: Path):
    run = write(tmp_path / "run")
    with pytest.raises(ConfigError, match="The run has no stage 'distill' yet; it has distil"):
        watch_run(run, stage="distill", once=True)
    with pytest.raises(RunError, match=r"is no run's folder"):
        watch_run(tmp_path, stage=None, once=True)


def command(run: Path) -> list[str]:
    return [sys.executable, "-m", "opd", "watch", str(run)]


def test_pipe_gets_one_screen(tmp_path: Path):
    done = subprocess.run(command(write(tmp_path / "run")), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("fake / distil") == 1
    assert "\x1b" not in done.stdout


def test_terminal_is_drawn_again_until_q(tmp_path: Path):
    run = write(tmp_path / "run", planned=40)
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    process = subprocess.Popen(command(run), stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    written = b""

    def read_until(text: bytes) -> None:
        nonlocal written
        end = time.monotonic() + 60
        while text not in written and time.monotonic() < end:
            if select.select([ours], [], [], 0.2)[0]:
                written += os.read(ours, 65536)
        assert text in written

    try:
        read_until(b"step 20 of 40")
        with (run / "distil" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 21, "train/loss": 0.5}\n')
        read_until(b"step 21 of 40")
        os.write(ours, b"q")
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        os.close(ours)
