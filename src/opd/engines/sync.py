"""New weights for vLLM's servers, and the proof that they serve them.

After every update a fixed sequence is scored by the servers and by the trainer. Updates that return without an error
have left an old output layer, half of the weights, or weights of neither model (vLLM 0.32). Checksums do not see it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opd.engines.capabilities import control_ids
from opd.engines.replicas import Replicas
from opd.engines.server import Answer, BodyError, Connection
from opd.engines.vllm import completion_fields, draw_fields, member_of, parse_drawn, parse_top
from opd.errors import TrainingError

DRAWN = 16  # tokens that show which log-probs a server gives

START = (
    "Start it with VLLM_SERVER_DEV_MODE=1, `--worker-extension-cls opd.engines.worker.WeightLoader`, "
    "`--enable-scale-out` and `--logprobs-mode processed_logprobs`, in an environment that has this library"
)


@dataclass(slots=True, kw_only=True)
class Sync:
    """Sends weights by a folder that trainer and servers share.

    `write` writes the student's whole weights as safetensors to a folder; `logp(ids, temperature)` are its log-probs of
    the tokens after the first. `tolerance`: the largest difference of a log-prob, in nats.
    """

    replicas: Replicas
    model: str
    folder: Path
    write: Callable[[Path], None]
    logp: Callable[[Sequence[int], float], np.ndarray]
    vocabulary: int
    tolerance: float
    sleeps: bool = False  # the servers give up weights and cache while nothing is drawn
    asleep: Path | None = None  # the folder of the weights that sleeping servers load again
    error: float = 0.0  # of the last proof: the largest difference of a log-prob, in nats
    before: np.ndarray | None = None  # the student's log-probs at the last update

    def __call__(self, version: int) -> None:
        """Write, load, name and prove version `version`.

        Raises:
            TrainingError: a server refuses the weights, or scores with others than the trainer's.
        """
        folder = self.folder / f"version-{version}"
        self.write(folder)
        self._load(folder)
        self._call("update_weight_version", {"new_version": str(version)}, lambda raw: True)
        if self.before is None:
            self._check_mode()
        self.prove(version)
        for old in self.folder.glob("version-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)

    def prove(self, version: int) -> None:
        """Compare the servers' scores of a fixed sequence with the student's. Raises TrainingError."""
        ids = control_ids(self.vocabulary)
        own = self.logp(ids, 1.0)
        fields = completion_fields(self.model, ids, 0)
        scored = self._each(lambda one: one.post("v1/completions", fields, parse_top(ids, 1, 0)))
        self.error = max(float(np.abs(one.logp - own).max()) for one in scored.values())
        for url, one in scored.items():
            apart = float(np.abs(one.logp - own).max())
            if apart > self.tolerance:
                stale = self.before is not None and float(np.abs(one.logp - self.before).max()) < self.tolerance
                raise TrainingError(
                    f"The server {url} does not serve the student's weights of step {version}: the log-probs of a "
                    f"fixed sequence differ by up to {apart:.3g} nats, and {self.tolerance:g} are allowed "
                    "(`tolerance`). "
                    + ("They are those of the step before: the update had no effect. " if stale else "")
                    + f"{START}; in another precision than the student's, raise `tolerance`."
                )
        self.before = own

    def _check_mode(self) -> None:
        """Refuse servers whose log-probs are not of the distribution that they draw from. Raises TrainingError."""
        prompt = control_ids(self.vocabulary)[:8]
        params = {"max_tokens": DRAWN, "min_tokens": 0, "temperature": 2.0, "ignore_eos": True, "detokenize": False}
        fields = draw_fields(self.model, prompt, params, seed=0, salt="opd-mode")
        for url, drawn in self._each(lambda one: one.post("inference/v1/generate", fields, parse_drawn)).items():
            own = self.logp([*prompt, *drawn.ids], 2.0)[len(prompt) - 1 :]
            apart = float(np.abs(own - drawn.logp).max())
            if apart > self.tolerance:
                raise TrainingError(
                    f"The server {url} gives other log-probs than those of the distribution that it draws from: at "
                    f"temperature 2 they differ from the student's by up to {apart:.3g} nats. {START}."
                )

    def sleep(self, version: int) -> None:
        """Let the servers give up weights and cache. Raises TrainingError for one that does not answer.

        At level 2: at level 1 they keep a copy of the weights, which the next update replaces anyway, in the memory of
        the host.
        """
        if self.sleeps:
            self._call("sleep?level=2", {}, lambda raw: True)
            self.asleep = self.folder / f"version-{version}"

    def wake(self) -> None:
        """Give sleeping servers the weights that they had. Raises TrainingError."""
        if self.asleep is not None:
            self._load(self.asleep)

    def _load(self, folder: Path) -> None:
        """Sleeping servers get memory for the weights, then the weights, then the rest, and only then draw again."""
        fields = {"method": "opd_load", "kwargs": {"folder": str(folder.absolute())}}
        if self.sleeps:
            self._call("wake_up?tags=weights", {}, lambda raw: True)
        self._call("collective_rpc", fields, loaded)
        if self.sleeps:
            self._call("wake_up", {}, lambda raw: True)
        self.asleep = None

    def _call(self, path: str, fields: dict[str, Any], read: Callable[[bytes], Any]) -> None:
        self._each(lambda one: one.post(path, fields, read))

    def _each(self, send: Callable[[Connection], Answer[Any]]) -> dict[str, Any]:
        found = self.replicas.each(send)
        for url, answer in found.items():
            if answer.value is None:
                raise TrainingError(
                    f"The server {url} could not be given the student's weights: {answer.failure}. {START}."
                )
        return {url: answer.value for url, answer in found.items()}


def loaded(raw: bytes) -> int:
    """The number of tensors that every worker has loaded. Raises BodyError, with a worker's reason."""
    results = member_of(raw, "results")
    for one in results:
        if not isinstance(one, dict) or "tensors" not in one:
            raise BodyError(str(one.get("error", one) if isinstance(one, dict) else one))
    return int(results[0]["tensors"])
