"""Load a validated `Recipe` from a YAML file or a mapping, with overrides; write it back as YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from opd.errors import ConfigError, nearest
from opd.recipe.mistakes import explain
from opd.recipe.references import check_references
from opd.recipe.schema import Recipe, Section, StageSpec
from opd.recipe.tree import fresh, merged, override, with_whole_tasks

AnySection = TypeVar("AnySection", bound=Section)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override, merge `defaults`, validate. Raises ConfigError with the key, the value it got, and the remedy."""
    file = Path(path)
    if not file.is_file():
        there = [p.name for p in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
        raise ConfigError(f"There is no recipe at {file}.{nearest(file.name, there)} Give the path of a YAML file.")
    try:
        raw = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} is a {type(raw).__name__}; a recipe is a mapping with `models` and `stages`.")
    return parse_recipe(raw, overrides, source=str(file))


def parse_recipe(raw: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "recipe") -> Recipe:
    """The Recipe of a mapping, as read from YAML. `defaults` is merged under every stage. Raises ConfigError."""
    tree: dict[str, Any] = fresh(raw)
    for text in overrides:
        override(tree, text, stage_keys=StageSpec.model_fields, recipe_keys=Recipe.model_fields)
    defaults = tree.pop("defaults", {})
    if not isinstance(defaults, dict):
        raise ConfigError(
            f"{source} is not valid: `defaults` is a mapping of fields for all stages (got {defaults!r})."
        )
    if isinstance(tree.get("stages"), list):
        stages = [merged(defaults, s) if isinstance(s, dict) else s for s in tree["stages"]]
        tree["stages"] = [with_whole_tasks(s, source) if isinstance(s, dict) else s for s in stages]
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        keys = StageSpec.model_fields
        raise ConfigError(explain(error, source, Recipe, stage_keys=keys, overrides=overrides)) from error
    check_references(recipe, source)
    return recipe


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=False), sort_keys=False, allow_unicode=True)


def parse_section(section: type[AnySection], values: Mapping[str, Any], source: str) -> AnySection:
    """Validate one section of a recipe alone. Raises ConfigError."""
    try:
        return section.model_validate(fresh(values))
    except ValidationError as error:
        raise ConfigError(explain(error, source, section)) from error
