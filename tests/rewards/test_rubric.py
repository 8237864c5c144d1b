"""The reward `rubric`: who is asked what, what a failure costs, and whole runs against a real server."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from support.http_server import Said
from support.judges import COUNTING_JUDGE, SECRET, Server, completion, judging, serving
from support.models import unscored
from support.rollouts import text_rollout
from support.runs import Forks, Strike, assert_same, command, one_stage, prepare, sums, write_rows

from opd.errors import ConfigError, DataError, TeacherError
from opd.loss.collate import collate
from opd.pieces.credit import group_reward
from opd.recipe.load import load_recipe
from opd.recipe.schema import JudgeSection
from opd.rewards.base import GroupReward, StageRewards
from opd.rewards.registry import load_reward
from opd.rewards.rubric import rubric
from opd.samplers.asked.cache import AnswerCache, CachedJudge
from opd.samplers.asked.program import Program
from opd.samplers.asked.protocol import Question
from opd.stage.folder import RunDir
from opd.types import Prompt, Rollout

TEACHER = ["<think>hm</think>ab", "abc", "ab", "abcd", "b"]
LETTERS = "abcd"


def rollout(text: str, prompt: int = 0, sample: int = 0, **columns: Any) -> Rollout:
    metadata = {"teacher_answers": columns.pop("teacher", TEACHER)}
    row = Prompt(id=prompt, content=columns.pop("content", f"prompt {prompt}"), metadata=metadata)
    return text_rollout(text, row, tokens=2, sample=sample, **columns)


def group(*texts: str, prompt: int = 0, **columns: Any) -> list[Rollout]:
    return [rollout(text, prompt, i, **columns) for i, text in enumerate(texts)]


class Letters:
    """A judge whose criteria are "has an a", ..., worth 4, 3, 2 and 1; it remembers what it was asked."""

    def __init__(self, fails: str = "") -> None:
        self.asked: list[Mapping[str, Any]] = []
        self.fails = fails

    def __call__(self, question: Question) -> str | None:
        about = question.about
        self.asked.append(about)
        if self.fails and self.fails in about["prompt"]:
            return None
        if about["ask"] == "rubric":
            return json.dumps({"criteria": [{"criterion": f"has {c}", "points": 4 - i} for i, c in enumerate(LETTERS)]})
        if about["ask"] == "answer":
            return "ab"
        return json.dumps({"verdicts": [[int(c[-1] in text) for c in about["criteria"]] for text in about["answers"]]})

    def of(self, what: str) -> list[Mapping[str, Any]]:
        return [about for about in self.asked if about["ask"] == what]


def reward_of(folder: Path, judge: Letters, author: bool = False, **options: Any) -> GroupReward:
    section = JudgeSection(function="textwrap:dedent")
    made = rubric(judge=section, author=section if author else None, **options)
    cache = AnswerCache(folder)
    program = Program(function=judge, name="letters")
    return replace(made, judges={role: CachedJudge(judge=program, cache=cache, retries=0) for role in made.asks})


# --- who is asked what -----------------------------------------------------------------------------------------------


def test_rubric_gives_share_of_points(tmp_path: Path):
    texts = ["a", "bd", "", "x</think>abcd", "abcd</think>c"]
    got = reward_of(tmp_path, Letters())(group(*texts))
    read = ["a", "bd", "", "abcd", "c"]
    assert [r.reward for r in got] == pytest.approx(
        [oracle.rubric_reward([4, 3, 2, 1], [int(c in text) for c in LETTERS]) for text in read], abs=1e-7
    )
    assert [r.text for r in got] == texts
    teacher = [
        oracle.rubric_reward([4, 3, 2, 1], [int(c in text) for c in LETTERS]) for text in ("ab", "abc", "abcd", "b")
    ]
    assert got[0].judged == pytest.approx({"criteria": 4, "points": 10, "teacher_reward": sum(teacher) / 4})


def test_rubric_is_written_once_per_prompt(tmp_path: Path):
    judge = Letters()
    rows = [r for pair in zip(group("a", "b", prompt=3), group("c", "d", prompt=1), strict=True) for r in pair]
    got = reward_of(tmp_path, judge)(rows)
    assert [r.reward for r in got] == [0.4, 0.2, 0.3, 0.1]
    assert [r.prompt.id for r in got] == [3, 1, 3, 1]
    rubrics, verdicts = judge.of("rubric"), judge.of("verdicts")
    assert [one["student"] for one in rubrics] == [["a", "b"], ["c", "d"]]
    assert rubrics[0]["teacher"] == ["ab", "abc", "abcd", "b"]  # different ones, without thoughts, four of them
    assert [sorted(one["answers"]) for one in verdicts] == [
        sorted(["ab", "abc", "abcd", "b", *t]) for t in ("ab", "cd")
    ]
    assert [one["sources"] for one in verdicts] == [None, None]


def test_rubric_is_written_per_response_when_shared_is_false(tmp_path: Path):
    judge = Letters()
    got = reward_of(tmp_path, judge, shared=False)(group("a", "b"))
    assert [r.reward for r in got] == [0.4, 0.3]
    assert [one["student"] for one in judge.of("rubric")] == [["a"], ["b"]]
    assert [len(one["answers"]) for one in judge.of("verdicts")] == [5, 5]


def test_rubric_gives_sources_to_verifier_when_blind_is_false(tmp_path: Path):
    judge = Letters()
    reward_of(tmp_path, judge, blind=False)(group("x", "y"))
    (verdicts,) = judge.of("verdicts")
    told = dict(zip(verdicts["answers"], verdicts["sources"], strict=True))
    assert told == {**dict.fromkeys(["ab", "abc", "abcd", "b"], "teacher"), "x": "student", "y": "student"}


@pytest.mark.parametrize(("answers", "read"), [(1, ["ab"]), (2, ["ab", "abc"]), (9, ["ab", "abc", "abcd", "b"])])
def test_rubric_limits_teacher_answers_to_option(tmp_path: Path, answers: int, read: list[str]):
    judge = Letters()
    reward_of(tmp_path, judge, answers=answers)(group("a", "b"))
    assert judge.of("rubric")[0]["teacher"] == read


def test_author_writes_answers_once(tmp_path: Path):
    judge = Letters()
    reward = reward_of(tmp_path, judge, author=True, answers=3)
    assert reward.needs == frozenset()
    first = reward(group("a", "b", teacher=None))
    assert len(judge.of("answer")) == 3
    assert judge.of("rubric")[0]["teacher"] == ["ab"]  # three times the same text
    assert [r.reward for r in reward(group("a", "b", teacher=None))] == [r.reward for r in first]
    assert [len(judge.of(what)) for what in ("answer", "rubric", "verdicts")] == [3, 1, 1]


def test_rubric_shows_roles_when_prompt_is_conversation(tmp_path: Path):
    judge = Letters()
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": [{"type": "text", "text": "Why?"}]}
    reward_of(tmp_path, judge)(group("a", content=(system, user)) + group("a", prompt=1, content=(user,)))
    assert [one["prompt"] for one in judge.of("rubric")] == ["[system]\nBe brief.\n\n[user]\nWhy?", "Why?"]


def test_rubric_refuses_image(tmp_path: Path):
    user = {"role": "user", "content": [{"type": "image", "url": "x.png"}]}
    with pytest.raises(DataError, match="Prompt 0 holds parts other than text"):
        reward_of(tmp_path, Letters())(group("a", content=(user,)))


@pytest.mark.parametrize("teacher", [None, [], "", ["a", ""], ["a", 3], [" <think>x</think> "]])
def test_rubric_raises_data_error_when_answers_are_unusable(tmp_path: Path, teacher: Any):
    with pytest.raises(DataError, match=r"Prompt 0 has .* in `teacher_answers`.*name an `author`"):
        reward_of(tmp_path, Letters())(group("a", teacher=teacher))


def test_rubric_takes_one_text_as_one_answer(tmp_path: Path):
    judge = Letters()
    reward_of(tmp_path, judge)(group("a", teacher="abd"))
    assert judge.of("rubric")[0]["teacher"] == ["abd"]


# --- failures --------------------------------------------------------------------------------------------------------


def test_rubric_gives_no_reward_only_to_failed_group(tmp_path: Path):
    got = reward_of(tmp_path, Letters(fails="prompt 1"))(group("a", "b") + group("a", "b", prompt=1))
    assert [r.reward for r in got] == [0.4, 0.3, None, None]
    assert [r.unjudged for r in got] == [None, None, *["the judge wrote no rubric: it returned no answer"] * 2]
    assert got[2].judged == {}


@pytest.mark.parametrize(("shared", "author"), [(True, False), (False, False), (True, True)])
def test_rubric_gives_group_no_reward_when_any_judge_fails(tmp_path: Path, shared: bool, author: bool):
    class Partly(Letters):
        def __call__(self, question: Question) -> str | None:
            text = super().__call__(question)
            return (
                None
                if question.about["ask"] == ("answer" if author else "verdicts")
                and "b" in str(question.about.get("answers", "b"))
                else text
            )

    got = reward_of(tmp_path, Partly(), author=author, shared=shared)(group("a", "c", teacher=["a"]))
    if not author:
        assert [r.reward for r in got] == [0.4, 0.2]
        got = reward_of(tmp_path / "other", Partly(), shared=shared)(group("a", "b", teacher=["a"]))
    assert [r.reward for r in got] == [None, None]
    who = "the author wrote no answer" if author else "the verifier gave no verdicts"
    assert all(str(r.unjudged).startswith(who) for r in got)


def test_group_reward_is_zero_for_failed_groups():
    good = [replace(r, reward=v) for r, v in zip(group("a", "b"), (0.2, 0.6), strict=True)]
    bad = [replace(r, unjudged="down") for r in group("a", "b", prompt=1)]
    rows = [good[0], bad[0], good[1], bad[1]]
    batch = collate(rows, unscored(rows), torch.device("cpu"))
    for scale in (True, False):
        advantage = group_reward(divide_by_std=scale)(batch)
        expected = oracle.group_advantage([0.2, 0.6], scale=scale)
        assert advantage[[0, 2], 0].tolist() == pytest.approx(expected, rel=1e-5)
        assert advantage[[1, 3]].eq(0).all()


@pytest.mark.parametrize("scale", [True, False])
def test_group_reward_ignores_constant_shift(scale: bool):
    """(student - teacher) of an older code path is the same once it is centred."""
    rewards = [0.2, 0.6, 0.9]
    rows = [replace(r, reward=v) for r, v in zip(group("a", "b", "c"), rewards, strict=True)]
    moved = [replace(r, reward=v - 0.7) for r, v in zip(rows, rewards, strict=True)]
    got, other = (
        group_reward(divide_by_std=scale)(collate(some, unscored(some), torch.device("cpu"))) for some in (rows, moved)
    )
    assert torch.allclose(got, other, atol=1e-5)


def failing(missing: int, groups: int) -> list[Rollout]:
    return [rollout("a", prompt=i, unjudged="HTTP 500" if i < missing else None) for i in range(groups)]


def test_check_failures_raises_teacher_error_above_max_failed(tmp_path: Path):
    reward = reward_of(tmp_path, Letters())
    reward.check_failures(failing(4, 10), lambda mine: [mine])
    reward.check_failures([], lambda mine: [mine])
    with pytest.raises(TeacherError) as caught:
        reward.check_failures(failing(5, 10), lambda mine: [mine])
    for says in ("'rubric'", "5 of this step's 10 groups", "`max_failed` allows 40%", "For prompt 0: HTTP 500", "kept"):
        assert says in str(caught.value)
    # Of all processes: none of this one's groups failed, most of the other's did.
    theirs = (9, 10, (77, "no answer within 3 s"))
    with pytest.raises(TeacherError, match=r"9 of this step's 20 groups.*For prompt 77: no answer"):
        reward.check_failures(failing(0, 10), lambda mine: [mine, theirs])
    reward.check_failures(failing(0, 10), lambda mine: [mine, (8, 10, (77, "?"))])


def test_pop_requests_gives_counts_since_last_call(tmp_path: Path):
    reward = reward_of(tmp_path, Letters())
    reward(group("a", "b"))
    both = StageRewards(by_task={None: reward, "other": None}, gather=lambda mine: [mine, {"judge_requests": 5.0}])
    counts = both.pop_requests()
    assert counts["judge/judge_requests"] == 6
    assert counts["judge/verifier_requests"] == 1
    assert StageRewards(by_task={None: reward}).pop_requests() == {}


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_rubric_raises_config_error_when_unbound():
    with pytest.raises(ConfigError, match="'rubric' needs judges, which only a stage of a run starts"):
        rubric(judge=JudgeSection(function="textwrap:dedent"))(group("a"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "'rubric' needs a judge, got none. Set the reward's `judge`"),
        ({"judge": {"lm": "x"}}, "put `judge` next to `options`"),
        ({"answers": 0}, "`answers: 0`. Give a number of answers, at least 1"),
        ({"max_failed": 1.5}, "`max_failed: 1.5`. Give a share"),
        ({"criteria": [5, 4]}, r"`criteria: \[5, 4\]`. Give two whole numbers"),
        ({"temperatures": [1, 1]}, "Give three that are not negative"),
        ({"blnd": True}, "Did you mean 'blind'"),
    ],
)
def test_load_reward_refuses_wrong_rubric_options(options: dict[str, Any], says: str):
    judge = {} if not options or "judge" in options else {"judge": JudgeSection(function="textwrap:dedent")}
    with pytest.raises(ConfigError, match=says):
        load_reward("rubric", {**judge, **options})


def test_load_reward_lists_rubric_options_when_unknown():
    with pytest.raises(ConfigError, match=r"with the options \['blnd'\]") as caught:
        load_reward("rubric", {"judge": JudgeSection(function="textwrap:dedent"), "blnd": True})
    options, _, fields = str(caught.value).partition("Its options: ")[2].partition(" Fields next to `options`: ")
    assert options == "answers, blind, shared, criteria, max_failed, column, temperatures."
    assert fields == "judge, verifier, author."


def test_opd_check_names_one_need_when_judge_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another reward, which the second need would name, would be refused next."""
    said = refused(tmp_path, monkeypatch, with_judge(URL, reward=None))
    assert "a reward: set" not in said
    assert "math_verify" not in said


def with_judge(url: str, **fields: Any) -> dict[str, Any]:
    """A run of `ropd` whose teacher's answers stand in the data."""
    judge = {"url": url, "model": "judge-1", "timeout_s": 5, **fields.pop("judge", {})}
    reward = {"name": "rubric", "options": fields.pop("options", {}), "judge": judge}
    settings = {"method": "ropd", "teacher": None, "reward": reward, "sampling": {"n": 3, "max_completion_length": 3}}
    return one_stage(**{"steps": 4, "checkpoint": {"every": 2}, **settings, **fields})


def answered(folder: Path, recipe: Mapping[str, Any]) -> Path:
    """The folder with the recipe, and data with answers of a teacher."""
    prepare(folder, recipe)
    rows = [{**row, "teacher_answers": [str(row["answer"]), f"{row['answer']};"]} for row in sums(0, 12)]
    write_rows(folder / "train.jsonl", rows)
    return folder


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as one:
        yield one


def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Mapping[str, Any]) -> str:
    monkeypatch.chdir(answered(tmp_path / "work", recipe))
    ended = command("check", "recipe.yaml")
    assert ended.code == 2
    assert SECRET not in ended.err + ended.out
    return ended.err


URL = "http://127.0.0.1:9/v1"  # nobody is there: the check asks nobody


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (with_judge(URL, judge={"modle": "x"}), ["unknown key `stages.0.reward.judge.modle`", "Did you mean 'model'"]),
        (with_judge(URL, judge={"model": None}), ["`stages.0.reward.judge`", "set `model`"]),
        (with_judge(URL, judge={"api_key": SECRET}), ["unknown key `stages.0.reward.judge.api_key`", "'api_key_env'"]),
        (with_judge(URL, judge={"api_key_env": SECRET}), ["'rubric', judge: `api_key_env` is not the name"]),
        (with_judge(URL, judge={"api_key_env": "NOT_SET_ANYWHERE"}), ["NOT_SET_ANYWHERE, which is not set"]),
        (with_judge(f"http://u:{SECRET}@h/v1"), ["`url` holds more than an address"]),
        (with_judge(f"http://u:{SECRET}@h/v1", judge={"model": None}), ["set `model`"]),
        (with_judge(URL, options={"answer": 3}), ["Did you mean 'answers'"]),
        (with_judge(URL, options={"column": "tips"}), ["needs `tips` in every row, but 12 of 12"]),
        (with_judge(URL, reward={"name": "final_number"}), ["needs a reward with a judge"]),
        (with_judge(URL, reward=None), ["method 'ropd' needs a reward with a judge: set the stage's `reward`"]),
        (with_judge(URL, reward={"name": "rubric"}), ["needs a reward with a judge"]),
        (
            with_judge(URL, reward={"name": "exact", "judge": {"lm": "teacher"}}),
            ["The reward 'exact' cannot be called with the options ['judge']"],
        ),
        (with_judge(URL, sampling={"n": 1}), ["several responses per prompt"]),
        (with_judge(URL, reward={"name": "rubric", "judge": {"lm": "jugde"}}), ["`lm: jugde` is not among the models"]),
        (
            with_judge(URL, reward={"name": "rubric", "judge": {"lm": "student"}}),
            ["uses the model 'student' as a judge"],
        ),
        (
            with_judge(
                URL,
                evaluate={
                    "data": {"path": "train.jsonl"},
                    "reward": {"name": "rubric", "judge": {"function": "textwrap:dedent"}},
                },
            ),
            ["evaluate.reward is 'rubric'", "cannot be compared"],
        ),
        (
            with_judge(URL, method="eff_opd", teacher="teacher"),
            ["compares weights by a judge's reward", "rubric is rebuilt"],
        ),
    ],
)
def test_opd_check_refuses_wrong_judge_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Mapping[str, Any], says: Sequence[str]
):
    err = refused(tmp_path, monkeypatch, recipe)
    for part in says:
        assert part in err


# --- runs ------------------------------------------------------------------------------------------------------------


def rows_of(run: Path) -> list[dict[str, Any]]:
    return RunDir(run).stage("distil").read_metrics()


def timings_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "distil/timings.jsonl").read_text().splitlines()]


def test_opd_train_sends_key_to_server_and_writes_none(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    recipe = with_judge(server.url, judge={"api_key_env": "JUDGE_KEY"})
    monkeypatch.chdir(answered(tmp_path / "work", recipe))
    server.script = [Said(status=500, body={"error": SECRET}), completion(f"not JSON, but {SECRET}")]
    ended = command("train", "recipe.yaml")
    assert ended.code == 0, ended.err
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {SECRET}"}
    files = [file for file in Path("run").rglob("*") if file.is_file()]
    assert "JUDGE_KEY" in Path("run/recipe.yaml").read_text()
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]
    assert SECRET not in ended.out + ended.err
    rows = rows_of(Path("run"))
    assert [row["judge/failed_share"] for row in rows] == [0.0] * 4
    assert all(0 <= row["rollout/reward"] <= 1 for row in rows)
    assert all(row["judge/criteria"] == 4 and row["judge/points"] == 14 for row in rows)
    assert any(row["optim/grad_norm"] > 0 for row in rows)
    timings = timings_of(Path("run"))
    assert timings[0]["judge/judge_retries"] == 2
    assert timings[0]["judge/judge_unreadable"] == 1
    assert sum(row.get("judge/verifier_requests", 0) for row in timings) == 8


def test_resume_repeats_only_unsaved_questions_when_killed(tmp_path: Path, forks: Forks):
    with serving() as server:
        # One question at a time: the file of answers is then in the order of the questions.
        recipe = with_judge(server.url, judge={"concurrency": 1})
        whole = answered(tmp_path / "whole", recipe)
        assert forks.start(whole, "train", "recipe.yaml").code == 0
        once = [json.dumps(request) for request in server.requests]
        assert len(set(once)) == len(once)
        server.requests.clear()
        folder = answered(tmp_path / "killed", recipe)
        strike = Strike(call="opd.samplers.asked.cache.append_row", nth=13)  # in the middle of the fourth step
        assert forks.start(folder, "train", "recipe.yaml", strike=strike).code == -signal.SIGKILL
        before = len(server.requests)
        assert 12 < before < len(once)
        again = forks.start(folder, "train", "recipe.yaml")
        assert again.code == 0, again.err
        assert "continuing after step 2 of 4" in again.out
        # All but the answer that was being written, and perhaps one that was on its way.
        asked_again = [json.dumps(request) for request in server.requests]
        assert sorted(set(asked_again)) == sorted(once)
        assert len(once) + 1 <= len(asked_again) <= len(once) + 2
    assert_same(folder / "run", whole / "run")


def test_opd_train_gives_failed_groups_zero_advantage(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch):
    """Of some prompts the server knows nothing: their groups have no gradient, the others train on."""
    prompts = [row["prompt"] for row in sums(0, 12)]

    def rule(text: str) -> Said:
        (asked_of,) = re.findall(r"# Task\n(\S+)", text)
        return judging(text) if prompts.index(asked_of) % 3 else Said(status=404, body={"error": "never heard of it"})

    server.rule = rule
    recipe = with_judge(server.url, options={"max_failed": 1.0}, prompts_per_step=6, samples_every=1)
    monkeypatch.chdir(answered(tmp_path / "work", recipe))
    ended = command("train", "recipe.yaml")
    assert ended.code == 0, ended.err
    rows = rows_of(Path("run"))
    samples = RunDir(Path("run")).stage("distil").read_samples()
    for row in rows:
        mine = [one for one in samples if one["step"] == row["step"]]
        failed = [one for one in mine if not prompts.index(one["prompt"]) % 3]
        assert row["judge/failed_share"] == pytest.approx(len(failed) / len(mine))
        assert all(one["reward"] is None and set(one["advantage"]) == {0.0} for one in failed)
        assert all(one["reward"] is not None for one in mine if one not in failed)
    assert 0 < sum(row["judge/failed_share"] for row in rows) / len(rows) < 1
    assert any(set(one["advantage"]) != {0.0} for one in samples)


def test_opd_train_stops_before_update_when_judges_fail(tmp_path: Path, forks: Forks, server: Server):
    server.rule = lambda text: Said(status=401, body={"error": "who are you?"})
    ended = forks.start(answered(tmp_path / "work", with_judge(server.url)), "train", "recipe.yaml")
    assert ended.code == 1
    assert "TeacherError" in ended.err
    assert "got no answer for 2 of this step's 2 groups" in ended.err
    assert "the judge wrote no rubric: HTTP 401" in ended.err
    assert "who are you?" in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "work/run/distil/metrics.jsonl").exists()
    server.rule = judging
    assert forks.start(tmp_path / "work", "train", "recipe.yaml").code == 0


def test_rubric_run_is_equal_in_two_processes(tmp_path: Path, forks: Forks):
    with serving() as server:
        recipe = with_judge(server.url, steps=2, prompts_per_step=4)
        one, two = answered(tmp_path / "one", recipe), answered(tmp_path / "two", recipe)
        assert forks.start(one, "train", "recipe.yaml").code == 0
        requests = sorted(json.dumps(request) for request in server.requests)
        server.requests.clear()
        ended = forks.start(two, "train", "recipe.yaml", processes=2)
        assert ended.code == 0, ended.err
        assert sorted(json.dumps(request) for request in server.requests) == requests
    for mine, theirs in zip(rows_of(one / "run"), rows_of(two / "run"), strict=True):
        assert mine.keys() == theirs.keys()
        assert {k: theirs[k] for k in mine} == pytest.approx(mine, rel=1e-4, abs=1e-6)
    names = sorted(file.name for file in (two / "run/distil/judges").iterdir())
    assert names == ["answers-0.jsonl", "answers-1.jsonl"]
    assert sum(row["judge/judge_requests"] for row in timings_of(two / "run")) == 8


def test_opd_train_stops_both_processes_when_judges_fail(tmp_path: Path, forks: Forks):
    with serving() as server:
        server.rule = lambda text: Said(status=400, body={})
        folder = answered(tmp_path / "work", with_judge(server.url, prompts_per_step=4))
        ended = forks.start(folder, "train", "recipe.yaml", processes=2)
    assert ended.code == 1
    assert "got no answer for 4 of this step's 4 groups" in ended.err


def test_author_takes_recipe_model_and_judge_needs_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A tiny model writes no rubric: its answers are the author's, and as a judge it only fails."""
    reward = {
        "name": "rubric",
        "options": {"max_failed": 1.0},
        "author": {"lm": "teacher", "max_tokens": 4},
        "judge": {"function": "counting_judge:judge"},
    }
    monkeypatch.chdir(prepare(tmp_path / "work", with_judge(URL, reward=reward)))
    Path("counting_judge.py").write_text(COUNTING_JUDGE)
    ended = command("train", "recipe.yaml")
    assert ended.code == 0, ended.err
    rows = rows_of(Path("run"))
    assert [row["judge/failed_share"] for row in rows] == [0.0] * 4
    assert all(1 <= row["judge/points"] / 4 <= 4 for row in rows)
    resolved = load_recipe(Path("run/recipe.yaml"))
    assert resolved.stages[0].reward is not None
    assert resolved.stages[0].reward.author is not None

    bad = with_judge(URL, reward={**reward, "judge": {"lm": "teacher", "max_tokens": 4}}, steps=1)
    monkeypatch.chdir(prepare(tmp_path / "bad", bad))
    ended = command("train", "recipe.yaml")
    assert ended.code == 2
    assert "teacher is the judge of the reward, and its questions are conversations" in ended.err
    assert "has no chat template" in ended.err
