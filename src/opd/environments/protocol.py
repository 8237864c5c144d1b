"""The protocol of an environment, and its records.

    prompt -> begin -> state, what the student reads, tools
    turn   -> act   -> observation: what the student reads next, a reward, or the end        until the end or a limit

One object serves all conversations. What belongs to one of them is its state, which `begin` makes anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from opd.types import NOTHING_MORE, EarlyStop, Message, Prompt, Record, Rollout, Sampler

Seed: TypeAlias = tuple[int, int, int, int]  # (seed of the run, step, prompt id, sample)
# The counts that every conversation has: how it went, and how it ended if not by the environment.
COUNTS = (
    *("turns", "tool_calls", "tool_errors", "errors", "timeouts", "cut", "cleaned", "printed"),
    *("turn_limit", "token_limit", "stopped", "refused", "rewritten", "hung"),
)
SUMS = (*COUNTS, "own_tokens", "heard_tokens", "done")  # all metrics environment/... but an environment's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """The beginning of a conversation."""

    state: Any = None
    content: str | tuple[Message, ...] | None = None  # what the student reads first; None: the prompt
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas, for the chat template


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call of a tool, as the student wrote it."""

    name: str
    arguments: Any = field(default_factory=dict[str, Any])  # by name; of a plain text one text


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What the student wrote in one turn."""

    text: str  # without special tokens
    calls: tuple[Call, ...] = ()  # of tools, if the conversation has any
    unreadable: str | None = None  # why a call in the text cannot be read
    last: bool = False  # no further turn follows: the turn limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What the student reads next. `reward` belongs to the turn before; `done` ends the conversation.

    `text` becomes one message of `role`, or is appended as it is to a prompt that is a text. Of several tool calls
    `texts` has one each. What a final observation says is read by no one.
    """

    text: str = ""
    texts: tuple[str, ...] = ()
    role: str = "user"
    reward: float | None = None
    done: bool = False
    counts: Mapping[str, float] = field(default_factory=dict[str, float])  # added to the metrics environment/...


class Environment(Protocol):
    """Answers the student's turns. Subclass it to inherit everything but `act`."""

    name: str = "environment"  # for messages
    rewards: bool = False  # whether it gives rewards: a conversation without one then has the reward 0
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas of the tools that it offers at the beginning

    def begin(self, prompt: Prompt, *, seed: Seed) -> Begun:
        """A new conversation. All randomness of an environment comes from `seed`."""
        return Begun(tools=self.tools)

    def act(self, state: Any, turn: Turn) -> Observation:
        """The answer to a turn. It may change `state`, which belongs to this conversation alone.

        What it raises, and a call that takes too long, becomes an observation and is counted: no run ends by it.
        """
        ...

    def end(self, state: Any) -> None:
        """Called once when a conversation is over, however it ended. What it raises is counted as an error."""


class TakesTurns(Sampler, Protocol):
    """A sampler that can continue a conversation."""

    def extend(
        self,
        rollouts: Sequence[Rollout],
        turn: int,
        limits: Sequence[int],
        *,
        seed: tuple[int, int],
        record: Record = NOTHING_MORE,
        stop: EarlyStop | None = None,
    ) -> list[Rollout]:
        """The next turn of each conversation, of at most `limits` tokens, as rollouts of its tokens alone, in order.

        `rollouts` are the conversations so far: the model reads their `prompt_ids` and `response_ids`, and nothing is
        encoded again. They have no token in the first turn, `turn` 0, whose tokens are those of a call of the sampler.
        Random numbers depend on (seed, step), prompt id, sample and `turn` alone. `stop` gets the turn's tokens.
        """
        ...

    def completed(self, rollouts: Sequence[Rollout], record: Record) -> list[Rollout]:
        """Whole conversations with what `extend` could not record; here: as they are."""
        return list(rollouts)
