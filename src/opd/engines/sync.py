"""New weights for vLLM's servers, and the proof that they serve them.

After every update a fixed sequence is scored by the servers and by the trainer. Updates that return without an error
have left an old output layer, half of the weights, or weights of neither model (vLLM 0.32). Checksums do not see it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from opd.engines.capabilities import RECOGNISED_S, control_ids
from opd.engines.replicas import Replicas
from opd.engines.server import Answer, BodyError, Connection, in_turn
from opd.engines.vllm import TopScores, completion_fields, draw_fields, member_of, models_in, parse_drawn, parse_top
from opd.errors import NotFiniteError, TrainingError
from opd.parallel import ALONE, World

T = TypeVar("T")

DRAWN, TEMPERATURE = 16, 2.0  # tokens that show which log-probs a server gives

START = (
    "Start it with VLLM_SERVER_DEV_MODE=1, `--worker-extension-cls opd.engines.worker.WeightLoader`, "
    "`--enable-scale-out` and `--logprobs-mode processed_logprobs`, in an environment that has this library"
)


@dataclass(slots=True, kw_only=True)
class Sync:
    """Sends weights by a folder that trainer and servers share. Every process of `world` makes the same calls.

    `write` gathers the student's weights and writes them, whole, as safetensors to a folder; `logp(ids, temperature)`
    are its log-probs of the tokens after the first. Both gather weights in all processes, and have ended in all of
    them before the main process alone speaks to the servers. `tolerance`: of a log-prob's difference, in nats.
    """

    replicas: Replicas
    model: str
    folder: Path
    write: Callable[[Path], None]
    logp: Callable[[Sequence[int], float], np.ndarray]
    vocabulary: int
    tolerance: float
    world: World = ALONE
    error: float = 0.0  # in the main process, of the last proof: the largest difference of a log-prob, in nats
    before: np.ndarray | None = None  # the student's log-probs at the last update

    def __call__(self, version: int) -> None:
        """Write, load, name and prove version `version`.

        Of several servers, one that gives no answer at all is left out until a later update finds it again.

        Raises, in every process:
            NotFiniteError: a log-prob of the student is not finite. The servers keep their weights.
            TrainingError: a server refuses the weights, or scores with others than the trainer's, or none answers.
        """
        own = self.logp(control_ids(self.vocabulary), 1.0)
        if not np.isfinite(own).all():
            raise NotFiniteError(f"The student's log-probs of a fixed sequence are not finite at step {version}.")
        folder = self.folder / f"version-{version}"
        self.write(folder)
        leave_out(self.replicas, self.world.by_main(lambda: self._give(folder, version, own)))
        if self.before is None:
            self._check_mode()
        self.before = own

    def _give(self, folder: Path, version: int, own: np.ndarray) -> set[str]:
        """In the main process: the servers load the folder, and prove it. Returns those to leave out."""
        ids = control_ids(self.vocabulary)
        fields = completion_fields(self.model, ids, 0)
        named = {"new_version": str(version)}

        def update(one: Connection) -> Answer[TopScores]:
            return in_turn(
                lambda: self._load(one, folder),
                lambda: one.post("update_weight_version", named, lambda raw: True),
                lambda: one.post("v1/completions", fields, parse_top(ids, 1, 0)),
            )

        found = self.replicas.each(update, wait_s=self.replicas.patience_s, among=there(self.replicas))
        scored = answered(found, first=self.before is None, error=_not_given)
        self._prove(version, {url: one.logp for url, one in scored.items()}, own)
        remove_others(self.folder, folder)
        return silent(self.replicas, scored)

    def _prove(self, version: int, scored: Mapping[str, np.ndarray], own: np.ndarray) -> None:
        """Compare the servers' scores of a fixed sequence with the student's. Raises TrainingError."""
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
                    + f"{START}; in another precision than the student's, raise `tolerance`."
                )

    def _check_mode(self) -> None:
        """Refuse servers whose log-probs are not of the distribution that they draw from. Raises TrainingError."""
        prompt = control_ids(self.vocabulary)[:8]
        fields = trial_fields(self.model, prompt, salt="opd-mode")
        replicas = self.replicas
        found = self.world.by_main(
            lambda: answered(
                replicas.each(
                    lambda one: one.post("inference/v1/generate", fields, parse_drawn), wait_s=replicas.pause_s
                ),
                first=True,
                error=_not_given,
            )
        )
        for url, drawn in found.items():
            own = self.logp([*prompt, *drawn.ids], TEMPERATURE)[len(prompt) - 1 :]
            apart = float(np.abs(own - drawn.logp).max())
            if apart > self.tolerance:
                raise TrainingError(
                    f"The server {url} gives other log-probs than those of the distribution that it draws from: at "
                    f"temperature {TEMPERATURE:g} they differ from the student's by up to {apart:.3g} nats. {START}."
                )

    def _load(self, one: Connection, folder: Path) -> Answer[int]:
        fields = {"method": "opd_load", "kwargs": {"folder": str(folder.absolute())}}
        return one.post("collective_rpc", fields, loaded)


def _not_given(url: str, why: str | None) -> TrainingError:
    return TrainingError(
        f"The server {url} could not be given the student's weights: {why}. {START}; the same command then continues."
    )


def there(replicas: Replicas) -> set[str]:
    """The servers to update: all but those that the last update left out and that are still silent."""
    urls = {one.url for one in replicas.servers}
    if not replicas.left_out:
        return urls
    found = replicas.each(lambda one: one.get("v1/models", models_in), RECOGNISED_S, among=replicas.left_out)
    return urls - {url for url, answer in found.items() if answer.value is None}


def answered(
    found: Mapping[str, Answer[T]], *, first: bool, error: Callable[[str, str | None], TrainingError]
) -> dict[str, T]:
    """The values of the servers that took an update. At the `first` one all have to.

    Raises `error(address, why)` for a server that refuses, and if no server answers.
    """
    values = {url: answer.value for url, answer in found.items() if answer.value is not None}
    for url, answer in found.items():
        if answer.value is None and (not answer.lost or not values or first):
            raise error(url, answer.failure)
    return values


def silent(replicas: Replicas, values: Mapping[str, Any]) -> set[str]:
    """The servers that did not take an update, which are counted as lost."""
    urls = {one.url for one in replicas.servers} - values.keys()
    replicas.counts.add(servers_lost=len(urls))
    return urls


def leave_out(replicas: Replicas, urls: set[str]) -> None:
    """Send nothing to these servers until the next update; every process calls this."""
    replicas.left_out.clear()
    replicas.left_out.update(urls)


def remove_others(folder: Path, last: Path) -> None:
    """Remove the weights of older versions."""
    for old in folder.glob("version-*"):
        if old != last:
            shutil.rmtree(old, ignore_errors=True)


def trial_fields(model: str, prompt: Sequence[int], *, salt: str) -> dict[str, Any]:
    """A request for `DRAWN` tokens at a temperature that tells log-probs of draws from those before temperature."""
    params = {"max_tokens": DRAWN, "min_tokens": 0, "temperature": TEMPERATURE, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    params |= {"ignore_eos": True, "detokenize": False, "repetition_penalty": 1.0}
    return draw_fields(model, prompt, params, seed=0, salt=salt)


def loaded(raw: bytes) -> int:
    """The number of tensors that every worker has loaded. Raises BodyError, with a worker's reason."""
    results = member_of(raw, "results")
    for one in results:
        if not isinstance(one, dict) or "tensors" not in one:
            raise BodyError(str(one.get("error", one) if isinstance(one, dict) else one))
    return int(results[0]["tensors"])
