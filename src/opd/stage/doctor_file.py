"""The doctor's findings on their way to the run: it examines a recipe before the run has a folder.

They are kept in the cache under a hash of the resolved recipe. The start of a run of the same recipe copies them to
`<run>/doctor.json`; if the run's folder has been made already, they go there at once.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from opd.files import cache_dir, write_atomically
from opd.recipe.load import dump
from opd.recipe.schema import Recipe

NAME = "doctor.json"


def keep(recipe: Recipe, findings: str) -> None:
    """Keep the findings (JSON) for the next start of this recipe, and in its folder if it has been started.

    Raises RunError if a file cannot be written.
    """
    text = dump(recipe)
    file = _kept(text)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, findings + "\n")
    run = recipe.folder / "recipe.yaml"
    if run.is_file() and run.read_text() == text:
        write_atomically(recipe.folder / NAME, findings + "\n")


def bring(folder: Path, text: str) -> None:
    """Copy what is kept for the recipe of this text to its run's folder."""
    file = _kept(text)
    if file.is_file():
        write_atomically(folder / NAME, file.read_bytes())


def _kept(text: str) -> Path:
    return cache_dir() / "doctor" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
