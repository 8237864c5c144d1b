"""Judges: a server that misbehaves in every way, a model, a program; what is kept of their answers and what is not."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from support.http_server import Said
from support.judges import SECRET, Server, completion, serving
from support.models import byte_tokenizer, tiny

from opd.errors import ConfigError, RunError, TrainingError
from opd.recipe.schema import JudgeSection
from opd.samplers.asked.build import check_judge, judge_of
from opd.samplers.asked.cache import AnswerCache, CachedJudge
from opd.samplers.asked.endpoint import Endpoint
from opd.samplers.asked.local import LocalJudge
from opd.samplers.asked.program import Program
from opd.samplers.asked.protocol import Failure, Question, Reply, UnreadableError
from opd.samplers.hf import TransformersSampler


def question(text: str = "?", **fields: Any) -> Question:
    return Question(**{"content": ({"role": "user", "content": text},), "temperature": 0.5, **fields})


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(lambda text: completion(f"about {text}")) as one:
        yield one


def endpoint(server: Server, **settings: Any) -> Endpoint:
    fields = {"timeout_s": 5.0, "patience_s": 5.0, "backoff_s": 0.01, "concurrency": 4, **settings}
    return Endpoint(url=server.url, model="judge-1", **fields)


def one(judge: Any, asked: Question | None = None) -> Reply:
    ((i, reply),) = judge.ask([asked or question()])
    assert i == 0
    return reply


# --- a server --------------------------------------------------------------------------------------------------------


def test_endpoint_sends_chat_completion_request(server: Server):
    reply = one(endpoint(server, key=SECRET, max_tokens=7, body={"seed": 3, "stop": None}))
    assert reply == Reply(text="about ?")
    (sent,) = server.requests
    message = {"role": "user", "content": "?"}
    assert sent == {"model": "judge-1", "messages": [message], "temperature": 0.5, "max_tokens": 7, "seed": 3}
    (headers,) = server.headers
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert headers["Content-Type"] == "application/json"


def test_endpoint_sends_text_as_user_message_without_key(server: Server):
    one(endpoint(server), Question(content="plain", temperature=0.0))
    assert server.requests[0]["messages"] == [{"role": "user", "content": "plain"}]
    assert "Authorization" not in server.headers[0]


def test_endpoint_body_removes_fields_when_null(server: Server):
    one(endpoint(server, body={"temperature": None, "max_tokens": None, "max_completion_tokens": 9}))
    assert set(server.requests[0]) == {"model", "messages", "max_completion_tokens"}


def test_endpoint_sends_questions_concurrently_up_to_limit(server: Server):
    together = threading.Barrier(3, timeout=30)

    def rule(text: str) -> Said:
        together.wait()
        return replace(completion(text), wait_s=0.05)

    server.rule = rule
    replies = dict(endpoint(server, concurrency=3, timeout_s=60).ask([question(str(i)) for i in range(9)]))
    assert {i: reply.text for i, reply in replies.items()} == {i: str(i) for i in range(9)}
    assert server.most_at_once == 3


def test_endpoint_yields_answers_as_ready(server: Server):
    quick_is_here = threading.Event()

    def rule(text: str) -> Said:
        assert text == "quick" or quick_is_here.wait(timeout=30)
        return completion(text)

    server.rule = rule
    order: list[str | None] = []
    for _, reply in endpoint(server, timeout_s=60).ask([question("slow"), question("quick")]):
        order.append(reply.text)
        quick_is_here.set()
    assert order == ["quick", "slow"]


LEAVES = """
import sys
from opd.samplers.asked.endpoint import Endpoint
from opd.samplers.asked.protocol import Question
questions = [Question(content=text, temperature=0.0) for text in ("quick", "slow", "slow")]
for _ in Endpoint(url=sys.argv[1], model="judge-1", concurrency=3).ask(questions):
    sys.exit(3)
"""


def test_process_does_not_wait_for_a_judge_that_hangs(server: Server):
    """An error or a second Ctrl-C leaves the loop over the replies while two are outstanding."""
    both, over, late = threading.Barrier(3, timeout=60), threading.Event(), list[str]()

    def rule(text: str) -> Said:
        both.wait()  # all three questions have arrived
        if text == "slow" and not over.wait(60.0):
            late.append(text)
        return completion(text)

    server.rule = rule
    try:
        ended = subprocess.run([sys.executable, "-c", LEAVES, server.url], capture_output=True, text=True, timeout=300)
        assert not late
    finally:
        over.set()
    assert ended.returncode == 3, ended.stderr


@pytest.mark.parametrize(
    "trouble",
    [
        Said(status=500, body={"error": "oh"}),
        Said(status=502, body=b"<html>bad gateway</html>"),
        Said(status=503, body=b""),
        Said(hang_up=True),
        Said(body=b"<html>a proxy's page</html>"),
        Said(body={"choices": []}),
        Said(body={"choices": [{"message": {"content": None, "refusal": "no"}}]}),
        Said(body=b'{"choices": [{"message": {"cont'),
        Said(body=b'{"choices": ' + b"[" * 5000),
        Said(body=b"cut", headers=(("Content-Length", "999"),)),
    ],
    ids=lambda said: f"{said.status}-{str(said.body)[:20]}",
)
def test_endpoint_retries_transient_failures(server: Server, trouble: Said):
    server.script = [trouble, trouble]
    assert one(endpoint(server, retries=2)) == Reply(text="about ?", requests=3)
    server.script = [trouble] * 3
    failed = one(endpoint(server, retries=2))
    assert failed.text is None
    assert failed.requests == 3
    assert failed.failure


@pytest.mark.parametrize("status", [301, 307, 400, 401, 403, 404, 422])
def test_endpoint_does_not_retry_permanent_failures(server: Server, status: int):
    server.script = [Said(status=status, body={"error": "not so"}, headers=(("Location", f"{server.url}/other"),))]
    failed = one(endpoint(server))
    assert failed.failure is not None
    assert failed.failure.startswith(f"HTTP {status}")
    assert len(server.requests) == failed.requests == 1


def test_endpoint_gives_up_when_server_is_silent(server: Server):
    server.script = [Said(wait_s=60.0, body=b"")] * 2
    started = time.monotonic()
    failed = one(endpoint(server, timeout_s=0.2, retries=1))
    assert failed == Reply(failure="no answer within 0.2 s", requests=2)
    assert time.monotonic() - started < 30


def test_endpoint_gives_up_when_server_trickles(server: Server):
    server.script = [replace(completion("x" * 500), trickle_s=0.1)]
    started = time.monotonic()
    failed = one(endpoint(server, timeout_s=0.3, retries=0))
    assert failed.failure == "no answer within 0.3 s"
    assert time.monotonic() - started < 30


def test_endpoint_fails_when_connection_is_refused():
    with serving() as server:
        pass
    failed = one(endpoint(server, retries=1))
    assert failed.failure is not None
    assert failed.failure.startswith("no connection (ConnectionRefusedError")
    assert failed.requests == 2


def busy(after: str | None, status: int = 429) -> Said:
    return Said(status=status, body={"error": "slow down"}, headers=() if after is None else (("Retry-After", after),))


@pytest.mark.parametrize(("after", "least"), [("0.2", 0.6), (None, 0.07)], ids=["seconds", "no header"])
def test_endpoint_waits_when_busy_without_using_retries(server: Server, after: str | None, least: float):
    server.script = [busy(after)] * 3
    started = time.monotonic()
    assert one(endpoint(server, retries=0)) == Reply(text="about ?", requests=4)
    assert time.monotonic() - started >= least


def test_endpoint_waits_until_date_of_retry_after(server: Server):
    soon = (datetime.now(UTC) + timedelta(seconds=2)).replace(microsecond=0)
    server.script = [busy(format_datetime(soon, usegmt=True), status=503)]
    assert one(endpoint(server, retries=0)).requests == 2
    assert datetime.now(UTC) > soon - timedelta(seconds=0.1)


def test_endpoint_gives_up_when_busy_beyond_patience(server: Server):
    server.script = [busy("3600")]
    failed = one(endpoint(server, patience_s=5.0))
    assert failed.requests == 1
    assert failed.failure is not None
    assert failed.failure.startswith("HTTP 429")
    assert "it requests 3.6e+03 s more, after 0 s of `patience_s` 5" in failed.failure


@pytest.mark.parametrize("after", ["0", "-3", "Wed, 01 Jan 2020 00:00:00 GMT"])
def test_endpoint_limits_waits_when_retry_after_is_now(server: Server, after: str):
    server.script = [busy(after)] * 50
    failed = one(endpoint(server, patience_s=0.05))
    assert failed.requests == 6  # five waits of backoff_s
    assert "HTTP 429" in str(failed.failure)


def test_endpoint_marks_cut_answer(server: Server):
    server.script = [completion("{", finish="length")]
    assert one(endpoint(server)) == Reply(text="{", cut=True)


def test_endpoint_hides_key_in_texts_and_repr(server: Server):
    judge = endpoint(server, key=SECRET, retries=0)
    leaks = [
        Said(status=401, body={"error": f"Incorrect API key: {SECRET}"}),
        Said(body={"error": f"Bearer {SECRET}"}),
        completion(f"your key is {SECRET}"),
    ]
    server.script = list(leaks)
    replies = [one(judge) for _ in leaks]
    assert "[key]" in str(replies[0].failure)
    assert replies[2].text == "your key is [key]"
    assert SECRET not in repr(replies) + repr(judge) + json.dumps(dict(judge.identity))


def test_endpoint_sends_no_key_to_redirect_host(server: Server):
    with serving(lambda text: completion("from elsewhere")) as other:
        there = (("Location", f"{other.url}/chat/completions"),)
        server.script = [Said(status=307, body={}, headers=there), Said(status=302, body={}, headers=there)]
        assert [one(endpoint(server, key=SECRET)).text for _ in range(2)] == [None, None]
        assert other.requests == []


# --- a program -------------------------------------------------------------------------------------------------------


def test_program_reads_about_of_question():
    judge = Program(function=lambda asked, more: f"{asked.about['n']}{more}", name="f", options={"more": "!"})
    questions = [question(about={"n": n}) for n in range(2)]
    assert list(judge.ask(questions)) == [(0, Reply(text="0!")), (1, Reply(text="1!"))]
    assert one(Program(function=lambda asked: None, name="f")).failure == "it returned no answer"


def test_program_that_panics_is_called_again_and_fails():
    def panics(asked: Question) -> str:
        raise GeneratorExit("closed")

    failed = one(Program(function=panics, name="f", retries=1, backoff_s=0.0))
    assert failed == Reply(failure="the judge f raised RuntimeError: GeneratorExit: closed", requests=2)


def test_program_is_called_again_when_it_raises():
    calls: list[str] = []

    def raises_twice(asked: Question) -> str:
        calls.append("call")
        if len(calls) < 3:
            raise SystemExit("no network")
        return "good"

    assert one(Program(function=raises_twice, name="f", retries=2, backoff_s=0.0)) == Reply(text="good", requests=3)
    calls.clear()
    failed = one(Program(function=raises_twice, name="f", retries=1, backoff_s=0.0))
    assert (failed.text, failed.failure) == (None, "the judge f raised SystemExit: no network")


def test_program_waits_longer_before_each_call(monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []
    monkeypatch.setattr("opd.samplers.asked.program.time.sleep", waits.append)

    def broken(asked: Question) -> str:
        raise ValueError

    one(Program(function=broken, name="f", retries=3))
    assert waits == [1.0, 2.0, 4.0]


def test_local_judge_samples_again_when_torch_fails(monkeypatch: pytest.MonkeyPatch):
    judge, calls = local(retries=1), []
    good = one(judge)
    sample = TransformersSampler.__call__

    def fails_once(*given: Any, **settings: Any) -> Any:
        calls.append("call")
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no memory")
        return sample(*given, **settings)

    monkeypatch.setattr(TransformersSampler, "__call__", fails_once)
    again = one(judge)
    assert (again.text, again.requests) == (good.text, 2)
    calls.clear()
    failed = one(local(retries=0))
    assert failed.text is None
    assert "raised OutOfMemoryError: no memory" in str(failed.failure)


def test_program_fails_after_its_retries():
    def broken(asked: Question) -> str:
        raise KeyError("points")

    reply = one(Program(function=broken, name="mine:f", backoff_s=0.0))
    assert (reply.text, reply.failure, reply.requests) == (None, "the judge mine:f raised KeyError: 'points'", 3)
    with pytest.raises(TrainingError, match="The judge mine:f returned a dict"):
        one(Program(function=lambda asked: {}, name="mine:f"))  # type: ignore[arg-type,return-value]


# --- a model ---------------------------------------------------------------------------------------------------------


def local(**settings: Any) -> LocalJudge:
    lm = tiny(tokenizer=byte_tokenizer(), name="judge")
    return LocalJudge(lm=lm, origin={"path": "here"}, **{"max_tokens": 8, **settings})


def test_local_judge_depends_on_question_alone():
    judge = local()
    questions = [question(text, temperature=t) for text in ("a", "longer", "b") for t in (0.0, 1.0)]
    together = dict(judge.ask(questions))
    alone = {i: one(judge, asked) for i, asked in enumerate(questions)}
    assert together == alone
    again = {i: one(judge, replace(asked, attempt=1)) for i, asked in enumerate(questions)}
    greedy = [i for i, asked in enumerate(questions) if asked.temperature == 0]
    assert [again[i].text for i in greedy] == [alone[i].text for i in greedy]
    assert any(again[i].text != alone[i].text for i in alone)
    assert one(judge, replace(questions[1], number=1)).text != alone[1].text
    assert all(reply.cut == (len(str(reply.text).encode()) >= 8) for reply in alone.values() if reply.cut)


def test_judge_of_tells_weights_of_one_path_apart(tmp_path: Path):
    def key(seed: int, nudged: bool = False) -> str:
        lm = tiny(tokenizer=byte_tokenizer(), name="judge", seed=seed)
        if nudged:
            with torch.no_grad():
                next(lm.model.parameters()).mul_(1.001)
        judge = judge_of(JudgeSection(lm="judge"), {"judge": lm}, {"judge": {"path": "./judge"}})
        return CachedJudge(judge=judge, cache=AnswerCache(tmp_path), retries=0).key(question("a"))

    assert key(1) == key(1)
    assert len({key(1), key(2), key(1, nudged=True)}) == 3


def test_local_judge_fails_only_too_long_question():
    judge = local()
    replies = dict(judge.ask([question("x" * 400), question("short")]))
    assert replies[1].text is not None
    assert replies[0].text is None
    assert "and an answer up to 8, but judge has only 256 positions" in str(replies[0].failure)


# --- what is kept ----------------------------------------------------------------------------------------------------


class Recorded:
    """A judge with a list of answers, which remembers what it was asked."""

    identity: dict[str, Any] = {"who": "recorded"}  # noqa: RUF012

    def __init__(self, *answers: str | None) -> None:
        self.answers = list(answers)
        self.asked: list[Question] = []

    def ask(self, questions: Any) -> Iterator[tuple[int, Reply]]:
        for i, asked in reversed(list(enumerate(questions))):  # not in order
            self.asked.append(asked)
            text = self.answers.pop(0)
            yield i, Reply(text=text, failure="down" if text is None else None)


def number(asked: Question, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise UnreadableError(f"{text!r} is no number") from error


def asking(folder: Path, judge: Any, retries: int = 2, rank: int = 0) -> CachedJudge:
    return CachedJudge(judge=judge, cache=AnswerCache(folder, rank), retries=retries)


def test_cached_judge_repeats_no_question_when_killed(tmp_path: Path):
    judge = Recorded("2", "1")
    first = asking(tmp_path, judge)
    assert first.ask([question("a"), question("b")], number) == [1, 2]
    assert first.ask([question("b"), question("b")], number) == [2, 2]
    assert first.counts["cached"] == 2

    file = tmp_path / "answers-0.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"key": "half of')  # killed in the middle of a line
    another = Recorded("3")
    again = asking(tmp_path, another)
    assert file.read_bytes() == whole
    assert again.ask([question("a"), question("b"), question("c")], number) == [1, 2, 3]
    assert [one.content[0]["content"] for one in another.asked] == ["c"]  # type: ignore[index,union-attr]


def test_cached_judge_sends_equal_questions_once(tmp_path: Path):
    judge = Recorded("1")
    assert asking(tmp_path, judge).ask([question("a")] * 3, number) == [1, 1, 1]


@pytest.mark.parametrize(
    "other",
    [question("b"), question("a", temperature=0.0), question("a", number=1), Question(content="a", temperature=0.5)],
)
def test_cached_judge_sends_again_when_question_differs(tmp_path: Path, other: Question):
    judge = Recorded("1", "2")
    mine = asking(tmp_path, judge)
    assert mine.ask([question("a")], number) + mine.ask([other], number) == [1, 2]


def test_cached_judge_sends_again_when_judge_differs(tmp_path: Path):
    assert asking(tmp_path, Recorded("1")).ask([question()], number) == [1]
    other = Recorded("2")
    other.identity = {"who": "another"}
    assert asking(tmp_path, other).ask([question()], number) == [2]


def test_cached_judge_refuses_cut_answer_when_whole(server: Server, tmp_path: Path):
    server.script = [completion("1", finish="length"), completion("2")] + [completion("3", finish="length")] * 3
    mine = asking(tmp_path, endpoint(server), retries=1)
    assert mine.ask([question("a")], number, whole=True) == [2]
    (cut,) = mine.ask([question("b")], number, whole=True)
    assert cut == Failure("the answer is incomplete; the answer was cut: raise max_tokens")
    assert mine.counts["unreadable"] == 3
    assert mine.ask([question("b")], number) == [3]


def test_cached_judge_retries_until_answer_is_readable(tmp_path: Path):
    judge = Recorded("x", "y", "3")
    mine = asking(tmp_path, judge)
    assert mine.ask([question()], number) == [3]
    assert [one.attempt for one in judge.asked] == [0, 1, 2]
    assert mine.counts["unreadable"] == mine.counts["retries"] == 2
    assert asking(tmp_path, Recorded()).ask([question()], number) == [3]


def test_cached_judge_fails_after_retries_and_keeps_no_answer(tmp_path: Path):
    mine = asking(tmp_path, Recorded("x", "y"), retries=1)
    assert mine.ask([question()], number) == [Failure("'y' is no number")]
    assert mine.counts["failed"] == 1
    assert asking(tmp_path, Recorded("3")).ask([question()], number) == [3]


def test_cached_judge_fails_at_once_without_answer(tmp_path: Path):
    judge = Recorded(None, "1")
    assert asking(tmp_path, judge).ask([question("a"), question("b")], number) == [1, Failure("down")]
    assert len(judge.asked) == 2


def test_cached_judge_names_max_tokens_when_answer_is_cut(tmp_path: Path):
    class Cut(Recorded):
        def ask(self, questions: Any) -> Iterator[tuple[int, Reply]]:
            yield 0, Reply(text="12,", cut=True)

    (failure,) = asking(tmp_path, Cut(), retries=0).ask([question()], number)
    assert failure == Failure("'12,' is no number; the answer was cut: raise max_tokens")


def test_cached_judge_saves_each_answer_before_interrupt(tmp_path: Path):
    """A judge that is interrupted between two answers: the first is not lost."""

    class Killed(Recorded):
        def ask(self, questions: Any) -> Iterator[tuple[int, Reply]]:
            yield 0, Reply(text="1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asking(tmp_path, Killed()).ask([question("a"), question("b")], number)
    judge = Recorded("2")
    assert asking(tmp_path, judge).ask([question("a"), question("b")], number) == [1, 2]


def test_answer_cache_reads_all_ranks_and_writes_own(tmp_path: Path):
    assert asking(tmp_path, Recorded("1"), rank=1).ask([question("a")], number) == [1]
    alone = asking(tmp_path, Recorded("2"))
    assert alone.ask([question("a"), question("b")], number) == [1, 2]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["answers-0.jsonl", "answers-1.jsonl"]
    assert [len((tmp_path / f"answers-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)] == [1, 1]


@pytest.mark.parametrize("line", ["{broken}", '{"text": "no key"}', "[]"])
def test_answer_cache_raises_run_error_when_line_is_damaged(tmp_path: Path, line: str):
    (tmp_path / "answers-0.jsonl").write_text(line + "\n")
    with pytest.raises(RunError, match=r"answers-0\.jsonl.*[Rr]emove"):
        AnswerCache(tmp_path)


# --- sections --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({}, "exactly one of url, lm, function; got none"),
        ({"lm": "a", "function": "m:f"}, r"got \['lm', 'function'\]"),
        ({"url": "http://x/v1"}, "set `model`"),
        ({"lm": "a", "model": "b", "timeout_s": 3}, "`lm` does not read model, timeout_s: leave it out"),
        ({"url": "http://x/v1", "model": "m", "options": {"a": 1}}, "`url` does not read options"),
        ({"lm": "a", "max_tokens": 0}, "greater than or equal to 1"),
        ({"lm": "a", "api_key": SECRET}, "api_key"),
    ],
)
def test_judge_section_refuses_wrong_fields(section: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        JudgeSection(**section)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"url": "localhost:8000", "model": "m"}, "`url` is not an address"),
        ({"url": "ftp://host/v1", "model": "m"}, "`url` is not an address"),
        ({"url": f"https://me:{SECRET}@host/v1", "model": "m"}, "`url` holds more than an address"),
        ({"url": f"https://host/v1?key={SECRET}", "model": "m"}, "`url` holds more than an address"),
        ({"url": "https://host/v1", "model": "m", "api_key_env": SECRET}, "is not the name of an environment variable"),
        (
            {"url": "https://host/v1", "model": "m", "api_key_env": "NO_SUCH_KEY"},
            "NO_SUCH_KEY, which is not set or empty",
        ),
        ({"function": "no_such_module:f"}, "importing 'no_such_module' failed"),
        ({"function": "textwrap:dedent", "options": {"nonsense": 1}}, "cannot be called with the options"),
    ],
)
def test_check_judge_refuses_unusable_section(section: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says) as caught:
        check_judge(JudgeSection(**section), "here")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("around", ["{}\n", " {}", "{}\r\nX-Other: 1", "{}\N{EURO SIGN}"])
def test_check_judge_refuses_key_unfit_for_header(monkeypatch: pytest.MonkeyPatch, around: str):
    monkeypatch.setenv("ODD_KEY", around.format(SECRET))
    with pytest.raises(ConfigError, match="ODD_KEY has white space") as refused:
        check_judge(JudgeSection(url="https://host/v1", model="m", api_key_env="ODD_KEY"), "reward")
    assert SECRET not in str(refused.value)


def test_judge_of_reads_key_without_showing_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    section = JudgeSection(url="https://host/v1", model="m", api_key_env="JUDGE_KEY")
    check_judge(section, "here")
    judge = judge_of(section, {}, {})
    assert isinstance(judge, Endpoint)
    assert judge.key == SECRET
    assert SECRET not in repr(judge) + section.model_dump_json()
