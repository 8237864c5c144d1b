"""The probe on pairs taught here in seconds: which teacher and context it takes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.doctor import characters, letters, recipe_of, sums, teach, with_context
from support.models import parameters_of, tiny
from support.runs import command, one_stage, prepare

from opd.commands.probe.measure import Plan, Settings, Subject, measured, planned, subject_of
from opd.commands.probe.report import Report, as_json, as_text
from opd.commands.probe.subjects import listed
from opd.errors import ConfigError, DataError
from opd.models.language_model import LanguageModel
from opd.models.new import character_tokenizer
from opd.runs.prepare import Given
from opd.types import Prompt

SMALL = Settings(prompts=12, responses=40, visits=40, nodes=6)


@pytest.fixture(scope="module")
def known() -> LanguageModel:
    """A model that knows all sums."""
    return teach(characters("teacher", seed=1), sums(), steps=150)


@pytest.fixture(scope="module")
def learner() -> LanguageModel:
    """A model that knows some sums."""
    return teach(characters("student", seed=2), sums(), steps=40)


@pytest.fixture(scope="module")
def wrong() -> LanguageModel:
    """A model that knows the answers of other sums."""
    rows = sums()
    other = [*rows[1:], rows[0]]
    return teach(
        characters("misled", seed=3),
        [replace(p, response=o.response) for p, o in zip(rows, other, strict=True)],
        steps=150,
    )


def subject(models: Mapping[str, LanguageModel], prompts: list[Prompt], **more: Any) -> Subject:
    settings = more.pop("settings", SMALL)
    names = {key: more.pop(key) for key in ("teachers", "contexts", "seed") if key in more}
    recipe = recipe_of(models=tuple(models), **more)
    return subject_of(recipe, settings=settings, given=Given(models=models, prompts=prompts), **names)


def probed(models: Mapping[str, LanguageModel], prompts: list[Prompt], **more: Any) -> tuple[Plan, Report, list[str]]:
    said: list[str] = []
    plan = planned(subject(models, prompts, **more), said.append)
    return plan, measured(plan, said.append), said


@pytest.fixture(scope="module")
def sums_probed(learner, known, wrong) -> tuple[Plan, Report, list[str]]:
    before = parameters_of(learner)
    found = probed({"student": learner, "teacher": known, "misled": wrong}, sums(), teachers=["teacher,misled"])
    assert all(bool((one == before[name]).all()) for name, one in parameters_of(learner).items())
    return found


def test_probe_takes_teacher_that_knows(sums_probed):
    _, report, _ = sums_probed
    best = report.choice
    assert best is not None
    assert best.best == "teacher, plain", as_text(report)
    assert best.others["misled, plain"].low > 0
    assert report.alignment.row("misled, plain", "reverse_kl").cosine["all"].mean < best.cosine.mean - 0.3
    assert as_text(report).splitlines()[3].startswith("Take 'teacher, plain': its gradient of reverse_kl points most")


def test_probe_says_cost_before_and_counts_continuations(sums_probed):
    plan, report, said = sums_probed
    assert said[0].startswith("12 prompts x 40 responses, then the likely tokens of up to 144 nodes x 40 continuations")
    assert report.continuations == plan.continuations == 40 * sum(len(node.ids) for node in plan.nodes)
    assert any(f"{plan.continuations:,} continuations: at most" in line for line in said)
    assert said[-1] == f"{plan.continuations:,} of {plan.continuations:,} continuations"
    assert len(plan.nodes) <= 144


def test_probe_report_is_function_of_seed(sums_probed, learner, known, wrong):
    models = {"student": learner, "teacher": known, "misled": wrong}
    _, again, _ = probed(models, sums(), teachers=["teacher", "misled"])
    _, other, _ = probed(models, sums(), teachers=["teacher", "misled"], seed=1)
    assert again.alignment == sums_probed[1].alignment
    assert other.alignment != again.alignment


def test_probe_json_has_all_numbers(sums_probed):
    report = sums_probed[1]
    found = json.loads(as_json(report))
    assert found["take"] == found["highest"] == "teacher, plain"
    assert found["continuations"] == report.continuations
    names = [(row["name"], row["form"], row["control"]) for row in found["alignment"]]
    assert names == [
        *((name, form, False) for name in ("teacher, plain", "misled, plain") for form in ("reverse_kl", "forward_kl")),
        ("the student, sharper", None, True),
        ("noise", None, True),
    ]
    assert found["alignment"][0]["cosine"]["all"].keys() == {"mean", "mean_low", "mean_high"}
    assert set(found["ceiling"]) == set(found["visits_by_group"])


def test_probe_takes_context_that_knows():
    """The student has to guess a letter that the privileged context tells."""
    lm = tiny("llama", character_tokenizer("abcdefgh0123456789=;"), name="student", seed=3, hidden=32, spread=0.1)
    rows = [p for seed in range(4) for p in (*letters(seed=seed), *with_context(letters(seed=10 + seed)))]
    student = teach(lm, rows, steps=120)
    _, report, _ = probed(
        {"student": student},
        letters(),
        contexts=["plain", "{privileged_context};{prompt}"],
        reward={"name": "exact"},
        sampling={"max_completion_length": 4},
        method="context_distillation",
        options={"template": "{privileged_context};{prompt}", "k": None},
    )
    best = report.choice
    assert best is not None
    assert best.best == "student, {privileged_context};{prompt}", as_text(report)
    assert "agrees with the student there" in as_text(report)
    assert best.cosine.mean > 0.9


def test_probe_takes_none_when_teacher_is_the_student(learner):
    _, report, _ = probed({"student": learner, "teacher": learner}, sums(), settings=replace(SMALL, prompts=3))
    assert report.choice is None
    assert "Take none: at every node that was measured the teachers have the student's own probabil" in as_text(report)
    json.loads(as_json(report))


def test_probe_takes_none_when_every_response_is_wrong(learner, known):
    prompts = [replace(p, answer="123456") for p in sums()]
    _, report, _ = probed({"student": learner, "teacher": known}, prompts, settings=replace(SMALL, prompts=3))
    assert report.right == 0.0
    assert "Take none: at no node does the next token change the probability of a right response" in as_text(report)
    json.loads(as_json(report))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"visits": 9}, r"--visits 9. With fewer than 10 continuations of a token"),
        ({"prompts": 0}, r"--prompts 0. Give at least 1"),
        ({"responses": 0}, r"--responses 0. Give at least 1"),
        ({"nodes": 0}, r"--nodes 0. Give at least 1"),
        ({"tau": 1.0}, r"--tau 1, a probability that no token exceeds"),
        ({"tau": 0.0}, r"--tau 0: every token .* up to 144 nodes x 16 tokens x 40 visits = 92,160 continuations"),
        ({"tau": -0.1}, r"--tau -0.1: every token of the vocabulary would be forced"),
        ({"form": "jsd"}, r"--form jsd. Teachers are ranked by reverse_kl or forward_kl"),
    ],
    ids=str,
)
def test_subject_of_refuses_bad_sizes(learner, known, settings, said):
    with pytest.raises(ConfigError, match=said):
        subject({"student": learner, "teacher": known}, sums(), settings=replace(SMALL, **settings))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"reward": None}, r"Stage 'distil': it has no reward, and neither has its evaluation. opd probe compares"),
        ({"teachers": ["teachr"]}, r"--teachers teachr: the recipe has no such model. Did you mean 'teacher'\?"),
        ({"contexts": ["plan"]}, r"--contexts plan: there is no such context. Did you mean 'plain'\?"),
        ({"contexts": ["feedback"]}, r"--contexts feedback: this teacher reads the response that it scores"),
        ({"contexts": ["{attempt}{prompt}"]}, r"this teacher reads the response that it scores"),
        ({"contexts": ["{answr}{prompt}"]}, r"got \['answr', 'prompt'\]"),
        ({"sampling": {"temperature": 0}}, r"sampling.temperature 0, and opd probe continues responses by sampling"),
        ({"sampler": "support.models:sampler"}, r"its own sampler, .* stages.distil.sampler=null"),
    ],
    ids=str,
)
def test_subject_of_refuses_what_cannot_work(learner, known, more, said):
    with pytest.raises(ConfigError, match=said):
        subject({"student": learner, "teacher": known}, sums(), **more)


def test_subject_of_refuses_context_without_its_column(learner, known):
    prompts = [replace(p, privileged_context=None) for p in sums()]
    with pytest.raises(DataError, match=r"--contexts solution: the teacher reads privileged_context, which some of"):
        subject({"student": learner, "teacher": known}, prompts, contexts=["plain,solution"])


def test_planned_refuses_fractional_reward(learner, known):
    found = subject({"student": learner, "teacher": known}, sums())
    half = replace(found, reward=type(found.reward)(name="half", function=lambda prompt, text: 0.5))
    with pytest.raises(ConfigError, match=r"the reward 'half' gave 0.5 on prompt"):
        planned(half, lambda text: None)


def test_listed_splits_names_and_keeps_templates():
    assert listed(["a, b", "c,a"]) == ["a", "b", "c"]
    assert listed(["plain", "{answer}, then {prompt}"]) == ["plain", "{answer}, then {prompt}"]


# --- the command ------------------------------------------------------------------------------------------------------

SIZES = ("--prompts", "2", "--responses", "20", "--visits", "10", "--nodes", "3")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def made(**stage: Any) -> Path:
        prepare(tmp_path, one_stage(**{"reward": {"name": "regex", "options": {"pattern": "[0-4]"}}, **stage}))
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return made


def test_probe_command_prints_report_and_writes_nothing(folder):
    before = sorted(folder().iterdir())
    ended = command("probe", "recipe.yaml", *SIZES)
    assert ended.code in (0, 3), ended.err
    assert ended.out.startswith("tiny, stage distil: 2 prompts, 20 responses each, ")
    assert "ceiling, by halves" in ended.out
    assert sorted(Path().resolve().iterdir()) == before
    as_numbers = command("probe", "recipe.yaml", *SIZES, "--json")
    assert (as_numbers.code == 0) == (json.loads(as_numbers.out)["take"] is not None)


def test_probe_command_only_says_cost_with_dry_run(folder):
    folder()
    ended = command("probe", "recipe.yaml", *SIZES, "--dry-run")
    assert (ended.code, ended.out) == (0, "")
    assert "continuations: at most" in ended.err


def test_probe_command_refuses_stage_without_reward(folder):
    folder(reward=None)
    ended = command("probe", "recipe.yaml")
    assert ended.code == 2
    assert "it has no reward" in ended.err


def test_probe_command_accepts_stage_without_teacher_by_name(folder):
    folder(method="grpo", teacher=None, sampling={"max_completion_length": 3, "n": 2})
    ended = command("probe", "recipe.yaml", "--stage", "distil", "--teachers", "teacher", *SIZES)
    assert ended.code in (0, 3), ended.err
    assert command("probe", "recipe.yaml").code == 2
