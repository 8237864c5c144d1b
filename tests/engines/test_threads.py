"""Threads that wait for servers: results as they come, errors at once, and nothing begun for a caller that has left."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

from opd.engines.threads import as_ended, in_thread, results


def test_results_come_in_order():
    first = threading.Event()

    def late() -> int:
        assert first.wait(30.0)
        return 1

    assert results([in_thread(late), in_thread(lambda: (first.set(), 2)[1])]) == [1, 2]
    assert results([]) == []


def test_error_is_raised_before_the_results():
    over = threading.Event()
    held = [in_thread(lambda: over.wait(60.0)) for _ in range(2)]
    with pytest.raises(ZeroDivisionError):
        results([held[0], in_thread(lambda: 1 // 0), held[1]])
    assert not any(one.done() for one in held)
    over.set()


@pytest.mark.parametrize("at_once", [1, 3, 20])
def test_as_ended_runs_so_many_at_once(at_once):
    lock, now, most = threading.Lock(), Counter[str](), [0]
    together = threading.Barrier(min(at_once, 9), timeout=30.0)

    def work(item: int) -> int:
        with lock:
            now["n"] += 1
            most[0] = max(most[0], now["n"])
        together.wait()
        with lock:
            now["n"] -= 1
        return 10 * item

    assert dict(as_ended(work, range(9), at_once)) == {i: 10 * i for i in range(9)}
    assert most == [min(at_once, 9)]


def test_as_ended_begins_nothing_after_its_caller_left():
    """At each item that ends, one other is begun."""
    begun, ended, over = list[int](), list[int](), threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item == 1:
            assert over.wait(60.0)
        ended.append(item)
        return item

    replies = as_ended(work, range(9), 2)
    assert [next(replies)[0] for _ in range(3)] == [0, 2, 3]
    replies.close()
    over.set()
    until = time.monotonic() + 30.0
    while len(ended) < 5 and time.monotonic() < until:
        time.sleep(0.01)
    assert sorted(begun) == sorted(ended) == [0, 1, 2, 3, 4]


def test_as_ended_raises_the_error_of_an_item():
    with pytest.raises(ZeroDivisionError):
        list(as_ended(lambda item: 1 // item, [1, 0, 1], 1))
