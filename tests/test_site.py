"""The pages as a site: it builds without a warning, loads nothing from elsewhere, and its search finds a page."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OTHER_HOST = r"""=["']?(?:https?:)?//"""
LOADED = re.compile(rf"<(?:script|img|iframe|source)\b[^>]*\ssrc{OTHER_HOST}|<link\b[^>]*\shref{OTHER_HOST}")


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """What `make site` runs."""
    flags = ["--fail-on-warning", "--keep-going", "--quiet", "-b", "html", "-d", str(out / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *flags, str(source), str(out / "html")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sphinx")
    out = tmp_path_factory.mktemp("site")
    built = build(ROOT / "docs", out)
    assert built.returncode == 0, built.stderr
    return out / "html"


def test_site_has_every_page(site: Path):
    pages = {file.relative_to(ROOT / "docs").with_suffix(".html") for file in (ROOT / "docs").rglob("*.md")}
    assert len(pages) > 50
    assert pages <= {file.relative_to(site) for file in site.rglob("*.html")}


def test_site_loads_nothing_from_elsewhere(site: Path):
    assert LOADED.search('<script async src="https://cdn.example.org/x.js">')
    assert LOADED.search('<link rel="stylesheet" href="//fonts.example.org/css">')
    for file in site.rglob("*.html"):
        assert not LOADED.search(file.read_text()), file
    for file in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//|@import\s+[\"'](https?:)?//", file.read_text()), file


def test_site_refuses_links_without_target(tmp_path: Path):
    pytest.importorskip("sphinx")
    pages = tmp_path / "docs"
    pages.mkdir()
    shutil.copy(ROOT / "docs" / "conf.py", pages)
    (pages / "index.md").write_text("# A\n\n[page](b.md) [anchor](#c)\n")
    built = build(pages, tmp_path / "out")
    assert built.returncode != 0
    assert "b.md" in built.stderr
    assert "'c'" in built.stderr


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of these files, on the loopback."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    handler.func.log_message = lambda *_: None  # pyright: ignore[reportFunctionMemberAccess]
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize(("words", "page"), [("hellinger", "numerics.html"), ("jumps of the weights", "methods.html")])
def test_site_search_finds_page(site: Path, words: str, page: str):
    assert CHROMIUM is not None
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=8000"]
    with served(site) as address:
        command = [CHROMIUM, *flags, "--dump-dom", f"{address}/search.html?q={words.replace(' ', '+')}"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout
    results = shown.partition('id="search-results"')[2]
    assert "Search finished" in results
    assert f'href="{page}' in results
