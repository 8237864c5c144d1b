"""What can be known to be wrong before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.data import take
from opd.errors import ConfigError
from opd.method import Method
from opd.metrics import check_report_to
from opd.recipe import ModelSpec, Recipe, StageSpec
from opd.types import Prompt

REMEDIES = {
    "reward": "a reward: set the stage's `reward`, e.g. {name: math_verify}",
    "group": "several responses to a prompt: set sampling.n to 2 or more",
    "teacher_model": "a teacher model: set the stage's `teacher` to one of the models",
}


def check_needs(spec: StageSpec, method: Method, *, has_reward: bool) -> None:
    """Refuse a stage that does not give what its method's pieces declare. Raises ConfigError."""
    needs = method.needs()
    given = {
        "reward": has_reward,
        "group": spec.sampling.n >= 2,
        "teacher_model": spec.teacher is not None and spec.teacher != spec.train,
    }
    missing = [REMEDIES[need] for need in sorted(needs) if not given.get(need, True)]
    if {"sampler_logp", "off_policy"} <= needs:
        raise ConfigError(
            f"Stage {spec.name!r}: method {spec.method!r} divides by the probability with which the student wrote each "
            "token, and its source is not the student. Use an on-policy source, or a signal without importance ratio."
        )
    if "policy_temperature" in needs and "off_policy" not in needs and method.temperature != spec.sampling.temperature:
        raise ConfigError(
            f"Stage {spec.name!r}: method {spec.method!r} is a policy gradient. Its responses are drawn at temperature "
            f"{spec.sampling.temperature} and scored at {method.temperature}: the gradient would be biased. Give "
            "sampling.temperature and the method's `temperature` the same value."
        )
    if missing:
        raise ConfigError(f"Stage {spec.name!r}: method {spec.method!r} needs {'; '.join(missing)}.")
    if spec.teacher is not None and method.teacher.kind.startswith("self_"):
        raise ConfigError(
            f"Stage {spec.name!r}: in method {spec.method!r} the student is its own teacher, and the stage names "
            f"{spec.teacher!r}, which would never be asked. Remove `teacher`, or use a method with an external one."
        )


def check_diagnostics(spec: StageSpec, method: Method) -> None:
    """Refuse a comparison with a teacher that the method does not have. Raises ConfigError."""
    if spec.diagnostics.every and method.teacher.kind == "none":
        raise ConfigError(
            f"Stage {spec.name!r}: diagnostics.every is {spec.diagnostics.every}, which compares the student with the "
            f"teacher, and method {spec.method!r} has none. Set diagnostics.every to 0, or use a method with a teacher."
        )


def check_processes(recipe: Recipe, spec: StageSpec, method: Method, prompts: Sequence[Prompt], size: int) -> None:
    """Refuse a stage that `size` processes cannot share: each needs prompts in every step. Raises ConfigError."""
    if size == 1:
        return
    count = spec.prompts_per_step
    if count < size:
        raise ConfigError(
            f"Stage {spec.name!r}: prompts_per_step is {count}, and {size} processes were started: each needs at least "
            f"one prompt. Set prompts_per_step to {size} or more, or use a smaller --nproc-per-node."
        )
    for name in {spec.train, spec.teacher} - {None}:
        device = recipe.models[str(name)].device if name in recipe.models else None
        if device is not None and ":" in device:
            raise ConfigError(
                f"models.{name}.device is {device!r}, and {size} processes were started: each has a GPU of its own. "
                f"Leave models.{name}.device out."
            )
    if "group" not in method.needs() or len(prompts) % count == 0:
        return
    for step in range(spec.steps):
        first, last = step * count, (step + 1) * count - 1
        if first // len(prompts) == last // len(prompts):
            continue  # within one pass over the data no prompt comes twice
        different = len({prompt.id for prompt in take(prompts, step=step, count=count, seed=recipe.seed)})
        if different < size:
            raise ConfigError(
                f"Stage {spec.name!r}: step {step + 1} has {different} different prompts ({count} prompts a step, "
                f"{len(prompts)} in all), and {size} processes were started: method {spec.method!r} compares the "
                "responses to one prompt in one process. Use a prompts_per_step that divides the number of prompts, or "
                "a smaller --nproc-per-node."
            )


def check_recipe(recipe: Recipe) -> list[str]:
    """Build every stage's method, read its data, render its prompts. Returns what was looked at and what was not.

    Raises the errors that `opd train` would raise before it loads weights.
    """
    from opd.prepare import Given, prepare

    check_report_to(recipe.report_to)
    lines: list[str] = []
    for spec in recipe.stages:
        prepared = prepare(spec, Given(), recipe.seed)
        held_out = "no held-out prompts" if prepared.held_out is None else f"{len(prepared.held_out.prompts)} held out"
        lines.append(f"stage {spec.name}: {spec.method}, {len(prepared.prompts)} prompts, {held_out}")
        lines += [f"  {line}" for line in check_tokenizers(recipe, spec, prepared.all_prompts)]
    return lines


def check_pass_at(spec: StageSpec) -> None:
    """Refuse a pass@k that no sampling setting has enough responses for. Raises ConfigError."""
    assert spec.evaluate is not None
    most = max(sampling.n for sampling in spec.evaluate.sampling.values())
    if bad := [k for k in spec.evaluate.pass_at if not 1 <= k <= most]:
        raise ConfigError(
            f"Stage {spec.name!r}: evaluate.pass_at asks for {', '.join(f'pass@{k}' for k in bad)}, and the settings "
            f"draw at most {most} responses a prompt. Raise n in evaluate.sampling, or lower k."
        )


def check_tokenizers(
    recipe: Recipe, spec: StageSpec, prompts: list[Any], given: Mapping[str, Any] | None = None
) -> list[str]:
    """Render the prompts and compare the token maps, where a tokenizer can be had without its model.

    `given` are tokenizers of models that a Python caller hands over. Raises DataError, ConfigError or AlignmentError.
    """
    from opd.render import render_checked
    from opd.teachers.local import check_same_tokens

    lines: list[str] = []
    tokenizers: dict[str, Any] = {}
    roles = [spec.train] if spec.teacher is None or spec.teacher == spec.train else [spec.train, spec.teacher]
    for name in roles:
        tokenizer = (given or {}).get(name) or tokenizer_of(origin_of(recipe, name), name)
        if tokenizer is None:
            lines.append(f"model {name}: its tokenizer comes with its weights, so it is checked when they load")
        else:
            tokenizers[name] = tokenizer
    if spec.train in tokenizers:
        options = origin_of(recipe, spec.train).template_options
        ids = render_checked(
            prompts, tokenizers[spec.train], max_prompt_length=spec.max_prompt_length, template_options=options
        )
        lines.append(f"longest prompt: {max(map(len, ids))} tokens")
    if len(tokenizers) == 2 and spec.teacher is not None:
        check_same_tokens(tokenizers[spec.train], tokenizers[spec.teacher], names=(spec.train, spec.teacher))
        lines.append("student and teacher map every token to the same id")
    return lines


def origin_of(recipe: Recipe, name: str) -> ModelSpec:
    """The model that `name` goes back to through the stages that made it."""
    spec = recipe.models[name]
    while spec.from_stage is not None:
        spec = recipe.models[recipe.stage(spec.from_stage).train]
    return spec


def tokenizer_of(spec: ModelSpec, name: str) -> Any | None:
    """The tokenizer of a folder or a new model; None where it comes with weights that have not been made yet."""
    from opd.loading import cached_gguf, load_tokenizer, new_config, new_tokenizer, resolved_path

    if spec.init is not None:
        tokenizer = new_tokenizer(spec, name)
        new_config(spec, name, tokenizer)
    else:
        path = resolved_path(spec, name)
        if isinstance(path, Path) and path.suffix == ".gguf":
            path = cached_gguf(path)
            if not (path / "config.json").exists():
                return None
        tokenizer = load_tokenizer(path, spec, name)
    if spec.chat_template is not None:
        tokenizer.chat_template = spec.chat_template
    return tokenizer
