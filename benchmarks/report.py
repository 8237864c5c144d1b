"""Make the table of goals, docs/performance.md and the figures from results/*.json.

python benchmarks/report.py            print the table, write the page and the figures
python benchmarks/report.py --table    print the table alone
python benchmarks/report.py --quick    write the page and the figures of results/quick beside them

Goals are in goals.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import figures
from common import GIB, HERE, RESULTS, Record, say
from goals import goals, missed
from tables import (
    commands_section,
    generate_section,
    limits_section,
    loss_section,
    quickstart_section,
    scaling_section,
    step_section,
    table,
    waiting_section,
)

PAGE = HERE.parent / "docs" / "performance.md"
BENCHMARKS = ("step", "loss", "generate", "scaling", "limits", "commands", "quickstart", "waiting")
HEADER = ("what", "goal", "measured", "reached")


def load(folder: Path = RESULTS) -> dict[str, Record]:
    """The results that exist in the folder, by benchmark."""
    found = {name: folder / f"{name}.json" for name in BENCHMARKS}
    return {name: json.loads(file.read_text()) for name, file in found.items() if file.exists()}


# --- The page ---------------------------------------------------------------------------------------------------------


def machine_lines(results: dict[str, Record]) -> Iterable[str]:
    some = next(iter(results.values()))["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in some["versions"].items() if version)
    yield f"{some['cpu']}, {some['cores']} cores, {some['memory_gib']} GiB, GPU: {some['gpu'] or 'none'};"
    yield f"{some['system']}, Python {some['python']}, {some['threads']} threads; {versions}. All in float32."
    yield ""
    rows: list[list[str]] = []
    for name, result in results.items():
        rates = result["calibration_gflops"]
        commit = result["machine"]["commit"] or "-"
        rows.append([name, commit, f"{rates['before']:.0f}", f"{rates['after']:.0f}", f"{result['seconds']:.0f}"])
    yield from table(["benchmark", "commit", "GFLOP/s before", "GFLOP/s after", "seconds"], rows)


def page(results: dict[str, Record]) -> str:
    lines = [
        "# Performance",
        "",
        "Written by `make bench` and `make bench-quickstart` (`benchmarks/report.py`) from "
        "`benchmarks/results/*.json`. Do not edit.",
        "",
        "The contestants of a benchmark are processes that take turns, in an order that rotates. A matmul of size "
        "2,048 measures the machine's speed before and after. Times are medians with their range, memory is the "
        "highest resident size above the start. Compare ratios, not seconds: absolute times vary with the machine's "
        "load.",
        "",
        "## The machine",
        "",
        *machine_lines(results),
        "",
        "## Goals",
        "",
        "TRL as users get it has tile sizes made for a GPU; with CPU tiles it is `trl_tuned`. Both sides of a "
        "ratio are from one run.",
        "",
        *table(HEADER, goals(results)),
        "",
        "What limits the goals that are not reached:",
        "",
        *missed(goals(results)),
    ]
    sections = {
        "step": step_section,
        "loss": loss_section,
        "generate": generate_section,
        "scaling": scaling_section,
        "quickstart": quickstart_section,
        "limits": limits_section,
        "commands": commands_section,
        "waiting": waiting_section,
    }
    for name, section in sections.items():
        if name in results:
            lines += ["", *section(results[name])]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of goals and write nothing")
    parser.add_argument("--quick", action="store_true", help="of results/quick, to try the code")
    options = parser.parse_args()
    folder = RESULTS / "quick" if options.quick else RESULTS
    results = load(folder)
    if not results:
        raise SystemExit(f"{folder} is empty. Run the benchmarks first: make bench")
    if not options.table:
        file = folder / PAGE.name if options.quick else PAGE
        figures.draw(results, file.parent / "figures")
        file.write_text(page(results))
    say("\n".join(table(HEADER, goals(results))))
    say(f"peak memory of a step in GiB: {step_peaks(results)}")


def step_peaks(results: dict[str, Any]) -> str:
    rows = results.get("step", {}).get("rows", {})
    return ", ".join(f"{name} {row['peak_bytes'] / GIB:.2f}" for name, row in rows.items()) or "not measured"


if __name__ == "__main__":
    main()
