"""Many conversations at once: in each round all that go on write their next turn in one batch.

A response is then a whole conversation, the student's tokens and the environment's, behind the prompt:

    prompt_ids | 12*7 is [12*7] | 84. | So 84 apples.<eos>
    turn       |       0        |  1  |       1
    trained    |      True      | False |    True

The environment's tokens are read, and nothing else: `trained` is False, their log-probs are NaN.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from opd.environments.acting import Limits, begun, cleaner_of, ended
from opd.environments.between import Transcript
from opd.environments.formats import Parsed, format_of, parsed
from opd.environments.protocol import COUNTS, Begun, Environment, Observation, TakesTurns, Turn
from opd.environments.workers import Workers
from opd.errors import ConfigError
from opd.messages import text_after
from opd.models.language_model import LanguageModel
from opd.models.render import render_checked
from opd.plugins import torch
from opd.types import NOTHING_MORE, EarlyStop, Prompt, Record, Rollout, Sampler, Sampling, Talk

if TYPE_CHECKING:
    from torch import Tensor

FAILED = ("tool_errors", "errors", "timeouts")  # counts of an observation: the student reads why in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How conversations with an environment are led."""

    environment: Environment
    format: str = "auto"  # of tool calls, see `formats`
    max_turns: int = 8
    max_turn_length: int | None = None  # tokens of a turn
    keeps_rewritten: bool = False  # go on where the template writes an earlier turn otherwise now
    limits: Limits = Limits()
    workers: int = 1  # actions at once


@dataclass(slots=True, kw_only=True)
class _Row:
    """One conversation."""

    prompt: Prompt
    sample: int
    state: Any
    transcript: Transcript
    prompt_ids: list[int] = field(default_factory=list[int])
    ids: list[int] = field(default_factory=list[int])
    heard: list[bool] = field(default_factory=list[bool])
    turn: list[int] = field(default_factory=list[int])
    parts: list[Rollout | int] = field(default_factory=list["Rollout | int"])  # own turns, and numbers of heard tokens
    rewards: list[float | None] = field(default_factory=list["float | None"])
    errors: list[int] = field(default_factory=list[int])
    counts: Counter[str] = field(default_factory=Counter[str])
    last_text: str = ""
    finished: bool = False
    over: bool = False

    def says(self, new: Rollout, turn: int) -> None:
        """Add a turn of the student."""
        self.parts.append(new)
        self._add(new.response_ids.tolist(), turn, heard=False)
        self.last_text = new.text
        self.counts["turns"] += 1

    def hears(self, ids: Sequence[int], turn: int) -> None:
        """Add tokens of the environment; `turn` is that of the student's words behind them."""
        if ids:
            self.parts.append(len(ids))
            self._add(ids, turn, heard=True)

    def ends(self, why: str | None) -> None:
        """End the conversation: by the environment, or for a reason of `COUNTS`."""
        self.over, self.finished = True, why is None
        if why is not None:
            self.counts[why] += 1

    def _add(self, ids: Sequence[int], turn: int, *, heard: bool) -> None:
        self.ids += ids
        self.heard += [heard] * len(ids)
        self.turn += [turn] * len(ids)


@dataclass(slots=True, kw_only=True)
class ConversationSampler(Sampler):
    """Leads conversations between the student, who writes by `inner`, and an environment; a `Sampler`.

    `sampling.max_completion_length` is the limit of a whole conversation, the environment's tokens included, as in TRL.
    """

    inner: TakesTurns
    lm: LanguageModel
    sampling: Sampling
    rules: Rules
    max_prompt_length: int | None = None
    clean: Callable[[str], tuple[str, dict[str, float]]] = field(init=False)
    channels: bool = field(init=False)  # the model writes in harmony's channels, of which one is the answer
    workers: Workers = field(init=False)

    def __post_init__(self) -> None:
        tokenizer = self.lm.tokenizer
        self.clean = cleaner_of(tokenizer, self.rules.limits.characters)
        self.channels = bool(tokenizer.chat_template) and "<|channel|>" in tokenizer.get_chat_template()
        rules = self.rules
        self.workers = Workers(environment=rules.environment, limits=rules.limits, workers=rules.workers)

    @property
    def temperature(self) -> float:
        """That of the sampler inside."""
        return self.inner.temperature

    def sync(self, version: int) -> None:
        """Call it on the sampler inside."""
        self.inner.sync(version)

    def pop_requests(self) -> dict[str, float]:
        """Those of the sampler inside."""
        return self.inner.pop_requests()

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: tuple[int, int],
        record: Record = NOTHING_MORE,
        stop: EarlyStop | None = None,
    ) -> list[Rollout]:
        """`sampling.n` conversations for each prompt, in order. `stop` gets conversations in the middle of a turn.

        Raises DataError for a prompt that is too long or that the environment cannot begin.
        """
        rows: list[_Row] = []
        try:
            self._begin(rows, prompts, seed)
            live, turn = list(rows), 0
            while live:
                limits = [self._left(row) for row in live]
                written = self.inner.extend(
                    [self._so_far(row) for row in live],
                    turn,
                    limits,
                    seed=seed,
                    record=record,
                    stop=None if stop is None else self._within(stop, live, turn, record),
                )
                self._answer_all(live, written, turn)
                live, turn = [row for row in live if not row.over], turn + 1
        finally:
            for row in rows:
                row.counts["errors"] += ended(self.rules.environment, row.state, self.rules.limits)
        whole = self.inner.completed([self._rollout(row, record) for row in rows], record)
        return [_unknown_where_heard(one) for one in whole]

    def _begin(self, rows: list[_Row], prompts: Sequence[Prompt], seed: tuple[int, int]) -> None:
        """Add the conversations to `rows`, each as soon as its state is there to be ended."""
        tokenizer, options, encoded = self.lm.tokenizer, self.lm.template_options, dict[str, tuple[int, ...]]()
        for prompt in prompts:
            for sample in range(self.sampling.n):
                one: Begun = begun(self.rules.environment, prompt, (*seed, prompt.id, sample))
                read = prompt.content if one.content is None else one.content
                first = replace(prompt, content=read, tools=tuple(one.tools))
                transcript = Transcript(
                    prompt=first,
                    tokenizer=tokenizer,
                    template_options=options,
                    stop_ids=self.lm.stop_ids,
                    encoded=encoded,
                )
                rows.append(_Row(prompt=first, sample=sample, state=one.state, transcript=transcript))
        ids = render_checked(
            [row.prompt for row in rows],
            tokenizer,
            max_prompt_length=self.max_prompt_length,
            template_options=options,
        )
        for row, own in zip(rows, ids, strict=True):
            row.prompt_ids = own

    def _left(self, row: _Row, *, before: int = 0) -> int:
        """Tokens that the next turn may have; `before`: that it might have before the last so many tokens."""
        left = self.sampling.max_completion_length - (len(row.ids) - before)
        return left if self.rules.max_turn_length is None else min(left, self.rules.max_turn_length)

    def _answer_all(self, live: Sequence[_Row], written: Sequence[Rollout], turn: int) -> None:
        """What the environment does after a turn of the student, in all conversations."""
        last, answered = turn + 1 >= self.rules.max_turns, list[tuple[_Row, Rollout, Parsed]]()
        for row, new in zip(live, written, strict=True):
            row.says(new, turn)
            row.rewards.append(None)
            row.errors.append(0)
            if not new.finished:  # a call or an answer that is cut is not acted on
                length = len(new.response_ids)
                row.ends("token_limit" if length == self._left(row, before=length) else "stopped")
                continue
            said = self._parsed(row, new)
            if self.channels and not row.transcript.is_text:
                row.last_text = said.content
            answered.append((row, new, said))
        actions = [
            (row.state, Turn(text=row.last_text, calls=said.calls, unreadable=said.unreadable, last=last))
            for row, _, said in answered
        ]
        for (row, new, said), (observation, hangs) in zip(answered, self.workers(actions), strict=True):
            row.counts["tool_calls"] += len(said.calls)
            row.counts.update(dict(observation.counts))
            row.rewards[-1] = observation.reward
            row.errors[-1] = int(sum(observation.counts.get(name, 0) for name in FAILED))
            if hangs:  # its state may still change
                row.ends("hung")
            elif observation.done or last:
                row.ends(None if observation.done else "turn_limit")
            else:
                self._hear(row, new, said, observation, turn + 1)

    def _hear(self, row: _Row, new: Rollout, said: Parsed, observation: Observation, turn: int) -> None:
        """Add an observation to a conversation, or end it where that is not possible."""
        texts: list[str] = []
        for text in observation.texts or (observation.text,):
            clean, counts = self.clean(text)
            texts.append(clean)
            row.counts.update(counts)
        words = self.lm.tokenizer.decode(self._words(new))
        between = row.transcript.after(
            new.response_ids.tolist(), words, said.content, said.calls, texts, observation.role
        )
        if between.refused is not None or (between.rewritten and not self.rules.keeps_rewritten):
            row.ends("refused" if between.refused is not None else "rewritten")
        elif len(row.ids) + len(between.ids) >= self.sampling.max_completion_length:
            row.ends("token_limit")
        else:
            row.counts["rewritten"] += between.rewritten
            row.hears(between.ids, turn)

    def _words(self, new: Rollout) -> list[int]:
        """A turn's ids without the token that ended it."""
        ids = new.response_ids.tolist()
        return ids[:-1] if ids and ids[-1] in self.lm.stop_ids else ids

    def _parsed(self, row: _Row, new: Rollout) -> Parsed:
        """The turn's text and its calls."""
        tools = row.prompt.tools or self.rules.environment.tools
        if not tools and not (self.channels and not row.transcript.is_text):
            return Parsed(content=new.text)
        if not tools:
            return replace(
                parsed(self.lm.tokenizer.decode(self._words(new)), "harmony", self.lm.tokenizer, ()), calls=()
            )
        text, how = self.lm.tokenizer.decode(self._words(new)), self.rules.format
        if how == "auto":
            how = format_of(self.lm.tokenizer, chat=not row.transcript.is_text, where="environment")
        return parsed(text, how, self.lm.tokenizer, tools)

    def _within(self, stop: EarlyStop, live: Sequence[_Row], turn: int, record: Record) -> EarlyStop:
        """The early stop, which gets whole conversations so far."""
        before = {(row.prompt.id, row.sample): row for row in live}

        def keeps_going(unfinished: Sequence[Rollout]) -> Sequence[bool]:
            return stop.keeps_going(
                [_joined(before[one.prompt.id, one.sample], one, turn, self.lm, record) for one in unfinished]
            )

        return EarlyStop(every=stop.every, keeps_going=keeps_going)

    def _so_far(self, row: _Row) -> Rollout:
        return _joined(row, None, 0, self.lm, NOTHING_MORE)

    def _rollout(self, row: _Row, record: Record) -> Rollout:
        """The whole conversation, with what is recorded of the student's tokens."""
        gives, given = self.rules.environment.rewards, [one for one in row.rewards if one is not None]
        counts = {name: float(row.counts[name]) for name in (*COUNTS, *sorted(set(row.counts) - set(COUNTS)))}
        own = len(row.ids) - sum(row.heard)
        counts |= {"own_tokens": float(own), "heard_tokens": float(sum(row.heard)), "done": float(row.finished)}
        return replace(
            _joined(row, None, 0, self.lm, record),
            finished=row.finished,
            reward=float(sum(given)) if gives or given else None,
            talk=Talk(
                heard=torch.tensor(row.heard),
                last_text=row.last_text,
                turn_rewards=tuple(row.rewards),
                turn_errors=tuple(row.errors),
                counts=counts,
            ),
        )


def _joined(row: _Row, new: Rollout | None, turn: int, lm: LanguageModel, record: Record) -> Rollout:
    """The conversation so far, and the tokens of the turn that is being written."""
    parts = [*row.parts, *([] if new is None else [new])]
    more = [] if new is None else new.response_ids.tolist()
    ids = [*row.ids, *more]
    first = next((part for part in row.parts if not isinstance(part, int)), new)
    spoken = ids[:-1] if ids and ids[-1] in lm.stop_ids & lm.tokenizer.added_tokens_decoder.keys() else ids

    def logp(name: str) -> Tensor | None:
        values = [torch.full((p,), torch.nan) if isinstance(p, int) else getattr(p, name) for p in parts]
        return None if any(value is None for value in values) else torch.cat([torch.zeros(0), *values])

    return Rollout(
        prompt=row.prompt,
        sample=row.sample,
        prompt_ids=tuple(row.prompt_ids),
        response_ids=torch.tensor(ids, dtype=torch.long),
        trained=~torch.tensor([*row.heard, *[False] * len(more)], dtype=torch.bool),
        turn=torch.tensor([*row.turn, *[turn] * len(more)], dtype=torch.long),
        finished=False,
        text=text_after(row.prompt_ids, spoken, lm.tokenizer),
        sampler_logp=logp("sampler_logp"),
        policy_logp=logp("policy_logp"),
        sampler_version=0 if first is None else first.sampler_version,
        sampling=None if first is None else first.sampling,
        student_top_ids=_recorded(parts, "student_top_ids", record.top_k) if record.top_k else None,
        student_entropy=_recorded(parts, "student_entropy", 0) if record.entropy else None,
    )


def _recorded(parts: Sequence[Rollout | int], name: str, k: int) -> Tensor | None:
    """A record of the student's tokens as one of the whole conversation. None if a turn lacks it.

    At the environment's tokens an entropy is NaN, and the ids are the first of the vocabulary: no piece reads them.
    """
    values: list[Tensor] = []
    for part in parts:
        if isinstance(part, int):
            values.append(torch.arange(k).repeat(part, 1) if k else torch.full((part,), torch.nan))
        elif (found := getattr(part, name)) is None:
            return None
        else:
            values.append(found)
    return torch.cat(values)


def _unknown_where_heard(rollout: Rollout) -> Rollout:
    """The conversation with NaN as the log-probs of the environment's tokens, also where a forward has them."""
    assert rollout.talk is not None
    heard = rollout.talk.heard

    def known(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.masked_fill(heard, torch.nan)

    return replace(
        rollout,
        sampler_logp=known(rollout.sampler_logp),
        policy_logp=known(rollout.policy_logp),
        student_entropy=known(rollout.student_entropy),
    )


def in_conversations(
    inner: Sampler, lm: LanguageModel, sampling: Sampling, rules: Rules | None, max_prompt_length: int | None
) -> Sampler:
    """The sampler in conversations by `rules`; without them itself. Raises ConfigError for one that takes no turns."""
    if rules is None:
        return inner
    if not hasattr(inner, "extend") or not hasattr(inner, "completed"):
        raise ConfigError(
            f"The stage has an environment, and the sampler {type(inner).__name__} writes single responses: it has no "
            "`extend` and `completed`, see opd.environments.protocol.TakesTurns. Add them, or leave `sampler` out."
        )
    turns: Any = inner
    return ConversationSampler(inner=turns, lm=lm, sampling=sampling, rules=rules, max_prompt_length=max_prompt_length)


def talked(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The counts of all conversations, summed, as environment/...; empty without any."""
    total: Counter[str] = Counter()
    for one in rollouts:
        if one.talk is not None:
            total.update({f"environment/{name}": number for name, number in one.talk.counts.items()})
    return dict(total)
