"""The subject of the checks: a stage's student and teacher before its first step."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opd.data.order import shuffled
from opd.environments.conversations import Rules, in_conversations
from opd.errors import ConfigError, nearest
from opd.evaluation.evaluate import HeldOut
from opd.messages import is_chat
from opd.method import Method
from opd.methods import build as build_method
from opd.models.language_model import LanguageModel
from opd.pieces.needs import Input, Trait, needs_of
from opd.pieces.supports import check_fits
from opd.recipe.schema import Recipe, StageSpec
from opd.rewards.base import rewarded
from opd.runs.build import model_for, writers_of
from opd.runs.own import own_sampler
from opd.runs.prepare import Given, Prepared, sampling_of
from opd.samplers.hf import TransformersSampler
from opd.samplers.writers import TeacherWriter
from opd.stage.folder import RunDir
from opd.teachers.cross_tokenizer import by_rule
from opd.teachers.local import LocalTeacher, local_teacher, placed
from opd.teachers.with_base import WithBase, base_teacher
from opd.types import Context, Prompt, ReservedStep, Reward, Rollout, Sampler, Sampling, Teacher, Writers, teachers_in

SAMPLES = 4  # responses per prompt, for pass@k


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What the checks examine: both models, a sample `prompts` of the stage's, and the student's responses to them.

    `rollouts` holds `Subject.sampling.n` responses per prompt, in order; `firsts` are the first of each.
    """

    recipe: Recipe
    spec: StageSpec
    method: Method
    reward: Reward | None
    held_out: HeldOut | None
    student: LanguageModel
    external: LanguageModel | None
    teacher: LocalTeacher  # scores in its own tokens
    step_teacher: Teacher  # as in a training step: by the method's rule on tokenizers, with a base beside it
    given: Given  # Python objects of the stage
    prompts: Sequence[Prompt]
    step_prompts: Sequence[Prompt]  # as many as a step has, or all
    seed: int
    rollouts: Sequence[Rollout] = ()
    base: LocalTeacher | None = None  # of a method of three models
    has_judge_reward: bool = False  # then `reward` is None: the doctor calls no judge
    rules: Rules | None = None  # of the conversations with an environment

    @property
    def self_taught(self) -> bool:
        return self.external is None

    @property
    def teacher_name(self) -> str:
        """The teacher's name in the recipe; the student's name if the student teaches itself."""
        return self.spec.teacher or self.spec.train

    @property
    def sampling(self) -> Sampling:
        return sampling_for(self.spec, self.method)

    @property
    def firsts(self) -> list[Rollout]:
        return [rollout for rollout in self.rollouts if rollout.sample == 0]

    @property
    def environment(self) -> str:
        """The name of the stage's environment; empty without one."""
        return "" if self.rules is None else self.rules.environment.name

    @property
    def maximises_divergence(self) -> bool:
        """Whether the method maximises the divergence from the teacher; then the teacher need not be better."""
        return Trait.MAXIMISES_DIVERGENCE in self.method.needs

    @property
    def scored(self) -> Sequence[Rollout]:
        """Rollouts for checks of the method's loss: `firsts`, or all if a piece compares responses of a group."""
        return self.rollouts if Input.GROUP in self.method.needs else self.firsts

    def contexts(self, rollouts: Sequence[Rollout]) -> list[Prompt]:
        """The teacher's context of each rollout; a context piece that reads groups gets the whole groups."""
        if Input.GROUP not in needs_of(self.method.context):
            return self.method.context(rollouts)
        own = {(one.prompt.id, one.sample) for one in rollouts}
        peers = [one for one in self.rollouts if (one.prompt.id, one.sample) not in own]
        return self.method.context([*rollouts, *peers])[: len(rollouts)]

    def writers(self) -> Writers:
        """The writers of a step of this stage, with the stage's own sampling."""
        externals = {} if self.external is None else {self.teacher_name: self.external}
        samplers: dict[str | None, Sampler] = {None: self.sampler(sampling_of(self.spec.sampling))}
        memory = self.method.make_memory()
        return writers_of(self.spec, self.method, self.student, self.step_teacher, externals, samplers, memory)

    def student_responses(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """The student's responses, `sampling.n` per prompt."""
        return self.sampler(self.sampling)(prompts, seed=(self.seed, ReservedStep.DOCTOR))

    def sampler(self, sampling: Sampling) -> Sampler:
        """The student's sampler in this process, also where the stage has an engine; the user's own, if it has one.

        In conversations where the stage has an environment.
        """
        limit = self.spec.max_prompt_length
        if self.spec.sampler is not None:
            inner = own_sampler(self.spec, self.student, sampling, self.given)
        else:
            inner = TransformersSampler(lm=self.student, sampling=sampling, max_prompt_length=limit)
        return in_conversations(inner, self.student, sampling, self.rules, limit)

    def rewarded(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The responses with the stage's reward, if it has one; marked as unjudged if that reward needs a judge."""
        if self.has_judge_reward:
            return [replace(rollout, unjudged="the doctor calls no judge") for rollout in rollouts]
        return rewarded(self.reward, rollouts)

    def teacher_responses(self, prompts: Sequence[Prompt], context: Context | None = None) -> list[Rollout]:
        """The teacher's responses with the method's context, or with `context`, sampled as the student's."""
        with self.on_device():
            return self._teacher_writer(context)(prompts, seed=(self.seed, ReservedStep.DOCTOR))

    def teacher_ends(self, prompts: Sequence[Prompt]) -> list[int]:
        """The last token of each response that the teacher finishes, as it writes it."""
        with self.on_device():
            written = self._teacher_writer().own(prompts, seed=(self.seed, ReservedStep.DOCTOR))
        return [int(rollout.own_ids[-1]) for rollout in written if rollout.finished]

    def _teacher_writer(self, context: Context | None = None) -> TeacherWriter:
        return TeacherWriter(
            teacher=self.teacher.lm,
            student=self.student,
            sampling=self.sampling,
            context=context or self.method.context,
            base=self.teacher.base,
            max_prompt_length=self.spec.max_prompt_length,
            led=lambda sampler: in_conversations(sampler, self.teacher.lm, self.sampling, self.rules, None),
        )

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """A context manager that puts an offloaded teacher on the student's device."""
        if not self.teacher.offload:
            return contextlib.nullcontext()
        return placed(self.teacher.lm, self.teacher.student_device)


def stage_to_examine(recipe: Recipe, name: str | None, given: Given, task: str | None = None) -> StageSpec:
    """The stage `name`, reduced to `task`; default: the first stage with a teacher (the student itself counts).

    Raises ConfigError.
    """
    names = [stage.name for stage in recipe.stages]
    if name is not None and name not in names:
        raise ConfigError(f"There is no stage {name!r} in {recipe.name}. Its stages: {', '.join(names)}.")
    for stage in recipe.stages if name is None else [recipe.stage(name)]:
        method = given.method or build_method(stage.method, stage.options)
        if method.teacher.kind != "none":
            return task_to_examine(stage, task)
    raise ConfigError(
        f"opd doctor checks whether a teacher will teach a student, and in {recipe.name} "
        + (f"no stage ({', '.join(names)}) has" if name is None else f"stage {name!r} does not have")
        + " a teacher that scores. Choose a stage or a method with one."
    )


def check_loadable(recipe: Recipe, spec: StageSpec) -> None:
    """Refuse several teachers of one row, and a teacher or base that is no model here. Raises ConfigError."""
    if len(names := teachers_in(spec.teacher)) > 1:
        raise ConfigError(
            f"{spec.where(None)}: opd doctor examines one teacher, and the stage has {spec.teacher!r}. Examine them "
            f"one by one: stages.{spec.name}.teacher={names[0]}."
        )
    for role, name in (("teacher", spec.teacher), ("base", spec.base)):
        if name is not None and recipe.models[name].server is not None:
            raise ConfigError(
                f"{spec.where(None)}: opd doctor samples from the teacher and compares whole distributions, and {role} "
                f"{name!r} is on servers, which only score. Give the doctor its weights, models.{name}.server=null "
                f"models.{name}.path=FOLDER; `opd check --live` examines the servers."
            )
        if name is not None and (scorer := recipe.models[name].scorer) is not None:
            raise ConfigError(
                f"{spec.where(None)}: opd doctor samples from the teacher and compares whole distributions, and {role} "
                f"{name!r} is made by {scorer}, which only scores. Give the doctor a model with `path` as the "
                f"stage's {role}, or train a few steps and read the metrics teacher/..."
            )


def task_to_examine(stage: StageSpec, task: str | None) -> StageSpec:
    """The stage, or its task `task` as a stage without tasks. Raises ConfigError for an unknown task."""
    if not stage.tasks and task is None:
        return stage
    if task not in stage.tasks:
        raise ConfigError(
            f"Stage {stage.name!r} "
            + (f"has the tasks {', '.join(stage.tasks)}, examined one by one" if stage.tasks else "has no tasks")
            + (f"; got --task {task}.{nearest(task, stage.tasks)}" if task is not None else ". Choose one with --task.")
        )
    return stage.only(str(task))


def sampling_for(spec: StageSpec, method: Method) -> Sampling:
    """The stage's own sampling with `SAMPLES` responses per prompt, or 1 at temperature 0.

    If the teacher reads the other responses to a prompt, there are at least as many as the stage samples.
    """
    sampling = sampling_of(spec.sampling)
    several = max(SAMPLES, sampling.n) if Input.GROUP in needs_of(method.context) else SAMPLES
    return replace(sampling, n=several if sampling.temperature > 0 else 1)


def load(recipe: Recipe, spec: StageSpec, given: Given) -> tuple[LanguageModel, dict[str, LanguageModel]]:
    """The student, and the external teacher and base by name, as they are when the stage begins.

    The student itself, as its own teacher or base, has no entry. Only reads the run's folder. Raises ConfigError if a
    model comes from an earlier stage that has not finished.
    """
    if spec.peers:
        raise ConfigError(
            f"Stage {spec.name!r} trains {', '.join(spec.trains)}, which teach each other, and opd doctor examines one "
            "student and its teacher. Choose another stage with --stage."
        )
    directory = RunDir(recipe.folder, False)
    before = recipe.stages[: [stage.name for stage in recipe.stages].index(spec.name)]
    for name in (spec.train, *spec.scoring):
        if name in given.models:
            continue
        made_by = [stage.name for stage in before if name in stage.trains]
        origin = made_by[-1] if made_by else recipe.models[name].from_stage
        if origin is not None and not directory.stage(origin).model.exists():
            raise ConfigError(
                f"Stage {spec.name!r} begins with model {name!r} from stage {origin!r}, and "
                f"{directory.stage(origin).model} does not exist yet. Run `opd train` until that stage is done, or "
                "choose an earlier stage with --stage."
            )
    student = model_for(recipe, spec, spec.train, given, directory)
    return student, {name: model_for(recipe, spec, name, given, directory) for name in spec.scoring}


def subject_of(
    recipe: Recipe,
    spec: StageSpec,
    prepared: Prepared,
    student: LanguageModel,
    externals: Mapping[str, LanguageModel],
    given: Given,
    *,
    prompts: int,
    seed: int,
) -> Subject:
    """The subject: the teacher by the method's rule, a sample of the prompts, and the student's responses to them.

    Raises ConfigError for a support larger than the vocabulary or a teacher that reads a judge's reward,
    AlignmentError for tokenizers that differ.
    """
    check_fits(prepared.method.support.k, student.vocabulary)
    part = prepared.tasks[None]
    chosen = sample_of(part.prompts, prompts, seed)
    rule = prepared.method.teacher
    external = externals.get(str(spec.teacher))
    teacher = local_teacher(
        rule,
        student,
        external,
        micro_batch_tokens=spec.micro_batch_tokens,
        offload=spec.teacher is not None and spec.teacher in recipe.models and recipe.models[spec.teacher].offload,
    )
    has_judge_reward = part.reward is not None and bool(part.reward.asks)
    if part.reward is not None and has_judge_reward and Input.REWARD in needs_of(prepared.method.context):
        raise ConfigError(
            f"Stage {spec.name!r}: its teacher reads the reward of a response, and its reward ({part.reward.name}) "
            "needs a judge, which the doctor does not call. Give the doctor a reward that is a function, e.g. the "
            f"override `stages.{spec.name}.reward={{name: exact}}`."
        )
    step_teacher, base = by_rule(rule, student, teacher, chat=is_chat(chosen)), None
    if spec.base is not None:
        base = base_teacher(student, externals.get(spec.base), micro_batch_tokens=spec.micro_batch_tokens)
        step_teacher = WithBase(teacher=step_teacher, third=base)
    subject = Subject(
        recipe=recipe,
        spec=spec,
        method=prepared.method.with_tokenizer(student.tokenizer),
        reward=None if has_judge_reward else part.reward,
        held_out=part.held_out,
        student=student,
        external=external,
        teacher=teacher,
        given=given,
        step_teacher=step_teacher,
        base=base,
        prompts=chosen,
        step_prompts=sample_of(part.prompts, spec.prompts_per_step, seed),
        seed=seed,
        has_judge_reward=has_judge_reward,
        rules=part.rules,
    )
    return replace(
        subject, rollouts=subject.rewarded(subject.student_responses(chosen))
    )  # a context may read the reward


def sample_of(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """`count` different prompts, or all if there are fewer; a function of the seed."""
    return shuffled(prompts, first=0, count=min(count, len(prompts)), seed=seed)
