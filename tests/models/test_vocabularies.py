"""Tokenizers of one family: what counts as the same token, and the distributions over the common tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import build, full_logits, prompts_of, teacher_of, tiny

import opd
from opd import methods
from opd.errors import AlignmentError, ConfigError, DataError
from opd.models import wrapping
from opd.models.language_model import LanguageModel
from opd.models.new import character_tokenizer
from opd.models.vocabularies import check_same_tokens, on_common_tokens
from opd.samplers.hf import TransformersSampler
from opd.teachers.local import local_teacher
from opd.types import Rollout, Sampling, TeacherRule

LETTERS = "abcdefgh"  # ids 2 to 9, after <pad> and <eos>


def family(*added: str, characters: str = LETTERS) -> Any:
    """The tokenizer of LETTERS with added tokens from id 10 on."""
    tokenizer = character_tokenizer(characters)
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    return tokenizer


def model(*added: str, seed: int = 0, name: str = "model", padding_rows: int = 0) -> LanguageModel:
    return tiny("llama", family(*added), seed=seed, name=name, padding_rows=padding_rows)


def sampled(lm: LanguageModel, texts: Sequence[str], *, tokens: int = 2, n: int = 1) -> list[Rollout]:
    sampler = TransformersSampler(lm=lm, sampling=Sampling(max_completion_length=tokens, n=n))
    return sampler(prompts_of(*texts), seed=(0, 0))


@pytest.mark.parametrize(
    ("student", "teacher", "size", "renamed", "only"),
    [
        ([], [], 10, {}, ([], [])),
        (["<a>"], ["<a>", "<think>"], 11, {}, ([], ["<think>"])),
        (["<a>", "<b>"], ["<a>"], 11, {}, (["<b>"], [])),
        (["<a>", "<r0>"], ["<a>", "<im_end>"], 12, {11: ("<r0>", "<im_end>")}, ([], [])),
        (["<r0>", "<x>"], ["<y>"], 11, {10: ("<r0>", "<y>")}, (["<x>"], [])),
    ],
)
def test_check_same_tokens_finds_common_ids(
    student: list[str],
    teacher: list[str],
    size: int,
    renamed: dict[int, tuple[str, str]],
    only: tuple[list[str], list[str]],
):
    found = check_same_tokens(family(*student), family(*teacher))
    assert (found.size, found.renamed, tuple(map(list, found.only))) == (size, renamed, only)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (family("<a>", "<b>"), family("<b>", "<a>"), r"2 tokens have another id \('<a>', '<b>'\)"),
        (family("<a>"), family("<x>", "<a>"), r"1 tokens have another id \('<a>'\)"),
        (family(characters="abcdefg"), family(), r"1 tokens exist only in the teacher \('h'\)"),
        (family("<a>", characters="abcdefg"), family(), r"1 tokens exist only in the student \('<a>'\); 1 .*'h'"),
    ],
)
def test_check_same_tokens_refuses_moved_and_missing_text(student: Any, teacher: Any, message: str):
    with pytest.raises(AlignmentError, match=message):
        check_same_tokens(student, teacher)


def test_on_common_tokens_renormalises_both_models():
    """Against softmax over the first 11 logits of the plain models, for every token of both."""
    plain = model("<a>", "<think>", name="student"), model("<a>", seed=1, name="teacher", padding_rows=4)
    student, teachers = on_common_tokens(plain[0], {"teacher": plain[1]})
    teacher = teachers["teacher"]
    assert (plain[0].vocabulary, student.vocabulary, teacher.vocabulary) == (12, 11, 11)
    assert student.notes == ("1 tokens of student are not compared, and never written ('<think>')",)
    rollouts = sampled(student, ["abc", "hgf"], tokens=6, n=4)
    method = methods.build("reverse_kl", {})
    for rollout in rollouts:
        assert int(rollout.response_ids.max()) < 11
        logits = full_logits(plain[0].causal_lm, rollout.prompt_ids, rollout.response_ids, 11)
        expected = logits.log_softmax(-1).gather(-1, rollout.response_ids[:, None])[:, 0]
        assert rollout.sampler_logp is not None
        torch.testing.assert_close(rollout.sampler_logp, expected, atol=1e-5, rtol=1e-5)
    scored = teacher_of(method, student, teacher).score(
        rollouts, [r.prompt for r in rollouts], method.request(shown=True)
    )
    for rollout, scores in zip(rollouts, scored, strict=True):
        logits = full_logits(plain[1].causal_lm, rollout.prompt_ids, rollout.response_ids, 11)
        expected = logits.log_softmax(-1).gather(-1, rollout.response_ids[:, None])[:, 0]
        torch.testing.assert_close(scores.teacher_logp, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def kl(student: LanguageModel, teacher: LanguageModel, row: Sequence[int], size: int) -> float:
    ids = torch.tensor([list(row)])
    p, q = (m.causal_lm(ids).logits[0, -1, :size].log_softmax(-1) for m in (student, teacher))
    return float((p.exp() * (p - q)).sum())


def test_distill_compares_families_on_common_tokens(tmp_path: Path):
    """The first loss is the reverse KL over the common ids, at the one token that the student writes."""
    student, teacher = model("<a>", "<think>", name="s"), model("<a>", seed=1, name="t")
    expected = kl(student, teacher, student.tokenizer("abc").input_ids, 11)
    run = opd.distill(
        student=student.model,
        teacher=teacher.model,
        tokenizer=student.tokenizer,
        teacher_tokenizer=teacher.tokenizer,
        prompts=["abc"],
        steps=1,
        sampling={"max_completion_length": 1},
        output_dir=tmp_path / "run",
        quiet=True,
    )
    assert run.metrics[-1]["train/loss"] == pytest.approx(expected, rel=1e-4)


def test_distill_refuses_response_with_token_teacher_lacks(tmp_path: Path):
    student, teacher = model("<a>", "<think>", name="s"), model("<a>", seed=1, name="t")
    with pytest.raises(
        DataError, match=r"student: a response holds the token '<think>' \(id 11\).* only the ids 0 to 10"
    ):
        opd.distill(
            student=student.model,
            teacher=teacher.model,
            tokenizer=student.tokenizer,
            teacher_tokenizer=teacher.tokenizer,
            method="gkd",
            options={"on_policy_share": 0.0},
            prompts=[{"prompt": "abc", "response": "a<think>b"}],
            steps=1,
            output_dir=tmp_path / "run",
            quiet=True,
        )
    assert not (tmp_path / "run").exists()  # refused by the checks


def test_on_common_tokens_refuses_end_that_teacher_lacks():
    student = model("<a>", "<end>", name="student")
    student.tokenizer.eos_token = "<end>"
    student = wrapping.wrap(student.model, student.tokenizer, name="student")
    student.model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    student = wrapping.wrap(student.model, student.tokenizer, name="student")
    with pytest.raises(AlignmentError, match="student ends a response with '<end>', which teacher does not have"):
        on_common_tokens(student, {"teacher": model("<a>", name="teacher")})


# --- tokens without a row --------------------------------------------------------------------------------------------


def unresized(name: str = "m") -> LanguageModel:
    """A model whose tokenizer got a padding token after its layers were made."""
    tokenizer = family()
    made = build("llama", tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[PAD]"]})
    return wrapping.wrap(made, tokenizer, name=name)


def test_wrap_leaves_out_added_tokens_without_row():
    lm = unresized()
    assert (lm.vocabulary, lm.rows) == (10, 10)
    assert lm.notes == (
        "m: 1 tokens of its tokenizer ('[PAD]') have no row in its layers of 10 rows; they are never written, and no "
        "prompt may hold them",
    )
    with pytest.raises(DataError, match=r"m: a prompt holds the token '\[PAD\]' \(id 10\), .* ids 0 to 9"):
        sampled(lm, ["ab[PAD]"])


def test_wrap_refuses_text_without_row():
    with pytest.raises(ConfigError, match="has ids up to 9, but the output layer has only 7 rows"):
        wrapping.wrap(build("llama", character_tokenizer("abcde")), family())


def test_local_teacher_refuses_prompt_with_token_without_row():
    student, teacher = unresized("student"), unresized("teacher")
    rollouts = sampled(student, ["ab"])
    method = methods.build("reverse_kl", {})
    scorer = local_teacher(TeacherRule(kind="external"), student, teacher, micro_batch_tokens=64)
    with pytest.raises(DataError, match=r"teacher: a prompt holds the token '\[PAD\]'"):
        scorer.score(rollouts, prompts_of("ab[PAD]"), method.request())
