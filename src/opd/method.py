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
    parts: Mapping[str, Part] = field(default_factory=dict[str, "Part"])  # of rows with that `Rollout.part`

    def __post_init__(self) -> None:
        """Raises ConfigError for a temperature by which logits cannot be divided, and for a part that sets too much."""
        least, most = TEMPERATURES
        if not least <= self.temperature <= most:
            raise ConfigError(
                f"The method's `temperature` is {self.temperature}. It divides the logits of student and teacher: give "
                f"a number from {least:g} to {most:g}; 1 leaves the logits as they are."
            )
        for name, part in self.parts.items():
            part.check(name)

    @property
    def needs(self) -> Needs:
        """The needs of all pieces; `opd.runs.fit.check_needs` compares them with a recipe."""
        declared = needs_of(*(getattr(self, name) for name in PIECES), *self.memory.values())
        for part in self.parts.values():
            declared |= needs_of(part.method.credit, part.method.weight, part.method.signal, part.method.normalise)
        model = {"external": Input.TEACHER_MODEL, "peer": Input.PEERS}.get(self.teacher.kind)
        return declared | Needs(inputs=frozenset() if model is None else frozenset({model}))

    def reads(self, number: Reads) -> bool:
        """Whether phase A reads a costly number of the batch; see `needs.Needs.reads`."""
        return needs_of(*self.memory.values(), self.credit, self.weight, self.normalise).reads(number)

    @property
    def top_k(self) -> int:
        """The number of each model's most likely tokens that the pieces need, besides the support."""
        return self.needs.top_k

    def record(self) -> Record:
        """The values that the writer of a response must record for each token, whatever its part."""
        methods = (self, *(part.method for part in self.parts.values()))
        return Record(
            top_k=max(self.top_k, *(one.support.student_top_k for one in methods)),
            entropy=any(one.reads(Reads.STUDENT_ENTROPY) for one in methods),
        )

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
        parts = {name: replace(part, method=part.method.with_tokenizer(tokenizer)) for name, part in self.parts.items()}
        return replace(self, **pieces, parts=parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The pieces of the rows that a source marks with a `Rollout.part`: a second term, L + `factor` L_part.

    `method` gives support, credit, weight, signal, normalise and temperature; they see these rows alone, and the
    method's own see none of them. Each part has a denominator of its own, over all processes: a mean over its rows, so
    that the sum of the terms does not depend on how many rows a part has. The other fields are those of the whole
    method, because they act before rows have parts: context, teacher, source, update, memory. A part without a row in
    the whole step adds nothing.
    """

    method: Method
    factor: float = 1.0

    def check(self, name: str) -> None:
        """Raise ConfigError for a factor that is not above 0, and a field that the whole method decides."""
        if not 0.0 < self.factor < float("inf"):
            raise ConfigError(
                f"Part {name!r} of the method has the factor {self.factor}. Its loss is multiplied by it: give a "
                "number above 0, or leave the part out."
            )
        plain = Method(signal=self.method.signal)
        whole = ("source", "filter", "context", "teacher", "update", "memory", "parts")
        if wrong := [field for field in whole if getattr(self.method, field) != getattr(plain, field)]:
            raise ConfigError(
                f"Part {name!r} of the method sets {', '.join(wrong)}, which the whole method decides. Give it to the "
                "method, or leave it out."
            )
