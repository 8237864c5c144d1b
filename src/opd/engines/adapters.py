"""A LoRA adapter for vLLM's servers, under a new name after every update, and the proof that they serve it.

The servers hold the base model and get the adapter's tensors alone. A name is never used again: vLLM keeps the cache of
an adapter that is loaded anew under its name (0.32). The proof draws tokens and scores none: on a CPU a server that
takes adapters does not score given tokens reliably.

vLLM stamps every token with the version of the base weights, whatever the adapter. So an adapter's tokens are known by
its name, which a server without that adapter refuses, and the stamp has to stay what it was at the start.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from opd.engines.capabilities import control_ids
from opd.engines.replicas import Replicas
from opd.engines.server import Answer, Connection, in_turn
from opd.engines.sync import DRAWN, TEMPERATURE
from opd.engines.update import remove_others, updated
from opd.engines.vllm import Drawn, draw_fields, parse_drawn, sampling_fields
from opd.errors import NotFiniteError, TrainingError
from opd.parallel import ALONE, World
from opd.types import Sampling


@dataclass(slots=True, kw_only=True)
class AdapterSync:
    """Sends the student's adapter by a folder that trainer and servers share. Every process makes the same calls.

    `write` gathers the adapter's tensors and writes them in PEFT's format to a folder; `logp(ids, temperature)` are the
    log-probs of the student with it. `rank`: the adapter's. `tolerance`: of a log-prob's difference, in nats.
    """

    replicas: Replicas
    model: str  # the servers' name of the base model
    folder: Path
    write: Callable[[Path], None]
    logp: Callable[[Sequence[int], float], np.ndarray]
    vocabulary: int
    tolerance: float
    rank: int
    world: World = ALONE
    error: float = 0.0  # in the main process, of the last proof: the largest difference of a log-prob, in nats
    serves: str = field(init=False)  # the name of the last adapter
    stamps: frozenset[str] = field(default=frozenset(), init=False)  # the versions of the base weights at the start

    def __post_init__(self) -> None:
        self.serves = self.model

    def __call__(self, version: int) -> None:
        """Write, load and prove version `version`; then unload the one before.

        Raises, in every process:
            NotFiniteError: a log-prob of the student is not finite.
            TrainingError: a server refuses the adapter, or draws with other weights than the trainer's.
        """
        if not np.isfinite(self.logp(self._prompt, 1.0)).all():
            raise NotFiniteError(f"The student's log-probs of a fixed sequence are not finite at step {version}.")
        folder = self.folder / f"version-{version}"
        self.write(folder)
        name, drawn = self.world.by_main(lambda: self._load(folder, version))
        self.replicas.leave_out([one.url for one in self.replicas.servers if one.url not in drawn])
        self._prove(version, drawn)
        if not self.stamps:
            self.stamps = frozenset(stamp for one in drawn.values() for stamp in one.versions)
        before, self.serves = self.serves, name
        self.world.by_main(lambda: self._forget(before, folder))

    def _load(self, folder: Path, version: int) -> tuple[str, dict[str, Drawn]]:
        """In the main process: the name of the loaded adapter, and what each server draws with it."""
        name = f"opd-{version}-{secrets.token_hex(4)}"
        fields = {"lora_name": name, "lora_path": str(folder.absolute())}
        params = sampling_fields(Sampling(temperature=TEMPERATURE), DRAWN, ())
        request = draw_fields(name, self._prompt, params, seed=0, salt=name)

        def update(one: Connection) -> Answer[Drawn]:
            return in_turn(
                lambda: _loaded(one.post("v1/load_lora_adapter", fields, lambda raw: True)),
                lambda: one.post("inference/v1/generate", request, parse_drawn),
            )

        return name, updated(self.replicas, update, first=not self.stamps, refused=self._not_given)

    def _prove(self, version: int, of_servers: Mapping[str, Drawn]) -> None:
        """Compare the log-probs of the drawn tokens with the student's. Raises TrainingError."""
        apart: dict[str, float] = {}
        for url, drawn in of_servers.items():
            own = self.logp([*self._prompt, *drawn.ids], TEMPERATURE)[len(self._prompt) - 1 :]
            apart[url] = float(np.abs(own - drawn.logp).max())
        if self.world.main:
            self.error = max(apart.values())
        for url, one in apart.items():
            if not one <= self.tolerance:
                raise TrainingError(
                    f"The server {url} does not draw with the student's adapter of step {version}: the log-probs of "
                    f"{DRAWN} tokens at temperature {TEMPERATURE:g} differ by up to {one:.3g} nats, and "
                    f"{self.tolerance:g} are allowed (`tolerance`). Does it serve the model that the student's adapter "
                    f"belongs to? {self._start}; in another precision than the student's, raise `tolerance`."
                )

    def _forget(self, before: str, folder: Path) -> None:
        """In the main process: unload the adapter before, and remove the folders of all but the last.

        A server that has been started again does not have it: 404.
        """
        if before != self.model:
            fields = {"lora_name": before}
            there = {one.url for one in self.replicas.servers} - self.replicas.left_out
            found = self.replicas.each(
                lambda one: one.post("v1/unload_lora_adapter", fields, lambda raw: True), among=there
            )
            for url, answer in found.items():  # a lost one shows when it has to draw
                if answer.value is None and not answer.lost and not str(answer.failure).startswith("HTTP 404"):
                    raise TrainingError(f"The server {url} could not unload the adapter {before}: {answer.failure}.")
        remove_others(folder)

    @property
    def _prompt(self) -> list[int]:
        return control_ids(self.vocabulary)[:8]

    @property
    def _start(self) -> str:
        return (
            "Start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, `--enable-lora`, `--max-lora-rank` of at least "
            f"{self.rank}, `--enable-scale-out` and `--logprobs-mode processed_logprobs`"
        )

    def _not_given(self, url: str, why: str | None) -> TrainingError:
        return TrainingError(
            f"The server {url} could not be given the student's adapter: {why}. {self._start}; the same command then "
            "continues."
        )


def _loaded(answer: Answer[bool]) -> Answer[bool]:
    """The answer to a load, which may be repeated because its answer was lost: the name is no other's."""
    again = answer.value is None and "has already been loaded" in str(answer.failure)
    return replace(answer, value=True, failure=None, transient=False) if again else answer
