"""Responses from vLLM's servers, which get the student's weights before every step.

Token ids go in and out, so nothing is encoded twice. All sampling fields are sent, because a server takes missing ones
from the model's `generation_config.json`. A response's randomness depends on (seed, step, prompt id, sample) alone. The
server has to run with `--logprobs-mode processed_logprobs`: then its log-probs are those of the distribution that the
tokens were drawn from, after temperature, top-k and top-p.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from opd.engines.adapters import AdapterSync
from opd.engines.replicas import Job, Replicas
from opd.engines.server import BodyError, WrongServerError
from opd.engines.sync import Sync
from opd.engines.threads import in_thread
from opd.engines.vllm import Drawn, draw_fields, parse_drawn, sampling_fields, seed_of
from opd.errors import ConfigError, TrainingError
from opd.messages import text_after
from opd.models.language_model import LanguageModel
from opd.models.processors import refuse_images
from opd.models.render import render_checked
from opd.types import NOTHING_MORE, EarlyStop, Prompt, Record, Rollout, Sampler, Sampling

PARTS = 20  # bits for the number of a part in the seeds of one turn


@dataclass(slots=True, kw_only=True)
class EngineSampler(Sampler):
    """Writes responses with the student's weights on servers; a `Sampler`.

    `update` gives the servers the student's weights and proves them; None if another sampler of the stage does.
    `adapters`: if it sends LoRA adapters, what says the name of the last one.
    `complete` adds the student's own values to responses: the log-probs before truncation, and what a record names.
    """

    lm: LanguageModel
    sampling: Sampling
    replicas: Replicas
    model: str
    update: Sync | AdapterSync | None
    complete: Callable[[Sequence[Rollout], Record], list[Rollout]]
    adapters: AdapterSync | None = None
    sleeper: Sync | None = None  # puts the servers to sleep while nothing is drawn
    max_prompt_length: int | None = None
    version: int = 0
    updates: int = field(default=0, init=False)  # so far
    # Separates the servers' caches of other weights, also those of an earlier start of this run.
    salt: str = field(default_factory=lambda: secrets.token_hex(8), init=False)
    ends: frozenset[int] = field(init=False)  # end tokens that are no text, also where the tokenizer decodes them

    def __post_init__(self) -> None:
        self.ends = self.lm.stop_ids & self.lm.tokenizer.added_tokens_decoder.keys()

    @property
    def temperature(self) -> float:
        """The temperature of `policy_logp` and of recorded entropies."""
        return self.sampling.temperature or 1.0

    def sync(self, version: int) -> None:
        """Give the servers the student's weights; every process calls this. Raises TrainingError if that fails."""
        if self.update is not None:
            self.update(version)
        self.version, self.updates = version, self.updates + 1

    def pop_requests(self) -> dict[str, float]:
        """Requests and bytes since the last call, and the error of the last proof in nats."""
        return {**self.replicas.counts.pop(), "sync_error": 0.0 if self.update is None else self.update.error}

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: tuple[int, int],
        record: Record = NOTHING_MORE,
        stop: EarlyStop | None = None,
    ) -> list[Rollout]:
        """`sampling.n` responses to each prompt, in order. `stop` may end responses during sampling.

        Raises DataError for a prompt that is too long, ConfigError for an early stop beside stop strings, TrainingError
        for a response that no server gave.
        """
        if stop is not None and self.sampling.stop:
            raise ConfigError(
                "A method that ends responses early asks an engine for a few tokens at a time, and `sampling.stop` may "
                "span two parts. Remove `sampling.stop`, or the stage's `engine`."
            )
        rows = self._rows(prompts)
        self._write_all(rows, seed, stop)
        return self.completed([self._rollout(row) for row in rows], record)

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
        """The next turn of conversations, as rollouts of its tokens alone: see `environments.protocol.TakesTurns`.

        `completed` adds to whole conversations what a server does not record. Raises TrainingError.
        """
        rows = [
            _Row(one.prompt, one.sample, [*one.prompt_ids, *one.response_ids.tolist()], self.version, limit)
            for one, limit in zip(rollouts, limits, strict=True)
        ]
        self._write_all(rows, seed, stop, turn)
        return [self._rollout(row) for row in rows]

    def completed(self, rollouts: Sequence[Rollout], record: Record) -> list[Rollout]:
        """The rollouts with the student's own values that a server does not record."""
        truncates = self.sampling.top_p < 1.0 or self.sampling.top_k > 0
        return self.complete(rollouts, record) if truncates or record != NOTHING_MORE else list(rollouts)

    def _write_all(self, rows: Sequence[_Row], seed: tuple[int, int], stop: EarlyStop | None, turn: int = 0) -> None:
        """Write all rows to their ends or limits; with an early stop some tokens at a time."""
        if self.sleeper is not None:
            self.sleeper.wake()
        longest = max(row.limit for row in rows)
        part = longest if stop is None else stop.every
        active = list(rows)
        for begin in range(0, longest, part):
            self._draw(active, part, (*seed, begin // part + (turn << PARTS)))
            active = [row for row in active if not row.finished and len(row.ids) < row.limit]
            if stop is not None and active and begin + part < longest:
                keeps = stop.keeps_going([self._rollout(row) for row in active])
                active = [row for row, keeps_going in zip(active, keeps, strict=True) if keeps_going]
        if self.sleeper is not None:
            self.sleeper.sleep(self.version)

    def begin(self, prompts: Sequence[Prompt], *, seed: tuple[int, int]) -> Begun:
        """Draw the same responses in a thread. They are not completed.

        Raises DataError for a prompt that is too long.
        """
        rows = self._rows(prompts)
        drawn = in_thread(lambda: self._draw(rows, self.sampling.max_completion_length, (*seed, 0)))
        return Begun(drawn, lambda: [self._rollout(row) for row in rows])

    def _rows(self, prompts: Sequence[Prompt]) -> list[_Row]:
        refuse_images(prompts, "A vLLM engine")
        ids = render_checked(
            prompts,
            self.lm.tokenizer,
            max_prompt_length=self.max_prompt_length,
            template_options=self.lm.template_options,
        )
        return [
            _Row(prompt, sample, prompt_ids, self.version, self.sampling.max_completion_length)
            for prompt, prompt_ids in zip(prompts, ids, strict=True)
            for sample in range(self.sampling.n)
        ]

    def _draw(self, rows: Sequence[_Row], tokens: int, seed: tuple[int, int, int]) -> None:
        """Continue the rows by at most `tokens` tokens, and none beyond its limit."""
        model = self.model if self.adapters is None else self.adapters.serves
        jobs = [
            Job(
                path="inference/v1/generate",
                fields=draw_fields(
                    model,
                    row.read,
                    sampling_fields(self.sampling, min(tokens, row.limit - len(row.ids)), self.lm.stop_ids),
                    seed=seed_of(seed, row.prompt.id, row.sample),
                    salt=f"opd-{self.salt}-{self.updates}",
                ),
                read=self._read,
                tokens=len(row.read) + min(tokens, row.limit - len(row.ids)),
                group=tuple(row.prompt_ids),
            )
            for row in rows
        ]
        for row, answer in zip(rows, self.replicas.answers(jobs), strict=True):
            if answer.value is None:
                raise TrainingError(
                    f"No server of the engine gave a response to prompt {row.prompt.id}: {answer.failure}. Start the "
                    "servers again; the same command then continues."
                )
            row.ids += answer.value.ids
            row.logp += answer.value.logp
            row.finished = answer.value.finished

    def _read(self, raw: bytes) -> Drawn:
        """A response of the last update's weights, with adapters of the base's. Raises BodyError for another one.

        The server of a response of other weights is the wrong one until the next update.
        """
        drawn = parse_drawn(raw)
        wanted = {str(self.version)} if self.adapters is None else self.adapters.stamps
        if wrong := set(drawn.versions) - wanted:
            raise WrongServerError(
                f"it drew tokens with the weights of version {', '.join(sorted(wrong))}, and the student is at version "
                f"{', '.join(sorted(wanted))}: it was started again, or another run updates it. Give each run its own "
                "servers"
            )
        if drawn.ids and not drawn.versions:
            raise BodyError("it does not say which weights drew its tokens, as vLLM does since 0.32")
        return drawn

    def _rollout(self, row: _Row) -> Rollout:
        spoken = row.ids[:-1] if row.ids and row.ids[-1] in self.ends else row.ids
        logp = torch.tensor(row.logp)
        return Rollout(
            prompt=row.prompt,
            sample=row.sample,
            prompt_ids=tuple(row.prompt_ids),
            response_ids=torch.tensor(row.ids),
            trained=torch.ones(len(row.ids), dtype=torch.bool),
            turn=torch.zeros(len(row.ids), dtype=torch.long),
            finished=row.finished,
            text=text_after(row.prompt_ids, spoken, self.lm.tokenizer),
            sampler_logp=logp,
            policy_logp=logp,
            sampler_version=row.version,
            sampling=self.sampling,
        )


@dataclass(frozen=True, slots=True)
class Begun:
    """Responses that a thread draws."""

    drawn: Future[None]
    rollouts: Callable[[], list[Rollout]]  # once they are drawn

    def ended(self) -> bool:
        """Whether the servers have given them, or have failed."""
        return self.drawn.done()

    def wait(self) -> list[Rollout]:
        """Wait for them. Raises TrainingError for a response that no server gave."""
        self.drawn.result()
        return self.rollouts()


@dataclass(slots=True)
class _Row:
    """One response during sampling."""

    prompt: Prompt
    sample: int
    prompt_ids: list[int]
    version: int
    limit: int  # tokens that it may have
    ids: list[int] = field(default_factory=list[int])
    logp: list[float] = field(default_factory=list[float])
    finished: bool = False

    @property
    def read(self) -> list[int]:
        """The tokens that the model reads before it writes."""
        return [*self.prompt_ids, *self.ids]
