"""Make the table of goals, docs/performance.md and the figures from results/*.json.

python benchmarks/report.py            print the table, write the page and the figures
python benchmarks/report.py --table    print the table alone
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from typing import Any

import figures
from common import GIB, HERE, RESULTS, Record, say
from loss import TABLE
from quickstart import ratio as quickstart_ratio
from scaling import RANK_STEPS
from tables import (
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
BENCHMARKS = ("step", "loss", "generate", "scaling", "limits", "quickstart", "waiting")


def load() -> dict[str, Record]:
    """The results that exist, by benchmark."""
    found = {name: RESULTS / f"{name}.json" for name in BENCHMARKS}
    return {name: json.loads(file.read_text()) for name, file in found.items() if file.exists()}


# --- The table of goals ---------------------------------------------------------------------------------------


def goals(results: dict[str, Record]) -> list[list[str]]:
    """Rows what | goal | measured | reached, for benchmarks that have run."""
    rows: list[list[str]] = []
    if "step" in results:
        rows += step_goals(results["step"])
    if "loss" in results:
        rows += loss_goals(results["loss"]["rows"])
    if "generate" in results:
        rows += generate_goals(results["generate"]["rows"])
    if "scaling" in results:
        rows += scaling_goals(results["scaling"])
    if "quickstart" in results:
        what = "SmolLM2 quickstart, wall time against before"
        rows.append(goal(what, 0.70, quickstart_ratio(results["quickstart"])))
    return rows


def goal(what: str, limit: float, value: float | None, *, at_least: bool = False, unit: str = "") -> list[str]:
    words = f"{'at least' if at_least else 'at most'} {limit:g}{unit}"
    if value is None:
        return [what, words, "not measured", "-"]
    reached = value >= limit if at_least else value <= limit
    return [what, words, f"{value:.2e}" if limit < 1e-2 else f"{value:.2f}{unit}", "yes" if reached else "**no**"]


def step_goals(result: Record) -> list[list[str]]:
    opd, trl, bare = (result["rows"][name] for name in ("opd", "trl_distillation", "bare"))
    gap = max(value for gaps in result["check"]["relative_difference"].values() for value in gaps.values())

    def times(name: str) -> float:
        return opd[name]["median"]

    return [
        goal("whole step against TRL `DistillationTrainer`, time", 0.40, times("total") / trl["total"]["median"]),
        goal("the same, peak memory", 0.50, opd["peak_bytes"] / trl["peak_bytes"]),
        goal("the same, loss and gradient on the same sequences, relative difference", 1e-4, gap),
        goal(
            "training part against bare forward, backward, teacher", 1.15, times("training") / bare["total"]["median"]
        ),
    ]


def loss_goals(rows: list[Record]) -> list[list[str]]:
    at = {row["name"]: row for row in rows if (row["V"], row["N"], row["H"]) == TABLE and "skipped" not in row}

    def ratio(name: str, other: str, of: Callable[[Record], float]) -> float | None:
        return of(at[name]) / of(at[other]) if name in at and other in at else None

    def seconds(row: Record) -> float:
        return row["total"]["median"]

    where = "V {:,}, N {:,}, H {:,}".format(*TABLE)
    return [
        goal(
            f"loss at {where}, reverse KL, against TRL's chunked divergence, time", 0.50, ratio("full", "trl", seconds)
        ),
        goal(
            "the same, peak memory above inputs and head gradient",
            0.40,
            ratio("full", "trl", lambda r: r["peak_bytes"]),
        ),
        goal("the same through the generic mechanism, time", 0.70, ratio("full_generic", "trl", seconds)),
        goal(
            "student side, renormalised top-32 against full support", 0.15, ratio("top32_renormalised", "full", seconds)
        ),
    ]


def generate_goals(rows: list[Record]) -> list[list[str]]:
    def speedup(top_p: float) -> float | None:
        rates = {
            row["name"]: row["tokens_per_second"]["median"]
            for row in rows
            if (row["size"], row["rows"], row["top_p"], row["peaked"]) == ("5M", 8, top_p, True)
        }
        return rates["opd"] / rates["generate"] if "opd" in rates and "generate" in rates else None

    return [
        goal(
            f"generation, 5M, 8 rows, top-p {top_p:g}, against `generate()`",
            limit,
            speedup(top_p),
            at_least=True,
            unit="x",
        )
        for top_p, limit in ((1.0, 2.4), (0.95, 4.0))
    ]


def scaling_goals(result: Record) -> list[list[str]]:
    what = "two gloo ranks against one"
    return [
        [f"{what}, speed", "as measured", ranks_measured(result), "-"],
        *(
            goal(
                f"{what}, {name}: parameters after {RANK_STEPS} steps",
                1e-5,
                (result["ranks_difference"][kind] or {}).get("whole"),
            )
            for kind, name in (("full", "full"), ("lora", "LoRA"))
        ),
    ]


def ranks_measured(result: Record) -> str:
    measured = {row["ranks"]: row["seconds"]["total"]["median"] for row in result["ranks"] if "seconds" in row}
    if not {1, 2} <= set(measured):
        return "not measured: " + next(row["skipped"].splitlines()[-1] for row in result["ranks"] if "skipped" in row)
    return f"{measured[2] / measured[1]:.2f} of the time per step"


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
        *table(["what", "goal", "measured", "reached"], goals(results)),
    ]
    sections = {
        "step": step_section,
        "loss": loss_section,
        "generate": generate_section,
        "scaling": scaling_section,
        "quickstart": quickstart_section,
        "limits": limits_section,
        "waiting": waiting_section,
    }
    for name, section in sections.items():
        if name in results:
            lines += ["", *section(results[name])]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of goals and write nothing")
    options = parser.parse_args()
    results = load()
    if not results:
        raise SystemExit(f"{RESULTS} is empty. Run the benchmarks first: make bench")
    if not options.table:
        figures.draw(results, PAGE.parent / "figures")
        PAGE.write_text(page(results))
    say("\n".join(table(["what", "goal", "measured", "reached"], goals(results))))
    say(f"peak memory of a step in GiB: {step_peaks(results)}")


def step_peaks(results: dict[str, Any]) -> str:
    rows = results.get("step", {}).get("rows", {})
    return ", ".join(f"{name} {row['peak_bytes'] / GIB:.2f}" for name, row in rows.items()) or "not measured"


if __name__ == "__main__":
    main()
