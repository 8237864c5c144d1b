"""The parts of a stage that need no weights, for each task: method, prompts, rewards, held-out prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from opd import methods
from opd.data.order import PromptOrder
from opd.data.prompts import Report, load_selected, require_columns
from opd.environments.conversations import Rules
from opd.environments.registry import rules_of
from opd.environments.reward import with_environment
from opd.errors import ConfigError, DataError
from opd.evaluation.evaluate import HeldOut
from opd.evaluation.goals import goals_of, of_reward
from opd.messages import is_chat
from opd.method import Method
from opd.models.language_model import LanguageModel
from opd.pieces.needs import Input, Needs, needs_of
from opd.recipe.schema import DataSection, EvaluateSection, SamplingSection, StageSpec, TaskSection
from opd.rewards.base import check_readable, unfit_to_measure, unscored_answers, unscored_line, watched
from opd.rewards.registry import reward_of
from opd.runs.fit import (
    check_base,
    check_diagnostics,
    check_dropped_rewards,
    check_evaluate,
    check_feedback,
    check_needs,
    check_pass_at,
    check_peer_method,
    check_update_reward,
)
from opd.runs.stale import with_importance
from opd.types import Prompt, Reward, Sampler, Sampling, Teacher

# That pieces of a method may need.
PROMPT_COLUMNS = frozenset({"response", "privileged_context", "answer", "images", "privileged_images", "box"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Objects that a Python caller passes instead of naming them in the recipe."""

    models: Mapping[str, LanguageModel] = field(default_factory=dict[str, LanguageModel])
    prompts: list[Prompt] | None = None
    reports: tuple[Report, ...] = ()  # of the conversion of `prompts`
    reward: Reward | None = None
    method: Method | None = None
    teachers: Mapping[str, Teacher] = field(default_factory=dict[str, Teacher])
    sampler: Callable[..., Sampler] | None = None  # called (student, sampling, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task of `StageSpec.by_task`: its prompts and their reward."""

    prompts: list[Prompt]
    reward: Reward | None
    held_out: HeldOut | None
    reports: tuple[Report, ...] = ()  # of the data sections: conversions and selections, held-out last
    unscored_answers: Mapping[str, int] = field(default_factory=dict[str, int])  # counts by "training", "held-out"
    rules: Rules | None = None  # of the conversations with an environment
    warnings: tuple[str, ...] = ()  # of the checks that compare this task with others

    @property
    def notes(self) -> list[str]:
        """Lines that a run prints at its start: rows converted or left out, answers that nothing reads, warnings."""
        unscored = [unscored_line(count, which) for which, count in self.unscored_answers.items()]
        return [*map(str, self.reports), *unscored, *self.warnings]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The parts of a stage that need no weights. Prompt ids are unique over all tasks."""

    method: Method
    tasks: Mapping[str | None, Task]
    order: PromptOrder
    peers: Mapping[str, Prepared] = field(default_factory=dict[str, "Prepared"])  # of the stage's other models, by name

    @property
    def views(self) -> list[Prepared]:
        """This one, and those of the stage's other models."""
        return [self, *self.peers.values()]

    @property
    def chat(self) -> bool:
        """Whether training prompts are conversations; held-out prompts do not count."""
        return any(is_chat(task.prompts) for task in self.tasks.values())

    @property
    def all_prompts(self) -> list[Prompt]:
        """The training prompts and then the held-out prompts of all tasks."""
        held_out = [task.held_out.prompts for task in self.tasks.values() if task.held_out is not None]
        return [p for prompts in (*(task.prompts for task in self.tasks.values()), *held_out) for p in prompts]


def prepare(spec: StageSpec, given: Given, seed: int) -> Prepared:
    """Method, data and rewards of a stage, checked against each other. Raises ConfigError or DataError."""
    method = with_importance(spec, given.method or methods.build(spec.method, spec.options))
    check_diagnostics(spec, method)
    check_base(spec, method)
    check_peer_method(spec, method)
    tasks: dict[str | None, Task] = {}
    first, first_held_out = 0, 0
    for name, part in spec.by_task.items():
        named = part.reward if given.reward is None else given.reward  # a section, or the reward itself
        rules = None if part.environment is None else rules_of(part.environment, f"{spec.where(name)}: environment")
        rewards = named is not None or (rules is not None and rules.environment.rewards)
        check_needs(spec, name, method, has_reward=rewards, asks=named is not None and bool(named.asks))
        reward = reward_in(part, rules, given)
        check_update_reward(spec, name, method, reward)
        check_feedback(spec, name, method, reward)
        check_dropped_rewards(spec, name, method)
        if reward is not None and Input.REWARD not in method.needs and not method.needs.undeclared:
            reward = watched(reward)
        columns = PROMPT_COLUMNS & method.needs.columns
        prompts, reports = prompts_of(part.data, columns | needs_of_reward(reward), given)
        check_readable(reward, prompts, spec.where(name))
        prompts = assigned(prompts, spec, name, part, first)
        first = 1 + max(prompt.id for prompt in prompts)
        held_out, unscored = None, dict[str, int]()
        if part.evaluate is not None:
            check_evaluate(spec, name, method, part.evaluate)
            held_out, also = held_out_of(spec, part.evaluate, needs_of(method.context), reward, seed)
            held_out = in_stage(held_out, spec, name, part, rules, first_held_out)
            first_held_out = 1 + max(prompt.id for prompt in held_out.prompts)
            reports = [*reports, *also]
            unscored["held-out"] = unscored_answers(held_out.prompts, columns, held_out.reward)
        unscored["training"] = unscored_answers(prompts, columns, reward, held_out and held_out.reward)
        tasks[name] = Task(
            prompts=offering(prompts, rules),
            reward=reward,
            held_out=held_out,
            reports=tuple(reports),
            rules=rules,
            unscored_answers={which: count for which, count in unscored.items() if count},
        )
    order = PromptOrder(
        prompts=tuple(task.prompts for task in tasks.values()),
        shares=tuple(part.share for part in spec.by_task.values()),
        count=spec.prompts_per_step,
        seed=seed,
        mixed=spec.task_order == "mixed",
    )
    return Prepared(method=method, tasks=tasks, order=order)


def prepare_held_out(spec: StageSpec, seed: int) -> tuple[dict[str | None, HeldOut], list[str]]:
    """The evaluations of a stage by task, without its method, training data and teachers; and notes on their data.

    Prompts, ids and settings are those of `prepare`; in a stage with `peers`, of the model `train`, and then those of
    the tasks that only others have. Raises ConfigError or DataError.
    """
    found: dict[str | None, HeldOut] = {}
    notes: list[str] = []
    first = 0
    seen = spec.as_seen_by(spec.train).by_task if spec.peers else spec.by_task
    for name, part in {**seen, **spec.by_task}.items():
        if part.evaluate is None:
            continue
        check_pass_at(spec.where(name), part.evaluate)
        rules = None if part.environment is None else rules_of(part.environment, f"{spec.where(name)}: environment")
        alone = part.evaluate.model_copy(update={"teacher": False, "kl": False, "until": {}})
        reward = None if alone.reward is not None else reward_in(part, rules, Given())
        held_out, reports = held_out_of(spec, alone, Needs(), reward, seed)
        found[name] = in_stage(held_out, spec, name, part, rules, first)
        first = 1 + max(prompt.id for prompt in found[name].prompts)
        notes += map(str, reports)
        if count := unscored_answers(found[name].prompts, frozenset(), held_out.reward):
            notes.append(unscored_line(count, "held-out"))
    return found, notes


def reward_in(part: TaskSection, rules: Rules | None, given: Given) -> Reward | None:
    """A task's reward: the one given in Python, or the section's, with that of the environment. Raises ConfigError."""
    reward = given.reward if given.reward is not None else part.reward and reward_of(part.reward)
    if rules is not None and rules.environment.rewards:
        return with_environment(reward, rules.environment.name)
    return reward


def in_stage(
    held_out: HeldOut, spec: StageSpec, task: str | None, part: TaskSection, rules: Rules | None, first: int
) -> HeldOut:
    """The evaluation with the task's teacher, environment and ids, which start at `first`. Raises DataError."""
    prompts = assigned(held_out.prompts, spec, task, part, first)
    return replace(held_out, prompts=offering(prompts, rules), rules=rules)


def offering(prompts: Sequence[Prompt], rules: Rules | None) -> list[Prompt]:
    """The prompts with the tools that the environment offers in every conversation, where they have none of their own.

    So all checks read what the student reads. A prompt that is a text has no place for them.
    """
    tools = () if rules is None else tuple(rules.environment.tools)
    return [replace(p, tools=p.tools or tools) if tools and not isinstance(p.content, str) else p for p in prompts]


def held_out_of(
    spec: StageSpec, evaluate: EvaluateSection, context: Needs, reward: Reward | None, seed: int
) -> tuple[HeldOut, list[Report]]:
    """The evaluation of an `evaluate` section, with its own or the training's reward; and the reports of its data.

    `context`: what the teacher's context needs, of which `evaluate.teacher` and `evaluate.kl` ask.

    Judge rewards are for training only: each rubric is built from the graded responses, so scores before and after
    training are not comparable, and judges start with the training of a stage. Raises ConfigError if the section names
    such a reward.
    """
    own = evaluate.reward and reward_of(evaluate.reward)
    if own is not None and (unfit := unfit_to_measure(own)):
        raise ConfigError(
            f"Stage {spec.name!r}: evaluate.reward is {own.name!r}, {unfit}. Give a reward that scores each response "
            "alone, or leave evaluate.reward out."
        )
    fits = reward is not None and not unfit_to_measure(reward)
    measured_by = own if own is not None else reward if fits else None
    asked = (metric for goals in goals_of(evaluate).values() for metric in goals if of_reward(metric))
    if measured_by is None and (metric := next(asked, None)):
        raise ConfigError(
            f"Stage {spec.name!r}: evaluate.until has a goal of {metric!r}, and the held-out responses have no reward. "
            "Set evaluate.reward to one that scores each response alone, or remove the goal."
        )
    if evaluate.kl and measured_by is None and Input.REWARD in context:
        raise ConfigError(
            f"Stage {spec.name!r}: evaluate.kl compares with a teacher that reads the rewards of the responses, and "
            "held-out responses have none, because the stage's reward is for training only. Set evaluate.reward to one "
            "that scores each response alone, or evaluate.kl to false."
        )
    read_by_teacher = (context if evaluate.teacher or evaluate.kl else Needs()).columns
    prompts, reports = prompts_of(evaluate.data, needs_of_reward(measured_by) | (PROMPT_COLUMNS & read_by_teacher))
    check_readable(measured_by, prompts, f"Stage {spec.name!r}: evaluate")
    held_out = HeldOut(
        prompts=prompts,
        sampling={name: sampling_of(s) for name, s in evaluate.sampling.items()},
        reward=measured_by and watched(measured_by),
        seed=seed,
        pass_at=evaluate.pass_at,
        max_prompt_length=spec.max_prompt_length,
    )
    return held_out, reports


def assigned(
    prompts: Sequence[Prompt], spec: StageSpec, task: str | None, part: TaskSection, first: int
) -> list[Prompt]:
    """The prompts with task, teacher and unique ids: `first` is added to the ids, which start at 0 in a data section.

    Raises DataError for rows with another `teacher_id` than the task's teacher.
    """
    others = [p for p in prompts if part.teacher is not None and p.teacher_id not in (None, part.teacher)]
    if others:
        raise DataError(
            f"{spec.where(task)}: {len(others)} of {len(prompts)} prompts have another `teacher_id` (prompt "
            f"{others[0].id}: {others[0].teacher_id!r}) than the teacher {part.teacher!r} that would score them. Give "
            "each teacher's prompts their own task (`tasks`), or leave the column out."
        )
    return [replace(p, id=first + p.id, task=task, teacher_id=part.teacher) for p in prompts]


def prompts_of(
    section: DataSection, require: Iterable[str], python: Given | None = None
) -> tuple[list[Prompt], list[Report]]:
    """The prompts of a data section, or those given in Python; and the reports of its conversions and selection.

    Every prompt has the columns in `require`. Raises DataError, also for given prompts that share an id: their
    responses would form one group and use the same random numbers.
    """
    given = None if python is None else python.prompts
    if python is None or given is None:
        return load_selected(section, require=sorted(require))
    require_columns(given, sorted(require), source="the prompts given in Python")
    twice = [key for key, count in Counter(prompt.id for prompt in given).items() if count > 1]
    if twice:
        raise DataError(
            f"{len(twice)} ids belong to several of the {len(given)} prompts given in Python (e.g. {twice[0]}). A "
            "response's random numbers and group come from its prompt's id: give each prompt its own id, e.g. with "
            "dataclasses.replace(prompt, id=...)."
        )
    return given, [*python.reports]


def needs_of_reward(reward: Reward | None) -> frozenset[str]:
    return frozenset() if reward is None else reward.needs


def sampling_of(section: SamplingSection) -> Sampling:
    return Sampling(**{**section.model_dump(), "stop": tuple(section.stop)})
