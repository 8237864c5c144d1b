"""Several servers of one model: bounded load, one lost server, groups that stay together, an end to patience."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
from support.http_server import Arrived, Said, listening

from opd.engines import replicas as module
from opd.engines.replicas import Job, Replicas
from opd.engines.server import Answer, Connection, Server, WrongServerError
from opd.rewards.calls import interrupted


class Counter:
    """A server that answers the number that it is sent, and knows how many tokens are in flight."""

    def __init__(self, wait_s: float = 0.0, said: Callable[[int], Said | None] = lambda number: None) -> None:
        self.wait_s, self.said = wait_s, said
        self.lock = threading.Lock()
        self.seen: list[int] = []
        self.load = self.most = 0

    def answer(self, arrived: Arrived) -> Said:
        number, tokens = arrived.request["number"], arrived.request["tokens"]
        with self.lock:
            self.seen.append(number)
            self.load += tokens
            self.most = max(self.most, self.load)
        time.sleep(self.wait_s)
        with self.lock:
            self.load -= tokens
        return self.said(number) or Said(body={"number": number})


def job(number: int, tokens: int = 10, group: Any = None) -> Job[int]:
    return Job(
        path="score",
        fields={"number": number, "tokens": tokens},
        read=lambda raw: json.loads(raw)["number"],
        tokens=tokens,
        group=number if group is None else group,
    )


def replicas(*urls: str, **settings: Any) -> Replicas:
    given = {"patience_s": 5.0, "pause_s": 0.05, **settings}
    return Replicas(servers=tuple(Server(url=url, timeout_s=2.0) for url in urls), **given)


def of(*counters: Counter, numbers: int = 20, **settings: Any) -> tuple[list[int | None], Replicas]:
    with ExitStack() as stack:
        urls = [stack.enter_context(listening(one.answer)) for one in counters]
        made = replicas(*urls, **settings)
        return [answer.value for answer in made.answers([job(i) for i in range(numbers)])], made


def test_answers_come_in_order_from_all_servers():
    a, b = Counter(0.01), Counter(0.01)
    found, made = of(a, b)
    assert found == list(range(20))
    assert sorted([*a.seen, *b.seen]) == list(range(20))
    assert min(len(a.seen), len(b.seen)) >= 5
    assert made.counts.requests == 20
    assert made.counts.repeated == made.counts.failed == 0


def test_tokens_in_flight_are_bounded_per_server():
    one = Counter(0.01)
    of(one, tokens_in_flight=35)
    assert one.most == 30


def test_job_larger_than_bound_is_sent_alone():
    one = Counter(0.02)
    with listening(one.answer) as url:
        found = replicas(url, tokens_in_flight=25).answers([job(0, 100), job(1), job(2)])
    assert [answer.value for answer in found] == [0, 1, 2]
    assert one.most <= 100


def test_group_stays_on_one_server_behind_its_first_job():
    a, b = Counter(0.01), Counter(0.01)
    with listening(a.answer) as first, listening(b.answer) as second:
        jobs = [job(i, group=i % 4) for i in range(24)]
        assert [one.value for one in replicas(first, second).answers(jobs)] == list(range(24))
    for group in range(4):
        at = [[n for n in one.seen if n % 4 == group] for one in (a, b)]
        assert sorted(map(len, at)) == [0, 6]
        assert max(at, key=len)[0] == group  # its first job


def test_lost_server_is_left_out_and_nothing_is_lost():
    alive = Counter(0.005)
    with listening(alive.answer) as url, listening(Counter().answer) as dead:
        pass
    with listening(alive.answer) as url:
        made = replicas(url, dead, patience_s=60.0)
        started = time.monotonic()
        assert [one.value for one in made.answers([job(i) for i in range(40)])] == list(range(40))
        assert time.monotonic() - started < 20.0
    assert made.counts.servers_lost >= 1
    assert made.counts.failed == 0


def test_lost_server_is_tried_again_by_one_job():
    ill = [True]
    a, b = Counter(0.02), Counter(0.02, said=lambda number: Said(status=500, body={}) if ill[0] else None)
    with listening(a.answer) as first, listening(b.answer) as second:
        made = replicas(first, second, tokens_in_flight=20, retries=50)
        timer = threading.Timer(0.2, lambda: ill.__setitem__(0, False))
        timer.start()
        assert [one.value for one in made.answers([job(i) for i in range(80)])] == list(range(80))
        timer.join()
    assert len(a.seen) + len(b.seen) == 80 + made.counts.repeated
    assert len(b.seen) > made.counts.repeated  # it answered again


def test_answers_end_after_patience_without_a_server():
    with listening(Counter().answer) as dead:
        pass
    started = time.monotonic()
    found = replicas(dead, patience_s=0.3).answers([job(i) for i in range(3)])
    assert 0.3 <= time.monotonic() - started < 3.0
    assert all("no server has answered for 0.3 s (`patience_s`)" in str(one.failure) for one in found)


@pytest.mark.parametrize(("status", "tries"), [(500, 3), (400, 1)])
def test_job_fails_after_its_retries_and_others_do_not(status, tries):
    one = Counter(said=lambda number: Said(status=status, body={}) if number == 3 else None)
    found, made = of(one, numbers=6)
    assert found == [0, 1, 2, None, 4, 5]
    assert one.seen.count(3) == tries
    assert made.counts.failed == 1


def test_threads_end_when_a_parser_raises():
    def broken(raw: bytes) -> int:
        raise ZeroDivisionError

    with listening(lambda arrived: Said(body={})) as url, pytest.raises(ZeroDivisionError):
        replicas(url).answers([Job(path="score", fields={}, read=broken, tokens=1, group=i) for i in range(9)])
    until = time.monotonic() + 5.0
    while left := [one for one in threading.enumerate() if one.name.startswith("ThreadPoolExecutor")]:
        assert time.monotonic() < until, left
        time.sleep(0.01)


def test_failed_job_goes_to_another_server():
    a, b = Counter(said=lambda number: Said(status=500, body={})), Counter()
    found, made = of(a, b, numbers=1, retries=1)
    assert found == [0]
    assert (a.seen, b.seen) == ([0], [0])
    assert made.counts.repeated == 1


def number(one: Connection) -> Answer[int]:
    return one.post("score", {"number": 1, "tokens": 1}, lambda raw: json.loads(raw)["number"])


def faulty(*said: Said) -> Counter:
    """A server whose first answers are `said`."""
    left = list(said)
    return Counter(said=lambda _: left.pop(0) if left else None)


ILL = Said(status=500, body={})


@pytest.mark.parametrize(
    ("said", "wait_s", "requests", "answered"),
    [
        ((ILL, ILL), 0.0, 3, True),
        ((ILL, ILL, ILL), 0.0, 3, False),
        ((Said(hang_up=True),), 0.0, 1, False),
        ((Said(hang_up=True),), 0.5, 2, True),
        ((Said(status=400, body={}),), 0.5, 1, False),
    ],
)
def test_each_repeats_what_may_pass(said, wait_s, requests, answered):
    one = faulty(*said)
    with listening(one.answer) as url:
        made = replicas(url)
        answer = made.each(number, wait_s=wait_s)[url]
    assert (answer.value == 1) == answered
    assert len(one.seen) == made.counts.requests == requests
    assert made.counts.repeated == requests - 1


def test_each_waits_for_lost_server_while_no_other_answers():
    alive = Counter()
    with listening(Counter().answer) as dead:
        pass
    with listening(alive.answer) as url:
        for urls, wait_s, least in (((dead,), 0.8, 0.6), ((url, dead), 60.0, 0.0)):
            started = time.monotonic()
            found = replicas(*urls, retries=1).each(number, wait_s=wait_s)
            assert found[dead].lost
            assert least <= time.monotonic() - started < 20.0


def of_version(raw: bytes) -> int:
    number = json.loads(raw)["number"]
    if number < 0:
        raise WrongServerError("another version")
    return number


def test_wrong_server_gets_no_further_request():
    """One job each is sent to it by its two threads, and then none; another server answers all."""
    wrong, right = Counter(0.01, said=lambda _: Said(body={"number": -1})), Counter(0.01)
    with listening(wrong.answer) as first, listening(right.answer) as second:
        made = replicas(first, second, tokens_in_flight=20, pause_s=30.0)
        jobs = [replace(job(i), read=of_version) for i in range(12)]
        assert [one.value for one in made.answers(jobs)] == list(range(12))
    assert 1 <= len(wrong.seen) <= 2
    assert len(right.seen) == 12


def test_answers_end_at_once_when_all_servers_are_wrong():
    one = Counter(said=lambda _: Said(body={"number": -1}))
    with listening(one.answer) as url:
        started = time.monotonic()
        found = replicas(url, pause_s=30.0, patience_s=60.0).answers(
            [replace(job(i), read=of_version) for i in range(9)]
        )
    assert time.monotonic() - started < 20.0
    assert {answer.failure for answer in found} == {f"{url}: another version"}


def test_answers_leave_out_servers():
    a, b = Counter(), Counter()
    with listening(a.answer) as first, listening(b.answer) as second:
        made = replicas(first, second)
        made.left_out.add(first)
        assert [one.value for one in made.answers([job(i) for i in range(6)])] == list(range(6))
        assert set(made.each(number, among=made.left_out)) == {first}
    assert (a.seen, len(b.seen)) == ([1], 6)


def test_waits_for_busy_server_are_counted():
    one = faulty(Said(status=503, body={}, headers=(("Retry-After", "0"),)))
    with listening(one.answer) as url:
        made = Replicas(servers=(Server(url=url, timeout_s=2.0, backoff_s=0.01),))
        assert made.answers([job(3)])[0].value == 3
    assert (made.counts.waits, made.counts.requests, made.counts.repeated) == (1, 2, 0)


def test_counts_start_again_after_pop():
    made = Replicas(servers=())
    made.counts.requests, made.counts.sent_mb = 3, 0.5
    assert made.counts.pop()["requests"] == 3.0
    assert set(made.counts.pop().values()) == {0.0}
    assert module.LOST_AFTER == 2


class NowError(BaseException):
    """What a signal raises in the main thread, as a second Ctrl-C does."""


@contextmanager
def holding(free: int | None = None) -> Iterator[tuple[str, list[int]]]:
    """A server that keeps its answers until the block ends, and interrupts the main thread; number `free` it answers.

    Yields its address, and the numbers that it answered nevertheless, after a minute.
    """
    over, given = threading.Event(), list[int]()

    def answer(arrived: Arrived) -> Said:
        asked = arrived.request["number"]
        if asked != free:
            if free is None:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
            if not over.wait(60.0):
                given.append(asked)
        return Said(body={"number": asked})

    with listening(answer) as url:
        try:
            yield url, given
        finally:
            over.set()


@pytest.mark.parametrize("send", [lambda of: of.each(number), lambda of: of.answers([job(1)])], ids=["each", "answers"])
def test_interrupt_does_not_wait_for_an_answer(send):
    with holding() as (url, given), interrupted(120.0, NowError):
        with pytest.raises(NowError):
            send(Replicas(servers=(Server(url=url, timeout_s=90.0),)))
        assert not given


def test_error_does_not_wait_for_other_answers():
    """Nothing is left of the threads either, once the server has answered."""

    def broken(raw: bytes) -> int:
        raise ZeroDivisionError

    jobs = [job(1), job(2), replace(job(3), read=broken)]
    with holding(free=3) as (url, given):
        with pytest.raises(ZeroDivisionError):
            Replicas(servers=(Server(url=url, timeout_s=90.0),)).answers(jobs)
        assert not given
