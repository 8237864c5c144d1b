"""What a piece of a method declares: what it reads, what the recipe has to give, and what it does to the student.

    def hardest(share: float) -> Weight:
        def weight(batch: Batch) -> Tensor: ...
        return needing(weight, Reads.TEACHER_ENTROPY)

`Method.needs` is the union over its pieces. `opd check` compares it with the recipe (`opd.run.fit`) and with itself
(`opd.methods.coherence`); the numbers of a batch that no piece declares are not made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from functools import reduce
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar

from opd.errors import ConfigError, nearest

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class Input(StrEnum):
    """What a recipe has to give, beside columns of the data."""

    REWARD = "reward"  # reads rewards
    GROUP = "group"  # compares several responses to a prompt
    JUDGE = "judge"  # reads rewards of a judge
    TEACHER = "teacher"  # asks the teacher, another model or the student itself: the method has one
    TEACHER_MODEL = "teacher_model"  # asks another model than the student
    WEIGHT_COPY = "weight_copy"  # remembers a copy of the weights, for which every checkpoint has space


class Reads(StrEnum):
    """Numbers of a Batch. The first three cost something, and are made where a piece of phase A declares them."""

    TEACHER_LOGP = "teacher_logp"
    TEACHER_ENTROPY = "teacher_entropy"
    STUDENT_ENTROPY = "student_entropy"
    POLICY_LOGP = "policy_logp"  # the student's own, as it wrote: no OFF_POLICY source
    SAMPLER_LOGP = "sampler_logp"  # the student's own, as it was drawn from: no OFF_POLICY source


class Trait(StrEnum):
    """What a piece does, as far as it decides which other pieces and which sampling may stand beside it."""

    OFF_POLICY = "off_policy"  # a source that is not the student
    SCORES_UNFINISHED = "scores_unfinished"  # a source: the teacher scores what is still being written
    FILTERS = "filters"  # may leave out all responses of a step, which is then skipped and counted
    READS_ATTEMPT = "reads_attempt"  # a context: the teacher reads the response that it scores
    LOOKS_AT_SAMPLED_TOKEN = "looks_at_sampled_token"  # a weight or filter that depends on the token that was drawn
    WEIGHS_BY_TRUST = "weighs_by_trust"  # a weight: how far to trust the teacher. It may not weigh a reward
    MINIMISES_DIVERGENCE = "minimises_divergence"  # draws the student towards its teacher
    MAXIMISES_DIVERGENCE = "maximises_divergence"  # drives the student away from its teacher
    ALLOWS_SIGN_CONFLICT = "allows_sign_conflict"  # towards the teacher and away from it at once is meant
    POLICY_GRADIENT = "policy_gradient"  # responses have to be drawn at the temperature at which they are scored
    UNBIASED_BASELINE = "unbiased_baseline"  # responses have to be drawn from the student's whole distribution
    SAMPLED_TOKEN_LAST = "sampled_token_last"  # takes the last column of the support for the sampled token


Need: TypeAlias = Input | Reads | Trait


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What one piece declares, or several together (`|`): sets unite, and of numbers the larger one counts."""

    columns: frozenset[str] = frozenset()  # of the data: answer, response, privileged_context
    inputs: frozenset[Input] = frozenset()
    batch: frozenset[Reads] = frozenset()
    traits: frozenset[Trait] = frozenset()
    top_k: int = 0  # how many of each model's most likely tokens at every position
    response_tokens: int = 0  # how long a response has to be allowed to get
    first_look: int = 0  # after how many tokens an unfinished response is looked at first
    student_writes: bool = False  # of an OFF_POLICY source: it also draws from the student
    undeclared: bool = False  # a part of it is a bare function, which declares nothing

    def __or__(self, other: Needs) -> Needs:
        both = [(one.name, getattr(self, one.name), getattr(other, one.name)) for one in fields(Needs)]
        return Needs(**{name: a | b if isinstance(a, frozenset | bool) else max(a, b) for name, a, b in both})

    def __contains__(self, need: Need) -> bool:
        return need in self.inputs or need in self.batch or need in self.traits

    def reads(self, number: Reads) -> bool:
        """Whether a piece of phase A gets a number that costs something. A bare function gets TEACHER_LOGP."""
        return number in self.batch or (self.undeclared and number == Reads.TEACHER_LOGP)

    def turned(self) -> Needs:
        """Of the piece times a negative number: it pulls the other way."""
        sides = (Trait.MINIMISES_DIVERGENCE, Trait.MAXIMISES_DIVERGENCE)
        other = dict(zip(sides, reversed(sides), strict=True))
        return replace(self, traits=frozenset(other.get(trait, trait) for trait in self.traits))


@dataclass(frozen=True, slots=True)
class Piece(Generic[P, R]):
    """A function with what it declares. It is called like the function; `needing` makes it."""

    call: Callable[P, R]
    needs: Needs = field(default_factory=Needs)
    # The student's tokenizer -> the piece that can be called; None: this one can.
    with_tokenizer: Callable[[Any], Callable[P, R]] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.call(*args, **kwargs)


def needing(
    function: Callable[P, R],
    *needs: Need,
    columns: Collection[str] = (),
    top_k: int = 0,
    response_tokens: int = 0,
    first_look: int = 0,
    student_writes: bool = False,
) -> Piece[P, R]:
    """The function as a piece that declares `needs`, `columns` of the data, and numbers: see `Needs`.

    Without any it declares that it reads none of the numbers that cost something; a bare function of phase A (a credit,
    a weight, a normalisation, a maker of memory) is taken to read TEACHER_LOGP. Raises ConfigError for a need that is
    no member; the text of a member stands for it.
    """
    members = [_member(need) for need in needs]
    found = Needs(
        columns=frozenset(columns),
        inputs=frozenset(one for one in members if isinstance(one, Input)),
        batch=frozenset(one for one in members if isinstance(one, Reads)),
        traits=frozenset(one for one in members if isinstance(one, Trait)),
        top_k=top_k,
        response_tokens=response_tokens,
        first_look=first_look,
        student_writes=student_writes,
    )
    return Piece(function, found)


def needing_tokenizer(name: str, make: Callable[[Any], Callable[P, R]], *needs: Need) -> Piece[P, R]:
    """A piece that is made when the student's tokenizer is there: `make(tokenizer)` is what is called then.

    `name` is for the ConfigError of a call before that. A stage and `opd check` call `Method.with_tokenizer`.
    """

    def too_early(*_: P.args, **__: P.kwargs) -> R:
        raise ConfigError(
            f"{name} asks for the student's tokenizer and was called without one. Give it one first: "
            "method.with_tokenizer(tokenizer); a stage does that by itself."
        )

    return replace(needing(too_early, *needs), with_tokenizer=make)


def with_tokenizer(piece: Callable[P, R], tokenizer: Any) -> Callable[P, R]:
    """The piece with the tokenizer, if it asks for one; else itself. Raises what its `make` raises."""
    if not isinstance(piece, Piece) or piece.with_tokenizer is None:
        return piece
    return piece.with_tokenizer(tokenizer)


def needs_of(*pieces: Callable[..., Any]) -> Needs:
    """Everything that the pieces declare."""
    undeclared = Needs(undeclared=True)
    return reduce(Needs.__or__, (one.needs if isinstance(one, Piece) else undeclared for one in pieces), Needs())


def columns_of(*rewards: Any) -> frozenset[str]:
    """The columns of the data that rewards read: of a function as a piece declares them, of an object its `needs`."""
    said = (one.needs.columns if isinstance(one, Piece) else getattr(one, "needs", ()) for one in rewards)
    return frozenset[str]().union(*said)


def _member(need: Need) -> Need:
    members: dict[str, Need] = {one.value: one for kind in (Input, Reads, Trait) for one in kind}
    if need not in members:
        raise ConfigError(
            f"A piece declares {str(need)!r}, which is no member of Input, Reads or Trait (opd.pieces.needs)."
            f"{nearest(str(need), members)} Columns of the data are given by name: needing(piece, columns=[...])."
        )
    return members[need]
