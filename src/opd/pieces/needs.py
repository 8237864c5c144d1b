"""The needs that a piece of a method declares: its inputs, the numbers it reads, and its effect on the student.

    def hardest(share: float) -> Weight:
        def weight(batch: Batch) -> Tensor: ...
        return needing(weight, Reads.TEACHER_ENTROPY)

`Method.needs` is the union over its pieces. `opd check` compares it with the recipe (`opd.runs.fit`) and checks that
the pieces fit together (`opd.methods.coherence`). Numbers of a batch that no piece declares are not computed.
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
    """Inputs that the recipe must provide, besides columns of the data."""

    REWARD = "reward"  # reads rewards
    GROUP = "group"  # compares several responses to a prompt
    JUDGE = "judge"  # reads rewards of a judge
    FEEDBACK = "feedback"  # reads a judge's texts about the responses
    TEACHER = "teacher"  # calls the teacher, which may be the student itself: the method needs a teacher
    TEACHER_MODEL = "teacher_model"  # calls a teacher that is another model than the student
    PEERS = "peers"  # calls other models that the stage trains
    WEIGHT_COPY = "weight_copy"  # keeps a copy of the weights, which every checkpoint must have space for


class Reads(StrEnum):
    """Numbers of a Batch. The first three are costly, and computed only if a piece of phase A declares them."""

    TEACHER_LOGP = "teacher_logp"
    TEACHER_ENTROPY = "teacher_entropy"
    STUDENT_ENTROPY = "student_entropy"
    POLICY_LOGP = "policy_logp"  # the student's, before truncation: no OFF_POLICY source
    SAMPLER_LOGP = "sampler_logp"  # the student's, after truncation: no OFF_POLICY source
    BASE_LOGP = "base_logp"  # of a third model, the stage's `base`; computed if any piece declares it


class Trait(StrEnum):
    """Properties of a piece that restrict which other pieces and which sampling it can be combined with."""

    OFF_POLICY = "off_policy"  # a source other than the student
    SCORES_UNFINISHED = "scores_unfinished"  # a source: the teacher scores unfinished responses
    FILTERS = "filters"  # may leave out all responses of a step; the step is then skipped and counted
    READS_ATTEMPT = "reads_attempt"  # a context: the teacher reads the response that it scores
    LOOKS_AT_SAMPLED_TOKEN = "looks_at_sampled_token"  # a weight or filter that depends on the sampled token
    WEIGHS_BY_TRUST = "weighs_by_trust"  # a weight: the trust in the teacher. It may not weigh a reward
    MINIMISES_DIVERGENCE = "minimises_divergence"  # moves the student towards its teacher
    MAXIMISES_DIVERGENCE = "maximises_divergence"  # moves the student away from its teacher
    ALLOWS_SIGN_CONFLICT = "allows_sign_conflict"  # allows the two above in one method
    POLICY_GRADIENT = "policy_gradient"  # responses must be drawn at the temperature at which they are scored
    UNBIASED_BASELINE = "unbiased_baseline"  # responses must be drawn from the student's whole distribution
    SHIFTS_RESPONSES = "shifts_responses"  # a credit: one number for all tokens of a response. A mean per sequence
    SAMPLED_TOKEN_LAST = "sampled_token_last"  # reads the last column of the support as the sampled token


Need: TypeAlias = Input | Reads | Trait


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The needs of one piece, or of several (`|`): the union of sets, the maximum of numbers."""

    columns: frozenset[str] = frozenset()  # of the data: answer, response, privileged_context
    inputs: frozenset[Input] = frozenset()
    batch: frozenset[Reads] = frozenset()
    traits: frozenset[Trait] = frozenset()
    top_k: int = 0  # number of each model's most likely tokens at every position
    response_tokens: int = 0  # response length that the recipe must allow
    first_look: int = 0  # number of tokens after which an unfinished response is first checked
    student_writes: bool = False  # an OFF_POLICY source that also draws from the student
    undeclared: bool = False  # a part is a bare function, without declared needs

    def __or__(self, other: Needs) -> Needs:
        both = [(one.name, getattr(self, one.name), getattr(other, one.name)) for one in fields(Needs)]
        return Needs(**{name: a | b if isinstance(a, frozenset | bool) else max(a, b) for name, a, b in both})

    def __contains__(self, need: Need) -> bool:
        return need in self.inputs or need in self.batch or need in self.traits

    def reads(self, number: Reads) -> bool:
        """Whether a piece of phase A gets a costly number. A bare function gets TEACHER_LOGP."""
        return number in self.batch or (self.undeclared and number == Reads.TEACHER_LOGP)

    def turned(self) -> Needs:
        """The needs of the piece times a negative number: it moves the student in the other direction."""
        other: dict[Trait, Trait] = {
            Trait.MINIMISES_DIVERGENCE: Trait.MAXIMISES_DIVERGENCE,
            Trait.MAXIMISES_DIVERGENCE: Trait.MINIMISES_DIVERGENCE,
        }
        return replace(self, traits=frozenset(other.get(trait, trait) for trait in self.traits))


@dataclass(frozen=True, slots=True)
class Piece(Generic[P, R]):
    """A function with its declared needs, called like the function. Made by `needing`."""

    call: Callable[P, R]
    needs: Needs = field(default_factory=Needs)
    # The student's tokenizer -> a piece that can be called; None: this piece can be called.
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

    Without arguments it declares that it reads no costly number. A bare function of phase A (a credit, a weight, a
    normalisation, a maker of memory) counts as reading TEACHER_LOGP. A need is a member or its text. Raises ConfigError
    for any other need.
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
    """A piece that needs the student's tokenizer: `make(tokenizer)` returns the piece that is called.

    A call before that raises ConfigError with `name`. A stage and `opd check` call `Method.with_tokenizer`.
    """

    def too_early(*_: P.args, **__: P.kwargs) -> R:
        raise ConfigError(
            f"{name} needs the student's tokenizer, but was called without it. Call method.with_tokenizer(tokenizer) "
            "first; a stage does this automatically."
        )

    return replace(needing(too_early, *needs), with_tokenizer=make)


def with_tokenizer(piece: Callable[P, R], tokenizer: Any) -> Callable[P, R]:
    """The piece with the tokenizer if it needs one, else the piece itself. Raises what its `make` raises."""
    make: Callable[[Any], Callable[P, R]] | None = getattr(piece, "with_tokenizer", None)
    return piece if make is None else make(tokenizer)


def needs_of(*pieces: Callable[..., Any]) -> Needs:
    """The needs of all pieces together."""
    undeclared = Needs(undeclared=True)
    return reduce(Needs.__or__, (one.needs if isinstance(one, Piece) else undeclared for one in pieces), Needs())


def columns_of(*rewards: Any) -> frozenset[str]:
    """The columns of the data that rewards read: the columns that a `Piece` declares, or an object's `needs`."""
    said = (one.needs.columns if isinstance(one, Piece) else getattr(one, "needs", ()) for one in rewards)
    return frozenset[str]().union(*said)


def _member(need: Need) -> Need:
    members: dict[str, Need] = {one.value: one for kind in (Input, Reads, Trait) for one in kind}
    if need not in members:
        raise ConfigError(
            f"A piece declares {str(need)!r}, which is not a member of Input, Reads or Trait (opd.pieces.needs)."
            f"{nearest(str(need), members)} Declare columns of the data by name: needing(piece, columns=[...])."
        )
    return members[need]
