"""The tables after a run: held-out numbers of each stage side by side, and a few responses before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from opd.evaluation.learned import warnings_of
from opd.evaluation.recovery import recovered
from opd.evaluation.results import ROWS, columns_of, of_task
from opd.recipe.schema import Recipe, StageSpec
from opd.stage.folder import RunDir, StageDir

END = 200  # characters of a long prompt shown at each end


def print_report(recipe: Recipe, console: Console) -> None:
    """Print a table for each stage with evaluations, and where the models are."""
    directory = RunDir(recipe.folder)
    for spec in recipe.stages:
        folder = directory.stage(spec.name)
        metrics = folder.read_metrics()
        for line in warnings_of(metrics):
            console.print(f"{spec.name}: {line}", highlight=False, markup=False, soft_wrap=True)
        for task, section in spec.by_task.items():
            rows = of_task(metrics, task)
            if rows and section.evaluate is not None:
                name = spec.name if task is None else f"{spec.name}, {task}"
                named = spec.model_copy(update={"name": name, "evaluate": section.evaluate})
                console.print(held_out_table(named, rows, recoveries(named, folder, task, rows)))
                _print_responses(folder, task, rows, console)
    last = directory.stage(recipe.stages[-1].name)
    console.print("The model, ready to load in one line:", highlight=False)
    kind = "ImageTextToText" if (last.model / "processor_config.json").exists() else "CausalLM"
    line = (
        f'AutoModelFor{kind}.from_pretrained("{last.model}")'
        if last.model.exists() or not last.adapter.exists()
        else f'AutoPeftModelForCausalLM.from_pretrained("{last.adapter}")  # from peft'
    )
    console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def held_out_table(spec: StageSpec, rows: Sequence[Mapping[str, Any]], lines: Sequence[str] = ()) -> Table:
    """One column per measurement: student before, teacher, student after (and in between, if measured).

    `lines` are printed below the table.
    """
    assert spec.evaluate is not None
    columns = columns_of(rows)
    table = Table(title=f"{spec.name} ({spec.method}), held-out prompts")
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    for sampling in spec.evaluate.sampling:
        rows_here = [
            ("reward", "reward", _is_share(columns, f"eval/{sampling}/reward")),
            *ROWS,
            *((f"pass@{k}", f"pass@{k}", True) for k in spec.evaluate.pass_at),
        ]
        for key, label, share in rows_here:
            digits = 2 if key == "reward" else 1
            _add(table, columns, f"eval/{sampling}/{key}", f"{sampling}: {label}", share=share, digits=digits)
        table.add_section()
    for key in ("reverse_kl", "forward_kl"):
        _add(table, columns, f"eval/{key}", f"{key}, nats per token", digits=3)
    table.caption = "\n".join(lines)
    return table


def _add(
    table: Table,
    columns: Mapping[str, Mapping[str, float]],
    key: str,
    label: str,
    *,
    share: bool = False,
    digits: int = 1,
) -> None:
    """Add a row, unless all of its cells are empty."""
    cells = [_cell(column, key, share, digits) for column in columns.values()]
    if any(cells):
        table.add_row(label, *cells)


def recoveries(spec: StageSpec, folder: StageDir, task: str | None, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The share of the teacher's gap that was recovered: one line per sampling setting in which the teacher is ahead.

    Computed from the held-out responses of student before, teacher and student after, with Fieller's 95 % interval over
    prompts (`recovery.recovered`). A setting in which one of the three was not measured has no line.
    """
    assert spec.evaluate is not None
    before, teacher, after = map(folder.read_held_out, ("before", "teacher", f"step_{rows[-1]['step']:06d}"))
    lines: list[str] = []
    for sampling, found in recovered(before, teacher, after, task, spec.evaluate.sampling).items():
        what = f"{sampling}: {found.share:.0%} of the teacher's gap recovered"
        low_high = found.bounds and "[{:.0%}, {:.0%}]".format(*found.bounds)
        lines.append(f"{what} {low_high or f'(no interval: {found.unbounded})'}")
    return lines


def _cell(column: Mapping[str, float], key: str, share: bool, digits: int) -> str:
    if key not in column:
        return ""
    text = f"{column[key]:.0%}" if share else f"{column[key]:.{digits}f}"
    if f"{key}_low" in column:
        ends = [column[f"{key}_{end}"] for end in ("low", "high")]
        text += " [{}, {}]".format(*(f"{end:.0%}" if share else f"{end:.{digits}f}" for end in ends))
    return text


def _is_share(columns: Mapping[str, Mapping[str, float]], key: str) -> bool:
    """Whether a reward is shown in per cent: all means and intervals lie between 0 and 1."""
    found = [column[one] for column in columns.values() for one in (key, f"{key}_low", f"{key}_high") if one in column]
    return all(0 <= value <= 1 for value in found)


def _print_responses(
    folder: StageDir, task: str | None, rows: Sequence[Mapping[str, Any]], console: Console, count: int = 2
) -> None:
    before, after = (
        [row for row in folder.read_held_out(when) if row["task"] == task]
        for when in ("before", f"step_{rows[-1]['step']:06d}")
    )
    for old, new in list(zip(before, after, strict=False))[:count]:
        # Files of earlier versions have only the texts without special tokens.
        read = old.get("student_reads") or old["prompt"]
        console.print(f"  {_shortened(read)!r}", highlight=False, markup=False, style="bold", soft_wrap=True)
        for label, row in (("before: ", old), ("after:  ", new)):
            tokens: list[str] | None = row.get("response_tokens")
            written = row["response"] if tokens is None else "".join(tokens)
            console.print(f"    {label}{written!r}", highlight=False, markup=False, soft_wrap=True)


def _shortened(text: str) -> str:
    """The text without the middle of a long one."""
    return text if len(text) <= 2 * END + 40 else f"{text[:END]} ... {len(text) - 2 * END} characters ... {text[-END:]}"
