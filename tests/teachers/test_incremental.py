"""A teacher that reads along says what it says of the whole, and reads every token once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import prompts_of, sampler, teacher_of, tiny

from opd.errors import OPDError
from opd.method import Method
from opd.models.language_model import LanguageModel
from opd.pieces import contexts, signals, supports
from opd.pieces.needs import needing
from opd.teachers.incremental import IncrementalScorer, scoring_along
from opd.teachers.local import LocalTeacher
from opd.teachers.routed import RoutedTeacher
from opd.types import Rollout, ScoreRequest

LOOKS = {2: 9, 5: 6, 6: 6, 11: 3}  # tokens so far: how many responses are still being written


def method(k: int = 3, **pieces: Any) -> Method:
    weight = needing(lambda batch: torch.ones_like(batch.teacher_logp), top_k=k)
    return Method(signal=signals.nll(), weight=weight, **pieces)


def long_ones(lm: LanguageModel) -> list[Rollout]:
    """Nine responses of twelve tokens to three prompts of different lengths."""
    write = replace(sampler(lm, n=3), lm=replace(lm, stop_ids=frozenset()))
    rollouts = write(prompts_of("a", "bcdefg", "hg", teacher_id="one"), seed=(0, 0))
    assert [len(r.response_ids) for r in rollouts] == [12] * 9
    return rollouts


def so_far(rollout: Rollout, tokens: int) -> Rollout:
    return replace(rollout, response_ids=rollout.response_ids[:tokens], trained=rollout.trained[:tokens])


def assert_whole(got: list[Any], teacher: Any, rollouts: list[Rollout], on: Method) -> None:
    expected = teacher.score(
        rollouts,
        on.context(rollouts),
        ScoreRequest(support=supports.sampled(), temperature=on.temperature, top_k=on.top_k),
    )
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.teacher_logp, other.teacher_logp, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.teacher_top_logp, other.teacher_top_logp, atol=1e-5, rtol=1e-5)
        assert one.teacher_top_ids.tolist() == other.teacher_top_ids.tolist()
        assert one.teacher_top_ids.shape[-1] == 3


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "cohere"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_scoring_along_equals_score_of_whole_response(family: str, temperature: float):
    student, external = tiny(), tiny(family, seed=1, hidden=24, padding_rows=5)
    on = method(temperature=temperature)
    teacher = teacher_of(on, student, external)
    score = scoring_along(teacher, on.context, on.request())()  # type: ignore[arg-type]
    rollouts = long_ones(student)
    for tokens, left in LOOKS.items():
        shown = [so_far(r, tokens) for r in rollouts[9 - left :]]
        assert_whole(score(shown), teacher, shown, on)
    others = [replace(r, prompt=replace(r.prompt, id=r.prompt.id + 7)) for r in rollouts[:4]]
    shown = [so_far(r, 12) for r in others]  # another batch of the sampler's
    assert_whole(score(shown), teacher, shown, on)
    shown = [so_far(r, 3) for r in others]
    assert_whole(score(shown), teacher, shown, on)


def test_scoring_along_scores_repeated_prompt_twice():
    student, external = tiny(), tiny(seed=1)
    on = method()
    teacher = teacher_of(on, student, external)
    score = scoring_along(teacher, on.context, on.request())()  # type: ignore[arg-type]
    one, other, third = long_ones(student)[2:5]
    for tokens, shown in ((2, [one, other, one, third]), (5, [one, other, one, third]), (9, [one, one, third])):
        rows = [so_far(r, tokens) for r in shown]
        assert_whole(score(rows), teacher, rows, on)


def test_scoring_along_reads_each_token_once(monkeypatch: pytest.MonkeyPatch):
    student, external = tiny(), tiny(seed=1)
    on = method()
    teacher = teacher_of(on, student, external)
    read: list[int] = []
    forward = LanguageModel.forward

    def counted(self: LanguageModel, ids: Any, **rest: Any) -> Any:
        read.append(ids.numel())
        return forward(self, ids, **rest)

    rollouts = long_ones(student)
    score = scoring_along(teacher, on.context, on.request())()  # type: ignore[arg-type]
    monkeypatch.setattr(LanguageModel, "forward", counted)
    for tokens, left in LOOKS.items():
        score([so_far(r, tokens) for r in rollouts[9 - left :]])
    prompts = 3 * max(len(r.prompt_ids) for r in rollouts)  # each once, padded
    assert sum(read) == prompts + 9 * 2 + 6 * 3 + 6 * 1 + 3 * 5


def test_scoring_along_reads_context_of_teacher():
    student, external = tiny(), tiny(seed=1)
    on = method(context=contexts.privileged(template="{privileged_context}{prompt}"))
    teacher = teacher_of(on, student, external)
    rollouts = [replace(r, prompt=replace(r.prompt, privileged_context="cab")) for r in long_ones(student)]
    score = scoring_along(teacher, on.context, on.request())()  # type: ignore[arg-type]
    for tokens in (4, 8):
        shown = [so_far(r, tokens) for r in rollouts]
        assert_whole(score(shown), teacher, shown, on)


def test_scoring_along_reads_own_rows_when_routed():
    student = tiny()
    lms = {"one": tiny(seed=1), "two": tiny("gpt2", seed=2, hidden=24)}
    teachers = {
        name: LocalTeacher(lm=lm, micro_batch_tokens=64, student_device=student.device) for name, lm in lms.items()
    }
    teacher = RoutedTeacher(teachers=teachers)
    rollouts = [
        replace(r, prompt=replace(r.prompt, teacher_id="two" if r.prompt.id == 1 else "one"))
        for r in long_ones(student)
    ]
    on = method()
    score = scoring_along(teacher, on.context, on.request())()
    for tokens in (4, 8):
        shown = [so_far(r, tokens) for r in rollouts]
        assert_whole(score(shown), teacher, shown, on)


def test_incremental_scorer_refuses_too_long_response():
    student, external = tiny(), tiny(seed=1, max_position_embeddings=8)
    on = method()
    teacher = teacher_of(on, student, external)
    assert teacher is not None
    reader = IncrementalScorer(teacher=teacher, context=on.context, request=on.request())
    shown = [so_far(r, 7) for r in long_ones(student)]
    with pytest.raises(OPDError, match=r"Lower sampling.max_completion_length"):
        reader(shown)
