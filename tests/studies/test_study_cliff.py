"""The study of the cliff: its world against plain Python, and its table and figure."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from support.models import double, full_logits, rollout_of, tiny
from support.study_numbers.beyond import cliff_numbers

from opd.evaluation.compare import whole
from opd.teachers.local import LocalTeacher
from opd.types import Prompt
from opd_studies.claims import cliff
from opd_studies.worlds.lists import Beyond, lists, parses


def test_table_and_figure_have_every_setting():
    made = cliff_numbers(claimed=True, at_five=True)
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
