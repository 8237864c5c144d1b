"""Methods for studies only, as `opd_studies.worlds.methods:NAME` in their recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from opd.method import Method
from opd.methods.anti_sd import anti_sd
from opd.methods.mad_opd import mad_opd
from opd.methods.sod import sod
from opd.methods.visd import visd
from opd.pieces import credit, debate, normalise, signals, sized, turns
from opd.pieces.memory import recalled
from opd.pieces.needs import Piece, Reads, needing, needs_of
from opd.pieces.signals import MeasuredPiece
from opd.types import Batch, Context, Gather, Prompt, Rollout, Tokens


def differentiated_log_ratio() -> Method:
    """log p(y_t) - log q(y_t), differentiated: its expected gradient is zero (arXiv 2605.11182 Fig. 12)."""

    def signal(tokens: Tokens) -> Tensor:
        return tokens.student_logp - tokens.teacher_logp

    return Method(signal=signal)


def self_distillation(strength: float = 0.5, template: str | None = None) -> Method:
    """The reward plus `strength` times the log-ratio to the self that reads the solution: arXiv 2605.11609 eq. 2.

    delta = +u, the opposite sign of `anti_sd`; the gate only observes.
    """
    turned = anti_sd(strength, gate=False, template=template)
    towards = credit.scale(strength, credit.discounted(0.0))
    return replace(turned, credit=credit.add(credit.group_reward(), towards))


def opd_with_reward(weight: float = 1.0) -> Method:
    """The teacher's log-ratio plus `weight` times GRPO's advantage, in the loss of `uni_opd`: its shift's control."""
    return Method(
        credit=credit.add(credit.discounted(0.0), credit.scale(weight, credit.group_reward())),
        signal=signals.policy_gradient(signals.credit, clip=(0.2, 0.28)),
        normalise=normalise.per("sequence"),
    )


def shuffled_debate(
    beta: float = 1.0, opening: str = "", reply: str = "", reads: str = "", turn: str = "", tag: str = ""
) -> Method:
    """`mad_opd`, but the teachers read the debate of the step's next prompt: as many tokens, and nothing about x."""
    method = mad_opd(beta=beta, opening=opening, reply=reply, reads=reads, turn=turn, tag=tag)

    def context(rollouts: Sequence[Rollout]) -> list[Prompt]:
        debates = [
            rollout.prompt.metadata[debate.NAME] for rollout in rollouts if debate.NAME in rollout.prompt.metadata
        ]
        if not debates:  # held-out prompts
            return method.context(rollouts)
        others = [*debates[1:], debates[0]]
        return method.context([_with_debate(rollout, other) for rollout, other in zip(rollouts, others, strict=True)])

    return replace(method, context=_like(method.context, context))


def one_reader(
    reader: str = "l",
    beta: float = 1.0,
    opening: str = "",
    reply: str = "",
    reads: str = "",
    turn: str = "",
    tag: str = "",
) -> Method:
    """`mad_opd`, but after the debate only one of the teachers scores the responses."""
    method = mad_opd(beta=beta, opening=opening, reply=reply, reads=reads, turn=turn, tag=tag)

    def context(rollouts: Sequence[Rollout]) -> list[Prompt]:
        return [replace(prompt, teacher_weights={reader: 1.0}) for prompt in method.context(rollouts)]

    return replace(method, context=_like(method.context, context))


def shuffled_visd(
    share: float = 0.5,
    fades: int = 600,
    bound: float = 0.2,
    k: int = 16,
    decay: float = 0.99,
    hint: Literal["feedback", "privileged_context"] = "feedback",
    template: str | None = None,
) -> Method:
    """`visd`, but the D_t of a response go to its tokens in random order: the same numbers, at other tokens.

    A response that the loss splits into chunks keeps its numbers within each chunk.
    """
    method = visd(share, fades, bound, k, decay, hint, template)
    signal = method.signal
    assert isinstance(signal, MeasuredPiece)

    def numbered(batch: Batch) -> Tensor:
        """[B, T, 3]: the two numbers of `visd`, and the number of the response plus a random number below 1."""
        key = torch.rand(batch.mask.shape, generator=_random(batch)) + torch.arange(len(batch.mask))[:, None]
        return torch.cat([method.credit(batch), key.to(batch.mask.device)[..., None]], -1)

    def shuffled(tokens: Tokens) -> Tokens:
        key, size = tokens.advantage[:, 2], sized.log_ratio_on_support(tokens)
        moved = torch.empty_like(size)
        moved[key.floor().argsort(stable=True)] = size[key.argsort()]
        return replace(tokens, advantage=tokens.advantage[:, :2], teacher_logp=tokens.teacher_logp + moved - size)

    shuffling = MeasuredPiece(
        lambda tokens: signal(shuffled(tokens)),
        needs_of(signal),
        measure=lambda tokens: signal.measure(shuffled(tokens)),
    )
    return replace(method, credit=Piece(numbered, needs_of(method.credit)), signal=shuffling)


def with_shuffled_rewards(method: Method) -> Method:
    """`visd`, but the rewards of a group go to its responses in random order: they say nothing about a response."""

    def credit(batch: Batch) -> Tensor:
        drawn, reward = torch.rand(len(batch.reward), generator=_random(batch)), torch.empty_like(batch.reward)
        reward[batch.group.argsort(stable=True)] = batch.reward[(batch.group + drawn.to(batch.group.device)).argsort()]
        return method.credit(replace(batch, reward=reward))

    return replace(method, credit=Piece(credit, needs_of(method.credit)))


Weighing: TypeAlias = Literal["even", "shuffled", "level"]


class OtherTurnWeights(turns.TurnWeights):
    """The weights of `sod`, but as a control has them.

    even      1 for every turn: plain distillation
    shuffled  those of a response go to its turns in random order: as uneven, and they say nothing about a turn
    level     every turn has the mean weight of the step's turns: as strong, and even
    """

    saved = ("step",)

    def __init__(self, kind: Weighing, bound: float) -> None:
        super().__init__("first", 1e-6, bound)
        self.kind, self.step = kind, 0

    def observe(self, batch: Batch, gather: Gather) -> Mapping[str, float]:
        self.step += 1
        return super().observe(batch, gather)

    def of(self, apart: Tensor) -> Tensor:
        w = super().of(apart)
        known = ~w.isnan()
        if self.kind == "shuffled":
            drawn = torch.rand(w.shape, generator=torch.Generator().manual_seed(self.step))
            row = torch.arange(len(w))[:, None] + torch.zeros_like(w)
            order = (row + drawn)[known].argsort()
            moved = w.clone()
            moved[known] = w[known][order]
            return moved
        return torch.where(known, torch.ones_like(w) if self.kind == "even" else w[known].mean(), torch.nan)


def sod_with(kind: Weighing, bound: float = 0.2) -> Method:
    """`sod`, but the turns have a control's weights."""
    method = sod(bound=bound)
    made = needing(lambda: OtherTurnWeights(kind, bound), Reads.TEACHER_LOGP, Reads.POLICY_LOGP)
    return replace(method, memory={"turns": made})


def sod_without(left_out: Callable[[Batch], Tensor]) -> Method:
    """Plain distillation beside GRPO's advantage, but without distillation on some tokens, [B, T] bool."""

    def kept(batch: Batch) -> Tensor:
        return credit.discounted(0.0)(batch).masked_fill(left_out(batch), 0.0)

    distilled = Piece(kept, needs_of(credit.discounted(0.0)))
    return replace(sod(), credit=credit.add(credit.group_reward(epsilon=1e-6), distilled), memory={})


def _random(batch: Batch) -> torch.Generator:
    """Random numbers of the step, for a method with the memory of `visd`: the same in every run."""
    return torch.Generator().manual_seed(recalled(batch.memory, "size", sized.Fading).step)


def with_measured_size(method: Method) -> Method:
    """`visd` or `shuffled_visd` that also logs |A_t / A_i - 1| of the tokens that the teacher sizes.

    size/change is its mean, size/largest_change its largest value. The loss at a ratio of 1 is -A_t.
    """
    signal = method.signal
    assert isinstance(signal, MeasuredPiece)

    def measure(tokens: Tokens) -> Mapping[str, Tensor]:
        direction, active = tokens.advantage[:, 0], (tokens.advantage[:, :2] != 0.0).all(-1)
        advantage = -signal(replace(tokens, sampler_logp=tokens.student_logp)).detach()
        change = (advantage[active] / direction[active] - 1.0).abs()
        largest = change.max()[None] if len(change) else change
        return {**signal.measure(tokens), "size/change": change, "size/largest_change": largest}

    return replace(method, signal=MeasuredPiece(signal, needs_of(signal), measure=measure))


def _with_debate(rollout: Rollout, other: Any) -> Rollout:
    return replace(rollout, prompt=replace(rollout.prompt, metadata={**rollout.prompt.metadata, debate.NAME: other}))


def _like(piece: Context, changed: Context) -> Context:
    return Piece(changed, needs_of(piece))
