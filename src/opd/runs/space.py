"""The disk space that a stage needs besides what it has written already."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from opd.errors import RunError
from opd.files import GIB
from opd.method import Method
from opd.models.language_model import LanguageModel
from opd.pieces.needs import Input
from opd.recipe.schema import StageSpec
from opd.stage import checkpoint
from opd.stage.folder import StageDir


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What a stage writes, in bytes, and the checkpoints that it keeps and has."""

    checkpoint: int
    model: int
    keep: int
    there: int  # complete checkpoints on the disk

    @property
    def needed(self) -> int:
        """The most bytes that the stage will have on disk beside those of the checkpoints that are there.

        While a checkpoint is written, the older ones are still there: one more than `keep`, or than there are if these
        are more. The model is written beside `keep` checkpoints.
        """
        saving = (max(self.keep, self.there) + 1) * self.checkpoint
        ending = self.keep * self.checkpoint + self.model
        return max(saving, ending) - self.there * self.checkpoint


def space_of(spec: StageSpec, method: Method, student: LanguageModel, folder: StageDir) -> Space:
    """A checkpoint has the weights, two moments, a copy of the weights if the method keeps one, and the float32 average
    of an EMA teacher.
    """
    copies = 3 + (Input.WEIGHT_COPY in method.needs) + (method.teacher.kind == "self_ema")
    return Space(
        checkpoint=copies * checkpoint.size_of(student.trainable()),
        model=checkpoint.size_of(dict(student.model.named_parameters())),
        keep=spec.checkpoint.keep,
        there=sum(1 for one in folder.checkpoints.glob("step_*") if (one / "state.json").is_file()),
    )


def check_space(space: Space, folder: StageDir) -> None:
    """Raise RunError when the disk of the stage's folder has less room than the stage needs."""
    run = folder.path.parent
    there = next(place for place in (run.absolute(), *run.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free >= space.needed:
        return
    what = (
        f"{run} has {free / GIB:.2f} GiB free, and this run needs about {space.needed / GIB:.2f} GiB{{}} for its "
        f"checkpoints and model (a checkpoint has {space.checkpoint / GIB:.2f} GiB, the model {space.model / GIB:.2f})."
    )
    if space.there:
        raise RunError(
            f"{what.format(f' more than its {space.there} checkpoints that are there')} Free space there, or move the "
            "folder to another disk and leave a symbolic link to it; then start the same command again."
        )
    raise RunError(
        f"{what.format('')} Free space there, use an output_dir=... on another disk, or keep fewer checkpoints "
        f"(checkpoint.keep is {space.keep})."
    )
