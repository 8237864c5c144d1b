"""The full comparison against the models themselves in float64 and plain Python; and as metrics of a run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from support.models import double, full_logits, prompts_of, rollout_of, sampler, tiny
from support.runs import one_stage, prepare

import opd
import opd.models.head
from opd.errors import ConfigError
from opd.evaluation.buckets import Buckets
from opd.evaluation.compare import BY_REPETITION, Comparison, compare
from opd.maths.metrics import merged
from opd.models.language_model import LanguageModel, frozen_copy
from opd.models.render import render
from opd.pieces.contexts import same_prompt
from opd.pieces.teacher_rules import external
from opd.teachers.local import LocalTeacher, local_teacher
from opd.types import Prompt, Rollout

K = 3


@pytest.fixture
def student() -> LanguageModel:
    return tiny(padding_rows=3, name="student")


@pytest.fixture
def teacher(student: LanguageModel) -> LocalTeacher:
    return made(student, tiny(seed=1, hidden=24, padding_rows=5, name="teacher"))


def made(student: LanguageModel, other: LanguageModel) -> LocalTeacher:
    teacher = local_teacher(external(), student, other, micro_batch_tokens=64)
    assert teacher is not None
    return teacher


@pytest.fixture
def rollouts(student: LanguageModel) -> list[Rollout]:
    """Of several lengths, with masked tokens, one with none that is trained, and one that loops."""
    texts = prompts_of("ab", "hgfedcba", "c", "dd", "ab")
    written = sampler(student)(texts[:4], seed=(0, 0))
    first = replace(written[0], trained=torch.arange(len(written[0].response_ids)) % 2 == 0)
    third = replace(written[2], trained=torch.zeros_like(written[2].trained))
    loop = rollout_of(student, replace(texts[4], id=9), [4, 5, 6, 4, 5, 6, 4, 5, 6])
    return [first, written[1], third, written[3], loop]


def expected(
    student: LanguageModel, teacher: LanguageModel, rollout: Rollout, context: Prompt, temperature: float
) -> list[dict[str, float]]:
    """The columns of each token, from float64 logits of the models themselves and loops over the vocabulary."""
    with torch.no_grad():
        ours = full_logits(double(student), rollout.prompt_ids, rollout.response_ids, student.vocabulary)
        theirs = full_logits(
            double(teacher), render(context, teacher.tokenizer), rollout.response_ids, teacher.vocabulary
        )
    rows = []
    ids = rollout.response_ids.tolist()
    for t, y in enumerate(ids):
        s, q = (oracle.log_softmax((logits[t] / temperature).tolist()) for logits in (ours, theirs))
        top_s, top_q = oracle.top(s, K), oracle.top(q, K)
        both = set(top_s) & set(top_q)
        grams = [ids[i - 2 : i + 1] for i in range(2, t)]
        rows.append(
            {
                "student_logp": s[y],
                "teacher_logp": q[y],
                "teacher_rank": top_q.index(y) + 1 if y in top_q else K + 1,
                "outside_student_top": y not in top_s,
                "outside_teacher_top": y not in top_q,
                "overlap": len(both),
                "overlap_advantage": oracle.overlap_advantage(s, q, K) or 0.0,
                "student_entropy": oracle.entropy(s),
                "teacher_entropy": oracle.entropy(q),
                "student_mass_on_student_top": oracle.mass([s[v] for v in top_s]),
                "student_mass_on_teacher_top": oracle.mass([s[v] for v in top_q]),
                "student_mass_on_overlap": oracle.mass([s[v] for v in both]),
                "teacher_mass_on_student_top": oracle.mass([q[v] for v in top_s]),
                "teacher_mass_on_teacher_top": oracle.mass([q[v] for v in top_q]),
                "teacher_mass_on_overlap": oracle.mass([q[v] for v in both]),
                "reverse_kl": oracle.reverse_kl(s, q),
                "forward_kl": oracle.forward_kl(s, q),
                "repeated": t >= 2 and ids[t - 2 : t + 1] in grams,
            }
        )
    return rows


@pytest.mark.parametrize("entries", [10**6, 40])  # all at once, and in chunks and tiles of few rows
@pytest.mark.parametrize("micro_batch_tokens", [8, 10**6])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_compare_columns_equal_oracle(
    student: LanguageModel,
    teacher: LocalTeacher,
    rollouts: list[Rollout],
    temperature: float,
    micro_batch_tokens: int,
    entries: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(opd.models.head, "CHUNK_ENTRIES", entries)
    monkeypatch.setattr(opd.models.head, "TILE_ENTRIES", entries // 2)
    contexts = [replace(r.prompt, content=f"h{r.prompt.content}") for r in rollouts]
    found = compare(
        student, teacher, rollouts, contexts, k=K, temperature=temperature, micro_batch_tokens=micro_batch_tokens
    )
    at = 0
    for i, (rollout, context) in enumerate(zip(rollouts, contexts, strict=True)):
        rows = expected(student, teacher.lm, rollout, context, temperature)
        for t in rollout.trained.nonzero()[:, 0].tolist():
            assert (int(found.row[at]), int(found.step[at])) == (i, t)
            got = {name: getattr(found, name)[at].item() for name in rows[t]}
            assert got == pytest.approx(rows[t], abs=2e-5), (i, t)
            at += 1
    assert at == len(found.row)
    assert bool(found.repeated.any())
    assert not bool(found.repeated.all())
    assert bool((found.overlap == 0).any())  # a position without overlap was among them


def test_compare_gives_full_overlap_when_teacher_is_student(student: LanguageModel, rollouts: list[Rollout]):
    same = made(student, frozen_copy(student))
    found = compare(student, same, rollouts, same_prompt()(rollouts), k=K)
    assert bool((found.overlap == K).all())
    for name in ("reverse_kl", "forward_kl", "overlap_advantage"):
        assert getattr(found, name).abs().max().item() < 1e-6, name
    torch.testing.assert_close(found.student_entropy, found.teacher_entropy, atol=1e-5, rtol=0)
    assert torch.equal(found.outside_student_top, found.outside_teacher_top)


def test_summary_gives_means_by_bucket_and_repetition(
    student: LanguageModel, teacher: LocalTeacher, rollouts: list[Rollout]
):
    found = compare(student, teacher, rollouts, same_prompt()(rollouts), k=K)
    summary = found.summary(bucket=4)
    assert summary["overlap_ratio"] == pytest.approx(found.overlap.double().mean().item() / K)
    assert summary["log_ratio"] == pytest.approx((found.teacher_logp - found.student_logp).double().mean().item())
    gap = (found.teacher_entropy - found.student_entropy).abs()
    assert summary["entropy_gap"] == pytest.approx(gap.double().mean().item(), rel=1e-6)
    assert summary["repeated"] == pytest.approx(found.repeated.double().mean().item())
    here = (found.step >= 4) & (found.step < 8)
    assert summary["reverse_kl/from_00004"] == pytest.approx(found.reverse_kl[here].double().mean().item())
    assert summary["reverse_kl/repeated"] == pytest.approx(found.reverse_kl[found.repeated].double().mean().item())
    assert summary["teacher_rank/fresh"] == pytest.approx(found.teacher_rank[~found.repeated].double().mean().item())
    some = found.overlap > 0  # positions without overlap have no advantage and are not in its mean
    assert summary["overlap_advantage"] == pytest.approx(found.overlap_advantage[some].double().mean().item())
    assert {name.split("/")[0] for name in summary if "/repeated" in name} == set(BY_REPETITION)


def test_compare_metrics_merge_to_whole_batch(student: LanguageModel, teacher: LocalTeacher, rollouts: list[Rollout]):
    buckets = Buckets.over(2, 12)

    def metrics(some: list[Rollout]):
        return compare(student, teacher, some, same_prompt()(some), k=K).metrics(buckets)

    whole = metrics(rollouts).reduce()
    parts = merged([metrics(rollouts[2:3]), metrics(rollouts[3:]), metrics(rollouts[:2])])  # the first has no token
    assert parts.reduce() == pytest.approx(whole, rel=1e-5, abs=1e-6)
    assert whole.keys() == parts.reduce().keys()


def test_compare_is_empty_when_no_token_is_trained(
    student: LanguageModel, teacher: LocalTeacher, rollouts: list[Rollout]
):
    found = compare(student, teacher, rollouts[2:3], [rollouts[2].prompt], k=K)
    assert len(found.row) == 0
    assert found.summary() == {}
    assert found.repeated.dtype is torch.bool


@pytest.mark.parametrize("k", [0, 10**6])
def test_compare_refuses_k_outside_vocabulary(student: LanguageModel, teacher: LocalTeacher, k: int):
    with pytest.raises(
        ConfigError, match=rf"k is {k}, and the vocabulary has {student.vocabulary} tokens.*diagnostics\.k"
    ):
        compare(student, teacher, [], [], k=k)


# --- in the loop ----------------------------------------------------------------------------------------------------


def rows_of(folder: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "distil" / name).read_text().splitlines()]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_diagnostics_compares_at_interval_and_trains_equally(work: Path):
    stage = {"steps": 4, "sampling": {"max_completion_length": 5}}
    for name, section in (("with", {"every": 3, "k": 2, "bucket": 2}), ("without", {})):
        folder = prepare(work / name, one_stage(**stage, diagnostics=section))
        opd.run(folder / "recipe.yaml", f"output_dir={folder}/run", *paths(folder), quiet=True)
    rows, plain = rows_of(work / "with", "metrics.jsonl"), rows_of(work / "without", "metrics.jsonl")
    compared = [[name for name in row if name.startswith("compare/")] for row in rows]
    assert [bool(names) for names in compared] == [True, False, False, True]
    assert {"compare/overlap_ratio", "compare/reverse_kl", "compare/student_entropy/from_00002"} <= set(compared[0])
    mine = ("train/loss", "optim/grad_norm", "rollout/length")
    assert [[row[name] for name in mine] for row in rows] == [[row[name] for name in mine] for row in plain]
    # The update's own divergence, by another path: it is the mean over tokens of the same step.
    assert rows[0]["compare/reverse_kl"] == pytest.approx(rows[0]["train/signal"], rel=1e-4)
    timings = rows_of(work / "with", "timings.jsonl")
    assert [row["diagnose"] > 0.1 * row["score"] for row in timings] == [True, False, False, True]
    for row in timings:
        parts = math.fsum(row[name] for name in ("sync", "generate", "score", "diagnose", "train"))
        assert parts == pytest.approx(row["total"])


def paths(folder: Path) -> list[str]:
    return [f"stages.distil.data.path={folder}/train.jsonl"]


def test_diagnostics_raises_config_error_without_teacher(work: Path):
    recipe = one_stage(method="sft", teacher=None, diagnostics={"every": 2})
    folder = prepare(work / "sft", recipe)
    with pytest.raises(
        ConfigError, match=r"diagnostics\.every is 2.*method 'sft' has none. Set diagnostics\.every to 0"
    ):
        opd.run(folder / "recipe.yaml", *paths(folder), quiet=True)


def test_diagnostics_refuses_k_above_vocabulary_before_step_1(work: Path):
    folder = prepare(work / "k", one_stage(diagnostics={"every": 1, "k": 1000}))
    with pytest.raises(ConfigError, match=r"k is 1000, and the vocabulary has \d+ tokens"):
        opd.run(folder / "recipe.yaml", f"output_dir={folder}/run", *paths(folder), quiet=True)
    assert not (folder / "run" / "distil" / "metrics.jsonl").exists()


def test_comparison_columns_cover_all_fields():
    assert set(Comparison.__dataclass_fields__) - {"k", "row", "step", "overlap"} <= {
        *Comparison(k=1, **{n: torch.zeros(1) for n in Comparison.__dataclass_fields__ if n != "k"}).columns()
    }


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("rule", ["frozen", "live", "ema"])
def test_compare_reverse_kl_equals_signal_when_self_taught(work: Path, rule: str, lora: bool):
    """The exact divergence of the update, by the other path: the teacher reads its own context, adapters off or on."""
    options = {"template": "{privileged_context}{prompt}", "teacher": rule, "average": "token", "k": None}
    recipe = one_stage(method="context_distillation", options=options, teacher=None, steps=3)
    recipe["stages"][0] |= {"diagnostics": {"every": 1, "k": 2}, "optimizer": {"learning_rate": 0.05}}
    if lora:
        recipe["models"]["student"] |= {"lora": {"rank": 2, "alpha": 4}}
    folder = prepare(work / "self", recipe)
    opd.run(folder / "recipe.yaml", f"output_dir={folder}/run", *paths(folder), quiet=True)
    for row in rows_of(folder, "metrics.jsonl"):
        assert row["compare/reverse_kl"] == pytest.approx(row["train/signal"], rel=1e-3, abs=1e-6)
