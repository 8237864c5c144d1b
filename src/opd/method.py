"""The value that a paper decides: a choice for each part of the pipeline, in its order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from opd.pieces.contexts import same_prompt
from opd.pieces.credit import no_credit
from opd.pieces.filters import everything
from opd.pieces.needs import Input, Needs, Reads, needs_of, with_tokenizer
from opd.pieces.normalise import per
from opd.pieces.sources import on_policy
from opd.pieces.supports import sampled
from opd.pieces.teacher_rules import external
from opd.pieces.updates import optimizer_step
from opd.pieces.weights import every_token
from opd.types import (
    Context,
    Credit,
    Filter,
    MakeMemory,
    Memory,
    Normalise,
    Record,
    ScoreRequest,
    Signal,
    Source,
    Support,
    TeacherRule,
    Update,
    Weight,
)

PIECES = ("source", "filter", "context", "credit", "weight", "signal", "normalise", "update")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What a paper decides. Touches no device, no process group, no file.

    The defaults are plain on-policy distillation, so that a method states what it changes. A piece is a function;
    `opd.pieces.needs.needing` makes one that declares what it needs.
    """

    source: Source = on_policy()  # who writes the responses
    filter: Filter = everything()  # which of the responses, and of their tokens, are trained
    context: Context = same_prompt()  # what the teacher reads
    teacher: TeacherRule = external()  # whose distribution the student is compared with
    support: Support = sampled()  # which tokens are scored
    credit: Credit = no_credit()  # phase A: Batch -> advantage [B, T]
    weight: Weight = every_token()  # phase A: Batch -> weight [B, T], >= 0
    signal: Signal  # phase B: Tokens -> loss [N]; gradient through student_* only
    normalise: Normalise = per("sequence")  # the one denominator, counted after generation
    update: Update = optimizer_step()  # what follows the gradient
    memory: Mapping[str, MakeMemory] = field(default_factory=dict[str, MakeMemory])  # makers of what pieces remember
    temperature: float = 1.0  # divides the logits of student and teacher before they are compared

    @property
    def needs(self) -> Needs:
        """What the pieces declare, all together; `opd.run.fit.check_needs` says what each means for a recipe."""
        declared = needs_of(*(getattr(self, name) for name in PIECES), *self.memory.values())
        return declared | Needs(inputs=frozenset({Input.TEACHER_MODEL} if self.teacher.kind == "external" else ()))

    def reads(self, number: Reads) -> bool:
        """Whether phase A reads a number of the batch that costs something to make; see `needs.Needs.reads`."""
        return needs_of(*self.memory.values(), self.credit, self.weight, self.normalise).reads(number)

    @property
    def top_k(self) -> int:
        """How many of each model's most likely tokens the pieces ask for, whatever the support is."""
        return self.needs.top_k

    def record(self) -> Record:
        """What the writer of a response has to keep about each token."""
        return Record(top_k=max(self.support.student_top_k, self.top_k), entropy=self.reads(Reads.STUDENT_ENTROPY))

    def request(self, *, shown: bool = False) -> ScoreRequest:
        """What the teacher computes in a step; `shown` adds the sampled tokens' log-probs for a file of samples."""
        return ScoreRequest(
            support=self.support,
            temperature=self.temperature,
            sampled=shown or self.reads(Reads.TEACHER_LOGP),
            entropy=self.reads(Reads.TEACHER_ENTROPY),
            top_k=self.top_k,
        )

    def make_memory(self) -> dict[str, Memory]:
        """What the pieces remember in a run, as it is before the first step; a stage keeps it and hands it to them.

        It stands in `Batch.memory`, `Writers.memory` and `Optimisation.memory`, by the names that it has here.
        """
        return {name: make() for name, make in self.memory.items()}

    def with_tokenizer(self, tokenizer: Any) -> Method:
        """The method with the student's tokenizer handed to the pieces that ask for it (`needs.needing_tokenizer`).

        Raises ConfigError for what the tokenizer does not know.
        """
        pieces: dict[str, Any] = {name: with_tokenizer(getattr(self, name), tokenizer) for name in PIECES}
        return replace(self, **pieces)
