"""Stages of a recipe, one after the other. What has been done is not done again."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opd import checkpoint, models, optim
from opd import recipe as recipes
from opd.check import check_processes, check_tokenizers
from opd.check_reading import check_template_options
from opd.compare import check_k
from opd.errors import ConfigError, TrainingError
from opd.held_out import Exam, Examiner
from opd.interrupt import stopped_after
from opd.loading import load_model
from opd.method import Method
from opd.metrics import ReportWriter
from opd.model_card import write_card
from opd.models import LanguageModel, Root
from opd.moves import Moves
from opd.parallel import ALONE, World, full
from opd.prepare import Given, Prepared, prepare
from opd.progress import Progress
from opd.recipe import Recipe, StageSpec
from opd.roles import exams_of, rewards_of, samplers_of, teacher_of, writers_of
from opd.rundir import RunDir, StageDir, check_space
from opd.supports import check_fits
from opd.teachers.local import check_same_tokens
from opd.train import Stage, train


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A finished run. `metrics` and `samples` are rows, each with its stage; `student` is the last stage's model."""

    folder: Path
    recipe: Recipe
    student: Any
    tokenizer: Any
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]


def run_recipe(
    recipe: Recipe, given: Given | None = None, progress: Progress | None = None, world: World = ALONE
) -> Run:
    """Run all stages (or what is left of them) and return the result. Raises OPDError kinds; see `opd.errors`.

    Every process of `world` calls this; one of them writes and shows progress.
    """
    given = given or Given()
    with world.main_first():
        prepared = {stage.name: prepare(stage, given, recipe.seed) for stage in recipe.stages}
        for spec in recipe.stages:  # the rest of what can fail without weights
            check_tokenizers(recipe, spec, prepared[spec.name], given.models)
            check_processes(recipe, spec, prepared[spec.name].method, prepared[spec.name].order, world.size)
        check_template_options(recipe, prepared)
        directory = RunDir.open(recipe.folder, recipes.dump(recipe)) if world.main else RunDir(recipe.folder, False)
    report = ReportWriter(
        recipe.report_to if world.main else (),
        folder=directory.path,
        name=recipe.name,
        config=recipe.model_dump(mode="json"),
    )
    student: LanguageModel | None = None
    with progress if progress and world.main else Progress(quiet=not world.main) as shown:
        if directory.replaced:
            shown.note(f"{directory.path}: a run of another recipe was here that made no step; this one replaces it")
        for spec in recipe.stages:
            folder = directory.stage(spec.name)
            if folder.done() is not None:
                shown.note(f"{spec.name}: done before")
                continue
            shown.stage(spec.name, spec.steps)
            for name, task in prepared[spec.name].tasks.items():
                for line in task.notes:
                    shown.note(f"{spec.name}: {line}" if name is None else f"{spec.name}, task {name}: {line}")
            stage = build(recipe, spec, prepared[spec.name], given, directory, shown, report, world)
            student = stage.student if world.size == 1 else None  # a sharded one is of use to nobody
            outcome = train(stage)
            check_learned(stage)
            finish(recipe, stage, outcome.seconds, given, directory)
            world.wait()
            if outcome.asked_to_stop and spec is not recipe.stages[-1]:
                raise stopped_after(spec.name, spec.steps, spec.steps)
    report.close()
    last = recipe.stages[-1]
    if student is None:
        student = load_model(recipe.models[last.train], name=last.train, folder=directory.stage(last.name).model)
    return Run(
        folder=directory.path,
        recipe=recipe,
        student=student.model,
        tokenizer=student.tokenizer,
        metrics=[{"stage": s.name, **row} for s in recipe.stages for row in directory.stage(s.name).read_metrics()],
        samples=[{"stage": s.name, **row} for s in recipe.stages for row in directory.stage(s.name).read_samples()],
    )


def check_learned(stage: Stage) -> None:
    """Say how many steps made no update, because a filter left nothing of them. Raises TrainingError if none did."""
    skipped = [row["train/update_skipped"] for row in stage.folder.read_metrics() if "train/update_skipped" in row]
    if stage.moves.updates == 0:
        raise TrainingError(
            f"Stage {stage.spec.name!r} made no update: in all of its {len(skipped)} steps no response passed what the "
            f"method keeps, and the student is as it was. The responses are in {stage.folder.samples}. Loosen the "
            "filter among the method's options (keep, must_contain), give more attempts with the n of sampling or "
            "teacher_sampling, or take prompts that the writer can solve."
        )
    if any(skipped):
        stage.progress.note(
            f"{stage.spec.name}: {sum(skipped):.0f} of {len(skipped)} steps made no update, because a filter left "
            "nothing of them"
        )


def build(
    recipe: Recipe,
    spec: StageSpec,
    prepared: Prepared,
    given: Given,
    directory: RunDir,
    progress: Progress,
    report: ReportWriter,
    world: World,
) -> Stage:
    """Load the models as they stand and put the stage together."""
    student, externals, judges = loaded(recipe, spec, prepared.method, given, directory, progress, world)
    method = prepared.method.bound(student.tokenizer)
    world.agree(student.trainable().values())
    # Before the student is sharded: a copy of it is whole, in every process.
    teacher = teacher_of(recipe, spec, method.teacher, student, externals, chat=prepared.chat)
    root = Root(student.model)
    world.shard(root, student.blocks())
    samplers = samplers_of(spec, student)
    folder = directory.stage(spec.name)
    exams = exams_of(spec, prepared, student, teacher, externals)
    writers = writers_of(spec, method, student, teacher, externals, samplers)
    rewards = rewards_of(recipe, prepared, judges, folder.path, world)
    moves = Moves(
        optimiser=optim.build(student.trainable(), spec.optimizer, spec.steps),
        student=student,
        root=root,
        teacher=teacher,
        writer=writers.student,
        prompts=[prompt for prompts in prepared.order.prompts for prompt in prompts],
        rewards=rewards,
        context=method.context,
        world=world,
        seed=recipe.seed,
        micro_batch_tokens=spec.micro_batch_tokens,
    )
    return Stage(
        spec=spec,
        seed=recipe.seed,
        world=world,
        method=method,
        student=student,
        root=root,
        teacher=teacher,
        samplers=samplers,
        writers=writers,
        order=prepared.order,
        rewards=rewards,
        moves=moves,
        examiner=examiner_of(exams, spec, student, root, folder, world) if exams else None,
        folder=folder,
        progress=progress,
        report=report,
        seconds_limit=seconds_limit(spec, directory),
    )


def loaded(
    recipe: Recipe,
    spec: StageSpec,
    method: Method,
    given: Given,
    directory: RunDir,
    progress: Progress,
    world: World,
) -> tuple[LanguageModel, dict[str, LanguageModel], dict[str, LanguageModel]]:
    """The student; the teachers, and the models that rewards ask, by name. Raises ConfigError and AlignmentError."""
    with world.main_first():
        student = model_for(recipe, spec, spec.train, given, directory)
        check_student(spec, method, student, progress)
        check_space(directory.path, space_needed(spec, method, student))
        externals = {name: model_for(recipe, spec, name, given, directory) for name in spec.teachers}
        if method.teacher.tokenizer == "students":
            for name, external in externals.items():
                check_same_tokens(student.tokenizer, external.tokenizer, (spec.train, name))
        judges = {name: externals.get(name) or model_for(recipe, spec, name, given, directory) for name in spec.asked}
    return student, externals, judges


def examiner_of(
    exams: list[Exam], spec: StageSpec, student: LanguageModel, root: Root, folder: StageDir, world: World
) -> Examiner:
    """Who measures the student of a stage on its held-out prompts."""
    return Examiner(
        exams=exams,
        student=student,
        world=world,
        root=root,
        folder=folder,
        micro_batch_tokens=spec.micro_batch_tokens,
    )


def check_student(spec: StageSpec, method: Method, student: LanguageModel, progress: Progress) -> None:
    """What only the loaded student can tell. Raises ConfigError."""
    if not student.trainable():
        raise ConfigError(f"Stage {spec.name!r}: model {spec.train!r} has no parameter that requires a gradient.")
    check_fits(max(method.support.k, method.top_k), student.vocabulary)
    if spec.diagnostics.every:
        check_k(spec.diagnostics.k, student.vocabulary)
    if any(p.dtype == torch.bfloat16 for p in student.trainable().values()):
        progress.note(
            f"{spec.name}: {spec.train} trains bfloat16 weights: most small updates round to nothing. Use `dtype: "
            "float32` with `autocast: true`, or LoRA."
        )


def model_for(
    recipe: Recipe, spec: StageSpec, name: str, given: Given, directory: RunDir, device: str | None = None
) -> LanguageModel:
    """A model as it stands when stage `spec` begins: what the last stage that trained it left, else its origin."""
    if name in given.models:
        return given.models[name]
    before = recipe.stages[: [s.name for s in recipe.stages].index(spec.name)]
    trained = [s.name for s in before if s.train == name]
    origin = trained[-1] if trained else recipe.models[name].from_stage
    folder = None if origin is None else directory.stage(origin).model
    described = recipe.models[name].model_copy(update={} if device is None else {"device": device})
    return load_model(described, name=name, folder=folder, seed=recipe.seed)


def finish(recipe: Recipe, stage: Stage, seconds: float, given: Given, directory: RunDir) -> None:
    """The stage's model in Hugging Face format with a card, then the mark that it is done."""
    student = whole_student(recipe, stage, given, directory)
    if student is None:
        return
    target = stage.folder.model
    partial = target.with_name(f".writing-{target.name}")
    if partial.exists():
        shutil.rmtree(partial)
    models.save(student, partial)
    write_card(partial, recipe, stage.spec, stage.folder.read_metrics())
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    stage.folder.mark_done({"seconds": seconds})


def whole_student(recipe: Recipe, stage: Stage, given: Given, directory: RunDir) -> LanguageModel | None:
    """The student for the process that saves it, None for the others.

    A sharded one is loaded again, on the CPU, as it was before the stage, and takes over what was trained.
    """
    world = stage.world
    if world.size == 1:
        return stage.student
    trained: dict[str, torch.Tensor] = {}
    for name, parameter in stage.student.trainable().items():
        values = full(parameter.detach())  # with all others
        if world.main:
            trained[name] = values.cpu()
    if not world.main:
        return None
    student = model_for(recipe, stage.spec, stage.spec.train, given, directory, device="cpu")
    with torch.no_grad():
        for name, parameter in student.trainable().items():
            parameter.copy_(trained[name])
    return student


def seconds_limit(spec: StageSpec, directory: RunDir) -> float:
    if spec.seconds_of is None:
        return math.inf
    done = directory.stage(spec.seconds_of).done()
    assert done is not None, "stages run in order"
    return float(done["seconds"])


def space_needed(spec: StageSpec, method: Method, student: LanguageModel) -> int:
    """Bytes that a stage writes at its peak: checkpoints (weights, two moments, a copy of the weights where the method
    keeps one; one checkpoint more than are kept), the model."""
    trained = checkpoint.size_of(student.trainable())
    return (3 + ("weight_copy" in method.needs())) * trained * (spec.checkpoint.keep + 1) + checkpoint.size_of(
        dict(student.model.named_parameters())
    )
