"""Five prepared pairs, each taught in seconds, and what `opd doctor` has to say about them."""

from __future__ import annotations

import json

import pytest
import torch
from support.doctor import (
    CHAT,
    characters,
    chatting,
    diagnosis,
    finding,
    letters,
    sums,
    teach,
    with_context,
)
from support.models import build, parameters_of, tiny

from opd.commands.doctor.findings import Report, as_json, as_text
from opd.models import adapters, wrapping
from opd.models.language_model import LanguageModel
from opd.models.new import character_tokenizer
from opd.types import Prompt

ENOUGH, HALFWAY = 150, 28  # steps until a model knows all sums, and until it knows some


@pytest.fixture(scope="module")
def known() -> LanguageModel:
    """A model that knows all sums."""
    return teach(characters("teacher", seed=1), sums(), steps=ENOUGH)


@pytest.fixture(scope="module")
def learner() -> LanguageModel:
    """A model that knows some sums."""
    return teach(characters("student", seed=2), sums(), steps=HALFWAY)


@pytest.fixture(scope="module")
def healthy(learner: LanguageModel, known: LanguageModel) -> Report:
    return diagnosis({"student": learner, "teacher": known}, sums())


def asked_to_act(report: Report) -> set[str]:
    return {found.name for found in report.findings if found.level in ("change", "stop")}


def test_verdict_is_go_when_pair_is_healthy(healthy):
    assert not asked_to_act(healthy), as_text(healthy)
    assert healthy.verdict == "go"
    accuracy = finding(healthy, "headroom/accuracy")
    assert accuracy.numbers["teacher"] > 0.9
    assert accuracy.numbers["student"] < 0.7
    assert finding(healthy, "signal/bias").numbers["cosine"] > 0.95


def test_verdict_is_go_with_changes_when_chat_templates_differ():
    student = teach(chatting("student", seed=2), sums(chat=True), steps=HALFWAY)
    other = CHAT.replace("<assistant>", "\nA: ").replace("<{{ m.role }}>", "Q: ")
    teacher = teach(chatting("teacher", seed=1, template=other), sums(chat=True), steps=ENOUGH)
    report = diagnosis({"student": student, "teacher": teacher}, sums(chat=True))
    assert report.verdict == "go with these changes", as_text(report)
    template = finding(report, "tokens/template")
    assert template.level == "change"
    assert "models.student.chat_template" in template.remedy
    assert "16 of 16 prompts are rendered differently for the teacher" in template.says
    assert "2604.13016 section 5.2" in template.study


def test_verdict_is_stop_when_turn_endings_differ():
    student = teach(chatting("student", seed=2), sums(chat=True), steps=HALFWAY)
    teacher = teach(chatting("teacher", seed=1, end="<end>"), sums(chat=True), steps=ENOUGH)
    report = diagnosis({"student": student, "teacher": teacher}, sums(chat=True))
    assert report.verdict == "stop", as_text(report)
    endings = finding(report, "tokens/endings")
    assert endings.level == "change"
    assert "The teacher ends its turn with '<end>', and the student's response continues after it" in endings.says
    assert "sampling.stop" in endings.remedy
    special = finding(report, "signal/special_tokens")
    assert special.level == "stop"
    assert special.numbers["end"] < -10 < special.numbers["rest"]
    assert special.numbers["teacher_ends_alike"] == 0.0
    assert "never to end" in special.says


def test_verdict_is_stop_when_teacher_is_no_better(learner, known):
    report = diagnosis({"student": known, "teacher": learner}, sums())
    assert report.verdict == "stop", as_text(report)
    accuracy = finding(report, "headroom/accuracy")
    assert accuracy.level == "stop"
    assert accuracy.numbers["gap_high"] < 0
    assert "The teacher is no better than the student" in accuracy.says
    assert "the stage's teacher" in accuracy.remedy
    assert "2604.13016 sections 3.2 and 3.3" in accuracy.study


@pytest.fixture(scope="module")
def reader() -> LanguageModel:
    """A model that says the letter that it reads, and any letter where it reads none."""
    lm = tiny("llama", character_tokenizer("abcdefgh0123456789=;"), name="student", seed=3, hidden=32, spread=0.1)
    rows = [p for seed in range(4) for p in (*letters(seed=seed), *with_context(letters(seed=10 + seed)))]
    return teach(lm, rows, steps=120)


PRIVILEGED = {
    "method": "context_distillation",
    "options": {"template": "{privileged_context};{prompt}", "k": None},
    "reward": {"name": "exact"},
    "sampling": {"max_completion_length": 4},
}


def test_verdict_is_stop_when_context_is_the_answer(reader):
    report = diagnosis({"student": reader}, letters(), **PRIVILEGED)
    assert report.verdict == "stop", as_text(report)
    disagreement, transfer = finding(report, "information/disagreement"), finding(report, "information/transfer")
    assert disagreement.level == "change"
    assert disagreement.numbers["share"] > 0.5
    assert transfer.level == "stop"
    assert transfer.numbers["own_gain"] > 0.5 > transfer.numbers["other_gain"]
    assert "the teacher knows the answer, not how to find it" in transfer.says
    for found in (disagreement, transfer):
        assert "options.system" in found.remedy
        assert "2605.11182 eq. 10-11" in found.study


def test_verdict_is_go_when_all_prompts_share_context(reader):
    rows = [Prompt(id=p.id, content=p.content, answer="c", privileged_context="c") for p in letters()]
    report = diagnosis({"student": reader}, rows, **PRIVILEGED)
    assert report.verdict == "go", as_text(report)
    for name in ("information/disagreement", "information/transfer"):
        assert "-log Z is 0, and it transfers by construction" in finding(report, name).says


def test_examine_changes_no_weight_and_leaves_no_gradient(learner, known):
    before = parameters_of(learner), parameters_of(known)
    report = diagnosis({"student": learner, "teacher": known}, sums(), looked_at=4)
    assert finding(report, "cost/step").numbers["grad_norm"] > 0
    for lm, old in zip((learner, known), before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in parameters_of(lm).items())
        assert all(p.grad is None for p in lm.model.parameters())


def test_as_json_agrees_with_as_text(healthy):
    read = json.loads(as_json(healthy))
    assert read["verdict"] == healthy.verdict == "go"
    assert [row["name"] for row in read["findings"]] == [found.name for found in healthy.findings]
    assert sum(read["counts"].values()) == len(read["findings"])
    text = as_text(healthy)
    assert text.startswith("pair, stage distil: GO\n(16 prompts, seed 0,")
    assert all(found.name in text for found in healthy.findings)
    assert read["counts"]["skipped"] == sum(found.level == "skipped" for found in healthy.findings)


def test_examine_is_reproducible_when_seed_is_equal(healthy, learner, known):
    again = diagnosis({"student": learner, "teacher": known}, sums())
    timed = "cost/step"
    assert [f.numbers for f in again.findings if f.name != timed] == [
        f.numbers for f in healthy.findings if f.name != timed
    ]


def test_examine_freezes_student_with_its_adapter():
    """The frozen teacher is the student as it starts, so it agrees with it, whether the adapter is new or trained."""
    tokenizer = character_tokenizer("abcdefgh0123456789=;")
    model = adapters.add_lora(build("llama", tokenizer, seed=3), rank=2, alpha=4.0, target_modules="all-linear")
    student = wrapping.wrap(model, tokenizer, name="student")
    options = {"template": "{prompt}", "k": 4, "by": "teacher", "form": "tail"}
    looked_at = {"method": "context_distillation", "options": options, "reward": None, "looked_at": 4}
    fresh = diagnosis({"student": student}, letters(), **looked_at)
    assert finding(fresh, "signal/strength").level == "stop"
    for name, parameter in student.trainable().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    trained = diagnosis({"student": student}, letters(), **looked_at)
    assert finding(trained, "signal/self_test").level == "ok"
    assert finding(trained, "signal/strength").level == "stop"
