"""The prefix-continuation probe: can the teacher still finish a response that the student has begun?

The teacher continues from the student's own tokens, cut at several depths, and alone from the prompt. arXiv 2604.13016
section 6.1 measures its gain over the student by depth (almost none at 16K tokens); arXiv 2605.11182 App. A.22 measures
its loss against its accuracy alone (62 % to 46 % after prefixes of a weaker student).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opd.errors import ConfigError, DataError
from opd.maths.intervals import SHARE, Interval, mean_interval
from opd.rewards.base import rewarded
from opd.samplers.hf import TransformersSampler
from opd.types import Prompt, Reward, Rollout, Sampling, Teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Transitions:
    """Counts by whether the teacher is right alone (first word) and after the student's prefix (second word)."""

    right_right: int
    right_wrong: int
    wrong_right: int
    wrong_wrong: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """The probe at one depth. All accuracies are over the same responses and their prompts, with 95 % intervals."""

    depth: int | float  # tokens, or a share of the response
    responses: int  # at least that long
    too_short: int  # responses left out
    prefix_length: float  # mean, tokens
    continuing: Interval  # the teacher after the student's prefix
    alone: Interval  # the teacher from the prompt
    student: Interval  # the student's own responses
    transitions: Transitions  # alone -> continuing
    finished_share: float  # of the continuations; the others were cut at the limit

    @property
    def gain(self) -> float:
        """The teacher's gain over the student's accuracy from this depth on: arXiv 2604.13016 section 6.1."""
        return self.continuing.mean - self.student.mean

    @property
    def change(self) -> float:
        """The effect of the student's prefix on the teacher's accuracy, mostly < 0: arXiv 2605.11182 App. A.22."""
        return self.continuing.mean - self.alone.mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """Results of the probe; `unreached`: depths longer than every response."""

    alone: Interval
    student: Interval
    depths: tuple[Depth, ...]
    unreached: tuple[int | float, ...]


def continuation(
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    depths: Sequence[int | float],
    reward: Reward,
    *,
    sampling: Sampling,
    contexts: Sequence[Prompt] | None = None,
    seed: int = 0,
) -> Continuation:
    """The teacher's accuracy alone and after prefixes of the student's `rollouts`, cut at each of `depths`.

    A depth is a number of tokens (int) or a share of the response (float in [0, 1]), without its end-of-sequence token.
    The teacher reads `contexts` (one per rollout; default: the rollouts' prompts) in its own template, then exactly the
    student's token ids. `sampling.max_completion_length` limits the continuation alone, so every depth has the same
    limit; n must be 1. Random numbers are a function of (seed, prompt, index of the depth).

    Intervals are over prompts (`intervals.mean_interval`).
    Raises ConfigError for an invalid depth, n > 1, or a reward other than 0 and 1; DataError without rollouts or when
    prefix and continuation exceed the model's positions.
    """
    _check(rollouts, depths, sampling)
    reads = [r.prompt for r in rollouts] if contexts is None else list(contexts)
    own = _right(reward, rollouts)
    first = {rollout.prompt.id: i for i, rollout in reversed(list(enumerate(rollouts)))}
    written = _continued(teacher, rollouts, reads, dict.fromkeys(first.values(), ()), sampling, (seed, 0))
    by_prompt = dict(zip(first, _right(reward, written), strict=True))
    alone = [by_prompt[rollout.prompt.id] for rollout in rollouts]
    found: list[Depth] = []
    unreached: list[int | float] = []
    for place, depth in enumerate(depths, start=1):
        cuts = {i: cut for i, r in enumerate(rollouts) if (cut := prefix_of(r, depth, teacher.lm.stop_ids)) is not None}
        if not cuts:
            unreached.append(depth)
            continue
        continued = _continued(teacher, rollouts, reads, cuts, sampling, (seed, place))
        found.append(_at_depth(depth, rollouts, cuts, continued, _right(reward, continued), alone, own))
    return Continuation(
        alone=_accuracy(rollouts, {i: alone[i] for i in first.values()}),
        student=_accuracy(rollouts, dict(enumerate(own))),
        depths=tuple(found),
        unreached=tuple(unreached),
    )


def _at_depth(
    depth: int | float,
    rollouts: Sequence[Rollout],
    cuts: Mapping[int, tuple[int, ...]],
    continued: Sequence[Rollout],
    right: Sequence[bool],
    alone: Sequence[bool],
    own: Sequence[bool],
) -> Depth:
    """The result at one depth. `continued`, `right`: of the rollouts in `cuts`. `alone`, `own`: of all rollouts."""
    continuing = dict(zip(cuts, right, strict=True))
    pairs = [(alone[i], value) for i, value in continuing.items()]
    return Depth(
        depth=depth,
        responses=len(cuts),
        too_short=len(rollouts) - len(cuts),
        prefix_length=sum(map(len, cuts.values())) / len(cuts),
        continuing=_accuracy(rollouts, continuing),
        alone=_accuracy(rollouts, {i: alone[i] for i in cuts}),
        student=_accuracy(rollouts, {i: own[i] for i in cuts}),
        transitions=Transitions(
            right_right=pairs.count((True, True)),
            right_wrong=pairs.count((True, False)),
            wrong_right=pairs.count((False, True)),
            wrong_wrong=pairs.count((False, False)),
        ),
        finished_share=sum(rollout.finished for rollout in continued) / len(continued),
    )


def prefix_of(rollout: Rollout, depth: int | float, stop_ids: frozenset[int]) -> tuple[int, ...] | None:
    """The first tokens of a response, without an end token; None if it has fewer than `depth` tokens."""
    ids = rollout.response_ids.tolist()
    ids = ids[:-1] if ids and ids[-1] in stop_ids else ids
    if isinstance(depth, int):
        return tuple(ids[:depth]) if depth <= len(ids) else None
    return tuple(ids[: int(depth * len(ids))])


def _check(rollouts: Sequence[Rollout], depths: Sequence[int | float], sampling: Sampling) -> None:
    if not rollouts:
        raise DataError("The continuation probe needs responses of the student, and got none.")
    bad = [d for d in depths if isinstance(d, bool) or (not 0 <= d <= 1 if isinstance(d, float) else d < 0)]
    if bad or not depths:
        raise ConfigError(
            f"A depth is a number of tokens (an int, at least 0) or a share of the response (a float in [0, 1]); got "
            f"{bad or 'none'}. Give e.g. depths=[0.25, 0.5, 0.75] or [64, 128]."
        )
    if sampling.n != 1:
        raise ConfigError(
            f"The continuation probe writes one continuation per prefix, and sampling.n is {sampling.n}. Set n to 1, "
            "and give more responses of the student instead."
        )


def _continued(
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    contexts: Sequence[Prompt],
    prefixes: Mapping[int, tuple[int, ...]],
    sampling: Sampling,
    seed: tuple[int, int],
) -> list[Rollout]:
    """The teacher's continuations of `prefixes`, by index of the rollout."""
    off: Any = teacher.lm.model.disable_adapter() if teacher.base else contextlib.nullcontext()  # type: ignore[operator]
    with off:
        written = TransformersSampler(lm=teacher.lm, sampling=sampling)(
            [contexts[i] for i in prefixes], seed=seed, prefixes=list(prefixes.values())
        )
    return [replace(one, prompt=rollouts[i].prompt) for i, one in zip(prefixes, written, strict=True)]


def _right(reward: Reward, rollouts: Sequence[Rollout]) -> list[bool]:
    values = [rollout.reward for rollout in rewarded(reward, rollouts)]
    for rollout, value in zip(rollouts, values, strict=True):
        if value not in (0.0, 1.0):
            raise ConfigError(
                f"The continuation probe counts right and wrong responses, and the reward gave {value} on prompt "
                f"{rollout.prompt.id}. Use a reward that is 0 or 1."
            )
    return [value == 1.0 for value in values]


def _accuracy(rollouts: Sequence[Rollout], right: Mapping[int, bool]) -> Interval:
    """The share of right responses, with its interval over prompts. `right` is by index of the rollout."""
    by_prompt: dict[int, list[float]] = {}
    for i, value in right.items():
        by_prompt.setdefault(rollouts[i].prompt.id, []).append(float(value))
    return mean_interval([sum(values) / len(values) for values in by_prompt.values()], SHARE)
