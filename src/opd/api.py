"""From Python: `distill` for one stage, `run` for a whole recipe, `evaluate` for a model."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opd.commands.eval import Evaluated, measured, own_of
from opd.data.prompts import Report, load_selected, read_rows, require_columns
from opd.errors import ConfigError
from opd.method import Method
from opd.methods import build
from opd.models import wrapping
from opd.models.language_model import LanguageModel
from opd.models.loading import load_model
from opd.models.vocabularies import on_common_tokens
from opd.parallel import join
from opd.recipe.load import load_recipe, parse_recipe, parse_section
from opd.recipe.schema import DataSection, ModelSpec, Recipe, RewardSection, SamplingSection
from opd.rewards.base import RewardFn
from opd.rewards.registry import as_reward, reward_of
from opd.runs.prepare import Given
from opd.runs.stages import Run, run_recipe
from opd.stage.progress import Progress
from opd.stage.quiet import quiet_libraries
from opd.types import Prompt, Reward, Sampler, Teacher


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe, *overrides: str, quiet: bool = False, accept_changes: bool = False
) -> Run:
    """Run a recipe: a path, a mapping, or a Recipe; `overrides` as on the command line, e.g. "seed=1".

    A stopped run continues from its last checkpoint. `accept_changes`: also if its recipe, rows, models or code have
    changed in ways that change the numbers; the changes are recorded in changes.jsonl.

    Raises the errors of `opd.errors`.
    """
    if quiet:
        quiet_libraries()
    if not isinstance(recipe, Recipe):
        recipe = parse_recipe(recipe, overrides) if isinstance(recipe, Mapping) else load_recipe(recipe, overrides)
    elif overrides:
        raise ConfigError("Overrides apply to a path or a mapping; a Recipe object is already resolved.")
    return _start(recipe, Given(), quiet, accept_changes)


def distill(
    *,
    student: Any,
    prompts: str | Path | Sequence[str | Prompt | Mapping[str, Any]] | Iterable[Mapping[str, Any]],
    method: str | Method | Callable[..., Method] = "reverse_kl",
    steps: int,
    teacher: Any = None,
    base: Any = None,
    sampler: str | Callable[..., Sampler] | None = None,
    options: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    teacher_tokenizer: Any = None,
    reward: str | Mapping[str, Any] | RewardFn | Reward | None = None,
    chat: bool = False,
    last_assistant: str = "response",
    assistant_turns: str = "last",
    columns: Mapping[str, str] = {},
    lora: Mapping[str, Any] | None = None,
    device: str | None = None,
    report_to: str | Sequence[str] = (),
    output_dir: str | Path | None = None,
    seed: int = 0,
    quiet: bool = False,
    accept_changes: bool = False,
    **stage: Any,
) -> Run:
    """One stage of distillation.

    `student` and `teacher` are paths, hub ids, transformers models or peft models. Model objects need `tokenizer`;
    `teacher_tokenizer` defaults to it. A student object is trained in place. `teacher` may also be an object with the
    methods of `opd.types.Teacher`, or the name of a function or class, "my_module:MyTeacher", called (student), that
    returns one; or several of these by name, {"one": ..., "other": ...}, for a method in which all score each row.
    `base` likewise; the student object stands for its weights without the adapter. `sampler`, or its name, is called
    (student, sampling) and returns an `opd.types.Sampler`. `prompts` is a path as in a recipe's data section, or
    rows: strings, mappings with `prompt` (such as a `datasets.Dataset`), or `Prompt`s; `chat`, `last_assistant`,
    `assistant_turns` and `columns` are fields of that section. `reward` is a name, a recipe's reward section, a
    function (prompt, text) -> float or in TRL's form, or a `Reward`. `lora`, e.g. {"rank": 16}, is the section of a
    student that is given by path; `device` is that of all models given by path; `report_to` is the recipe's: "wandb",
    "trackio", "tensorboard". `method` is a name, a function that returns a Method (with `options`), or a Method.
    Further keywords are fields of a stage: `sampling={...}`. The run is in `output_dir` (default: new, in runs/).
    """
    if quiet:
        quiet_libraries()
    _check_mappings("opd.distill", options=options, lora=lora, columns=columns)
    own_base = base is student and not isinstance(base, str | Path)  # its weights without the adapter
    teachers = _several(teacher, teacher_tokenizer or tokenizer)
    specs, models, scorers = _models((student, tokenizer), teachers | {"base": (None if own_base else base, tokenizer)})
    _settings(specs, models, lora, device)
    data, rows, reports = _data(
        prompts, chat=chat, last_assistant=last_assistant, assistant_turns=assistant_turns, columns=dict(columns or {})
    )
    section, given_reward = _reward(reward)
    named_base = "student" if own_base else "base" if "base" in specs else None
    described = _stage("+".join(teachers) or None, named_base, sampler, method, options)
    described |= {"data": data, "reward": section, "steps": steps, **stage}
    whole = {"name": "distill", "seed": seed, "output_dir": str(output_dir or _new_folder()), "report_to": report_to}
    recipe = parse_recipe({**whole, "models": specs, "stages": [described]}, source="distill(...)")
    made = None if isinstance(method, str) else method if isinstance(method, Method) else build(method, options or {})
    given = Given(models=models, prompts=rows, reports=reports, reward=given_reward, method=made, teachers=scorers)
    return _start(recipe, given if isinstance(sampler, str) else replace(given, sampler=sampler), quiet, accept_changes)


def _check_method(method: Any) -> None:
    """Raise ConfigError for what is no method."""
    if not callable(method) and not isinstance(method, str | Method):
        raise ConfigError(
            f"The `method` of opd.distill is {method!r:.80} ({type(method).__name__}). Give a name (`opd methods` "
            "lists them), a Method, or a function that returns one."
        )


def _check_mappings(where: str, **mappings: Any) -> None:
    """Raise ConfigError for another value than a mapping or None."""
    for name, value in mappings.items():
        if value is not None and not isinstance(value, Mapping):
            example = {"lora": "{'rank': 16}", "options": "{'k': 20}"}.get(name, "{'prompt': 'question'}")
            raise ConfigError(
                f"`{name}` of {where} is {value!r:.80} ({type(value).__name__}), but must be a mapping, such "
                f"as {example}."
            )


def _stage(teacher: str | None, base: str | None, sampler: Any, method: Any, options: Any) -> dict[str, Any]:
    """The recipe's stage, as far as it says who takes part and by which method. Raises ConfigError for no method."""
    _check_method(method)
    return {
        "name": "distill",
        "train": "student",
        "teacher": teacher,
        "base": base,
        "sampler": _named(sampler),
        "method": method if isinstance(method, str) else f"(a {type(method).__name__} given in Python)",
        "options": dict(options or {}),
    }


def evaluate(
    model: Any,
    prompts: str | Path | Sequence[str | Prompt | Mapping[str, Any]] | Iterable[Mapping[str, Any]],
    *,
    reward: str | Mapping[str, Any] | RewardFn | Reward | None = None,
    teacher: Any = None,
    tokenizer: Any = None,
    teacher_tokenizer: Any = None,
    sampling: Mapping[str, Any] = {},
    chat: bool = False,
    last_assistant: str = "response",
    assistant_turns: str = "last",
    columns: Mapping[str, str] = {},
    device: str | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Evaluated:
    """Responses of a model to held-out prompts, measured: what `opd eval` prints.

    `model` and `teacher` are paths, hub ids, or model objects with their `tokenizer`; `prompts`, `chat`,
    `last_assistant`, `assistant_turns`, `columns` and `reward` are those of `distill`; `sampling` is a recipe's
    section, e.g. {"n": 4}. Returns `metrics` by name (reward with its 95 % interval, pass@k, length, ...; of a teacher
    the divergence from it, in nats per token) and `rows`, one per response. Raises the errors of `opd.errors`.
    """
    if quiet:
        quiet_libraries()
    _check_mappings("opd.evaluate", columns=columns)
    rule: Reward | None = None
    if isinstance(reward, str | Mapping):
        rule = reward_of(
            parse_section(RewardSection, {"name": reward} if isinstance(reward, str) else reward, "reward")
        )
    elif reward is not None:
        rule = as_reward(reward, "The `reward` of opd.evaluate")
    data, rows, reports = _data(
        prompts, chat=chat, last_assistant=last_assistant, assistant_turns=assistant_turns, columns=dict(columns or {})
    )
    needs = [] if rule is None else sorted(rule.needs)
    if rows is None:
        rows, reports = load_selected(parse_section(DataSection, data, "data"), require=needs)
    require_columns(rows, needs, source="the rows given in Python")
    own = own_of(rows, rule, parse_section(SamplingSection, sampling, "sampling"), list(map(str, reports)))
    lm = _loaded(model, "model", tokenizer, device)
    others: dict[str, LanguageModel] = {}
    if teacher is not None:
        other = _loaded(teacher, "teacher", teacher_tokenizer or tokenizer, device)
        lm, others = on_common_tokens(lm, {"teacher": other})
    if not quiet:
        for note in (*own.notes, *lm.notes, *(note for one in others.values() for note in one.notes)):
            print(f"evaluate: {note}", file=sys.stderr)
    return measured(own, lm, others, seed, 4096)


def _loaded(model: Any, name: str, tokenizer: Any, device: str | None) -> LanguageModel:
    """A model by path, or an object. Raises ConfigError for an object with a device, which it has already."""
    if isinstance(model, str | Path):
        return load_model(ModelSpec(path=str(model), device=device), name=name, where=f"opd.evaluate({name}=...)")
    _refuse_device(name, device)
    return wrapping.wrap(model, tokenizer, name=name)


def _refuse_device(name: str, device: str | None) -> None:
    if device is not None:
        raise ConfigError(
            f"`device` is {device!r}, and {name} is a model object, which is on a device already. Move it there, or "
            "give its path."
        )


def _settings(
    specs: dict[str, dict[str, Any]], models: Mapping[str, LanguageModel], lora: Any, device: str | None
) -> None:
    """Put `lora` and `device` into the sections of models given by path, in place. Raises ConfigError for objects."""
    if lora is not None and "student" in models:
        raise ConfigError(
            "`lora` is for a student that is given by path, and this one is a model object. Give peft's model, "
            "get_peft_model(student, LoraConfig(...)), or the path."
        )
    if lora is not None:
        specs["student"]["lora"] = dict(lora)
    if device is None:
        return
    for name, spec in specs.items():
        if name in models:
            _refuse_device(name, device)
        if "path" in spec:
            spec["device"] = device


def _several(teacher: Any, tokenizer: Any) -> dict[str, tuple[Any, Any]]:
    """The teachers with their tokenizer, by name. Raises ConfigError for one that has the name of another model."""
    several = teacher if isinstance(teacher, Mapping) else {} if teacher is None else {"teacher": teacher}
    for taken, whose in (("student", "the student"), ("base", "the base")):
        if taken in several:
            raise ConfigError(f"A teacher of opd.distill is named {taken!r}, as {whose} is. Give it another name.")
    return {name: (one, tokenizer) for name, one in several.items()}


def _models(
    student: tuple[Any, Any], others: Mapping[str, tuple[Any, Any]]
) -> tuple[dict[str, dict[str, Any]], dict[str, LanguageModel], dict[str, Teacher]]:
    """(model sections by name, models given in Python, teachers given in Python), from (model, tokenizer) each."""
    models: dict[str, LanguageModel] = {}
    scorers: dict[str, Teacher] = {}
    specs = {"student": _model(student[0], "student", student[1], models)}
    specs |= {name: _other(name, *one, models, scorers) for name, one in others.items() if one[0] is not None}
    return specs, models, scorers


def _data(prompts: Any, **reading: Any) -> tuple[dict[str, Any], list[Prompt] | None, tuple[Report, ...]]:
    """(the data section of `prompts`, its rows if they are given in Python, reports of their conversion)."""
    if isinstance(prompts, str | Path):
        return {"path": str(prompts), **reading}, None, ()
    rows, reports = read_rows(prompts, **reading)
    return {"path": _described(rows), **reading}, rows, tuple(reports)


def _reward(reward: Any) -> tuple[Any, Reward | None]:
    """(the section of a reward in the recipe, the reward itself if it is given in Python)."""
    if reward is None or isinstance(reward, (str, Mapping)):
        return {"name": reward} if isinstance(reward, str) else reward, None
    return None, as_reward(reward, "The `reward` of opd.distill")


def _start(recipe: Recipe, given: Given, quiet: bool, accept_changes: bool) -> Run:
    with join() as world:
        if given.models and world.size > 1:
            raise ConfigError(
                f"{' and '.join(given.models)}: {world.size} processes cannot share a model object. Save it, and give "
                "its path."
            )
        return run_recipe(recipe, given, Progress(quiet=quiet), world, accept_changes=accept_changes)


def _named(sampler: str | Callable[..., Sampler] | None) -> str | None:
    """The recipe's text for a sampler."""
    return (
        sampler
        if sampler is None or isinstance(sampler, str)
        else f"({getattr(sampler, '__name__', type(sampler).__name__)} given in Python)"
    )


def _other(
    name: str, model: Any, tokenizer: Any, given: dict[str, LanguageModel], scorers: dict[str, Teacher]
) -> dict[str, Any]:
    """The model section of a teacher or base: a path, a model object, a `Teacher`, or the name of its maker."""
    if isinstance(model, str):
        own = ":" in model and not model.startswith("package:")
        return {"scorer": model} if own else {"path": model}
    if hasattr(model, "score"):
        scorers[name] = model
        return {"scorer": f"(a {type(model).__name__} given in Python)"}
    return _model(model, name, tokenizer, given)


def _model(model: Any, name: str, tokenizer: Any, given: dict[str, LanguageModel]) -> dict[str, Any]:
    if isinstance(model, (str, Path)):
        return {"path": str(model)}
    given[name] = wrapping.wrap(model, tokenizer, name=name)
    return {"path": f"(a {type(model).__name__} given in Python)"}


def _described(rows: Sequence[Prompt]) -> str:
    """The recipe's text for rows, with a hash: other rows make another run."""
    digest = hashlib.sha256(repr(list(rows)).encode())
    return f"({len(rows)} rows given in Python, {digest.hexdigest()[:12]})"


def _new_folder() -> Path:
    """The first of runs/distill-1, -2, ... that does not exist."""
    n = 1
    while (folder := Path("runs") / f"distill-{n}").exists():
        n += 1
    return folder
