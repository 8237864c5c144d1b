"""Rows of a model's own tasks, and rows on which another model of the stage teaches it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from opd.errors import ConfigError
from opd.pieces.needs import Input, needing
from opd.types import Prompt, Record, Rollout, Source, Writers

TAUGHT = "taught"  # the `Rollout.part` of responses to a peer's prompts


def own_and_peers(alone: int, together: int) -> Source:
    """The student's responses to its own prompts, and to those of its peers as rows of part `TAUGHT`.

    Steps go in cycles: `alone` steps without peers, then `together` steps with them. A prompt with a teacher is a
    peer's. Raises ConfigError for a cycle without a step with peers.
    """
    if alone < 0 or together < 1:
        raise ConfigError(
            f"A cycle has {alone} steps of each model alone and {together} in which peers teach. Set the first to 0 or "
            "more, and the second to 1 or more; without peers use method grpo and `topology: none`."
        )

    def source(prompts: Sequence[Prompt], writers: Writers, seed: tuple[int, int], record: Record) -> list[Rollout]:
        if seed[1] % (alone + together) < alone:
            prompts = [prompt for prompt in prompts if prompt.teacher_id is None]
        rollouts = writers.student(prompts, seed=seed, record=record)
        return [replace(r, part="" if r.prompt.teacher_id is None else TAUGHT) for r in rollouts]

    return needing(source, Input.PEERS)
