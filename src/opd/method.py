"""The value that a paper decides: a choice for each part of the pipeline, in its order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from opd.pieces.contexts import same_prompt
from opd.pieces.credit import no_credit
from opd.pieces.filters import everything
from opd.pieces.needs import bound, needs_of, numbers_of, reads
from opd.pieces.normalise import per_sequence
from opd.pieces.sources import on_policy
from opd.pieces.supports import sampled
from opd.pieces.teacher_rules import external
from opd.pieces.updates import optimizer_step
from opd.pieces.weights import every_token
from opd.types import (
    Context,
    Credit,
    Keep,
    MakeMemory,
    Memory,
    Normalise,
    Record,
    Signal,
    Source,
    Support,
    TeacherRule,
    Update,
    Weight,
)

PIECES = ("source", "keep", "context", "credit", "weight", "signal", "normalise", "update")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What a paper decides. Touches no device, no process group, no file.

    The defaults are plain on-policy distillation, so that a method states what it changes.
    """

    source: Source = on_policy()  # who writes the responses
    keep: Keep = everything()  # which of the responses, and of their tokens, are trained
    context: Context = same_prompt()  # what the teacher reads
    teacher: TeacherRule = external()  # whose distribution the student is compared with
    support: Support = sampled()  # which tokens are scored
    credit: Credit = no_credit()  # phase A: Batch -> advantage [B, T]
    weight: Weight = every_token()  # phase A: Batch -> weight [B, T], >= 0
    signal: Signal  # phase B: Tokens -> loss [N]; gradient through student_* only
    normalise: Normalise = per_sequence()  # the one denominator, counted after generation
    update: Update = optimizer_step()  # what follows the gradient
    memory: Mapping[str, MakeMemory] = field(default_factory=dict[str, MakeMemory])  # makers of what pieces remember
    temperature: float = 1.0  # divides the logits of student and teacher before they are compared

    def reads(self, name: str) -> bool:
        """Whether phase A reads a number of the batch that costs something to make; see `needs.needing`."""
        return any(reads(piece, name) for piece in (*self.memory.values(), self.credit, self.weight, self.normalise))

    @property
    def top_k(self) -> int:
        """How many of each model's most likely tokens the pieces ask for, whatever the support is."""
        pieces = (self.source, *self.memory.values(), self.credit, self.weight, self.normalise)
        return numbers_of(*pieces).get("top_k", 0)

    def record(self) -> Record:
        """What the writer of a response has to keep about each token."""
        return Record(top_k=max(self.support.student_top_k, self.top_k), entropy=self.reads("student_entropy"))

    def needs(self) -> frozenset[str]:
        """What the pieces declare; `opd.run.fit.check_needs` says what each means for a recipe."""
        declared = needs_of(*(getattr(self, name) for name in PIECES), *self.memory.values())
        return declared | frozenset({"teacher_model"} if self.teacher.kind == "external" else ())

    def make_memory(self) -> dict[str, Memory]:
        """What the pieces remember in a run, as it is before the first step; a stage keeps it and hands it to them.

        It stands in `Batch.memory`, `Writers.memory` and `Optimisation.memory`, by the names that it has here.
        """
        return {name: make() for name, make in self.memory.items()}

    def bound(self, tokenizer: Any) -> Method:
        """The method with the student's tokenizer handed to the pieces that ask for it (`opd.pieces.needs`).

        Raises ConfigError for what the tokenizer does not know.
        """
        pieces: dict[str, Any] = {name: bound(getattr(self, name), tokenizer) for name in PIECES}
        return replace(self, **pieces)
