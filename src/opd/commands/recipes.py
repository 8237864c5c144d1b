"""`opd recipes`: the recipes in the package."""

from __future__ import annotations

import os
from pathlib import Path

from opd.recipe import packaged


def lines() -> list[str]:
    """A line for each recipe: name, minutes of one core, methods of the stages, description."""
    rows = [
        (
            one.name,
            "" if one.minutes is None else f"{one.minutes:g} min",
            ", ".join(one.methods),
            one.description,
        )
        for one in packaged.listed()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return [
        f"{name:{widths[0]}}  {minutes:>{widths[1]}}  {methods:{widths[2]}}  {description}".rstrip()
        for name, minutes, methods, description in rows
    ]


def copied(name: str) -> list[str]:
    """Copy a recipe into the working folder; returns what was written. Raises ConfigError or RunError."""
    files = packaged.copy(name, Path())
    return [f"{file} written" for file in files] + [f"Run it with: opd train {files[0]}"]


def completed(incomplete: str) -> list[str]:
    """The recipes' names, YAML files and folders that begin with a text, as a shell completes it."""
    folder, _, start = incomplete.rpartition("/")
    where = Path(folder or ("/" if incomplete.startswith("/") else "."))
    there = sorted(where.iterdir()) if where.is_dir() and os.access(where, os.R_OK) else []
    prefix = incomplete[: len(incomplete) - len(start)]
    files = [f"{prefix}{one.name}{'/' if one.is_dir() else ''}" for one in there if _fits(one, start)]
    return [name for name in packaged.names() if name.startswith(incomplete)] + files


def _fits(file: Path, start: str) -> bool:
    return file.name.startswith(start) and (file.is_dir() or file.suffix in packaged.ENDINGS)
