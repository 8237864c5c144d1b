"""Which tokens are scored at each position."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from opd.errors import ConfigError
from opd.types import ChosenBy, Support


def no_support() -> Support:
    """Nothing is asked of a teacher: supervised fine-tuning and reinforcement learning."""
    return Support(kind="none")


def sampled() -> Support:
    """The token that was written, alone."""
    return Support(kind="sampled")


def top_k(
    k: int,
    *,
    by: ChosenBy = "teacher",
    with_sampled: bool = False,
) -> Support:
    """The k most likely tokens of the teacher or the student, or a set made of both; optionally the sampled token too.

    The student's k are those of the weights that wrote the response. Raises ConfigError for k < 1.
    """
    if k < 1:
        raise ConfigError(f"A top-k support needs k of at least 1, got {k}.")
    return Support(kind="top_k", k=k, by=by, with_sampled=with_sampled)


def for_renormalised(support: Support, otherwise: str = "") -> Support:
    """The support, for a renormalised loss. Raises ConfigError if it is of one token: the loss would always be 0."""
    if support.k == 1 and support.by in ("teacher", "student", "intersection") and not support.with_sampled:
        raise ConfigError(
            "Renormalised on one token the loss is 0, whatever the models say: nothing would be learned. "
            f"Set k to 2 or more{otherwise}."
        )
    return support


def full() -> Support:
    """The whole vocabulary: exact. The teacher's hidden states are kept, never its logits."""
    return Support(kind="full")


def units(span: Literal["column", "none", "product"] = "column", *, least_mass: float = 0.0) -> Support:
    """Pieces that student and teacher both cut out of the response, with a tokenizer each; a row for each piece.

    All but "product" compare on the tokens of both vocabularies, at the piece's first position. One that is not one
    token of both is one more entry with the mean log-prob of its tokens ("column", arXiv 2605.07711), or is left out
    ("none": shared-token matching). "product" gives each model's whole vocabulary, the shared tokens first, times the
    probability of the piece's tokens behind the first, as TRL's GOLD merges them; then K differs between the two.

    The teacher has to be `teachers.external(tokenizer="any")`. A row on whose entries it has less than `least_mass` in
    all is empty (the released code of 2605.07711: 0.5). Raises ConfigError for a mass outside 0..1, and for products.
    """
    if not 0.0 <= least_mass <= 1.0 or (least_mass and span == "product"):
        raise ConfigError(
            f"The least mass of a row is a probability between 0 and 1, got {least_mass} with span {span!r}; a product "
            "has all of both vocabularies, and none."
        )
    return Support(kind="units", span=span, least_mass=least_mass)


def check_fits(k: int, vocabulary: int) -> None:
    """Raise ConfigError for a top-k, of the support or of another piece, of more tokens than there are."""
    if k > vocabulary:
        raise ConfigError(
            f"The method's support has k = {k}, and the vocabulary has only {vocabulary} tokens. Lower k, or use "
            "a method on the full vocabulary."
        )


def support_tokens(
    support: Support, *, student_top: Tensor | None, teacher_top: Tensor | None, sampled: Tensor
) -> tuple[Tensor, Tensor]:
    """The token ids [n, K'] of a top-k support, and which of them exist [n, K'] bool.

    `student_top` and `teacher_top` [n, k] are ids in falling order of probability, `sampled` [n, 1]. Every token that
    exists is listed once.
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
