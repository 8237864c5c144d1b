"""Whose distribution the student is compared with: the rules that a method names."""

from __future__ import annotations

from typing import Literal

from opd.errors import ConfigError
from opd.types import TeacherRule


def no_teacher() -> TeacherRule:
    """No teacher: supervised fine-tuning, reinforcement learning."""
    return TeacherRule(kind="none")


def external(tokenizer: Literal["students", "any"] = "students") -> TeacherRule:
    """The model that the recipe's stage calls `teacher`.

    Its tokenizer is the student's, or "any": then it reads the text of a response in tokens of its own, and the support
    is `supports.units`.
    """
    return TeacherRule(kind="external", tokenizer=tokenizer)


def self_frozen() -> TeacherRule:
    """The student as it stood when the stage began. With LoRA that is the base model with the adapter off."""
    return TeacherRule(kind="self_frozen")


def self_live() -> TeacherRule:
    """The student as it stands, without gradient."""
    return TeacherRule(kind="self_live", decay=0.0)


def self_ema(decay: float) -> TeacherRule:
    """A moving average of the student: after every step, teacher <- decay teacher + (1 - decay) student.

    arXiv 2605.11182 App. A.3. Raises ConfigError unless 0 <= decay <= 1.
    """
    if not 0.0 <= decay <= 1.0:
        raise ConfigError(f"The decay of an EMA teacher lies between 0 (live) and 1 (frozen), got {decay}.")
    return TeacherRule(kind="self_ema", decay=decay)
