"""`opd study`: list, run one, or run all and write the pages."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from opd.errors import ConfigError
from opd.files import expanded, write_atomically
from opd_studies import STUDIES, headline, study, use
from opd_studies.lab.lab import Lab
from opd_studies.page import report

ALONE, ALL = Path("runs/studies"), Path("docs")  # default output folders


def command(name: str | None, every: bool, out: str | None) -> None:
    """List the studies; with a name or --all, run them, print, and write figure, numbers and pages under `out`.

    Raises ConfigError for an unknown study, a name together with --all, or a missing matplotlib, before a study runs.
    """
    if name is not None and every:
        raise ConfigError(f"`opd study` got both {name!r} and --all. Name one study, or run all of them.")
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
            image = report.save(folder, one, outcome, cpu_seconds(lab) - started)
        for line in (*map(report.plain, outcome.findings), *report.aligned(outcome.table), str(image)):
            typer.echo(line)
        write_pages(folder)


def write_pages(folder: Path) -> None:
    """Write studies.md and one page per study from the results under `folder`, without running a study.
    Raises RunError for a damaged result or a page that cannot be written.
    """
    results = report.load(folder, list(STUDIES))
    headlines, uses = ({name: line(name) for name in results} for line in (headline, use))
    for file, text in report.pages(results, headlines, uses).items():
        write_atomically(folder / file, text)


def cpu_seconds(lab: Lab) -> float:
    """CPU seconds so far of this process, of its finished child processes, and of the lab's trainings in others.

    The processes of the lab's trainings end with this one, so they are not among the finished.
    """
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system + sum(lab.cpu)
