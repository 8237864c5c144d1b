"""The sections of docs/performance.md, one per benchmark: the measurement, the peers' settings, the tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import commands
import generate
import limits
import limits_memory
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
        *([f"![{title}: seconds and memory](figures/{figure}.svg)", ""] if figure else []),
    ]


def step_section(result: Record) -> list[str]:
    parts = ("total", "total_cpu", "generate", "teacher", "loss", "backward", "optimiser", "training")
    gaps = [
        [name, f"{gap['loss']:.1e}", f"{gap['gradient']:.1e}"]
        for name, gap in result["check"]["relative_difference"].items()
    ]
    titles = {
        "rows": "Seconds, `total_cpu` CPU seconds of the step; peak in GiB. TRL runs the teacher inside `loss`.",
        "one_thread": "With one thread:",
        "busy": "Beside one busy process, threads waiting asleep:",
    }
    lines = section("A whole step", step, "step")
    for race, title in titles.items():
        rows = [
            [name, *(spread_text(row.get(part)) for part in parts), *peak_cell(race, row)]
            for name, row in result.get(race, {}).items()
        ]
        header = ["", *parts, *(["peak"] if race == "rows" else [])]
        lines += [title, "", *(table(header, rows) if rows else ["Not measured."]), ""]
    return [
        *lines,
        "Relative difference to opd on the same sequences:",
        "",
        *table(["", "loss", "gradient of all parameters"], gaps),
    ]


def peak_cell(race: str, row: Record) -> list[str]:
    """The peak in GiB; nothing but for the first race, since the later ones keep its peak."""
    return [f"{row['peak_bytes'] / GIB:.2f}"] if race == "rows" else []


def loss_section(result: Record) -> list[str]:
    lines = section("The loss alone", loss, "loss")

    def place(row: Record) -> tuple[int, ...]:
        return row["V"], row["N"], row["H"], -row["threads"]

    for (V, N, H, threads), group in groupby(sorted(result["rows"], key=place), key=place):
        rows = list(group)
        by_name = {row["name"]: row for row in rows if "skipped" not in row}
        body: list[list[str]] = []
        for row in rows:
            if "skipped" in row:
                body.append([row["name"], f"skipped: {row['skipped']}", *["-"] * 5])
                continue
            ratios = [
                loss_ratio(by_name, row["name"], variant, key)
                for key in ("total", "peak_bytes")
                for variant in ("", "_tuned")
            ]
            times = spread_text(row["total"]), spread_text(row.get("total_cpu"))
            body.append([row["name"], *times, *ratios[:2], f"{row['peak_bytes'] / GIB:.2f}", ratios[3]])
        rate = next((f"; matmul at {row['gflops']:.0f} GFLOP/s" for row in rows if "gflops" in row), "")
        lines += [f"V {V:,}, N {N:,}, H {H:,}, threads {-threads}{rate}:", ""]
        header = ["", "seconds", "CPU seconds", "of TRL's time", "of tuned TRL's", "peak, GiB", "of tuned TRL's peak"]
        lines += [*table(header, body), ""]
    return lines[:-1]


def loss_ratio(rows: dict[str, Record], name: str, variant: str, key: str) -> str:
    """A contestant's time or memory over TRL's for the same function; - if there is none."""
    peer = rows.get(loss.PEERS.get(name, "") + variant)
    if peer is None:
        return "-"
    mine, theirs = (row[key]["median"] if key == "total" else row[key] for row in (rows[name], peer))
    return f"{mine / theirs:.2f}" if theirs else "-"


def generate_section(result: Record) -> list[str]:
    names = list(dict.fromkeys(row["name"] for row in result["rows"]))
    points: dict[tuple[Any, ...], dict[str, Record]] = {}
    for row in result["rows"]:
        kind = row["size"] if row["peaked"] else f"{row['size']}, flat"
        points.setdefault((kind, row["rows"], row["top_p"], row["threads"]), {})[row["name"]] = row
    rows: list[list[str]] = []
    cpu: list[list[str]] = []
    for (kind, count, top_p, threads), by_name in points.items():
        place = [kind, str(count), f"{top_p:g}", str(threads)]
        rates = {name: row["tokens_per_second"] for name, row in by_name.items()}
        best = max(rate["median"] for name, rate in rates.items() if name in ("generate", "generate_static"))
        shown = [spread_text(rates.get(name)) for name in names]
        rows.append([*place, *shown, f"{rates['opd']['median'] / best:.2f}"])
        cpu.append([*place, *(spread_text(by_name.get(name, {}).get("cpu")) for name in names)])
    place = ["model", "rows", "top-p", "threads"]
    header = [*place, *(f"{name}, tokens/s" for name in names), "opd / the faster `generate()`"]
    note = [] if "vllm" in names else ["", "vLLM was not measured in this run."]
    return [
        *section("Generation", generate, "generate"),
        *table(header, rows),
        *note,
        "",
        "CPU seconds of a call:",
        "",
        *table([*place, *names], cpu),
    ]


def scaling_section(result: Record) -> list[str]:
    lines = section("Scaling", scaling, "scaling")
    parts = ("total", "total_cpu", "generate", "teacher", "loss", "backward")
    for axis, rows in result["axes"].items():
        keys = ("n", "prompt_tokens") if axis == "prompt" else (scaling.VARIED[axis],)
        shown = [part for part in parts if part in rows[0]["seconds"]]
        linear = [part for part in scaling.LINEAR if part in rows[0].get("of_linear", {})]
        body = [
            [
                *(f"{row[key]:,}" if row[key] else "full" for key in keys),
                *(spread_text(row["seconds"][part]) for part in shown),
                *(f"{row['of_linear'][part]:.2f}" for part in linear),
            ]
            for row in rows
        ]
        header = [*keys, *shown, *(f"{part}, of linear" for part in linear)]
        lines += [f"By {axis}, seconds:", "", *table(header, body), ""]
    columns = ("total", "generate", "score", "train")
    ranks: list[list[str]] = []
    least = min((row["seconds"]["total"]["median"] for row in result["ranks"] if "seconds" in row), default=1.0)
    for row in result["ranks"]:
        if "seconds" not in row:
            ranks.append([str(row["ranks"]), "-", f"skipped: {row['skipped'].splitlines()[-1]}", *["-"] * 5])
            continue
        cells = [spread_text(row["seconds"][part]) for part in columns]
        flat = f"{row['seconds']['total']['median'] / least:.2f}"
        cpu = spread_text(row.get("cpu_of_first_rank"))
        ranks.append([str(row["ranks"]), str(row["threads_each"]), *cells, cpu, flat])
    gaps = [
        [kind, *(["-", "-"] if gap is None else [f"{gap['whole']:.1e}", f"{gap['worst']:.1e}"])]
        for kind, gap in result["ranks_difference"].items()
    ]
    return [
        *lines,
        "By ranks, seconds:",
        "",
        *table(["ranks", "threads each", *columns, "CPU seconds of the first rank", "total, of linear"], ranks),
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
    return [*lines, "", *memory_section(result)]


def memory_section(result: Record) -> list[str]:
    lines = ["## Where the memory goes", "", "Measured by `python benchmarks/limits.py`.", *about(limits_memory), ""]
    if "memory" not in result:
        return [*lines, "Not measured yet."]
    parts = [
        [
            row["part"],
            f"{row['bytes'] / GIB:.3f}",
            f"{row['floor'] / GIB:.3f}",
            "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
        ]
        for row in result["memory"]
    ]
    steps = [
        [name, spread_text(row["seconds"]), spread_text(row["seconds_cpu"])]
        for name, row in result["optimiser"].items()
    ]
    half = result["bfloat16"]
    errors = [[name, f"{half[f'{name}_error']:.1e}", f"{half[f'{name}_seconds']:.3g}"] for name in ("opd", "cast")]
    return [
        *lines,
        *table(["part", "GiB", "floor, GiB", "ratio"], parts),
        "",
        "The optimiser's step:",
        "",
        *table(["", "seconds", "CPU seconds"], steps),
        "",
        "The output layer in bfloat16:",
        "",
        *table(["", "mean error, nats", "seconds"], errors),
    ]


def commands_section(result: Record) -> list[str]:
    rows = [[row["command"], row["side"], spread_text(row["wall"]), spread_text(row["cpu"])] for row in result["rows"]]
    return [
        *section("Commands without weights", commands),
        f"`before` is commit {result['before']}.",
        "",
        *table(["command", "", "seconds", "CPU seconds"], rows),
    ]


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
            kinds = [(model, condition, policy) for condition in waiting.CONDITIONS]
            cells = [waiting_cell(rows.get(kind), part) for part in ("wall", "cpu") for kind in kinds]
            body.append([model, policy, *cells])
    header = [*waiting.CONDITIONS, *(f"{condition}, CPU" for condition in waiting.CONDITIONS)]
    lines = [f"* {row['model']}, {row['condition']}: {line}" for row in result["rows"] for line in row.get("said", ())]
    ratios = [
        [row["model"], row["condition"], row["over"], f"{row['ratio']:.2f}"] for row in waiting.ratios(result["rows"])
    ]
    return [
        *section("How threads wait", waiting),
        "Seconds of a step by the clock, and CPU seconds:",
        "",
        *table(["", "", *header], body),
        "",
        "Lines that the command printed:",
        "",
        *lines,
        "",
        "`chosen` against `default` on a quiet machine and against `passive` on a busy one:",
        "",
        *table(["", "", "against", "of its time"], ratios),
    ]


def waiting_cell(row: Record | None, part: str) -> str:
    if row is None:
        return "not measured"
    return f"none in {row['none_in']}" if "none_in" in row else spread_text(row[part])
