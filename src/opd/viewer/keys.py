"""The keys of resolved recipes, and of the environments of runs, whose values differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from opd.messages import visible
from opd.viewer.texts import shortened

# Keys of the recipe that may differ between equal runs.
OWN = ("name", "output_dir", "description", "report_to", "report_to_samples")


def differing(
    recipes: Sequence[Mapping[str, Any]], environments: Sequence[Mapping[str, Any]]
) -> list[tuple[str, list[str]]]:
    """The keys of resolved recipes, and of environments, whose values are not all equal, with each run's value.

    Names and folders are left out. A key that a run does not have is shown as an empty text.
    """
    every = [flat({key: value for key, value in recipe.items() if key not in OWN}) for recipe in recipes]
    for one, environment in zip(every, environments, strict=True):
        kept = {key: environment.get(key) for key in ("cpu", "gpu", "python")}
        versions = environment.get("packages") or {}
        kept |= {key: versions.get(key) for key in ("opd", "torch", "transformers")}
        one |= {f"environment.{key}": value for key, value in kept.items() if value is not None}
    keys = dict.fromkeys(key for one in every for key in one)
    rows = [(key, [_text(one.get(key)) if key in one else "" for one in every]) for key in keys]
    return [(visible(key), values) for key, values in rows if len(set(values)) > 1]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; a list of sections with names by their names."""
    if isinstance(value, list) and value and all(isinstance(one, dict) and "name" in one for one in value):
        value = {str(one["name"]): {key: inner for key, inner in one.items() if key != "name"} for one in value}
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return out


def _text(value: Any) -> str:
    return visible(shortened(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 300))
