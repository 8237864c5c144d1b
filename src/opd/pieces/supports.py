"""Supports: the tokens that are scored at each position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from opd.errors import ConfigError
from opd.plugins import torch
from opd.types import ChosenBy, Support

if TYPE_CHECKING:
    from torch import Tensor


def no_support() -> Support:
    """No token: the teacher scores nothing. For supervised fine-tuning and reinforcement learning."""
    return Support(kind="none")


def sampled() -> Support:
    """The sampled token only."""
    return Support(kind="sampled")


def top_k(
    k: int,
    *,
    by: ChosenBy = "teacher",
    with_sampled: bool = False,
) -> Support:
    """The k most likely tokens of the teacher or the student, or a set built from both; optionally the sampled token.

    The student's k are from the weights that wrote the response. Raises ConfigError for k < 1.
    """
    if k < 1:
        raise ConfigError(f"A top-k support needs k of at least 1, got {k}.")
    return Support(kind="top_k", k=k, by=by, with_sampled=with_sampled)


def for_renormalised(support: Support, otherwise: str = "") -> Support:
    """The support, for a renormalised loss. Raises ConfigError for one token, where the loss is always 0."""
    if support.k == 1 and support.by in ("teacher", "student", "intersection") and not support.with_sampled:
        raise ConfigError(
            "Renormalised on one token, the loss is always 0: the student would learn nothing. "
            f"Set k to 2 or more{otherwise}."
        )
    return support


def full() -> Support:
    """The whole vocabulary: exact. The teacher's hidden states are kept, not its logits."""
    return Support(kind="full")


def units(span: Literal["column", "none", "product"] = "column", *, least_mass: float = 0.0) -> Support:
    """Units: the smallest pieces of text that end at a token end of both tokenizers. One row per unit.

    "column" and "none" compare the tokens of both vocabularies at the unit's first position. A unit that is not one
    token of both adds an entry with the mean log-prob of its tokens ("column", arXiv 2605.07711), or is left out
    ("none": shared-token matching). "product" takes each model's whole vocabulary, shared tokens first, times the
    probability of the unit's tokens after the first, as TRL's GOLD merges them; K then differs between the models.

    The teacher must be `teacher_rules.external(tokenizer="any")`. A row in which the teacher's mass is below
    `least_mass` is empty (the released code of 2605.07711: 0.5). Raises ConfigError for a mass outside [0, 1], and for
    a mass with "product".
    """
    if not 0.0 <= least_mass <= 1.0 or (least_mass and span == "product"):
        raise ConfigError(
            f"`least_mass` is a probability between 0 and 1, got {least_mass} with span {span!r}; span 'product' has "
            "the whole vocabularies and takes no least mass."
        )
    return Support(kind="units", span=span, least_mass=least_mass)


def check_fits(k: int, vocabulary: int) -> None:
    """Raise ConfigError for a top-k, of the support or of another piece, larger than the vocabulary."""
    if k > vocabulary:
        raise ConfigError(
            f"The method's support has k = {k}, but the vocabulary has only {vocabulary} tokens. Lower k, or use "
            "a method on the full vocabulary."
        )


def support_tokens(
    support: Support, *, student_top: Tensor | None, teacher_top: Tensor | None, sampled: Tensor
) -> tuple[Tensor, Tensor]:
    """The token ids [n, K'] of a top-k support, and a mask [n, K'] of the existing entries.

    `student_top` and `teacher_top` [n, k] are ids in falling order of probability, `sampled` [n, 1]. Each existing
    token is listed once.
    """
    if support.by == "teacher":
        assert teacher_top is not None
        ids, exists = teacher_top, torch.ones_like(teacher_top, dtype=torch.bool)
    elif support.by == "student":
        assert student_top is not None
        ids, exists = student_top, torch.ones_like(student_top, dtype=torch.bool)
    else:
        assert student_top is not None
        assert teacher_top is not None
        same = student_top[:, :, None] == teacher_top[:, None, :]  # [n, k, k]
        in_teacher, in_student = same.any(2), same.any(1)
        if support.by == "intersection":
            ids, exists = student_top, in_teacher
        else:
            ids = torch.cat([student_top, teacher_top], 1)
            first = torch.ones_like(in_teacher) if support.by == "union" else ~in_teacher
            exists = torch.cat([first, ~in_student], 1)
    if support.with_sampled:
        listed = ((ids == sampled) & exists).any(1, keepdim=True)
        ids, exists = torch.cat([ids, sampled], 1), torch.cat([exists, ~listed], 1)
    return ids, exists
