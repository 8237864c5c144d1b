"""What a stage needs before its first step."""

from __future__ import annotations

from support.models import tiny
from support.runs import one_stage

from opd import methods
from opd.recipe.load import parse_recipe
from opd.runs.build import space_needed
from opd.stage import checkpoint


def test_space_needed_counts_average_of_ema_teacher():
    spec = parse_recipe(one_stage()).stages[0]
    student = tiny()
    weights = checkpoint.size_of(student.trainable())
    checkpoints = spec.checkpoint.keep + 1
    model = checkpoint.size_of(dict(student.model.named_parameters()))

    def needed(teacher: str) -> int:
        options = {"teacher": teacher, "template": "{privileged_context}{prompt}"}
        return space_needed(spec, methods.build("context_distillation", options), student)

    assert needed("frozen") == 3 * weights * checkpoints + model
    assert needed("ema") == 4 * weights * checkpoints + model
