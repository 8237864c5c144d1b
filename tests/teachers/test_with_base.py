"""A base beside a teacher: its scores against the model's own, what it reads, and what is passed on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import LETTERS, policy, rollout_of, tiny

from opd.errors import AlignmentError, ConfigError
from opd.loss.collate import collate, split
from opd.models import wrapping
from opd.models.adapters import add_lora
from opd.models.language_model import LanguageModel
from opd.models.new import character_tokenizer
from opd.pieces.normalise import per
from opd.pieces.supports import full, sampled
from opd.teachers.local import LocalTeacher
from opd.teachers.routed import RoutedTeacher
from opd.teachers.with_base import WithBase, base_teacher
from opd.types import Prompt, Rollout, Sampling, ScoreRequest

WANTED = ScoreRequest(support=sampled(), base=True)


def rows(student: LanguageModel) -> list[Rollout]:
    ids = [[2, 3, 4], [5], [6, 7, 8, 9]]
    made = [rollout_of(student, Prompt(id=i, content=LETTERS[i] + "b"), one) for i, one in enumerate(ids)]
    return [replace(one, sampling=Sampling()) for one in made]


def local(lm: LanguageModel, student: LanguageModel) -> LocalTeacher:
    return LocalTeacher(lm=lm, micro_batch_tokens=40, student_device=student.device)


def test_score_gives_base_its_own_prompt():
    student, external, third = tiny(seed=1), tiny(seed=2, hidden=24), tiny(seed=3, hidden=8)
    both = WithBase(teacher=local(external, student), third=base_teacher(student, third, micro_batch_tokens=40))
    rollouts = rows(student)
    contexts = [replace(one.prompt, content="hgf") for one in rollouts]
    got = both.score(rollouts, contexts, WANTED)
    alone = both.teacher.score(rollouts, contexts, WANTED)
    for one, other, rollout in zip(got, alone, rollouts, strict=True):
        assert torch.equal(one.teacher_logp, other.teacher_logp)
        assert other.base_logp is None
        own = policy(third, rollout).gather(1, rollout.response_ids[:, None])[:, 0]
        assert one.base_logp is not None
        assert torch.allclose(one.base_logp.double(), own, atol=1e-5)


def test_score_leaves_base_out_when_not_read():
    student, external = tiny(seed=1), tiny(seed=2)
    third = local(tiny(seed=3), student)
    calls: list[int] = []

    class Counted(LocalTeacher):
        def score(self, *given, **named):  # type: ignore[no-untyped-def]
            calls.append(1)
            return LocalTeacher.score(self, *given, **named)

    counted = Counted(lm=third.lm, micro_batch_tokens=40, student_device=student.device)
    both = WithBase(teacher=local(external, student), third=counted)
    rollouts = rows(student)
    assert both.score(rollouts, [r.prompt for r in rollouts], ScoreRequest(support=full()))[0].base_logp is None
    assert not calls


def test_base_scores_reach_tokens_in_every_split():
    student, external = tiny(seed=1), tiny(seed=2, hidden=24)
    third = base_teacher(student, tiny(seed=3), micro_batch_tokens=40)
    both = WithBase(teacher=local(external, student), third=third)
    rollouts = rows(student)
    batch = collate(rollouts, both.score(rollouts, [r.prompt for r in rollouts], WANTED), student.device)
    assert batch.base_logp is not None
    assert batch.base_logp.isnan().equal(~batch.mask)
    batch = replace(batch, advantage=torch.zeros_like(batch.teacher_logp), weight=torch.ones_like(batch.teacher_logp))
    whole = sorted(batch.base_logp[batch.mask].tolist())
    for tokens in (6, 1000):
        micros = split(student, batch, per("token")(batch), tokens)
        packed = [value for micro in micros for value in micro.base_logp.tolist()]  # type: ignore[union-attr]
        assert sorted(packed) == whole


def test_base_teacher_switches_adapter_off():
    before = tiny(seed=1)
    adapted = add_lora(tiny(seed=1).model, rank=2, alpha=4.0, target_modules="all-linear")
    tuned = wrapping.wrap(adapted, before.tokenizer, name="student")
    with torch.no_grad():
        for name, parameter in tuned.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    rollouts = rows(tuned)
    scorer = base_teacher(tuned, None, micro_batch_tokens=40)
    assert scorer.base
    assert scorer.is_student
    for one, rollout in zip(
        scorer.score(rollouts, [r.prompt for r in rollouts], ScoreRequest(support=sampled())), rollouts, strict=True
    ):
        own = policy(before, rollout).gather(1, rollout.response_ids[:, None])[:, 0]
        assert torch.allclose(one.teacher_logp.double(), own, atol=1e-5)
        live = policy(tuned, rollout).gather(1, rollout.response_ids[:, None])[:, 0]
        assert not torch.allclose(live, own, atol=1e-2)


def test_base_teacher_refuses_live_student_and_other_tokens():
    student = tiny(seed=1, name="small")
    with pytest.raises(ConfigError, match=r"The base is the student 'small', which has no adapter"):
        base_teacher(student, None, micro_batch_tokens=40)
    other = tiny("llama", character_tokenizer("hgfedcba"), name="odd")
    with pytest.raises(AlignmentError, match=r"small .* and odd .* differ"):
        base_teacher(student, other, micro_batch_tokens=40)


def test_with_base_passes_teacher_on():
    student, external = tiny(seed=1), tiny(seed=2, hidden=24, name="big")
    teacher, third = local(external, student), local(tiny(seed=3), student)
    both = WithBase(teacher=teacher, third=third)
    assert (both.name, both.lm, both.base, both.is_student) == ("big", external, False, False)
    assert both.of("anything") is teacher
    assert torch.equal(both.head().weight, teacher.head().weight)
    assert both.refuses(WANTED) is None
    assert both.state_dict() == teacher.state_dict()
    routed = WithBase(teacher=RoutedTeacher(teachers={"one": teacher}), third=third)
    assert routed.of("one") is teacher
