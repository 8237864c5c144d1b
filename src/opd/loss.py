"""Pack -> signal -> weight -> sum / count: the only reduction in the library."""

from __future__ import annotations

import torch
from torch import Tensor

from opd.collate import MicroBatch
from opd.method import Method
from opd.metrics import Metrics
from opd.models import LanguageModel
from opd.score import Head, chunked_loss, log_probs
from opd.types import Tokens


def loss_of(
    method: Method, student: LanguageModel, micro: MicroBatch, count: float, teacher_head: Head | None = None
) -> tuple[Tensor, Metrics]:
    """This micro-batch's part of the step's loss, (1 / count) sum_i share_i weight_i signal_i, and its metrics.

    `count` is the step's one denominator, over all micro-batches and ranks, so that parts add up to the same gradient
    however the step is split. The scalar is finished chunk by chunk; `backward()` only hands its gradient on.
    """
    hidden = student.hidden(micro.input_ids)[micro.row, micro.position]  # [N, H]
    metrics = Metrics()

    def chunk_loss(hidden_nH: Tensor, head: Head, rows: slice) -> Tensor:
        tokens = tokens_of(method, hidden_nH, head, micro, rows, teacher_head)
        per_token = method.signal(tokens)
        _observe(metrics, tokens, per_token)
        return (per_token * tokens.weight * micro.share[rows]).sum() / count

    return chunked_loss(chunk_loss, hidden, student.head()), metrics


def tokens_of(
    method: Method, hidden_nH: Tensor, head: Head, micro: MicroBatch, rows: slice, teacher_head: Head | None = None
) -> Tokens:
    """Project one chunk: the student's log-probs, with gradient, on the sampled tokens and the method's support."""
    log_p = log_probs(head, hidden_nH, method.temperature)  # [n, V]
    student_support = teacher_support = support_mask = None
    if method.support.kind == "full":
        assert teacher_head is not None
        assert micro.teacher_hidden is not None
        student_support = log_p
        with torch.no_grad():
            teacher_support = log_probs(teacher_head, micro.teacher_hidden[rows], method.temperature)
    elif method.support.kind == "top_k":
        assert micro.support_ids is not None
        assert micro.support_mask is not None
        assert micro.teacher_support_logp is not None
        student_support = log_p.gather(-1, micro.support_ids[rows])
        teacher_support, support_mask = micro.teacher_support_logp[rows], micro.support_mask[rows]
    return Tokens(
        student_logp=log_p.gather(-1, micro.token_ids[rows, None])[:, 0],
        sampler_logp=micro.sampler_logp[rows],
        teacher_logp=micro.teacher_logp[rows],
        advantage=micro.advantage[rows],
        weight=micro.weight[rows],
        student_support_logp=student_support,
        teacher_support_logp=teacher_support,
        support_mask=support_mask,
    )


@torch.no_grad()
def _observe(metrics: Metrics, tokens: Tokens, per_token: Tensor) -> None:
    n = len(per_token)
    metrics.mean("train/signal", per_token.detach().sum().item(), n)
    metrics.mean("train/student_nll", -tokens.student_logp.detach().sum().item(), n)
    if tokens.teacher_support_logp is None or tokens.student_support_logp is None or tokens.support_mask is None:
        return
    student, teacher = tokens.student_support_logp.detach(), tokens.teacher_support_logp
    exists = tokens.support_mask
    metrics.mean("support/student_mass", student.exp().masked_fill(~exists, 0.0).sum().item(), n)
    metrics.mean("support/teacher_mass", teacher.exp().masked_fill(~exists, 0.0).sum().item(), n)
    metrics.mean("support/empty_share", float((~exists.any(-1)).sum()), n)
