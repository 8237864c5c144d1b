"""VISD on text: what sizes an advantage, how the share fades, and a judge's feedback from the reward to the teacher."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from support.models import rollout_of, tiny
from support.runs import one_stage, prepare

import opd
from opd import methods
from opd.commands.check import check_recipe
from opd.errors import ConfigError
from opd.loss.collate import collate
from opd.pieces import contexts, credit, sized, solutions
from opd.pieces.needs import Input
from opd.recipe.load import load_recipe
from opd.recipe.schema import JudgeSection
from opd.rewards.feedback import FeedbackReward
from opd.rewards.registry import load_reward
from opd.samplers.asked.cache import AnswerCache, CachedJudge
from opd.samplers.asked.program import Program
from opd.samplers.asked.protocol import Question
from opd.types import Batch, Prompt, Rollout, Scores, Tokens

LM = tiny()
VOCABULARY = 8
FEEDBACK = {"name": "feedback", "options": {"by": "exact"}, "judge": {"function": "support.named:adviser"}}
SHOWN = "{privileged_context}{prompt}"


def drawn(rng: random.Random, spread: float = 1.5) -> tuple[list[float], list[float], int]:
    """Logits of student and teacher, and the sampled token."""
    logits = [[rng.gauss(0, spread) for _ in range(VOCABULARY)] for _ in range(2)]
    return logits[0], logits[1], rng.randrange(VOCABULARY)


def tokens_of(student: list[float], teacher: list[float], token: int, k: int, advantage: float, share: float) -> Tokens:
    """One token, with the teacher's k and the sampled token, which exists in the last column unless it is listed."""
    s, t = (torch.tensor(z, dtype=torch.float64).log_softmax(-1) for z in (student, teacher))
    listed = sorted(range(VOCABULARY), key=lambda v: -teacher[v])[:k]
    ids = torch.tensor([*listed, token])
    return Tokens(
        student_logp=s[token][None],
        sampler_logp=s[token][None],
        teacher_logp=t[token][None],
        advantage=torch.tensor([[advantage, share]], dtype=torch.float64),
        weight=torch.ones(1, dtype=torch.float64),
        student_support_logp=s[ids][None],
        teacher_support_logp=t[ids][None],
        support_mask=torch.tensor([[True] * k + [token not in listed]]),
    )


# --- the size --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.2, 0.9, 3.0])
def test_sized_advantage_equals_oracle_and_keeps_sign(bound: float):
    rng = random.Random(0)
    signal = sized.sized_by_teacher(bound, (0.2, 0.2))
    for _ in range(300):
        student, teacher, token = drawn(rng)
        advantage, share, k = rng.gauss(0, 1), rng.random(), rng.randint(1, VOCABULARY)
        tokens = tokens_of(student, teacher, token, k, advantage, share)
        got = -signal(tokens).item()  # the importance ratio is 1
        expected = oracle.sized_advantage(student, teacher, k, token, advantage, share, bound)
        assert got == pytest.approx(expected, rel=1e-9)
        least = max(1 - bound, 0.0)
        assert 1 - share * (1 - least) - 1e-9 <= got / advantage <= 1 + share * bound + 1e-9


def test_sized_advantage_is_zero_when_direction_is_zero():
    student, teacher, token = drawn(random.Random(1))
    assert sized.sized_by_teacher(0.2, (0.2, 0.2))(tokens_of(student, teacher, token, 3, 0.0, 0.5)).item() == 0.0


def test_log_ratio_on_support_can_turn_sign():
    """Renormalising moves the log-ratio by log P_S - log Q_S: on random logits a few per cent of tokens turn."""
    rng = random.Random(2)
    turned = 0
    for _ in range(2000):
        student, teacher, token = drawn(rng)
        full = oracle.log_softmax(teacher)[token] - oracle.log_softmax(student)[token]
        got = sized.log_ratio_on_support(tokens_of(student, teacher, token, 4, 1.0, 1.0)).item()
        turned += full * got < 0
    assert 0.01 < turned / 2000 < 0.2


def test_signal_measures_share_at_clip():
    signal = sized.sized_by_teacher(0.2, (0.2, 0.2))
    near = [0.0] * VOCABULARY
    far = [5.0, *near[1:]]
    for teacher, advantage, expected in ((near, 1.0, 0.0), (far, 1.0, 1.0), (far, -1.0, 1.0)):
        measured = signal.measure(tokens_of(near, teacher, 0, 3, advantage, 0.5))
        assert measured["size/active_share"].tolist() == [1.0]
        assert measured["size/clipped_share"].tolist() == [expected]
    for advantage, share in ((0.0, 0.5), (1.0, 0.0)):
        measured = signal.measure(tokens_of(near, far, 0, 3, advantage, share))
        assert measured["size/active_share"].tolist() == [0.0]
        assert measured["size/clipped_share"].tolist() == []


def test_clipped_share_counts_upper_bound_alone_when_bound_is_large():
    signal = sized.sized_by_teacher(3.0, (0.2, 0.2))
    near = [0.0] * VOCABULARY
    teacher = [9.0, *near[1:]]
    assert signal.measure(tokens_of(near, teacher, 0, 7, 1.0, 0.5))["size/clipped_share"].tolist() == [1.0]
    assert signal.measure(tokens_of(near, teacher, 0, 7, -1.0, 0.5))["size/clipped_share"].tolist() == [0.0]


def test_fading_falls_in_a_line_to_zero():
    memory = sized.fading(0.5, 4)()
    shares = [memory.observe(batch(), lambda value: [value])["size/share"] for _ in range(6)]
    assert shares == pytest.approx([0.5, 0.375, 0.25, 0.125, 0.0, 0.0])
    again = sized.fading(0.5, 4)()
    again.load_state_dict(json.loads(json.dumps({"step": 2})), {})
    assert again.observe(batch(), lambda value: [value])["size/share"] == pytest.approx(0.25)


# --- feedback --------------------------------------------------------------------------------------------------------


def response(sample: int, reward: float | None = 1.0, text: str = "ab", **columns: Any) -> Rollout:
    made = rollout_of(LM, Prompt(id=3, content="ab", answer="cd"), [4, 5], sample=sample, reward=reward)
    return replace(made, text=text, **columns)


def batch(*rollouts: Rollout, **memory: Any) -> Batch:
    rows = rollouts or (response(0),)
    made = collate(rows, [Scores(teacher_logp=torch.zeros(2)) for _ in rows], LM.device)
    return replace(made, memory=memory)


def test_with_share_leaves_row_without_feedback_alone():
    memory = sized.fading(0.5, 10)()
    rows = response(0, 1.0, feedback="well"), response(1, 0.0, feedback=None), response(2, 0.0, feedback="no")
    made = batch(*rows, size=memory)
    got = sized.with_share(credit.group_reward(), solutions.from_feedback())(made)
    assert got.shape == (3, 2, 2)
    assert got[..., 0].equal(credit.group_reward()(made))
    assert got[:, 0, 1].tolist() == [0.5, 0.0, 0.5]


def test_context_shows_feedback_and_answer():
    context = contexts.privileged(solutions=solutions.from_feedback(), template=contexts.ADVISED)
    shown, bare = context([response(0, feedback="Check the {carry}."), response(1)])
    assert "Check the {carry}." in str(shown.content)
    assert "The verified answer is: cd" in str(shown.content)
    assert bare.content == "ab"
    assert Input.FEEDBACK in context.needs  # type: ignore[attr-defined]


def feedback_reward(folder: Path, says: Any, **options: Any) -> FeedbackReward:
    made = load_reward("feedback", {"judge": JudgeSection(function="textwrap:dedent"), **options})
    assert isinstance(made, FeedbackReward)
    judge = CachedJudge(judge=Program(function=says, name="says"), cache=AnswerCache(folder), retries=1)
    return replace(made, judge=judge)


def test_feedback_reward_adds_text_to_inner_reward(tmp_path: Path):
    seen: list[Mapping[str, Any]] = []

    def says(question: Question) -> str:
        seen.append(question.about)
        return json.dumps({"feedback": "  " + "long " * 10})

    reward = feedback_reward(tmp_path, says, limit=12)
    got = reward([response(0, None, "cd"), response(1, None, "<think>x</think>zz")])
    assert [r.reward for r in got] == [1.0, 0.0]
    assert [r.feedback for r in got] == ["long long lo"] * 2
    assert [one["response"] for one in seen] == ["cd", "zz"]
    assert [one["reward"] for one in seen] == [1.0, 0.0]
    assert reward.pop_requests()["judge_requests"] == 2.0
    assert [r.feedback for r in reward(got)] == ["long long lo"] * 2  # from the cache
    assert reward.pop_requests()["judge_cached"] == 2.0


@pytest.mark.parametrize("answer", [None, "no json", '{"feedback": ""}', '{"feedback": 3}', '["feedback"]'])
def test_feedback_reward_keeps_reward_when_judge_fails(tmp_path: Path, answer: str | None):
    got = feedback_reward(tmp_path, lambda question: answer)([response(0, None, "cd")])
    assert (got[0].reward, got[0].feedback, got[0].unjudged) == (1.0, None, None)
    assert got[0].judged == {"feedback": 0.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"needs a judge"),
        ({"judge": JudgeSection(function="textwrap:dedent"), "by": "rubric"}, r"'rubric' needs a judge"),
        ({"judge": JudgeSection(function="textwrap:dedent"), "limit": 0}, r"`limit` of at least 1"),
        ({"judge": JudgeSection(function="textwrap:dedent"), "by": "exakt"}, r"Did you mean 'exact'"),
    ],
)
def test_feedback_reward_refuses_settings(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        load_reward("feedback", options)


# --- the method ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k of at least 1"),
        ({"bound": 0.0}, r"`bound`.*above 0"),
        ({"share": 1.5}, r"between 0 and 1"),
        ({"fades": 0}, r"at least 1 step"),
        ({"hint": "video"}, r"option `hint`"),
        ({"template": "{prompt}"}, r"field \{privileged_context\}"),
    ],
)
def test_visd_refuses_options_without_meaning(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        methods.build("visd", options)


def stage(**changed: Any) -> dict[str, Any]:
    """A stage of VISD on tiny models, with feedback of a judge that sometimes fails."""
    settings: dict[str, Any] = {
        "method": "visd",
        "options": {"k": 4, "fades": 3, "template": SHOWN},
        "teacher": None,
        "reward": FEEDBACK,
        "sampling": {"max_completion_length": 3, "n": 4},
        "steps": 4,
    }
    return one_stage(**{**settings, **changed})


def test_visd_trains_with_feedback_of_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(prepare(tmp_path / "work", stage()))
    rows = [row for row in opd.run("recipe.yaml", quiet=True).metrics if "train/loss" in row]
    assert [row["size/share"] for row in rows] == pytest.approx([0.5, 1 / 3, 1 / 6, 0.0])
    assert any(0.0 < row["judge/feedback"] < 1.0 for row in rows)
    assert [row["context/unsolved"] for row in rows] == pytest.approx([8 * (1 - row["judge/feedback"]) for row in rows])
    assert rows[-1]["size/active_share"] == 0.0
    assert "size/clipped_share" not in rows[-1]
    assert all(0.0 <= row.get("size/clipped_share", 0.0) <= 1.0 for row in rows)
    assert math.isfinite(rows[-1]["train/loss"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reward": {"name": "exact"}}, r"reads a judge's feedback.*'exact' gives none.*name: feedback"),
        ({"reward": None}, r"needs a reward"),
        ({"sampling": {"n": 1}}, r"several responses per prompt"),
        ({"teacher": "teacher"}, r"the student is its own teacher"),
        ({"reward": {**FEEDBACK, "on_error": "drop"}}, r"'feedback' does not read on_error"),
    ],
)
def test_check_refuses_visd_without_its_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], message: str
):
    monkeypatch.chdir(prepare(tmp_path / "work", stage(**changed)))
    with pytest.raises(ConfigError, match=message):
        check_recipe(load_recipe(Path("recipe.yaml")))


def test_visd_needs_no_judge_with_hint_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = {"k": 4, "hint": "privileged_context", "template": SHOWN}
    monkeypatch.chdir(prepare(tmp_path / "work", stage(options=options, reward={"name": "exact"})))
    assert check_recipe(load_recipe(Path("recipe.yaml")))
