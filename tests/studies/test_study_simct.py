"""The study of two tokenizers: what the teacher's tokenizer is made of, and what is read off a run."""

from __future__ import annotations

from pathlib import Path

from opd.models.new import character_tokenizer
from opd_studies.claims import simct
from opd_studies.lab.ablation import Size
from opd_studies.lab.distilling import Trained
from opd_studies.lab.lab import student_recipe, teacher_recipe


def test_merges_of_setting_b_extend_those_of_a():
    few, many = simct.merges(simct.FEW), simct.merges(simct.MANY)
    assert many[: simct.FEW] == few
    assert (len(few), len(many)) == (simct.FEW, simct.MANY)


def test_tokenized_gives_teacher_fewer_tokens():
    size = simct.tokenized(Size().pair, simct.MANY)
    student, teacher = student_recipe(0, size)["models"]["student"], teacher_recipe(0, size)["models"]["teacher"]
    assert "merges" not in student["tokenizer"]
    characters = character_tokenizer(student["tokenizer"]["characters"])
    pairs = character_tokenizer(
        teacher["tokenizer"]["characters"], [(left, right) for left, right in teacher["tokenizer"]["merges"]]
    )
    answer = "02578"
    assert len(characters(answer, add_special_tokens=False).input_ids) == 5
    assert len(pairs(answer, add_special_tokens=False).input_ids) < 5
    assert pairs.decode(pairs(answer, add_special_tokens=False).input_ids) == answer


def test_read_gives_kl_from_sequence_log_weight():
    metrics = dict.fromkeys(simct.MEASURED.values(), 0.5)
    last = {**metrics, "teacher/sequence_log_weight": -2.0}
    one = Trained(model=Path("model"), before={}, after={}, last=last, rows=[], evaluations=[])
    found = {"KL a response": [2.0], "coverage": [0.5], "shared coverage": [0.5], "units a token": [0.5]}
    assert simct.read({"simct": [one]})["simct"] == found
