"""The weights of turns: against the paper's product, on turns without a scored token, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any, Literal

import oracle
import pytest
import torch
from support.models import rollout_of, scored_rows, tiny
from torch import Tensor

from opd import methods
from opd.errors import ConfigError
from opd.pieces import filters, turns
from opd.pieces.credit import discounted, log_ratio
from opd.types import Batch, Prompt, Rollout

TRAINED = [
    [True, True, False, True, False, False, True],
    [False, True, True],
    [True],
    [False, False],
]
TURNS = [[0, 0, -1, 1, -1, -1, 2], [-1, 0, 0], [0], [-1, -1]]


def scored(trained: list[list[bool]] = TRAINED, **options: Any) -> Batch:
    return scored_rows(methods.build("sod", options), trained)


def apart(batch: Batch, row: int) -> list[float]:
    """d_k of a response, by hand."""
    ratio = log_ratio(batch)[row].tolist()
    numbers = turns.turn_of(batch)[row].tolist()
    known = [[abs(u) for u, n in zip(ratio, numbers, strict=True) if n == k] for k in range(max(numbers) + 1)]
    return [math.fsum(sizes) / len(sizes) for sizes in known]


def test_turns_are_runs_of_own_tokens():
    got = turns.turn_of(scored())
    for row, expected in enumerate(TURNS):
        assert got[row, : len(expected)].tolist() == expected
        assert bool((got[row, len(expected) :] == -1).all())


def test_turns_end_where_an_answer_is_empty():
    batch = scored([[True] * 4])
    rollout = replace(batch.rollouts[0], turn=torch.tensor([0, 0, 1, 1]))
    assert turns.turn_of(replace(batch, rollouts=(rollout,))).tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("bound", [0.0, 0.2, 3.0])
@pytest.mark.parametrize("reference", ["first", "batch"])
def test_weights_equal_the_papers_product(bound: float, reference: turns.Reference):
    batch = scored(bound=bound, reference=reference)
    firsts = [apart(batch, row)[0] for row in range(3)]
    mean = None if reference == "first" else math.fsum(firsts) / 3
    got = turns.weighed(discounted(0.0))(batch)
    for row in range(3):
        expected = oracle.turn_weights(apart(batch, row), 1e-6, bound, mean)
        ratio, numbers = log_ratio(batch)[row], turns.turn_of(batch)[row]
        for t, number in enumerate(numbers.tolist()):
            assert got[row, t].item() == pytest.approx(0.0 if number < 0 else expected[number] * ratio[t].item(), 1e-5)
    assert bool((got[3] == 0).all())


def test_turn_without_a_scored_token_is_skipped():
    """d of the turns around it are unchanged, and the reference is the first turn that has one."""
    batch = scored()
    mask = batch.mask.clone()
    mask[0, 3] = False  # the second turn of the first response
    d = turns.divergences(replace(batch, mask=mask))[0]
    assert d[1].isnan()
    assert d[[0, 2]].tolist() == pytest.approx([apart(batch, 0)[0], apart(batch, 0)[2]])
    mask[0, :2] = False
    assert turns.first_divergences(turns.divergences(replace(batch, mask=mask)))[0].item() == pytest.approx(
        apart(batch, 0)[2]
    )


def test_one_turn_is_plain_distillation():
    batch = scored([[True, True, True], [False, True, True]], reward=0.0)
    got, plain = methods.build("sod", {"reward": 0.0}).credit(batch), discounted(0.0)(batch)
    assert torch.equal(got[batch.mask], plain[batch.mask])


def test_agreement_on_the_first_turn_mutes_later_ones():
    """The trap of the formula: d_1 = 0 leaves no distillation; the metrics say it, and `batch` is without it."""
    batch = scored([[True, False, True], [True, False, True]])
    first = batch.teacher_logp.clone()
    first[0, 0] = batch.policy_logp[0, 0]
    batch = replace(batch, teacher_logp=first)

    def weight(reference: turns.Reference) -> tuple[Tensor, dict[str, float]]:
        memory = turns.TurnWeights(reference, 1e-6, 0.2)
        metrics = dict(memory.observe(batch, lambda own: [own]))
        return memory.of(turns.divergences(batch)), metrics

    w, metrics = weight("first")
    assert 0 < w[0, 1].item() < 1e-5
    assert metrics["sod/muted"] == 0.5
    assert metrics["sod/turns"] == 2.0
    w, metrics = weight("batch")
    assert w[0, 1].item() > 0.01
    assert metrics["sod/muted"] == 0.0


@pytest.mark.parametrize("reference", ["first", "batch"])
def test_metrics_are_those_of_all_processes(reference: turns.Reference):
    batch = scored()
    whole = turns.TurnWeights(reference, 1e-6, 0.2)
    expected = whole.observe(batch, lambda own: [own])
    halves = [rows_of(batch, rows) for rows in ([0], [1, 2])]

    def memory() -> turns.TurnWeights:
        return turns.TurnWeights(reference, 1e-6, 0.2)

    sent: list[list[Any]] = [[], []]  # by process, what it gives to each gather, in order
    with ThreadPoolExecutor(2) as pool:
        meet = Barrier(2)

        def observe(rank: int) -> Mapping[str, float]:
            def gather(own: Any) -> list[Any]:
                sent[rank].append(own)
                meet.wait()
                return [values[len(sent[rank]) - 1] for values in sent]

            return memory().observe(halves[rank], gather)

        for got in pool.map(observe, range(2)):
            assert got == pytest.approx(expected)


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    changed = {name: getattr(batch, name)[rows] for name in ("response_ids", "mask", "policy_logp", "teacher_logp")}
    return replace(batch, rollouts=tuple(batch.rollouts[row] for row in rows), **changed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epsilon": 0.0}, "epsilon above 0"),
        ({"bound": -0.1}, "bound of at least 0"),
        ({"strength": 0.0}, "Without distillation the method is `grpo`"),
        ({"reward": -1.0}, "at least 0"),
        ({"reference": "last"}, "reference"),
    ],
)
def test_sod_refuses_options(options: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        methods.build("sod", options)


def spoken(turn: list[int], trained: list[bool], version: int) -> Rollout:
    return replace(
        rollout_of(tiny(), Prompt(id=0, content="ab"), [2] * len(turn), trained=trained),
        turn=torch.tensor(turn),
        sampler_version=version,
    )


@pytest.mark.parametrize(
    ("version", "end", "expected"),
    [
        (0, "front", [0, 1]),
        (4, "front", [0, 1]),
        (5, "front", [0, 1, 4]),
        (10, "front", [0, 1, 4, 7]),
        (99, "front", [0, 1, 4, 7]),
        (0, "back", [7]),
        (5, "back", [4, 7]),
    ],
)
def test_curriculum_trains_more_turns_with_the_steps(version: int, end: Literal["front", "back"], expected: list[int]):
    """The answer after turn 1 and the turn 2 without own tokens do not count."""
    turn, trained = [0, 0, 0, 1, 1, 1, 2, 3], [True, True, False, False, True, False, False, True]
    (kept,) = filters.turns_up_to(1, 5, 3, end)([spoken(turn, trained, version)])
    assert kept.trained.nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("options", [{"first": 0}, {"every": 0}, {"first": 3, "most": 2}])
def test_tcod_refuses_options(options: dict[str, Any]):
    with pytest.raises(ConfigError, match="A curriculum of turns begins with at least 1"):
        methods.build("tcod", options)


def test_tcod_combines_with_sod():
    method = methods.build("sod+tcod", {"tcod": {"first": 1, "every": 3}})
    (kept,) = method.filter([spoken([0, 1], [True, True], 2)])
    assert kept.trained.tolist() == [True, False]
