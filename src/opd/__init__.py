"""On-policy distillation of language models.

`opd.distill(...)` runs one stage, `opd.run(recipe)` a recipe; both return a `Run`,
`opd.load_run(folder)` one whose process has ended. `opd.evaluate(...)` measures a model. Read
`opd.train` for the loop, `opd.types` for the records, `opd.methods` for the papers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.api import distill, evaluate, run
    from opd.runs.result import Run, load_run

__version__ = "0.1.0"


__all__ = ["Run", "distill", "evaluate", "load_run", "run"]


_HOME = {
    **dict.fromkeys(("distill", "evaluate", "run"), "opd.api"),
    **dict.fromkeys(("Run", "load_run"), "opd.runs.result"),
}


def __getattr__(name: str) -> Any:
    """Import a name on first use: `import opd` and `opd --help` must not import torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'opd' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
