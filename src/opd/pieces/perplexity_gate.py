"""The strength and the log-ratios of AntiSD as its released code has them: by the teacher's perplexity.

    u' = clip(u 1[|u| <= 2 sigma], -5, 5),   X_i = exp(-mean_t log q(y_t)),   P = 0.93 median X of the warm-up
    A_{i,t} = -lambda_i clip((phi(u'_t) - mean_t phi) / std_t phi, -5, 5)
    lambda_i = g clip(0.2 log(X_i / P), 0, lambda_max),   0 where X_i > 3

lambda_max = 0.5 never binds: with X <= 3 and P >= 1.01, lambda <= 0.2 log(3 / 1.01) = 0.218. The code was read as the
stored text of its launcher and actor, without a commit. Here sigma and X come from whole steps over all processes, not
from micro-batches; a response without a solution has lambda 0 and does not count in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from opd.errors import ConfigError
from opd.pieces import credit
from opd.pieces.memory import SavedAttributes, recalled
from opd.pieces.needs import Input, Reads, needing
from opd.pieces.packed import valid
from opd.pieces.solutions import Solutions, solved
from opd.plugins import torch
from opd.types import Batch, Credit, Gather, MakeMemory

if TYPE_CHECKING:
    from torch import Tensor

LEAST_TARGET = 1.01  # of a perplexity, which is at least 1
LEAST_SIGMA = 1e-6  # in nats


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The launcher's numbers. Perplexities are per token; log-ratios are in nats.

    Raises ConfigError for a number outside its range.
    """

    sensitivity: float = 0.2  # of lambda to log(perplexity / target)
    most: float = 0.5  # the largest lambda
    closes_below: float = 0.93  # target / the warm-up's median perplexity; below the target the gate closes
    opens_above: float = 1.07  # it opens again above this multiple of the median
    spike: float = 3.0  # a response of a higher perplexity has lambda 0
    warm_up: int = 5  # steps with lambda 0
    sigmas: float = 2.0  # log-ratios beyond this many sigma count as 0
    largest: float = 5.0  # a log-ratio is clamped to this
    closes: bool = True  # False: the gate stays open after the warm-up

    def __post_init__(self) -> None:
        if not (0 < self.closes_below <= 1 <= self.opens_above < math.inf and self.warm_up >= 1):
            raise ConfigError(
                "A perplexity gate needs closes_below above 0 and at most 1, opens_above of at least 1, and warm_up of "
                f"at least 1 step; got closes_below {self.closes_below}, opens_above {self.opens_above} and warm_up "
                f"{self.warm_up}."
            )
        if not (0 <= self.most < math.inf and 0 <= self.sensitivity < math.inf):
            raise ConfigError(
                f"The strength must be at least 0 and finite, got sensitivity {self.sensitivity} and most {self.most}."
            )
        if not (self.spike > 1 and self.sigmas > 0 and self.largest > 0):
            raise ConfigError(
                "A perplexity gate needs a spike above 1, and sigmas and a largest log-ratio above 0; got spike "
                f"{self.spike}, sigmas {self.sigmas} and largest {self.largest}."
            )


class PerplexityGate(SavedAttributes):
    """Calibrates sigma and the target perplexity in a warm-up; then opens and closes (2605.11609, released code).

    Over the responses with a solution and their trained tokens, in all processes,

        u       = log q(y_t) - log p(y_t),   X_i = exp(-mean_t log q(y_t)) of response i
        sigma   = mean over the warm-up's steps of std u               (divisor n - 1)
        target  = max(closes_below median, 1.01),   median of the warm-up's means over i of X_i that are below `spike`
        H       = mean of X_i <= spike in the step before this one; the gate closes at H < target, opens at
                  H > opens_above / closes_below target, and else keeps its state; it begins open

    Of an even number the median is the higher of the two middle values; without any mean below `spike` the first step
    after the warm-up gives it. A step without a solution is not counted. As in the released code a single spike
    raises a mean of the warm-up, but is left out of H: with spikes in most steps of the warm-up the gate closes early.
    """

    saved = ("measured", "deviations", "perplexities", "target", "open", "before")

    def __init__(self, solutions: Solutions, settings: Settings) -> None:
        self.solutions, self.settings = solutions, settings
        self.measured = 0  # steps with a solution
        self.deviations: list[float] = []  # std u of the warm-up's steps
        self.perplexities: list[float] = []  # mean X_i of the warm-up's steps, without spikes
        self.target = 0.0  # 0: not yet known
        self.open = True
        self.before: float | None = None  # H of the last step after the warm-up; None: no step, or spikes alone

    @property
    def warm(self) -> bool:
        """Whether the last observed step came after the warm-up."""
        return self.measured > self.settings.warm_up

    @property
    def sigma(self) -> float:
        """The reference deviation of the log-ratios, in nats; of the warm-up so far."""
        return max(sum(self.deviations) / max(len(self.deviations), 1), LEAST_SIGMA)

    def observe(self, batch: Batch, gather: Gather) -> Mapping[str, float]:
        """Learn from this step's log-ratios and perplexities; metrics."""
        mask = batch.mask & solved(self.solutions, batch)[:, None]
        u = valid(batch.teacher_logp - batch.policy_logp, mask).double()
        found = perplexity(batch, mask)[mask.any(1)]
        parts: list[tuple[Tensor, Tensor]] = gather((u.cpu(), found.cpu()))
        ratios, perplexities = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        metrics: dict[str, float] = {}
        if len(perplexities):
            self._learn(ratios, perplexities)
            metrics = self._metrics(ratios, perplexities)
        return metrics | {"gate/open": float(self.open and self.warm)}

    def strengths(self, perplexities: Tensor) -> Tensor:
        """lambda of responses with these perplexities of the teacher, in the last observed step; same shape."""
        if not (self.open and self.warm):
            return torch.zeros_like(perplexities)
        ratio = (perplexities / self.target).clamp(0.5, 3.0)
        found = (self.settings.sensitivity * ratio.log()).clamp(0.0, self.settings.most)
        return found.masked_fill(perplexities > self.settings.spike, 0.0)

    def outlying(self, ratios: Tensor) -> Tensor:
        """Which log-ratios count as 0, bool of the same shape; none in the warm-up."""
        return ratios.abs() > self.settings.sigmas * self.sigma if self.warm else torch.zeros_like(ratios).bool()

    def _learn(self, ratios: Tensor, perplexities: Tensor) -> None:
        """One step: the warm-up's lists, or the target once, and the gate's state."""
        self.measured += 1
        mean, spike = perplexities.mean().item(), self.settings.spike
        if not self.warm:
            self.deviations.append(ratios.std().item() if len(ratios) > 1 else 0.0)
            self.perplexities += [mean] if mean < spike else []
            return
        if not self.target:
            median = sorted(self.perplexities)[len(self.perplexities) // 2] if self.perplexities else mean
            self.target = max(self.settings.closes_below * median, LEAST_TARGET)
        if self.settings.closes and self.before is not None:
            again = self.settings.opens_above / self.settings.closes_below * self.target
            self.open = self.before >= self.target if self.open else self.before > again
        usual = perplexities[perplexities <= spike]
        self.before = usual.mean().item() if len(usual) else None

    def _metrics(self, ratios: Tensor, perplexities: Tensor) -> dict[str, float]:
        return {
            "gate/teacher_perplexity": perplexities.mean().item(),
            "gate/target_perplexity": self.target,
            "gate/spike_share": (perplexities > self.settings.spike).double().mean().item(),
            "gate/sigma": self.sigma,
            "gate/outlying_share": self.outlying(ratios).double().mean().item(),
            "gate/strength": self.strengths(perplexities).mean().item(),
        }


def perplexity_gate(solutions: Solutions, settings: Settings | None = None) -> MakeMemory:
    """A maker of `PerplexityGate`."""
    made = partial(PerplexityGate, solutions, settings or Settings())
    return needing(made, Reads.TEACHER_LOGP, Reads.POLICY_LOGP, Input.REWARD, Input.GROUP)


def perplexity(batch: Batch, mask: Tensor) -> Tensor:
    """exp(-mean log q(y_t)) over the tokens of `mask` [B, T], per response: [B] in float64; 1 without a token."""
    logp = batch.teacher_logp.masked_fill(~mask, 0.0).double()
    return (-logp.sum(1) / mask.sum(1).clamp(min=1)).exp()


def strengths(batch: Batch) -> Tensor:
    """lambda by response, [B, 1], from the memory `gate`. Raises ConfigError if the method has no such memory."""
    gate = recalled(batch.memory, "gate", PerplexityGate)
    return gate.strengths(perplexity(batch, batch.mask))[:, None].to(batch.teacher_logp.dtype)


def moderated(batch: Batch) -> Tensor:
    """u = log q(y) - log p(y), [B, T]: 0 where it is outlying, else clamped; from the memory `gate`, as `strengths`."""
    gate = recalled(batch.memory, "gate", PerplexityGate)
    u = batch.teacher_logp - batch.policy_logp
    return u.masked_fill(gate.outlying(u), 0.0).clamp(-gate.settings.largest, gate.settings.largest)


def gated_ascent(
    found: Solutions, ascent: Callable[..., Credit], strength: float, *, closes_below: float, warm_up: int, closes: bool
) -> tuple[MakeMemory, Credit]:
    """The maker of the memory `gate`, and the credit of the formulas above; without `closes` the gate stays open.

    `ascent` is `credit.diverge_from_teacher` with its other arguments. Raises ConfigError as `Settings` and it.
    """
    settings = Settings(most=strength, closes_below=closes_below, warm_up=warm_up, closes=closes)
    even = credit.standardised(ascent(1.0, ratio=moderated), bound=5.0)
    return perplexity_gate(found, settings), credit.scale(strengths, even)
