"""The smallest pair that a study can train."""

from __future__ import annotations

from opd_studies.lab.lab import PairSize

TINY = PairSize(
    teacher={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    student={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1},
    teacher_steps=2,
    student_steps=2,
    prompts_per_step=4,
)
