"""From a teacher's hidden states to its scores of tokens: one pass over the vocabulary, in chunks and tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from opd.maths import kernels
from opd.maths.largest import largest
from opd.models.head import TeacherHead, buffer, chunks, tiles
from opd.pieces.supports import check_fits, support_tokens
from opd.types import ScoreRequest, Scores, Support

# On a CPU a product of four chunks' rows takes 0.7 of the time per row. In the loss two models' chunks lie beside the
# activations of the student; here one chunk lies beside the hidden states alone.
CHUNKS_AT_ONCE = 4


@torch.no_grad()
def teacher_scores(
    head: TeacherHead,
    hidden: Tensor,
    response_ids: Tensor,
    request: ScoreRequest,
    student_top_ids: Tensor | None = None,
) -> Scores:
    """The teacher's scores at `hidden` [N, H] of the tokens `response_ids` [N], of one response or several, detached.

    One pass over chunks computes the sampled token's log-prob, the support, and, if requested, the entropy and the
    `top_k` most likely tokens. For a full support the hidden states are kept instead: H numbers per position, not V.
    The matmul is left to phase B. Here it runs only for `sampled`, `entropy` or `top_k`, otherwise `teacher_logp` is
    NaN.
    """
    support, entropy, top_k = request.support, request.entropy, request.top_k
    assert support.kind != "none", "a method without a support has no teacher"
    check_fits(max(support.k, top_k), head.vocabulary)
    kept = hidden.detach() if support.kind == "full" else None
    if kept is not None and not (request.sampled or entropy or top_k or request.rank):
        return Scores(teacher_logp=torch.full(response_ids.shape, torch.nan, device=hidden.device), teacher_hidden=kept)
    parts: list[Scores] = []
    times = CHUNKS_AT_ONCE if hidden.device.type == "cpu" else 1
    memory = buffer(len(response_ids), head.vocabulary, hidden.device, times)
    for rows in chunks(len(response_ids), head.vocabulary, hidden.device, times):
        logits = head.project_into(memory, hidden[rows], request.temperature)
        for tile in tiles(logits):
            at = slice(rows.start + tile.start, rows.start + tile.stop)
            student_top = None if student_top_ids is None else student_top_ids[at, : support.k]
            head.finish_(logits[tile], request.temperature)
            scores = _scored(logits[tile], response_ids[at, None], support, student_top, entropy, top_k)
            rank = rank_of(logits[tile], response_ids[at, None]) if request.rank else None
            parts.append(replace(scores, teacher_rank=rank))
    return replace(_joined(parts), teacher_hidden=kept)


def _scored(
    logits: Tensor, ids: Tensor, support: Support, student_top: Tensor | None, entropy: bool, top_k: int
) -> Scores:
    """The scores of one tile: logits [n, V] after temperature, sampled ids [n, 1]."""
    log_z = kernels.on(logits.device).log_normaliser(logits)
    spread = None
    if entropy:
        spread = torch.special.entr((logits - log_z).exp()).sum(-1)
    logp = (logits.gather(-1, ids) - log_z)[:, 0]
    of_support = support.k if support.kind == "top_k" and support.by != "student" else 0
    scores = Scores(teacher_logp=logp, teacher_entropy=spread)
    teacher_top = None
    if listed := max(of_support, top_k):
        values, top = largest(logits, listed)
        teacher_top = top[:, :of_support] if of_support else None
        if top_k:
            scores = replace(scores, teacher_top_ids=top[:, :top_k], teacher_top_logp=values[:, :top_k] - log_z)
    if support.kind != "top_k":
        return scores
    chosen, exists = support_tokens(support, student_top=student_top, teacher_top=teacher_top, sampled=ids)
    return replace(
        scores,
        support_ids=chosen,
        support_mask=exists,
        teacher_support_logp=logits.gather(-1, chosen) - log_z,
    )


def rank_of(logits: Tensor, ids: Tensor) -> Tensor:
    """The places [n] of the tokens `ids` [n, 1] in falling order of `logits` [n, V]; of equal ones by rising id."""
    own = logits.gather(-1, ids)
    before = torch.arange(logits.shape[1], device=logits.device) < ids
    return ((logits > own) | ((logits == own) & before)).sum(-1)


def parted(scores: Scores, lengths: Sequence[int]) -> list[Scores]:
    """Scores of consecutive responses of these lengths, by response; `teacher_scores` made them."""
    columns = {
        field.name: value.split(list(lengths))
        for field in fields(scores)
        if isinstance(value := getattr(scores, field.name), Tensor)
    }
    return [replace(scores, **{name: column[i] for name, column in columns.items()}) for i in range(len(lengths))]


def _joined(parts: list[Scores]) -> Scores:
    """Scores of consecutive positions, concatenated."""

    def joined(name: str) -> Tensor | None:
        values = [value for part in parts if (value := getattr(part, name)) is not None]
        return torch.cat(values) if values else None

    logp = joined("teacher_logp")
    assert logp is not None
    return Scores(
        teacher_logp=logp,
        support_ids=joined("support_ids"),
        support_mask=joined("support_mask"),
        teacher_support_logp=joined("teacher_support_logp"),
        teacher_entropy=joined("teacher_entropy"),
        teacher_top_ids=joined("teacher_top_ids"),
        teacher_top_logp=joined("teacher_top_logp"),
        teacher_rank=joined("teacher_rank"),
    )
