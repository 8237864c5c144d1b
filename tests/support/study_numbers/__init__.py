"""Numbers of every study as its paper claims them, and their opposite: what the tests of verdicts feed to `judge`.

Each file has NUMBERS (by study: as claimed, opposite) and SECOND (by study: numbers for which setting A fails and B
holds, and the places of the claims that then hold in B only).
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any


def spread(value: float, n: int = 3) -> list[float]:
    """Seeds that differ a little, by no more than a thousandth."""
    return [value + 1e-3 * abs(value) * (i - (n - 1) / 2) / n for i in range(n)]


def collected(name: str) -> dict[str, Any]:
    """The dictionaries called `name` of all files, as one."""
    files = [importlib.import_module(f"support.study_numbers.{one.name}") for one in pkgutil.iter_modules(__path__)]
    return {study: value for file in files for study, value in getattr(file, name).items()}
