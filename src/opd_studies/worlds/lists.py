"""Lists of ids to copy into a strict format, a reward that parses it, and a teacher beyond the teacher; for studies."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd.data.toy import Part, sorting
from opd.models.head import Head
from opd.models.language_model import LanguageModel
from opd.models.loading import load_model
from opd.recipe.schema import ModelSpec
from opd.teachers.local import LocalTeacher
from opd.types import Prompt, Rollout, ScoreRequest, Scores, Teacher

IDS = 5  # of a list


def lists(count: int, seed: int = 0, part: Part = "train", sloppy: float = 0.0) -> Iterator[dict[str, Any]]:
    """{"prompt": "58142>", "response": "[5,8,1,4,2]"}: rows of `opd.data.toy.sorting` to copy, not to sort.

    A share `sloppy` of the separators, drawn by row, is a semicolon, which does not parse.
    """
    rng = torch.Generator().manual_seed(seed)
    for row in sorting(count, digits=IDS, seed=seed, part=part):
        ids = row["prompt"].rstrip(">")
        drawn = torch.rand(IDS - 1, generator=rng).tolist()
        marks = [";" if one < sloppy else "," for one in drawn]
        text = ids[0] + "".join(mark + one for mark, one in zip(marks, ids[1:], strict=True))
        yield {"prompt": row["prompt"], "response": f"[{text}]", "answer": f"[{','.join(ids)}]"}


def parses(prompt: Prompt, response: str) -> float:
    """1 for a JSON list of `IDS` digits, whatever they are."""
    if not re.fullmatch(r"\[[0-9](,[0-9])*\]", response):
        return 0.0
    return float(len(json.loads(response)) == IDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Beyond(Teacher):
    """q^lambda b^(1 - lambda) / Z as one teacher: its logits are lambda z_q + (1 - lambda) z_b, of one wide layer.

    For a full support: it gives hidden states, and no log-probs.
    """

    teachers: Sequence[LocalTeacher]  # q and b
    factors: Sequence[float]

    def score(self, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], request: ScoreRequest) -> list[Scores]:
        """Scores with the hidden states of both models, side by side, each times its factor."""
        one, other = (each.score(rollouts, contexts, replace(request, sampled=False)) for each in self.teachers)
        return [replace(q, teacher_hidden=self._side_by_side(q, b)) for q, b in zip(one, other, strict=True)]

    def _side_by_side(self, *scores: Scores) -> Tensor:
        states = [one.teacher_hidden for one in scores]
        return torch.cat([f * h for f, h in zip(self.factors, states, strict=True) if h is not None], 1)

    def head(self, teacher_id: str | None = None) -> Head:
        """The output layers of both models, side by side."""
        heads = [one.head() for one in self.teachers]
        return replace(heads[0], weight=torch.cat([head.weight for head in heads], 1))


def beyond(student: LanguageModel, teacher: str, base: str, strength: float) -> Beyond:
    """A recipe's `scorer`: the target of extrapolation from the folders of teacher and base."""
    lms = [
        load_model(ModelSpec(path=path), name=name, folder=None, seed=0, trains=False)
        for name, path in (("teacher", teacher), ("base", base))
    ]
    local = [LocalTeacher(lm=lm, micro_batch_tokens=4096, student_device=student.device) for lm in lms]
    return Beyond(teachers=local, factors=(strength, 1.0 - strength))
