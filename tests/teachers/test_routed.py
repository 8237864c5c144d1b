"""Several teachers in one step: who scores which row, with whose output layer, however the rows are split."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import LETTERS, Gradient, batch_of, parameters_of, rollout_of, sampler, step, tiny, unscored

from opd import methods
from opd.errors import TeacherError
from opd.loss.collate import attach, collate, split
from opd.loss.step import heads_of
from opd.method import Method
from opd.models.language_model import LanguageModel
from opd.pieces import signals, supports
from opd.samplers.writers import SamplerByTask
from opd.teachers.local import LocalTeacher, with_record
from opd.teachers.routed import RoutedTeacher
from opd.types import NoTeacher, Prompt, Record, Rollout, ScoreRequest, Support

TEACHERS = {"small": 8, "large": 24}  # hidden sizes


def models() -> tuple[LanguageModel, dict[str, LanguageModel]]:
    student = tiny(seed=1, name="student")
    return student, {name: tiny(seed=i, hidden=h, name=name) for i, (name, h) in enumerate(TEACHERS.items(), start=2)}


def several(student: LanguageModel, lms: dict[str, LanguageModel], **options: Any) -> RoutedTeacher:
    return RoutedTeacher(
        teachers={
            name: LocalTeacher(lm=lm, micro_batch_tokens=40, student_device=student.device, **options)
            for name, lm in lms.items()
        }
    )


def rows(student: LanguageModel, count: int = 7) -> list[Rollout]:
    """Responses of different lengths to prompts of two tasks, teachers in no order, some tokens not trained."""
    made: list[Rollout] = []
    for i in range(count):
        name = ("small", "large", "large", "small", "small")[i % 5]
        prompt = Prompt(id=i, content=LETTERS[i % 8] + "ab", teacher_id=name, task=f"task of {name}")
        ids = [2 + (3 * i + t) % 8 for t in range(1 + (5 * i) % 7)]
        trained = [(i + t) % 4 != 3 for t in range(len(ids))]
        made.append(rollout_of(student, prompt, ids, trained=trained if any(trained) else None))
    return made


METHODS = {
    "the whole vocabulary, closed form": methods.build("reverse_kl", {"average": "token"}),
    "the whole vocabulary": methods.build("gkd", {"beta": 0.3, "on_policy_share": 1.0}),
    "top-k": methods.build("topk_reverse_kl", {"k": 3, "by": "teacher", "form": "tail"}),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_routed_teacher_step_equals_sum_over_teachers(method: Method):
    """By linearity: every row's loss is that with its own teacher, and the denominator is that of all rows."""
    student, lms = models()
    rollouts = rows(student)
    together = step(method, student, several(student, lms), rollouts)
    batch = batch_of(method, student, several(student, lms), rollouts)  # type: ignore[arg-type]
    count = method.normalise(attach(batch, method)).count

    expected = {name: torch.zeros_like(p) for name, p in student.trainable().items()}
    loss = 0.0
    for name, lm in lms.items():
        own = [r for r in rollouts if r.prompt.teacher_id == name]
        alone = LocalTeacher(lm=lm, micro_batch_tokens=40, student_device=student.device)
        part = step(method, student, alone, own)
        weight = method.normalise(batch_of(method, student, alone, own)).count / count
        loss += weight * part.loss
        for key, grad in part.grads.items():
            expected[key] += weight * grad
    assert together.loss == pytest.approx(loss, rel=1e-5)
    assert together.norm > 0
    assert together.distance(Gradient(loss=loss, grads=expected)) < 1e-5


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("tokens", [1, 12, 30, 60])
def test_routed_teacher_step_is_independent_of_split(method: Method, tokens: int):
    student, lms = models()
    rollouts = rows(student)
    whole = step(method, student, several(student, lms), rollouts)
    parts = step(method, student, several(student, lms), rollouts, tokens)
    turned = step(method, student, several(student, lms), rollouts[::-1], tokens)
    assert parts.distance(whole) < 1e-5
    assert turned.distance(whole) < 1e-5
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)


def test_routed_teacher_step_changes_when_teachers_swap():
    """The comparisons above can tell."""
    student, lms = models()
    rollouts = rows(student)
    other = {"small": "large", "large": "small"}
    swapped = [replace(r, prompt=replace(r.prompt, teacher_id=other[str(r.prompt.teacher_id)])) for r in rollouts]
    method = METHODS["the whole vocabulary, closed form"]
    right, wrong = (step(method, student, several(student, lms), which) for which in (rollouts, swapped))
    assert wrong.distance(right) > 0.1


@pytest.mark.parametrize("support", [supports.full(), supports.sampled(), supports.top_k(3)], ids=lambda s: s.kind)
def test_routed_teacher_scores_rows_by_own_teacher(support: Support):
    student, lms = models()
    rollouts = rows(student)
    contexts = [r.prompt for r in rollouts]
    scores = several(student, lms).score(
        rollouts, contexts, ScoreRequest(support=support, temperature=0.7, entropy=True)
    )
    for rollout, context, score in zip(rollouts, contexts, scores, strict=True):
        lm = lms[str(rollout.prompt.teacher_id)]
        alone = LocalTeacher(lm=lm, micro_batch_tokens=40, student_device=student.device)
        (expected,) = alone.score([rollout], [context], ScoreRequest(support=support, temperature=0.7, entropy=True))
        torch.testing.assert_close(score.teacher_logp, expected.teacher_logp, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(score.teacher_entropy, expected.teacher_entropy, atol=1e-5, rtol=1e-5)
        if support.kind == "full":
            assert score.teacher_hidden is not None
            assert score.teacher_hidden.shape == (len(rollout.response_ids), TEACHERS[str(rollout.prompt.teacher_id)])
        if support.kind == "top_k":
            assert torch.equal(score.support_ids, expected.support_ids)  # type: ignore[arg-type]


def test_routed_teacher_reads_context_of_own_rows():
    student, lms = models()
    rollouts = rows(student)
    contexts = [replace(r.prompt, content=f"{r.prompt.content}{LETTERS[i % 8]}") for i, r in enumerate(rollouts)]
    scores = several(student, lms).score(rollouts, contexts, ScoreRequest(support=supports.sampled(), temperature=1.0))
    plain = several(student, lms).score(
        rollouts, [r.prompt for r in rollouts], ScoreRequest(support=supports.sampled(), temperature=1.0)
    )
    for i, rollout in enumerate(rollouts):
        lm = lms[str(rollout.prompt.teacher_id)]
        alone = LocalTeacher(lm=lm, micro_batch_tokens=40, student_device=student.device)
        (expected,) = alone.score([rollout], [contexts[i]], ScoreRequest(support=supports.sampled(), temperature=1.0))
        torch.testing.assert_close(scores[i].teacher_logp, expected.teacher_logp, atol=1e-5, rtol=1e-5)
    assert any(not torch.allclose(a.teacher_logp, b.teacher_logp) for a, b in zip(scores, plain, strict=True))


def test_split_gives_one_task_per_micro_batch_when_full_support():
    student, lms = models()
    rollouts = rows(student)
    teacher = several(student, lms)
    for name, method in METHODS.items():
        scores = teacher.score(
            rollouts, [r.prompt for r in rollouts], ScoreRequest(support=method.support, temperature=1.0)
        )
        batch = attach(collate(rollouts, scores, student.device), method)
        micros = split(student, batch, method.normalise(batch), 10**6)
        found = [{r.prompt.teacher_id for r in micro.rollouts} for micro in micros]
        if name == "top-k":
            assert found == [{"small", "large"}]
            assert [(m.task, m.teacher_id, m.teacher_hidden) for m in micros] == [(None, None, None)]
        else:
            assert sorted(map(tuple, found)) == [("large",), ("small",)]
            for micro in micros:
                assert micro.teacher_hidden is not None
                assert micro.teacher_hidden.shape == (len(micro.token_ids), TEACHERS[str(micro.teacher_id)])
                assert micro.task == f"task of {micro.teacher_id}"


def test_split_gives_teacher_states_of_trained_tokens():
    """Row by row and token by token, whatever else is in the batch, and none of the others."""
    student, lms = models()
    rollouts = rows(student)
    method = METHODS["the whole vocabulary"]
    scores = several(student, lms).score(
        rollouts, [r.prompt for r in rollouts], ScoreRequest(support=method.support, temperature=1.0)
    )
    batch = attach(collate(rollouts, scores, student.device), method)
    for micro in split(student, batch, method.normalise(batch), 30):
        assert micro.teacher_hidden is not None
        assert bool(micro.teacher_hidden.isfinite().all())
        for state, row, at in zip(micro.teacher_hidden, micro.row, micro.step, strict=True):
            whole = scores[next(i for i, r in enumerate(rollouts) if r is micro.rollouts[int(row)])].teacher_hidden
            assert whole is not None
            assert torch.equal(state, whole[int(at)])


def test_routed_teacher_raises_teacher_error_when_unknown():
    student, lms = models()
    rollout = rows(student, 1)[0]
    rollout = replace(rollout, prompt=replace(rollout.prompt, teacher_id="smal"))
    with pytest.raises(TeacherError, match=r"`teacher_id` is 'smal', but the teachers are small, large. Did you mean"):
        several(student, lms).score(
            [rollout], [rollout.prompt], ScoreRequest(support=supports.sampled(), temperature=1.0)
        )


def test_routed_teacher_restores_state_of_each_teacher():
    """Averages that follow a student, as an EMA teacher is."""
    student, _ = models()
    copies = {name: tiny(seed=i, name=name) for i, name in enumerate(TEACHERS)}
    teacher = several(student, copies, follows=student, decay=0.5)
    teacher.after_step()
    saved = {key: value.clone() for key, value in teacher.state_dict().items()}
    assert {key.partition("/")[0] for key in saved} == set(TEACHERS)
    fresh = several(student, {name: tiny(seed=9, name=name) for name in TEACHERS}, follows=student, decay=0.5)
    fresh.load_state_dict(saved)
    for name in TEACHERS:
        expected, got = (parameters_of(t.of(name).lm) for t in (teacher, fresh))
        assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert not torch.equal(*(next(iter(parameters_of(teacher.of(name).lm).values())) for name in TEACHERS)), (
        "each has its own"
    )


def test_heads_of_gives_the_heads_of_the_step_alone():
    student, lms = models()
    teacher = several(student, lms)
    small = [r for r in rows(student) if r.prompt.teacher_id == "small"]
    full, top = (Method(support=support, signal=signals.nll()) for support in (supports.full(), supports.top_k(3)))
    batch = collate(small, unscored(small), student.device)
    assert set(heads_of(full, teacher, batch)) == {"small"}
    assert heads_of(top, teacher, batch) == {}
    itself = LocalTeacher(lm=student, micro_batch_tokens=8, student_device=student.device, is_student=True)
    assert heads_of(full, itself, batch) == {}
    assert heads_of(replace(full, support=supports.sampled()), NoTeacher(), batch) == {}


# --- who writes ------------------------------------------------------------------------------------------------------


def test_sampler_by_task_depends_on_task_and_prompt_alone():
    """The limit and the settings are the task's; the other prompts of the step change nothing."""
    lm = tiny(seed=4)
    short = sampler(lm, max_completion_length=2, n=2)
    long = sampler(lm, max_completion_length=9, n=2, temperature=0.8)
    both = SamplerByTask(samplers={"short": short, "long": long})
    prompts = [Prompt(id=i, content=LETTERS[i], task=("short", "long", "long", "short")[i % 4]) for i in range(8)]
    written = both(prompts, seed=(0, 3), record=Record(top_k=2))
    assert [r.prompt.id for r in written] == [i for i in range(8) for _ in range(2)]
    assert [r.sample for r in written] == [0, 1] * 8
    for rollout in written:
        alone = (short if rollout.prompt.task == "short" else long)([rollout.prompt], seed=(0, 3))[rollout.sample]
        assert rollout.response_ids.tolist() == alone.response_ids.tolist()
        assert len(rollout.response_ids) <= (2 if rollout.prompt.task == "short" else 9)
        assert rollout.student_top_ids is not None
    assert max(len(r.response_ids) for r in written if r.prompt.task == "long") > 2
    turned = both(prompts[::-1], seed=(0, 3), record=Record(top_k=2))
    tokens = {(r.prompt.id, r.sample): r.response_ids.tolist() for r in written}
    assert {(r.prompt.id, r.sample): r.response_ids.tolist() for r in turned} == tokens


def test_with_record_uses_temperature_of_task():
    lm = tiny(seed=4)
    temperatures = {"cold": 0.5, "warm": 2.0}
    rollouts = [rollout_of(lm, Prompt(id=i, content="ab", task=("cold", "warm")[i % 2]), [2, 3, 4]) for i in range(4)]

    def made(temperature: Any) -> list[torch.Tensor]:
        record = Record(entropy=True)
        found = with_record(lm, rollouts, record, temperature=temperature, micro_batch_tokens=100)
        return [r.student_entropy for r in found if r.student_entropy is not None]

    got = made(lambda rollout: temperatures[rollout.prompt.task])
    for i, entropy in enumerate(got):
        expected = made(lambda _, i=i: temperatures[("cold", "warm")[i % 2]])[i]
        torch.testing.assert_close(entropy, expected)
    assert bool((got[0] < got[1]).all())
