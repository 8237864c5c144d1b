"""The sections of docs/performance.md, one per benchmark: the measurement, the peers' settings, the tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import generate
import limits
import loss
import quickstart
import scaling
import step
import waiting
from common import GIB, Record

QUALITY = ("before", "teacher", "after", "gap")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; columns after the first are right-aligned."""
    aligned = ["---", *("---:" for _ in header[1:])]
    return ["| " + " | ".join(cells) + " |" for cells in (header, aligned, *rows)]


def spread_text(values: Record | None) -> str:
    """median (low to high), in three figures."""
    if values is None:
        return "-"
    return f"{values['median']:.3g} ({values['low']:.3g} to {values['high']:.3g})"


def about(module: Any) -> list[str]:
    """The description of a benchmark: its docstring without the headline and the usage lines."""
    text = module.__doc__.strip().splitlines()
    return [line for line in text[1:] if not line.startswith("    python ")]


def section(title: str, module: Any, figure: str | None = None) -> list[str]:
    return [
        f"## {title}",
        "",
        f"`python benchmarks/{module.__name__}.py`",
        *about(module),
        "",
        *([f"![{title}](figures/{figure}.png)", ""] if figure else []),
    ]


def step_section(result: Record) -> list[str]:
    parts = ("total", "generate", "teacher", "loss", "backward", "optimiser", "training")
    rows = [
        [name, *(spread_text(row.get(part)) for part in parts), f"{row['peak_bytes'] / GIB:.2f}"]
        for name, row in result["rows"].items()
    ]
    gaps = [
        [name, f"{gap['loss']:.1e}", f"{gap['gradient']:.1e}"]
        for name, gap in result["check"]["relative_difference"].items()
    ]
    return [
        *section("A whole step", step, "step"),
        "Seconds; peak in GiB. TRL runs the teacher inside `loss`.",
        "",
        *table(["", *parts, "peak"], rows),
        "",
        "Relative difference to opd on the same sequences:",
        "",
        *table(["", "loss", "gradient of all parameters"], gaps),
    ]


def loss_section(result: Record) -> list[str]:
    lines = section("The loss alone", loss, "loss")
    ordered = sorted(result["rows"], key=lambda row: (row["V"], row["N"], row["H"]))
    for (V, N, H), group in groupby(ordered, key=lambda row: (row["V"], row["N"], row["H"])):
        rows = list(group)
        trl = next((row["total"]["median"] for row in rows if row["name"] == "trl" and "total" in row), None)
        body: list[list[str]] = []
        for row in rows:
            if "skipped" in row:
                body.append([row["name"], f"skipped: {row['skipped']}", "-", "-"])
                continue
            ratio = "-" if trl is None else f"{row['total']['median'] / trl:.2f}"
            body.append([row["name"], spread_text(row["total"]), ratio, f"{row['peak_bytes'] / GIB:.2f}"])
        rate = next((f"; matmul at {row['gflops']:.0f} GFLOP/s" for row in rows if "gflops" in row), "")
        lines += [f"V {V:,}, N {N:,}, H {H:,}{rate}:", ""]
        lines += [*table(["", "seconds", "of TRL's time", "peak, GiB"], body), ""]
    return lines[:-1]


def generate_section(result: Record) -> list[str]:
    names = list(dict.fromkeys(row["name"] for row in result["rows"]))
    points: dict[tuple[Any, ...], dict[str, Record]] = {}
    for row in result["rows"]:
        kind = row["size"] if row["peaked"] else f"{row['size']}, flat"
        points.setdefault((kind, row["rows"], row["top_p"]), {})[row["name"]] = row["tokens_per_second"]
    rows: list[list[str]] = []
    for (kind, count, top_p), rates in points.items():
        speedup = rates["opd"]["median"] / rates["generate"]["median"]
        shown = [spread_text(rates.get(name)) for name in names]
        rows.append([kind, str(count), f"{top_p:g}", *shown, f"{speedup:.2f}"])
    header = ["model", "rows", "top-p", *(f"{name}, tokens/s" for name in names), "opd / generate()"]
    note = [] if "vllm" in names else ["", "vLLM was not measured in this run."]
    return [*section("Generation", generate, "generate"), *table(header, rows), *note]


def scaling_section(result: Record) -> list[str]:
    lines = section("Scaling", scaling, "scaling")
    parts = ("total", "generate", "teacher", "loss", "backward")
    for axis, rows in result["axes"].items():
        key = scaling.VARIED[axis]
        shown = [part for part in parts if part in rows[0]["seconds"]]
        body = [
            [f"{row[key]:,}" if row[key] else "full", *(spread_text(row["seconds"][part]) for part in shown)]
            for row in rows
        ]
        lines += [f"By {axis}, seconds:", "", *table([key, *shown], body), ""]
    columns = ("total", "generate", "score", "train")
    ranks: list[list[str]] = []
    for row in result["ranks"]:
        measured = "seconds" in row
        reason = [] if measured else [f"skipped: {row['skipped'].splitlines()[-1]}", "-", "-", "-"]
        cells = [spread_text(row["seconds"][part]) for part in columns] if measured else reason
        ranks.append([str(row["ranks"]), str(row.get("threads_each", "-")), *cells])
    gaps = [
        [kind, *(["-", "-"] if gap is None else [f"{gap['whole']:.1e}", f"{gap['worst']:.1e}"])]
        for kind, gap in result["ranks_difference"].items()
    ]
    return [
        *lines,
        "By ranks, seconds:",
        "",
        *table(["ranks", "threads each", *columns], ranks),
        "",
        f"Parameters of two ranks against one after {scaling.RANK_STEPS} steps, relative difference:",
        "",
        *table(["", "all parameters as one vector", "worst tensor, by its largest entry"], gaps),
    ]


def limits_section(result: Record) -> list[str]:
    products = [
        [str(row["rows"]), row["layout"], f"{1000 * row['seconds']:.2f}", f"{row['gflops']:.0f}"]
        for row in result["products"]
    ]
    lines = [
        "## Where the time goes",
        "",
        "`python benchmarks/limits.py`",
        *about(limits),
        "",
        *table(["rows", "layout", "milliseconds", "GFLOP/s"], products),
        "",
        f"Training part against bare, in one process: {limits.ratio(result):.2f}. Seconds:",
        "",
        *table(["", "seconds"], [[name, spread_text(row)] for name, row in result["against_bare"].items()]),
    ]
    for part, rows in result["parts"].items():
        body = [[row["operation"], f"{row['share']:.1%}", f"{row['calls']:,}"] for row in rows]
        lines += ["", f"Of the CPU time of the {part}:", "", *table(["operation", "share", "calls"], body)]
    return lines


def quickstart_section(result: Record) -> list[str]:
    parts = quickstart.PARTS
    runs = [
        [f"{row['side']}, seed {row['seed']}", f"{row['seconds']:.0f}", *(spread_text(row["steps"][p]) for p in parts)]
        for row in result["runs"]
    ]
    shares: list[list[str]] = []
    for row in result["runs"]:
        if row["side"] == "now":
            for name, share in row["quality"].items():
                cells = ("-" if share[key] is None else f"{share[key]:.1%}" for key in QUALITY)
                shares.append([f"seed {row['seed']}, {name}", *cells])
    changed = f", with {', '.join(result['overrides'])}" if result["overrides"] else ""
    return [
        *section("The quickstart", quickstart),
        f"`before` is commit {result['before']}{changed}. Seconds of the whole command, and of a step and its parts:",
        "",
        *table(["", "whole", *(f"step: {part}" for part in parts)], runs),
        "",
        "Share of held-out answers that keep the rule:",
        "",
        *table(["", "before", "teacher", "after", "of the gap"], shares),
    ]


def waiting_section(result: Record) -> list[str]:
    body: list[list[str]] = []
    rows = {waiting.kind(row): row for row in result["rows"]}
    for model in waiting.ROUNDS:
        for policy in waiting.POLICIES:
            cells = [waiting_cell(rows.get((model, condition, policy))) for condition in waiting.CONDITIONS]
            body.append([model, policy, *cells])
    lines = [f"* {row['model']}, {row['condition']}: {line}" for row in result["rows"] for line in row.get("said", ())]
    ratios = [
        [row["model"], row["condition"], row["over"], f"{row['ratio']:.2f}"] for row in waiting.ratios(result["rows"])
    ]
    return [
        *section("How threads wait", waiting),
        "Seconds of a step by the clock:",
        "",
        *table(["", "", *waiting.CONDITIONS], body),
        "",
        "Lines that the command printed:",
        "",
        *lines,
        "",
        "`chosen` against `default` on a quiet machine and against `passive` on a busy one:",
        "",
        *table(["", "", "against", "of its time"], ratios),
    ]


def waiting_cell(row: Record | None) -> str:
    if row is None:
        return "not measured"
    return f"none in {row['none_in']}" if "none_in" in row else spread_text(row["wall"])
