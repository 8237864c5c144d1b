"""The exact divergence of two models per token of given responses, over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from opd.loss.collate import split
from opd.loss.step import scored
from opd.loss.token_loss import hidden_of
from opd.maths.divergences import DIVERGENCES, reverse_kl
from opd.method import Method
from opd.models.head import Head, TeacherHead, paired_log_probs
from opd.models.language_model import LanguageModel, evaluating
from opd.models.ticks import counted
from opd.parallel import ALONE, World
from opd.pieces.normalise import per
from opd.pieces.signals import divergence
from opd.pieces.supports import full
from opd.types import Context, Rollout, Teacher

# Called for each tile of n trained tokens: the places [n] of their responses among those that were passed, their
# positions in them [n], their ids [n], and both models' log-probs [n, V].
Look: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def exact_divergence(
    student: LanguageModel,
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    context: Context,
    *,
    micro_batch_tokens: int,
    names: Sequence[str] = ("reverse_kl", "forward_kl"),
    world: World = ALONE,
    look: Look | None = None,
) -> dict[str, float]:
    """Exact divergences between student and teacher per token of `rollouts`, in nats, over the whole vocabulary.

    All processes pass the same rollouts; each computes a part. `look` reads this process's part on the way, and must
    not write to it.
    """
    # A prompt's responses stay in one process: a context may read all of them.
    positions = world.positions([rollout.prompt.id for rollout in rollouts])
    totals, count = dict.fromkeys(names, 0.0), 0.0
    if positions:
        mine = [rollouts[i] for i in positions]
        found = _placed(look, positions)
        totals, count = _divergence_sums(student, teacher, mine, context, micro_batch_tokens, names, found)
    count = world.sum(count)
    return {name: world.sum(total) / count for name, total in totals.items()}


def _placed(look: Look | None, positions: Sequence[int]) -> Look | None:
    """The same for places among this process's responses, which have these positions among all."""
    if look is None:
        return None
    all_places = torch.tensor(positions)

    def placed(places: Tensor, *tile: Tensor) -> None:
        look(all_places.to(places.device)[places], *tile)

    return placed


@torch.no_grad()
def divergence_by_token(
    student: Head, hidden: Tensor, teacher: TeacherHead, teacher_hidden: Tensor, temperature: float = 1.0
) -> Tensor:
    """The exact reverse KL [T] at both models' hidden states [T, H] of the same positions, in nats."""
    pairs = paired_log_probs(student, hidden, teacher, teacher_hidden, temperature)
    return torch.cat([reverse_kl(ours, theirs) for ours, theirs in pairs])


@torch.no_grad()
def _divergence_sums(
    student: LanguageModel,
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    context: Context,
    micro_batch_tokens: int,
    names: Sequence[str],
    look: Look | None,
) -> tuple[dict[str, float], float]:
    """(sums over tokens by name, number of tokens)."""
    method = Method(support=full(), signal=divergence(reverse_kl), normalise=per("token"))
    phase_a = scored(method, teacher, rollouts, context(rollouts), method.request(), device=student.device)
    student_head, teacher_head = student.head(), teacher.head()
    totals = dict.fromkeys(names, 0.0)
    with evaluating(student.model):
        micros = split(student, phase_a.batch, phase_a.denominator, micro_batch_tokens)
        for micro in counted("micro-batches compared", micros):
            hidden_NH = hidden_of(student, micro)
            assert micro.teacher_hidden is not None
            done = 0
            for pair in paired_log_probs(student_head, hidden_NH, teacher_head, micro.teacher_hidden):
                for name in names:
                    totals[name] += DIVERGENCES[name](*pair).sum().item()
                at = slice(done, done + len(pair[0]))
                done = at.stop
                if look is not None:
                    assert micro.chosen is not None
                    look(micro.chosen[micro.row[at]], micro.step[at], micro.token_ids[at], *pair)
    return totals, phase_a.count
