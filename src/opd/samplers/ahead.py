"""One step ahead: an engine writes the responses of step s + 1 while step s trains (`stages.NAME.ahead: 1`).

    engine     write 0 | write 1   | write 2   | write 3
    weights    0         0           1           2          updates of the student so far
    trainer              train 0   | train 1   | train 2

From step 1 on, responses are of weights that are one update older than those that train on them. Their `sampler_logp`
is that of the weights that drew them. What belongs to the student in phase A is computed again with the step's weights:
`policy_logp`, the student's top k, its entropy. A divergence then has a fresh student and a fresh support; only the
prefixes are old. arXiv 2606.24143 recommends it. A policy gradient is drawn from the old weights: see
`pieces.importance.truncated`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from opd.engines.threads import in_thread
from opd.errors import OPDError, TrainingError
from opd.samplers.vllm import EngineSampler
from opd.samplers.writers import in_prompts_order
from opd.types import NOTHING_MORE, EarlyStop, Prompt, Record, Rollout, Sampler


@dataclass(slots=True)
class Writing:
    """The responses of one step, as the engine gives them. `wait` returns them, or raises the engine's error.

    `ended`: whether `wait` would do so at once. `scored` ends when a teacher on servers has scored them, as far as it
    can before the step.
    """

    step: int
    prompts: Sequence[Prompt]
    wait: Callable[[], list[Rollout]]
    ended: Callable[[], bool]
    scored: Future[None] | None = None


@dataclass(slots=True, kw_only=True)
class Ahead(Sampler):
    """Draws with the samplers of a stage's tasks, now or in a thread; a `Sampler`.

    `seed` is the run's. `score` lets a teacher on servers score responses early (`Teacher.score_early`); its errors are
    left to the step, which requests what is missing. The threads only speak to servers: what the student computes is
    done in the thread that calls.
    """

    samplers: Mapping[str | None, EngineSampler]
    seed: int
    score: Callable[[list[Rollout]], None] | None = None
    taken: Writing | None = field(default=None, init=False)  # of the step that trains
    coming: Writing | None = field(default=None, init=False)  # of the next one
    waited: float = field(default=0.0, init=False)  # seconds since the last `pop_requests`

    @property
    def _any(self) -> EngineSampler:
        """One of the samplers, for what all of them share."""
        return next(iter(self.samplers.values()))

    def begin(self, step: int, prompts: Sequence[Prompt]) -> None:
        """Start to draw the responses of `step` with the weights that the servers have."""
        assert self.coming is None, f"the responses of step {self.coming.step} were not taken"
        coming = self.coming = self._begun(prompts, (self.seed, step))
        if (score := self.score) is not None:
            coming.scored = in_thread(lambda: score(coming.wait()))

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: tuple[int, int],
        record: Record = NOTHING_MORE,
        stop: EarlyStop | None = None,
    ) -> list[Rollout]:
        """The responses to a step's prompts: those drawn ahead, else drawn now.

        Raises TrainingError for a response that no server gave, and for other prompts than the step's.
        """
        assert stop is None, "runs.stale.check_ahead refuses sources that end responses early"
        coming = self.coming
        if coming is None or seed != (self.seed, coming.step):  # the first step, or an update's validation
            self.taken = self._begun(prompts, seed)
        elif [one.id for one in prompts] == [one.id for one in coming.prompts]:
            self.taken, self.coming = coming, None
        else:
            raise TrainingError(
                f"The method's source draws responses to {len(prompts)} prompts, and the responses to the step's "
                f"{len(coming.prompts)} prompts were drawn ahead. Set the stage's `ahead` to 0, or draw the responses "
                "to all prompts of a step in one call."
            )
        rollouts = self._waited(self.taken)
        if self.taken.scored is not None:
            start = time.perf_counter()
            self.taken.scored.exception()  # after one, the step requests the scores again
            self.waited += time.perf_counter() - start
        return self._any.complete(rollouts, record)

    def sync(self, version: int) -> None:
        """Give the servers the student's weights, once they have written what they are at."""
        self.wait()
        for sampler in self.samplers.values():
            sampler.sync(version)

    def wait(self) -> None:
        """Wait until the servers have written the next step's responses. An error is raised where those are taken."""
        if self.coming is not None:
            self._ended(self.coming)

    def pop_requests(self) -> dict[str, float]:
        """The engine's counts since the last call, and the seconds of waiting for its responses."""
        waited, self.waited = self.waited, 0.0
        return {**self._any.pop_requests(), "waited_s": waited}

    def responses(self, step: int, *, waits: bool = True) -> list[Rollout] | None:
        """The responses of `step` as the engine gave them, for a checkpoint; None if no server gave them.

        Those of the next step are waited for; if not `waits`, None stands also for those that are still drawn.
        """
        for drawn in (self.coming, self.taken):
            if drawn is not None and drawn.step == step and (waits or drawn.ended()) and self._ended(drawn):
                return drawn.wait()
        return None

    def restore(self, step: int, prompts: Sequence[Prompt], rollouts: list[Rollout]) -> None:
        """Take the responses of `step` from a checkpoint."""
        self.coming = Writing(step, prompts, lambda: rollouts, lambda: True)

    def _begun(self, prompts: Sequence[Prompt], seed: tuple[int, int]) -> Writing:
        by_task: defaultdict[str | None, list[Prompt]] = defaultdict(list)
        for prompt in prompts:
            by_task[None if None in self.samplers else prompt.task].append(prompt)
        begun = {task: self.samplers[task].begin(own, seed=seed) for task, own in by_task.items()}

        def wait() -> list[Rollout]:
            if None in begun:
                return begun[None].wait()
            return in_prompts_order(prompts, lambda task, _: begun[task].wait())

        return Writing(seed[1], prompts, wait, lambda: all(one.ended() for one in begun.values()))

    def _ended(self, drawn: Writing) -> bool:
        """Wait for the servers; whether they gave all responses."""
        try:
            self._waited(drawn)
        except OPDError:
            return False
        return True

    def _waited(self, drawn: Writing) -> list[Rollout]:
        start = time.perf_counter()
        try:
            return drawn.wait()
        finally:
            self.waited += time.perf_counter() - start


def one_ahead(
    samplers: Mapping[str | None, Sampler], seed: int, score: Callable[[list[Rollout]], None] | None = None
) -> Ahead:
    """The samplers of a stage's tasks, which are engines' (`runs.stale.check_ahead`), one step ahead."""
    engines = {task: one for task, one in samplers.items() if isinstance(one, EngineSampler)}
    assert engines.keys() == samplers.keys(), "ahead needs an engine"
    return Ahead(samplers=engines, seed=seed, score=score)
