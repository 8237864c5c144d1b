"""Figures of docs/performance.md, one per benchmark, from results/*.json."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from common import GIB, Record
from loss import TABLE

COLOURS = {
    "opd": "#1b6ca8",
    "full": "#1b6ca8",
    "full_generic": "#6fb1e0",
    "top32_renormalised": "#0d3b5c",
    "trl": "#d1603d",
    "trl_distillation": "#d1603d",
    "trl_gkd": "#e8a87c",
    "trl_tuned": "#8c2f14",
    "liger": "#7a9e3f",
    "naive": "#999999",
    "bare": "#999999",
    "generate": "#d1603d",
    "generate_static": "#e8a87c",
    "vllm": "#7a9e3f",
}
# Parts of a step; no colour is also that of a library.
PARTS = {"generate": "#4c9f9a", "teacher": "#e0b04c", "loss": "#8a5a9e", "backward": "#4a2c5e", "optimiser": "#d4a5c4"}


def draw(results: dict[str, Record], folder: Path) -> None:
    """Write an SVG for every benchmark that has run, with what it shows as the title."""
    folder.mkdir(parents=True, exist_ok=True)
    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "svg.fonttype": "none"}
    mpl.rcParams.update({**style, "svg.hashsalt": "opd"})
    drawings = {"step": step, "loss": loss, "generate": generate, "scaling": scaling}
    for name, drawing in drawings.items():
        if name in results:
            figure = drawing(results[name])
            title = textwrap.fill(finding(name, results[name]), int(13 * figure.get_figwidth()))
            figure.suptitle(title, fontsize=10, fontweight="bold")
            figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
            plt.close(figure)


def finding(name: str, result: Record) -> str:
    """What the figure of a benchmark shows, from its numbers."""
    if name == "step":
        ours, theirs = (result["rows"][one] for one in ("opd", "trl_distillation"))
        time = ours["total"]["median"] / theirs["total"]["median"]
        memory = ours["peak_bytes"] / theirs["peak_bytes"]
        return f"A step of opd takes {time:.2f} of the time of TRL's trainer, and {memory:.2f} of its memory"
    if name == "loss":
        rows = [
            row for row in result["rows"] if "skipped" not in row and row["threads"] == result["machine"]["threads"]
        ]
        mine = {row["V"]: row for row in most_of(rows, fixed=("N", "H"), varied="V") if row["name"] == "full"}
        others = {row["V"]: row for row in most_of(rows, fixed=("N", "H"), varied="V") if row["name"] == "trl"}
        largest = max(set(mine) & set(others))
        ratio = mine[largest]["total"]["median"] / others[largest]["total"]["median"]
        return f"With {largest:,} tokens the exact reverse KL takes {ratio:.2f} of the time of TRL's divergence"
    if name == "generate":
        rows = [row for row in result["rows"] if row["peaked"] and row["threads"] == result["machine"]["threads"]]
        most = {
            row["name"]: row
            for row in rows
            if (row["size"], row["top_p"]) == (rows[-1]["size"], 1) and row["rows"] == 32
        }
        ratio = most["opd"]["tokens_per_second"]["median"] / most["generate"]["tokens_per_second"]["median"]
        return f"With 32 rows of {rows[-1]['size']} opd writes {ratio:.1f} times the tokens of generate() per second"
    longest = result["axes"]["length"][-1]["seconds"]
    share = longest["generate"]["median"] / sum(longest[part]["median"] for part in PARTS if part in longest)
    return f"Of a step with long responses, {share:.0%} of the time is sampling"


def step(result: Record) -> Any:
    """Stacked parts of a step, and peak memory."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), width_ratios=[2, 1], sharey=True, layout="constrained")
    names = list(result["rows"])[::-1]
    start = dict.fromkeys(names, 0.0)
    for part, colour in PARTS.items():
        widths = [result["rows"][name].get(part, {}).get("median", 0.0) for name in names]
        left.barh(names, widths, left=[start[name] for name in names], color=colour, label=part)
        for name, width in zip(names, widths, strict=True):
            start[name] += width
    left.set_xlim(0, 1.04 * max(start.values()))
    left.set_xlabel("seconds a step, median of each part")
    left.legend(ncols=5, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), columnspacing=1, handlelength=1)
    peaks = [result["rows"][name]["peak_bytes"] / GIB for name in names]
    right.barh(names, peaks, color=[COLOURS[name] for name in names])
    right.set_xlim(0, 1.04 * max(peaks))
    right.set_xlabel("peak memory above the start, GiB")
    return figure


def loss(result: Record) -> Any:
    """Time and peak memory by vocabulary and by tokens."""
    figure, grid = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    threads = result["machine"]["threads"]
    known = [row for row in result["rows"] if row["name"] in COLOURS]
    rows = [row for row in known if "skipped" not in row and row["threads"] == threads]
    by_vocabulary = most_of(rows, fixed=("N", "H"), varied="V")
    by_tokens = most_of(rows, fixed=("V", "H"), varied="N")
    for column, (chosen, varied, label) in enumerate(
        ((by_vocabulary, "V", "vocabulary, tokens"), (by_tokens, "N", "positions, tokens"))
    ):
        for line, (value, unit) in enumerate((("total", "seconds, forward + backward"), ("peak", "peak memory, GiB"))):
            axes = grid[line][column]
            for name in dict.fromkeys(row["name"] for row in chosen):
                mine = sorted((row for row in chosen if row["name"] == name), key=lambda row: row[varied])
                ys = [row["total"]["median"] if value == "total" else row["peak_bytes"] / GIB for row in mine]
                axes.plot([row[varied] for row in mine], ys, "o-", color=COLOURS[name], label=name, markersize=4)
            axes.set(xlabel=label, ylabel=unit, xscale="log", yscale="log")
            values = sorted({row[varied] for row in chosen})
            axes.set_xticks(values, [f"{value:,}" for value in values])
            axes.xaxis.minorticks_off()
            fixed = (
                ", ".join(f"{key} = {chosen[0][key]:,}" for key in ("V", "N", "H") if key != varied) if chosen else ""
            )
            axes.set_title(fixed, fontsize=9)
    legend_below(figure, grid[0][0])
    return figure


def most_of(rows: list[Record], *, fixed: tuple[str, str], varied: str) -> list[Record]:
    """The rows of the fixed sizes with the most values of the varied one, without the table's point."""
    groups: dict[tuple[int, ...], list[Record]] = {}
    for row in rows:
        if (row["V"], row["N"], row["H"]) != TABLE:
            groups.setdefault(tuple(row[key] for key in fixed), []).append(row)
    return max(groups.values(), key=lambda group: len({row[varied] for row in group}), default=[])


def generate(result: Record) -> Any:
    """Tokens per second by rows, one panel per model and top-p."""
    threads = result["machine"]["threads"]
    rows = [row for row in result["rows"] if row["peaked"] and row["threads"] == threads]
    sizes, top_ps = list(dict.fromkeys(r["size"] for r in rows)), list(dict.fromkeys(r["top_p"] for r in rows))
    place = {"figsize": (2.6 * len(sizes), 2.4 * len(top_ps)), "sharex": True, "squeeze": False}
    figure, grid = plt.subplots(len(top_ps), len(sizes), **place)
    figure.set_layout_engine("constrained")
    for line, top_p in enumerate(top_ps):
        for column, size in enumerate(sizes):
            axes = grid[line][column]
            for name in dict.fromkeys(r["name"] for r in rows):
                mine = [r for r in rows if (r["name"], r["size"], r["top_p"]) == (name, size, top_p)]
                rates = [r["tokens_per_second"] for r in mine]
                counts = [r["rows"] for r in mine]
                axes.plot(counts, [r["median"] for r in rates], "o-", color=COLOURS[name], label=name, markersize=4)
                axes.fill_between(
                    counts, [r["low"] for r in rates], [r["high"] for r in rates], color=COLOURS[name], alpha=0.2
                )
            axes.set(xscale="log", yscale="log", title=f"{size}, top-p {top_p:g}", xticks=[1, 8, 32])
            axes.set_xticks([1, 8, 32], ["1", "8", "32"])
            axes.minorticks_off()
            if line == len(top_ps) - 1:
                axes.set_xlabel("rows")
            if column == 0:
                axes.set_ylabel("tokens/s")
    legend_below(figure, grid[0][0])
    return figure


def legend_below(figure: Any, axes: Any) -> None:
    """One legend for all panels, of the lines of one of them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=6, frameon=False, loc="outside lower center")


def scaling(result: Record) -> Any:
    """Seconds by each varied quantity, in stacked parts."""
    from scaling import VARIED, WORK

    axes_data = {axis: rows for axis, rows in result["axes"].items() if axis in WORK}
    figure, grid = plt.subplots(1, len(axes_data), figsize=(2.6 * len(axes_data), 2.8), layout="constrained")
    labels = {
        "length": "tokens of the response",
        "vocabulary": "vocabulary, tokens",
        "support": "tokens of the support",
        "group": "responses per prompt",
    }
    for axes, (axis, rows) in zip(grid, axes_data.items(), strict=True):
        names = [f"{row[VARIED[axis]]:,}" if row[VARIED[axis]] else "full" for row in rows]
        bottom = [0.0] * len(rows)
        for part, colour in PARTS.items():
            heights = [row["seconds"].get(part, {}).get("median", 0.0) for row in rows]
            axes.bar(names, heights, bottom=bottom, color=colour, label=part)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        axes.set_ylim(0, 1.04 * max(bottom))
        axes.set_xlabel(labels[axis])
        axes.tick_params(axis="x", labelrotation=45 if axis == "vocabulary" else 0)
    grid[0].set_ylabel("seconds, median of each part")
    handles = [mpl.patches.Patch(color=colour, label=part) for part, colour in PARTS.items() if part != "optimiser"]
    figure.legend(handles=handles, ncols=4, frameon=False, loc="outside lower center")
    return figure
