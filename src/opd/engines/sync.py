"""New weights for vLLM's servers, and the proof that they serve them.

After every update a fixed sequence is scored by the servers and by the trainer. Updates that return without an error
have left an old output layer, half of the weights, or weights of neither model (vLLM 0.32). Checksums do not see it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from opd.engines.capabilities import control_ids
from opd.engines.replicas import Replicas
from opd.engines.server import Answer, BodyError, Connection, in_turn
from opd.engines.update import remove_others, updated
from opd.engines.vllm import (
    Drawn,
    TopScores,
    completion_fields,
    draw_fields,
    member_of,
    parse_drawn,
    parse_top,
    sampling_fields,
)
from opd.errors import NotFiniteError, TrainingError
from opd.parallel import ALONE, World
from opd.types import Sampling

DRAWN = 16  # tokens that show which log-probs a server gives
TEMPERATURE = 2.0  # at which they are drawn: it tells the log-probs of what is drawn from those before temperature

START = (
    "Start it with VLLM_SERVER_DEV_MODE=1, `--worker-extension-cls opd.engines.worker.WeightLoader`, "
    "`--enable-scale-out` and `--logprobs-mode processed_logprobs`, in an environment that has this library"
)


class Delivery(Protocol):
    """How the student's whole weights get to the servers. `start`: how to start a server for it."""

    start: str

    def send(self, version: int) -> None:
        """Every process calls this. Its gathers have ended in all of them before the main process sends anything.

        Raises an OPDError in every process.
        """
        ...

    def load(self, one: Connection) -> Answer[Any]:
        """In the main process: one server uses what was sent. It is called again after a failure that may pass."""
        ...


@dataclass(slots=True, kw_only=True)
class Folder:
    """Delivers weights by a folder that trainer and servers share.

    `write` gathers the student's weights in all processes and writes them, whole, as safetensors to a folder.
    """

    folder: Path
    write: Callable[[Path], None]
    world: World = ALONE
    sleeps: bool = False  # the servers are asleep when they are to load
    version: int = 0
    start: str = START

    def send(self, version: int) -> None:
        """Write the weights, and remove the folders before. Raises RunError if they cannot be written."""
        self.version = version
        self.write(self._now)
        self.world.by_main(lambda: remove_others(self._now))

    def load(self, one: Connection) -> Answer[Any]:
        """One server loads the folder, by the worker extension.

        A sleeping one gets memory for the weights, then the weights, then the rest, and only then draws again.
        """
        fields = {"method": "opd_load", "kwargs": {"folder": str(self._now.absolute())}}

        def load() -> Answer[int]:
            return one.post("collective_rpc", fields, loaded)

        if not self.sleeps:
            return load()
        return in_turn(
            lambda: one.post("wake_up?tags=weights", {}, lambda raw: True),
            load,
            lambda: one.post("wake_up", {}, lambda raw: True),
        )

    @property
    def _now(self) -> Path:
        return self.folder / f"version-{self.version}"


@dataclass(slots=True, kw_only=True)
class Sync:
    """Delivers whole weights and proves that they are served. Every process of `world` makes the same calls.

    `logp(ids, temperature)`: the student's log-probs of the tokens after the first, from gathers in all processes that
    have ended in all of them before the main process alone speaks to the servers. `tolerance`: of a log-prob's
    difference, in nats.
    """

    replicas: Replicas
    model: str
    delivery: Delivery
    logp: Callable[[Sequence[int], float], np.ndarray]
    vocabulary: int
    tolerance: float
    world: World = ALONE
    asleep: int | None = None  # the version that sleeping servers load again
    error: float = 0.0  # in the main process, of the last proof: the largest difference of a log-prob, in nats
    before: np.ndarray | None = None  # the student's log-probs at the last update

    def __call__(self, version: int) -> None:
        """Send, load, name and prove version `version`.

        Of several servers, one that gives no answer at all is left out until a later update finds it again.

        Raises, in every process:
            NotFiniteError: a log-prob of the student is not finite. The servers keep their weights.
            TrainingError: a server refuses the weights, or scores with others than the trainer's, or none answers.
            RunError: the weights cannot be written.
        """
        own = self.logp(control_ids(self.vocabulary), 1.0)
        if not np.isfinite(own).all():
            raise NotFiniteError(f"The student's log-probs of a fixed sequence are not finite at step {version}.")
        self.delivery.send(version)
        self.replicas.leave_out(self.world.by_main(lambda: self._give(version, own)))
        self.asleep = None
        if self.before is None:
            self._check_mode()
        self.before = own

    def _give(self, version: int, own: np.ndarray) -> set[str]:
        """In the main process: the servers load the weights, and prove it. The silent ones, which are left out."""
        ids = control_ids(self.vocabulary)
        fields = completion_fields(self.model, ids, 0)
        named = {"new_version": str(version)}

        def update(one: Connection) -> Answer[TopScores]:
            return in_turn(
                lambda: self.delivery.load(one),
                lambda: one.post("update_weight_version", named, lambda raw: True),
                lambda: one.post("v1/completions", fields, parse_top(ids, 1, 0)),
            )

        scored = updated(self.replicas, update, first=self.before is None, refused=self._not_given)
        self._prove(version, {url: one.logp for url, one in scored.items()}, own)
        return {one.url for one in self.replicas.servers if one.url not in scored}

    def _prove(self, version: int, scored: Mapping[str, np.ndarray], own: np.ndarray) -> None:
        """Compare the servers' scores of a fixed sequence with the student's, `own`. Raises TrainingError."""
        self.error = max(float(np.abs(logp - own).max()) for logp in scored.values())
        for url, logp in scored.items():
            apart = float(np.abs(logp - own).max())
            if not apart <= self.tolerance:
                stale = self.before is not None and float(np.abs(logp - self.before).max()) < self.tolerance
                raise TrainingError(
                    f"The server {url} does not serve the student's weights of step {version}: the log-probs of a "
                    f"fixed sequence differ by up to {apart:.3g} nats, and {self.tolerance:g} are allowed "
                    "(`tolerance`). "
                    + ("They are those of the step before: the update had no effect. " if stale else "")
                    + f"{self.delivery.start}; in another precision than the student's, raise `tolerance`."
                )

    def _check_mode(self) -> None:
        """Refuse servers whose log-probs are not of the distribution that they draw from. Raises TrainingError."""
        prompt = control_ids(self.vocabulary)[:8]
        params = sampling_fields(Sampling(temperature=TEMPERATURE), DRAWN, ())
        fields = draw_fields(self.model, prompt, params, seed=0, salt="opd-mode")
        of_servers = self.world.by_main(lambda: self._drawn(fields))
        for url, drawn in of_servers.items():
            own = self.logp([*prompt, *drawn.ids], TEMPERATURE)[len(prompt) - 1 :]
            apart = float(np.abs(own - drawn.logp).max())
            if apart > self.tolerance:
                raise TrainingError(
                    f"The server {url} gives other log-probs than those of the distribution that it draws from: at "
                    f"temperature {TEMPERATURE:g} they differ from the student's by up to {apart:.3g} nats. "
                    f"{self.delivery.start}."
                )

    def _drawn(self, fields: Mapping[str, Any]) -> dict[str, Drawn]:
        """In the main process: what each server draws."""
        replicas = self.replicas
        found = replicas.each(
            lambda one: one.post("inference/v1/generate", fields, parse_drawn), wait_s=replicas.pause_s
        )
        for url, answer in found.items():
            if answer.value is None:
                raise self._not_given(url, answer.failure)
        return {url: answer.value for url, answer in found.items() if answer.value is not None}

    def sleep(self, version: int) -> None:
        """Let the servers give up weights and cache. Raises TrainingError if one refuses.

        At level 2: at level 1 they keep a copy of the weights, which the next update replaces anyway, in the memory of
        the host. A server that gives no answer at all is found by the next update.
        """
        found = self.replicas.each(lambda one: one.post("sleep?level=2", {}, lambda raw: True))
        for url, answer in found.items():
            if answer.value is None and not answer.lost:
                raise self._not_given(url, answer.failure)
        self.asleep = version

    def wake(self) -> None:
        """Give sleeping servers the weights that they had. Raises TrainingError."""
        if self.asleep is None:
            return
        replicas = self.replicas
        there = {one.url for one in replicas.servers} - replicas.left_out
        found = replicas.each(self.delivery.load, wait_s=replicas.patience_s, among=there)
        for url, answer in found.items():
            if answer.value is None:
                raise self._not_given(url, answer.failure)
        self.asleep = None

    def _not_given(self, url: str, why: str | None) -> TrainingError:
        return not_given(url, why, self.delivery.start)


def not_given(url: str, why: str | None, start: str) -> TrainingError:
    """A server has not got the weights. `start`: how it has to be started."""
    return TrainingError(
        f"The server {url} could not be given the student's weights: {why}. {start}; the same command then continues."
    )


def loaded(raw: bytes) -> int:
    """The number of tensors that every worker has loaded. Raises BodyError, with a worker's reason."""
    results = member_of(raw, "results")
    for one in results:
        if not isinstance(one, dict) or "tensors" not in one:
            raise BodyError(str(one.get("error", one) if isinstance(one, dict) else one))
    return int(results[0]["tensors"])
