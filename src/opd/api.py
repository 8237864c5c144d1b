"""From Python: `distill` for one stage, `run` for a whole recipe, `evaluate` for a model."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opd.commands.eval import Evaluated, Own, Read, Subject, measured, own_of, silent
from opd.commands.eval_stage import evaluate_as_stage
from opd.data.prompts import Report, load_selected, read_rows, require_columns
from opd.errors import ConfigError
from opd.method import Method
from opd.methods import build
from opd.models import wrapping
from opd.models.language_model import LanguageModel
from opd.parallel import join
from opd.recipe.load import load_recipe, parse_recipe, parse_section
from opd.recipe.schema import DataSection, Recipe, RewardSection, SamplingSection
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
    return _start(_resolved(recipe, overrides), Given(), quiet, accept_changes)


def _resolved(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe of a path, a mapping or a Recipe, with its overrides. Raises ConfigError."""
    if not isinstance(recipe, Recipe):
        return parse_recipe(recipe, overrides) if isinstance(recipe, Mapping) else load_recipe(recipe, overrides)
    if overrides:
        raise ConfigError("Overrides apply to a path or a mapping; a Recipe object is already resolved.")
    return recipe


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
    prompts: str | Path | Sequence[str | Prompt | Mapping[str, Any]] | Iterable[Mapping[str, Any]] | None = None,
    *,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    overrides: Sequence[str] = (),
    stage: str | None = None,
    limit: int | None = None,
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
    seed: int | None = None,
    quiet: bool = False,
) -> Evaluated:
    """Responses of a model to held-out prompts, measured: what `opd eval` prints.

    `model` and `teacher` are paths, hub ids, or model objects with their `tokenizer`; `prompts`, `chat`,
    `last_assistant`, `assistant_turns`, `columns` and `reward` are those of `distill`; `sampling` is a recipe's
    section, e.g. {"n": 4}; `limit` keeps the first prompts; `seed` is 0 unless given. Returns `metrics` by name (reward
    with its 95 % interval, pass@k, length, ...; of a teacher the divergence from it, in nats per token) and `rows`, one
    per response.

    With `recipe`, as `run` takes it, in place of `prompts`: measured as its `stage` measures its student (default: the
    last with `evaluate`), like `opd eval --recipe`. `overrides` are "key=value", `limit` is of each task, `seed` the
    recipe's unless given. A model object is read with the chat template, its options and `autocast` of the recipe's
    student; its weights stay as and where they are. Raises the errors of `opd.errors`, ConfigError for arguments that
    the recipe has or that need one.
    """
    if quiet:
        quiet_libraries()
    one = Subject(name="model", given=model, where="opd.evaluate(model=...)", tokenizer=tokenizer)
    beside: Subject | None = None
    if teacher is not None:
        theirs = tokenizer if teacher_tokenizer is None else teacher_tokenizer
        beside = Subject(name="teacher", given=teacher, where="opd.evaluate(teacher=...)", tokenizer=theirs)
    say = silent if quiet else _say
    _check_limit(limit)
    _check_mappings("opd.evaluate", columns=columns)
    data = {"chat": chat, "last_assistant": last_assistant, "assistant_turns": assistant_turns}
    data["columns"] = dict(columns or {})
    if recipe is not None:
        _refuse_beside_recipe(data, prompts=prompts, reward=reward, sampling=sampling or None, device=device)
        resolved = _resolved(recipe, overrides)
        return evaluate_as_stage(one, resolved, stage=stage, limit=limit, teacher=beside, seed=seed, say=say)
    _refuse_without_recipe(prompts, stage, overrides)
    found = _own(prompts, data, limit, reward, sampling)
    read, other = _read(one, device), None if beside is None else _read(beside, device)
    chat_by, limit_by = "give chat=True", "sampling.max_completion_length"
    return measured(found, read, other, seed=seed or 0, say=say, chat=chat_by, limited_by=limit_by)[0]


def _read(subject: Subject, device: str | None) -> Read:
    """A model that is read as it is. Raises ConfigError for an object with a device, which it has already."""
    if subject.path is None:
        _refuse_device(subject.name, device)
    return Read(subject=subject, settings={} if device is None else {"device": device})


def _own(prompts: Any, data: Mapping[str, Any], limit: int | None, reward: Any, sampling: Mapping[str, Any]) -> Own:
    """What is measured on the caller's own prompts. Raises ConfigError or DataError."""
    rule: Reward | None = None
    if isinstance(reward, str | Mapping):
        rule = reward_of(
            parse_section(RewardSection, {"name": reward} if isinstance(reward, str) else reward, "reward")
        )
    elif reward is not None:
        rule = as_reward(reward, "The `reward` of opd.evaluate")
    section, rows, reports = _data(prompts, **data)
    needs = [] if rule is None else sorted(rule.needs)
    if rows is None:
        rows, reports = load_selected(parse_section(DataSection, {**section, "limit": limit}, "data"), require=needs)
    elif limit is not None:
        raise ConfigError(
            f"opd.evaluate got limit={limit} and rows. Give fewer rows; `limit` is of a file or a recipe."
        )
    require_columns(rows, needs, source="the rows given in Python")
    return own_of(rows, rule, parse_section(SamplingSection, sampling, "sampling"), list(map(str, reports)))


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ConfigError(f"opd.evaluate got limit={limit}. Give at least 1, or leave `limit` out.")


def _refuse_beside_recipe(data: Mapping[str, Any], **given: Any) -> None:
    """Raise ConfigError for arguments about what a recipe has: those that are `given`, and `data` off its defaults."""
    defaults = {"chat": False, "last_assistant": "response", "assistant_turns": "last", "columns": {}}
    other = [name for name, value in given.items() if value is not None]
    other += [name for name, value in data.items() if value != defaults[name]]
    if other:
        raise ConfigError(
            f"opd.evaluate got a recipe and {', '.join(f'`{name}`' for name in other)}. The recipe has the prompts, "
            "the reward, the sampling and the device. Leave them out, or change the recipe, e.g. with "
            'overrides=["stages.STAGE.evaluate.sampling.SETTING.n=8", "models.student.device=cpu"].'
        )


def _refuse_without_recipe(prompts: Any, stage: str | None, overrides: Sequence[str]) -> None:
    if prompts is None:
        raise ConfigError("opd.evaluate got neither `prompts` nor a `recipe`. Give a file or rows, or a recipe.")
    for name, value in (("stage", stage), ("overrides", overrides)):
        if value:
            raise ConfigError(f"opd.evaluate got {name}={value!r} without a recipe. Name it, or leave `{name}` out.")


def _say(text: str) -> None:
    print(f"evaluate: {text}", file=sys.stderr)


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
