"""What a stage saves: the whole model, its adapter or both; the dtype of the file, and the adapter's base model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.errors import ConfigError
from opd.files import expanded
from opd.models.paths import resolved_path, source_of
from opd.recipe.schema import ModelSpec, Recipe, StageSpec, origin_of

if TYPE_CHECKING:
    import torch

    from opd.models.language_model import LanguageModel
    from opd.stage.folder import RunDir

SAVED_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Saves:
    merged: bool
    adapter: bool
    dtype: torch.dtype | None  # None: the trained model's
    base: str | None  # folder or hub id that the adapter belongs to; None without `adapter`
    origin: Path | str | None  # folder or hub id of the weights that all training began with; None for random ones


def saves_of(recipe: Recipe, spec: StageSpec, given: Mapping[str, LanguageModel], directory: RunDir) -> Saves:
    """What the stage saves. `given`: models that a Python caller passes."""
    adapter = spec.save != "merged"
    return Saves(
        merged=spec.save != "adapter" or read_later(recipe, spec),
        adapter=adapter,
        dtype=_dtype(recipe, spec, given),
        base=_base(recipe, spec, given, directory) if adapter else None,
        origin=_origin(recipe, spec, given),
    )


def read_later(recipe: Recipe, spec: StageSpec) -> bool:
    """Whether a later stage begins with the model that this stage trains."""
    later = recipe.stages[[stage.name for stage in recipe.stages].index(spec.name) + 1 :]
    used = {name for stage in later for name in stage.models}
    return spec.train in used or any(recipe.models[name].from_stage == spec.name for name in used)


def check_save(recipe: Recipe, spec: StageSpec, given: Mapping[str, LanguageModel]) -> list[str]:
    """Refuse an adapter that does not exist, or whose base model is in no folder. Returns lines. Raises ConfigError."""
    if spec.save == "merged":
        return []
    model = recipe.models[spec.train]
    where = f"Stage {spec.name!r}: save is {spec.save!r}"
    if spec.train in given:
        has_base = bool(_name_or_path(given[spec.train]))
    else:
        saved = _adapters(model, spec.train)
        merged = saved if model.lora is not None else saved[:-1]  # the adapter belongs to the model with these merged
        has_base = (model.init is None and not merged) or spec.train in _trained_before(recipe, spec)
    if not trains_adapter(recipe, spec, given):
        raise ConfigError(
            f"{where}, and the model {spec.train!r} trains its full weights. Set `save: merged`, or give "
            f"models.{spec.train} a `lora` section."
        )
    if not has_base:
        raise ConfigError(
            f"{where}, and the adapter of {spec.train!r} would belong to weights that no folder has: random ones, "
            "those of an object without name_or_path, or those with another adapter merged. Set `save: merged`."
        )
    if spec.save == "adapter" and read_later(recipe, spec):
        return [f"a later stage begins with {spec.train}, so the merged model is saved beside the adapter"]
    return []


def trains_adapter(recipe: Recipe, spec: StageSpec, given: Mapping[str, LanguageModel]) -> bool:
    """Whether the stage trains an adapter of its model, as far as is known before weights are loaded."""
    if spec.train in given:
        return given[spec.train].adapters
    model = recipe.models[spec.train]
    return model.lora is not None or bool(_adapters(model, spec.train))


def _trained_before(recipe: Recipe, spec: StageSpec) -> dict[str, str]:
    """Model -> the last stage before this one that trained it."""
    before = recipe.stages[: [stage.name for stage in recipe.stages].index(spec.name)]
    return {name: stage.name for stage in before for name in stage.trains}


def _base(recipe: Recipe, spec: StageSpec, given: Mapping[str, LanguageModel], directory: RunDir) -> str:
    from opd.models.loading import loadable

    if spec.train in given:
        return _absolute(_name_or_path(given[spec.train]))
    model = recipe.models[spec.train]
    stage = _trained_before(recipe, spec).get(spec.train) or model.from_stage
    if stage is not None:
        return _absolute(directory.stage(stage).model)
    return _absolute(loadable(source_of(model, spec.train)).weights)


def _origin(recipe: Recipe, spec: StageSpec, given: Mapping[str, LanguageModel]) -> Path | str | None:
    if spec.train in given:
        path = _name_or_path(given[spec.train])
        return Path(path) if Path(path).is_dir() and path else path or None
    origin = origin_of(recipe, spec.train)
    return None if origin.path is None else resolved_path(origin, spec.train)


def _dtype(recipe: Recipe, spec: StageSpec, given: Mapping[str, LanguageModel]) -> torch.dtype | None:
    import torch
    from transformers import AutoConfig

    from opd.models.loading import loadable

    name = spec.save_dtype
    if name == "origin":
        origin = origin_of(recipe, spec.train)
        if spec.train in given or origin.path is None:
            return None
        path = loadable(source_of(origin, spec.train)).weights
        config: Any = AutoConfig.from_pretrained(path, trust_remote_code=origin.trust_remote_code)
        name = str(config.dtype).removeprefix("torch.")
    return getattr(torch, name) if name in SAVED_DTYPES else None


def _adapters(model: ModelSpec, name: str) -> tuple[Path | str, ...]:
    """The saved adapters of a model's path, in order of application."""
    return () if model.path is None else source_of(model, name).adapters


def _name_or_path(lm: LanguageModel) -> str:
    """Where the transformers model of a Python object was loaded from; empty if nowhere."""
    return str(getattr(lm.causal_lm, "name_or_path", "") or "")


def _absolute(path: Path | str) -> str:
    """A folder as an absolute path, so that the adapter is found from anywhere; a hub id unchanged."""
    local = expanded(path)
    return str(local.absolute()) if isinstance(path, Path) or local.exists() else str(path)


def hub_id(text: str) -> str | None:
    """The `owner/name` in a hub id or in the path of a snapshot in the hub's cache; else None."""
    if found := re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", text):
        return f"{found[1]}/{found[2]}"
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text) and not Path(text).exists()
    return text if is_id else None
