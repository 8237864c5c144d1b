"""A method: one piece for each part of the pipeline, in its order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from opd.errors import ConfigError
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


# Divided by less, float32 logits overflow; divided by more, they are equal to rounding.
TEMPERATURES = (1e-6, 1e6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """The choices of a paper. Uses no device, process group or file.

    The defaults are plain on-policy distillation, so a method states only its changes. A piece is a function;
    `opd.pieces.needs.needing` adds the needs that it declares.
    """

    source: Source = on_policy()  # the writer of the responses
    filter: Filter = everything()  # the responses and tokens that are trained
    context: Context = same_prompt()  # the prompts that the teacher reads
    teacher: TeacherRule = external()  # the model that the student is compared with
    support: Support = sampled()  # the tokens that are scored
    credit: Credit = no_credit()  # phase A: Batch -> advantage [B, T]
    weight: Weight = every_token()  # phase A: Batch -> weight [B, T], >= 0
    signal: Signal  # phase B: Tokens -> loss [N]; gradient through student_* only
    normalise: Normalise = per("sequence")  # the denominator, counted after generation
    update: Update = optimizer_step()  # what the step does with the gradient
    memory: Mapping[str, MakeMemory] = field(default_factory=dict[str, MakeMemory])  # makers of the pieces' memory
    temperature: float = 1.0  # divides the logits of student and teacher before they are compared

    def __post_init__(self) -> None:
        """Raises ConfigError for a temperature by which logits cannot be divided."""
        least, most = TEMPERATURES
        if not least <= self.temperature <= most:
            raise ConfigError(
                f"The method's `temperature` is {self.temperature}. It divides the logits of student and teacher: give "
                f"a number from {least:g} to {most:g}; 1 leaves the logits as they are."
            )

    @property
    def needs(self) -> Needs:
        """The needs of all pieces; `opd.runs.fit.check_needs` compares them with a recipe."""
        declared = needs_of(*(getattr(self, name) for name in PIECES), *self.memory.values())
        return declared | Needs(inputs=frozenset({Input.TEACHER_MODEL} if self.teacher.kind == "external" else ()))

    def reads(self, number: Reads) -> bool:
        """Whether phase A reads a costly number of the batch; see `needs.Needs.reads`."""
        return needs_of(*self.memory.values(), self.credit, self.weight, self.normalise).reads(number)

    @property
    def top_k(self) -> int:
        """The number of each model's most likely tokens that the pieces need, besides the support."""
        return self.needs.top_k

    def record(self) -> Record:
        """The values that the writer of a response must record for each token."""
        return Record(top_k=max(self.support.student_top_k, self.top_k), entropy=self.reads(Reads.STUDENT_ENTROPY))

    def request(self, *, shown: bool = False) -> ScoreRequest:
        """The teacher's request of a step; `shown` adds the sampled tokens' log-probs, for the file of samples."""
        return ScoreRequest(
            support=self.support,
            temperature=self.temperature,
            sampled=shown or self.reads(Reads.TEACHER_LOGP),
            entropy=self.reads(Reads.TEACHER_ENTROPY),
            top_k=self.top_k,
            base=Reads.BASE_LOGP in self.needs,
        )

    def make_memory(self) -> dict[str, Memory]:
        """The memory of a new run. The stage keeps it.

        The pieces find it under the same names in `Batch.memory`, `Writers.memory` and `Optimisation.memory`.
        """
        return {name: make() for name, make in self.memory.items()}

    def with_tokenizer(self, tokenizer: Any) -> Method:
        """The method with the student's tokenizer given to the pieces that need it (`needs.needing_tokenizer`).

        Raises ConfigError for tokens that the tokenizer does not know.
        """
        pieces: dict[str, Any] = {name: with_tokenizer(getattr(self, name), tokenizer) for name in PIECES}
        return replace(self, **pieces)
