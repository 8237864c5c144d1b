"""Results of studies: their folder, the pages made from them, and the style of their figures. No torch here."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.errors import ConfigError, RunError
from opd.files import refused, write_atomically
from opd_studies.page.not_studied import NOT_STUDIED
from opd_studies.page.outcome import VERDICTS, Finding, Outcome, as_record, from_record, over_seeds
from opd_studies.page.table import finding, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#1b6ca8", "#d1603d", "#7a9e3f", "#8a5a9e", "#4c9f9a", "#999999", "#0d3b5c")


STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}


# Studies whose own figure has the rows that the figure of the table has.
REDRAWN = ("brts", "copd", "debate", "losses", "one_token", "simct", "sparse_to_dense", "supports", "top_p")

INTRODUCTION = """# Studies

Claims of papers, rerun on small models or tables. `opd study` makes this page from the results in `docs/studies`. A
study's page has its setting, the measured numbers with 95 % intervals over seeds (Student's t), a table and a figure.
`opd study NAME` runs one study again.

## What to do with them
"""


RULES = """## Claims

Each verdict follows from a threshold in the study's file, printed beside the number on the study's page. A number
agrees with the claim if its whole interval is on the claim's side of the threshold, and contradicts it if the whole
interval is on the other side. If a study has two settings, A is the paper's own or the nearest to it, and B is another
one in which the effect should be easier to see.

| verdict | meaning |
|---|---|
| holds | every number agrees with the claim, in B too if there is a B |
| holds in A only, holds in B only | every number of that setting agrees, and of the other one not every number |
| contradicted | it holds in no setting, and a number of A contradicts it at this scale |
| undecided | it holds in no setting, and no number of A contradicts it: the intervals are too wide |

An interval of no width at the end of a range, such as two accuracies that are 0 on every seed, is undecided: the
number can go no further there, so it shows neither an effect nor its absence. Such a number is marked.

Not everything was fixed before the first results. In `gamma` and `estimators` thresholds were changed after them, in
`two_teachers` they were set after seed 0; the other studies kept theirs. Some second settings were added, and some
claims split in two, after the results of the first setting: in `estimators`, `losses`, `one_token`, `supports`,
`special_tokens`, `cold_start`, `teacher_choice`, `reverse`, `length`, `two_teachers`, `anti_sd` and `ropd`. In `prune`
two seeds were added after the first three, and two settings without a claim of their own were dropped (weights alone,
the budget in setting B); in `extrapolation` two seeds were added. In `simct` two pairs of tokenizers were tried before.
In `ropd` a rule of the judge was changed, and the number of tasks of its tables was doubled. In `visd` the world, one
threshold and one control were chosen after trials on seeds that are not reported. In `stale` the settings and controls
were chosen after such trials; the eighth of the learning rate was added after three seeds, and its comparison with
reverse KL at the same rate after all. Sizes and learning rates were mostly chosen on seed 0.
"""


def figure(columns: int, rows: int = 1, *, width: float = 3.2, height: float = 2.8) -> tuple[Figure, Any]:
    """A figure and its axes, an array [rows, columns]; `width` and `height` of a panel in inches.

    Raises ConfigError when matplotlib is not installed.
    """
    check_drawing()
    from matplotlib.figure import Figure

    made = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=220)
    return made, made.subplots(rows, columns, squeeze=False)


@contextlib.contextmanager
def style() -> Iterator[None]:
    """A context manager with the studies' figure style. Raises ConfigError when matplotlib is not installed."""
    check_drawing()
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        yield


def check_drawing() -> None:
    """Raise ConfigError when matplotlib is missing, before a study runs for minutes."""
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ConfigError(
            f"Studies draw figures with matplotlib, which is not installed ({error}). "
            "Install it with `pip install 'opd[studies]'`."
        ) from error


def bars(
    panel: Any,
    groups: Sequence[str],
    by_colour: Mapping[str, Sequence[Sequence[float]]],
    most: float = math.inf,
) -> None:
    """Draw bars side by side in each group: means and 95 % intervals over seeds. Raises as `over_seeds` does.

    The numbers are at least 0 and at most `most`, and the intervals are drawn within this range.
    """
    width = 0.8 / len(by_colour)
    for i, (label, values) in enumerate(by_colour.items()):
        intervals = [over_seeds(one) for one in values]
        panel.bar(
            [place + width * (i - (len(by_colour) - 1) / 2) for place in range(len(groups))],
            [one.mean for one in intervals],
            width,
            yerr=[
                [one.mean - max(one.low, 0.0) for one in intervals],
                [min(one.high, most) - one.mean for one in intervals],
            ],
            color=COLOURS[i],
            label=label,
            capsize=1.5,
            error_kw={"linewidth": 0.8},
        )
    panel.set_xticks(range(len(groups)), groups, fontsize=7)


def courses(panel: Any, by_name: Mapping[str, Sequence[Mapping[int, Mapping[str, float]]]], part: str) -> None:
    """Draw a number by update, the mean and the range over seeds; by name, one course of numbers per seed."""
    for (name, seeds), colour in zip(by_name.items(), COLOURS, strict=False):
        updates = sorted(seeds[0])
        by_update = [[course[update][part] for course in seeds] for update in updates]
        panel.plot(updates, [sum(v) / len(v) for v in by_update], color=colour, label=name)
        panel.fill_between(updates, [min(v) for v in by_update], [max(v) for v in by_update], color=colour, alpha=0.15)


def legends_apart(figure: Figure) -> None:
    """Take every legend out of its panel, where it would cover a curve: below the figure, or below its own panel."""
    from matplotlib.transforms import offset_copy

    found = [(panel, legend) for panel in figure.axes if (legend := panel.get_legend()) is not None]
    kinds = {tuple(text.get_text() for text in legend.get_texts()) for _, legend in found}
    for i, (panel, legend) in enumerate(found):
        labels, title = [text.get_text() for text in legend.get_texts()], legend.get_title().get_text() or None
        style: dict[str, Any] = {"handles": legend.legend_handles, "labels": labels, "title": title, "fontsize": 7}
        legend.remove()
        if len(kinds) == 1 and i == 0:
            figure.legend(**style, loc="outside lower center", ncols=min(4, len(labels)))
        elif len(kinds) > 1:
            down = -36 - 11 * panel.get_xlabel().count("\n")
            below = offset_copy(panel.transAxes, figure, x=0, y=down, units="points")
            panel.legend(**style, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, ncols=2)


def save(folder: Path, name: str, outcome: Outcome, seconds: float, title: str = "") -> Path:
    """Write figures/studies/NAME.png and studies/NAME.json under `folder`; returns the figure's path.

    `seconds`: CPU seconds of all cores, which other work on the machine does not increase. `title`: the study's
    finding, above the figure. Raises RunError when they cannot be written.
    """
    image, numbers = paths(folder, name)
    legends_apart(outcome.figure)
    if title:
        wide = int(outcome.figure.get_figwidth() * 13)  # characters of a line
        outcome.figure.suptitle(textwrap.fill(title.replace("`", ""), wide), fontsize=10, fontweight="bold")
    result = {
        "setup": outcome.setup,
        "cpu_seconds": round(seconds),
        "findings": [as_record(one) for one in outcome.findings],
        "table": outcome.table,
        "environment": {"torch": _version("torch"), "python": platform.python_version()},
    }
    try:
        image.parent.mkdir(parents=True, exist_ok=True)
        numbers.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refused(folder, error) from error
    write_atomically(image, lambda part: outcome.figure.savefig(part, format="png", metadata={"Software": None}))
    write_atomically(numbers, json.dumps(result, indent=1) + "\n")
    return image


def load(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The results of the studies in `names` that have run, in order, with their `Finding`s.

    Raises RunError for a file that is damaged or of an earlier version.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        _, file = paths(folder, name)
        if not file.exists():
            continue
        try:
            result = json.loads(file.read_text())
            found[name] = {**result, "findings": [from_record(record) for record in result["findings"]]}
        except (OSError, ValueError) as error:
            raise RunError(f"{file} cannot be read ({error}). Run `opd study {name}` again.") from error
        except (AssertionError, AttributeError, KeyError, TypeError) as error:
            raise RunError(
                f"{file} has findings without the numbers that a verdict is computed from ({error!r}): an earlier "
                f"version wrote it. Run `opd study {name}` again."
            ) from error
    return found


def paths(folder: Path, name: str) -> tuple[Path, Path]:
    """The paths of a study's figure and numbers under `folder`."""
    return folder / "figures" / "studies" / f"{name}.png", folder / "studies" / f"{name}.json"


def pages(
    results: Mapping[str, Mapping[str, Any]], headlines: Mapping[str, str], uses: Mapping[str, str]
) -> dict[str, str]:
    """The Markdown of all results, by file under the folder of results: studies.md, and studies/NAME.md for each."""
    made = {f"studies/{name}.md": page(name, result, headlines[name], uses[name]) for name, result in results.items()}
    return {"studies.md": index(results, uses), **made}


def index(results: Mapping[str, Mapping[str, Any]], uses: Mapping[str, str]) -> str:
    """The page of all studies: a table of their advice, and a table of all claims with verdicts."""
    lines = [INTRODUCTION, "| study | what you do with it |", "|---|---|"]
    lines += [row((f"[{name}](studies/{name}.md)", uses[name])) for name in results]
    lines += ["", RULES, how_many([one.verdict for result in results.values() for one in result["findings"]]), ""]
    lines += ["| study | claim | source | verdict |", "|---|---|---|---|"]
    for name, result in results.items():
        for one in result["findings"]:
            lines.append(row((f"[{name}](studies/{name}.md)", one.claim, one.citation, f"**{one.verdict}**")))
    lines += ["", "## Not studied yet", "", "| claim | source | what a study needs |", "|---|---|---|"]
    lines += [row(one) for one in NOT_STUDIED]
    return "\n".join(lines) + "\n"


def how_many(verdicts: Sequence[str]) -> str:
    """The number of claims by verdict, and how many verdicts may be chance."""
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS)
    chance = round(0.05 * len(verdicts))
    return (
        f"Of {len(verdicts)} claims: {counts}.\n"
        "An interval of 95 % misses the truth with a probability of 5 %, and nothing is corrected for the number of\n"
        f"claims: about {chance} of {len(verdicts)} verdicts may be chance. Read a verdict with its numbers, and\n"
        "trust it more where another study or a second setting agrees. The last digits of matrix products\n"
        "differ between processors: of 104 verdicts that were compared on two of them, 21 differ, and none from\n"
        "holds to contradicted or back."
    )


def page(name: str, result: Mapping[str, Any], headline: str, use: str) -> str:
    """The page of one study: advice, setting, claims with measurements, numbers and figure."""
    sentence = headline if headline.endswith("?") else f"{headline}."
    lines = [
        f"# {name}",
        "",
        sentence,
        "",
        f"**What you do with it.** {use}",
        "",
        "## Setting",
        "",
        result["setup"],
        "",
    ]
    findings = result["findings"]
    lines += ["## Claims", "", f"![{described(name, findings)}](../figures/studies/{name}_claims.svg)", ""]
    lines += ["| claim | source | measured | verdict |", "|---|---|---|---|"]
    for one in findings:
        lines.append(row((one.claim, one.citation, one.measured, f"**{one.verdict}**")))
    lines += ["", "## Numbers", ""]
    if (drawn := shown(result["table"])) is not None:
        lines += [f"![{name}: {finding(drawn)}](../figures/studies/{name}_numbers.svg)", ""]
    if result["table"]:
        header, *rows = result["table"]
        lines += [row(header), "|---" * len(header) + "|", *map(row, rows), ""]
    if name not in REDRAWN:
        lines += [f"![{name}: {headline}](../figures/studies/{name}.png)", ""]
    machine = result["environment"]
    seconds = f"{result['cpu_seconds']} s of CPU time, models from the cache not counted; torch {machine['torch']}."
    lines += [f"{seconds} `opd study {name}` runs it again. [All studies](../studies.md), with the rule of a verdict."]
    return "\n".join(lines) + "\n"


def described(name: str, findings: Sequence[Finding]) -> str:
    """What the figure of the claims shows, for readers who do not see it."""
    verdicts = [one.verdict for one in findings]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS if verdict in verdicts)
    return f"{name}: means and 95 % intervals beside the thresholds of {len(findings)} claims: {counts}"


def row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's rows as lines with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(one, widths, strict=True)).rstrip() for one in rows]


def plain(one: Finding) -> str:
    """A finding as text for the terminal."""
    return f"{one.verdict.upper()}: {one.claim} ({one.citation})\n  {one.measured}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
