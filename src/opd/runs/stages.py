"""Run the stages of a recipe in order. Finished stages are skipped."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

from opd.errors import TrainingError
from opd.evaluation.learned import warnings_of
from opd.models.language_model import LanguageModel
from opd.models.templates import clock_at
from opd.parallel import ALONE, World
from opd.recipe.schema import Recipe
from opd.runs.build import Session, build
from opd.runs.checks import check_stages
from opd.runs.export import finish, finished_student, rehearse
from opd.runs.inputs import inputs_of
from opd.runs.page import write_page
from opd.runs.prepare import Given, Prepared
from opd.runs.result import Run
from opd.stage.folder import RunDir
from opd.stage.interrupt import Interrupt, Stopped, stopped_after
from opd.stage.progress import Progress
from opd.stage.stage import Stage
from opd.stage.trackers import ReportWriter
from opd.train import train


def run_recipe(
    recipe: Recipe,
    given: Given | None = None,
    progress: Progress | None = None,
    world: World = ALONE,
    *,
    accept_changes: bool = False,
) -> Run:
    """Run all stages, or continue where an earlier run stopped. Raises the errors of `opd.errors`.

    Every process of `world` calls this; the main process writes and shows progress. `accept_changes`: go on although
    the recipe, the rows, a model or the user's code has changed since the last start (`opd.stage.changes`).
    """
    given = given or Given()
    shown = progress if progress and world.main else Progress(quiet=not world.main)
    with world.main_first():
        checked = check_stages(recipe, given, processes=world.size)
        directory = RunDir(recipe.folder, False)
        if world.main:
            inputs = inputs_of(recipe, checked.prepared, given)
            directory = RunDir.open(recipe.folder, recipe, inputs, accept=accept_changes, say=shown.note)
    trackers = ReportWriter(
        recipe.report_to if world.main else (),
        folder=directory.path,
        name=recipe.name,
        config=recipe.model_dump(mode="json"),
        samples=recipe.report_to_samples,
    )
    interrupt = Interrupt(speaks=world.main, alone=world.size == 1)
    session = Session(
        recipe=recipe,
        given=given,
        directory=directory,
        progress=shown,
        trackers=trackers,
        world=world,
        interrupt=interrupt,
    )
    with closing(directory), interrupt, closing(trackers), shown, clock_at(directory.started):
        for line in (*directory.notes, *checked.notes):
            shown.note(line)
        student = run_stages(session, checked.prepared)
    if student is None:
        student = finished_student(recipe, given, directory)
    run = Run(directory.path, recipe, (student.model, student.tokenizer))
    _ = run.metrics  # read now and kept: the folder may be a temporary one
    return run


def run_stages(session: Session, prepared: Mapping[str, Prepared]) -> LanguageModel | None:
    """Run the stages that are not done; the last one's student, if this process has trained all of it."""
    recipe, progress, student = session.recipe, session.progress, None
    for spec in recipe.stages:
        if session.directory.stage(spec.name).done() is not None:
            progress.note(f"{spec.name}: already done")
            continue
        progress.stage(spec.name, spec.steps)
        folder = session.directory.stage(spec.name)
        progress.record(folder.progress if folder.writes else None, spec.steps)
        for name, task in (item for one in reversed(prepared[spec.name].views) for item in one.tasks.items()):
            for line in task.notes:
                progress.note(f"{spec.name}: {line}" if name is None else f"{spec.name}, task {name}: {line}")
        with session.servers:  # those that the stage starts end with it
            stage = build(session, spec, prepared[spec.name])
            # A sharded one is not whole, and of several models the saved one is another, their mean.
            student = stage.student if session.world.size == 1 and not stage.peers else None
            before = rehearse(recipe, stage, session.given, session.directory)
            try:
                outcome = train(stage)
            except Stopped:
                raise
            except Exception:
                stage.rescue()
                raise
            check_learned(stage)
            progress.phase(f"{spec.name}: saving the model")
            finish(recipe, stage, outcome.seconds, session.given, session.directory, before)
            progress.phase(f"{spec.name}: finished")
            progress.record(None)
            session.world.wait()
        write_page(session)
        if outcome.stop and spec is not recipe.stages[-1]:
            raise stopped_after(spec.name, spec.steps, spec.steps, outcome.stop)
    return student


def check_learned(stage: Stage) -> None:
    """Report why the stage may have learned nothing. Raises TrainingError if no step made an update."""
    for peer in stage.peers:
        check_learned(peer)
    metrics = stage.folder.read_metrics()
    if stage.optimisation.updates == 0:
        steps = sum("train/update_skipped" in row for row in metrics)
        raise TrainingError(
            f"Stage {stage.spec.name!r} made no update: in all of its {steps} steps no response passed the "
            f"method's filter, and the student is unchanged. The responses are in {stage.folder.samples}. Loosen the "
            "filter among the method's options (keep, must_contain), raise the n of sampling or teacher_sampling for "
            "more attempts, or use prompts that the writer can solve."
        )
    for line in warnings_of(metrics):
        stage.progress.note(f"{stage.spec.name}: {line}")
