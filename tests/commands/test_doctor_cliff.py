"""The doctor's check of lambda: masses of structural tokens against plain Python, and what it says of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from support.doctor import characters, pair_of, recipe_of, sums
from support.models import double, full_logits, tiny

from opd.commands.doctor import bias, cliff
from opd.commands.doctor.cliff import FEWEST, ClassOfTokens, classes_of, judged, measured
from opd.commands.doctor.examine import examine
from opd.commands.doctor.subject import Subject
from opd.errors import ConfigError
from opd.evaluation.evaluate import HeldOut
from opd.models.language_model import LanguageModel
from opd.models.new import character_tokenizer
from opd.models.render import render
from opd.pieces.extrapolation import extrapolated
from opd.runs.prepare import Given
from opd.types import Sampling

EXTRA: dict[str, Any] = {"method": "extrapolated_opd", "options": {"strength": 1.3}}


@pytest.fixture(scope="module")
def models() -> dict[str, LanguageModel]:
    return {name: characters(name, seed=i, hidden=16) for i, name in enumerate(("student", "teacher", "base"))}


def subject(models: dict[str, LanguageModel], **stage: Any) -> Subject:
    three = models["student"], models["teacher"], sums(6)
    return pair_of(*three, base=models["base"], **{**EXTRA, **stage})


def one(text: str, teacher: float, base: float, positions: int = 50) -> ClassOfTokens:
    return ClassOfTokens(text=text, positions=positions, teacher=teacher, base=base)


def test_measured_equals_plain_masses(models: dict[str, LanguageModel]):
    chosen = subject(models)
    lm = chosen.student
    texts = [lm.tokenizer.decode([i]) for i in range(lm.vocabulary)]
    groups = {"+": ["+"], "=": ["="], ",": [","], ";": [";"]}
    sums_of: dict[str, list[float]] = {}
    teacher, base = double(models["teacher"]), double(models["base"])
    for rollout in chosen.firsts:
        read = render(rollout.prompt, lm.tokenizer)
        with torch.no_grad():
            rows = [full_logits(each, read, rollout.response_ids, lm.vocabulary).tolist() for each in (teacher, base)]
        for q, b in zip(*rows, strict=True):
            modal = max(range(len(q)), key=lambda v: q[v])
            name = "(the end)" if modal in lm.stop_ids else texts[modal]
            ids = sorted(lm.stop_ids) if modal in lm.stop_ids else [texts.index(t) for t in groups.get(name, [])]
            if ids:
                found = sums_of.setdefault(name, [0, 0.0, 0.0])
                masses = [math.fsum(oracle.softmax(z)[v] for v in ids) for z in (q, b)]
                sums_of[name] = [found[0] + 1, found[1] + masses[0], found[2] + masses[1]]
    got = {each.text: each for each in measured(chosen, chosen.firsts)}
    assert sums_of
    plain = {name for name in got if not name.startswith("<")}
    assert plain == sums_of.keys()
    for name, (n, p, b) in sums_of.items():
        assert got[name].positions == n
        assert got[name].teacher == pytest.approx(p / n, rel=1e-5)
        assert got[name].base == pytest.approx(b / n, rel=1e-5)


def test_classes_join_equal_tokens(models: dict[str, LanguageModel]):
    tokenizer = character_tokenizer("ab,; \n", merges=[(",", " "), (" ", " "), ("a", ",")])
    lm = tiny("llama", tokenizer, name="student")
    chosen = replace(subject(models), student=lm)
    class_of, texts = classes_of(chosen)
    of = {tokenizer.decode([i]): int(class_of[i]) for i in range(lm.vocabulary) if i not in tokenizer.all_special_ids}
    assert of[","] == of[", "]
    assert of[" "] == of["  "]
    assert len({of[","], of[";"], of[" "], of["\n"]}) == 4
    assert of["a"] == of["b"] == of["a,"] == cliff.CONTENT
    assert texts[of[", "]] == ","
    assert texts[of["\n"]] == "(line break)"
    assert texts[int(class_of[tokenizer.eos_token_id])] == "(the end)"


def test_cliff_judges_least_limit():
    found = [one(",", 0.9993, 0.5), one("]", 0.99, 0.1), one(";", 0.9, 0.95), one(":", 0.9, 0.5, FEWEST - 1)]
    by_strength = {
        strength: judged(extrapolated(strength), found, "8 responses") for strength in (1.15, 1.2216, 1.2217, 1.5)
    }
    assert [each.level for each in by_strength.values()] == ["ok", "ok", "stop", "stop"]
    says = by_strength[1.5]
    assert says.numbers["lambda_star"] == pytest.approx(1.22164, abs=1e-4)
    assert "least lambda* is 1.222, of ','" in says.says
    assert "options.strength to at most 1.22" in says.remedy
    assert "1 classes with fewer than 8 positions are left out (':')" in says.says
    assert [row["text"] for row in says.numbers["classes"]] == [",", "]", ";"]
    assert says.numbers["classes"][2]["lambda_star"] is None
    assert judged(extrapolated(1.5, bound=20.0), found, "8 responses").level == "stop"
    assert judged(extrapolated(1.5, bound=2000.0), found, "8 responses").level == "ok"


def test_cliff_allows_what_is_allowed():
    finding = judged(extrapolated(1.5, allow_cliff=True), [one(",", 0.9993, 0.5)], "8 responses")
    assert finding.level == "ok"
    assert finding.says.endswith("options.allow_cliff allows it.")


def test_cliff_counts_classes_without_limit():
    finding = judged(extrapolated(1.5), [one(",", 1.0, 0.5), one(";", 0.4, 0.5)], "8 responses")
    assert finding.level == "ok"
    assert "likelier under the teacher than under the base" in finding.says
    assert "1 classes with a mass of exactly 0 or 1" in finding.says
    assert finding.numbers["classes_with_mass_0_or_1"] == 1
    finding = judged(extrapolated(1.5), [one(",", 0.9, 0.5, 3)], "8 responses")
    assert finding.level == "skipped"
    assert "no class of structural tokens has 8 positions" in finding.says


@pytest.mark.parametrize(
    ("options", "level", "message"),
    [
        ({"strength": 1.0}, "ok", "the target is not beyond the teacher"),
        ({"strength": 1.3, "clip": "none"}, "skipped", "the clip is none"),
        ({"strength": 1.3, "clip": "student/sampler"}, "skipped", "the clip is student/sampler"),
    ],
)
def test_cliff_measures_nothing_when_no_limit_applies(
    models: dict[str, LanguageModel], options: dict[str, Any], level: str, message: str
):
    finding = cliff.cliff(subject(models, options=options))
    assert finding.level == level
    assert message in finding.says


def test_cliff_reads_held_out_responses(models: dict[str, LanguageModel]):
    chosen = subject(models)
    assert "6 responses to training prompts" in cliff.cliff(chosen).says
    held_out = HeldOut(prompts=sums(12)[6:], sampling={"drawn": Sampling()}, reward=None, seed=0)
    finding = cliff.cliff(replace(chosen, held_out=held_out))
    assert "24 held-out responses" in finding.says  # six prompts, four responses each


def test_truncation_skips_method_of_three_models(models: dict[str, LanguageModel]):
    finding = bias.truncation(subject(models))
    assert (finding.level, finding.name) == ("skipped", "signal/bias")


def test_examine_reports_cliff_and_cost(models: dict[str, LanguageModel]):
    recipe = recipe_of(models=("student", "teacher", "base"), **EXTRA)
    report = examine(recipe, given=Given(models=models, prompts=sums(4)), prompts=4)
    names = [finding.name for finding in report.findings]
    assert "extrapolation/cliff" in names
    assert names[-1] == "cost/step"


def test_examine_refuses_base_with_students_weights_live(models: dict[str, LanguageModel]):
    recipe = recipe_of(models=("student", "teacher", "base"), **{**EXTRA, "base": "student"})
    with pytest.raises(ConfigError, match="is the model 'student' that the stage trains"):
        examine(recipe, given=Given(models=models, prompts=sums(4)), prompts=4)
