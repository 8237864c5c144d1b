"""One writer for each task: how long a response may be, and whose it is, depends on the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opd.types import NOTHING_MORE, Look, Prompt, Record, Rollout, Sampler


@dataclass(frozen=True, slots=True, kw_only=True)
class ByTask:
    """A `Sampler` that hands each prompt to the writer of its task, and returns the responses in the prompts' order."""

    writers: Mapping[str | None, Sampler]

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: tuple[int, int],
        record: Record = NOTHING_MORE,
        look: Look | None = None,
    ) -> list[Rollout]:
        """Every response is what its task's writer makes of its prompt alone, whatever else is asked for with it."""
        places: dict[str | None, list[int]] = {}
        for i, prompt in enumerate(prompts):
            places.setdefault(prompt.task, []).append(i)
        found: dict[int, list[Rollout]] = {}
        for task, indices in places.items():
            written = self.writers[task]([prompts[i] for i in indices], seed=seed, record=record, look=look)
            each = len(written) // len(indices)
            assert each * len(indices) == len(written), f"{len(written)} responses to {len(indices)} prompts"
            found |= {at: written[k * each : (k + 1) * each] for k, at in enumerate(indices)}
        return [rollout for i in range(len(prompts)) for rollout in found[i]]


def by_task(writers: Mapping[str | None, Sampler]) -> Sampler:
    """The writers of a stage's tasks as one; the only one of a stage without tasks as it is."""
    return writers[None] if None in writers else ByTask(writers=writers)
