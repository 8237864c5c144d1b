"""Writes the page of one run, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opd.errors import ConfigError, nearest
from opd.files import unfit, write_atomically
from opd.messages import visible
from opd.viewer import page
from opd.viewer.compare import compare, content_of, runs_shown
from opd.viewer.content import Options, run_shown, stage_content
from opd.viewer.facts import opened_first
from opd.viewer.read import RunView, StageView, read_run
from opd.viewer.seeds import over_seeds


@dataclass(frozen=True, slots=True)
class Written:
    """A page that was written, its size in bytes, and how many responses with their prompts it holds."""

    path: Path
    size: int
    responses: int


def write_report(
    path: str | Path, out: str | Path | None = None, stage: str | None = None, options: Options | None = None
) -> Written:
    """Write the page of a run's folder to `out`, by default its report.html. `stage`: that one alone.

    Raises:
        RunError: there is no run at `path`, a file of it cannot be read, or the page cannot be written.
        ConfigError: the run has no such stage, or made no step of any.
    """
    run = read_run(path)
    options = options or Options()
    chosen = stages_of(run, stage)
    n = len(chosen)
    share = replace(options, tokens=options.tokens // n, images=options.images // n)
    contents = [stage_content(run, one, share) for one in chosen]
    names = visible(run.name) if len(contents) > 1 else f"{visible(run.name)} / {contents[0].name}"
    text = page.render(names, [run_shown(run, text=options.text)], contents, first=opened_first(chosen))
    file = run.path / "report.html" if out is None else Path(out)
    return written(file, text, sum(content.responses for content in contents))


def write_comparison(
    paths: Sequence[str | Path | RunView],
    out: str | Path | None = None,
    stage: str | None = None,
    by: str = "prompt",
    options: Options | None = None,
    *,
    between: str = "runs",
    against: str | None = None,
) -> Written:
    """Write the page of several runs to `out`, by default compare.html here.

    With `between` recipes or stages it has the tables over seeds above those of the runs; `against` as for
    `over_seeds`. Raises as `compare`, `over_seeds` and `write_report`.
    """
    options = options or Options()
    runs = [path if isinstance(path, RunView) else read_run(path) for path in paths]
    found = compare(runs, stage, by, text=options.text)
    over = None if between == "runs" else over_seeds(runs, between, stage, against, by, text=options.text)
    content = content_of(found, options, over)
    title = " and ".join(f"{side.label}: {side.name}" for side in found.sides)
    text = page.render(title, runs_shown(found, text=options.text), [content])
    return written(Path("compare.html") if out is None else Path(out), text, content.responses)


def stages_of(run: RunView, stage: str | None) -> list[StageView]:
    """The stages of a run that have begun, or the one of this name. Raises ConfigError without any."""
    if not run.stages:
        raise ConfigError(
            f"{run.path} holds no step of any stage yet, so there is nothing to show. Start it with `opd train`, and "
            "call this again after its first step."
        )
    if stage is None:
        return list(run.stages.values())
    if stage not in run.stages:
        raise ConfigError(
            f"The run has no stage {stage!r}; it has {', '.join(run.stages)}.{nearest(stage, run.stages)}"
        )
    return [run.stages[stage]]


def written(file: Path, text: str, responses: int) -> Written:
    """Write a page atomically. Raises RunError if that fails."""
    if reason := unfit(file):
        raise ConfigError(f"{file} {reason}. Give another file with -o.")
    data = text.encode()
    write_atomically(file, data)
    return Written(file, len(data), responses)


def lines_of(found: Sequence[Written]) -> list[str]:
    """What a command says about the pages that it wrote: their size, and what is in them."""
    return [
        f"{one.path}: {one.size / 1e6:.2f} MB, "
        + (f"holds {one.responses} responses and their prompts" if one.responses else "holds no text of responses")
        for one in found
    ]
