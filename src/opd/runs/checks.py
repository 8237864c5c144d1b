"""Every check of a recipe that needs no weights: `opd check` runs these alone, `opd train` before it loads a model."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from opd.data.order import PromptOrder
from opd.errors import ConfigError, RunError
from opd.files import refused
from opd.models.lora_targets import check_targets
from opd.models.preview import known_config, known_facts, known_weights, tokenizer_of, without_weights
from opd.recipe.references import unused_models
from opd.recipe.schema import ModelSpec, Recipe, StageSpec, origin_of
from opd.runs.fit import check_processes
from opd.runs.held_out import check_apart, with_shared
from opd.runs.low_bits import check_low_bits
from opd.runs.own import check_own
from opd.runs.prepare import Given, Prepared, prepare
from opd.runs.same_model import check_base_weights, check_common_start, check_other_weights, untrained_teachers
from opd.runs.saves import check_save
from opd.runs.served import check_engine
from opd.runs.stale import check_ahead
from opd.runs.talks import check_talks
from opd.runs.tokenizers import check_template_options, check_tokenizers
from opd.stage.folder import check_stage_name
from opd.stage.trackers import check_report_to


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """The prepared stages by name, and one line for each check that has something to report."""

    prepared: Mapping[str, Prepared]
    lines: Mapping[str, list[str]]
    notes: list[str]  # about the whole recipe


def check_stages(recipe: Recipe, given: Given, *, processes: int = 1) -> Checked:
    """Build every stage's method, load its data, render its prompts. Raises ConfigError, DataError, AlignmentError."""
    check_report_to(recipe.report_to)
    check_output_dir(recipe.folder)
    for spec in recipe.stages:
        check_stage_name(spec.name)
    prepared: dict[str, Prepared] = {}
    notes = unused_models(recipe)
    lines: dict[str, list[str]] = {}
    seen: set[str] = set()
    trained_on: dict[str, set[str]] = {}
    for whole in recipe.stages:
        if whole.peers:
            check_common_start(recipe, whole, given)
        for spec in whole.views:
            of_stage = with_shared(spec, prepare(spec, given, recipe.seed), trained_on)
            first = prepared.setdefault(spec.name, of_stage)
            if of_stage is not first:
                prepared[spec.name] = replace(first, peers={**first.peers, spec.train: of_stage})
            check_apart(spec, prepared)
            more, found = check_view(recipe, spec, of_stage, given, seen, processes)
            notes += [line for line in more if line not in notes]
            known = lines.setdefault(spec.name, [])
            known += [line for line in found if line not in known]
    check_template_options(recipe, prepared)
    return Checked(prepared=prepared, lines=lines, notes=notes)


def check_view(
    recipe: Recipe, spec: StageSpec, of_stage: Prepared, given: Given, seen: set[str], processes: int
) -> tuple[list[str], list[str]]:
    """Check a stage as one of its models sees it; returns (lines that a run shows too, lines to report)."""
    notes = [f"{spec.name}: {line}" for line in untrained_teachers(recipe, spec)]
    notes += [f"{spec.name}: {line}" for line in unused_settings(spec, of_stage.order)]
    notes += [f"{spec.name}: {line}" for line in check_ahead(spec, of_stage.method)]
    own = [*check_own(recipe, spec, of_stage, given), *check_engine(recipe, spec, given.models, processes)]
    talks = check_talks(recipe, spec, of_stage, given.models.get(spec.train))
    checked = check_tokenizers(recipe, spec, of_stage, given.models)
    saved = check_save(recipe, spec, given.models)
    same = check_other_weights(recipe, spec, of_stage.method, given)
    check_base_weights(recipe, spec, of_stage.method, given)
    lines = [
        *own,
        *saved,
        *talks,
        *checked,
        *same,
        *check_models(recipe, spec, given, seen),
        *check_experts(recipe, spec, given),
    ]
    check_processes(recipe, spec, of_stage.method, of_stage.order, processes)
    check_low_bits(recipe, spec, given, processes)
    return notes, lines


def check_output_dir(folder: Path) -> None:
    """Refuse a run's folder that cannot be made or written to. Creates nothing. Raises RunError."""
    whole = folder.absolute()
    try:
        there = next(place for place in (whole, *whole.parents) if place.exists())
    except OSError as error:
        raise refused(folder, error) from error
    if there == whole and not there.is_dir():
        raise RunError(f"{folder} is a file, and a run needs a folder. Use another output_dir=..., or move the file.")
    if not there.is_dir():
        raise refused(folder, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(there, os.W_OK | os.X_OK):
        raise refused(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def unused_settings(spec: StageSpec, order: PromptOrder) -> list[str]:
    """Lines about settings of a stage without effect: an unreached rate, unused tasks, several greedy responses."""
    lines: list[str] = []
    warmup, rate = spec.optimizer.warmup_steps, spec.optimizer.learning_rate
    if warmup > spec.steps:
        lines.append(
            f"optimizer.warmup_steps is {warmup} and steps is {spec.steps}, so the learning rate ends at "
            f"{spec.steps / warmup:.0%} of {rate:g}"
        )
    names = list(spec.by_task)
    for task, first in order.unused_tasks(spec.steps).items():
        lines.append(
            f"task {names[task]} has the share {order.shares[task]:g} and no prompt in the {spec.steps} steps: "
            f"{f'{first:,}' if first < 10**12 else f'{first:.0e}' if first < 10**300 else 'over 1e300'} steps come "
            "before its first"
        )
    for name, part in spec.by_task.items():
        evaluated = part.evaluate.sampling if part.evaluate is not None else {}
        settings = {"sampling": part.sampling} | {f"evaluate.sampling.{key}": one for key, one in evaluated.items()}
        where = "" if name is None else f"task {name}: "
        lines += [
            f"{where}{key} draws {one.n} responses to each prompt at temperature 0, and they are all the same"
            for key, one in settings.items()
            if one.temperature == 0 and one.n > 1
        ]
    return lines


def check_models(recipe: Recipe, spec: StageSpec, given: Given, seen: set[str]) -> list[str]:
    """Check the stage's models as far as that needs no weights: `known_weights`, `check_new`, device, LoRA, template.

    `seen`: names of models that need no further look; this adds the stage's. Returns notes. Raises ConfigError.
    """
    new = [name for name in spec.models if name not in seen and name not in given.models]
    seen.update(new)
    lines: list[str] = []
    for name in new:
        origin, own = origin_of(recipe, name), recipe.models[name]
        if own.device not in (None, "cpu"):  # these two are always here
            from opd.models.loading import device_of

            device_of(own, f"models.{name}")
        lines += known_weights(origin, name)
        if own.lora is not None:
            check_lora(own, origin, name)
        if origin.init is not None:
            from opd.models.loading import check_new

            check_new(origin, name, recipe.seed)
    check_judges(recipe, spec, given)
    return lines


def check_lora(spec: ModelSpec, origin: ModelSpec, name: str) -> None:
    """Refuse target modules that the model does not have, if its config is known. Raises ConfigError."""
    assert spec.lora is not None
    config = known_config(origin, name, tokenizer_of(origin, name) if origin.init is not None else None)
    model = None if config is None else without_weights(config, trust_remote_code=origin.trust_remote_code)
    if model is not None:
        check_targets(model, spec.lora.target_modules, f"models.{name}.lora")


def check_judges(recipe: Recipe, spec: StageSpec, given: Given) -> None:
    """Refuse a model without a chat template as a judge of `rubric`, whose questions are conversations.

    An author answers the prompts themselves, which may be text. Raises ConfigError.
    """
    for task, part in spec.by_task.items():
        asked = part.reward.asks if part.reward is not None and part.reward.name == "rubric" else {}
        for role, judge in asked.items():
            if judge.lm is None or role == "author":
                continue
            loaded, origin = given.models.get(judge.lm), origin_of(recipe, judge.lm)
            tokenizer = tokenizer_of(origin, judge.lm) if loaded is None else loaded.tokenizer
            if tokenizer is not None and not tokenizer.chat_template:
                raise ConfigError(
                    f"{spec.where(task)}: {judge.lm} is the {role} of the reward, and its questions are conversations, "
                    f"but its tokenizer has no chat template. Set models.{judge.lm}.chat_template, or use an instruct "
                    "model."
                )


def check_experts(recipe: Recipe, spec: StageSpec, given: Given) -> list[str]:
    """Compare `router_aux_loss` with the student's config. Returns a note; raises ConfigError: see `coefficient_of`."""
    from opd.models.experts import coefficient_of, left_out

    name, setting, model = spec.train, spec.router_aux_loss, None
    if name in given.models:
        model = given.models[name].model
    else:
        origin = origin_of(recipe, name)
        tokenizer = tokenizer_of(origin, name) if origin.init is not None else None
        facts = known_facts(origin, name, tokenizer)
        if facts is not None and (setting or facts.balance):
            config = known_config(origin, name, tokenizer)
            model = without_weights(config, trust_remote_code=origin.trust_remote_code)
    if model is None:
        return []
    coefficient_of(model, setting, spec.where(None))
    line = left_out(model, setting)
    return [f"model {name}: {line}"] if line else []
