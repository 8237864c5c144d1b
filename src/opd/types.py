"""The records of a step, the protocols, and the types of a method's pieces. Read after `train.py`.

    shapes                                         symbols
    B  sequences (rollouts) of a step              p, student   the model that is trained
    T  response tokens, padded                     q, teacher   the model that scores (always detached)
    N  valid tokens, packed                        mu, sampler  the weights and truncation that wrote the tokens
    V  vocabulary (real tokens, no padding rows)   x, prompt    what the student reads
    K  tokens of a support                         c, context   what the teacher reads
    H  hidden size                                 y, response  what the student wrote
    M  teachers                                    S, support   the tokens that are compared
                                                   b, base      a fixed third model, which reads the student's prompt

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
from dataclasses import MISSING, dataclass, field, fields
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from opd.errors import TeacherError
from opd.plugins import torch

if TYPE_CHECKING:
    from torch import Tensor

Message: TypeAlias = Mapping[str, Any]
Average: TypeAlias = Literal["token", "sequence"]  # the unit of equal weight in the loss
# What the student is compared with: one normalised mean of several teachers, or each in turn, with the losses averaged.
Mixture: TypeAlias = Literal["geometric", "arithmetic", "each"]
# The top k of one model, or a set built from both models' top k.
ChosenBy: TypeAlias = Literal["teacher", "student", "intersection", "union", "symmetric_difference"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image of a prompt, as the file that it is encoded in: PNG, JPEG, ..."""

    name: str  # for messages
    digest: str  # SHA-256 of the file
    path: Path | None = field(default=None, repr=False)  # where the file is; None: `content` is the file
    content: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of data: the prompt, and data about it for rewards and teachers."""

    id: int
    content: str | tuple[Message, ...]
    answer: Any = None
    response: str | None = None
    turns: tuple[Message, ...] = ()  # of the data: a response of several turns, from and to the assistant's
    privileged_context: str | None = None
    teacher_id: str | None = None  # in a stage: the model that scores the responses
    task: str | None = None  # in a stage with tasks: the prompt's task
    prefill: str = ""  # after the generation prompt: the beginning of the answer, which the model continues
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas, for the chat template
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])  # override `template_options`
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    images: tuple[Image, ...] = ()  # in the order of their marks in `content`; frames of a video are several images
    privileged_images: tuple[Image, ...] = ()  # which a teacher may read in place of `images`
    # Of several teachers, by name: what each reads (default: this prompt), weights (default: equal). Not in the data.
    views: Mapping[str, Prompt] = field(default_factory=dict[str, "Prompt"], repr=False)
    teacher_weights: Mapping[str, float] = field(default_factory=dict[str, float], repr=False)


def teachers_in(teacher: str | None) -> list[str]:
    """The models of a recipe's `teacher` or a `Prompt.teacher_id`: `one+other` names several teachers of one row."""
    return [] if teacher is None else [name.strip() for name in teacher.split("+")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling settings: temperature, then top-k, then top-p (the smallest set with at least that mass)."""

    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()


class ReservedStep(IntEnum):
    """Step numbers in a seed (seed, step) of responses outside of training, which shares no random number with them."""

    EVALUATION = 2**31 - 1  # the same at every evaluation: before and after training only the weights differ
    VALIDATION = 2**31 - 2  # the same for all candidates of an update
    DOCTOR = 2**31 - 3
    RECORDS = 2**31 - 4  # `opd rollouts`
    FOLLOW = 2**31 - 5  # the held-out prompts in sample files
    PROBE = 2**30  # the responses; continuations of a node at depth d have the step PROBE + 1 + d


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The values recorded for each token during sampling, besides its log-prob, because a piece reads them."""

    top_k: int = 0
    entropy: bool = False


NOTHING_MORE = Record()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One response and its writer.

    `sampler_logp` is the log-probability under the sampling distribution: after temperature, top-k and top-p,
    renormalised. `policy_logp` is the same weights' log-probability after temperature only. They differ exactly when
    top-p < 1 or top-k > 0. Both are None for text that no model of this run wrote.
    """

    prompt: Prompt
    sample: int
    prompt_ids: tuple[int, ...]
    response_ids: Tensor  # [T] int64
    trained: Tensor  # [T] bool, False for tokens that the student did not write (tools, environments)
    turn: Tensor  # [T] int64, index of the token's turn: what the environment says before the student's words is in it
    finished: bool
    text: str
    sampler_logp: Tensor | None = None  # [T]
    policy_logp: Tensor | None = None  # [T]
    student_top_ids: Tensor | None = None  # [T, K] recorded while sampling if a support or piece needs it
    student_entropy: Tensor | None = None  # [T] after temperature, recorded while sampling if a piece reads it
    sampler_version: int = 0
    sampling: Sampling | None = None
    reward: float | None = None
    unjudged: str | None = None  # why there is no reward: its judges or its function failed
    reward_failure: Literal["failed", "timed_out"] | None = None  # of a function; timed_out: it has a reward, 0
    judged: Mapping[str, float] = field(default_factory=dict[str, float])  # further numbers of the judges, for metrics
    part: str = ""  # the name in `Method.parts` of the pieces that train it; "": the method's own
    measured: Mapping[str, float] = field(default_factory=dict[str, float])  # by its source: metrics part/NAME/...
    feedback: str | None = None  # a judge's text about the response, which a teacher may read
    talk: Talk | None = None  # what happened in a conversation with an environment

    @property
    def own_ids(self) -> Tensor:
        """The tokens [T'] that the environment did not write, trained or not."""
        return self.response_ids if self.talk is None else self.response_ids[~self.talk.heard]

    @property
    def last_text(self) -> str:
        """The text that rewards read: of a conversation the student's last turn, else the response."""
        return self.text if self.talk is None else self.talk.last_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Talk:
    """What a `Rollout` says of its conversation with an environment."""

    heard: Tensor  # [T] bool: tokens of the environment, which the student reads and is never trained on
    last_text: str
    turn_rewards: tuple[float | None, ...] = ()  # by turn of the student; None: the environment gave none
    turn_errors: tuple[int, ...] = ()  # by turn of the student: its calls and actions that failed
    counts: Mapping[str, float] = field(default_factory=dict[str, float])  # metrics environment/...


class Unwritten(Rollout):
    """A text in place of a response. The tensors that it was not given are made when they are read: no token, [0].

    It takes the fields of a `Rollout` by name.
    """

    __slots__ = ()

    def __init__(self, **values: Any) -> None:
        for one in fields(Rollout):
            if one.name in values:
                value = values[one.name]
            elif one.default is not MISSING or one.default_factory is not MISSING:
                value = one.default if one.default_factory is MISSING else one.default_factory()
            else:
                continue
            object.__setattr__(self, one.name, value)

    def __getattr__(self, name: str) -> Tensor:
        if name not in ("response_ids", "trained", "turn"):
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return torch.zeros(0, dtype=torch.bool if name == "trained" else torch.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """A teacher's scores of one response, aligned to the student's response tokens."""

    teacher_logp: Tensor  # [T]
    support_ids: Tensor | None = None  # [T, K]
    support_mask: Tensor | None = None  # [T, K] bool
    teacher_support_logp: Tensor | None = None  # [T, K]
    teacher_hidden: Tensor | None = None  # [T, H] for full support: the head is applied tile by tile in phase B
    teacher_entropy: Tensor | None = None  # [T] of the teacher's distribution, if a piece reads it
    teacher_top_ids: Tensor | None = None  # [T, K] in falling order, `ScoreRequest.top_k` of them
    teacher_top_logp: Tensor | None = None  # [T, K]
    teacher_rank: Tensor | None = None  # [T] int64: the sampled token's place in the teacher's order, from 0
    base_logp: Tensor | None = None  # [T] of the base model, if a piece reads it
    scored: Tensor | None = None  # [T] bool, False for tokens that the teacher could not score; None: it scored all
    units: Units | None = None  # [T] if student and teacher have different tokenizers


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Phase A: the step's responses with all numbers, before the student runs with gradient."""

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
    teacher_entropy: Tensor | None = None  # [B, T] if a credit or weight reads it
    student_entropy: Tensor | None = None  # [B, T] if a credit or weight reads it
    student_top_ids: Tensor | None = None  # [B, T, K] in falling order, as many as the pieces need
    teacher_top_ids: Tensor | None = None  # [B, T, K]
    teacher_top_logp: Tensor | None = None  # [B, T, K]
    base_logp: Tensor | None = None  # [B, T] if a piece reads it
    units: Units | None = None  # [B, T]
    memory: Mapping[str, Memory] = field(default_factory=dict[str, "Memory"])  # the run's memory, by name
    advantage: Tensor | None = None  # [B, T] from Method.credit; [B, T, C] for a signal that reads C numbers per token
    weight: Tensor | None = None  # [B, T] from Method.weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Phase B: valid tokens of one chunk. Only `student_*` carries gradient; everything else is detached."""

    student_logp: Tensor  # [N]     log p(y_t | x, y_<t)
    sampler_logp: Tensor  # [N]     log mu(y_t | x, y_<t), recorded when sampled
    teacher_logp: Tensor  # [N]     log q(y_t | c, y_<t)
    advantage: Tensor  # [N]     credit, from phase A; [N, C] for a signal that reads C numbers per token
    weight: Tensor  # [N]     from phase A
    base_logp: Tensor | None = None  # [N]     log b(y_t | x, y_<t), if a piece reads it
    student_support_logp: Tensor | None = None  # [N, K]  full-vocabulary log-probs on the scored support
    teacher_support_logp: Tensor | None = None  # [N, K]
    support_mask: Tensor | None = None  # [N, K] bool: which entries exist; None: K is the whole vocabulary
    shared: int | None = None  # with two vocabularies: the number of first columns that are the same tokens; None: all


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominator:
    """The number that a step divides by, and each token's share in its sequence."""

    count: float  # of this process; summed over ranks by the loop
    share: Tensor  # [B, T], 1 for token means, 1/T_i for sequence means


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """The tokens scored at each position. Build with `opd.pieces.supports`."""

    kind: Literal["none", "sampled", "top_k", "full", "units"]
    k: int = 0
    by: ChosenBy = "teacher"
    with_sampled: bool = False
    span: Literal["column", "none", "product"] = "column"  # the entry of a unit of several tokens; see `supports.units`
    least_mass: float = 0.0

    @property
    def student_top_k(self) -> int:
        """The number of the student's most likely tokens that the support needs before the teacher scores."""
        return self.k if self.kind == "top_k" and self.by != "teacher" else 0

    @property
    def reads_states(self) -> bool:
        """Whether phase B applies the teacher's output layer to its hidden states."""
        return self.kind in ("full", "units")


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRule:
    """The model that the student is compared with. Build with `opd.pieces.teacher_rules`."""

    kind: Literal["none", "external", "peer", "self_frozen", "self_live", "self_ema"]
    decay: float = 1.0
    tokenizer: Literal["students", "any"] = "students"
    mixture: Mixture | None = None  # of several teachers of one row; None: a row has one teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyStop:
    """Ends responses during sampling.

    Every `every` tokens `keeps_going` gets the unfinished responses, as rollouts of the tokens so far, and returns
    which of them continue.
    """

    every: int
    keeps_going: Callable[[Sequence[Rollout]], Sequence[bool]]


class Writer(Protocol):
    """Writes responses to prompts: a teacher, or the data."""

    def __call__(self, prompts: Sequence[Prompt], *, seed: tuple[int, int]) -> list[Rollout]:
        """Responses in the order of the prompts, equally many to each. `seed` is (seed of the run, step)."""
        ...


class Author(Protocol):
    """A teacher that writes for a source: whatever the source shows it, as often as the source wants."""

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
        """`n` responses to each prompt, in the order of the prompts, as rollouts of a student that reads the prompts.

        The teacher reads `contexts`, one per prompt; default: the prompts. `sample` counts from `first`: a source that
        calls an author again for the same prompts in one step, e.g. in a second round, continues the count, because
        the random numbers depend on (seed, step), author, prompt id and sample alone. `sampling` replaces that of the
        stage; its `n` is not read. `seed` is (seed of the run, step).
        """
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
        """Sample with the student's current weights, and record `version`, the step, in the rollouts."""

    def pop_requests(self) -> dict[str, float]:
        """An engine's counts since the last call: requests, bytes, ..."""
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """The values that a teacher computes for each response. `Method.request` returns that of a training step."""

    support: Support
    temperature: float = 1.0  # divides the teacher's logits
    sampled: bool = True  # the log-probs of the sampled tokens; without them `teacher_logp` may be NaN
    entropy: bool = False  # of the teacher's distribution
    top_k: int = 0  # number of the teacher's most likely tokens, with their log-probs
    base: bool = False  # the base model's log-probs of the sampled tokens; see `teachers.with_base`
    rank: bool = False  # the sampled tokens' places in the teacher's order; for samples alone


class Teacher(Protocol):
    """Scores the student's tokens. A subclass that defines only `score` is a teacher with fixed weights."""

    name: str = "teacher"  # for messages
    lm: Any = None  # the `LanguageModel` that scores in this process; None: it cannot write responses here
    base: bool = False  # `lm` scores and writes with its adapter off
    is_student: bool = False  # uses the student's own weights: sharded weights are whole only inside a forward

    def score(self, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], request: ScoreRequest) -> list[Scores]:
        """Scores aligned to each rollout's response tokens, with the fields that `request` names.

        `contexts` has one prompt per rollout, which the teacher reads before the response.
        """
        ...

    def score_early(self, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], request: ScoreRequest) -> None:
        """Compute what `score` will return, as far as it needs no student. Called in a thread; here: no effect."""

    def refuses(self, request: ScoreRequest) -> str | None:
        """Why this teacher cannot compute `request`; None if it can. Called before training."""
        return None

    def head(self, teacher_id: str | None = None) -> Any:
        """The `TeacherHead` for `Scores.teacher_hidden`, for a support that reads hidden states."""
        raise TeacherError(f"The teacher {self.name!r} has no output layer in this process.")

    def of(self, teacher_id: str | None) -> Teacher:
        """The teacher of the rows with that `Prompt.teacher_id`; itself, unless it is a `RoutedTeacher`."""
        return self

    def writer(
        self, student: Any, sampling: Sampling, context: Context, max_prompt_length: int | None
    ) -> Writer | None:
        """A writer of this teacher's own responses, for a `LanguageModel` student, where `lm` is None. None: no way."""
        return None

    def pop_requests(self) -> dict[str, float]:
        """A served teacher's counts since the last call: requests, bytes, ..."""
        return {}

    def after_step(self) -> None:
        """Called after each update. A teacher that averages the student's weights updates its average here."""

    def jumped(self, by: Mapping[str, Tensor]) -> None:
        """Apply the same jump to a teacher that averages the student's weights. `by` is the change, by parameter."""

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint saves."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""


class NoTeacher(Teacher):
    """The teacher of a method without one: its scores are NaN, and no piece reads them."""

    name = "none"

    def score(self, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], request: ScoreRequest) -> list[Scores]:
        return [Scores(teacher_logp=torch.full((len(rollout.response_ids),), torch.nan)) for rollout in rollouts]


# Unfinished responses -> their scores so far. Keeps its state from call to call.
Scorer: TypeAlias = Callable[[Sequence[Rollout]], list[Scores]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Writers:
    """The writers of a stage; a `Source` chooses among them.

    `complete` adds the values of a `Record` to rollouts that lack them because the student did not write them. `scorer`
    returns a new `Scorer` of unfinished responses. `teacher` answers the prompts; `authors` are all teachers of the
    stage that can write, for a source that shows them more than the prompt or calls them several times. `reward` gives
    candidates their rewards, for a source that chooses among them: every process calls it equally often, if need be
    with no candidate.
    """

    student: Sampler
    reference: Writer  # the data's responses
    complete: Callable[[Sequence[Rollout], Record], list[Rollout]]
    teacher: Writer | None = None
    authors: Mapping[str | None, Author] = field(default_factory=dict[str | None, "Author"])  # by `Prompt.teacher_id`
    scorer: Callable[[], Scorer] | None = None
    reward: Callable[[Sequence[Rollout]], list[Rollout]] | None = None  # of the step
    memory: Mapping[str, Memory] = field(default_factory=dict[str, "Memory"])  # of the method in this run, by name


class Optimisation(Protocol):
    """The interface of an `Update`: the trained weights, sharded as the student is, and their optimiser."""

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

    `opd.rewards.base.FunctionReward` is the Reward of a function (prompt, text) -> float.
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
        """Raise TeacherError on every rank if too many of a step's responses have no reward.

        Called after `__call__`, in every process, with its result.
        """

    def pop_requests(self) -> dict[str, float]:
        """The judges' counts since the last call, as ROLE_WHAT: requests, retries, seconds, ..."""
        return {}


class Memory(Protocol):
    """The state of a method from step to step. Its maker is called once per run; every checkpoint saves it.

    `opd.pieces.memory.SavedAttributes` is a memory of a few numbers, or of none: then it only measures.
    """

    def observe(self, batch: Batch, gather: Gather) -> Mapping[str, float]: ...  # before credit and weight; metrics

    def state_dict(self) -> dict[str, Any]: ...  # JSON types only

    def tensors(self) -> Mapping[str, Tensor]: ...  # by parameter, sharded as the student's are

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None: ...


Source: TypeAlias = Callable[[Sequence[Prompt], Writers, tuple[int, int], Record], list[Rollout]]
Watch: TypeAlias = Callable[[Writers], EarlyStop]
Context: TypeAlias = Callable[[Sequence[Rollout]], list[Prompt]]
Filter: TypeAlias = Callable[[Sequence[Rollout]], list[Rollout]]
Credit: TypeAlias = Callable[[Batch], "Tensor"]  # -> [B, T], or [B, T, C]
Weight: TypeAlias = Callable[[Batch], "Tensor"]  # -> [B, T], >= 0
Signal: TypeAlias = Callable[[Tokens], "Tensor"]  # -> [N]
Advantage: TypeAlias = Callable[[Tokens], "Tensor"]  # -> [N], of a policy gradient
Normalise: TypeAlias = Callable[[Batch], Denominator]
Gather: TypeAlias = Callable[[Any], list[Any]]  # the values of all processes, in rank order, on every process
MakeMemory: TypeAlias = Callable[[], Memory]
Update: TypeAlias = Callable[[Optimisation], dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """Units by the student's token, [T], [B, T] or [N] like the record that holds them.

    The teacher's numbers are those of the token's unit, NaN for a token outside all units.
    """

    size: Tensor  # int64: student tokens of the compared unit that begins here; 0 if none begins here
    teacher_size: Tensor  # int64: teacher tokens of the unit
    first_logp: Tensor  # log q of the unit's first teacher token
    rest_logp: Tensor  # log q of its other tokens, summed
    shared: Tensor  # bool: the unit is one token in both vocabularies, and the same token
    inside: Tensor  # bool: the token is in a unit that is compared
    bytes: Tensor  # int64: bytes of text in the student's token

    def each(self, change: Callable[[Tensor], Tensor]) -> Units:
        """The units with `change` applied to every field."""
        return Units(**{field.name: change(getattr(self, field.name)) for field in fields(self)})

    @staticmethod
    def joined(rows: Sequence[Units], join: Callable[[list[Tensor]], Tensor]) -> Units:
        """Several units with `join` applied to every field."""
        return Units(**{field.name: join([getattr(row, field.name) for row in rows]) for field in fields(Units)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """The tokens in both vocabularies: entry k of `student` is the same token as entry k of `teacher`."""

    student: Tensor  # [K] int64
    teacher: Tensor  # [K] int64

    def first(self, ids: Tensor, vocabulary: int) -> Tensor:
        """All ids of a vocabulary, [V]: first the shared `ids`, then the others in order."""
        alone = torch.ones(vocabulary, dtype=torch.bool, device=ids.device)
        alone[ids] = False
        return torch.cat([ids, alone.nonzero()[:, 0]])
