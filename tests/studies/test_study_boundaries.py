"""Data, rewards and signal measures of the studies of markers and lengths, against plain Python."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from support.tiny_pair import TINY

from opd.errors import ConfigError
from opd.types import Prompt
from opd_studies.claims import length, special_tokens
from opd_studies.lab import distilling, signal_depth, signal_shares
from opd_studies.lab.ablation import START
from opd_studies.lab.lab import Lab
from opd_studies.lab.on_policy_batch import OnPolicyBatch
from opd_studies.worlds import boundaries


def test_marked_places_markers_and_moves_read_ones_to_prompt():
    plain = list(boundaries.marked(6, "<a:"))
    both = list(boundaries.marked(6, "<a:", times=2))
    read = list(boundaries.marked(6, "[b:", times=2, read="<a:"))
    for one, two, begun in zip(plain, both, read, strict=True):
        answer = one["answer"]
        assert sorted(one["prompt"][:5]) == list(answer)
        assert one["response"] == f"<a:{answer}"
        assert two["response"] == f"<a:{answer[:3]}<a:{answer[3:]}"
        assert (begun["prompt"] + begun["response"]).replace("<a:", "[b:") == one["prompt"] + two["response"].replace(
            "<a:", "[b:"
        )
        assert "<a:" not in begun["response"]
    assert [row["prompt"][6:].count("<a:") for row in read] == [0, 1, 0, 2, 0, 1]
    with pytest.raises(ConfigError, match="rows of 1 digits"):
        list(boundaries.marked(6, "<a:", digits=1))


@pytest.mark.parametrize(
    ("response", "reward"),
    [("<a:12458", 1), ("[b:124[b:58", 1), ("12458", 1), ("a:12458<a", 1), ("<a:12485", 0), ("<a:124581", 0)],
)
def test_beside_markers_ignores_markers(response: str, reward: float):
    assert boundaries.beside_markers(Prompt(id=0, content="58142>", answer="12458"), response) == reward


def test_rambling_continues_with_other_rows_to_length():
    for row in boundaries.rambling(5, longest=40, seed=3):
        own, *others = row["response"].split(";")
        assert own == row["answer"] == "".join(sorted(row["prompt"][:-1]))
        for other in others[:-1]:
            asked, answer = other.split(">")
            assert "".join(sorted(asked)) == answer
        assert len(row["response"]) == 40


@pytest.mark.parametrize(
    ("response", "reward"),
    [("12458;90210>0", 1), ("12458", 1), ("12458 ;", 1), ("1245", 0), ("124588;", 0), ("", 0), (";12458", 0)],
)
def test_first_answer_rewards_first_answer_alone(response: str, reward: float):
    assert boundaries.first_answer(Prompt(id=0, content="58142>", answer="12458"), response) == reward


def test_shares_equal_plain_loop():
    generator = torch.Generator().manual_seed(0)
    n, v, k = 6, 5, 2
    batch = OnPolicyBatch(
        student=torch.randn(n, v, generator=generator, dtype=torch.float64),
        teacher=torch.randn(n, v, generator=generator, dtype=torch.float64).log_softmax(-1),
        hidden=torch.randn(n, 3, generator=generator, dtype=torch.float64),
    )
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    marker = torch.tensor([True, True, False, False, True, False])
    first = torch.tensor([True, False, False, False, True, False])
    found = signal_shares.shares(batch, y, marker, first=first, k=k)

    def chances(logits: list[float]) -> list[float]:
        total = math.fsum(map(math.exp, logits))
        return [math.exp(z) / total for z in logits]

    sizes: dict[str, dict[bool, list[list[float]]]] = {
        name: {side: [[0.0] * 3 for _ in range(v)] for side in (True, False)} for name in ("sampled", "matched")
    }
    ratios = {True: 0.0, False: 0.0}
    for t in range(n):
        p, log_q = chances(batch.student[t].tolist()), batch.teacher[t].tolist()
        side, token = bool(marker[t]), int(y[t])
        ratio = log_q[token] - math.log(p[token])
        ratios[side] += abs(ratio)
        top = sorted(range(v), key=lambda i: -log_q[i])[:k]
        ours, theirs = (chances([values[i] for i in top]) for values in (batch.student[t].tolist(), log_q))
        logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
        value = math.fsum(a * one for a, one in zip(ours, logs, strict=True))
        for i in range(v):
            sampled = -ratio * ((i == token) - p[i])
            matched = ours[top.index(i)] * (logs[top.index(i)] - value) if i in top else 0.0
            for j in range(3):
                sizes["sampled"][side][i][j] += sampled * float(batch.hidden[t, j])
                sizes["matched"][side][i][j] += matched * float(batch.hidden[t, j])

    def share(name: str) -> float:
        norms = {side: math.sqrt(math.fsum(x * x for row in rows for x in row)) for side, rows in sizes[name].items()}
        return norms[True] / (norms[True] + norms[False])

    assert found["share of tokens"] == pytest.approx(0.5)
    assert found["share of log-ratio"] == pytest.approx(ratios[True] / (ratios[True] + ratios[False]))
    assert found["share of gradient"] == pytest.approx(share("sampled"))
    assert found["share of gradient, local support matching"] == pytest.approx(share("matched"))
    expected = [math.log(chances(batch.student[t].tolist())[int(y[t])]) for t in (0, 4)]
    assert found["log p"] == pytest.approx(sum(expected) / 2)
    assert found["log q"] == pytest.approx((float(batch.teacher[0, 0]) + float(batch.teacher[4, 4])) / 2)


def test_right_tokens_compare_with_worked_response_by_place():
    assert signal_depth.right_tokens([5, 6, 7], [5, 9, 7, 1]) == [True, False, True]
    assert signal_depth.right_tokens([5, 9, 7, 1, 4], [5, 9, 7, 1]) == [True, True, True, True, False]


def test_areas_equal_pair_counts():
    rng = random.Random(0)
    rows = [(rng.gauss(0, 1), rng.random() < 0.5, rng.randrange(8), rng.random() < 0.5) for _ in range(300)]
    scores, right, step, clean = (list(column) for column in zip(*rows, strict=True))
    found = signal_depth.areas(torch.tensor(scores), torch.tensor(right), torch.tensor(step), torch.tensor(clean))

    def area(chosen: list[int]) -> float:
        pairs = [scores[i] > scores[j] for i in chosen if right[i] for j in chosen if not right[j]]
        return sum(pairs) / len(pairs)

    for i, part in enumerate(signal_depth.PARTS[:3]):
        inside = [n for n in range(300) if min(step[n] // 2, 2) == i]
        assert found[f"AUROC, {part}"] == pytest.approx(area(inside))
    assert found["AUROC, before an error"] == pytest.approx(area([n for n in range(300) if clean[n]]))
    assert found["AUROC, after an error"] == pytest.approx(area([n for n in range(300) if not clean[n]]))
    nothing = signal_depth.areas(
        torch.ones(2), torch.ones(2, dtype=torch.bool), torch.zeros(2), torch.ones(2, dtype=torch.bool)
    )
    assert all(math.isnan(value) for value in nothing.values())


def test_special_tokens_and_length_run_at_reduced_size(tmp_path, monkeypatch):
    monkeypatch.setattr(distilling, "HELD_OUT", 4)
    monkeypatch.setattr(signal_shares, "HELD_OUT", 4)
    monkeypatch.setattr(signal_depth, "HELD_OUT", 4)
    case = special_tokens.Case(spelling="student", runs={"sampled token": ("first",)}, student_steps=2)
    monkeypatch.setattr(special_tokens, "CASES", {"B": case})
    monkeypatch.setattr(length, "CAPS", {"B": {"half": (3, 0.5)}})
    lab = Lab(folder=tmp_path, workers=1)
    marked = special_tokens.measure(lab, special_tokens.Size(seeds=(0,), steps=2, prompts_per_step=4, pair=TINY))
    assert list(marked) == [f"B: {START}", "B: sampled token, mask first"]
    assert set(special_tokens.SHARES) < set(marked[f"B: {START}"])
    assert {"sampled accuracy", "own marker"} < set(marked["B: sampled token, mask first"])
    caps = length.measure(lab, length.Size(seeds=(0,), steps=4, prompts_per_step=4, pair=TINY))
    assert list(caps) == [f"B: {START}", "B: half"]
    assert set(length.DEPTHS) < set(caps[f"B: {START}"])
    assert 0 < caps["B: half"]["tokens"][0] <= 2 * 4 * 3


def test_over_time_gives_fall_from_best_to_end():
    rows = [{"train/tokens": 3.0}, {"train/tokens": 4.0}]
    evaluations = [{"eval/sampled/reward": value} for value in (0.2, 0.7, 0.5)]
    run = distilling.Trained(model=Path(), before={}, after={}, last={}, rows=rows, evaluations=evaluations)
    assert length.over_time(run) == {"fall": pytest.approx(0.2), "tokens": 7.0}
