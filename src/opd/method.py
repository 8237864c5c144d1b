"""The value that a paper decides: a choice for each part of the pipeline, in its order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from opd.pieces.contexts import same_prompt
from opd.pieces.credit import no_credit
from opd.pieces.filters import everything
from opd.pieces.memory import nothing
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
    Normalise,
    Observe,
    Record,
    ScoreRequest,
    Signal,
    Source,
    State,
    Support,
    TeacherRule,
    Update,
    Weight,
)

PIECES = ("source", "keep", "context", "observe", "credit", "weight", "signal", "normalise", "update")


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
    observe: Observe = nothing()  # what the method's state learns from the step, of all processes, before it is used
    credit: Credit = no_credit()  # phase A: Batch -> advantage [B, T]
    weight: Weight = every_token()  # phase A: Batch -> weight [B, T], >= 0
    signal: Signal  # phase B: Tokens -> loss [N]; gradient through student_* only
    normalise: Normalise = per_sequence()  # the one denominator, counted after generation
    update: Update = optimizer_step()  # what follows the gradient
    state: Mapping[str, State] = field(default_factory=dict[str, State])  # what the pieces remember, by name
    temperature: float = 1.0  # divides the logits of student and teacher before they are compared

    def reads(self, name: str) -> bool:
        """Whether phase A reads a number of the batch that costs something to make; see `needs.needing`."""
        return any(reads(piece, name) for piece in (self.observe, self.credit, self.weight, self.normalise))

    @property
    def top_k(self) -> int:
        """How many of each model's most likely tokens the pieces ask for, whatever the support is."""
        pieces = (self.source, self.observe, self.credit, self.weight, self.normalise)
        return numbers_of(*pieces).get("top_k", 0)

    def record(self) -> Record:
        """What the writer of a response has to keep about each token."""
        return Record(top_k=max(self.support.student_top_k, self.top_k), entropy=self.reads("student_entropy"))

    def request(self, *, shown: bool = False) -> ScoreRequest:
        """What the teacher computes in a step; `shown` adds the sampled tokens' log-probs for a file of samples."""
        return ScoreRequest(
            support=self.support,
            temperature=self.temperature,
            sampled=shown or self.reads("teacher_logp"),
            entropy=self.reads("teacher_entropy"),
            top_k=self.top_k,
        )

    def needs(self) -> frozenset[str]:
        """What the pieces declare; `opd.runs.fit.check_needs` says what each means for a recipe."""
        pieces = (getattr(self, name) for name in PIECES)
        return needs_of(*pieces) | frozenset({"teacher_model"} if self.teacher.kind == "external" else ())

    def bound(self, tokenizer: Any) -> Method:
        """The method with the student's tokenizer handed to the pieces that ask for it (`opd.pieces.needs`).

        Raises ConfigError for what the tokenizer does not know.
        """
        pieces: dict[str, Any] = {name: bound(getattr(self, name), tokenizer) for name in PIECES}
        return replace(self, **pieces)
