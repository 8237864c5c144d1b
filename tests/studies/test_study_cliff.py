"""The study of the cliff: its world against plain Python, and its verdicts on numbers as claimed and their opposite."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from support.models import double, full_logits, rollout_of, tiny
from support.study_numbers import spread

from opd.evaluation.compare import whole
from opd.teachers.local import LocalTeacher
from opd.types import Prompt
from opd_studies.claims import cliff
from opd_studies.worlds.lists import Beyond, lists, parses

P, B = 0.99, 0.85  # lambda* 1.14 at c 1.5, 1.57 at 5, 2.05 at 20


def numbers(*, claimed: bool, at_five: bool) -> cliff.Numbers:
    """`claimed`: what the paper says; `at_five`: the same at c = 5."""
    parse: dict[str, list[float]] = {}
    for name, one in cliff.SETTINGS.items():
        stays = one.weight != "teacher/student"
        well = at_five if one.bound == 5.0 and not stays and one.slower == 1 else claimed
        star = cliff.limit(P, B, one.bound)
        share = 0.5 if one.strength == 1.0 else 0.9 if stays or one.strength <= star else 0.05
        parse[name] = spread(share if well else 0.9 - 0.2 * one.strength if stays else 0.3 + 0.1 * (one.strength < 1.1))
    return cliff.Numbers(
        parse=parse,
        start={"student before": spread(0.4), "teacher": spread(0.9)},
        structure=list(zip(spread(P), spread(B), strict=True)),
        content=[(0.6, 0.5)] * 3,
    )


def test_judge_follows_numbers():
    verdicts = [one.verdict for one in cliff.judge(numbers(claimed=True, at_five=True))]
    assert verdicts == ["holds"] * 7
    verdicts = [one.verdict for one in cliff.judge(numbers(claimed=False, at_five=False))]
    assert verdicts == ["contradicted"] * 7
    verdicts = [one.verdict for one in cliff.judge(numbers(claimed=True, at_five=False))]
    assert verdicts[:3] == ["holds in B only"] * 3


def test_table_and_figure_have_every_setting():
    made = numbers(claimed=True, at_five=True)
    assert {row[0] for row in cliff.table(made)} >= {*cliff.SETTINGS, "student before", "teacher"}
    assert len(cliff.draw(made).axes) == 2


def test_lists_are_copies_that_parse_unless_sloppy():
    rows = list(lists(40, sloppy=0.0))
    assert all(row["response"] == row["answer"] == f"[{','.join(row['prompt'][:5])}]" for row in rows)
    prompt = Prompt(id=0, content="12345>")
    assert all(parses(prompt, row["response"]) == 1.0 for row in rows)
    sloppy = [row["response"] for row in lists(200, sloppy=0.2)]
    assert 0.15 < sum(text.count(";") for text in sloppy) / 800 < 0.25
    for text in ("[1,2,3,4]", "[1;2,3,4,5]", "[1,2,3,4,5", "1,2,3,4,5", "[1,2,3,4,5,6]", ""):
        assert parses(prompt, text) == 0.0


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_beyond_is_product_of_powers(strength: float):
    student, q, b = tiny(seed=1), tiny(seed=2, hidden=24), tiny(seed=3)
    parts = [LocalTeacher(lm=lm, micro_batch_tokens=64, student_device=student.device) for lm in (q, b)]
    beyond = Beyond(teachers=parts, factors=(strength, 1.0 - strength))
    rollout = replace(rollout_of(student, Prompt(id=0, content="ab"), [2, 3, 4]))
    (scores,) = beyond.score([rollout], [rollout.prompt], whole())
    assert scores.teacher_hidden is not None
    got = beyond.head().logits(scores.teacher_hidden).softmax(-1)
    with torch.no_grad():
        z = [full_logits(double(lm), rollout.prompt_ids, rollout.response_ids, lm.vocabulary).tolist() for lm in (q, b)]
    for t in range(3):
        assert got[t].tolist() == pytest.approx(oracle.extrapolation(z[0][t], z[1][t], strength), abs=1e-5)
