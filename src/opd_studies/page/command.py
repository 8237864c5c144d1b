"""`opd study`: list, run one, or run all and write the pages."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from opd.errors import ConfigError
from opd.files import expanded, write_atomically
from opd_studies import STUDIES, headline, study, use
from opd_studies.lab.lab import Lab
from opd_studies.page import intervals, numbers, report
from opd_studies.page.table import shown

ALONE, ALL = Path("runs/studies"), Path("docs")  # default output folders


def command(name: str | None, every: bool, pages: bool, out: str | None) -> None:
    """List the studies; with a name or --all, run them, print, and write figure, numbers and pages under `out`.

    With `pages`, run none, and write the pages of the results under `out` again. Raises ConfigError for an unknown
    study, options that exclude each other, or a missing matplotlib, before a study runs.
    """
    if name is not None and every:
        raise ConfigError(f"`opd study` got both {name!r} and --all. Name one study, or run all of them.")
    if pages:
        if name is not None or every:
            raise ConfigError(
                f"`opd study` got --pages and {'--all' if every else repr(name)}. --pages runs no study: it writes the "
                "pages of all results again. Leave one of them out."
            )
        for file in write_pages(Path(out) if out is not None else ALL):
            typer.echo(file)
        return
    if name is None and not every:
        width = max(map(len, STUDIES))
        for one in STUDIES:
            typer.echo(f"{one:{width}}  {headline(one)}")
        return
    names = list(STUDIES) if name is None else [name]
    for one in names:
        study(one)
    report.check_drawing()
    folder = expanded(out) if out is not None else ALL if every else ALONE
    lab = Lab(note=lambda text: typer.echo(f"  {text}", err=True))
    for one in names:
        typer.echo(f"{one}: {headline(one)}")
        started = cpu_seconds(lab)
        with report.style():
            outcome = study(one)(lab)
            image = report.save(folder, one, outcome, cpu_seconds(lab) - started, first_sentence(use(one)))
        for line in (*map(report.plain, outcome.findings), *report.aligned(outcome.table), str(image)):
            typer.echo(line)
        write_pages(folder)


def write_pages(folder: Path) -> list[Path]:
    """Write studies.md, and per study a page and figures of its claims and numbers, from the results under `folder`.

    No study runs. Returns the pages' paths. Raises ConfigError without a result or matplotlib, RunError for a damaged
    result or a page that cannot be written.
    """
    results = report.load(folder, list(STUDIES))
    if not results:
        raise ConfigError(
            f"{folder / 'studies'} has no results of a study (NAME.json). Run one first: opd study NAME --out {folder}"
        )
    for name, result in results.items():
        intervals.save(folder, name, result["findings"], first_sentence(use(name)))
        if (drawn := shown(result["table"])) is not None:
            numbers.save(folder, name, drawn)
    headlines, uses = ({name: line(name) for name in results} for line in (headline, use))
    made = report.pages(results, headlines, uses)
    for file, text in made.items():
        write_atomically(folder / file, text)
    return [folder / file for file in made]


def first_sentence(text: str) -> str:
    """The text up to its first full stop: a study's advice as the title of its figures."""
    return text.split(". ")[0].rstrip(".")


def cpu_seconds(lab: Lab) -> float:
    """CPU seconds so far of this process, of its finished child processes, and of the lab's trainings in others.

    The processes of the lab's trainings end with this one, so they are not among the finished.
    """
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system + sum(lab.cpu)
