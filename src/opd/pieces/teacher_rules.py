"""Teacher rules: the model that the student is compared with."""

from __future__ import annotations

from typing import Literal

from opd.errors import ConfigError
from opd.types import Mixture, TeacherRule


def no_teacher() -> TeacherRule:
    """No teacher: supervised fine-tuning, reinforcement learning."""
    return TeacherRule(kind="none")


def external(tokenizer: Literal["students", "any"] = "students") -> TeacherRule:
    """The stage's `teacher` in the recipe.

    It has the student's tokenizer, or with "any" another one: then the teacher reads the response's text in its own
    tokens, and the support is `supports.units`.
    """
    return TeacherRule(kind="external", tokenizer=tokenizer)


def several(mixture: Mixture) -> TeacherRule:
    """The stage's `teacher`, of which the recipe may name several: `teacher: one+other`. All score every row.

    The student is compared with their normalised `geometric` or `arithmetic` mean, or with `each`. The weights are
    those of the context (`Prompt.teacher_weights`), else equal. Over probabilities q_k with weights w_k of sum 1:

        sum_k w_k KL(p||q_k) = KL(p||g) - log Z       g = prod_k q_k^w_k / Z      geometric: one reverse KL
        sum_k w_k KL(q_k||p) = KL(m||p) + constant    m = sum_k w_k q_k           arithmetic: one forward KL

    Z and the constant do not depend on the student, so the gradients are equal. No mean does this for the JSD.
    """
    return TeacherRule(kind="external", mixture=mixture)


def peer() -> TeacherRule:
    """Other models that the stage trains, as they are before the step. A row without one has no teacher's scores."""
    return TeacherRule(kind="peer")


def self_frozen() -> TeacherRule:
    """The student at the start of the stage. With a new adapter, which adds nothing yet: the base model without it."""
    return TeacherRule(kind="self_frozen")


def self_live() -> TeacherRule:
    """The current student, without gradient."""
    return TeacherRule(kind="self_live", decay=0.0)


def self_ema(decay: float) -> TeacherRule:
    """A moving average of the student: after each step, teacher <- decay teacher + (1 - decay) student.

    arXiv 2605.11182 App. A.3. Raises ConfigError unless 0 <= decay <= 1.
    """
    if not 0.0 <= decay <= 1.0:
        raise ConfigError(f"The decay of an EMA teacher lies between 0 (live) and 1 (frozen), got {decay}.")
    return TeacherRule(kind="self_ema", decay=decay)


def self_taught(which: Literal["frozen", "live", "ema"], decay: float) -> TeacherRule:
    """One of the three rules of a student that teaches itself, by name; `decay` is for "ema".

    Raises ConfigError as `self_ema`.
    """
    return {"frozen": self_frozen, "live": self_live, "ema": lambda: self_ema(decay)}[which]()
