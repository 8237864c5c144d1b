"""Several servers of one model: a bounded load for each, and another server for a request whose server is lost.

vLLM queues requests without a limit and answers neither 429 nor 503 when it is full (0.32, 0.33), so a client that
sends a whole step at once gets time-outs, retries, and doubles the load. Here the tokens in flight are bounded.

A server whose answer shows that it is the wrong one gets no further request in the same call.

A server that fails `LOST_AFTER` times in a row is left out for a while, which doubles up to `LONGEST_PAUSE_S`; then one
request tries it again. A request goes to another server, or waits, for at most `patience_s` in which no server answers.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Generic, TypeVar

from opd.engines.server import Answer, Connection, Server
from opd.engines.threads import in_thread, results

T = TypeVar("T")

LOST_AFTER = 2  # failures in a row
PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # for which a lost server is left out: at first, at most
AT_ONCE = 32  # requests in flight per server; the tokens in flight bound them further


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(Generic[T]):
    """One request, and the parser of its answer, which raises BodyError for one that it cannot use.

    Jobs of one `group` begin with the same tokens. They go to one server as long as it answers, and the first of them
    is answered before the others are sent: the server then has the common tokens in its cache.
    """

    path: str
    fields: Mapping[str, Any]
    read: Callable[[bytes], T]
    tokens: int  # that the server holds for it: those of the request and of the response
    group: Hashable


@dataclass(slots=True, kw_only=True)
class Counts:
    """What requests cost since the last `pop`, which may come while other threads add."""

    requests: int = 0
    repeated: int = 0  # requests beyond one per job
    waits: int = 0  # for a busy server
    failed: int = 0  # jobs without an answer
    servers_lost: int = 0  # how often a server was left out
    sent_mb: float = 0.0
    received_mb: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def add(
        self, answer: Answer[Any] | None = None, *, repeated: int = 0, failed: int = 0, servers_lost: int = 0
    ) -> None:
        """Count an answer's requests, waits and bytes, and what its client made of it."""
        with self._lock:
            if answer is not None:
                self.requests += answer.requests
                self.waits += answer.waits
                self.sent_mb += answer.sent / 1e6
                self.received_mb += answer.received / 1e6
            self.repeated += repeated
            self.failed += failed
            self.servers_lost += servers_lost

    def pop(self) -> dict[str, float]:
        """The counts by name, which then start again at 0."""
        with self._lock:
            found = {one.name: getattr(self, one.name) for one in fields(self) if one.init}
            for name, value in found.items():
                setattr(self, name, type(value)(0))
        return {name: float(value) for name, value in found.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """Servers of one model.

    `retries` are those of a job whose server answers with a failure or with an unusable body. `patience_s` limits the
    time without any server, and the time that one job waits for a busy server.
    """

    servers: tuple[Server, ...]
    tokens_in_flight: int = 65_536  # per server; a larger single job is sent alone
    retries: int = 2
    patience_s: float = 300.0
    pause_s: float = PAUSE_S
    counts: Counts = field(default_factory=Counts, compare=False)
    left_out: set[str] = field(default_factory=set[str], compare=False)  # addresses that `answers` does not use

    def answers(self, jobs: Sequence[Job[T]]) -> list[Answer[T]]:
        """The answers in the order of the jobs; one without a value has the reason in `failure`.

        Raises:
            ConfigError: the environment's proxy for an address cannot be used.
        """
        with ExitStack() as stack:
            connections = self._connected(stack, among={one.url for one in self.servers} - self.left_out)
            run = _Run(self, connections, jobs)
            threads = [in_thread(run.work) for _ in range(min(len(jobs), AT_ONCE * len(connections)))]
            try:
                results(threads)
            finally:
                run.stop()
        self.counts.add(failed=sum(answer.value is None for answer in run.done.values()))
        return [run.done[i] for i in range(len(jobs))]

    def each(
        self,
        send: Callable[[Connection], Answer[T]],
        within_s: float = math.inf,
        *,
        wait_s: float = 0.0,
        among: Collection[str] | None = None,
    ) -> dict[str, Answer[T]]:
        """The answer of every server, by its address, at the same time. `within_s` shortens their time limit.

        A failure is repeated `retries` times. A server that gives no answer at all is tried again only with `wait_s`:
        `retries` times, and then for so many seconds while no other server has answered either. `among`: their
        addresses; default: all.
        """
        answered, until = threading.Event(), time.monotonic() + wait_s

        def _persistent(connection: Connection) -> Answer[T]:
            failed = 0
            while True:
                answer = send(connection)
                pause = min(self.pause_s * 2**failed, LONGEST_PAUSE_S)
                again = failed < self.retries and (wait_s > 0 or not answer.lost)
                waits = answer.lost and not answered.is_set() and time.monotonic() + pause < until
                ends = answer.value is not None or not answer.transient or not (again or waits)
                self.counts.add(answer, repeated=int(not ends))
                if answer.value is not None:
                    answered.set()
                if ends:
                    return answer
                time.sleep(pause)
                failed += 1

        with ExitStack() as stack:
            connections = self._connected(stack, within_s, among)
            found = results([in_thread(partial(_persistent, one)) for one in connections])
        return {connection.server.url: answer for connection, answer in zip(connections, found, strict=True)}

    def leave_out(self, urls: Collection[str]) -> None:
        """From now on `answers` uses all servers but those at these addresses."""
        self.left_out.clear()
        self.left_out.update(urls)

    def _connected(
        self, stack: ExitStack, within_s: float = math.inf, among: Collection[str] | None = None
    ) -> list[Connection]:
        """A failure comes back at once, without a retry: another server may answer."""
        settings: dict[str, Any] = {"retries": 0, "patience_s": min(self.patience_s, within_s), "concurrency": AT_ONCE}
        chosen = [one for one in self.servers if among is None or one.url in among]
        once = [replace(one, timeout_s=min(one.timeout_s, within_s), **settings) for one in chosen]
        return [stack.enter_context(server.connected()) for server in once]


class _Run(Generic[T]):
    """The state of one call, which its threads share."""

    def __init__(self, of: Replicas, connections: Sequence[Connection], jobs: Sequence[Job[T]]) -> None:
        self.of, self.connections, self.jobs = of, connections, jobs
        self.changed = threading.Condition()
        self.done: dict[int, Answer[T]] = {}
        groups: defaultdict[Hashable, list[int]] = defaultdict(list)
        for i, job in enumerate(jobs):
            groups[job.group].append(i)
        self.ready = [members[0] for members in groups.values()]
        self.behind = {members[0]: members[1:] for members in groups.values()}
        self.home: dict[Hashable, int] = {}
        self.tries = [0] * len(jobs)
        self.failed_at: defaultdict[int, set[int]] = defaultdict(set)  # servers, by job
        self.load = [0] * len(connections)  # tokens in flight
        self.failures = [0] * len(connections)  # in a row
        self.back_at = [0.0] * len(connections)  # when a lost server is tried again
        self.last_answer = time.monotonic()  # of any server
        self.why = "no server was tried"
        self.stopped = False

    def work(self) -> None:
        """Send jobs until all are done."""
        while (taken := self._take()) is not None:
            index, place = taken
            job = self.jobs[index]
            try:
                answer = self.connections[place].post(job.path, job.fields, job.read)
            except BaseException:
                self.stop()
                raise
            with self.changed:
                self._finish(index, place, answer)
                self.changed.notify_all()

    def stop(self) -> None:
        """Let all threads end after their request."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def _take(self) -> tuple[int, int] | None:
        """Wait for a job that a server has room for: (job, server). None if all are done."""
        with self.changed:
            while not self.stopped and len(self.done) < len(self.jobs):
                now = time.monotonic()
                for index in self.ready:
                    place = self._place(index, now)
                    if place is not None:
                        self.ready.remove(index)
                        self.load[place] += self.jobs[index].tokens
                        self.home[self.jobs[index].group] = place
                        return index, place
                if self._give_up(now):
                    self.changed.notify_all()
                    continue
                returning = [at - now for at in self.back_at if at > now]
                self.changed.wait(min([*returning, 1.0]))
            return None

    def _place(self, index: int, now: float) -> int | None:
        """The server for a job: that of its group, else the one with the least tokens in flight that has room.

        One that has failed the job comes last.
        """
        job, failed_at = self.jobs[index], self.failed_at[index]
        back = [i for i, at in enumerate(self.back_at) if at <= now]
        there = [i for i in back if self.failures[i] < LOST_AFTER or not self.load[i]]  # one job tries a lost server
        home = self.home.get(job.group)
        if home in there:
            there = [home]
        room = [i for i in there if not self.load[i] or self.load[i] + job.tokens <= self.of.tokens_in_flight]
        return min(room, key=lambda i: (i in failed_at, self.load[i]), default=None)

    def _finish(self, index: int, place: int, answer: Answer[T]) -> None:
        """Record an answer, or send the job again."""
        self.load[place] -= self.jobs[index].tokens
        self.of.counts.add(answer)
        if answer.value is not None or not answer.transient:
            self.failures[place], self.last_answer = 0, time.monotonic()
            self._settle(index, answer)
            return
        self.why = f"{self.connections[place].server.url}: {answer.failure}"
        self.failures[place] += 1
        self.failed_at[index].add(place)
        if answer.wrong:
            self.back_at[place] = math.inf
            self.of.counts.add(servers_lost=1)
        elif self.failures[place] >= LOST_AFTER:
            beyond = self.failures[place] - LOST_AFTER
            self.back_at[place] = time.monotonic() + min(self.of.pause_s * 2**beyond, LONGEST_PAUSE_S)
            self.of.counts.add(servers_lost=1)
        self.tries[index] += not answer.lost and not answer.wrong
        if self.tries[index] > self.of.retries:
            self._settle(index, replace(answer, failure=self.why))
            return
        self.of.counts.add(repeated=1)
        self.home.pop(self.jobs[index].group, None)
        self.ready.insert(0, index)

    def _settle(self, index: int, answer: Answer[T]) -> None:
        self.done[index] = answer
        self.ready += self.behind.pop(index, [])

    def _give_up(self, now: float) -> bool:
        """Fail all waiting jobs if no server is at work, and all are wrong or none has answered for `patience_s`."""
        wrong = min(self.back_at) == math.inf
        if any(self.load) or not (wrong or now - self.last_answer >= self.of.patience_s):
            return False
        while self.ready:
            silent = f"no server has answered for {self.of.patience_s:.3g} s (`patience_s`); last: "
            failure = self.why if wrong else silent + self.why
            self._settle(self.ready.pop(), Answer(failure=failure, requests=0, transient=True, lost=True))
        return True
