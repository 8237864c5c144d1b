"""Two kinds of rows in one step: each with its own pieces and denominator, and a sum that does not depend on splits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from support.models import Gradient, gradient_of, rollout_of, step, teacher_of, tiny, writers_of
from torch import Tensor

from opd.errors import ConfigError
from opd.loss.step import PhaseA, scored, written
from opd.maths.metrics import Metrics
from opd.method import Method, Part
from opd.methods.coherence import Facts, broken
from opd.models.language_model import LanguageModel
from opd.parallel import World
from opd.pieces import contexts, filters, normalise, signals, solutions, sources, supports, teacher_rules
from opd.types import Batch, Prompt, Rollout, Sampling, Teacher

FACTOR = 2.5
OWN = {"support": supports.top_k(3, by="teacher"), "signal": signals.divergence("reverse_kl")}
PARTS = {
    "sampled": Method(signal=signals.sampled_reverse_kl(), normalise=normalise.per("token")),
    "top k": Method(support=supports.top_k(5), signal=signals.divergence("forward_kl"), normalise=normalise.per(7)),
    "full": Method(support=supports.full(), signal=signals.divergence("generalised_jsd"), temperature=0.7),
}
SPLIT = 1e-6


def method(part: Method, factor: float = FACTOR) -> Method:
    return Method(**OWN, parts={"other": Part(method=part, factor=factor)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    method: Method
    student: LanguageModel
    teacher: Teacher
    rollouts: list[Rollout]


def scene(part: Method, factor: float = FACTOR) -> Scene:
    """Two own rows and three of the part, in mixed order, of different lengths, some tokens untrained."""
    student, external = tiny(padding_rows=3), tiny(seed=1, hidden=24)
    student.model.double()
    external.model.double()
    made = method(part, factor)
    rows = [("a", [2, 3, 4], ""), ("ab", [5, 6], "other"), ("c", [7, 2, 3, 4, 5], ""), ("d", [3], "other")]
    rows.append(("efg", [4, 4, 5, 6, 2, 3], "other"))
    rollouts = [
        rollout_of(
            student,
            Prompt(id=i, content=text),
            ids,
            trained=[t != 1 for t in range(len(ids))],
            part=name,
            policy_logp=torch.full((len(ids),), -1.0),
            sampler_logp=torch.full((len(ids),), -1.0),
        )
        for i, (text, ids, name) in enumerate(rows)
    ]
    return Scene(method=made, student=student, teacher=teacher_of(made, student, external), rollouts=rollouts)


def stepped(on: Scene, rollouts: Sequence[Rollout] | None = None, micro_batch_tokens: int = 10**6) -> Gradient:
    return step(on.method, on.student, on.teacher, list(rollouts or on.rollouts), micro_batch_tokens)


def of_part(on: Scene, name: str) -> list[Rollout]:
    return [replace(rollout, part="") for rollout in on.rollouts if rollout.part == name]


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_step_is_the_sum_of_two_steps(part: Method):
    on = scene(part)
    own = step(Method(**OWN), on.student, on.teacher, of_part(on, ""))
    other = step(part, on.student, on.teacher, of_part(on, "other"))
    both = stepped(on)
    assert both.loss == pytest.approx(own.loss + FACTOR * other.loss, rel=SPLIT)
    sums = {name: own.grads[name] + FACTOR * other.grads[name] for name in own.grads}
    assert both.distance(Gradient(loss=both.loss, grads=sums)) < SPLIT
    assert min(own.norm, other.norm) > 1e-3


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_step_does_not_depend_on_splits_or_row_order(part: Method):
    on = scene(part)
    whole = stepped(on)
    for tokens in (1, 9):
        assert stepped(on, micro_batch_tokens=tokens).distance(whole) < SPLIT
    for order in ([4, 3, 2, 1, 0], [1, 3, 4, 0, 2]):
        assert stepped(on, [on.rollouts[i] for i in order]).distance(whole) < SPLIT


class Halves(World):
    """What one of two processes sees, with the sums of both."""

    def __init__(self, sums: Sequence[float]) -> None:
        super().__init__()
        object.__setattr__(self, "sums", list(sums))

    def sum(self, value: float) -> float:
        return self.sums.pop(0)  # type: ignore[attr-defined]

    def any(self, flag: bool) -> bool:
        return True


@pytest.mark.parametrize("cut", [[0, 1], [0, 1, 2], [0, 2], [1, 0, 3, 4]])
def test_processes_with_and_without_rows_of_a_part_add_up(cut: list[int]):
    """Each process's gradient with the counts of both: their sum is that of one process."""
    on = scene(PARTS["top k"])
    whole = stepped(on)
    phase = phase_of(on, on.rollouts)
    sums = [phase.parts["other"].count * FACTOR, phase.count]
    halves = [[on.rollouts[i] for i in cut], [r for i, r in enumerate(on.rollouts) if i not in cut]]
    total: dict[str, Tensor] = {}
    for half in halves:
        if not any(not rollout.part for rollout in half):
            half = [*half, replace(on.rollouts[0], trained=torch.zeros(3, dtype=torch.bool))]
        mine = phase_of(on, half, Halves(sums))
        got = gradient_of(
            on.method,
            on.student,
            on.teacher,
            mine.batch,
            replace(mine.denominator, count=mine.count),
            parts=mine.parts,
        )
        total = {name: grad + total.get(name, torch.zeros_like(grad)) for name, grad in got.grads.items()}
    assert Gradient(loss=0.0, grads=total).distance(whole) < SPLIT


def phase_of(on: Scene, rollouts: Sequence[Rollout], world: World | None = None) -> PhaseA:
    request = on.method.request(shown=True)
    read = on.method.context(rollouts)
    more: dict[str, Any] = {} if world is None else {"world": world}
    return scored(on.method, on.teacher, rollouts, read, request, on.student.device, **more)


def test_more_rows_of_a_part_do_not_change_its_factor():
    """A mean over its rows: the same rows twice are the same term."""
    on = scene(PARTS["sampled"])
    twice = [*on.rollouts, *(rollout for rollout in on.rollouts if rollout.part)]
    assert stepped(on, twice).distance(stepped(on)) < SPLIT


@pytest.mark.parametrize("missing", ["no rows", "no trained token"])
def test_part_without_trained_tokens_adds_nothing(missing: str):
    on = scene(PARTS["top k"])
    own = step(Method(**OWN), on.student, on.teacher, of_part(on, ""))
    if missing == "no rows":
        rollouts = [rollout for rollout in on.rollouts if not rollout.part]
    else:
        rollouts = [replace(r, trained=torch.zeros_like(r.trained)) if r.part else r for r in on.rollouts]
    got = stepped(on, rollouts)
    assert got.distance(own) < SPLIT
    assert math.isfinite(got.loss)


def test_weights_and_credits_see_the_rows_of_their_part_alone():
    seen: list[list[str]] = []

    def weight(batch: Batch) -> Tensor:
        seen.append([rollout.part for rollout in batch.rollouts])
        return torch.full(batch.mask.shape, float(len(seen)))

    part = replace(PARTS["top k"], weight=weight)
    on = scene(part)
    phase_of(replace(on, method=replace(on.method, weight=weight)), on.rollouts)
    assert seen == [["other"] * 3, [""] * 2]


def test_written_filters_and_rewards_own_rows_alone():
    on = scene(PARTS["top k"])
    seen: list[int] = []

    def source(prompts: Any, writers: Any, seed: Any, record: Any) -> list[Rollout]:
        return [replace(r, reward=0.25) if r.part else r for r in on.rollouts]

    def reward(rollouts: Sequence[Rollout]) -> list[Rollout]:
        seen.extend(rollout.prompt.id for rollout in rollouts)
        return [replace(rollout, reward=0.0) for rollout in rollouts]

    made = replace(on.method, source=source, filter=filters.first_passing(filters.correct()))
    writers = replace(writers_of(on.student, None, Sampling()), complete=lambda rollouts, record: list(rollouts))
    got = written(made, [], writers, reward, (0, 0))
    assert seen == [0, 2]
    assert [rollout.part for rollout in got] == ["", "", "other", "other", "other"]
    assert [rollout.reward for rollout in got] == [0.0, 0.0, 0.25, 0.25, 0.25]
    assert [bool(rollout.trained.any()) for rollout in got] == [False, False, True, True, True]


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_part_refuses_a_factor_that_is_not_above_zero(factor: float):
    with pytest.raises(ConfigError, match=r"Part 'other' of the method has the factor .* above 0"):
        method(PARTS["sampled"], factor)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source", sources.dataset()),
        ("filter", filters.first_passing()),
        ("context", contexts.privileged(system="7")),
        ("teacher", teacher_rules.self_live()),
    ],
)
def test_part_refuses_what_the_whole_method_decides(name: str, value: Any):
    with pytest.raises(ConfigError, match=rf"Part 'other' of the method sets {name}, which the whole method decides"):
        method(replace(PARTS["sampled"], **{name: value}))


def test_rules_refuse_parts_with_two_tokenizers_and_with_groups():
    made = method(PARTS["sampled"])
    two = replace(made, teacher=teacher_rules.external(tokenizer="any"), support=supports.units())
    rule = broken(Facts(method=two))
    assert rule is not None
    assert "another tokenizer" in rule.what
    shown = contexts.privileged(template="{prompt}{privileged_context}", solutions=solutions.from_peers())
    rule = broken(Facts(method=replace(made, context=shown)))
    assert rule is not None
    assert "rows that another wrote" in rule.what


def test_needs_of_a_method_include_those_of_its_parts():
    part = Method(support=supports.top_k(4, by="student"), signal=signals.divergence("reverse_kl"))
    made = method(part)
    assert made.record().top_k == 4
    assert made.needs.traits >= part.needs.traits


def test_metrics_under_a_prefix():
    metrics = Metrics()
    metrics.mean("train/signal", 3.0, 2.0)
    assert metrics.under("part/other/").reduce() == {"part/other/train/signal": 1.5}
