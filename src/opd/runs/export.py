"""Export of a trained model: tried before the training, written and compared with the trained model after it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from opd.errors import OPDError, RunError
from opd.files import refused
from opd.models import saving, verifying
from opd.models.language_model import LanguageModel
from opd.models.loading import load_model
from opd.models.mean import mean_of
from opd.models.pictures import cut_before_picture
from opd.models.render import render
from opd.recipe.schema import Recipe, section_of
from opd.runs.build import model_for
from opd.runs.card import write_card
from opd.runs.prepare import Given
from opd.runs.saves import Saves, saves_of
from opd.stage.folder import RunDir
from opd.stage.stage import Stage

TOKENS = 8  # of a prompt, and as many from the whole vocabulary, on which the saved model is compared

NOTED = 0.1  # the share of the training's effect that a rounding undoes, above which a line says so


def rehearse(recipe: Recipe, stage: Stage, given: Given, directory: RunDir) -> torch.Tensor | None:
    """Write and remove every file of the export but the weights, before a training whose end they would spoil.

    Returns the student's log-probs before the training, on the tokens of the comparison; None for a sharded student.

    Raises ConfigError for a model that cannot be saved, RunError for a place that cannot be written to.
    """
    if not stage.world.main:
        return None
    saves = saves_of(recipe, stage.spec, given.models, directory)

    def write(folder: Path) -> None:
        folder.mkdir()
        saving.try_to_describe(stage.student, folder, base=saves.base)
        write_card(folder, recipe, stage.spec, [], origin=saves.origin)

    for target in _targets(stage, saves):
        if target.exists() and not (target.is_dir() and os.access(target, os.W_OK | os.X_OK)):
            raise RunError(
                f"{target} is where the trained model will be saved, and it is not a folder that can be replaced. Move "
                "it, or use another output_dir=..."
            )
        shutil.rmtree(_written(target, write))
    if stage.world.size > 1:
        return None
    return verifying.log_probs(stage.student, _probe(stage, stage.student))


def finish(
    recipe: Recipe, stage: Stage, seconds: float, given: Given, directory: RunDir, before: torch.Tensor | None = None
) -> None:
    """Write the stage's model with a card, compare it with the trained one, then mark the stage as done.

    `before`: from `rehearse`, to report how much of the training a rounding in the file undoes.

    Raises TrainingError if the saved model is another one than the trained.
    """
    students = [whole_student(recipe, one, given, directory) for one in stage.models]  # each is collective
    whole = [student for student in students if student is not None]
    if not whole:
        return
    student = mean_of(whole) if stage.peers else whole[0]
    saves = saves_of(recipe, stage.spec, given.models, directory)
    metrics = stage.folder.read_metrics()
    summary = {"seconds": seconds}

    def merged(folder: Path) -> None:
        saving.save(student, folder, saves.dtype)
        write_card(folder, recipe, stage.spec, metrics, origin=saves.origin)
        summary["saved_kl"] = verifying.check_saved(student, folder, _probe(stage, student))

    def adapter(folder: Path) -> None:
        assert saves.base is not None
        saving.save_adapter(student, folder, saves.base)
        write_card(folder, recipe, stage.spec, metrics, "adapter", saves.origin)
        verifying.check_saved_adapter(student, folder)

    for target in _targets(stage, saves):
        partial = _written(target, merged if target == stage.folder.model else adapter)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    if saves.merged and before is not None and not stage.peers:
        _note_rounding(stage, student, saves, before, summary["saved_kl"])
    stage.folder.mark_done(summary)


def _note_rounding(stage: Stage, student: LanguageModel, saves: Saves, before: torch.Tensor, lost: float) -> None:
    """Report a file whose dtype is coarser than the trained weights', if that undoes much of the training."""
    in_file = saves.dtype or student.causal_lm.dtype
    if all(parameter.dtype == in_file for parameter in student.trainable().values()):
        return
    moved = verifying.divergence(verifying.log_probs(student, _probe(stage, student)), before)
    if lost > NOTED * moved:
        stage.progress.note(
            f"{stage.spec.name}: the saved model is rounded to {str(in_file).removeprefix('torch.')} and differs from "
            f"the trained one by {lost:.2g} nats per token; the training moved the model by {moved:.2g}. "
            "`save_dtype: float32` keeps small updates."
        )


def _targets(stage: Stage, saves: Saves) -> list[Path]:
    return [stage.folder.model] * saves.merged + [stage.folder.adapter] * saves.adapter


def _written(target: Path, write: Callable[[Path], None]) -> Path:
    """A hidden folder beside `target` that `write` filled. It stays after an error: it may have the only weights.

    Raises RunError if it cannot be written.
    """
    partial = target.with_name(f".writing-{target.name}")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        write(partial)
    except OPDError:
        raise
    except (OSError, SafetensorError) as error:
        raise refused(partial, error if isinstance(error, OSError) else OSError(str(error))) from error
    return partial


def _probe(stage: Stage, student: LanguageModel) -> list[int]:
    """The end of the stage's first prompt, with whole pictures, then tokens from the whole vocabulary."""
    prompt = stage.order.prompts[0][0]
    ids = render(prompt, student.tokenizer, student.template_options)
    more = (i * student.vocabulary // TOKENS for i in range(TOKENS))
    start = cut_before_picture(ids, max(0, len(ids) - TOKENS))
    return [*ids[start:], *(i for i in more if i not in student.unwritten)]


def finished_student(recipe: Recipe, given: Given, directory: RunDir) -> LanguageModel:
    """The last stage's model, loaded from the finished run: merged, or its base model with the adapter.

    Raises RunError if the folder has neither.
    """
    spec = recipe.stages[-1]
    folder = directory.stage(spec.name)
    if folder.model.exists():
        return load_model(section_of(recipe, spec.train), name=spec.train, folder=folder.model)
    if not folder.adapter.exists():
        wanted = {"merged": "model/", "adapter": "adapter/"}.get(spec.save, "model/ and adapter/")
        raise RunError(
            f"{folder.path}: the stage has finished, and {wanted} is not there any more. Copy it from where the run "
            "was trained, or remove done.json and start the run again: it saves the model of its last checkpoint."
        )
    student = model_for(recipe, spec, spec.train, given, directory)
    saving.load_adapter(student, folder.adapter)
    return student


def whole_student(recipe: Recipe, stage: Stage, given: Given, directory: RunDir) -> LanguageModel | None:
    """The student in the process that saves it, None in the others. A sharded one is a copy on the CPU."""
    spec = stage.spec
    return saving.whole(
        stage.student, stage.world, lambda: model_for(recipe, spec, spec.train, given, directory, device="cpu")
    )
