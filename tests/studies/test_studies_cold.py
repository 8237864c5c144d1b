"""Cold starts and prompts: the data of several kinds, one look at two models, and both studies at a reduced size."""

from __future__ import annotations

import math

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from opd.errors import ConfigError
from opd_studies.claims import cold_start, prompts
from opd_studies.lab.after_training import look
from opd_studies.lab.lab import SORTING, Lab, PairSize
from opd_studies.page import report
from opd_studies.worlds.sorting_kinds import sorting_of_kinds

TINY = PairSize(
    task=SORTING,
    teacher={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    student={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1},
    teacher_rows=100,
    teacher_steps=2,
    student_rows=30,
    student_steps=2,
    prompts_per_step=4,
)
KINDS = [
    {"share": 0.75, "lowest": 0, "highest": 6, "sign": ">"},
    {"share": 0.25, "lowest": 3, "highest": 9, "sign": "="},
]


def test_sorting_of_kinds_has_shares_digits_and_signs():
    rows = list(sorting_of_kinds(200, KINDS, seed=4))
    assert [sum(row["prompt"].endswith(sign) for row in rows) for sign in ">="] == [150, 50]
    for row in rows:
        digits, sign = row["prompt"][:-1], row["prompt"][-1]
        assert row["response"] == row["answer"] == "".join(sorted(digits))
        assert len(digits) == 5
        assert set(digits) <= set("0123456" if sign == ">" else "3456789")
    assert len({row["prompt"] for row in rows}) == 200


def test_sorting_of_kinds_shares_problems_and_splits_parts():
    asked = [{**KINDS[0], "share": 1.0, "sign": sign} for sign in ">="]
    one, other = ([row["prompt"][:-1] for row in sorting_of_kinds(100, [kind], seed=3)] for kind in asked)
    assert one == other
    held_out = {row["prompt"][:-1] for row in sorting_of_kinds(100, [asked[0]], seed=3, part="held_out")}
    every = {row["prompt"][:-1] for row in sorting_of_kinds(7000, asked[:1], seed=1)}
    assert not held_out & every


def test_sorting_of_kinds_refuses_too_many_rows():
    kind = {"share": 1.0, "lowest": 0, "highest": 2, "sign": ">"}
    with pytest.raises(ConfigError, match=r"rows of 5 digits in 0\.\.2; 500 are too many"):
        list(sorting_of_kinds(500, [kind]))


def test_look_equals_reading_one_response_at_a_time(tmp_path, monkeypatch):
    import opd.evaluation.compare

    kept = []
    compare = opd.evaluation.compare.compare
    monkeypatch.setattr(
        opd.evaluation.compare, "compare", lambda *given, **more: kept.append(given[2]) or compare(*given, **more)
    )
    pair = Lab(folder=tmp_path, workers=1).pair(0, TINY)
    data = SORTING.rows(6, part="held_out")
    for writer in ("student", "teacher"):
        seen = look(pair.student, pair.teacher, SORTING, data, seed=0, k=4, writer=writer)
        rollouts = kept.pop()
        student, teacher = (AutoModelForCausalLM.from_pretrained(path) for path in (pair.student, pair.teacher))
        nll, shared, entropy, count = 0.0, 0.0, 0.0, 0
        for one in rollouts:
            ids = torch.tensor([[*one.prompt_ids, *one.response_ids.tolist()]])
            with torch.no_grad():
                ours, theirs = (m(ids).logits[0, :, : m.config.vocab_size].log_softmax(-1) for m in (student, teacher))
            for at in range(len(one.prompt_ids), ids.shape[1]):
                p, q = ours[at - 1].tolist(), theirs[at - 1].tolist()
                nll -= p[int(ids[0, at])]
                entropy -= sum(math.exp(v) * v for v in p)
                tops = [set(sorted(range(len(v)), key=lambda i: -v[i])[:4]) for v in (p, q)]
                shared += len(tops[0] & tops[1]) / 4
                count += 1
        assert seen["NLL"] == pytest.approx(nll / count, abs=1e-5)
        assert seen["student entropy"] == pytest.approx(entropy / count, abs=1e-5)
        assert seen["overlap ratio"] == pytest.approx(shared / count, abs=1e-6)
        assert seen["accuracy"] == sum(one.text == one.prompt.answer for one in rollouts) / 6


def test_cold_start_and_prompts_run_at_reduced_size(tmp_path):
    """From training to the table and the figure."""
    lab = Lab(folder=tmp_path, workers=1)
    small = cold_start.Size(cold_steps=2, keep="all", steps=4, prompts_per_step=4, held_out=4, pair=TINY)
    with report.style():
        outcome = cold_start.run(lab, small)
        assert len(outcome.findings) == 5
        assert [row[0] for row in outcome.table][1:4] == ["base", "cold start", "SFT alone"]
        numbers = prompts.measure(lab, prompts.Size(steps=1, prompts=20, held_out=4, pair=TINY), share=0.1)
        both = dict.fromkeys(prompts.SHARES, numbers)
        assert len(prompts.judge(both)) == 5
        assert len(prompts.table(both)) == 1 + 2 * len(numbers)
        prompts.draw(both)
    stages = [yaml.safe_load(recipe.read_text())["stages"][0] for recipe in tmp_path.glob("*/recipe.yaml")]
    cold = [(one["data"]["skip"], one["data"]["limit"], one["steps"]) for one in stages if one["train"] == "student"]
    assert (0, 8, 2) in cold, "the cold start has the first prompts"
    assert cold.count((8, None, 2)) == 2 * 3, "the second stage has the others, in both settings of three seeds"


def test_recovery_is_share_of_gap_or_nan():
    def seen(accuracy):
        return {"own": {"accuracy": [accuracy] * 3}}

    numbers = {prompts.START: seen(0.2), prompts.TEACHER: seen(0.7), "own": seen(0.6)}
    assert prompts.recovery(numbers, "own", "own") == pytest.approx([0.8] * 3)
    numbers[prompts.TEACHER] = seen(0.2)
    assert all(math.isnan(share) for share in prompts.recovery(numbers, "own", "own"))
