"""The page of `opd view` in a real browser: it follows a run at work, and loads long responses by parts."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.browser import Browser, Opened, browsing
from support.run_folders import FakeRun, write
from support.serving import serving

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as found:
        yield found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write(tmp_path / "run", planned=40)


@contextmanager
def opened(browser: Browser, run: Path, *, width: int = 1280) -> Iterator[Opened]:
    with serving(run) as server, browser.open(server.address, width=width) as page:
        yield page


def append(run: Path, first: int, last: int) -> None:
    with (run / "distil" / "metrics.jsonl").open("a") as file:
        for step in range(first, last + 1):
            file.write(json.dumps({"step": step, "train/loss": 1.0, "rollout/length": float(step)}) + "\n")


def test_page_asks_this_server_alone_and_leaves_no_token(browser: Browser, run: Path):
    with opened(browser, run) as page:
        page.until("document.documentElement.dataset.live === 'on'")
        assert "token" not in page.page.url
        assert {request.split("/")[2] for request in page.requests} == {page.page.url.split("/")[2]}
        assert [line for line in page.console if not line.startswith("info")] == []


def test_new_lines_appear_within_three_seconds(browser: Browser, run: Path):
    with opened(browser, run) as page:
        page.until("document.documentElement.dataset.live === 'on'")
        assert "step 20 of 40" in page.text("[data-part=state]")
        started = time.monotonic()
        append(run, 21, 25)
        page.until("document.querySelector('[data-part=state]').textContent.includes('step 25 of 40')")
        assert time.monotonic() - started < 3 * 2  # the machine of the test may be busy


def test_head_follows_the_run(browser: Browser, run: Path):
    with opened(browser, run) as page:
        page.until("document.documentElement.dataset.live === 'on'")
        assert "1 min 00 s of steps" in page.text("[data-part=facts]")
        with (run / "distil" / "timings.jsonl").open("a") as file:
            file.write(json.dumps({"step": 21, "total": 65.0, "peak_memory_gib": 7.0}) + "\n")
        page.until("document.querySelector('[data-part=facts]').textContent.includes('2 min 05 s of steps')")
        assert "7.0 GiB at most" in page.text("[data-part=facts]")


def test_panel_says_that_it_waits_for_responses(browser: Browser, run: Path):
    """The first look at a stage of a real run took seconds on a busy machine, with an empty panel."""
    with opened(browser, run) as page:
        page.until("document.querySelectorAll('.response').length > 0")
        slow = (
            "const own = window.fetch; window.fetch = async (...a) => { await new Promise(r => setTimeout(r, 1500)); "
        )
        page.evaluate(f"(() => {{ {slow} return own(...a); }}; }})()")
        page.page.locator("[data-tab=steps]").click()
        page.until("document.querySelector('[aria-busy=true]')?.textContent.includes('Loading responses')")
        page.until("!document.querySelector('[aria-busy]') && document.querySelectorAll('.response').length > 0")
        assert "Loading" not in page.text("[data-part=panel]")


def test_new_samples_are_offered_and_shown(browser: Browser, run: Path):
    with opened(browser, run) as page:
        page.until("document.documentElement.dataset.live === 'on'")
        samples = run / "distil" / "samples"
        shutil.copy(samples / "step_000020.parquet", samples / "step_000025.parquet")
        append(run, 21, 25)
        page.until("!document.querySelector('#new').hidden")
        assert "Step 25 has responses." in page.text("#new")
        page.page.locator("#new button").click()
        page.until("location.hash.includes('step=25')")
        assert page.count(".response") == 8


def test_next_stage_is_offered_and_opened(browser: Browser, tmp_path: Path):
    run = write(tmp_path / "run", stages=("warm", "distil"), methods={"warm": "sft"}, steps=4, every=2, planned=9)
    stage = run / "distil"
    hidden = stage.rename(tmp_path / "later")
    with opened(browser, run) as page:
        page.until("document.documentElement.dataset.live === 'on'")
        page.page.locator("[data-tab=steps]").click()
        page.until("location.hash.includes('stage=0')")
        hidden.rename(stage)
        page.until("!document.querySelector('#new').hidden")
        assert "Another stage has begun." in page.text("#new")
        page.page.locator("#new button").click()
        page.until("document.querySelector('#stage-1') && !document.querySelector('#stage-1').hidden")
        assert not page.page.locator("#stage-0").is_visible()


def test_resumed_run_is_shown_from_its_checkpoint(browser: Browser, run: Path):
    with opened(browser, run) as page:
        page.until("document.documentElement.dataset.live === 'on'")
        file = run / "distil" / "metrics.jsonl"
        kept = [line for line in file.read_bytes().splitlines(keepends=True) if json.loads(line)["step"] <= 10]
        file.with_suffix(".new").write_bytes(b"".join(kept))
        file.with_suffix(".new").replace(file)
        page.until("document.querySelector('[data-part=state]').textContent.includes('step 10 of 40')")


def test_long_response_is_loaded_by_its_buttons(browser: Browser, tmp_path: Path):
    run = write(tmp_path / "long", FakeRun(tokens=60_000, rows=8, steps=2, every=2, prompts=1))
    with opened(browser, run) as page:
        page.until("document.documentElement.dataset.live === 'on'")
        page.page.locator("[data-tab=steps]").click()
        page.until("location.hash.includes('tab=steps')")
        tokens = "document.querySelector('.response .tokens').querySelectorAll('b').length"
        before = page.evaluate(tokens)
        page.page.locator("button.gap").first.click()
        page.until(f"{tokens} > {before}")
        assert page.evaluate(tokens) <= before + 2048  # some of them were there: a window around a strong token


def test_nothing_is_wider_than_a_phone(browser: Browser, run: Path):
    with opened(browser, run, width=390) as page:
        page.until("document.documentElement.dataset.live === 'on'")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_server_that_ends_is_noticed(browser: Browser, run: Path):
    with serving(run) as server, browser.open(server.address) as page:
        page.until("document.documentElement.dataset.live === 'on'")
        server.shutdown()
        server.server_close()
        page.until("document.documentElement.dataset.live === 'lost'")
        assert "This page shows the run as it was at " in page.text("#lost")
        assert "`opd view` does not answer any more: start it again." in page.text("#lost")


def test_folder_that_is_gone_is_said_until_it_is_back(browser: Browser, run: Path):
    with opened(browser, run) as page:
        page.until("document.documentElement.dataset.live === 'on'")
        away = run.rename(run.with_name("away"))
        page.until("!document.querySelector('#lost').hidden")
        assert "is no run's folder: it has no recipe.yaml." in page.text("#lost")
        away.rename(run)
        page.until("document.querySelector('#lost').hidden")
