"""The probe in two parts: the plan, which needs the responses and knows the cost, and the continuations."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from opd.commands.doctor.headroom import missing_for
from opd.commands.doctor.subject import sample_of, stage_to_examine, task_to_examine
from opd.commands.probe.report import Report
from opd.commands.probe.subjects import PLAIN, Models, check_teachers, contexts_of, listed, load_models
from opd.errors import ConfigError, DataError
from opd.evaluation.forced_tokens import continuations, rewards_after, right_of
from opd.evaluation.response_tree import Node, Reader, Visit, chosen_visits, likely_tokens, tree_of
from opd.evaluation.teacher_alignment import FORMS, alignment
from opd.models.preview import tokenizer_of
from opd.pieces.needs import needs_of
from opd.recipe.schema import Recipe, StageSpec, origin_of
from opd.rewards.base import unfit_to_measure
from opd.runs.prepare import Given, Prepared, prepare, sampling_of
from opd.samplers.hf import TransformersSampler
from opd.types import Context, Prompt, ReservedStep, Reward, Rollout, Sampling

FEWEST_VISITS = 10  # of a token; with fewer the two halves of the ceiling say nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The sizes of the probe. Responses and visits are the paper's; the others are ours."""

    prompts: int = 16
    responses: int = 200  # per prompt
    visits: int = 100  # continuations per token
    nodes: int = 8  # per prompt, on right responses and as many on wrong ones
    tau: float = 0.05  # tokens with a higher probability, of the student or a teacher, are forced
    form: str = "reverse_kl"  # the divergence by which teachers are ranked


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is examined: a stage, its prompts and reward, and the teachers and contexts by name."""

    recipe: Recipe
    spec: StageSpec
    reward: Reward
    prompts: Sequence[Prompt]
    sampling: Sampling
    teachers: Sequence[str]
    contexts: Mapping[str, Context]
    settings: Settings
    seed: int
    given: Given


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The nodes that were chosen, before any continuation."""

    subject: Subject
    models: Models
    visits: Sequence[Visit]
    right: float  # share of responses
    seconds: float  # so far

    @property
    def nodes(self) -> list[Node]:
        """The different nodes of the visits."""
        return list({visit.node.key: visit.node for visit in self.visits}.values())

    @property
    def continuations(self) -> int:
        return continuations(self.nodes, self.subject.settings.visits)


def subject_of(
    recipe: Recipe,
    *,
    teachers: Sequence[str] = (),
    contexts: Sequence[str] = (PLAIN,),
    stage: str | None = None,
    task: str | None = None,
    settings: Settings | None = None,
    seed: int | None = None,
    given: Given | None = None,
) -> Subject:
    """What is examined, without loading any weight. Raises ConfigError or DataError for everything that cannot work.

    `teachers`: names of the recipe's models; default the stage's teacher, or the student itself. `contexts`: see
    `contexts_of`. The reward is the stage's, else its evaluation's, with the prompts of that section.
    """
    settings, given = settings or Settings(), given or Given()
    check_settings(settings)
    spec = stage_of(recipe, stage, task, given)
    names = listed(teachers) or [spec.teacher or spec.train]
    check_teachers(recipe, spec, names)
    check_single(spec)
    prepared = prepare(spec, given, recipe.seed)
    reward, prompts = judged_by(spec, prepared)
    readers = contexts_of(listed(contexts) or [PLAIN], prepared.method)
    for name, context in readers.items():
        if missing := missing_for(needs_of(context).columns, prompts):
            raise DataError(
                f"--contexts {name}: the teacher reads {', '.join(missing)}, which some of the {len(prompts)} prompts "
                "do not have. Fill the column, or leave the context out."
            )
    sampling = sampling_of(spec.sampling)
    if sampling.temperature == 0 or spec.sampler is not None:
        got = "its own sampler" if spec.sampler is not None else "sampling.temperature 0"
        raise ConfigError(
            f"{spec.where(None)}: it has {got}, and opd probe continues responses by sampling from the student here. "
            f"Override it, e.g. stages.{spec.name}.sampling.temperature=1 or stages.{spec.name}.sampler=null."
        )
    seed = recipe.seed if seed is None else seed
    found = Subject(
        recipe=recipe,
        spec=spec,
        reward=reward,
        prompts=sample_of(prompts, settings.prompts, seed),
        sampling=sampling,
        teachers=names,
        contexts=readers,
        settings=settings,
        seed=seed,
        given=given,
    )
    check_tau(found)
    return found


def check_single(spec: StageSpec) -> None:
    """Refuse a stage with an environment: its state cannot be copied into many continuations. Raises ConfigError."""
    if spec.environment is not None:
        raise ConfigError(
            f"{spec.where(None)}: it has an environment, and opd probe continues single responses from their tokens. "
            f"Probe the stage without it, stages.{spec.name}.environment=null, or use opd doctor, which leads "
            "conversations."
        )


def stage_of(recipe: Recipe, name: str | None, task: str | None, given: Given) -> StageSpec:
    """The stage `name`, reduced to `task`; it may have no teacher yet. Default: the first one with a teacher."""
    for stage in recipe.stages:
        if stage.name == name:
            return task_to_examine(stage, task)
    return stage_to_examine(recipe, name, given, task)


def check_settings(settings: Settings) -> None:
    """Raise ConfigError for sizes with which nothing can be estimated."""
    if settings.visits < FEWEST_VISITS:
        raise ConfigError(
            f"opd probe got --visits {settings.visits}. With fewer than {FEWEST_VISITS} continuations of a token its "
            "probability of a right response is mostly noise, and so is the alignment: at 4 visits the estimated ideal "
            "gradient has a cosine of about .26 with the true one, at 100 about .80. Give more."
        )
    for name, value in (("prompts", settings.prompts), ("responses", settings.responses), ("nodes", settings.nodes)):
        if value < 1:
            raise ConfigError(f"opd probe got --{name} {value}. Give at least 1.")
    if not settings.tau < 1:  # NaN too
        raise ConfigError(
            f"opd probe got --tau {settings.tau:g}, a probability that no token exceeds. Give one below 0.5, e.g. 0.05."
        )
    if settings.form not in FORMS:
        raise ConfigError(f"opd probe got --form {settings.form}. Teachers are ranked by {' or '.join(FORMS)}.")


def check_tau(subject: Subject) -> None:
    """Raise ConfigError for a tau of 0 or less: every token of the vocabulary would be forced at every node."""
    settings = subject.settings
    if settings.tau > 0:
        return
    train = subject.spec.train
    lm = subject.given.models.get(train)
    tokenizer = tokenizer_of(origin_of(subject.recipe, train), train) if lm is None else lm.tokenizer
    cost = "each time the size of the vocabulary"
    if tokenizer is not None:
        nodes = 2 * settings.nodes * len(subject.prompts)
        cost = (
            f"up to {nodes:,} nodes x {len(tokenizer):,} tokens x {settings.visits} visits = "
            f"{nodes * len(tokenizer) * settings.visits:,} continuations"
        )
    raise ConfigError(
        f"opd probe got --tau {settings.tau:g}: every token of the vocabulary would be forced at every node, {cost}. "
        "Give a probability above 0, e.g. 0.05: tokens below it change little of the gradient, which has the factor P."
    )


def judged_by(spec: StageSpec, prepared: Prepared) -> tuple[Reward, list[Prompt]]:
    """The reward that says whether a response is right, and its prompts. Raises ConfigError without one."""
    task = prepared.tasks[None]
    if task.reward is not None and not unfit_to_measure(task.reward):
        return task.reward, task.prompts
    if task.held_out is not None and task.held_out.reward is not None:
        return task.held_out.reward, list(task.held_out.prompts)
    why = "has no reward, and neither has its evaluation"
    if task.reward is not None:
        why = f"has the reward {task.reward.name!r}, {unfit_to_measure(task.reward)}, and its evaluation has none"
    raise ConfigError(
        f"{spec.where(None)}: it {why}. opd probe compares teachers with the gradient of the probability of a right "
        f"response, so it needs a reward of 0 and 1. Set stages.{spec.name}.reward, e.g. `{{name: exact}}` with an "
        "`answer` in the data."
    )


def planned(subject: Subject, say: Callable[[str], None]) -> Plan:
    """Load the models, sample the responses, and choose the nodes. `say` hears the cost before and after."""
    settings, started = subject.settings, time.perf_counter()
    count = len(subject.prompts)
    say(
        f"{count} prompts x {settings.responses} responses, then the likely tokens of up to "
        f"{2 * settings.nodes * count} nodes x {settings.visits} continuations"
    )
    models = load_models(subject.recipe, subject.spec, subject.teachers, subject.given)
    say("the student's responses")
    sampler = TransformersSampler(
        lm=models.student,
        sampling=replace(subject.sampling, n=settings.responses),
        max_prompt_length=subject.spec.max_prompt_length,
    )
    began = time.perf_counter()
    visits: list[Visit] = []
    right = 0.0
    for prompt in subject.prompts:
        rollouts = sampler([prompt], seed=(subject.seed, ReservedStep.PROBE))
        values = right_of(subject.reward, rollouts)
        rollouts = [replace(one, reward=value) for one, value in zip(rollouts, values, strict=True)]
        right += sum(values) / len(values) / count
        visits += visits_of(subject, models, rollouts)
    each = (time.perf_counter() - began) / (count * settings.responses)
    plan = Plan(subject=subject, models=models, visits=visits, right=right, seconds=time.perf_counter() - started)
    say(
        f"{right:.0%} of the responses are right; {len(plan.nodes)} nodes, {plan.continuations:,} continuations: at "
        f"most {each * plan.continuations:,.0f} s at the speed of the responses"
    )
    return plan


def visits_of(subject: Subject, models: Models, rollouts: Sequence[Rollout]) -> list[Visit]:
    """The chosen visits of one prompt's responses."""
    settings, prompt = subject.settings, rollouts[0].prompt
    tree = tree_of(rollouts)
    readers = {
        f"{teacher}, {name}": Reader(teacher=scorer, context=context(rollouts[:1])[0])
        for teacher, scorer in models.teachers.items()
        for name, context in subject.contexts.items()
    }
    own = Reader(teacher=models.scoring_student(subject.spec.micro_batch_tokens), context=prompt)
    nodes = likely_tokens(tree, own, readers, tau=settings.tau, temperature=subject.sampling.temperature)
    return chosen_visits(tree, nodes, settings.nodes, (subject.seed, ReservedStep.PROBE, prompt.id))


def measured(plan: Plan, say: Callable[[str], None]) -> Report:
    """Continue every likely token of the chosen nodes, and compare the teachers."""
    subject, started = plan.subject, time.perf_counter()
    nodes, total = plan.nodes, plan.continuations
    found = rewards_after(
        plan.models.student,
        nodes,
        subject.reward,
        sampling=subject.sampling,
        visits=subject.settings.visits,
        seed=subject.seed,
        done=lambda count: say(f"{count:,} of {total:,} continuations"),
    )
    by_key = {node.key: values for node, values in zip(nodes, found, strict=True)}
    return Report(
        recipe=subject.recipe.name,
        stage=subject.spec.name,
        prompts=len(subject.prompts),
        responses=subject.settings.responses,
        right=plan.right,
        nodes=len(nodes),
        continuations=total,
        visits=subject.settings.visits,
        tau=subject.settings.tau,
        form=subject.settings.form,
        seed=subject.seed,
        seconds=plan.seconds + time.perf_counter() - started,
        alignment=alignment(plan.visits, by_key, subject.seed),
    )
