"""Images of prompts in the page: small copies in the file, marks in the right place, and what is left out, counted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import Browser, browsing
from support.run_folders import BOX, name_of, write
from support.serving import serving

from opd.viewer.content import Options, stage_content
from opd.viewer.images import copy_in, place_of
from opd.viewer.pack import opened
from opd.viewer.read import Columns, read_run
from opd.viewer.report import write_comparison, write_report

PICTURES = {"pictures": (32, 24), "prompts": 6, "settings": ("greedy",), "correctness": True, "reward": "clicked"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def run(folder) -> Path:
    return write(folder / "run", **PICTURES)


@pytest.fixture(scope="module")
def page(run, folder) -> Path:
    return write_report(run, folder / "page.html").path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as found:
        yield found


def held(run: Path, when: str, *names: str) -> Columns:
    """Columns of the responses of an evaluation."""
    found = read_run(run).stages["distil"].held_out(when, names)
    assert found is not None
    return found


def loaded(found) -> list[int]:
    """The pixels across of each image of the page, 0 for one that is not shown."""
    found.until("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
    return found.evaluate("[...document.images].map(one => one.naturalWidth)")


# --- without a browser -----------------------------------------------------------------------------------------------


def test_block_has_each_copy_once(run):
    stage = read_run(run).stages["distil"]
    content = stage_content(read_run(run), stage)
    head, columns = opened(content.blocks["images"])
    names = [name for name, _ in head["images"]]
    assert len(set(names)) == len(names) == 2 * (6 + 8)  # held out and of the steps, student's and teacher's
    assert content.data["images"] == {"of": 28, "shown": 28, "absent": 0, "whole": True}
    size = head["images"][0][1]
    assert columns["png"][:size].tobytes() == (stage.path / "images" / f"{names[0]}.png").read_bytes()


def test_place_needs_an_answer_in_the_box(run, folder):
    columns = held(run, "before", "box", "answer", "response")
    text = columns.value("response", 0)
    assert place_of(columns, 0) == [float(n) for n in re.findall(r"\d+", text)]
    for change in ("answer", "box"):
        lacking = [name for name in ("box", "answer", "response") if name != change]
        assert place_of(held(run, "before", *lacking), 0) is None


def test_images_beyond_the_budget_are_reduced_and_counted(folder):
    big = write(folder / "big", pictures=(320, 320), prompts=6, settings=("greedy",), steps=5)
    stage = read_run(big).stages["distil"]
    found = stage_content(read_run(big), stage, Options(images=100_000))
    head, columns = opened(found.blocks["images"])
    counts = found.data["images"]
    assert counts["whole"] is False
    assert 0 < counts["shown"] < counts["of"] == 28
    assert len(columns["png"]) <= 100_000
    assert all(size < 30_000 for _, size in head["images"])


def test_page_without_room_for_an_image_counts_all(run):
    found = stage_content(read_run(run), read_run(run).stages["distil"], Options(images=0))
    assert found.data["images"] == {"of": 28, "shown": 0, "absent": 0, "whole": False}
    assert opened(found.blocks["images"])[0]["images"] == []


def test_page_with_many_images_is_below_two_megabytes(folder):
    big = write(folder / "many", pictures=(160, 160), prompts=60, steps=40, every=2, rows=16)
    written = write_report(big, folder / "many.html")
    assert written.size < 2e6


@pytest.mark.parametrize("content", [b"<svg onload='alert(1)'/>", b"", b"\x89PNG\r\n\x1a\n" + b"x" * (1 << 20)])
def test_file_that_is_no_small_png_is_no_copy(tmp_path, content):
    (tmp_path / "images").mkdir()
    name = "0" * 32
    (tmp_path / "images" / f"{name}.png").write_bytes(content)
    assert copy_in(tmp_path, name) is None
    assert copy_in(tmp_path, "../../recipe") is None


def test_page_without_text_has_no_image(run, folder):
    text = write_report(run, folder / "numbers.html", options=Options(text=False)).path.read_text()
    assert "-images" not in re.findall(r'id="b-([\w-]+)"', text)


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_images_are_shown_with_words_and_from_the_file_alone(browser, page):
    with browser.open(page) as found:
        assert loaded(found) == [32] * 12
        assert found.console == []
        assert [request for request in found.requests if not request.startswith("data:")] == [f"file://{page}"]
        first = found.page.locator(".response").first
        assert first.locator("figcaption").all_inner_texts() == ["the student reads", "the teacher reads"]
        alt = first.locator("img").first.get_attribute("alt")
        assert alt.startswith("image that the student reads; target box 3, 4, 11, 12; before: (")
        assert first.locator("img").nth(1).get_attribute("alt") == "image that the teacher reads"


@pytest.mark.browser
def test_places_are_said_and_drawn_where_they_are(browser, page, run):
    places = {}
    for label, when in (("before", "before"), ("teacher", "teacher"), ("after", "step_000020")):
        text = held(run, when, "response").value("response", 0)
        x, y = (int(n) for n in re.findall(r"\d+", text))
        hit = BOX[0] <= x < BOX[2] and BOX[1] <= y < BOX[3]
        places[label] = (x, y, f"{label}: ({x}, {y}) {'inside' if hit else 'outside'} the box")
    with browser.open(page) as found:
        loaded(found)
        first = found.page.locator(".response").first
        said = first.locator(".places").inner_text()
        assert all(text in said for _, _, text in places.values())
        image = first.locator("img").first.bounding_box()
        scale = image["width"] / 32
        assert image["width"] / image["height"] == pytest.approx(32 / 24)
        box = first.locator("svg .target rect").first.bounding_box()
        assert box["x"] - image["x"] == pytest.approx(BOX[0] * scale, abs=3)
        assert box["width"] == pytest.approx((BOX[2] - BOX[0]) * scale, abs=6)
        for shape, label in (("cross", "before"), ("diamond", "teacher"), ("ring", "after")):
            mark = first.locator(f"svg .{shape} path").first.bounding_box()
            assert mark["x"] + mark["width"] / 2 - image["x"] == pytest.approx((places[label][0] + 0.5) * scale, abs=3)
            assert mark["y"] + mark["height"] / 2 - image["y"] == pytest.approx((places[label][1] + 0.5) * scale, abs=3)


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark"), (320, "light")])
def test_page_with_images_is_as_wide_as_the_window(browser, folder, width, scheme):
    wide = folder / f"wide-{width}"
    file = write_report(write(wide, pictures=(640, 90), prompts=2, steps=5), folder / f"{width}.html").path
    for tab in ("held", "steps", "follow"):
        with browser.open(file, f"#tab={tab}", width=width, scheme=scheme) as found:
            assert max(loaded(found)) > 100
            assert found.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.browser
def test_what_is_left_out_is_counted_and_said(browser, run, folder):
    few = write_report(run, folder / "few.html", options=Options(images=2000)).path
    some = write_report(write(folder / "some", copies=2, **PICTURES), folder / "some.html").path
    with browser.open(few) as found:
        says = found.text("[data-part=images]")
        (shown,) = (int(n) for n in re.findall(r"^Images: (\d+) of 28 are in this page", says))
        assert f"{28 - shown} are left out (opd view shows them)." in says
        assert "32 \u00d7 24 pixels: not in this page" in found.text("[data-part=panel]")
    with browser.open(some) as found:
        assert found.text("[data-part=images]") == (
            "Images: 4 of 28 are in this page. The run kept no copy of 24 (samples.images)."
        )


@pytest.mark.browser
def test_comparison_shows_the_images_of_both(browser, folder, run):
    other = write(folder / "other", seed=3, **PICTURES)
    with browser.open(write_comparison([run, other], folder / "both.html").path) as found:
        assert set(loaded(found)) == {32}
        assert "A: (" in found.text(".places")


@pytest.mark.browser
def test_live_page_loads_images_from_its_server(browser, run):
    with serving(run) as server, browser.open(server.address) as found:
        assert set(loaded(found)) == {32}
        assert [line for line in found.console if not line.startswith("info")] == []
        name = name_of("images", 0)
        status = "(async () => (await fetch('{}')).status)()"
        assert found.evaluate(status.format(f"/image/0-{name}")) == 200
        for wrong in (f"/image/0-{'0' * 32}", f"/image/7-{name}", "/image/0-..%2f..%2frecipe", f"/image/0-{name}.png"):
            assert found.evaluate(status.format(wrong)) == 404
