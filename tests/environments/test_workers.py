"""Actions of several conversations at once: the same conversations, sooner, and an action that hangs stops no other."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from support.models import prompts_of, tiny
from support.talking import Talker

from opd.environments.acting import Limits
from opd.environments.conversations import ConversationSampler, Rules
from opd.environments.protocol import Environment, Observation, Turn
from opd.environments.workers import Workers
from opd.samplers.hf import TransformersSampler
from opd.types import Rollout, Sampling

NO_CALL = Turn(text="a", calls=(), unreadable=None, last=False)


@dataclass
class Slow(Environment):
    """Answers with its thread after a while; some states raise, print or hang until `released`."""

    seconds: float = 0.0
    name: str = "slow"
    released: threading.Event = field(default_factory=threading.Event)
    at_once: int = 0
    most: int = 0
    lock: Any = field(default_factory=threading.Lock)

    def act(self, state: Any, turn: Turn) -> Observation:
        with self.lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        try:
            time.sleep(self.seconds)
            if state == "raises":
                raise ValueError("no")
            if state == "exits":
                sys.exit(3)
            if state == "prints":
                print("words")
            if state == "hangs":
                self.released.wait(30)
            return Observation(text=f"said {state}")
        finally:
            with self.lock:
                self.at_once -= 1


def acts(environment: Environment, states: list[Any], workers: int, timeout_s: float = 10.0) -> Any:
    return Workers(environment=environment, limits=Limits(timeout_s=timeout_s), workers=workers)(
        [(state, NO_CALL) for state in states]
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_observations_come_in_order_with_their_own_counts(workers: int):
    environment = Slow(seconds=0.01)
    found = acts(environment, ["one", "raises", "prints", "exits", "two", "three"], workers)
    assert [one.text for one, _ in found] == [
        "said one",
        "error: ValueError: no",
        "said prints",
        "error: SystemExit: 3",
        "said two",
        "said three",
    ]
    assert not any(hangs for _, hangs in found)
    assert [one.counts.get("errors", 0) for one, _ in found] == [0, 1, 0, 1, 0, 0]
    assert [one.counts["printed"] for one, _ in found] == [0, 0, 1, 0, 0, 0]
    assert environment.most == workers


def test_workers_wait_together():
    started = time.monotonic()
    acts(Slow(seconds=0.2), list(range(8)), workers=8)
    assert time.monotonic() - started < 1.2  # 1.6 s one after another


def test_action_that_hangs_ends_its_conversation_alone():
    environment = Slow()
    found = acts(environment, ["hangs", "one", "hangs", "two", "three"], workers=2, timeout_s=1.0)
    environment.released.set()
    assert [hangs for _, hangs in found] == [True, False, True, False, False]
    assert found[0][0].text == "error: it took longer than 1 s"
    assert found[0][0].counts == {"timeouts": 1}
    assert [one.text for one, hangs in found if not hangs] == ["said one", "said two", "said three"]


def test_stop_of_the_run_in_a_thread_stops_the_run():
    class Stops(Slow):
        def act(self, state: Any, turn: Turn) -> Observation:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        acts(Stops(), ["one", "two"], workers=2)


def led(environment: Environment, workers: int, **limits: Any) -> list[Rollout]:
    lm, sampling = tiny(seed=1, spread=0.3), Sampling(max_completion_length=24, n=2, stop=("a", "e"))
    rules = Rules(environment=environment, max_turns=4, workers=workers, limits=Limits(**limits))
    inner = TransformersSampler(lm=lm, sampling=sampling)
    return ConversationSampler(inner=inner, lm=lm, sampling=sampling, rules=rules)(
        prompts_of("ab", "hello", "x"), seed=(3, 1)
    )


def test_conversations_do_not_depend_on_workers():
    alone, together = led(Talker(longest=4), 1), led(Talker(longest=4), 5)
    assert any(int(one.turn.max()) for one in alone)
    for one, other in zip(alone, together, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        assert (one.reward, one.turn.tolist()) == (other.reward, other.turn.tolist())
        assert one.talk is not None
        assert other.talk is not None
        assert dict(one.talk.counts) == dict(other.talk.counts)


def test_conversation_that_hangs_is_counted():
    @dataclass
    class Hangs(Slow):
        def begin(self, prompt: Any, *, seed: Any) -> Any:
            from opd.environments.protocol import Begun

            return Begun(state="hangs" if seed[-1] == 1 else "says")

    environment = Hangs()
    found = led(environment, 3, timeout_s=1.0)
    environment.released.set()
    for one in found:
        assert one.talk is not None
        counts = one.talk.counts
        acted = one.finished or counts["turns"] > 1 or not counts["token_limit"]
        assert counts["hung"] == counts["timeouts"] == float(one.sample == 1 and acted)
    assert sum(one.talk.counts["hung"] for one in found if one.talk is not None)
