"""Whether a stage, or one of its tasks, provides what its method needs. Loads nothing."""

from __future__ import annotations

from opd.data.order import PromptOrder
from opd.errors import ConfigError, nearest
from opd.evaluation.goals import goals_of, no_goal
from opd.method import Method
from opd.methods.coherence import Facts, check_coherence
from opd.pieces.needs import Input, Reads, Trait, needs_of
from opd.recipe.schema import EvaluateSection, Recipe, StageSpec
from opd.types import Reward, teachers_in

REMEDIES = {
    Input.REWARD: "a reward: set the {owner}'s `reward`, e.g. {{name: math_verify}}",
    Input.GROUP: "several responses per prompt: set sampling.n to 2 or more",
    Input.JUDGE: "a reward with a judge: set the {owner}'s `reward`, e.g. {{name: rubric, judge: {{url: "
    "http://localhost:8000/v1, model: NAME}}}}",
    Input.PEERS: "several models in one stage: name the others in `peers`, with `topology` all or hub",
    Input.TEACHER_MODEL: "a teacher model: set the {owner}'s `teacher` to one of the models",
}


def check_needs(spec: StageSpec, task: str | None, method: Method, *, has_reward: bool, asks: bool = False) -> None:
    """Refuse a stage or task that does not provide what the method's pieces need. Raises ConfigError.

    `asks`: whether LLM judges compute the reward.
    """
    needs = method.needs
    part, where = spec.by_task[task], spec.where(task)
    given = {
        Input.REWARD: has_reward,
        Input.GROUP: part.sampling.n >= 2,
        Input.JUDGE: asks,
        Input.PEERS: bool(spec.peers) and spec.topology != "none",
        Input.TEACHER_MODEL: part.teacher is not None and part.teacher != spec.train,
    }
    owner = "stage" if task is None else "task"
    missing = {need for need in needs.inputs if not given.get(need, True)}
    if Input.JUDGE in missing:  # the remedy for a missing judge also gives a reward
        missing -= {Input.REWARD}
    remedies = [REMEDIES[need].format(owner=owner) for need in sorted(missing)]
    if Trait.READS_ATTEMPT in needs and part.evaluate is not None and part.evaluate.teacher:
        raise ConfigError(
            f"{where}: in method {spec.method!r} the teacher reads the student's attempt, and "
            "evaluate.teacher makes it write without one. Set evaluate.teacher to false."
        )
    on_policy = Trait.OFF_POLICY not in needs
    if Trait.POLICY_GRADIENT in needs and on_policy and method.temperature != part.sampling.temperature:
        greedy = part.sampling.temperature == 0
        remedy = (
            f"Set sampling.temperature to {method.temperature}"
            if greedy
            else "Give sampling.temperature and the method's `temperature` the same value"
        )
        raise ConfigError(
            f"{where}: method {spec.method!r} is a policy gradient. Its responses are sampled at temperature "
            f"{part.sampling.temperature} and scored at {method.temperature}: the gradient would be biased. {remedy}."
        )
    check_coherence(Facts(method=method, sampling=part.sampling, asks=asks), f"{where}: method {spec.method!r}")
    longest = needs_of(method.source).response_tokens
    if longest > part.sampling.max_completion_length:
        raise ConfigError(
            f"{where}: method {spec.method!r} has a budget of up to {longest} tokens per response, and "
            f"sampling.max_completion_length is {part.sampling.max_completion_length}. Set it to {longest}, or lower "
            "the largest budget among the method's options."
        )
    first_look = needs_of(method.source).first_look
    if first_look >= part.sampling.max_completion_length:
        raise ConfigError(
            f"{where}: in method {spec.method!r} the teacher scores a response every {first_look} tokens, and "
            f"sampling.max_completion_length is {part.sampling.max_completion_length}: no response would end early. "
            "Lower `every` among the method's options, or raise sampling.max_completion_length."
        )
    if remedies:
        raise ConfigError(f"{where}: method {spec.method!r} needs {'; '.join(remedies)}.")
    check_teacher(spec, task, method)


def check_teacher(spec: StageSpec, task: str | None, method: Method) -> None:
    """Refuse several teachers for a method with one, and a teacher for a method without. Raises ConfigError."""
    part, where, owner = spec.by_task[task], spec.where(task), "stage" if task is None else "task"
    teaches_itself = method.teacher.kind.startswith("self_")
    if len(teachers_in(part.teacher)) > 1 and method.teacher.mixture is None and not teaches_itself:
        raise ConfigError(
            f"{where}: the {owner}'s teacher is {part.teacher!r}, and method {spec.method!r} takes one teacher "
            "of a row. Name one, give each task its own, or use a method for several teachers of a row: mad_opd."
        )
    if part.teacher is not None and teaches_itself:
        raise ConfigError(
            f"{where}: in method {spec.method!r} the student is its own teacher, and the {owner} names "
            f"{part.teacher!r}, which would never be used. Remove `teacher`, or use a method with an external one."
        )


def check_base(spec: StageSpec, method: Method) -> None:
    """Refuse a missing base model, and one that the method does not read. Raises ConfigError."""
    reads = Reads.BASE_LOGP in method.needs
    if reads and spec.base is None:
        raise ConfigError(
            f"{spec.where(None)}: method {spec.method!r} compares three models, and the stage names no base. Set its "
            f"`base` to one of the models. For {spec.train!r} as it is when the stage begins, add an entry with the "
            "same `path` or `from_stage` to `models`."
        )
    if spec.base is not None and not reads:
        raise ConfigError(
            f"{spec.where(None)}: it names the base {spec.base!r}, which method {spec.method!r} would never read. "
            "Remove `base`, or use a method that reads it, such as extrapolated_opd. A piece of your own declares it: "
            "needing(piece, Reads.BASE_LOGP)."
        )


def check_feedback(spec: StageSpec, task: str | None, method: Method, reward: Reward | None) -> None:
    """Refuse a method that reads feedback beside a reward that gives none. Raises ConfigError.

    A Reward that sets `Rollout.feedback` has the attribute `gives_feedback`, True.
    """
    if Input.FEEDBACK not in method.needs or getattr(reward, "gives_feedback", False):
        return
    raise ConfigError(
        f"{spec.where(task)}: method {spec.method!r} reads a judge's feedback on each response, and the reward "
        f"{'' if reward is None else repr(reward.name) + ' '}gives none. Set the reward to {{name: feedback, options: "
        "{by: NAME_OF_A_REWARD}, judge: {url: http://localhost:8000/v1, model: NAME}}, or a hint without a judge "
        "among the method's options."
    )


def check_peer_method(spec: StageSpec, method: Method) -> None:
    """Refuse a stage whose models would teach each other with a method that has no peers. Raises ConfigError."""
    if spec.peers and spec.topology != "none" and Input.PEERS not in method.needs:
        raise ConfigError(
            f"{spec.where(None)}: it trains {', '.join(spec.trains)}, and method {spec.method!r} lets none of them "
            "teach another. Use a method with peers, such as copd, or set `topology: none`: each model then trains on "
            "its own tasks alone, and their mean is saved."
        )


def check_update_reward(spec: StageSpec, task: str | None, method: Method, reward: Reward | None) -> None:
    """Refuse an update that compares weights by a reward whose values cannot be compared. Raises ConfigError."""
    if reward is None or reward.comparable or Input.REWARD not in needs_of(method.update):
        return
    raise ConfigError(
        f"{spec.where(task)}: method {spec.method!r} compares weights by their reward, and the reward {reward.name!r} "
        "declares `comparable = False`: its values for different responses cannot be compared. Use a reward that "
        "checks responses one by one."
    )


def check_diagnostics(spec: StageSpec, method: Method) -> None:
    """Refuse diagnostics that the method's teacher does not support. Raises ConfigError."""
    if spec.diagnostics.every and method.teacher.kind == "none":
        raise ConfigError(
            f"Stage {spec.name!r}: diagnostics.every is {spec.diagnostics.every}, which compares the student with the "
            f"teacher, and method {spec.method!r} has none. Set diagnostics.every to 0, or use a method with a teacher."
        )
    if spec.diagnostics.every:
        check_comparison(method, f"Stage {spec.name!r}", "diagnostics.every", "Set it to 0")


def check_comparison(method: Method, where: str, setting: str, remedy: str) -> None:
    """Refuse a `setting` that compares both distributions at each token. Raises ConfigError."""
    if method.teacher.tokenizer == "any":
        raise ConfigError(
            f"{where}: {setting} compares student and teacher token by token, and in this method the teacher has its "
            f"own tokenizer. {remedy}; the metric units/signal is the divergence on units."
        )


def check_processes(recipe: Recipe, spec: StageSpec, method: Method, order: PromptOrder, size: int) -> None:
    """Refuse a stage with fewer prompts per step than the `size` processes need. Raises ConfigError."""
    if size == 1:
        return
    count = spec.prompts_per_step
    if count < size:
        raise ConfigError(
            f"Stage {spec.name!r}: prompts_per_step is {count}, and {size} processes were started: each needs at least "
            f"one prompt. Set prompts_per_step to {size} or more, or use a smaller --nproc-per-node."
        )
    if any(prompt.images for prompts in order.prompts for prompt in prompts):
        raise ConfigError(
            f"Stage {spec.name!r}: its prompts have images, and {size} processes were started: forwards with and "
            "without pictures are not the same number of collective calls. Train in one process."
        )
    for name in (spec.train, *spec.scoring):
        device = recipe.models[name].device
        if device is not None and ":" in device:
            raise ConfigError(
                f"models.{name}.device is {device!r}, and {size} processes were started: each uses its own GPU. "
                f"Leave models.{name}.device out."
            )
    if Input.GROUP not in method.needs:
        return
    for step in range(spec.steps):
        if order.different_at_least(step) >= size:
            continue
        different = len({prompt.id for prompt in order.take(step)})
        if different < size:
            of = "each task's prompts" if spec.tasks else "prompts"
            raise ConfigError(
                f"Stage {spec.name!r}: step {step + 1} has {different} different prompts ({count} prompts per step, "
                f"{sum(map(len, order.prompts))} in all), and {size} processes were started: method {spec.method!r} "
                f"compares the responses to one prompt in one process. Use a prompts_per_step that divides the number "
                f"of {of}, or a smaller --nproc-per-node."
            )


def check_evaluate(spec: StageSpec, task: str | None, method: Method, evaluate: EvaluateSection) -> None:
    """Refuse a pass@k of more responses than are sampled, a goal that nothing measures, or a missing teacher.

    Raises ConfigError.
    """
    check_pass_at(spec.where(task), evaluate)
    check_goals(spec.where(task), evaluate, environment=spec.by_task[task].environment is not None)
    enabled = [f"evaluate.{name}" for name in ("teacher", "kl") if getattr(evaluate, name)]
    if enabled and method.teacher.kind == "none" and spec.by_task[task].teacher in (None, spec.train):
        owner = "stage" if task is None else "task"
        raise ConfigError(
            f"{spec.where(task)}: it sets {' and '.join(enabled)}, and there is no teacher: method {spec.method!r} has "
            f"none, and the {owner} names none. Set the {owner}'s `teacher` to one of the models other "
            f"than {spec.train!r}, or {' and '.join(enabled)} to false."
        )
    if evaluate.teacher and len(teachers_in(spec.by_task[task].teacher)) > 1:
        raise ConfigError(
            f"{spec.where(task)}: evaluate.teacher lets the teacher write responses, and "
            f"{spec.by_task[task].teacher!r} are several, which write none in common. Set evaluate.teacher to false."
        )
    if evaluate.kl:
        check_comparison(method, spec.where(task), "evaluate.kl", "Set it to false")


def check_goals(where: str, evaluate: EvaluateSection, *, environment: bool) -> None:
    """Refuse goals that no evaluation reaches or measures. Raises ConfigError."""
    if evaluate.until and not evaluate.every:
        raise ConfigError(
            f"{where}: evaluate.until ends the stage at an evaluation that reaches it, and evaluate.every "
            "is 0: there is none between the first step and the last. Set evaluate.every to a number of steps."
        )
    for setting, goals in goals_of(evaluate).items():
        if setting not in evaluate.sampling:
            raise ConfigError(
                f"{where}: evaluate.until names {setting!r}, and evaluate.sampling has no such setting."
                f"{nearest(setting, evaluate.sampling)} It has {', '.join(evaluate.sampling)}."
            )
        for metric in goals:
            if (why := no_goal(metric, setting, evaluate, environment=environment)) is not None:
                raise ConfigError(f"{where}: evaluate.until.{setting} names {metric!r}, {why}")


def check_pass_at(where: str, evaluate: EvaluateSection) -> None:
    """Refuse a pass@k of more responses than are sampled. Raises ConfigError."""
    most = max(sampling.n for sampling in evaluate.sampling.values())
    if bad := [k for k in evaluate.pass_at if not 1 <= k <= most]:
        raise ConfigError(
            f"{where}: evaluate.pass_at has {', '.join(f'pass@{k}' for k in bad)}, and the settings "
            f"sample at most {most} responses per prompt. Raise n in evaluate.sampling, or lower k."
        )


def check_dropped_rewards(spec: StageSpec, task: str | None, method: Method) -> None:
    """Refuse failed rewards that are left out where the teacher reads the verdict. Raises ConfigError."""
    reward = spec.by_task[task].reward
    needs = needs_of(method.context)
    if reward is not None and reward.on_error == "drop" and Input.REWARD in needs and Input.GROUP not in needs:
        raise ConfigError(
            f"{spec.where(task)}: the reward has `on_error: drop`, which leaves responses without a reward, but the "
            "teacher reads whether a response is right. Set `on_error: stop`, or leave {verdict} out of the template."
        )
