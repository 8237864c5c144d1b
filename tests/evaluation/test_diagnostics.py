"""What a step logs for nothing: against loops over its tokens, however the step is split, and only what exists."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from support.models import prompts_of, tiny, unscored, writers_of

from opd.evaluation import diagnostics
from opd.evaluation.buckets import Buckets
from opd.evaluation.compare import Comparison
from opd.loss.collate import collate
from opd.maths.metrics import Metrics, merged
from opd.method import Method
from opd.methods import build
from opd.models.language_model import LanguageModel
from opd.pieces import supports
from opd.pieces.needs import Input, Reads, needing
from opd.pieces.signals import nll
from opd.pieces.teacher_rules import no_teacher
from opd.teachers.local import LocalTeacher, local_teacher
from opd.types import Batch, Record, Rollout, Sampling, ScoreRequest

BUCKETS = Buckets.over(2, 8)
PAGE = Path(__file__).parents[2] / "docs" / "diagnostics.md"


class Pair:
    """A student, a teacher, and responses of the student with rewards, some tokens masked."""

    def __init__(self, temperature: float = 1.0) -> None:
        self.student = tiny(name="student")
        self.external = tiny(seed=1, hidden=24, name="teacher")
        self.sampling = Sampling(max_completion_length=8, n=4, temperature=temperature)

    def write(self, record: Record | None = None, reward: Sequence[float | None] = (0.0, 1.0)) -> list[Rollout]:
        writers = writers_of(self.student, self.external, self.sampling)
        written = writers.student(prompts_of("ab", "hgf", "c"), seed=(0, 0), record=record or Record())
        out: list[Rollout] = []
        for i, rollout in enumerate(written):
            trained = torch.arange(len(rollout.response_ids)) % 3 != 1
            out.append(replace(rollout, trained=trained & (i != 5), reward=reward[i % len(reward)]))
        return out

    def teacher(self) -> LocalTeacher:
        rule = Method(signal=nll()).teacher
        made = local_teacher(rule, self.student, self.external, micro_batch_tokens=64)
        assert made is not None
        return made

    def batch(self, method: Method, rollouts: list[Rollout], *, entropy: bool = False) -> Batch:
        contexts = method.context(rollouts)
        scores = self.teacher().score(
            rollouts, contexts, ScoreRequest(support=method.support, temperature=method.temperature, entropy=entropy)
        )
        return collate(rollouts, scores, self.student.device)


def of(method: Method, batch: Batch) -> dict[str, float]:
    return diagnostics.step_metrics(batch, method, 0, buckets=BUCKETS).reduce()


def ratios(batch: Batch) -> list[list[float]]:
    """log q(y) - log p(y) of each response's trained tokens, by position."""
    rows: list[list[float]] = []
    for i, rollout in enumerate(batch.rollouts):
        t = rollout.trained.nonzero()[:, 0].tolist()
        rows.append([float(batch.teacher_logp[i, j]) - float(batch.policy_logp[i, j]) for j in t])
    return rows


def test_step_metrics_equal_oracle():
    pair, method = Pair(), build("opd", {})
    batch = pair.batch(method, pair.write())
    got, rows = of(method, batch), ratios(batch)
    flat = [value for row in rows for value in row]
    assert got["teacher/log_ratio"] == pytest.approx(sum(flat) / len(flat), rel=1e-5)
    assert got["teacher/negative_share"] == sum(v < 0 for v in flat) / len(flat)
    assert got["teacher/win_rate"] == sum(v > 0 for v in flat) / len(flat)
    assert 0 < got["teacher/win_rate"] < 1
    for percentile in (1, 5, 50, 95, 99):
        wanted = oracle.percentile(flat, percentile / 100)
        assert got[f"teacher/log_ratio_p{percentile:02d}"] == pytest.approx(wanted, abs=1e-5)
    assert got["teacher/positive_reward_in_top_5_percent"] == pytest.approx(oracle.top_share(flat, 0.05), rel=1e-5)
    sums = [sum(row) for row in rows if row]
    assert len(sums) == len(rows) - 1  # one response has no trained token
    assert got["teacher/sequence_log_weight"] == pytest.approx(sum(sums) / len(sums), rel=1e-4)
    wanted = oracle.effective_share([math.exp(value) for value in sums])
    assert got["teacher/effective_sample_share"] == pytest.approx(wanted, rel=1e-4)


def test_step_metrics_equal_oracle_by_bucket():
    pair, method = Pair(), build("opd", {})
    batch = pair.batch(method, pair.write())
    got = of(method, batch)
    values: dict[int, list[float]] = {}
    for i, rollout in enumerate(batch.rollouts):
        for t in rollout.trained.nonzero()[:, 0].tolist():
            values.setdefault(t // 2, []).append(float(batch.teacher_logp[i, t]) - float(batch.policy_logp[i, t]))
    assert len(values) == 4
    for bucket, some in values.items():
        wanted = sum(some) / len(some)
        assert got[f"teacher/log_ratio/from_{2 * bucket:05d}"] == pytest.approx(wanted, abs=1e-5)
        lower = oracle.percentile(some, 0.05)
        assert got[f"teacher/log_ratio_p05/from_{2 * bucket:05d}"] == pytest.approx(lower, abs=1e-5)


def test_reward_auroc_equals_oracle():
    pair, method = Pair(), build("opd", {})
    batch = pair.batch(method, pair.write(reward=(0.0, 1.0, 1.0)))
    scores = [(sum(row) / len(row), r.reward == 1) for row, r in zip(ratios(batch), batch.rollouts, strict=True) if row]
    wanted = oracle.auroc(*zip(*scores, strict=True))
    assert of(method, batch)["teacher/reward_auroc"] == pytest.approx(wanted)


@pytest.mark.parametrize("reward", [(None,), (1.0,), (0.0, 0.5, 1.0)])
def test_reward_auroc_is_absent_unless_rewards_are_0_and_1(reward: Sequence[float | None]):
    pair, method = Pair(), build("opd", {})
    assert "teacher/reward_auroc" not in of(method, pair.batch(method, pair.write(reward=reward)))


def test_reward_auroc_skips_responses_without_reward():
    pair, method = Pair(), build("opd", {})
    rollouts = pair.write(reward=(0.0, 1.0, None))
    batch = pair.batch(method, rollouts)
    rows = zip(ratios(batch), rollouts, strict=True)
    scores = [(sum(row) / len(row), r.reward == 1) for row, r in rows if row and r.reward is not None]
    assert of(method, batch)["teacher/reward_auroc"] == pytest.approx(oracle.auroc(*zip(*scores, strict=True)))


@pytest.mark.parametrize("cut", [1, 4, 6, 11])
def test_step_metrics_merge_to_whole_batch(cut: int):
    """Percentiles, the concentration, the effective sample size and the AUROC too: they are made of all rows."""
    pair, method = Pair(), build("topk_reverse_kl", {"k": 3, "by": "union"})
    rollouts = pair.write(method.record())
    whole = of(method, pair.batch(method, rollouts))
    parts = [rollouts[cut:], rollouts[:cut]]  # and in another order
    batches = [pair.batch(method, part) for part in parts]
    made = [diagnostics.step_metrics(batch, method, 0, buckets=BUCKETS) for batch in batches]
    sent: list[Metrics] = pickle.loads(pickle.dumps(made))  # as processes hand them to each other
    together = merged(sent).reduce()
    assert together.keys() == whole.keys()
    assert together == pytest.approx(whole, rel=1e-5, abs=1e-6)  # a padded batch rounds differently


def test_step_metrics_are_unchanged_by_row_order():
    pair, method = Pair(), build("opd", {})
    batch = pair.batch(method, pair.write())
    order = torch.randperm(len(batch.rollouts), generator=torch.Generator().manual_seed(1)).tolist()
    columns = {
        name: value[order]
        for name in ("response_ids", "mask", "sampler_logp", "policy_logp", "teacher_logp", "reward", "group")
        if (value := getattr(batch, name)) is not None
    }
    shuffled = replace(batch, rollouts=tuple(batch.rollouts[i] for i in order), **columns)
    one, other = of(method, batch), of(method, shuffled)
    ordered = [n for n in one if re.search(r"_p\d\d|top_5|effective|auroc", n)]
    assert len(ordered) == 3 + 8 + 4
    assert [one[n] for n in ordered] == [other[n] for n in ordered]


def test_step_metrics_ignore_padding_and_masked_tokens():
    pair, method = Pair(), build("opd", {})
    batch = pair.batch(method, pair.write())
    spoilt = copy.copy(batch.teacher_logp).masked_fill(~batch.mask, torch.nan)
    far = copy.copy(batch.policy_logp).masked_fill(~batch.mask, 1e6)
    assert of(method, replace(batch, teacher_logp=spoilt, policy_logp=far)) == of(method, batch)


@pytest.mark.parametrize("by", ["intersection", "union", "symmetric_difference"])
def test_overlap_ratio_is_logged_when_support_reads_both_models(by: str):
    pair, method = Pair(), build("topk_reverse_kl", {"k": 3, "by": by})
    rollouts = pair.write(method.record())
    batch = pair.batch(method, rollouts)
    both = pair.batch(build("topk_reverse_kl", {"k": 3, "by": "teacher"}), rollouts)
    assert both.support_ids is not None
    found: list[float] = []
    for i, rollout in enumerate(rollouts):
        assert rollout.student_top_ids is not None
        for t in rollout.trained.nonzero()[:, 0].tolist():
            ours, theirs = set(rollout.student_top_ids[t].tolist()), set(both.support_ids[i, t].tolist())
            found.append(len(ours & theirs) / 3)
    assert of(method, batch)["support/overlap_ratio"] == pytest.approx(sum(found) / len(found))


@pytest.mark.parametrize("by", ["teacher", "student"])
def test_overlap_ratio_is_absent_when_support_reads_one_model(by: str):
    pair, method = Pair(), build("topk_reverse_kl", {"k": 3, "by": by})
    assert "support/overlap_ratio" not in of(method, pair.batch(method, pair.write(method.record())))


def test_step_metrics_have_entropy_when_method_reads_it():
    pair = Pair()
    reader = needing(lambda batch: torch.ones_like(batch.teacher_logp), Reads.STUDENT_ENTROPY, Reads.TEACHER_ENTROPY)
    method = replace(build("opd", {}), weight=reader)
    batch = pair.batch(method, pair.write(method.record()), entropy=True)
    got = of(method, batch)
    assert batch.student_entropy is not None
    assert batch.teacher_entropy is not None
    gap = (batch.teacher_entropy - batch.student_entropy).abs()[batch.mask]
    assert got["teacher/entropy_gap"] == pytest.approx(gap.double().mean().item(), rel=1e-5)
    assert got["student/entropy"] == pytest.approx(batch.student_entropy[batch.mask].double().mean().item(), rel=1e-5)
    without = of(method, pair.batch(build("opd", {}), pair.write()))
    assert not [name for name in without if "entropy" in name]


def test_step_metrics_follow_reads_when_support_is_full():
    pair, method = Pair(), build("reverse_kl", {})
    batch = pair.batch(method, pair.write())
    reader = replace(method, weight=lambda batch: batch.mask.float())  # says nothing, so it may read them
    scored, not_scored = of(reader, batch), of(method, batch)
    assert "teacher/win_rate" in scored
    assert "teacher/log_ratio" not in scored  # phase B logs that one
    assert not [name for name in not_scored if name.startswith("teacher/")]


def test_step_metrics_lack_teacher_when_temperature_differs():
    pair, method = Pair(temperature=0.5), build("opd", {})
    names = of(method, pair.batch(method, pair.write()))
    assert not [name for name in names if name.startswith("teacher/")]


def test_step_metrics_lack_teacher_when_method_has_none():
    pair = Pair()
    method = Method(teacher=no_teacher(), support=supports.no_support(), signal=nll())
    rollouts = pair.write()
    batch = collate(rollouts, unscored(rollouts), pair.student.device)
    assert not [name for name in of(method, batch) if name.startswith(("teacher/", "support/"))]


# --- the page -------------------------------------------------------------------------------------------------------


def logged(lm: LanguageModel) -> set[str]:
    """Every name that a step can log before its update, without the position."""
    pair = Pair()
    reads = (Reads.STUDENT_ENTROPY, Reads.TEACHER_ENTROPY, Input.GROUP)
    reader = needing(lambda batch: torch.ones_like(batch.teacher_logp), *reads)
    method = replace(build("topk_reverse_kl", {"k": 3, "by": "union"}), weight=reader)
    written = pair.write(method.record())
    failures = ("failed", "timed_out")
    failed = [replace(one, reward_failure=why) for one, why in zip(written, failures, strict=False)]
    numbers = of(method, pair.batch(method, [*failed, *written[len(failed) :]], entropy=True))
    assert all(numbers[f"rollout/rewards_{why}"] == 1 for why in failures)
    one = torch.ones(1, dtype=torch.long)
    columns = Comparison(k=1, **{n: one for n in Comparison.__dataclass_fields__ if n != "k"}).columns()
    return {re.split("/(?:from|at)_", name)[0] for name in numbers} | {f"compare/{name}" for name in columns}


def test_diagnostics_page_lists_exactly_logged_names():
    names = set(
        re.findall(r"^\| `((?:rollout|train|teacher|student|support|compare)/\w+)`", PAGE.read_text(), re.MULTILINE)
    )
    phase_b = {"train/loss", "train/signal", "train/student_nll"}
    phase_b |= {"support/student_mass", "support/teacher_mass", "support/empty_share"}
    assert logged(tiny()) | phase_b == names


# --- lengths and first places -----------------------------------------------------------------------------------------


def test_lengths_and_first_places_equal_loops_over_tokens():
    pair, method = Pair(), build("opd", {})
    rollouts = pair.write()
    batch = pair.batch(method, rollouts)
    found = of(method, batch)
    lengths = sorted(len(rollout.response_ids) for rollout in rollouts)
    for percent in (10, 50, 90):  # linear between the two nearest
        place = (len(lengths) - 1) * percent / 100
        low = lengths[math.floor(place)]
        assert found[f"rollout/length_p{percent}"] == pytest.approx(
            low + (lengths[math.ceil(place)] - low) * (place - math.floor(place))
        )
    for t in range(batch.mask.shape[1]):
        values = [
            float(batch.teacher_logp[i, t] - batch.policy_logp[i, t]) for i in range(len(rollouts)) if batch.mask[i, t]
        ]
        name = f"teacher/log_ratio/at_{t}"
        assert (name in found) == bool(values and t < 8)
        if name in found:
            assert found[name] == pytest.approx(sum(values) / len(values), abs=1e-6)
