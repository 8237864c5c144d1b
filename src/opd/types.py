"""The records of one step, and the kinds of pieces that a method is made of. Read after `train.py`.

    shapes                                         symbols
    B  sequences (rollouts) of a step              p, student   the model that is trained
    T  response tokens, padded                     q, teacher   the model that scores (always detached)
    N  valid tokens, packed                        mu, sampler  the weights and truncation that wrote the tokens
    V  vocabulary (real tokens, no padding rows)   x, prompt    what the student reads
    K  tokens of a support                         c, context   what the teacher reads
    H  hidden size                                 y, response  what the student wrote
    M  teachers                                    S, support   the tokens whose probabilities are compared

`*_logp` is the natural log-probability of the sampled token, `*_support_logp` the full-vocabulary log-probabilities
of the tokens of the support. Masks are bool and `True` means train. Units are nats and tokens unless a name says
otherwise.

A worked example, one prompt, response "4 ." and the end token, padded to T = 4:

    Batch.response_ids   [[  19,   30,    2,    0]]
    Batch.mask           [[True, True, True, False]]
    Batch.teacher_logp   [[-0.1, -0.9, -0.2,  nan]]      padding may hold anything: it never reaches a signal
    Tokens.teacher_logp   [-0.1, -0.9, -0.2]             N = 3
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from opd.errors import TeacherError

Message: TypeAlias = Mapping[str, Any]
Average: TypeAlias = Literal["token", "sequence"]  # what every one of has the same say
ChosenBy: TypeAlias = Literal["teacher", "student", "intersection", "union", "symmetric_difference"]  # whose top k


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of data: what is asked, and what a reward or a teacher may know about it."""

    id: int
    content: str | tuple[Message, ...]
    answer: Any = None
    response: str | None = None
    privileged_context: str | None = None
    teacher_id: str | None = None  # in a stage: the model that scores the responses
    task: str | None = None  # in a stage with tasks: which one it belongs to
    prefill: str = ""  # what follows the generation prompt: words put into a teacher's mouth by its context
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How responses are drawn: temperature, then top-k, then top-p (the smallest set with at least that mass)."""

    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()


class ReservedStep(IntEnum):
    """Numbers in the place of the step, in a seed (seed, step), for responses that are drawn outside of training.

    No step of training has one, so that none of these responses repeats another's random numbers.
    """

    EVALUATION = 2**31 - 1  # the same at every evaluation: before and after training differ by the weights alone
    VALIDATION = 2**31 - 2  # of an update's candidates: all are asked with the same random numbers
    DOCTOR = 2**31 - 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is written down about each token while it is drawn, beside its log-prob, because a piece reads it."""

    top_k: int = 0
    entropy: bool = False


NOTHING_MORE = Record()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One response, and who wrote it.

    `sampler_logp` is the log-probability under the distribution that was drawn from: after temperature, top-k and
    top-p, renormalised. `policy_logp` is the same weights' log-probability after temperature alone. They differ
    exactly when top-p < 1 or top-k > 0. Both are None for text that no model of this run wrote.
    """

    prompt: Prompt
    sample: int
    prompt_ids: tuple[int, ...]
    response_ids: Tensor  # [T] int64
    trained: Tensor  # [T] bool, False for tokens that the student did not write (tools, environments)
    turn: Tensor  # [T] int64, index of the turn that the token belongs to
    finished: bool
    text: str
    sampler_logp: Tensor | None = None  # [T]
    policy_logp: Tensor | None = None  # [T]
    student_top_ids: Tensor | None = None  # [T, K] recorded while sampling when a support asks for it
    student_entropy: Tensor | None = None  # [T] after temperature, recorded while sampling when a piece reads it
    sampler_version: int = 0
    sampling: Sampling | None = None
    reward: float | None = None
    unjudged: str | None = None  # why the judges gave no reward
    judged: Mapping[str, float] = field(default_factory=dict[str, float])  # what else they said, for the metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a teacher says about one response, aligned to the student's response tokens."""

    teacher_logp: Tensor  # [T]
    support_ids: Tensor | None = None  # [T, K]
    support_mask: Tensor | None = None  # [T, K] bool
    teacher_support_logp: Tensor | None = None  # [T, K]
    teacher_hidden: Tensor | None = None  # [T, H] for full support: the head is applied tile by tile in phase B
    teacher_entropy: Tensor | None = None  # [T] of the teacher's distribution, if a piece reads it
    teacher_top_ids: Tensor | None = None  # [T, K] in falling order, as many as the pieces ask for
    teacher_top_logp: Tensor | None = None  # [T, K]
    scored: Tensor | None = None  # [T] bool, False where the teacher could say nothing; None: it said all
    units: Units | None = None  # [T] where student and teacher have a tokenizer each


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Phase A: everything about the step's responses, before the student runs with gradient."""

    rollouts: tuple[Rollout, ...]
    response_ids: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] bool: trained, and scored by the teacher
    sampler_logp: Tensor  # [B, T]
    policy_logp: Tensor  # [B, T]
    teacher_logp: Tensor  # [B, T], nan on full support if no credit or weight reads it
    reward: Tensor  # [B], nan where the recipe has no reward
    group: Tensor  # [B] int64, rows of one prompt share it
    support_ids: Tensor | None = None  # [B, T, K]
    support_mask: Tensor | None = None  # [B, T, K] bool
    teacher_support_logp: Tensor | None = None  # [B, T, K]
    teacher_hidden: tuple[Tensor, ...] | None = None  # B of [T_i, H], not padded: H is that of each row's teacher
    teacher_entropy: Tensor | None = None  # [B, T] where a credit or weight reads it
    student_entropy: Tensor | None = None  # [B, T] where a credit or weight reads it
    student_top_ids: Tensor | None = None  # [B, T, K] in falling order, as many as the pieces ask for
    teacher_top_ids: Tensor | None = None  # [B, T, K]
    teacher_top_logp: Tensor | None = None  # [B, T, K]
    units: Units | None = None  # [B, T]
    memory: Mapping[str, Memory] = field(default_factory=dict[str, "Memory"])  # of the method in this run, by name
    advantage: Tensor | None = None  # [B, T] from Method.credit
    weight: Tensor | None = None  # [B, T] from Method.weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Phase B: valid tokens of one chunk. Only `student_*` carries gradient; everything else is detached."""

    student_logp: Tensor  # [N]     log p(y_t | x, y_<t)
    sampler_logp: Tensor  # [N]     log mu(y_t | x, y_<t), recorded when sampled
    teacher_logp: Tensor  # [N]     log q(y_t | c, y_<t)
    advantage: Tensor  # [N]     credit, from phase A
    weight: Tensor  # [N]     from phase A
    student_support_logp: Tensor | None = None  # [N, K]  full-vocabulary log-probs on the scored support
    teacher_support_logp: Tensor | None = None  # [N, K]
    support_mask: Tensor | None = None  # [N, K] bool: which entries exist; None: K is the whole vocabulary
    shared: int | None = None  # of two vocabularies: how many columns, the first, are the same tokens; None: all are


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominator:
    """The one number that a step divides by, and each token's share of its sequence's say."""

    count: float  # of this process; summed over ranks by the loop
    share: Tensor  # [B, T], 1 for token means, 1/T_i for sequence means


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """Which tokens are scored at each position. Build with `opd.pieces.supports`."""

    kind: Literal["none", "sampled", "top_k", "full", "units"]
    k: int = 0
    by: ChosenBy = "teacher"
    with_sampled: bool = False
    span: Literal["column", "none", "product"] = "column"  # what a unit of several tokens adds; see `supports.units`
    least_mass: float = 0.0

    @property
    def student_top_k(self) -> int:
        """How many of the student's most likely tokens have to be known before the teacher scores."""
        return self.k if self.kind == "top_k" and self.by != "teacher" else 0

    @property
    def reads_states(self) -> bool:
        """Whether phase B applies the teacher's output layer to its hidden states."""
        return self.kind in ("full", "units")


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRule:
    """Whose distribution the student is compared with. Build with `opd.pieces.teacher_rules`."""

    kind: Literal["none", "external", "self_frozen", "self_live", "self_ema"]
    decay: float = 1.0
    tokenizer: Literal["students", "any"] = "students"


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyStop:
    """Ends responses during sampling.

    Every `every` tokens `keeps_going` gets the unfinished responses, as rollouts of the tokens so far, and returns
    which of them continue.
    """

    every: int
    keeps_going: Callable[[Sequence[Rollout]], Sequence[bool]]


class Writer(Protocol):
    """Writes responses to prompts: the teacher's, or the data's own."""

    def __call__(self, prompts: Sequence[Prompt], *, seed: tuple[int, int]) -> list[Rollout]:
        """Responses in the order of the prompts, equally many to each. `seed` is (seed of the run, step)."""
        ...


class Sampler(Protocol):
    """Samples the student's responses. Subclass it to inherit `sync` and `temperature`."""

    @property
    def temperature(self) -> float:
        """The temperature of the softmax that responses are drawn from; 1 for greedy decoding."""
        return 1.0

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: tuple[int, int],
        record: Record = NOTHING_MORE,
        stop: EarlyStop | None = None,
    ) -> list[Rollout]:
        """Responses in the order of the prompts, equally many to each.

        `seed` is (seed of the run, step). `record` names what each rollout records about its tokens.
        """
        ...

    def sync(self, version: int) -> None:
        """Sample with the student's weights of now, and record `version`, the step, in the rollouts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """What a teacher computes for each response. `Method.request` makes the one of a training step."""

    support: Support
    temperature: float = 1.0  # divides the teacher's logits
    sampled: bool = True  # the log-probs of the sampled tokens; without them `teacher_logp` may be NaN
    entropy: bool = False  # of the teacher's distribution
    top_k: int = 0  # how many of the teacher's most likely tokens, with their log-probs


class Teacher(Protocol):
    """Scores the student's tokens. A subclass inherits everything but `score`: a teacher whose weights stay fixed."""

    name: str = "teacher"  # for messages
    lm: Any = None  # the `LanguageModel` of this process that scores; None: it cannot write responses here
    base: bool = False  # `lm` scores and writes with its adapter off
    is_student: bool = False  # its weights are the student's own: sharded ones are whole only inside a forward

    def score(self, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], request: ScoreRequest) -> list[Scores]:
        """Scores aligned to each rollout's response tokens, with the fields that `request` names.

        `contexts` has one prompt per rollout: what the teacher reads before the response.
        """
        ...

    def refuses(self, request: ScoreRequest) -> str | None:
        """Why this teacher cannot compute `request`; None if it can. Called before training."""
        return None

    def head(self, teacher_id: str | None = None) -> Any:
        """The `Head` that goes with `Scores.teacher_hidden`, for a support that reads hidden states."""
        raise TeacherError(f"The teacher {self.name!r} has no output layer in this process.")

    def of(self, teacher_id: str | None) -> Teacher:
        """The teacher of the rows with that `Prompt.teacher_id`; itself, unless it routes."""
        return self

    def after_step(self) -> None:
        """Called after each update; a teacher that averages the student's weights follows here."""

    def jumped(self, by: Mapping[str, Tensor]) -> None:
        """Apply the same jump to a teacher that averages the student's weights. `by` is the change, by parameter."""

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint has to save."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""


class NoTeacher(Teacher):
    """The teacher of a method without one: its scores are NaN, and no piece reads them."""

    name = "none"

    def score(self, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], request: ScoreRequest) -> list[Scores]:
        return [Scores(teacher_logp=torch.full((len(rollout.response_ids),), torch.nan)) for rollout in rollouts]


# Scores of responses that are being written, from call to call.
Scorer: TypeAlias = Callable[[Sequence[Rollout]], list[Scores]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Writers:
    """What can write a response in a stage; a `Source` picks.

    `complete` adds what a `Record` names to rollouts that lack it, because the student did not write them. `scorer`
    begins a scoring of responses that are being written.
    """

    student: Sampler
    reference: Writer  # the data's own responses
    complete: Callable[[Sequence[Rollout], Record], list[Rollout]]
    teacher: Writer | None = None
    scorer: Callable[[], Scorer] | None = None
    memory: Mapping[str, Memory] = field(default_factory=dict[str, "Memory"])  # of the method in this run, by name


class Optimisation(Protocol):
    """What an `Update` may touch: the trained weights, sharded where the student is, and what follows them."""

    @property
    def updates(self) -> int: ...  # so far

    @property
    def parameters(self) -> Mapping[str, Tensor]: ...

    @property
    def memory(self) -> Mapping[str, Memory]: ...  # of the method in this run, by name

    def step(self) -> dict[str, float]: ...

    def set(self, weights: Mapping[str, Tensor]) -> None: ...

    def jumped(self, by: Mapping[str, Tensor]) -> None: ...  # an EMA teacher makes the same jump

    def validate(self, by: Literal["reward", "teacher_kl"], prompts: int) -> float: ...  # higher is better


@runtime_checkable
class Reward(Protocol):
    """Gives responses their rewards. Subclass it to inherit everything but `name` and `__call__`.

    `opd.rewards.base.FunctionReward` makes one of a function (prompt, text) -> float.
    """

    name: str  # for messages
    needs: frozenset[str] = frozenset()  # columns of the data that every prompt must have
    asks: Mapping[str, Any] = MappingProxyType({})  # the judges: by role, their section of the recipe
    comparable: bool = True  # False: rewards before and after training cannot be compared

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts, in their order, with `reward` set to a finite number, or to None and `unjudged` to the reason.

        All responses to a prompt come in one call.
        """
        ...

    def for_stage(
        self, models: Mapping[str, Any], origins: Mapping[str, Mapping[str, Any]], folder: Path, rank: int
    ) -> Reward:
        """The reward with its judges ready: `models` are the loaded ones by name, `origins` their recipe sections.

        `folder` keeps the judges' answers; `rank` is that of this process.
        """
        return self

    def check_failures(self, rollouts: Sequence[Rollout], gather: Gather) -> None:
        """Raise TeacherError, in every process, if too many of a step's responses have no reward.

        Called after `__call__`, in every process, with what it returned.
        """

    def pop_requests(self) -> dict[str, float]:
        """What the judges did since the last call, as ROLE_WHAT: requests, retries, seconds, ..."""
        return {}


class Memory(Protocol):
    """What a method remembers from step to step. Its maker is called once a run; every checkpoint saves what it gives.

    `opd.pieces.memory.SavedAttributes` is one of a few numbers, or of none: then it only measures.
    """

    def observe(self, batch: Batch, gather: Gather) -> Mapping[str, float]: ...  # before credit and weight; metrics

    def state_dict(self) -> dict[str, Any]: ...  # what JSON can hold

    def tensors(self) -> Mapping[str, Tensor]: ...  # by parameter, sharded as the student's are

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None: ...


Source: TypeAlias = Callable[[Sequence[Prompt], Writers, tuple[int, int], Record], list[Rollout]]
Watch: TypeAlias = Callable[[Writers], EarlyStop]
Context: TypeAlias = Callable[[Sequence[Rollout]], list[Prompt]]
Filter: TypeAlias = Callable[[Sequence[Rollout]], list[Rollout]]
Credit: TypeAlias = Callable[[Batch], Tensor]  # -> [B, T]
Weight: TypeAlias = Callable[[Batch], Tensor]  # -> [B, T], >= 0
Signal: TypeAlias = Callable[[Tokens], Tensor]  # -> [N]
Advantage: TypeAlias = Callable[[Tokens], Tensor]  # -> [N], of a policy gradient
Normalise: TypeAlias = Callable[[Batch], Denominator]
Gather: TypeAlias = Callable[[Any], list[Any]]  # everybody's value, in rank order, in every process
MakeMemory: TypeAlias = Callable[[], Memory]
Update: TypeAlias = Callable[[Optimisation], dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """By the student's token, [T], [B, T] or [N] like the record that holds it.

    The teacher's numbers are of the unit that the token belongs to, and NaN for a token that is in none.
    """

    size: Tensor  # int64: how many student tokens the unit has that begins here and is compared; 0: none does
    teacher_size: Tensor  # int64: teacher tokens of the unit
    first_logp: Tensor  # log q of the unit's first teacher token
    rest_logp: Tensor  # log q of its others, summed
    shared: Tensor  # bool: the unit is one token on either side, and the same one
    inside: Tensor  # bool: the token is in a unit that is compared
    bytes: Tensor  # int64: bytes of text in the student's token

    def each(self, change: Callable[[Tensor], Tensor]) -> Units:
        """`change` of every field."""
        return Units(**{field.name: change(getattr(self, field.name)) for field in fields(self)})

    @staticmethod
    def joined(rows: Sequence[Units], join: Callable[[list[Tensor]], Tensor]) -> Units:
        """`join` of every field of several."""
        return Units(**{field.name: join([getattr(row, field.name) for row in rows]) for field in fields(Units)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """The tokens that are in both vocabularies: entry k of `student` is entry k of `teacher`."""

    student: Tensor  # [K] int64
    teacher: Tensor  # [K] int64

    def first(self, ids: Tensor, vocabulary: int) -> Tensor:
        """All ids of a vocabulary, [V]: the shared ones (`ids`) and then the others in order."""
        alone = torch.ones(vocabulary, dtype=torch.bool, device=ids.device)
        alone[ids] = False
        return torch.cat([ids, alone.nonzero()[:, 0]])
