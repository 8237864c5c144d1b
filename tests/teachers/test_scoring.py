"""Scores of a batch's responses, whose tokens share one product with the output layer."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from support.models import prompts_of, teacher_of, tiny, write
from torch import Tensor

from opd import methods
from opd.models.head import Head
from opd.pieces.supports import sampled, top_k
from opd.teachers.scoring import parted
from opd.types import Sampling, ScoreRequest, Scores, Support


@pytest.mark.parametrize("support", [sampled(), top_k(3), top_k(3, by="union", with_sampled=True)])
def test_score_reads_head_once_for_responses_of_batch(support: Support, monkeypatch: pytest.MonkeyPatch):
    method = replace(methods.build("topk_reverse_kl", {"k": 3, "by": "union"}), support=support)
    student, external = tiny(), tiny(seed=1)
    recorded = methods.build("topk_reverse_kl", {"k": 3, "by": "union"})
    rollouts = write(recorded, student, external, prompts_of("ab", "cdefg"), Sampling(max_completion_length=7, n=2))
    teacher = teacher_of(method, student, external)
    assert teacher is not None
    request = ScoreRequest(support=support, temperature=0.7, entropy=True)
    alone = [teacher.score([one], [one.prompt], request)[0] for one in rollouts]
    rows: list[int] = []
    project_into = Head.project_into

    def counted(head: Head, out: Tensor, hidden: Tensor, *rest: float) -> Tensor:
        rows.append(len(hidden))
        return project_into(head, out, hidden, *rest)

    monkeypatch.setattr(Head, "project_into", counted)
    together = teacher.score(rollouts, [one.prompt for one in rollouts], request)
    assert rows == [sum(len(one.response_ids) for one in rollouts)]
    for mine, expected in zip(together, alone, strict=True):
        for field in fields(Scores):
            got, wanted = getattr(mine, field.name), getattr(expected, field.name)
            assert (got is None) == (wanted is None), field.name
            if got is not None:
                torch.testing.assert_close(got, wanted, msg=field.name)


def test_parted_gives_each_response_its_tokens():
    whole = Scores(teacher_logp=torch.arange(6.0), support_ids=torch.arange(12).view(6, 2))
    parts = parted(whole, [1, 3, 2])
    assert [part.teacher_logp.tolist() for part in parts] == [[0.0], [1.0, 2.0, 3.0], [4.0, 5.0]]
    assert [part.support_ids.tolist() for part in parts if part.support_ids is not None] == [
        [[0, 1]],
        [[2, 3], [4, 5], [6, 7]],
        [[8, 9], [10, 11]],
    ]
    assert all(part.teacher_entropy is None for part in parts)
