"""Teachers that write for a source: with any context, several times, several of them; and a file of their texts."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opd.errors import RunError
from opd.files import append_row, read_rows, refused, write_atomically
from opd.models.language_model import LanguageModel
from opd.models.render import render
from opd.pieces.sources import in_order
from opd.samplers.hf import TransformersSampler
from opd.samplers.writers import for_student
from opd.types import Author, Prompt, Rollout, Sampling


@dataclass(slots=True)
class TextCache:
    """The texts of a stage's authors in `folder`: one JSON Lines file per process, one line per call.

    A process reads the files of all and appends to its own. A resumed run repeats the steps after its last checkpoint;
    a call that is in a file is read from it, token for token. A kill leaves at most one partial last line, which is
    removed. Files are never shortened otherwise: they are the transcript of the stage. Raises RunError if a file cannot
    be read or written, or a line of it is damaged.
    """

    folder: Path
    rank: int = 0
    known: dict[str, list[dict[str, Any]]] | None = None  # responses by key, until they are taken; None: not yet read

    @property
    def file(self) -> Path:
        """The file that this process writes."""
        return self.folder / f"texts-{self.rank}.jsonl"

    def take(self, key: str) -> list[dict[str, Any]] | None:
        """The responses of a call, once, because a run repeats no call; None if there are none."""
        if self.known is None:
            self.known = self._read()
        return self.known.pop(key, None)

    def _read(self) -> dict[str, list[dict[str, Any]]]:
        known: dict[str, list[dict[str, Any]]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise refused(self.folder, error) from error
        for file in sorted(self.folder.glob("texts-*.jsonl")):
            rows = read_rows(file)
            try:
                known |= {row["key"]: list(row["responses"]) for _, row in rows}
            except (KeyError, TypeError) as error:
                raise RunError(f"{file} holds a line that is not a text ({error!r}). Remove it to continue.") from error
            if file == self.file:
                write_atomically(file, b"".join(line for line, _ in rows))
        return known

    def add(self, key: str, responses: Sequence[Mapping[str, Any]], **about: Any) -> None:
        """Append the responses of a call; `about` is for readers of the file."""
        append_row(self.file, {"key": key, **about, "responses": list(responses)}, "a teacher's texts")


@dataclass(slots=True, kw_only=True)
class TeacherAuthor(Author):
    """A model that writes whatever a source shows it; a `types.Author`.

    Its random numbers differ from those of the student and of every author with another `name`. `sampling` is by task;
    under None it is that of all tasks. The weights do not change during a stage, so a text in the cache is the text
    that the model would write again; other weights have another fingerprint and write new texts.
    """

    name: str
    teacher: LanguageModel
    student: LanguageModel
    sampling: Mapping[str | None, Sampling]
    max_prompt_length: int | None = None  # of the prompt that the student reads
    cache: TextCache | None = None
    weights: str = ""  # the fingerprint of the teacher, computed at the first call with a cache

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: tuple[int, int],
        contexts: Sequence[Prompt] | None = None,
        n: int = 1,
        first: int = 0,
        sampling: Sampling | None = None,
    ) -> list[Rollout]:
        """As `types.Author`. Raises DataError for a context or a prompt that is too long for its model."""
        shown = prompts if contexts is None else contexts
        assert len(shown) == len(prompts), f"{len(shown)} contexts of {len(prompts)} prompts"

        def of_task(task: str | None, own: list[int]) -> list[Rollout]:
            """The responses to the prompts of one task at these places."""
            settings = replace(sampling or self.sampling[task], n=n)
            return self._of_task([prompts[i] for i in own], [shown[i] for i in own], seed, first, settings)

        return in_order([None if None in self.sampling else prompt.task for prompt in prompts], of_task)

    def _of_task(
        self,
        prompts: Sequence[Prompt],
        contexts: Sequence[Prompt],
        seed: tuple[int, int],
        first: int,
        sampling: Sampling,
    ) -> list[Rollout]:
        read = [render(context, self.teacher.tokenizer, self.teacher.template_options) for context in contexts]
        key = "" if self.cache is None else self._key([prompt.id for prompt in prompts], read, seed, first, sampling)
        saved = None if self.cache is None else self.cache.take(key)
        if saved is None:
            # The id of the prompt, not of its context, so that random numbers belong to the prompt.
            shown = [replace(context, id=prompt.id) for prompt, context in zip(prompts, contexts, strict=True)]
            sampler = TransformersSampler(
                lm=self.teacher, sampling=sampling, limited_by="the teacher's max_completion_length", first_sample=first
            )
            written = sampler(shown, seed=own_seed(seed, self.name))
            if self.cache is not None:
                self.cache.add(key, [_row(one) for one in written], author=self.name, step=seed[1])
        else:
            written = [_rollout(row, prompts[i // sampling.n], sampling) for i, row in enumerate(saved)]
        return for_student(self.student, self.teacher, prompts, written, self.max_prompt_length)

    def _key(self, ids: list[int], read: list[list[int]], seed: tuple[int, int], first: int, sampling: Sampling) -> str:
        """The hash of everything that determines the texts of a call."""
        self.weights = self.weights or fingerprint(self.teacher)
        parts = [self.name, self.weights, ids, read, seed, first, asdict(sampling)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(lm: LanguageModel) -> str:
    """A hash of the first numbers of every parameter: other weights of the same model have another one."""
    found = hashlib.sha256()
    for name, parameter in lm.model.named_parameters():
        first = parameter.detach().flatten()[:16].double().cpu().numpy()
        found.update(f"{name} {tuple(parameter.shape)}".encode() + first.tobytes())
    return found.hexdigest()


def own_seed(seed: tuple[int, int], name: str) -> tuple[int, int]:
    """The seed (seed of the run, step) for the writer `name` alone: two numbers of 64 bits."""
    first, second = np.random.SeedSequence((*seed, zlib.crc32(name.encode()))).generate_state(2, np.uint64).tolist()
    return int(first), int(second)


def _row(rollout: Rollout) -> dict[str, Any]:
    return {
        "prompt_id": rollout.prompt.id,
        "sample": rollout.sample,
        "text": rollout.text,
        "finished": rollout.finished,
        "ids": rollout.response_ids.tolist(),
    }


def _rollout(row: Mapping[str, Any], prompt: Prompt, sampling: Sampling) -> Rollout:
    ids = list(row["ids"])
    return Rollout(
        prompt=prompt,
        sample=row["sample"],
        prompt_ids=(),
        response_ids=torch.tensor(ids, dtype=torch.long),
        trained=torch.ones(len(ids), dtype=torch.bool),
        turn=torch.zeros(len(ids), dtype=torch.long),
        finished=row["finished"],
        text=row["text"],
        sampling=sampling,
    )
