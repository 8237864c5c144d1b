"""TODO: opd/stage/stage.py"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from opd.data.order import Order
from opd.method import Method
from opd.models.language_model import LanguageModel, Root
from opd.parallel import World
from opd.recipe.schema import StageSpec
from opd.rewards.base import StageRewards
from opd.samplers.hf import TransformersSampler
from opd.stage.exams import Examiner
from opd.stage.folder import StageDir
from opd.stage.optimisation import Moves
from opd.stage.progress import Progress
from opd.stage.trackers import ReportWriter
from opd.teachers.cross_tokenizer import OneTeacher
from opd.teachers.routed import SeveralTeachers
from opd.types import Writers


@dataclass(slots=True, kw_only=True)
class Stage:
    """Everything that a stage needs, built."""

    spec: StageSpec
    seed: int
    world: World
    method: Method
    student: LanguageModel
    root: Root  # of the student: what runs its forward and backward
    teacher: OneTeacher | SeveralTeachers | None
    samplers: Mapping[str | None, TransformersSampler]  # the student as a writer, by task
    writers: Writers
    order: Order  # of the prompts
    reward: StageRewards
    moves: Moves  # the optimiser, and what else an update may touch
    examiner: Examiner | None
    folder: StageDir
    progress: Progress
    report: ReportWriter
    seconds_limit: float = math.inf
