"""Rollouts and scores -> Batch (padded), Batch -> micro-batches (packed)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd.errors import DataError, TeacherError, TrainingError
from opd.method import Method
from opd.models.forward import batches
from opd.models.language_model import LanguageModel
from opd.parallel import World
from opd.pieces.needs import Trait
from opd.pieces.packed import valid
from opd.types import Batch, Denominator, Rollout, Scores, Units


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Some rows of a Batch, and their trained tokens, packed: token `step` of the response of rollout `row`."""

    rollouts: tuple[Rollout, ...]
    row: Tensor  # [N]
    step: Tensor  # [N]
    token_ids: Tensor  # [N]
    share: Tensor  # [N] from Denominator
    sampler_logp: Tensor  # [N]
    policy_logp: Tensor  # [N]
    teacher_logp: Tensor  # [N]
    advantage: Tensor  # [N]
    weight: Tensor  # [N]
    support_ids: Tensor | None  # [N, K]
    support_mask: Tensor | None  # [N, K]
    teacher_support_logp: Tensor | None  # [N, K]
    teacher_hidden: Tensor | None  # [N, H]
    base_logp: Tensor | None = None  # [N]
    teacher_id: str | None = None  # the teacher of `teacher_hidden`
    task: str | None = None  # of all rows, if `teacher_hidden` is set
    units: Units | None = None  # [N]
    # What the loss keeps of each token for people who read samples, [N]; None: it keeps nothing.
    chosen: Tensor | None = None  # the rows of the Batch, by rollout
    signal: Tensor | None = None  # before weight and denominator
    log_ratio: Tensor | None = None  # log q - log p of the forward that is trained on, where it has both

    def keep(self, at: slice, signal: Tensor, log_ratio: Tensor | None = None, share: Tensor | None = None) -> None:
        """Keep a tile's numbers [n]; with `share` [n], one teacher's part of each, to be added to the others'."""
        for kept, values in ((self.signal, signal), (self.log_ratio, log_ratio)):
            if kept is not None and values is not None:
                kept[at] = values if share is None else kept[at].nan_to_num() + values * share

    @property
    def sequences(self) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
        """(the prompts' ids, the responses' ids)."""
        return [r.prompt_ids for r in self.rollouts], [r.response_ids.tolist() for r in self.rollouts]


def collate(rollouts: Sequence[Rollout], scores: Sequence[Scores], device: torch.device) -> Batch:
    """Pad to [B, T]. Floating-point fields are padded with NaN, so that code that reads padding fails visibly.

    Raises DataError for a response of zero tokens, TeacherError when scores do not fit their response.
    """
    check_responses(rollouts)
    for rollout, score in zip(rollouts, scores, strict=True):
        if len(score.teacher_logp) != len(rollout.response_ids):
            raise TeacherError(
                f"The teacher scored {len(score.teacher_logp)} tokens of the response to prompt {rollout.prompt.id}, "
                f"which has {len(rollout.response_ids)}."
            )
    unknown = [torch.full((len(r.response_ids),), torch.nan) for r in rollouts]
    groups: dict[int, int] = {}
    return Batch(
        rollouts=tuple(rollouts),
        response_ids=pad([r.response_ids for r in rollouts], 0, device),
        mask=pad([_trained(r, s) for r, s in zip(rollouts, scores, strict=True)], False, device),
        sampler_logp=pad([_or(r.sampler_logp, u) for r, u in zip(rollouts, unknown, strict=True)], torch.nan, device),
        policy_logp=pad([_or(r.policy_logp, u) for r, u in zip(rollouts, unknown, strict=True)], torch.nan, device),
        teacher_logp=pad([s.teacher_logp for s in scores], torch.nan, device),
        reward=torch.tensor([torch.nan if r.reward is None else r.reward for r in rollouts], device=device),
        group=torch.tensor([groups.setdefault(r.prompt.id, len(groups)) for r in rollouts], device=device),
        support_ids=_pad_all([s.support_ids for s in scores], 0, device),
        support_mask=_pad_all([s.support_mask for s in scores], False, device),
        teacher_support_logp=_pad_all([s.teacher_support_logp for s in scores], torch.nan, device),
        teacher_hidden=_all([s.teacher_hidden for s in scores], device),
        teacher_entropy=_pad_all([s.teacher_entropy for s in scores], torch.nan, device),
        student_entropy=_pad_all([r.student_entropy for r in rollouts], torch.nan, device),
        student_top_ids=_pad_all(_student_top(rollouts, scores), 0, device),
        teacher_top_ids=_pad_all([s.teacher_top_ids for s in scores], 0, device),
        teacher_top_logp=_pad_all([s.teacher_top_logp for s in scores], torch.nan, device),
        base_logp=_pad_all([s.base_logp for s in scores], torch.nan, device),
        units=_pad_units([s.units for s in scores], device),
    )


def check_responses(rollouts: Sequence[Rollout]) -> None:
    """Raise DataError for a response of zero tokens."""
    for rollout in rollouts:
        if len(rollout.response_ids) == 0:
            raise DataError(
                f"The response to prompt {rollout.prompt.id} has zero tokens, so it cannot be trained on. "
                "Drop the row, or let its writer end with the end-of-sequence token."
            )


def has_trained(batch: Batch, method: Method, world: World) -> bool:
    """Whether any process trains a token in this step; False only for a method that filters responses.

    Raises TrainingError on every rank if no token is trained and the method does not filter.
    """
    if world.any(bool(batch.mask.any())):
        return True
    if Trait.FILTERS in method.needs:
        return False
    ids = [i for part in world.gather([rollout.prompt.id for rollout in batch.rollouts]) for i in part]
    raise TrainingError(
        f"None of this step's {len(ids)} responses has a trained token (prompts {ids[:8]}): the gradient would be 0/0. "
        f"{_why(batch)}"
    )


def attach(batch: Batch, method: Method) -> Batch:
    """The batch with credit and weight, detached: the end of phase A."""
    return replace(batch, advantage=method.credit(batch).detach(), weight=method.weight(batch).detach())


def split(student: LanguageModel, batch: Batch, denominator: Denominator, micro_batch_tokens: int) -> list[MicroBatch]:
    """Micro-batches of rows of similar length, each at most `micro_batch_tokens` tokens with padding, or one row.

    As `student` reads them (`forward.batches`). Rows without a trained token are left out: they have no gradient. On a
    full support, phase B applies the teacher's output layer, so all rows of a micro-batch belong to one task and one
    teacher.
    """
    trained = [i for i in range(len(batch.rollouts)) if bool(batch.mask[i].any())]
    together: dict[tuple[str | None, str | None] | None, list[int]] = {}
    for i in trained:
        prompt = batch.rollouts[i].prompt
        key = None if batch.teacher_hidden is None else (prompt.task, prompt.teacher_id)
        together.setdefault(key, []).append(i)
    micros: list[MicroBatch] = []
    for key, group in together.items():
        prompts = [batch.rollouts[i].prompt_ids for i in group]
        lengths = [len(batch.rollouts[i].response_ids) for i in group]
        for rows in batches(student, prompts, lengths, micro_batch_tokens):
            micros.append(_micro(batch, denominator, [group[j] for j in rows], *(key or (None, None))))
    return micros


def _micro(
    batch: Batch, denominator: Denominator, indices: list[int], task: str | None, teacher_id: str | None
) -> MicroBatch:
    rollouts = tuple(batch.rollouts[i] for i in indices)
    device = batch.mask.device
    chosen = torch.tensor(indices, device=device)
    mask = batch.mask[chosen]
    row, step = mask.nonzero(as_tuple=True)

    def packed(field: Tensor | None) -> Tensor | None:
        return None if field is None else valid(field[chosen], mask)

    states = None
    if batch.teacher_hidden is not None:
        own = [batch.teacher_hidden[i] for i in indices]
        states = torch.cat([valid(h, batch.mask[i, : len(h)]) for i, h in zip(indices, own, strict=True)])
    assert batch.advantage is not None
    assert batch.weight is not None
    return MicroBatch(
        rollouts=rollouts,
        row=row,
        step=step,
        token_ids=valid(batch.response_ids[chosen], mask),
        share=valid(denominator.share[chosen], mask),
        sampler_logp=valid(batch.sampler_logp[chosen], mask),
        policy_logp=valid(batch.policy_logp[chosen], mask),
        teacher_logp=valid(batch.teacher_logp[chosen], mask),
        advantage=valid(batch.advantage[chosen], mask),
        weight=valid(batch.weight[chosen], mask),
        support_ids=packed(batch.support_ids),
        support_mask=packed(batch.support_mask),
        teacher_support_logp=packed(batch.teacher_support_logp),
        teacher_hidden=states,
        base_logp=packed(batch.base_logp),
        teacher_id=teacher_id,
        task=task,
        chosen=chosen,
        signal=torch.full(row.shape, torch.nan, device=device),
        log_ratio=torch.full(row.shape, torch.nan, device=device),
        units=None if batch.units is None else batch.units.each(lambda field: valid(field[chosen], mask)),
    )


def pad(rows: Sequence[Tensor], value: float | bool, device: torch.device) -> Tensor:
    """[T_i, ...] rows -> [B, T, ...], filled with `value` after each row's end."""
    longest = max(len(row) for row in rows)
    out = torch.full((len(rows), longest, *rows[0].shape[1:]), value, dtype=rows[0].dtype, device=device)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def _student_top(rollouts: Sequence[Rollout], scores: Sequence[Scores]) -> list[Tensor | None]:
    """The student's most likely tokens, as many as the teacher's; None for responses without either."""
    out: list[Tensor | None] = []
    for rollout, score in zip(rollouts, scores, strict=True):
        mine, theirs = rollout.student_top_ids, score.teacher_top_ids
        out.append(None if mine is None or theirs is None else mine[:, : theirs.shape[1]])
    return out


def _trained(rollout: Rollout, scores: Scores) -> Tensor:
    """[T] bool: trained, and scored by the teacher."""
    return rollout.trained if scores.scored is None else rollout.trained & scores.scored.to(rollout.trained.device)


def _why(batch: Batch) -> str:
    """Why no token of the step is trained, and the remedy."""
    if not any(bool(rollout.trained.any()) for rollout in batch.rollouts):
        return "Check the source's masks."
    text = batch.rollouts[0].text
    return (
        "The teacher has another tokenizer and could score none of their tokens: its tokenizer changes their text, or "
        f"the responses have no text. The first response: {text!r:.200}. Use a tokenizer that keeps the text."
    )


def _pad_units(rows: Sequence[Units | None], device: torch.device) -> Units | None:
    present = [row for row in rows if row is not None]
    assert len(present) in (0, len(rows)), "some responses of a step have units and some do not"
    if not present:
        return None
    return Units.joined(present, lambda rows: pad(rows, torch.nan if rows[0].is_floating_point() else 0, device))


def _pad_all(rows: Sequence[Tensor | None], value: float | bool, device: torch.device) -> Tensor | None:
    present = _all(rows, device)
    return None if present is None else pad(present, value, device)


def _all(rows: Sequence[Tensor | None], device: torch.device) -> tuple[Tensor, ...] | None:
    """The tensors of all rows, or None if no row has one."""
    present = [row for row in rows if row is not None]
    assert len(present) in (0, len(rows)), "some responses of a step have a support and some do not"
    return tuple(row.to(device) for row in present) or None


def _or(values: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if values is None else values
