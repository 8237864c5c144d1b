"""The run's page at the end of a stage. A file of its own: nothing else of a run imports the viewer."""

from __future__ import annotations

from opd.runs.build import Session


def write_page(session: Session) -> None:
    """Write report.html into the run's folder and say where it is; a page that fails is a note, not a failed run."""
    if not session.world.main:
        return
    from opd.viewer.report import lines_of, write_report

    try:
        written = write_report(session.directory.path)
    except Exception as error:  # whatever a page cannot show, the trained model is saved and the run goes on
        session.progress.note(f"report: not written ({type(error).__name__}: {error}). Try `opd report` on the folder.")
        return
    for line in lines_of([written]):
        session.progress.note(f"report: {line}")
