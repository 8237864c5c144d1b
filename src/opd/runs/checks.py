"""Every check of a recipe that needs no weights: `opd check` runs these alone, `opd train` before it loads a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from opd.models.preview import known_config, known_weights, tokenizer_of, without_weights
from opd.recipe.schema import Recipe, StageSpec, origin_of
from opd.runs.fit import check_processes
from opd.runs.held_out import with_shared
from opd.runs.own import check_own
from opd.runs.prepare import Given, Prepared, prepare
from opd.runs.same_model import check_other_weights
from opd.runs.saves import check_save
from opd.runs.tokenizers import check_template_options, check_tokenizers
from opd.stage.folder import check_stage_name
from opd.stage.trackers import check_report_to


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """The prepared stages by name, and one line for each check that has something to report."""

    prepared: Mapping[str, Prepared]
    lines: Mapping[str, list[str]]


def check_stages(recipe: Recipe, given: Given, *, processes: int = 1) -> Checked:
    """Build every stage's method, load its data, render its prompts. Raises ConfigError, DataError, AlignmentError."""
    check_report_to(recipe.report_to)
    for spec in recipe.stages:
        check_stage_name(spec.name)
    prepared: dict[str, Prepared] = {}
    lines: dict[str, list[str]] = {}
    seen: set[str] = set()
    trained_on: dict[str, set[str]] = {}
    for spec in recipe.stages:
        of_stage = prepared[spec.name] = with_shared(spec, prepare(spec, given, recipe.seed), trained_on)
        own = check_own(recipe, spec, of_stage, given)
        checked = check_tokenizers(recipe, spec, of_stage, given.models)
        saved = check_save(recipe, spec, given.models)
        same = check_other_weights(recipe, spec, of_stage.method, given)
        lines[spec.name] = [
            *own,
            *saved,
            *checked,
            *same,
            *check_models(recipe, spec, given, seen),
            *check_experts(recipe, spec, given),
        ]
        check_processes(recipe, spec, of_stage.method, of_stage.order, processes)
    check_template_options(recipe, prepared)
    return Checked(prepared=prepared, lines=lines)


def check_models(recipe: Recipe, spec: StageSpec, given: Given, seen: set[str]) -> list[str]:
    """Compare the weights of the stage's models with their configs, without reading them. Returns notes.

    `seen`: names of models that need no further look; this adds the stage's. Raises ConfigError.
    """
    names = dict.fromkeys((spec.train, *spec.teachers, *spec.judge_models))
    new = [name for name in names if name not in seen and name not in given.models]
    seen.update(new)
    return [line for name in new for line in known_weights(origin_of(recipe, name), name)]


def check_experts(recipe: Recipe, spec: StageSpec, given: Given) -> list[str]:
    """Compare `router_aux_loss` with the student's config. Returns a note; raises ConfigError: see `coefficient_of`."""
    from opd.models.experts import coefficient_in, coefficient_of, left_out

    name, setting, model = spec.train, spec.router_aux_loss, None
    if name in given.models:
        model = given.models[name].model
    else:
        origin = origin_of(recipe, name)
        config = known_config(origin, name, tokenizer_of(origin, name) if origin.init is not None else None)
        if config is not None and (setting or coefficient_in(config)):
            model = without_weights(config, trust_remote_code=origin.trust_remote_code)
    if model is None:
        return []
    coefficient_of(model, setting, spec.where(None))
    line = left_out(model, setting)
    return [f"model {name}: {line}"] if line else []
