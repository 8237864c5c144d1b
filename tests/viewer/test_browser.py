"""The page in a real browser, from a file: what it asks for, what it shows, its keys, and hostile text."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.browser import Browser, axe, browsing
from support.run_folders import write

from opd.messages import visible
from opd.viewer.content import Options
from opd.viewer.read import StageView, read_run
from opd.viewer.report import write_comparison, write_report

pytestmark = pytest.mark.browser

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "{{ 7 * 7 }}",
    "\u202eright to left\u202c\u200bzero",
    "\x1b[31mred\x00\x07",
    "' onmouseover='x' \"",
    "&lt;b&gt; &amp;amp;",
    "x" * 100_000,
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def page(folder) -> Path:
    """The page of a run like the quickstart."""
    return write_report(write(folder / "run", steps=20, prompts=30), folder / "run.html").path


@pytest.fixture(scope="module")
def stage(folder, page) -> StageView:
    return read_run(folder / "run").stages["distil"]


@pytest.fixture(scope="module")
def hostile(folder) -> Path:
    run = write(folder / "hostile", hostile=HOSTILE, name=HOSTILE[0], description=HOSTILE[1], prompts=8, tokens=30)
    return write_report(run, folder / "hostile.html").path


@pytest.fixture(scope="module")
def two_tokenizers(folder) -> Path:
    run = write(folder / "units", units=True, turns=True, reward="exact", correctness=True)
    return write_report(run, folder / "units.html").path


@pytest.fixture(scope="module")
def tasks(folder) -> Path:
    run = write(
        folder / "tasks",
        tasks=("alpha", "beta"),
        shares=False,
        stages=("warm", "distil"),
        reward="points",
        methods={"warm": "sft"},
    )
    return write_report(run, folder / "tasks.html").path


@pytest.fixture(scope="module")
def pictures(folder) -> Path:
    return write_report(
        write(folder / "pictures", pictures=(32, 24), prompts=4, steps=5), folder / "pictures.html"
    ).path


def test_page_asks_for_nothing_and_says_nothing(browser, page, tasks, two_tokenizers, hostile):
    for file in (page, tasks, two_tokenizers, hostile):
        with browser.open(file) as found:
            found.page.mouse.wheel(0, 3000)
            assert found.console == []
            assert found.requests == [f"file://{file}"]


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_page_is_as_wide_as_the_window(browser, page, tasks, hostile, width):
    for file in (page, tasks, hostile):
        with browser.open(file, width=width) as found:
            assert found.evaluate("document.documentElement.scrollWidth") <= width


def test_long_compared_text_wraps(browser, folder):
    """`exact` compares the whole response: without a space in it a page of 390 pixels was 2,003 wide."""
    run = write(folder / "compared", reward="exact", correctness=True, extracted="x" * 600, steps=5, prompts=4)
    with browser.open(write_report(run, folder / "compared.html").path, width=390) as found:
        assert "compared: xxx" in found.text(".response")
        assert found.evaluate("document.documentElement.scrollWidth") <= 390


def test_keys_do_nothing_on_a_page_without_text(browser, folder, page):
    """`c` was a TypeError of the script."""
    file = write_report(folder / "run", folder / "numbers.html", options=Options(text=False)).path
    with browser.open(file) as found:
        found.key("j", "k", "n", "p", "[", "]", "c", "/", "ArrowRight")
        assert found.count(".response") == 0
        found.page.wait_for_timeout(100)
        assert found.console == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser, page, two_tokenizers, tasks, pictures, scheme):
    source = axe()
    if source is None:
        pytest.skip("no axe-core: name its axe.min.js, of npm's package axe-core, in AXE")
    for file in (page, two_tokenizers, tasks, pictures):
        with browser.open(file, scheme=scheme) as found:
            session = found.page.context.new_cdp_session(found.page)
            session.send("Runtime.evaluate", {"expression": source})
            run = "axe.run(document, {resultTypes: ['violations']}).then(r => JSON.stringify(r.violations))"
            answer = session.send("Runtime.evaluate", {"expression": run, "awaitPromise": True, "returnByValue": True})
            violations = json.loads(answer["result"]["value"])
            said = [(one["id"], one["nodes"][0]["html"][:200], one["nodes"][0]["failureSummary"]) for one in violations]
            assert said == []


def test_hostile_text_stays_text(browser, hostile):
    with browser.open(hostile) as found:
        assert found.page.title().startswith("</script><script>document.title=")
        assert found.count("img") == 0
        assert found.evaluate("document.scripts.length") == 2 + found.count("script[type='text/plain']")
        body = found.text("main")
        for text in HOSTILE[:3] + HOSTILE[5:7]:
            assert text in body
        assert "\u2039U+202E\u203aright to left" in body
        assert "\u2039U+001B\u203a[31mred\u2039U+0000\u203a" in body
        assert not set(body) & set("\u202e\u200b\x1b\x00")
        found.hover(found.page.locator(".tokens b").first)
        assert found.page.title().startswith("</script>")


def test_hostile_prompt_of_100k_characters_is_shortened(browser, hostile):
    with browser.open(hostile) as found:
        lengths = found.page.locator(".prompt").evaluate_all("all => all.map(one => one.textContent.length)")
        assert max(lengths) < 7000
        assert "characters left out" in found.text("main")


def rewards(stage, when):
    rows = stage.held_out(when, ["reward", "finished"])
    return rows.values("reward"), rows.values("finished")


def test_filters_count_what_the_files_hold(browser, page, stage):
    (before, _), (taught, _), (after, ended) = (rewards(stage, w) for w in ("before", "teacher", "step_000020"))
    pairs = list(zip(before, taught, after, ended, strict=True))
    expected = {
        "all": len(pairs),
        "up": sum(a == 0 and c == 1 for a, _, c, _ in pairs),
        "down": sum(a == 1 and c == 0 for a, _, c, _ in pairs),
        "low": sum(a == 0 and c == 0 for a, _, c, _ in pairs),
        "gap": sum(b == 1 and c == 0 for _, b, c, _ in pairs),
        "cut": sum(not e for *_, e in pairs),
    }
    with browser.open(page) as found:
        for name, count in expected.items():
            if count:
                assert found.text(f"[data-filter={name}]").endswith(f"({count})")
        assert found.text("[data-filter=up]").startswith("max_words 0 \u2192 1")
        found.page.click("[data-filter=up]")
        found.page.click("button.more") if found.count("button.more") else None
        assert found.count(".response") == expected["up"]


def test_filters_of_other_rewards_are_better_and_worse(browser, tasks, folder):
    stage = read_run(folder / "tasks").stages["distil"]
    (before, _), (after, _) = (rewards(stage, when) for when in ("before", "step_000020"))
    better = sum(round(b, 5) - round(a, 5) >= 0.1 for a, b in zip(before, after, strict=True))
    with browser.open(tasks, "#stage=1") as found:
        assert found.text("#stage-1 [data-filter=up]") == f"points better by \u2265 0.1 ({better})"


def test_correctness_is_named_where_it_is_declared(browser, two_tokenizers, page):
    with browser.open(two_tokenizers) as found:
        assert found.text("[data-filter=up]").startswith("wrong \u2192 right")
        assert re.search(r"(right|wrong) \(exact: [01]\)", found.text("[data-part=panel]"))
    with browser.open(page) as found:
        for part in ("result", "responses"):
            assert not re.search(r"\b(right|wrong)\b", found.text(f"[data-part={part}]"))


def test_card_shows_the_row_of_the_file(browser, page, stage):
    rows = stage.samples(20)
    place = rows.values("prompt_id").index(1000)
    with browser.open(page, "#tab=steps&step=20") as found:
        found.hover(found.page.locator(".response").first.locator(".tokens b").nth(1))
        card = found.text("#card")
        p, q = rows.numbers("policy_logp", place)[1], rows.numbers("teacher_logp", place)[1]
        assert json.dumps(visible(rows.value("response_tokens", place)[1]), ensure_ascii=False) in card
        assert f"position\t1 of {len(rows.value('response_ids', place))}, id" in card
        assert re.search(rf"log p \(student\)\t{p:.2f}\s", card) or abs(p) < 0.01
        assert f"{round(q, 2) + 0.0:.2f}" in card
        assert f"signal\t{rows.value('signal', place)[1]:.2f}" in card
        assert f"rank under the teacher\t{rows.value('teacher_rank', place)[1] + 1}" in card
        for text in rows.value("teacher_top_tokens", place)[1]:
            assert json.dumps(text, ensure_ascii=False) in card


def test_card_is_the_same_by_key_and_leaves(browser, page):
    with browser.open(page) as found:
        found.hover(found.page.locator(".tokens b").nth(2))
        hovered = found.text("#card")
        found.page.mouse.move(0, 0)
        assert not found.page.locator("#card").is_visible()
        found.page.locator(".tokens").first.focus()
        found.key("ArrowRight", "ArrowRight", "ArrowRight")
        assert found.text("#card") == hovered
        assert found.text("#live")
        box = found.page.locator("#card").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 1280
        found.key("Escape")
        assert not found.page.locator("#card").is_visible()


def test_keys_move_through_responses_steps_and_colours(browser, page):
    with browser.open(page, "#tab=steps&step=10") as found:
        found.key("j", "j")
        assert found.page.locator(".response").nth(1).get_attribute("aria-current") == "true"
        found.key("k")
        assert found.page.locator(".response").nth(0).get_attribute("aria-current") == "true"
        found.key("]")
        found.until("location.hash.includes('step=15')")
        found.key("c")
        found.until("location.hash.includes('colour=signal')")
        found.key("/")
        assert found.evaluate("document.activeElement.id") == "find-0"
        found.key("t")
        assert found.evaluate("document.documentElement.dataset.theme") == "light"  # a letter of the field
        found.key("Escape")
        found.page.locator("h1").click()
        found.key("t")
        assert found.evaluate("document.documentElement.dataset.theme") == "dark"
        found.key("?")
        assert found.page.locator("#keys").is_visible()


def test_next_strong_token_is_at_least_one_nat(browser, page):
    with browser.open(page, "#tab=steps&step=5") as found:
        found.page.locator(".tokens").first.focus()
        found.key("Home", "n")
        value = re.search(r"log q \u2212 log p\t(-?[\d.]+)", found.text("#card"))
        assert value is not None
        assert abs(float(value[1])) >= 1


def test_keys_are_off_on_request(browser, page):
    with browser.open(f"file://{page}?keys=off") as found:
        found.key("t", "j")
        assert found.evaluate("document.documentElement.dataset.theme") == "light"
        assert found.count("[aria-current=true]") == 0


def test_click_on_curve_shows_responses_of_the_step(browser, page):
    with browser.open(page) as found:
        over = found.page.locator(".chart", has=found.page.get_by_text("Loss", exact=True)).locator(".u-over")
        box = over.bounding_box()
        over.click(position={"x": box["width"] * 0.5, "y": 40})
        found.until("location.hash.includes('tab=steps')")
        assert "step=10" in found.evaluate("location.hash")
        assert "10: 8 of 8 responses" in found.text("[data-part=filters]")


def test_curve_is_read_by_keys_and_as_a_table(browser, page, stage):
    losses = [row["train/loss"] for row in stage.metrics if "train/loss" in row]
    with browser.open(page) as found:
        chart = found.page.locator(".chart", has=found.page.get_by_text("Loss", exact=True))
        over = chart.locator(".u-over")
        assert over.get_attribute("aria-label").startswith("Loss. loss from ")
        over.focus()
        found.key("Home")
        found.until("document.querySelector('#live').textContent !== ''")
        assert found.text("#live").startswith("Loss, step 1: ")
        chart.get_by_role("button").click()
        cells = chart.locator("td").all_inner_texts()
        assert [float(cell) for cell in cells[:4]] == pytest.approx(
            [losses[0], min(losses), max(losses), losses[-1]], rel=1e-3
        )


def test_address_opens_the_same_view(browser, page):
    with browser.open(page) as found:
        found.page.click("[data-tab=steps]")
        found.key("[")
        found.until("location.hash.includes('step=15')")
        found.page.select_option("[data-part=colour]", "logq")
        found.page.fill("[id=find-0]", "the")
        found.until("location.hash.includes('find=the')")
        found.until("location.hash.includes('colour=logq')")
        shown, address = found.text("[data-part=panel]"), found.evaluate("location.hash")
    with browser.open(page, address) as again:
        assert again.text("[data-part=panel]") == shown
        assert again.evaluate("location.hash") == address


def test_find_reads_prompts_and_responses(browser, page):
    with browser.open(page) as found:
        found.page.fill("[id=find-0]", "7 plus 7?")
        assert found.count(".response") == 2  # in two settings
        found.page.fill("[id=find-0]", "no such text")
        assert found.text("[data-part=panel]") == "No response is like that."


def test_stage_tabs_show_one_stage(browser, tasks):
    with browser.open(tasks) as found:
        assert found.page.locator("#stage-1").is_visible()
        assert not found.page.locator("#stage-0").is_visible()
        found.page.click("#stage-tab-0")
        found.page.wait_for_selector("#stage-0 .response")
        assert not found.page.locator("#stage-1").is_visible()
        assert found.page.locator("#stage-0 .chart canvas").count() > 5


def test_page_opens_on_the_last_stage_that_is_no_warm_up(browser, tasks):
    run = read_run(tasks.parent / "tasks")
    assert list(run.stages) == ["warm", "distil"]
    with browser.open(tasks) as found:
        assert not found.page.locator("#stage-0").is_visible()
        assert found.page.locator("#stage-tab-1").get_attribute("aria-selected") == "true"
        found.page.click("#stage-tab-0")
        found.until("location.hash.includes('stage=0')")
        address = found.evaluate("location.hash")
    with browser.open(tasks, address) as again:  # the address says another one
        assert again.page.locator("#stage-0").is_visible()


def test_runs_of_one_name_are_named_apart(browser, folder):
    one, two = write(folder / "first", prompts=4), write(folder / "second", prompts=4, seed=7)
    with browser.open(write_comparison([one, two], folder / "names.html").path) as found:
        assert found.text("h1") == "A: fake (seed 0) and B: fake (seed 7)"
        assert "fake (seed 7)" in found.text("dl.names")


def test_same_prompt_over_time_has_every_step(browser, page):
    with browser.open(page, "#tab=follow") as found:
        assert found.count(".response") == 2
        heads = found.page.locator(".response").first.locator("h3").all_inner_texts()
        assert [head.split()[1] for head in heads] == ["5", "10", "15", "20"]


def test_what_they_read_marks_the_difference(browser, page):
    with browser.open(page) as found:
        first = found.page.locator(".response").first
        first.locator("summary").click()
        assert first.locator("ins").all_inner_texts() == ["<|system|>Answer in a few words.<|end|>"]
        assert first.locator("del").count() == 0


def test_units_turns_and_untrained_tokens_are_shown(browser, two_tokenizers):
    with browser.open(two_tokenizers, "#tab=steps&step=20") as found:
        long = found.page.locator(".tokens", has=found.page.get_by_text("turn 2")).first
        turns = long.locator(".turn").count()
        assert long.locator(".unit").count() > 1
        assert long.locator(".heard").count() == turns - 1
        assert long.locator("b.untrained").count() == turns - 1
        said = long.locator(".turn").all_inner_texts()
        assert said[0].startswith("turn 1")
        assert said[1].startswith("turn 2")
        assert "environment, error" in said[1]  # of the call in turn 1
        assert "error" not in "".join(said[2:])
        assert f"turn {turns}, reward 1" in said[-1]
        found.hover(long.locator("b.untrained").first)
        card = found.text("#card")
        assert "trained\tno: written by the environment" in card
        assert "turn\t2" in card
        assert "the teacher's tokens" in card


def test_conversation_says_its_turns_errors_and_end(browser, two_tokenizers):
    with browser.open(two_tokenizers, "#tab=steps&step=20") as found:
        about = found.page.locator(".response .about").all_inner_texts()
        assert all(re.search(r"\d turns?, (\d+ tokens? of the environment, )?1 error", text) for text in about)
        cut = [text for text in about if "ended by the limit of turns" in text]
        assert len(cut) == sum("finished" not in text for text in about)
        assert found.text("[data-filter=failed]") == "an error in a turn (8)"


def blank(file: Path, rows: list[int] | None = None) -> None:
    """Remove the teacher's log-probs of some rows of a file of responses, by default of all."""
    table = pq.read_table(file)
    at = table.schema.get_field_index("teacher_logp")
    kept = [None if rows is None or i in rows else one for i, one in enumerate(table["teacher_logp"].to_pylist())]
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(kept, table.schema.field(at).type)), file)


def test_rows_without_colour_say_why(browser, folder):
    run = write(folder / "plain", prompts=6, every=20, settings=("greedy",), extra={"samples": {"held_out": 2}})
    for file, rows in (("before", [2, 3, 4]), ("teacher", [3, 4]), ("step_000020", [3, 4])):
        blank(run / "distil" / f"held_out_{file}.parquet", rows)
    some = "(samples.held_out: 2 of each setting)."
    with browser.open(write_report(run, folder / "plain.html").path) as found:
        said = [one.locator(".plain").all_inner_texts() for one in found.page.locator(".response").all()]
        assert said[:2] == [[], []]
        assert said[2] == [f"Not coloured: the teacher did not score this response {some}"]
        assert said[3:5] == [[f"Not coloured: the teacher did not score these responses {some}"]] * 2
        assert found.text("[data-part=why]") == ""


def test_stage_without_teacher_says_why_it_has_no_colour(browser, folder):
    run = write(folder / "alone", prompts=2, steps=5, extra={"teacher": None})
    stage = run / "distil"
    keys = json.loads((stage / "keys.json").read_text())
    (stage / "keys.json").write_text(json.dumps(keys | {"teacher": None}))
    for file in [*stage.glob("*.parquet"), *stage.glob("samples/*.parquet")]:
        blank(file)
    with browser.open(write_report(run, folder / "alone.html").path) as found:
        assert found.text("[data-part=why]") == "No log q \u2212 log p: the stage has no teacher."
        assert found.count(".plain") == 0


def test_page_without_script_has_table_and_curves(browser, page):
    with browser.open(page, script=False) as found:
        assert found.count("table.held tbody tr") > 5
        assert found.count(".dots svg circle") == 6
        assert found.count("noscript svg path") >= 4
        assert not found.page.locator("[data-part=responses]").is_visible()


def test_old_run_opens_and_says_what_is_off(browser, folder):
    file = write_report(write(folder / "old", old=True), folder / "old.html").path
    with browser.open(file, "#tab=steps&step=20") as found:
        assert found.console == []
        assert "written by an earlier version" in found.text("[data-part=responses]")
        assert found.page.locator("[data-part=colour] option").all_inner_texts() == [
            *("log q \u2212 log p", "\u2212log p (student's surprise)", "\u2212log q (teacher's surprise)", "none"),
        ]


def test_comparison_filters_rows_where_runs_disagree(browser, folder):
    one, two = write(folder / "one", prompts=30), write(folder / "two", prompts=30, seed=1)
    (a, _), (b, _) = (rewards(read_run(run).stages["distil"], "step_000020") for run in (one, two))
    only = sum(x == 1 and y == 0 for x, y in zip(a, b, strict=True))
    with browser.open(write_comparison([one, two], folder / "two.html").path) as found:
        assert found.console == []
        assert found.text("[data-filter=down]") == f"only A max_words 1 ({only})"
        found.page.click("[data-filter=down]")
        assert found.page.locator(".response").first.locator(".column").count() == 2
        assert "seed" in found.text("table.keys")


def test_long_response_counts_what_is_left_out(browser, folder):
    run = write(folder / "long", steps=5, rows=2, tokens=9000, prompts=1, settings=("greedy",))
    from opd.viewer.content import Options

    file = write_report(run, folder / "long.html", options=Options(tokens=4000)).path
    with browser.open(file, "#tab=steps&step=5") as found:
        shown = found.page.locator(".response .tokens").first
        gaps = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) tokens left out", shown.inner_text())]
        assert sum(gaps) + shown.locator("b").count() == 9000


def test_page_is_ready_in_two_seconds(browser, page):
    with browser.open(page) as found:
        timing = found.evaluate("performance.now()")
    start = time.perf_counter()
    with browser.open(page):
        took = time.perf_counter() - start
    print(f"ready after {took:.2f} s (the page's own clock: {timing / 1000:.2f} s)")
    assert took < 10  # 0.7 s on a quiet machine
