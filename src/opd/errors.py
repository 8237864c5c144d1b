"""The errors for users: every message says what, got, why and the remedy.

Each error derives from `OPDError` and from the standard type that it replaces, so `except ValueError` keeps working.
A `ConfigError` comes before any weight is loaded. `assert` is for bugs of opd, never for a user's input.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class OPDError(Exception):
    """Base of every error that `opd` raises on purpose."""


class ConfigError(OPDError, ValueError):
    """The recipe, an option or a combination of options cannot work."""


class DataError(OPDError, ValueError):
    """A data file, a row or a rendered prompt cannot be used."""


class TeacherError(OPDError, RuntimeError):
    """A teacher could not score, or its scores cannot be right."""


class AlignmentError(OPDError, ValueError):
    """The tokens of student and teacher cannot be matched."""


class TrainingError(OPDError, RuntimeError):
    """A step went wrong (no trained token, NaN loss, a reward that raised); checkpoints are untouched."""


class NotFiniteError(TrainingError):
    """The student's logits are not finite, so no token can be drawn: its weights or activations overflowed."""


class RunError(OPDError, OSError):
    """The run directory cannot be used: another run, no space, not writable."""


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for a misspelt `name`, or the empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""


def incomplete(info: Mapping[str, Any], unused: str | None = None) -> str | None:
    """What loaded weights lack, in words, from transformers' `output_loading_info`; None if they are complete.

    `unused`: the start of the names of tensors that may be missing.
    """
    missing = sorted(name for name in info["missing_keys"] if unused is None or not name.startswith(unused))
    if missing:
        more = ", ..." if len(missing) > 3 else ""
        return f"the weights lack {len(missing)} tensors of the model ({', '.join(missing[:3])}{more})"
    other = sorted((name, tuple(got), tuple(want)) for name, got, want in info["mismatched_keys"])
    if other:
        name, got, want = other[0]
        return f"the shapes of {len(other)} tensors differ from the model's ({name} has {got}, the model {want})"
    return None
