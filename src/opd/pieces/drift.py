"""Teacher-student overlap along a response, and its uses: a token weight, a length budget, an early stop.

Prune-OPD, arXiv 2605.07804, as in its released code. Positions are tokens of a response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from opd.errors import ConfigError
from opd.maths.overlap import shared
from opd.pieces.memory import SavedAttributes, recalled
from opd.pieces.needs import Input, Need, Trait, needing
from opd.types import Batch, EarlyStop, Gather, MakeMemory, Rollout, Scores, Watch, Weight, Writers

if TYPE_CHECKING:
    from torch import Tensor

ALIVE = 1e-8  # a trust above this counts as positive, as in the released code


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Lost tokens, and the remaining trust in the teacher, W_t = clip(1 - drop sum_{j <= t} lost_j, 0, 1).

    `overlap`: a token is lost if the k most likely tokens of student and teacher share less than `threshold`. This does
    not depend on y_t. `teacher_top_p_accept`: a token y_t is lost if it lies outside the smallest set of the teacher's
    most likely tokens with at least the mass `threshold`; if the teacher's top k hold less than that mass, the set is
    those k, as in the released code.

    Raises ConfigError for k < 1, for a threshold or a drop outside [0, 1], and for `teacher_top_p_accept` with a
    threshold of 0, at which the set is empty.
    """

    metric: Literal["overlap", "teacher_top_p_accept"] = "overlap"
    k: int = 16
    threshold: float = 0.7
    drop: float = 0.01

    def __post_init__(self) -> None:
        if self.k < 1 or not (0.0 <= self.threshold <= 1.0 and 0.0 <= self.drop <= 1.0):
            raise ConfigError(
                "Drift needs k of at least 1, and a threshold and a drop between 0 and 1; "
                f"got k {self.k}, threshold {self.threshold} and drop {self.drop}."
            )
        if self.metric == "teacher_top_p_accept" and self.threshold == 0.0:
            raise ConfigError(
                "With teacher_top_p_accept a threshold of 0 accepts no token, so that every token is lost; got "
                f"threshold {self.threshold}. Set a mass above 0, such as 0.9."
            )

    @property
    def needs(self) -> tuple[Need, ...]:
        """The needs of a piece that uses this, besides `top_k`."""
        return (Input.TEACHER,) if self.metric == "overlap" else (Input.TEACHER, Trait.LOOKS_AT_SAMPLED_TOKEN)

    def lost(self, ids: Tensor, student_top: Tensor, teacher_top: Tensor, teacher_top_logp: Tensor) -> Tensor:
        """[..., T] bool, from sampled ids [..., T], top ids and log-probs [..., T, at least k] in falling order."""
        teacher = teacher_top[..., : self.k]
        if self.metric == "overlap":
            return shared(student_top[..., : self.k], teacher).double().mean(-1) < self.threshold
        before = teacher_top_logp[..., : self.k].double().exp().cumsum(-1).roll(1, -1)  # mass of more likely tokens
        before[..., 0] = 0.0
        return ~((teacher == ids[..., None]) & (before < self.threshold)).any(-1)

    def trust(self, lost: Tensor) -> Tensor:
        """W [..., T] in float64, from `lost` [..., T]: never increasing, between 1 and 0."""
        return (1.0 - self.drop * lost.double().cumsum(-1)).clamp(0.0, 1.0)

    def trust_of(self, rollout: Rollout, scores: Scores) -> Tensor:
        """W [T] of a response recorded and scored with top ids; tokens of an environment are never lost."""
        student, teacher, logp = rollout.student_top_ids, scores.teacher_top_ids, scores.teacher_top_logp
        assert student is not None, "the sampler did not record top ids"
        assert teacher is not None, "the teacher did not return top ids"
        assert logp is not None
        return self.trust(self.lost(rollout.response_ids, student, teacher.cpu(), logp.cpu()) & rollout.trained)


def lost_tokens(drift: Drift, batch: Batch) -> Tensor:
    """The trained tokens that are lost, [B, T] bool. Raises ConfigError without top ids."""
    student, teacher, logp = batch.student_top_ids, batch.teacher_top_ids, batch.teacher_top_logp
    if student is None or teacher is None or logp is None or teacher.shape[-1] < drift.k:
        raise ConfigError(
            f"Drift reads the {drift.k} most likely tokens of both models, and the batch has "
            f"{0 if teacher is None else teacher.shape[-1]}. Declare them on the piece that calls it: "
            f"needing(piece, top_k={drift.k})."
        )
    return drift.lost(batch.response_ids, student, teacher, logp) & batch.mask


def trusted(drift: Drift, base: float = 0.5) -> Weight:
    """omega_t = W_t + base: a token without trust still weighs `base`. Raises ConfigError for a base below 0."""
    if base < 0.0:
        raise ConfigError(f"The weight `base` that is added to the trust must be at least 0, got {base}.")

    def weight(batch: Batch) -> Tensor:
        return ((drift.trust(lost_tokens(drift, batch)) + base) * batch.mask).to(batch.teacher_logp.dtype)

    return needing(weight, *drift.needs, Trait.WEIGHS_BY_TRUST, top_k=drift.k)


def ends_drifted(drift: Drift, every: int) -> Watch:
    """Every `every` tokens the teacher scores the unfinished responses. A response with a trust of 0 ends, unfinished.

    Raises ConfigError for `every` below 1.
    """
    if every < 1:
        raise ConfigError(f"`every`, the tokens between two scorings by the teacher, must be at least 1, got {every}.")

    def watch(writers: Writers) -> EarlyStop:
        assert writers.scorer is not None, "methods without a teacher are refused earlier"
        score = writers.scorer()

        def keeps_going(unfinished: Sequence[Rollout]) -> list[bool]:
            return [bool(drift.trust_of(r, s)[-1] > ALIVE) for r, s in zip(unfinished, score(unfinished), strict=True)]

        return EarlyStop(every=every, keeps_going=keeps_going)

    return needing(watch, Input.TEACHER, Trait.SCORES_UNFINISHED, top_k=drift.k, first_look=every)


class Drifted(SavedAttributes):
    """Drift metrics of a step, over the responses of all processes with a trained token. Saves nothing.

    drift/lost_share: share of the trained tokens. drift/effective_length: mean #{t : W_t > 0} in tokens.
    drift/ended_share: share of all responses that ended early, neither finished nor at sampling.max_completion_length.
    drift/tokens: tokens generated.
    """

    def __init__(self, drift: Drift) -> None:
        self.drift = drift

    def observe(self, batch: Batch, gather: Gather) -> Mapping[str, float]:
        """The metrics of a step."""
        return self.measure(batch, gather)[0]

    def measure(self, batch: Batch, gather: Gather) -> tuple[dict[str, float], list[int]]:
        """The metrics of a step, and the effective lengths L_i = #{t : W_t > 0} of all responses with a trained token.

        If a filter left no response, there are no lengths and only two metrics.
        """
        lost = lost_tokens(self.drift, batch)
        alive = ((self.drift.trust(lost) > ALIVE) & batch.mask).sum(1)[batch.mask.any(1)]
        ended = [
            not r.finished and r.sampling is not None and len(r.response_ids) < r.sampling.max_completion_length
            if r.talk is None
            else bool(r.talk.counts.get("stopped"))
            for r in batch.rollouts
        ]
        tokens = sum(len(rollout.own_ids) for rollout in batch.rollouts)
        parts = gather(
            ([int(length) for length in alive], int(lost.sum()), int(batch.mask.sum()), sum(ended), len(ended), tokens)
        )
        effective = [length for part in parts for length in part[0]]
        lost_all, trained, ended_all, responses, tokens_all = (sum(part[i] for part in parts) for i in range(1, 6))
        metrics = {"drift/tokens": float(tokens_all), "drift/ended_share": ended_all / responses}
        if effective:
            metrics["drift/effective_length"] = sum(effective) / len(effective)
            metrics["drift/lost_share"] = lost_all / trained
        return metrics, effective


def measured(drift: Drift) -> MakeMemory:
    """A maker of `Drifted`."""
    return needing(lambda: Drifted(drift), *drift.needs, top_k=drift.k)


class Budget(Drifted):
    """The response length limit, in tokens: grows while enough responses keep some trust up to it, else shrinks.

    With B the budget and L_i the effective length of response i,

        hit = mean_i [L_i >= max(least, B - margin)]
        hit >= hit_share: B <- min(B + step, most); after `patience` steps in a row without: B <- max(B - step, least)

    It also logs the metrics of `Drifted`.
    """

    saved = ("length", "misses")

    def __init__(
        self,
        drift: Drift,
        *,
        initial: int,
        least: int,
        most: int,
        step: int,
        margin: int,
        hit_share: float,
        patience: int,
    ) -> None:
        super().__init__(drift)
        self.least, self.most, self.step, self.margin = least, most, step, margin
        self.hit_share, self.patience = hit_share, patience
        self.length = initial  # limit of the next responses
        self.misses = 0  # steps in a row below `hit_share`

    def observe(self, batch: Batch, gather: Gather) -> Mapping[str, float]:
        """Update the budget from a step's effective lengths, if any; drift and budget metrics."""
        metrics, effective = self.measure(batch, gather)
        return metrics | (self.advance(effective) if effective else {})

    def advance(self, effective: Sequence[int]) -> dict[str, float]:
        """Update the budget from a step's effective lengths; its metrics."""
        reached = max(self.least, self.length - self.margin)
        hit = sum(length >= reached for length in effective) / len(effective)
        self.misses = 0 if hit >= self.hit_share else self.misses + 1
        if self.misses == 0:
            self.length = min(self.length + self.step, self.most)
        elif self.misses >= self.patience:
            self.length, self.misses = max(self.length - self.step, self.least), 0
        return {"budget/tokens": float(self.length), "budget/hit_share": hit}


def budget(
    drift: Drift, *, initial: int, least: int, most: int, step: int, margin: int, hit_share: float, patience: int
) -> MakeMemory:
    """A maker of `Budget`. Raises ConfigError unless 1 <= least <= initial <= most, and for other invalid settings."""
    if not (1 <= least <= initial <= most):
        raise ConfigError(
            f"A budget needs 1 <= least <= initial <= most, in tokens; got least {least}, initial {initial} and most "
            f"{most}."
        )
    if step < 1 or margin < 0 or patience < 1 or not 0.0 <= hit_share <= 1.0:
        raise ConfigError(
            "A budget needs a step and a patience of at least 1, a hit share between 0 and 1, and a margin of at least "
            f"0; got step {step}, patience {patience}, hit share {hit_share} and margin {margin}."
        )
    made = partial(
        Budget,
        drift,
        initial=initial,
        least=least,
        most=most,
        step=step,
        margin=margin,
        hit_share=hit_share,
        patience=patience,
    )
    return needing(made, *drift.needs, top_k=drift.k)


def within_budget(most: int) -> Watch:
    """A response ends, unfinished, at the length of the memory `budget`, at most `most` tokens.

    The teacher is not called. When called, raises ConfigError if the method has no such memory.
    """

    def watch(writers: Writers) -> EarlyStop:
        allowed = recalled(writers.memory, "budget", Budget).length
        return EarlyStop(every=allowed, keeps_going=lambda unfinished: [False] * len(unfinished))

    return needing(watch, response_tokens=most)
