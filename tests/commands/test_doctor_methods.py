"""What the doctor says of methods that are not one divergence from one teacher, and what it cannot say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from support.doctor import characters, check_expected_gradient, diagnosis, finding, letters, pair_of, sums
from support.models import tiny

from opd.commands.doctor import bias, headroom, information, signal
from opd.commands.doctor.findings import Report
from opd.commands.doctor.subject import Subject
from opd.errors import ConfigError
from opd.models.language_model import LanguageModel
from opd.models.new import character_tokenizer

GROUP = {"max_completion_length": 4, "n": 4}
JUDGED = {
    "name": "rubric",
    "author": {"lm": "teacher", "max_tokens": 8},
    "judge": {"function": "opd_studies.worlds.graders:grader"},
}
EXACT = {"name": "exact"}
SHOWN = "{privileged_context};{prompt}"


@pytest.fixture(scope="module")
def reader() -> LanguageModel:
    return tiny("llama", character_tokenizer("abcdefgh0123456789=;ortecnw"), name="student", seed=3, hidden=32)


@pytest.fixture(scope="module")
def models() -> dict[str, LanguageModel]:
    return {"student": characters("student", seed=1), "teacher": characters("teacher", seed=2, hidden=16)}


def levels(report: Report) -> Mapping[str, str]:
    return {one.name: one.level for one in report.findings}


# --- a baseline ------------------------------------------------------------------------------------------------------


def test_truncation_is_unbiased_when_method_is_vopd(models):
    chosen = pair_of(models["student"], models["teacher"], sums(4), method="vopd", options={"k": 3})
    check_expected_gradient(chosen)
    found = bias.truncation(chosen)
    assert found.level == "ok"
    assert "the sampled token, in expectation" in found.says
    assert found.numbers["cosine"] == pytest.approx(1.0)


def test_truncation_reads_whole_groups_when_task_reward_is_set(models):
    options = {"k": 3, "task_reward": True}
    student, teacher = models["student"], models["teacher"]
    chosen = pair_of(student, teacher, sums(4), method="vopd", options=options, sampling=GROUP)
    assert len(chosen.scored) == 4 * len(chosen.firsts)
    unequal = replace(chosen, rollouts=[replace(r, reward=float(r.sample == 2)) for r in chosen.rollouts])
    assert "a credit" in bias.truncation(unequal).says


# --- away from the teacher -------------------------------------------------------------------------------------------


def away(reader: LanguageModel, right: int | None, **options: Any) -> Subject:
    """A pair of a method that drives away, of whose responses that of number `right` is right."""
    settings = {"template": SHOWN, "solution": None, **options}
    chosen = pair_of(reader, None, letters(4), method="anti_sd", options=settings, sampling=GROUP, reward=EXACT)
    return replace(chosen, rollouts=[replace(r, reward=float(r.sample == right)) for r in chosen.rollouts])


def test_contexts_take_right_response_of_group(reader):
    chosen = away(reader, right=2)
    wanted = [f"{r.text};{r.prompt.content}" for r in chosen.rollouts if r.sample == 2]
    assert [context.content for context in chosen.contexts(chosen.firsts)] == wanted
    assert len(chosen.contexts(chosen.firsts[:2])) == 2


def test_rollout_draws_stage_count_when_teacher_reads_peers(reader):
    sampling = {**GROUP, "n": 6}
    options = {"template": SHOWN}
    chosen = pair_of(reader, None, letters(2), method="anti_sd", options=options, sampling=sampling, reward=EXACT)
    assert len(chosen.rollouts) == 2 * 6
    plain = pair_of(
        reader, None, letters(2), method="context_distillation", options=options, sampling=sampling, reward=EXACT
    )
    assert len(plain.rollouts) == 2 * 4


def test_examine_skips_teacher_checks_when_method_is_anti_sd(reader):
    report = diagnosis(
        {"student": reader},
        letters(),
        looked_at=6,
        method="anti_sd",
        options={"template": SHOWN},
        sampling=GROUP,
        reward=EXACT,
    )
    said = levels(report)
    assert report.verdict == "go"
    assert said["signal/strength"] == said["cost/step"] == "ok"
    for name in ("signal/overlap", "signal/bias", "headroom/accuracy", "information/disagreement"):
        assert said[name] == "skipped"
        assert "maximises the divergence from its teacher" in finding(report, name).says


def test_strength_asks_change_when_no_response_is_right(reader):
    chosen = away(reader, right=None)
    found = signal.strength(chosen, signal.compared(chosen))
    assert (found.level, found.numbers["reverse_kl"]) == ("change", 0.0)
    assert "the method has no divergence to increase" in found.says
    assert "sampling.n" in found.remedy
    solved = away(reader, right=1)
    assert signal.strength(solved, signal.compared(solved)).level == "ok"


# --- a teacher that reads the attempt --------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["{attempt};{verdict};{prompt}", "{attempt};{prompt}"])
def test_examine_skips_headroom_when_teacher_reads_attempt(reader, template: str):
    report = diagnosis(
        {"student": reader},
        letters(),
        looked_at=6,
        method="context_distillation",
        options={"template": template, "k": None},
        reward=EXACT,
        sampling={"max_completion_length": 4},
    )
    said = levels(report)
    assert said["signal/strength"] == said["cost/step"] == "ok"
    for name in ("headroom/accuracy", "headroom/continuation", "information/transfer"):
        assert (
            finding(report, name).says == "The teacher reads the response that it scores, so it cannot write its own."
        )
        assert said[name] == "skipped"
    assert said["information/disagreement"] == "skipped"


def test_disagreement_compares_column_when_attempt_is_read(reader):
    options = {"template": "{attempt};{privileged_context};{prompt}", "k": None}
    chosen = pair_of(reader, None, letters(4), method="context_distillation", options=options, reward=None)
    assert information.disagreement(chosen).numbers["minus_log_z"] > 0


# --- a judge ---------------------------------------------------------------------------------------------------------


def test_examine_skips_reward_checks_when_reward_is_rubric(models):
    report = diagnosis(
        models,
        sums(),
        looked_at=6,
        method="vopd",
        options={"k": 4, "task_reward": True},
        sampling=GROUP,
        reward=JUDGED,
    )
    said = levels(report)
    assert said["cost/step"] == "ok"
    assert said["signal/bias"] == said["headroom/accuracy"] == "skipped"
    assert "needs a judge, which the doctor does not call" in finding(report, "headroom/accuracy").says


def test_examine_raises_config_error_when_teacher_needs_judge(reader, models):
    both = {"student": reader, "teacher": models["teacher"]}
    with pytest.raises(ConfigError, match=r"needs a judge, which the doctor does not call.*`stages\.distil\.reward="):
        diagnosis(
            both, letters(), method="anti_sd", options={"template": SHOWN}, teacher=None, sampling=GROUP, reward=JUDGED
        )


# --- two tokenizers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["simct", "uld"])
def test_examine_skips_signal_when_tokenizers_differ(models, method: str):
    other = tiny("llama", character_tokenizer("0123456789+=,;x"), name="teacher", seed=2, hidden=16, spread=0.1)
    report = diagnosis({**models, "teacher": other}, sums(), looked_at=6, method=method, options={})
    said = levels(report)
    assert said["cost/step"] == "ok"
    assert said["headroom/accuracy"] in ("ok", "change", "stop")
    for name in ("tokens", "signal", "headroom/continuation", "information/disagreement"):
        assert said[name] == "skipped"


def test_headroom_stops_when_simct_teacher_is_no_better(models):
    other = tiny("llama", character_tokenizer("0123456789+=,;x"), name="teacher", seed=2, hidden=16, spread=0.1)
    chosen = pair_of(models["student"], other, sums(4), method="simct", options={})
    judgement = headroom.judged(chosen)
    assert isinstance(judgement, headroom.Judged)
    wrong = replace(judgement, teacher=[replace(r, reward=0.0) for r in judgement.teacher])
    assert headroom.headroom(chosen, wrong).level == "stop"
