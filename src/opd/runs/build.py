"""Build a `Stage` from a prepared stage: models, teacher, writers, rewards, evaluations, optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from opd.environments.conversations import in_conversations
from opd.errors import ConfigError
from opd.evaluation.compare import check_comparable, check_k
from opd.method import Method
from opd.models.adapters import coverage
from opd.models.experts import coefficient_of, left_out
from opd.models.language_model import LanguageModel
from opd.models.loading import load_model
from opd.models.root import Root
from opd.models.vocabularies import on_common_tokens
from opd.parallel import World
from opd.pieces.contexts import same_prompt
from opd.pieces.needs import Input, needs_of
from opd.pieces.supports import check_fits
from opd.recipe.schema import Recipe, StageSpec, section_of
from opd.rewards.base import StageRewards, about
from opd.runs.evaluations import exams_in, exams_of
from opd.runs.examples import start_lines
from opd.runs.launched import Starter
from opd.runs.own import own_sampler, own_teacher
from opd.runs.prepare import Given, Prepared, sampling_of
from opd.runs.same_model import check_base_weights, check_common_start, check_other_weights
from opd.runs.served import able_lines, engine_samplers, served_teacher
from opd.runs.space import check_space, space_of
from opd.samplers.ahead import Ahead, one_ahead
from opd.samplers.authors import TeacherAuthor, TextCache
from opd.samplers.hf import TransformersSampler
from opd.samplers.writers import ReferenceWriter, TeacherWriter, sampler_by_task, writer_by_task
from opd.stage import optimisers
from opd.stage.folder import RunDir, StageDir
from opd.stage.follow import prompts_to_follow
from opd.stage.interrupt import Interrupt
from opd.stage.optimisation import StageOptimisation
from opd.stage.progress import Progress
from opd.stage.stage import Stage
from opd.stage.trackers import ReportWriter
from opd.teachers.cross_tokenizer import teacher_by_rule
from opd.teachers.incremental import scoring_along
from opd.teachers.local import with_record
from opd.teachers.mixed import mixed_teacher
from opd.teachers.routed import RoutedTeacher
from opd.teachers.with_base import WithBase, base_teacher
from opd.types import (
    Author,
    Memory,
    NoTeacher,
    Record,
    Rollout,
    Sampler,
    Teacher,
    TeacherRule,
    Writer,
    Writers,
    teachers_in,
)


def teacher_of(
    recipe: Recipe,
    spec: StageSpec,
    rule: TeacherRule,
    student: LanguageModel,
    externals: Mapping[str, LanguageModel],
    own: Mapping[str, Teacher],
    *,
    chat: bool = False,
) -> Teacher:
    """The stage's teacher; with several tasks, one that routes to theirs. A base stands beside it.

    `externals`: loaded models by name. `own`: the user's teachers by name.
    `chat`: whether prompts are conversations, for a teacher with its own tokenizer.
    """

    def single(name: str | None) -> Teacher:
        if rule.kind == "external" and name is not None and name in own:
            return own[name]
        return teacher_by_rule(
            rule,
            student,
            None if name is None else externals.get(name),
            micro_batch_tokens=spec.micro_batch_tokens,
            offload=name is not None and recipe.models[name].offload,
            chat=chat,
        )

    def one(teacher: str | None) -> Teacher:
        if rule.mixture is None or teacher is None:
            return single(teacher)
        return mixed_teacher({name: single(name) for name in teachers_in(teacher)}, rule.mixture, spec.where(None))

    if rule.kind == "peer":
        teacher = RoutedTeacher(teachers={name: one(name) for name in spec.teachers}, otherwise=NoTeacher())
    elif spec.tasks and rule.kind == "external":
        named = dict.fromkeys(part.teacher for part in spec.by_task.values() if part.teacher not in (None, spec.train))
        teacher = RoutedTeacher(teachers={str(name): one(name) for name in named})
    else:
        teacher = one(spec.teacher)
    if spec.base is None:
        return teacher
    return WithBase(teacher=teacher, third=base_of(recipe, spec, student, externals, own))


def base_of(
    recipe: Recipe,
    spec: StageSpec,
    student: LanguageModel,
    externals: Mapping[str, LanguageModel],
    own: Mapping[str, Teacher],
) -> Teacher:
    """The scorer of the stage's base."""
    assert spec.base is not None
    if spec.base in own:
        return own[spec.base]
    return base_teacher(
        student,
        externals.get(spec.base),
        micro_batch_tokens=spec.micro_batch_tokens,
        offload=recipe.models[spec.base].offload,
    )


def samplers_of(
    session: Session, spec: StageSpec, prepared: Prepared, student: LanguageModel, root: Root, folder: Path
) -> dict[str | None, Sampler]:
    """The student's samplers by task, each with the task's settings and environment.

    `folder` of the stage: for an engine's weights.
    """
    return {
        name: in_conversations(
            inner,
            student,
            sampling_of(spec.by_task[name].sampling),
            prepared.tasks[name].rules,
            spec.max_prompt_length,
        )
        for name, inner in _inner_samplers(session, spec, student, root, folder).items()
    }


def _inner_samplers(
    session: Session, spec: StageSpec, student: LanguageModel, root: Root, folder: Path
) -> dict[str | None, Sampler]:
    recipe, given = session.recipe, session.given
    if spec.engine is not None:

        def load() -> LanguageModel:
            return model_for(recipe, spec, spec.train, given, session.directory, device="cpu")

        return {**engine_samplers(spec, spec.engine, student, folder, root, session.world, load)}
    if spec.sampler is not None:
        return {
            name: own_sampler(spec, student, sampling_of(part.sampling), given) for name, part in spec.by_task.items()
        }
    return {
        name: TransformersSampler(
            lm=student, sampling=sampling_of(part.sampling), max_prompt_length=spec.max_prompt_length
        )
        for name, part in spec.by_task.items()
    }


def writers_of(
    spec: StageSpec,
    method: Method,
    student: LanguageModel,
    teacher: Teacher,
    externals: Mapping[str, LanguageModel],
    samplers: Mapping[str | None, Sampler],
    memory: Mapping[str, Memory],
    cache: TextCache | None = None,
    ahead: Ahead | None = None,
) -> Writers:
    """The writers of this stage's responses, from which the method's source chooses.

    `cache` keeps the texts of the authors; default: they are not kept. `ahead`: the samplers, one step ahead.
    """
    teachers: dict[str | None, Writer] = {}
    for name, part in spec.by_task.items():
        if part.teacher is not None and part.teacher in externals:
            teachers[name] = TeacherWriter(
                teacher=externals[part.teacher],
                student=student,
                sampling=sampling_of(part.teacher_sampling or part.sampling),
                context=same_prompt(),
                max_prompt_length=spec.max_prompt_length,
            )
    authors: dict[str | None, Author] = {
        name: TeacherAuthor(
            name=name,
            teacher=externals[name],
            student=student,
            sampling={task: sampling_of(part.teacher_sampling or part.sampling) for task, part in spec.by_task.items()},
            max_prompt_length=spec.max_prompt_length,
            cache=cache,
        )
        for name in spec.teachers
        if name in externals
    }
    reference = ReferenceWriter(student=student, max_prompt_length=spec.max_prompt_length)

    def complete(rollouts: Sequence[Rollout], record: Record) -> list[Rollout]:
        return with_record(
            student,
            rollouts,
            record,
            temperature=lambda rollout: samplers[None if None in samplers else rollout.prompt.task].temperature,
            micro_batch_tokens=spec.micro_batch_tokens,
        )

    return Writers(
        student=sampler_by_task(samplers) if ahead is None else ahead,
        reference=reference,
        complete=complete,
        teacher=writer_by_task(teachers) if teachers else None,
        authors=authors,
        scorer=None if method.teacher.kind == "none" else scoring_along(teacher, method.context, method.request()),
        memory=memory,
    )


def readers_of(
    spec: StageSpec, method: Method, teacher: Teacher, externals: Mapping[str, LanguageModel]
) -> dict[str | None, LanguageModel]:
    """The models that read the method's contexts, by `Prompt.teacher_id`: teachers that score, or else that write."""
    found: dict[str | None, LanguageModel | None] = {}
    for part in spec.by_task.values():
        if method.teacher.kind != "none":
            found[part.teacher] = teacher.of(part.teacher).lm
        elif Input.TEACHER_MODEL in needs_of(method.source) and part.teacher is not None:
            found[part.teacher] = externals.get(part.teacher)
    return {name: lm for name, lm in found.items() if lm is not None}


def rewards_of(
    recipe: Recipe, prepared: Prepared, judges: Mapping[str, LanguageModel], folder: Path, world: World
) -> StageRewards:
    """The rewards of all tasks, ready to use. `judges`: loaded models by name; their answers are cached in `folder`.

    Raises RunError if the cache cannot be read.
    """
    origins = {name: recipe.models[name].model_dump(mode="json") for name in judges}
    by_task = {
        name: None if task.reward is None else task.reward.for_stage(judges, origins, folder / "judges", world.rank)
        for name, task in prepared.tasks.items()
    }
    return StageRewards(by_task=by_task, gather=world.gather)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What all stages of a run share."""

    recipe: Recipe
    given: Given
    directory: RunDir
    progress: Progress
    trackers: ReportWriter
    world: World
    interrupt: Interrupt
    servers: ExitStack = field(default_factory=ExitStack)  # that the current stage has started

    def model(self, spec: StageSpec, name: str) -> LanguageModel:
        """A model as it is when stage `spec` begins."""
        self.progress.phase(f"{spec.name}: loading {name}")
        return model_for(self.recipe, spec, name, self.given, self.directory)


def build(session: Session, spec: StageSpec, prepared: Prepared) -> Stage:
    """Load the stage's models and build the stage; of several models, that of the first, with the others as peers."""
    if not spec.peers:
        return of_model(session, spec, prepared, session.directory.stage(spec.name))
    with session.world.main_first():
        models = {name: session.model(spec, name) for name in spec.trains}
    check_common_start(session.recipe, spec, Given(models=models))
    session = replace(session, given=replace(session.given, models={**session.given.models, **models}))
    first = session.directory.stage(spec.name)
    stages = [
        of_model(session, view, prepared.peers.get(view.train, prepared), first.of_peer(view.train) if i else first)
        for i, view in enumerate(spec.views)
    ]
    stages[0].peers = tuple(stages[1:])
    return stages[0]


def of_model(session: Session, spec: StageSpec, prepared: Prepared, folder: StageDir) -> Stage:
    """The stage of one model, with its files in `folder`."""
    recipe, world = session.recipe, session.world
    student, externals, judges = loaded(session, spec, prepared.method)
    prepared = replace(prepared, method=prepared.method.with_tokenizer(student.tokenizer))
    method = prepared.method
    for line in start_lines(spec, prepared, {spec.train: student, **externals}):
        session.progress.note(f"{spec.name}: {line}")
    memory = method.make_memory()
    world.agree(student.trainable().values())
    # Before sharding the student: a teacher that copies it has whole weights in every process.
    starter = Starter(folder=folder, servers=session.servers, progress=session.progress, world=world)
    own = {n: elsewhere(session, method, student, n, starter) for n in spec.scoring if not recipe.models[n].local}
    spec = starter.engine(spec, student)
    teacher = teacher_of(recipe, spec, method.teacher, student, externals, own, chat=prepared.chat)
    check_teacher(spec, method, teacher)
    root = Root(student.model)
    world.shard(root, student.blocks())
    exams = exams_of(spec, prepared, student, teacher, externals, own)
    folder = described(spec, folder, prepared)
    samplers = samplers_of(session, spec, prepared, student, root, folder.path)
    ahead = one_ahead(samplers, recipe.seed, scoring_early(method, teacher)) if spec.ahead else None
    cache = TextCache(folder.path / "texts", world.rank)
    writers = writers_of(spec, method, student, teacher, externals, samplers, memory, cache, ahead)
    reward = rewards_of(recipe, prepared, judges, folder.path, world)
    return Stage(
        spec=spec,
        seed=recipe.seed,
        world=world,
        method=method,
        memory=memory,
        student=student,
        root=root,
        teacher=teacher,
        readers=readers_of(spec, method, teacher, externals),
        writers=writers,
        ahead=ahead,
        order=prepared.order,
        reward=reward,
        optimisation=optimisation_of(session, spec, prepared, root, student, teacher, writers, reward, memory),
        followed=prompts_to_follow(exams, student, spec.samples.follow) if spec.samples_every else (),
        exams=exams_in(exams, spec, student, root, folder, world, session.progress) if exams else None,
        folder=folder,
        progress=session.progress,
        trackers=session.trackers,
        interrupt=session.interrupt,
        seconds_limit=seconds_limit(spec, session.directory),
        router_aux_loss=coefficient_of(student.model, spec.router_aux_loss, spec.where(None)),
    )


def optimisation_of(
    session: Session,
    spec: StageSpec,
    prepared: Prepared,
    root: Root,
    student: LanguageModel,
    teacher: Teacher,
    writers: Writers,
    reward: StageRewards,
    memory: Mapping[str, Memory],
) -> StageOptimisation:
    """What an update reads and changes."""
    return StageOptimisation(
        optimiser=optimisers.build(student.trainable(), spec.optimizer, spec.steps, student.tables),
        student=student,
        root=root,
        teacher=teacher,
        sampler=writers.student,
        prompts=[prompt for prompts in prepared.order.prompts for prompt in prompts],
        reward=reward,
        context=prepared.method.context,
        memory=memory,
        world=session.world,
        seed=session.recipe.seed,
        micro_batch_tokens=spec.micro_batch_tokens,
    )


def described(spec: StageSpec, folder: StageDir, prepared: Prepared) -> StageDir:
    """The folder, whose files of responses name the rewards of training and of the evaluation; writes keys.json."""
    tasks = prepared.tasks.values()
    measured = [None if task.held_out is None else task.held_out.reward for task in tasks]
    folder = replace(folder, reward=about([task.reward for task in tasks]), measured_by=about(measured))
    folder = replace(folder, most_images=spec.samples.images)
    folder.write_keys(keys_of(spec, prepared, folder))
    return folder


def keys_of(spec: StageSpec, prepared: Prepared, folder: StageDir) -> dict[str, Any]:
    """The names that the stage's metrics are made of, for readers of `metrics.jsonl`: docs/run_folder.md."""
    sections = [part.evaluate for part in spec.by_task.values() if part.evaluate is not None]
    if prepared.method.teacher.kind in ("external", "peer"):
        teacher = "+".join(spec.teachers) or None
    else:
        teacher = None if prepared.method.teacher.kind == "none" else spec.train
    return {
        "settings": list(dict.fromkeys(setting for section in sections for setting in section.sampling)),
        "tasks": [name for name in spec.by_task if name is not None],
        "teacher_prefix": "eval/teacher/",
        "trained": spec.train,
        "teacher": teacher,
        "method": spec.method,
        "reward": folder.measured_by or folder.reward,
    }


def scoring_early(method: Method, teacher: Teacher) -> Callable[[list[Rollout]], None] | None:
    """Lets the teacher score responses before their step; None if what it reads depends on rewards or on a group."""
    if needs_of(method.context).inputs:
        return None
    return lambda rollouts: teacher.score_early(rollouts, method.context(rollouts), method.request())


def elsewhere(session: Session, method: Method, student: LanguageModel, name: str, starter: Starter) -> Teacher:
    """A teacher or base without a model in this process: the user's own, or one on servers."""
    section = session.recipe.models[name]
    if section.server is None:
        return own_teacher(name, section, student, session.given)
    section = starter.teacher(name, section)
    session.progress.phase(f"connecting to {name}")
    teacher = served_teacher(name, section, student, method, session.world)
    for line in able_lines(name, teacher.replicas, teacher.capabilities, method.support.student_top_k):
        session.progress.note(line)
    return teacher


def loaded(
    session: Session, spec: StageSpec, method: Method
) -> tuple[LanguageModel, dict[str, LanguageModel], dict[str, LanguageModel]]:
    """The student, the teachers by name, and the judges' models by name. Raises ConfigError and AlignmentError."""
    with session.world.main_first():
        student = session.model(spec, spec.train)
        check_student(spec, method, student, session.progress)
        folder = session.directory.stage(spec.name)
        check_space(space_of(spec, method, student, folder), folder)
        loadable = [name for name in spec.scoring if session.recipe.models[name].local]
        externals = {name: session.model(spec, name) for name in loadable}
        # Also finds copies in other folders. The checks before the load have noted the weights that they know.
        known = Given(models={spec.train: student, **externals})
        check_other_weights(session.recipe, spec, method, known)
        check_base_weights(session.recipe, spec, method, known)
        judges = {name: externals.get(name) or session.model(spec, name) for name in spec.judge_models}
        student, externals = comparable(spec, method, student, externals)
    for lm in (student, *externals.values(), *(judges[name] for name in judges if name not in externals)):
        for line in lm.notes:
            session.progress.note(f"{spec.name}: {line}")
    return student, externals, judges


def comparable(
    spec: StageSpec, method: Method, student: LanguageModel, externals: Mapping[str, LanguageModel]
) -> tuple[LanguageModel, dict[str, LanguageModel]]:
    """The models with one vocabulary, but for teachers whose tokenizer may differ. Raises AlignmentError."""
    students = method.teacher.tokenizer == "students"
    together = {name: lm for name, lm in externals.items() if students or name == spec.base}
    if not together and not students:
        return student, {**externals}
    student, narrowed = on_common_tokens(student, together)
    return student, {**externals, **narrowed}


def check_teacher(spec: StageSpec, method: Method, teacher: Teacher) -> None:
    """Refuse a teacher that cannot compute the scores that the stage needs. Raises ConfigError."""
    if method.teacher.kind == "none":
        return
    for one in (method, *(part.method for part in method.parts.values())):
        if why := teacher.refuses(one.request(shown=True)):
            raise ConfigError(
                f"Stage {spec.name!r}: the teacher {teacher.name!r} cannot score method {spec.method!r}: {why}."
            )
    if spec.diagnostics.every:
        check_comparable(teacher, f"Stage {spec.name!r}: diagnostics.every")


def check_student(spec: StageSpec, method: Method, student: LanguageModel, progress: Progress) -> None:
    """Checks that need the loaded student. Raises ConfigError."""
    if not student.trainable():
        raise ConfigError(f"Stage {spec.name!r}: model {spec.train!r} has no parameter that requires a gradient.")
    check_fits(max(method.support.k, method.top_k, method.record().top_k), student.vocabulary)
    for part in method.parts.values():
        check_fits(part.method.support.k, student.vocabulary)
    if spec.diagnostics.every:
        check_k(spec.diagnostics.k, student.vocabulary)
    coefficient_of(student.model, spec.router_aux_loss, spec.where(None))
    for line in (coverage(student.model), left_out(student.model, spec.router_aux_loss)):
        if line:
            progress.note(f"{spec.name}: {spec.train}: {line}")
    if any(p.dtype == torch.bfloat16 for p in student.trainable().values()):
        progress.note(
            f"{spec.name}: {spec.train} trains bfloat16 weights: most small updates round to zero. Use `dtype: "
            "float32` with `autocast: true`, or LoRA."
        )


def model_for(
    recipe: Recipe, spec: StageSpec, name: str, given: Given, directory: RunDir, device: str | None = None
) -> LanguageModel:
    """A model as it is when stage `spec` begins: from the last stage that trained it, else from its origin."""
    if name in given.models:
        return given.models[name]
    before = recipe.stages[: [s.name for s in recipe.stages].index(spec.name)]
    trained = [s.name for s in before if name in s.trains]
    origin = trained[-1] if trained else recipe.models[name].from_stage
    folder = None if origin is None else directory.stage(origin).model
    described = section_of(recipe, name).model_copy(update={} if device is None else {"device": device})
    return load_model(described, name=name, folder=folder, seed=recipe.seed, trains=name in spec.trains)


def seconds_limit(spec: StageSpec, directory: RunDir) -> float:
    if spec.seconds_of is None:
        return math.inf
    done = directory.stage(spec.seconds_of).done()
    assert done is not None, "stages run in order"
    return float(done["seconds"])
