"""The tables of docs/features.md: each cell has a verdict and a source; the README's table says the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from opd.cli import app
from opd.methods import METHODS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "features.md").read_text()
LIBRARIES = ["opd", "TRL", "ms-swift", "axolotl", "tinker-cookbook", "unsloth"]
HEADER = "| | " + " | ".join(LIBRARIES) + " |"
VERDICT = re.compile(r"(yes|no|part|not found)\b")


def rows(text: str) -> dict[str, list[str]]:
    """The cells, one per library, of every row under a header of the libraries."""
    found: dict[str, list[str]] = {}
    for block in text.split(HEADER + "\n")[1:]:
        for line in block.splitlines()[1:]:
            if not line.startswith("|"):
                break
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            assert name not in found, name
            found[name] = cells
    return found


def verdict(cell: str) -> str:
    """`yes`, `no`, `part` or `not found`, with which a cell begins."""
    match = VERDICT.match(cell.replace("?", "not found", 1) if cell.startswith("?") else cell)
    assert match, cell
    return match[0]


ROWS = rows(PAGE)
SOURCES = dict(re.findall(r"^\[\^([\w-]+)\]: (.+)$", PAGE, re.MULTILINE))


@pytest.mark.parametrize("name", ROWS)
def test_cell_has_verdict_and_source_of_its_library(name: str):
    assert len(ROWS[name]) == len(LIBRARIES)
    for library, cell in zip(LIBRARIES, ROWS[name], strict=True):
        used = re.findall(r"\[\^([\w-]+)\]", cell)
        assert used, f"{library}: {cell}"
        assert name == "Licence" or verdict(cell)
        for source in used:
            assert SOURCES[source].startswith(f"{library}: "), source


def test_sources_are_all_used_and_defined_once():
    body, _, _ = PAGE.partition("\n## Sources\n")
    assert set(re.findall(r"\[\^([\w-]+)\]", body)) == set(SOURCES)
    assert len(re.findall(r"^\[\^", PAGE, re.MULTILINE)) == len(SOURCES)


@pytest.mark.parametrize("name", [one for one in SOURCES if one.startswith("o-")])
def test_source_of_opd_names_files_and_commands(name: str):
    spans = re.findall(r"`([^`]+)`", SOURCES[name])
    assert spans
    for span in spans:
        if span.startswith("opd "):
            assert span.removeprefix("opd ") in get_command(app).commands, span
        else:
            assert (ROOT / span).exists(), span


def test_number_of_methods_is_that_of_the_registry():
    assert ROWS["Methods of papers, by name"][0].startswith(f"yes: {len(METHODS)} methods[")


def test_versions_of_the_libraries_are_stated():
    assert [re.search(rf"^\| {re.escape(one)} \| \d[\d.]+ \|", PAGE, re.MULTILINE) is None for one in LIBRARIES] == [
        False
    ] * len(LIBRARIES)


def test_readme_table_follows_from_the_page():
    """A `?` there is `not found` here; a letter behind `part` is explained under the table."""
    readme = (ROOT / "README.md").read_text()
    if HEADER not in readme:
        pytest.skip("the README has no table of features")
    short = rows(readme)
    assert 1 <= len(short) <= 12
    letters = re.findall(r"\bpart ([a-z])\b", "\n".join("|".join(cells) for cells in short.values()))
    notes = dict(re.findall(r"\b([a-z]): ([^;]+?)[;.]", readme.split(HEADER)[1].split("\n\n")[1]))
    assert set(letters) == set(notes)
    for name, cells in short.items():
        for library, cell, full in zip(LIBRARIES, cells, ROWS[name], strict=True):
            assert verdict(cell) == verdict(full), f"{name}, {library}"
            if letter := re.match(r"part ([a-z])$", cell):
                assert full.startswith(f"part: {notes[letter[1]]}["), f"{name}, {library}"
