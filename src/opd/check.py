"""What can be known to be wrong before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opd.check_method import check_baseline, check_pieces
from opd.check_reading import check_lengths, check_template_options, origin_of, tokenizer_of, unused_template
from opd.check_units import check_comparison, check_tokens
from opd.errors import ConfigError
from opd.method import Method
from opd.metrics import check_report_to
from opd.needs import needs_of, numbers_of
from opd.recipe import EvaluateSection, Recipe, StageSpec
from opd.turns import Order

if TYPE_CHECKING:
    from opd.models import LanguageModel
    from opd.prepare import Prepared

REMEDIES = {
    "reward": "a reward: set the {owner}'s `reward`, e.g. {{name: math_verify}}",
    "group": "several responses to a prompt: set sampling.n to 2 or more",
    "judge": "a reward that asks a judge: set the {owner}'s `reward`, e.g. {{name: rubric, judge: {{url: "
    "http://localhost:8000/v1, model: NAME}}}}",
    "teacher_model": "a teacher model: set the {owner}'s `teacher` to one of the models",
}


def check_needs(spec: StageSpec, task: str | None, method: Method, *, has_reward: bool, asks: bool = False) -> None:
    """Refuse a stage, or a task of it, that does not give what its method's pieces declare. Raises ConfigError.

    `asks` says that the reward asks somebody (`group_rewards`).
    """
    needs = method.needs()
    part, where = spec.parts[task], spec.where(task)
    given = {
        "reward": has_reward,
        "group": part.sampling.n >= 2,
        "judge": asks,
        "teacher_model": part.teacher is not None and part.teacher != spec.train,
    }
    owner = "stage" if task is None else "task"
    without = {need for need in needs if not given.get(need, True)}
    without -= {"reward"} if "judge" in without else set()  # the judge's is one, and another would be refused next
    missing = [REMEDIES[need].format(owner=owner) for need in sorted(without)]
    if "attempt" in needs and part.evaluate is not None and part.evaluate.teacher:
        raise ConfigError(
            f"{where}: in method {spec.method!r} the teacher reads the student's attempt, and "
            "evaluate.teacher lets it write without one. Set evaluate.teacher to false."
        )
    if "policy_temperature" in needs and "off_policy" not in needs and method.temperature != part.sampling.temperature:
        raise ConfigError(
            f"{where}: method {spec.method!r} is a policy gradient. Its responses are drawn at temperature "
            f"{part.sampling.temperature} and scored at {method.temperature}: the gradient would be biased. Give "
            "sampling.temperature and the method's `temperature` the same value."
        )
    check_pieces(method, f"{where}: method {spec.method!r}")
    if asks and "reward" in needs_of(method.update):
        raise ConfigError(
            f"{where}: method {spec.method!r} compares weights by their rewards, and this reward makes its yardstick "
            "anew from the responses that it grades. Use a reward that checks responses one by one."
        )
    longest = numbers_of(method.source).get("response_tokens", 0)
    if longest > part.sampling.max_completion_length:
        raise ConfigError(
            f"{where}: method {spec.method!r} has a budget of up to {longest} tokens a response, and "
            f"sampling.max_completion_length is {part.sampling.max_completion_length}. Set that to {longest}, or lower "
            "the largest budget among the method's options."
        )
    first_look = numbers_of(method.source).get("first_look", 0)
    if first_look >= part.sampling.max_completion_length:
        raise ConfigError(
            f"{where}: in method {spec.method!r} the teacher looks at a response every {first_look} tokens, and "
            f"sampling.max_completion_length is {part.sampling.max_completion_length}: no response would end sooner. "
            "Lower `every` among the method's options, or let responses be longer."
        )
    if "unbiased_baseline" in needs:
        check_baseline(method, part.sampling, f"{where}: method {spec.method!r}")
    if missing:
        raise ConfigError(f"{where}: method {spec.method!r} needs {'; '.join(missing)}.")
    if part.teacher is not None and method.teacher.kind.startswith("self_"):
        raise ConfigError(
            f"{where}: in method {spec.method!r} the student is its own teacher, and the {owner} names "
            f"{part.teacher!r}, which would never be asked. Remove `teacher`, or use a method with an external one."
        )


def check_diagnostics(spec: StageSpec, method: Method) -> None:
    """Refuse a comparison with a teacher that the method does not have. Raises ConfigError."""
    if spec.diagnostics.every and method.teacher.kind == "none":
        raise ConfigError(
            f"Stage {spec.name!r}: diagnostics.every is {spec.diagnostics.every}, which compares the student with the "
            f"teacher, and method {spec.method!r} has none. Set diagnostics.every to 0, or use a method with a teacher."
        )
    if spec.diagnostics.every:
        check_comparison(method, f"Stage {spec.name!r}", "diagnostics.every", "Set it to 0")


def check_processes(recipe: Recipe, spec: StageSpec, method: Method, order: Order, size: int) -> None:
    """Refuse a stage that `size` processes cannot share: each needs prompts in every step. Raises ConfigError."""
    if size == 1:
        return
    count = spec.prompts_per_step
    if count < size:
        raise ConfigError(
            f"Stage {spec.name!r}: prompts_per_step is {count}, and {size} processes were started: each needs at least "
            f"one prompt. Set prompts_per_step to {size} or more, or use a smaller --nproc-per-node."
        )
    for name in (spec.train, *spec.teachers):
        device = recipe.models[name].device
        if device is not None and ":" in device:
            raise ConfigError(
                f"models.{name}.device is {device!r}, and {size} processes were started: each has a GPU of its own. "
                f"Leave models.{name}.device out."
            )
    if "group" not in method.needs():
        return
    for step in range(spec.steps):
        if order.different_at_least(step) >= size:
            continue
        different = len({prompt.id for prompt in order.take(step)})
        if different < size:
            of = "each task's prompts" if spec.tasks else "prompts"
            raise ConfigError(
                f"Stage {spec.name!r}: step {step + 1} has {different} different prompts ({count} prompts a step, "
                f"{sum(map(len, order.prompts))} in all), and {size} processes were started: method {spec.method!r} "
                f"compares the responses to one prompt in one process. Use a prompts_per_step that divides the number "
                f"of {of}, or a smaller --nproc-per-node."
            )


def check_recipe(recipe: Recipe) -> list[str]:
    """Build every stage's method, read its data, render its prompts. Returns what was looked at and what was not.

    Raises the errors that `opd train` would raise before it loads weights.
    """
    from opd.prepare import Given, prepare

    check_report_to(recipe.report_to)
    lines: list[str] = []
    prepared: dict[str, Prepared] = {}
    for spec in recipe.stages:
        of_stage = prepared[spec.name] = prepare(spec, Given(), recipe.seed)
        lines += described(spec, of_stage)
        lines += [f"  {line}" for line in check_tokenizers(recipe, spec, of_stage)]
    check_template_options(recipe, prepared)
    return lines


def described(spec: StageSpec, prepared: Prepared) -> list[str]:
    """What a stage trains on: a line, and one for each of its tasks."""
    of_each: list[str] = []
    notes: list[str] = []
    for name, task in prepared.tasks.items():
        notes += [f"  {line}" if name is None else f"  task {name}: {line}" for line in task.notes]
        held_out = "no held-out prompts" if task.held_out is None else f"{len(task.held_out.prompts)} held out"
        of_each.append(f"{len(task.prompts)} prompts, {held_out}")
    if not spec.tasks:
        return [f"stage {spec.name}: {spec.method}, {of_each[0]}", *notes]
    lines = [f"stage {spec.name}: {spec.method}, {len(of_each)} tasks, {spec.task_order}"]
    for (name, part), numbers in zip(spec.tasks.items(), of_each, strict=True):
        taught = "no teacher" if part.teacher is None else f"teacher {part.teacher}"
        lines.append(f"  task {name}: {numbers}, {taught}, at most {part.sampling.max_completion_length} tokens")
    return [*lines, *notes]


def check_evaluate(spec: StageSpec, task: str | None, method: Method, evaluate: EvaluateSection) -> None:
    """Refuse an evaluation that asks for what nobody can give. Raises ConfigError.

    Those are a pass@k that no sampling setting has enough responses for, and a teacher where there is none.
    """
    most = max(sampling.n for sampling in evaluate.sampling.values())
    if bad := [k for k in evaluate.pass_at if not 1 <= k <= most]:
        raise ConfigError(
            f"{spec.where(task)}: evaluate.pass_at asks for {', '.join(f'pass@{k}' for k in bad)}, and the settings "
            f"draw at most {most} responses a prompt. Raise n in evaluate.sampling, or lower k."
        )
    asked = [f"evaluate.{name}" for name in ("teacher", "kl") if getattr(evaluate, name)]
    if asked and method.teacher.kind == "none" and spec.parts[task].teacher in (None, spec.train):
        owner = "stage" if task is None else "task"
        raise ConfigError(
            f"{spec.where(task)}: it sets {' and '.join(asked)}, and there is no teacher: method {spec.method!r} has "
            f"none, and the {owner} names none to compare with. Set the {owner}'s `teacher` to one of the models other "
            f"than {spec.train!r}, or {' and '.join(asked)} to false."
        )
    if evaluate.kl:
        check_comparison(method, spec.where(task), "evaluate.kl", "Set it to false")


def check_tokenizers(
    recipe: Recipe, spec: StageSpec, prepared: Prepared, given: Mapping[str, LanguageModel] | None = None
) -> list[str]:
    """Render the prompts for all who read them, bind the method, compare the token maps and lengths, where a tokenizer
    can be had without its model.

    `given` are models that are there already. Raises DataError, ConfigError or AlignmentError.
    """
    from opd.render import render, render_checked

    lines: list[str] = []
    tokenizers: dict[str, Any] = {}
    given, prompts, method = given or {}, prepared.all_prompts, prepared.method
    for name in (spec.train, *spec.teachers):
        there = given.get(name)
        tokenizer = tokenizer_of(origin_of(recipe, name), name) if there is None else there.tokenizer
        if tokenizer is None:
            lines.append(f"model {name}: its tokenizer comes with its weights, so it is checked when they load")
        else:
            tokenizers[name] = tokenizer
    lengths: list[int] = []
    if spec.train in tokenizers:
        options = origin_of(recipe, spec.train).template_options
        ids = render_checked(
            prompts, tokenizers[spec.train], max_prompt_length=spec.max_prompt_length, template_options=options
        )
        lengths = list(map(len, ids))
        lines.append(f"longest prompt: {max(lengths)} tokens")
        lines += unused_template(spec.train, tokenizers[spec.train], prompts)
        method.bound(tokenizers[spec.train])
        check_vocabulary(spec, method, tokenizers[spec.train])
    taught_by = {task: part.teacher for task, part in spec.parts.items()}
    for name in spec.teachers:
        if name in tokenizers:  # a template that the teacher lacks, or that refuses a prompt, shows before its weights
            options = origin_of(recipe, name).template_options
            for prompt in prompts:
                if taught_by[prompt.task] == name and not isinstance(prompt.content, str):
                    render(prompt, tokenizers[name], options)
    compared = [name for name in spec.teachers if name in tokenizers and spec.train in tokenizers]
    ours = origin_of(recipe, spec.train).template_options
    found = [
        check_tokens(
            method.teacher,
            tokenizers[spec.train],
            tokenizers[name],
            (spec.train, name),
            chat=prepared.chat,
            options=(ours, origin_of(recipe, name).template_options),
        )
        for name in compared
    ]
    lines += [line for line in found if line is not None]
    if compared and method.teacher.tokenizer == "students":
        lines.append(f"student and {' and '.join(compared)} map every token to the same id")
    if lengths:
        check_lengths(recipe, spec, prepared, lengths, tokenizers, given)
    return lines


def check_vocabulary(spec: StageSpec, method: Method, tokenizer: Any) -> None:
    """Refuse a support or a comparison of more tokens than the tokenizer has. Raises ConfigError."""
    from opd.compare import check_k
    from opd.supports import check_fits

    vocabulary = max(tokenizer.get_vocab().values()) + 1
    check_fits(max(method.support.k, method.top_k), vocabulary)
    if spec.diagnostics.every:
        check_k(spec.diagnostics.k, vocabulary)
