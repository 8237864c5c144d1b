"""Where the teacher is lost: the trust that is left, what a token weighs, how long responses may be, who ends early."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from support.models import double, full_logits, parameters_of, prompts_of, teacher_of, tiny, write, writers_of
from support.runs import CHARACTERS, sums, tiny_model
from torch import Tensor

import opd
from opd import methods
from opd.commands.check import check_recipe
from opd.errors import ConfigError
from opd.loss.collate import collate
from opd.method import Method
from opd.methods.coherence import Facts, check_coherence
from opd.models.language_model import LanguageModel
from opd.models.loading import load_model
from opd.models.new import character_tokenizer
from opd.pieces import contexts, drift, signals, sources, supports, weights
from opd.pieces.drift import Budget, Drift
from opd.pieces.teacher_rules import external
from opd.recipe.load import parse_recipe
from opd.recipe.schema import ModelSpec
from opd.teachers.incremental import scoring_along
from opd.types import Batch, Rollout, Sampling, ScoreRequest

K = 4


# --- when the teacher is lost ----------------------------------------------------------------------------------------


def random_scores(seed: int, rows: int = 40, vocabulary: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of student and teacher [rows, V] in float64, near enough to share some, and a token of each row."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    both = [base + torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2)]
    ids = torch.randint(vocabulary, (rows,), generator=generator)
    student, teacher = ((2 * one).log_softmax(-1) for one in both)
    return student, teacher, ids


def lost_of(judged: Drift, student: Tensor, teacher: Tensor, ids: Tensor) -> list[bool]:
    top = teacher.topk(judged.k + 1)  # more than it looks at
    return judged.lost(ids, student.topk(judged.k + 1).indices, top.indices, top.values).tolist()


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 0.6, 0.75, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_lost_equals_oracle_when_metric_is_overlap(threshold: float, seed: int):
    student, teacher, ids = random_scores(seed)
    got = lost_of(Drift(k=K, threshold=threshold), student, teacher, ids)
    pairs = zip(student.tolist(), teacher.tolist(), strict=True)
    assert got == [oracle.overlap_ratio(s, t, K) < threshold for s, t in pairs]
    if 0.4 < threshold < 1:
        assert 0 < sum(got) < len(got)


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_lost_equals_oracle_when_metric_is_teacher_top_p_accept(threshold: float, seed: int):
    student, teacher, ids = random_scores(seed)
    got = lost_of(Drift(metric="teacher_top_p_accept", k=K, threshold=threshold), student, teacher, ids)
    expected = [
        not oracle.top_p_accepts(t, i, K, threshold) for t, i in zip(teacher.tolist(), ids.tolist(), strict=True)
    ]
    assert got == expected
    if 0.2 <= threshold <= 0.8:
        assert 0 < sum(got) < len(got)


def test_lost_takes_smallest_top_p_set_of_teacher():
    """Of .5, .3, .15, .05: two have .75, .81 needs three, and three never have .96: the set is those three."""
    teacher = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log().expand(4, 4)
    ids = torch.arange(4)
    lost = {p: lost_of(Drift(metric="teacher_top_p_accept", k=3, threshold=p), teacher, teacher, ids) for p in
            (0.5, 0.75, 0.81, 0.96)}  # fmt: skip
    assert lost == {
        0.5: [False, True, True, True],
        0.75: [False, False, True, True],
        0.81: [False, False, False, True],
        0.96: [False, False, False, True],
    }


@pytest.mark.parametrize("drop", [0.0, 0.01, 0.02, 0.1, 1 / 3, 0.4, 1.0])
def test_trust_equals_oracle_and_never_rises(drop: float):
    lost = (torch.rand(3, 260, generator=torch.Generator().manual_seed(0)) < 0.6).tolist()
    got = Drift(drop=drop).trust(torch.tensor(lost))
    assert bool((got.diff(dim=-1) <= 0).all())
    assert float(got.min()) >= 0
    assert float(got.max()) <= 1
    for row, values in zip(lost, got.tolist(), strict=True):
        assert values == pytest.approx(oracle.trust(row, drop), abs=1e-12)
    if drop == 0.01:  # the hundredth takes the last of it, and leaves nothing over by rounding
        place = [sum(lost[0][: t + 1]) for t in range(260)].index(100)
        assert float(got[0, place]) < drift.ALIVE < float(got[0, place - 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"needs k of at least 1.* got k 0, threshold 0.7 and drop 0.01"),
        ({"threshold": 1.2}, r"a threshold and a drop between 0 and 1.*threshold 1.2"),
        ({"metric": "teacher_top_p_accept", "threshold": 0.0}, r"of 0 accepts no token.* got threshold 0.0"),
        ({"drop": -0.1}, r"a threshold and a drop between 0 and 1.*drop -0.1"),
        ({"base": -1.0}, r"`base` that is added to the trust must be at least 0, got -1.0"),
        ({"stop": "rollout", "every": 0}, r"`every`, .* must be at least 1, got 0"),
        ({"budget": 100}, r"needs 1 <= least <= initial <= most.*got least 1024, initial 100 and most 12288"),
        ({"budget_min": 0, "budget": 5}, r"1 <= least <= initial <= most, in tokens; got least 0, initial 5"),
        ({"patience": 0}, r"a patience of at least 1, .*got step 100, patience 0, hit share 0.1 and margin 100"),
        ({"hit_share": 2.0}, r"a hit share between 0 and 1, .*hit share 2.0"),
        ({"budget_step": 0}, r"needs a step and a patience of at least 1.*got step 0"),
        ({"margin": -1}, r"a margin of at least 0.*margin -1"),
    ],
)
def test_prune_opd_refuses_wrong_settings(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        methods.build("prune_opd", options)


def test_prune_opd_has_defaults_of_scripts():
    method = methods.build("prune_opd", {})
    budget = method.make_memory()["budget"]
    assert isinstance(budget, Budget)
    assert (budget.length, budget.least, budget.most, budget.step) == (2048, 1024, 12288, 100)
    assert (budget.margin, budget.patience, budget.hit_share) == (100, 3, 0.1)
    assert method.support == supports.top_k(16, by="student")
    assert method.top_k == 16
    assert Drift() == Drift(metric="overlap", k=16, threshold=0.7, drop=0.01)


# --- phase A ---------------------------------------------------------------------------------------------------------


def scene(judged: Drift, support: Any = None, seed: int = 0) -> tuple[LanguageModel, LanguageModel, Batch, Method]:
    """Responses of up to eight tokens with some not trained, and their batch."""
    student, external = tiny(padding_rows=3), tiny(seed=1, hidden=24, padding_rows=5)
    method = Method(
        support=support or supports.sampled(),
        weight=weights.times(weights.every_token(), drift.trusted(judged, 0.25)),
        signal=signals.nll(),
    )
    rollouts = write(
        method, student, external, prompts_of("a", "bcd"), Sampling(max_completion_length=8, n=3), (seed, 0)
    )
    rollouts = [replace(r, trained=r.trained & (torch.arange(len(r.trained)) != 1)) for r in rollouts]
    teacher = teacher_of(method, student, external)
    assert teacher is not None
    contexts = method.context(rollouts)
    scores = teacher.score(
        rollouts, contexts, ScoreRequest(support=method.support, temperature=1.0, sampled=False, top_k=method.top_k)
    )
    return student, external, collate(rollouts, scores, student.device), method


def expected_lost(judged: Drift, student: LanguageModel, external: LanguageModel, rollout: Rollout) -> list[bool]:
    """From the models' own logits, token by token."""
    logits = [
        full_logits(double(lm), rollout.prompt_ids, rollout.response_ids, lm.vocabulary).detach().tolist()
        for lm in (student, external)
    ]
    out: list[bool] = []
    for t, token in enumerate(rollout.response_ids.tolist()):
        s, q = (oracle.log_softmax(rows[t]) for rows in logits)
        if judged.metric == "overlap":
            out.append(oracle.overlap_ratio(s, q, judged.k) < judged.threshold)
        else:
            out.append(not oracle.top_p_accepts(q, token, judged.k, judged.threshold))
    return out


JUDGES = [Drift(k=K, threshold=0.5, drop=0.3), Drift(metric="teacher_top_p_accept", k=4, threshold=0.6, drop=0.3)]
SUPPORTS = [
    supports.sampled(),
    supports.full(),
    supports.top_k(2, by="student"),
    supports.top_k(6, by="student"),
    supports.top_k(2, by="union"),
    supports.top_k(6, by="teacher"),
]


@pytest.mark.parametrize("judged", JUDGES, ids=lambda one: one.metric)
@pytest.mark.parametrize("support", SUPPORTS, ids=lambda s: f"{s.kind}-{s.by}-{s.k}")
def test_trusted_gives_trust_plus_base_on_any_support(judged: Drift, support: Any):
    student, external, batch, method = scene(judged, support)
    assert method.top_k == judged.k
    got = method.weight(batch)
    seen: set[float] = set()
    for i, rollout in enumerate(batch.rollouts):
        lost = expected_lost(judged, student, external, rollout)
        trained = rollout.trained.tolist()
        trust = oracle.trust([a and b for a, b in zip(lost, trained, strict=True)], judged.drop)
        expected = [(w + 0.25) * one for w, one in zip(trust, trained, strict=True)]
        assert got[i, : len(expected)].tolist() == pytest.approx(expected)
        assert bool((got[i, len(expected) :] == 0).all())
        seen |= {round(w, 6) for w in trust}
    assert {0.7, 0.4} < seen, "responses have drifted, some less and some more"
    assert 0.25 <= float(got[batch.mask].min()) <= float(got[batch.mask].max()) <= 1.25


def test_support_ids_are_equal_when_drift_reads_top_k():
    """The support's own k are cut out of what is recorded for all."""
    for support in SUPPORTS[2:]:
        _, _, batch, method = scene(JUDGES[0], support)
        student, external = tiny(padding_rows=3), tiny(seed=1, hidden=24, padding_rows=5)
        plain = Method(support=support, signal=signals.divergence())
        rollouts = write(plain, student, external, prompts_of("a", "bcd"), Sampling(max_completion_length=8, n=3))
        teacher = teacher_of(plain, student, external)
        assert teacher is not None
        alone = collate(
            rollouts,
            teacher.score(rollouts, plain.context(rollouts), ScoreRequest(support=support, temperature=1.0)),
            student.device,
        )
        assert batch.support_ids is not None
        assert alone.support_ids is not None
        assert torch.equal(batch.support_ids, alone.support_ids)
        assert alone.student_top_ids is None
        assert alone.teacher_top_ids is None
        assert batch.teacher_top_ids is not None
        assert batch.teacher_top_ids.shape[-1] == method.top_k == K


def test_trusted_raises_config_error_when_top_k_is_small():
    judged = Drift(k=4)
    _, _, batch, _ = scene(Drift(k=3))
    with pytest.raises(
        ConfigError, match=r"reads the 4 most likely tokens of both models, and the batch has 3.*top_k=4\)"
    ):
        drift.trusted(judged)(batch)
    with pytest.raises(ConfigError, match="the batch has 0"):
        drift.trusted(judged)(replace(batch, student_top_ids=None, teacher_top_ids=None, teacher_top_logp=None))


def test_top_k_is_largest_of_pieces():
    of = [drift.trusted(Drift(k=k)) for k in (3, 5)]
    plain = Method(signal=signals.nll())
    assert plain.top_k == 0
    assert plain.record().top_k == 0
    both = replace(plain, weight=weights.times(*of))
    assert both.top_k == both.record().top_k == 5
    watching = replace(plain, source=sources.mixture(0.5, sources.on_policy(drift.ends_drifted(Drift(k=7), 2))))
    assert watching.top_k == 7
    assert replace(both, support=supports.top_k(9, by="student")).record().top_k == 9


def test_trusted_reads_own_k_when_weights_differ():
    few, many = Drift(k=2, threshold=0.7, drop=0.3), Drift(k=5, threshold=0.7, drop=0.3)
    student, external, batch, _ = scene(many)
    for judged in (few, many):
        got = drift.trusted(judged, 0.0)(batch)
        rollout = batch.rollouts[0]
        lost = [
            a and b
            for a, b in zip(expected_lost(judged, student, external, rollout), rollout.trained.tolist(), strict=True)
        ]
        expected = [w * t for w, t in zip(oracle.trust(lost, 0.3), rollout.trained.tolist(), strict=True)]
        assert got[0, : len(expected)].tolist() == pytest.approx(expected)


# --- beside a baseline -----------------------------------------------------------------------------------------------


def centred(metric: Any) -> Method:
    vopd = methods.build("vopd", {"k": 3})
    return replace(vopd, weight=drift.trusted(Drift(metric=metric, k=3)))


def test_vopd_refuses_weight_that_looks_at_sampled_token():
    with pytest.raises(ConfigError, match="the weight depends on the sampled token"):
        opd.distill(
            student="nowhere", teacher="nowhere", prompts=["1"], method=centred("teacher_top_p_accept"), steps=1
        )


def test_overlap_is_independent_of_sampled_token(tmp_path: Path):
    """With every token of the vocabulary as the last one, weight times baseline has no gradient in the mean."""
    run = train(tmp_path, centred("overlap"))
    assert len(run.metrics) == 2
    judged = Drift(k=K, threshold=0.5, drop=0.3)
    student, external, batch, _ = scene(judged)
    row = max(range(len(batch.rollouts)), key=lambda i: len(batch.rollouts[i].response_ids))
    rollout = batch.rollouts[row]
    last = len(rollout.response_ids) - 1
    seen = set()
    for token in range(student.vocabulary):
        ids = rollout.response_ids.clone()
        ids[-1] = token
        seen.add(tuple(expected_lost(judged, student, external, replace(rollout, response_ids=ids))))
    assert len(seen) == 1
    accepting = replace(judged, metric="teacher_top_p_accept", threshold=0.5)
    other = {
        expected_lost(accepting, student, external, replace(rollout, response_ids=with_last(rollout, token)))[last]
        for token in range(student.vocabulary)
    }
    assert other == {False, True}


def with_last(rollout: Rollout, token: int) -> Tensor:
    ids = rollout.response_ids.clone()
    ids[-1] = token
    return ids


# --- the budget ------------------------------------------------------------------------------------------------------


def budget_of(judged: Drift = JUDGES[0], **settings: Any) -> Budget:
    return Budget(judged, **{
        "initial": 20, "least": 10, "most": 32, "step": 4, "margin": 3, "hit_share": 0.5, "patience": 2, **settings
    })  # fmt: skip


def test_budget_advances_by_hits_and_patience():
    budget = budget_of()
    course = [
        ([20, 17, 3, 3], 24, 0, 0.5),  # 17 is within the margin
        ([21, 20, 20, 20], 24, 1, 0.25),
        ([24, 24, 24, 3], 28, 0, 0.75),  # a hit wipes the miss out
        ([28, 28], 32, 0, 1.0),
        ([32, 32], 32, 0, 1.0),  # the most
        ([3, 3], 32, 1, 0.0),
        ([3, 3], 28, 0, 0.0),  # patience, and counting begins again
        ([3, 3], 28, 1, 0.0),
        ([3, 3], 24, 0, 0.0),
    ]
    for effective, length, misses, share in course:
        assert budget.advance(effective) == {"budget/tokens": float(length), "budget/hit_share": share}
        assert (budget.length, budget.misses) == (length, misses)
    for _ in range(20):
        budget.advance([0])
    assert budget.length == 10, "the least"
    assert budget.advance([9])["budget/hit_share"] == 0.0, "at the least nothing below it is a hit, margin or not"
    assert budget.advance([10])["budget/tokens"] == 14


@pytest.mark.parametrize("seed", range(4))
def test_budget_equals_oracle(seed: int):
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 34, (60, 5), generator=generator).tolist()
    for share in (0.1, 0.4, 1.0):
        budget = budget_of(hit_share=share)
        got = [int(budget.advance(step)["budget/tokens"]) for step in steps]
        assert got == oracle.budgets(20, steps, 10, 32, 4, 3, share, 2)
        assert share == 1.0 or len(set(got)) > 2


def test_budget_continues_equally_when_restored():
    budget, again = budget_of(), budget_of(initial=12)
    budget.advance([0])
    again.load_state_dict(budget.state_dict(), {})
    assert budget.state_dict() == {"length": 20, "misses": 1}
    assert [again.advance([0]), again.advance([20])] == [budget.advance([0]), budget.advance([20])]


def test_budget_observes_all_processes():
    judged = JUDGES[0]
    _, _, batch, _ = scene(judged)
    _, _, other, _ = scene(judged, seed=5)
    gathered: list[Any] = []
    for one in (batch, other):
        drift.Drifted(judged).observe(one, lambda part: gathered.append(part) or [part])
    both, swapped = budget_of(initial=10, least=1), budget_of(initial=10, least=1)
    here = both.observe(batch, lambda part: [part, gathered[1]])
    there = swapped.observe(other, lambda part: [gathered[0], part])
    assert here == there
    assert both.state_dict() == swapped.state_dict()
    lengths = [n for part in gathered for n in part[0]]
    assert here["drift/effective_length"] == pytest.approx(sum(lengths) / len(lengths))


@pytest.mark.parametrize("judged", JUDGES, ids=lambda one: one.metric)
def test_drifted_metrics_equal_hand_count(judged: Drift):
    student, external, batch, _ = scene(judged)
    spare = batch.rollouts[2]
    batch = replace(batch, mask=batch.mask & (torch.arange(6) != 2)[:, None])  # a filter left this one out
    got = drift.Drifted(judged).observe(batch, lambda part: [part])
    lost, trained, effective = 0, 0, []
    for i, rollout in enumerate(batch.rollouts):
        if i == 2:
            continue
        at = [a and b for a, b in zip(expected_lost(judged, student, external, rollout), rollout.trained.tolist(),
                                      strict=True)]  # fmt: skip
        left = oracle.trust(at, judged.drop)
        effective.append(sum(w > 0 and one for w, one in zip(left, rollout.trained.tolist(), strict=True)))
        lost, trained = lost + sum(at), trained + int(rollout.trained.sum())
    assert got == {
        "drift/tokens": float(sum(len(r.response_ids) for r in batch.rollouts)),
        "drift/ended_share": 0.0,
        "drift/effective_length": pytest.approx(sum(effective) / 5),
        "drift/lost_share": pytest.approx(lost / trained),
    }
    assert 0 < lost < trained
    assert len(spare.response_ids) > 0


def test_budget_keeps_state_when_mask_is_empty():
    judged = JUDGES[0]
    _, _, batch, _ = scene(judged)
    budget = budget_of()
    got = budget.observe(replace(batch, mask=torch.zeros_like(batch.mask)), lambda part: [part])
    assert set(got) == {"drift/tokens", "drift/ended_share"}
    assert budget.state_dict() == {"length": 20, "misses": 0}


# --- responses that end while they are written -----------------------------------------------------------------------


def written(source: Any, **memory: Any) -> tuple[LanguageModel, LanguageModel, list[Rollout]]:
    """The models, and what the student writes: 12 responses of up to 12 tokens."""
    student, external = tiny(padding_rows=3, spread=0.3), tiny(seed=1, hidden=24, padding_rows=5, spread=0.3)
    method = Method(source=source, weight=drift.trusted(Drift(k=K)), signal=signals.nll(), memory=memory)
    sampling = Sampling(max_completion_length=12, n=4)
    return student, external, write(method, student, external, prompts_of("a", "bcd", "hg"), sampling)


@pytest.mark.parametrize("tokens", [1, 5, 12, 40])
def test_within_budget_cuts_responses_to_prefixes(tokens: int):
    _, _, whole = written(sources.on_policy())
    _, _, cut = written(
        sources.on_policy(drift.within_budget(50)), budget=lambda: budget_of(initial=tokens, least=1, most=50)
    )
    assert max(len(r.response_ids) for r in whole) == 12
    for full, short in zip(whole, cut, strict=True):
        n = min(tokens, len(full.response_ids))
        assert short.response_ids.tolist() == full.response_ids[:n].tolist()
        assert short.finished == (full.finished and n == len(full.response_ids))
        assert short.student_top_ids is not None
        assert len(short.student_top_ids) == n


@pytest.mark.parametrize("every", [1, 3, 5])
@pytest.mark.parametrize("metric", ["overlap", "teacher_top_p_accept"])
def test_ends_drifted_cuts_at_first_look_without_trust(every: int, metric: Any):
    judged = Drift(metric=metric, k=K, threshold=0.5 if metric == "overlap" else 0.85, drop=0.3)
    student, external, whole = written(sources.on_policy())
    before = parameters_of(student)
    _, _, cut = written(sources.on_policy(drift.ends_drifted(judged, every)))
    ends: list[int] = []
    for full, short in zip(whole, cut, strict=True):
        trust = oracle.trust(expected_lost(judged, student, external, full), judged.drop)
        looks = [t for t in range(every, len(full.response_ids), every) if trust[t - 1] < 1e-8]
        end = looks[0] if looks else len(full.response_ids)
        assert short.response_ids.tolist() == full.response_ids[:end].tolist()
        assert short.finished == (full.finished and not looks)
        ends.append(end)
    spared = sum(len(r.response_ids) for r in whole) - sum(ends)
    assert spared > 0
    assert len(set(ends)) > 2, "each ends where it has drifted, not where another has"
    assert all(torch.equal(p, before[name]) for name, p in student.model.named_parameters())


def test_prune_opd_cuts_no_response_when_teacher_is_student():
    student = tiny(padding_rows=3, spread=0.3)
    method = methods.build("prune_opd", {"k": K, "stop": "rollout", "every": 2, "drop": 1.0})
    sampling = Sampling(max_completion_length=12, n=4)
    writers = writers_of(student, None, sampling)
    teacher = teacher_of(replace(method, teacher=opd.method.TeacherRule(kind="self_live")), student, None)
    assert teacher is not None
    writers = replace(writers, scorer=scoring_along(teacher, method.context, method.request()))
    plain = writers.student(prompts_of("a", "bcd"), seed=(0, 0), record=method.record())
    watched = method.source(prompts_of("a", "bcd"), writers, (0, 0), method.record())
    assert [r.text for r in watched] == [r.text for r in plain]
    assert [r.finished for r in watched] == [r.finished for r in plain]


# --- a whole run -----------------------------------------------------------------------------------------------------


def model(seed: int) -> Any:
    return load_model(ModelSpec(**tiny_model(seed)), name="tiny").model


def train(folder: Path, method: Any, steps: int = 2, **more: Any) -> Any:
    settings = {"sampling": {"max_completion_length": 10}, "prompts_per_step": 4, "samples_every": 1, **more}
    return opd.distill(
        student=model(2),
        teacher=model(1),
        tokenizer=character_tokenizer(CHARACTERS),
        prompts=sums(0, 8),
        method=method,
        steps=steps,
        output_dir=folder / "run",
        quiet=True,
        **settings,
    )


BUDGET = {"budget": 6, "budget_min": 2, "budget_max": 10, "budget_step": 2, "margin": 1, "patience": 2}


@pytest.mark.parametrize(("drop", "way"), [(1.0, "shrinks"), (0.0, "grows")])
def test_budget_limits_responses_of_next_step(tmp_path: Path, drop: float, way: str):
    run = train(tmp_path, "prune_opd", steps=6, options={"k": 4, "threshold": 1.0, "drop": drop, **BUDGET})
    allowed = [6.0, *(row["budget/tokens"] for row in run.metrics)]
    assert [row["rollout/length_max"] <= most for row, most in zip(run.metrics, allowed, strict=False)] == [True] * 6
    assert [row["drift/tokens"] for row in run.metrics] == [4 * row["rollout/length"] for row in run.metrics]
    if way == "shrinks":
        assert allowed == [6, 6, 4, 4, 2, 2, 2]
        assert all(row["drift/effective_length"] < 2 for row in run.metrics)
        assert all(row["drift/ended_share"] > 0 for row in run.metrics)
    else:
        assert allowed == [6, 8, 10, 10, 10, 10, 10]
        assert max(row["rollout/length_max"] for row in run.metrics) == 10
        assert run.metrics[-1]["drift/ended_share"] == 0.0


def test_prune_opd_writes_fewer_tokens_when_stop_is_rollout(tmp_path: Path):
    options = {"k": 4, "threshold": 0.9, "drop": 0.5}
    runs = [
        train(tmp_path / stop, "prune_opd", options={**options, "stop": stop, "every": 2}, steps=1)
        for stop in ("none", "rollout")
    ]
    whole, cut = (run.metrics[0] for run in runs)
    assert cut["drift/tokens"] < whole["drift/tokens"]
    assert cut["drift/ended_share"] > whole["drift/ended_share"] == 0.0
    assert cut["drift/ended_share"] <= cut["rollout/cut_share"]
    texts = [[row["response"] for row in run.samples] for run in runs]
    assert all(long.startswith(short) for long, short in zip(*texts, strict=True))


def recipe(**stage: Any) -> Any:
    models = {name: tiny_model(seed) for seed, name in enumerate(("student", "teacher"))}
    described = {
        "name": "distil",
        "train": "student",
        "teacher": "teacher",
        "method": "prune_opd",
        "data": {"path": "opd.data.toy:addition", "options": {"count": 4, "digits": 1}},
        "steps": 1,
        **stage,
    }
    return parse_recipe({"name": "one", "models": models, "stages": [described]})


def test_check_recipe_refuses_budget_above_max_completion_length():
    with pytest.raises(
        ConfigError,
        match=r"'prune_opd' has a budget of up to 12288 tokens per response, and sampling.max_completion_length is "
        r"256. Set it to 12288, or lower the largest budget",
    ):
        check_recipe(recipe())
    check_recipe(recipe(options={"k": 4, **BUDGET}, sampling={"max_completion_length": 10}))
    check_recipe(recipe(options={"k": 4, "stop": "rollout", "every": 255}))


def test_check_recipe_refuses_first_look_past_max_length():
    with pytest.raises(
        ConfigError,
        match=r"'prune_opd' the teacher scores a response every 256 tokens, and sampling.max_completion_length is "
        r"256: no response would end early. Lower `every`",
    ):
        check_recipe(recipe(options={"k": 4, "stop": "rollout"}))


def test_check_recipe_refuses_k_above_vocabulary():
    with pytest.raises(ConfigError, match=r"k = 40, but the vocabulary has only"):
        check_recipe(recipe(options={"k": 40, "stop": "none"}))
    method = Method(weight=drift.trusted(Drift(k=40)), signal=signals.policy_gradient(signals.log_ratio))
    with pytest.raises(ConfigError, match=r"k = 40, but the vocabulary has only"):
        opd.distill(
            student=model(2),
            teacher=model(1),
            tokenizer=character_tokenizer(CHARACTERS),
            prompts=sums(0, 4),
            method=method,
            steps=1,
            quiet=True,
        )


def test_distill_refuses_drift_without_teacher():
    grpo = methods.build("grpo", {})
    with pytest.raises(ConfigError, match="a piece reads the teacher's scores, but the method has no teacher"):
        opd.distill(
            student="nowhere",
            prompts=["1"],
            method=replace(grpo, weight=drift.trusted(Drift(k=3))),
            steps=1,
            reward=lambda prompt, response: 1.0,
            sampling={"n": 2},
        )


def test_prune_opd_refuses_attempt_context_when_stop_is_rollout():
    method = methods.build("prune_opd", {"k": 3, "stop": "rollout"})
    attempt = contexts.privileged(template="{prompt}{attempt}")
    with pytest.raises(ConfigError, match=r"reads the student.s attempt, but scores it before it is finished\. Use"):
        opd.distill(
            student="nowhere", teacher="nowhere", prompts=["1"], method=replace(method, context=attempt), steps=1
        )


def test_trusted_falls_along_response():
    """Whatever the models say: the weight of a later token is never above that of an earlier one."""
    _, _, batch, method = scene(JUDGES[0])
    for i in range(len(batch.rollouts)):
        row = method.weight(batch)[i][batch.mask[i]].tolist()
        assert all(a >= b for a, b in pairwise(row))


def test_trusted_is_refused_beside_reward():
    options = {"vopd": {"task_reward": True, "k": 4}, "prune_opd": {"loss": "sampled", "k": 4}}
    with pytest.raises(ConfigError, match=r"cannot be combined: the weight measures the trust in the teacher, but"):
        methods.build("vopd+prune_opd", options)
    weighed = replace(methods.build("grpo", {}), weight=drift.trusted(Drift(k=4)))
    with pytest.raises(
        ConfigError, match=r"the trust in the teacher, but it would weigh a reward\. .* Leave the weight"
    ):
        check_coherence(Facts(method=replace(weighed, teacher=external())), "here")
