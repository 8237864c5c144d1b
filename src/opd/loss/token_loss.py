"""Pack -> signal -> weight -> sum / count: the only reduction in the library.

Per tile: the student's log-probs on the scored tokens are autograd leaves, autograd differentiates the method's signal
with respect to them, and the softmax before them is differentiated by hand:

    d/dz_j = g_j - p_j sum_v g_v        with g = d loss / d log p, zero off the scored tokens

So one path serves every signal, and a signal stays a pure function. A signal with a closed-form gradient
(`closed_forms.CLOSED`) uses that. A signal that does not depend on the softmax's normaliser (`signals.divergence` of
the renormalised form) reads only the scored tokens, not the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from opd.loss.collate import MicroBatch
from opd.loss.fused import ChunkLoss, fused_loss
from opd.loss.unit_loss import on_units, unit_chunks
from opd.maths import kernels
from opd.maths.by_place import add_by_place
from opd.maths.closed_forms import closed_form
from opd.maths.metrics import Metrics
from opd.method import Method
from opd.models.forward import response_states
from opd.models.head import Head, TeacherHead, buffer, into_probabilities, log_normaliser, tiles
from opd.models.language_model import LanguageModel
from opd.models.mixed_head import MixedHead
from opd.pieces.signals import MeasuredPiece, divergence_of, shift_invariant
from opd.types import Tokens


def loss_of(
    method: Method, student: LanguageModel, micro: MicroBatch, count: float, teacher_head: TeacherHead | None = None
) -> tuple[Tensor, Metrics]:
    """This micro-batch's part of the step's loss, (1 / count) sum_i share_i weight_i signal_i, and its metrics.

    `count` is the step's one denominator, over all micro-batches and ranks, so that the sum of the parts does not
    depend on the split. `backward()` on the scalar only passes on the gradient that the forward computed.
    """
    return loss_at(method, hidden_of(student, micro), student.head(), micro, count, teacher_head)


def hidden_of(lm: LanguageModel, micro: MicroBatch) -> Tensor:
    """The states [N, H] that predict a micro-batch's trained tokens; only these reach the output layer."""
    return response_states(lm, *micro.sequences).at(micro.row, micro.step)


def loss_at(
    method: Method, hidden: Tensor, head: Head, micro: MicroBatch, count: float, teacher_head: TeacherHead | None = None
) -> tuple[Tensor, Metrics]:
    """`loss_of` from the hidden states [N, H] that predict the micro-batch's tokens."""
    observed = _Observed()
    weight = micro.weight * micro.share / count  # [N]
    support = method.support
    ids = parts = None
    if support.kind == "units":
        assert isinstance(teacher_head, Head)
        chunk_loss = on_units(method, micro, weight, teacher_head, observed.add)
        parts = unit_chunks(micro, head, teacher_head)
    elif support.kind == "full":
        assert teacher_head is not None
        on_full = _on_full if not in_turn(teacher_head) else _on_each
        chunk_loss = on_full(method, micro, weight, teacher_head, observed)
    elif support.kind == "top_k" and shift_invariant(method.signal):
        ids = _scored_ids(micro, slice(None))
        chunk_loss = _on_rows(method, micro, weight, observed)
    else:
        chunk_loss = _on_selected(method, micro, weight, observed)
    loss = fused_loss(chunk_loss, hidden, head, method.temperature, ids, parts)
    metrics = observed.metrics(len(hidden))
    if support.kind == "full" and micro.log_ratio is not None:
        add_by_place(metrics, "teacher/log_ratio", micro.log_ratio, micro.step)
    return loss, metrics


def _on_full(
    method: Method, micro: MicroBatch, weight: Tensor, teacher_head: TeacherHead, observed: _Observed
) -> ChunkLoss:
    """The loss on the whole vocabulary: both models' log-probs of all tokens."""
    memory = buffer(len(weight), teacher_head.vocabulary, weight.device)
    differ = _full_difference(method, micro, weight, observed)

    def chunk_loss(logits: Tensor, rows: slice) -> Tensor:
        """[n, V] logits of the student at `rows`: their part of the loss, and its gradient in their place."""
        assert micro.teacher_hidden is not None
        teacher_logits = teacher_head.project_into(memory, micro.teacher_hidden[rows], method.temperature)
        teacher_head.finish_(teacher_logits, method.temperature)
        return differ(logits, teacher_logits, rows, None)

    return chunk_loss


def _on_each(
    method: Method, micro: MicroBatch, weight: Tensor, teacher_head: TeacherHead, observed: _Observed
) -> ChunkLoss:
    """The loss on the whole vocabulary with several teachers in turn, weighed by row: sum_k w_k D(q_k, p).

    Beside the memory of one teacher's loss, two more chunks of logits: a copy of the student's, and the sum.
    """
    assert isinstance(teacher_head, MixedHead)
    memory, copy, total = (buffer(len(weight), teacher_head.vocabulary, weight.device) for _ in range(3))
    differ = _full_difference(method, micro, weight, observed)

    def chunk_loss(logits: Tensor, rows: slice) -> Tensor:
        assert micro.teacher_hidden is not None
        loss, gradient = torch.zeros((), device=logits.device), total[: len(logits)].zero_()
        for head, hidden, share in teacher_head.passes(micro.teacher_hidden[rows]):
            teacher_logits = head.project_into(memory, hidden)
            head.finish_(teacher_logits, method.temperature)
            own = copy[: len(logits)].copy_(logits)
            loss += differ(own, teacher_logits, rows, share)
            gradient += own
        logits.copy_(gradient)
        return loss

    return chunk_loss


def in_turn(teacher_head: TeacherHead) -> bool:
    """Whether the loss compares with several teachers one after the other."""
    return isinstance(teacher_head, MixedHead) and teacher_head.mixture == "each"


def _full_difference(
    method: Method, micro: MicroBatch, weight: Tensor, observed: _Observed
) -> Callable[[Tensor, Tensor, slice, Tensor | None], Tensor]:
    """A function of both models' logits [n, V] at `rows`: the loss, and its gradient in place of the student's.

    With a `share` [n], the teacher's part of each row, loss, gradient and metrics are multiplied by it.
    """
    closed = closed_form(divergence_of(method.signal))

    def differ(logits: Tensor, teacher_logits: Tensor, rows: slice, share: Tensor | None) -> Tensor:
        """The loss of the chunk, a scalar; `logits` becomes its gradient."""
        total = torch.zeros((), device=logits.device)
        for tile in tiles(logits):
            at = slice(rows.start + tile.start, rows.start + tile.stop)
            part = None if share is None else share[tile]
            w, y = _times(weight[at], part), micro.token_ids[at, None]
            student = grad = None
            if closed is not None:
                into_gradient = kernels.on(logits.device).into_gradient
                per_token, student_logp, teacher_logp = into_gradient(logits[tile], teacher_logits[tile], y, w, closed)
            else:
                student = logits[tile].log_softmax(-1)  # [n, V]
                teacher = teacher_logits[tile].log_softmax(-1)
                student_logp, teacher_logp = student.gather(-1, y)[:, 0], teacher.gather(-1, y)[:, 0]
                per_token, grad = _differentiated(method, _full_tokens(micro, at, teacher), student, w, observed)
            total += (per_token * w).sum()
            ratio = teacher_logp - student_logp
            micro.keep(at, per_token, ratio, part)
            observed.add("train/signal", _times(per_token, part))
            observed.add("train/student_nll", _times(-student_logp, part))
            observed.add("teacher/log_ratio", _times(ratio, part))
            if micro.task is not None:
                observed.add(f"task/{micro.task}/log_ratio", _times(ratio, part))
            if student is not None and grad is not None:
                # Last, because the signal's result may be a view of the log-probs that this overwrites. Divide by the
                # sum of p, which is not 1 in float32 (see closed_forms), so that each row of the gradient sums to 0.
                p = student.exp_()
                p.mul_(grad.sum(-1, keepdim=True) / p.sum(-1, keepdim=True))
                torch.sub(grad, p, out=logits[tile])
        return total

    return differ


def _times(values: Tensor, share: Tensor | None) -> Tensor:
    return values if share is None else values * share


def _on_selected(method: Method, micro: MicroBatch, weight: Tensor, observed: _Observed) -> ChunkLoss:
    """The loss on the sampled token and the top-k support, if any; other tokens enter through the normaliser only."""

    def chunk_loss(logits: Tensor, rows: slice) -> Tensor:
        """[n, V] logits of the student at `rows`: their part of the loss, and its gradient in their place."""
        w, ids = weight[rows], _scored_ids(micro, rows)
        log_z = log_normaliser(logits)
        selected = logits.gather(-1, ids) - log_z  # [n, 1 + K]
        per_token, grad = _differentiated(
            method, lambda p: _with_support(_tokens(micro, rows, p[:, 0]), micro, rows, p[:, 1:]), selected, w, observed
        )
        into_probabilities(logits, log_z, -grad.sum(-1, keepdim=True))
        logits.scatter_add_(-1, ids, grad)
        micro.keep(rows, per_token)
        observed.add("train/signal", per_token)
        observed.add("train/student_nll", -selected[:, 0])
        observed.support(micro, rows, selected[:, 1:])
        return (per_token * w).sum()

    return chunk_loss


def _on_rows(method: Method, micro: MicroBatch, weight: Tensor, observed: _Observed) -> ChunkLoss:
    """The loss on the logits of the scored tokens, for a signal that reads only the shape on the support.

    The normaliser is not computed. If the sampler recorded log-probs at the same temperature, the normaliser follows
    from the sampled token's logit and log-prob, and the mass on the support is logged.
    """
    drawn_at = {None if r.sampling is None else r.sampling.temperature for r in micro.rollouts}
    known = drawn_at == {method.temperature} and not bool(micro.policy_logp.isnan().any())

    def chunk_loss(logits: Tensor, rows: slice) -> Tensor:
        """[n, 1 + K] logits of the scored tokens at `rows`: their part of the loss, and its gradient in their place."""
        w, policy_logp = weight[rows], micro.policy_logp[rows]
        per_token, grad = _differentiated(
            method,
            lambda z: _with_support(_tokens(micro, rows, torch.full_like(w, torch.nan)), micro, rows, z),
            logits[:, 1:],
            w,
            observed,
        )
        micro.keep(rows, per_token)
        observed.add("train/signal", per_token)
        if known:
            observed.add("train/student_nll", -policy_logp)
        log_z = logits[:, :1] - policy_logp[:, None]
        observed.support(micro, rows, logits[:, 1:] - log_z if known else None)
        logits[:, :1] = 0.0
        logits[:, 1:] = grad
        return (per_token * w).sum()

    return chunk_loss


def _scored_ids(micro: MicroBatch, rows: slice) -> Tensor:
    """[n, 1 + K]: the sampled token, then the support."""
    sampled = micro.token_ids[rows, None]
    return sampled if micro.support_ids is None else torch.cat([sampled, micro.support_ids[rows]], 1)


def _differentiated(
    method: Method, tokens_of: Callable[[Tensor], Tokens], values: Tensor, weight: Tensor, observed: _Observed
) -> tuple[Tensor, Tensor]:
    """The signal [n] at `tokens_of(values)`, and the gradient of its weighted sum with respect to `values`."""
    if isinstance(method.signal, MeasuredPiece):
        for name, found in method.signal.measure(tokens_of(values.detach())).items():
            observed.add(name, found, over=len(found))
    with torch.enable_grad():
        leaf = values.detach().requires_grad_()
        per_token = method.signal(tokens_of(leaf))
        loss = (per_token * weight).sum()
    if not loss.requires_grad:
        return per_token.detach(), torch.zeros_like(values)
    (grad,) = torch.autograd.grad(loss, leaf)
    return per_token.detach(), grad


def _tokens(micro: MicroBatch, at: slice, student_logp: Tensor) -> Tokens:
    return Tokens(
        student_logp=student_logp,
        sampler_logp=micro.sampler_logp[at],
        teacher_logp=micro.teacher_logp[at],
        advantage=micro.advantage[at],
        weight=micro.weight[at],
        base_logp=None if micro.base_logp is None else micro.base_logp[at],
    )


def _full_tokens(micro: MicroBatch, at: slice, teacher: Tensor) -> Callable[[Tensor], Tokens]:
    """A function from the student's log-probs [n, V] to Tokens that also hold the teacher's."""
    y = micro.token_ids[at, None]

    def tokens_of(student: Tensor) -> Tokens:
        tokens = _tokens(micro, at, student.gather(-1, y)[:, 0])
        teacher_logp = teacher.gather(-1, y)[:, 0]
        return replace(tokens, teacher_logp=teacher_logp, student_support_logp=student, teacher_support_logp=teacher)

    return tokens_of


def _with_support(tokens: Tokens, micro: MicroBatch, at: slice, student_support_logp: Tensor) -> Tokens:
    if micro.support_mask is None or micro.teacher_support_logp is None:
        return tokens
    return replace(
        tokens,
        student_support_logp=student_support_logp,
        teacher_support_logp=micro.teacher_support_logp[at],
        support_mask=micro.support_mask[at],
    )


class _Observed:
    """Sums over tokens, kept on the device until the micro-batch ends."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}  # for means over something other than tokens

    def add(self, name: str, per_token: Tensor, over: int | None = None) -> None:
        """Add values; `over` is their count if it differs from the number of tokens."""
        total = per_token.sum()
        self._sums[name] = total if name not in self._sums else self._sums[name] + total
        if over is not None:
            self._counts[name] = self._counts.get(name, 0) + over

    def support(self, micro: MicroBatch, at: slice, student_logp: Tensor | None) -> None:
        """Add both models' masses on the support, if the method has a support."""
        if micro.support_mask is None or micro.teacher_support_logp is None:
            return
        exists = micro.support_mask[at]
        if student_logp is not None:
            self.add("support/student_mass", student_logp.exp().masked_fill(~exists, 0.0))
        self.add("support/teacher_mass", micro.teacher_support_logp[at].exp().masked_fill(~exists, 0.0))
        self.add("support/empty_share", (~exists.any(-1)).float())

    def metrics(self, tokens: int) -> Metrics:
        """Means over the micro-batch's tokens, or over the count given to `add`."""
        metrics = Metrics()
        for name, total in self._sums.items():
            metrics.mean(name, total.item(), self._counts.get(name, tokens))
        return metrics
