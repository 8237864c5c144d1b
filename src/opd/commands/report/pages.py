"""`opd report` and `opd compare`: pages of runs, and a comparison as a table."""

from __future__ import annotations

import math
import webbrowser
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd.commands.report.over_seeds import keys_table, print_over_seeds
from opd.errors import ConfigError
from opd.maths.intervals import Interval
from opd.messages import visible
from opd.viewer.compare import Comparison, as_json, check_by, compare
from opd.viewer.content import Options
from opd.viewer.groups import between_of
from opd.viewer.pairs import Paired
from opd.viewer.read import read_run
from opd.viewer.report import lines_of, write_comparison, write_report
from opd.viewer.seeds import as_json as seeds_json
from opd.viewer.seeds import over_seeds


def report_runs(
    runs: Sequence[str],
    out: str | None,
    stage: str | None,
    options: Options,
    *,
    opens: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write the page of one run, or of several side by side, and say what it holds. `opens` it in a browser.

    Raises as `write_report` and `write_comparison`.
    """
    if len(runs) == 1:
        found = write_report(runs[0], out, stage, options)
    else:
        found = write_comparison(runs, out, stage, options=options)
    for line in lines_of([found]):
        say(line)
    if opens:
        webbrowser.open(found.path.resolve().as_uri())


def compare_runs(
    runs: Sequence[str],
    *,
    stage: str | None = None,
    by: str = "prompt",
    between: str | None = None,
    against: str | None = None,
    json: bool = False,
    out: str | None = None,
    console: Console | None = None,
) -> None:
    """Print a comparison, or write it as a page to `out`.

    `between`: as for `between_of`; `against`: as for `over_seeds`. Raises as these, `compare` and `write_comparison`.
    """
    console = console or Console()
    check_by(by)
    read = [read_run(run) for run in runs]
    between = between_of(read, between)
    if between == "runs" and against is not None:
        raise ConfigError(
            "--against names a row of a comparison over seeds, and these are runs side by side. Leave it out, or give "
            "--between recipes or --between stages."
        )
    if out is not None:
        for line in lines_of([write_comparison(read, out, stage, by, between=between, against=against)]):
            console.print(Text(line), soft_wrap=True)
        return
    if between != "runs":
        over = over_seeds(read, between, stage, against, by)
        console.print(Text(seeds_json(over)), soft_wrap=True) if json else print_over_seeds(over, console)
        return
    found = compare(read, stage, by)
    if json:
        console.print(Text(as_json(found)), soft_wrap=True)
        return
    for side in found.sides:
        console.print(
            Text(f"{side.label}  {side.name}  {side.run.path}, {side.stage.name}, {side.said}"),
            soft_wrap=True,
        )
    if found.rows:
        console.print(_rewards(found))
    nothing = Text("No key of the recipes or environments differs.")
    console.print(keys_table(found.keys, [side.label for side in found.sides]) if found.keys else nothing)
    for line in found.reasons:
        console.print(Text(visible(line)), soft_wrap=True)


def _rewards(found: Comparison) -> Table:
    names = ", ".join(dict.fromkeys(row.reward for row in found.rows))
    title = f"{visible(names)} on held-out prompts, 95 % intervals"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", min_width=8, overflow="fold")
    two = len(found.sides) == 2
    heads = [*(side.label for side in found.sides), *(("B - A", "prompts", "A:B alone") if two else ())]
    for name in heads:
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.rows:
        cells = ["" if mean is None else _interval(mean, "") for mean in row.means]
        cells += _pair(row.pair) if two else []
        table.add_row(Text(visible(row.title)), *map(Text, cells))
    return table


def _pair(pair: Paired | None) -> list[str]:
    """Difference, prompts, pairs of which one side alone has the reward, and McNemar's p."""
    if pair is None:
        return [""] * 3
    sides = "" if pair.p is None else f"{pair.only_first}:{pair.only_second}\np = {pair.p:.2g}"
    return [_interval(pair.difference, "+"), str(pair.prompts), sides]


def _interval(one: Interval, sign: str) -> str:
    show = lambda x: f"{x:{sign}.2f}"  # noqa: E731
    finite = one.high - one.low < math.inf
    return show(one.mean) + (f"\n[{show(one.low)}, {show(one.high)}]" if finite else "")
