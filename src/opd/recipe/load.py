"""Load a validated `Recipe` from a YAML file or a mapping, with overrides; write it back as YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from opd.errors import ConfigError
from opd.recipe.mistakes import explain
from opd.recipe.packaged import recipe_file
from opd.recipe.references import check_references
from opd.recipe.schema import Recipe, Section, StageSpec, section_of
from opd.recipe.tree import fresh, merged, override, with_whole_tasks
from opd.recipe.yaml_text import Source, read_file, write_text

AnySection = TypeVar("AnySection", bound=Section)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override, merge `defaults`, validate. `path`: a file, or the name of a recipe in the package.

    Raises ConfigError with the key, the value it got, and the remedy.
    """
    file = recipe_file(path)
    raw, source = read_file(file)
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} is a {type(raw).__name__}; a recipe is a mapping with `models` and `stages`.")
    return parse_recipe(raw, overrides, source)


def parse_recipe(raw: Mapping[str, Any], overrides: Sequence[str] = (), source: str | Source = "recipe") -> Recipe:
    """The Recipe of a mapping, as read from YAML. Raises ConfigError.

    `defaults` is merged under every stage. A model `from_stage` has the chat template and options of `section_of`.
    `source` is the origin of `raw` in messages; a `Source` also knows the lines.
    """
    source = Source(name=source) if isinstance(source, str) else source
    tree: dict[str, Any] = fresh(raw)
    for text in overrides:
        source = override(tree, text, source, stage_keys=StageSpec.model_fields, recipe_keys=Recipe.model_fields)
    defaults = tree.pop("defaults", {})
    if not isinstance(defaults, dict):
        where = source.where(("defaults",))
        raise ConfigError(
            f"{source.name} is not valid:\n  {f'{where}: ' if where else ''}`defaults` is a mapping of fields for all "
            f"stages (got {defaults!r:.80})."
        )
    if isinstance(tree.get("stages"), list):
        tree["stages"] = [_whole(defaults, stage, source, i) for i, stage in enumerate(tree["stages"])]
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        keys = StageSpec.model_fields
        raise ConfigError(explain(error, source, Recipe, stage_keys=keys, overrides=overrides)) from error
    check_references(recipe, source)
    return _with_sections(recipe)


def _with_sections(recipe: Recipe) -> Recipe:
    """The recipe with `section_of` each model that a stage names: what it does is written in it, also when dumped."""
    used = {name for stage in recipe.stages for name in stage.models}
    models = {name: section_of(recipe, name) if name in used else spec for name, spec in recipe.models.items()}
    return recipe.model_copy(update={"models": models})


def _whole(defaults: dict[str, Any], stage: Any, source: Source, number: int) -> Any:
    """A stage with `defaults` under it, and its tasks with its own settings under them."""
    if not isinstance(stage, dict):
        return stage
    shared = merged(defaults, stage, f"{source.at('defaults')}: defaults")
    return with_whole_tasks(shared, source.at("stages", number))


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return write_text(recipe.model_dump(mode="json", exclude_defaults=False))


def parse_section(section: type[AnySection], values: Mapping[str, Any], source: str) -> AnySection:
    """Validate one section of a recipe alone. Raises ConfigError."""
    try:
        return section.model_validate(fresh(values))
    except ValidationError as error:
        raise ConfigError(explain(error, Source(name=source), section)) from error
