"""Teachers whose weights are in this process: another model, or the student itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opd.errors import AlignmentError, ConfigError
from opd.models import LanguageModel, evaluating, frozen_copy
from opd.parallel import full
from opd.render import render
from opd.score import Head, teacher_scores
from opd.types import Prompt, Rollout, Scores, Support, TeacherRule

SHORTEST_SHARED_PREFIX = 16  # tokens; below this, copying a cache costs more than it saves


@dataclass(slots=True, kw_only=True)
class LocalTeacher:
    """A `Teacher` over a model in this process.

    `follows` is the student whose weights the teacher averages after each step (`decay` of the old, the rest new);
    `base` scores with the student's own model, its adapter switched off; `offload` keeps the weights on the CPU between
    calls.
    """

    lm: LanguageModel
    micro_batch_tokens: int
    student_device: torch.device
    follows: LanguageModel | None = None
    decay: float = 1.0
    base: bool = False
    offload: bool = False
    average: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def head(self) -> Head:
        """The teacher's head, on the device where the student's loss is computed."""
        head = self.lm.head().detached()
        bias = None if head.bias is None else head.bias.to(self.student_device)
        return replace(head, weight=head.weight.to(self.student_device), bias=bias)

    @torch.no_grad()
    def score(
        self, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], support: Support, temperature: float
    ) -> list[Scores]:
        """Scores aligned to each rollout's response tokens; `contexts` are rendered with the teacher's own template."""
        prompt_ids = [render(c, self.lm.tokenizer, self.lm.template_options) for c in contexts]
        rows = [(*ids, *rollout.response_ids.tolist()) for ids, rollout in zip(prompt_ids, rollouts, strict=True)]
        self.lm.check_length(
            max(len(row) for row in rows), "Shorten the privileged context, or lower sampling.max_completion_length."
        )
        device = self.student_device if self.offload else self.lm.device
        adapter_off: Any = self.lm.model.disable_adapter() if self.base else contextlib.nullcontext()  # type: ignore[operator]
        scores: list[Scores | None] = [None] * len(rows)
        # A model that stays is not touched: `to` would take the gathered weights of a sharded one apart.
        moved = placed(self.lm, device) if self.offload else contextlib.nullcontext()
        with evaluating(self.lm.model), adapter_off, moved:
            head = self.lm.head()
            prefix = shared_prefix(prompt_ids) if len(rows) > 1 else 0
            for indices in batches([len(row) - prefix for row in rows], self.micro_batch_tokens):
                hidden = hidden_after_prefix(self.lm, [rows[i] for i in indices], prefix, device)
                for i, row_hidden in zip(indices, hidden, strict=True):
                    start = len(prompt_ids[i]) - 1 - prefix
                    rollout = rollouts[i]
                    ids = rollout.response_ids.to(device)
                    top = None if rollout.student_top_ids is None else rollout.student_top_ids.to(device)
                    mine = row_hidden[start : start + len(ids)]
                    score = teacher_scores(head, mine, ids, support, temperature, top)
                    scores[i] = _to(score, self.student_device)
        return [score for score in scores if score is not None]

    @torch.no_grad()
    def after_step(self) -> None:
        """teacher <- decay teacher + (1 - decay) student, kept in float32: in bfloat16 the steps would round away."""
        if self.follows is None or self.decay == 1.0:
            return
        mine = dict(self.lm.model.named_parameters())
        for name, parameter in self.follows.trainable().items():
            average = self.average.setdefault(name, mine[name].float().clone())
            average.lerp_(full(parameter.detach()).float(), 1.0 - self.decay)
            mine[name].copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        """What cannot be made again when a run resumes: the average of an EMA teacher, in float32."""
        return self.average

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        mine = dict(self.lm.model.named_parameters())
        self.average = {name: value.to(mine[name].device) for name, value in state.items()}
        for name, value in self.average.items():
            mine[name].copy_(value)


@contextlib.contextmanager
def placed(lm: LanguageModel, device: torch.device) -> Iterator[None]:
    """The model on `device` for a while, and back where it was, whatever happens."""
    home = lm.device
    lm.model.to(device)
    try:
        yield
    finally:
        lm.model.to(home)


def teacher_for(
    rule: TeacherRule,
    student: LanguageModel,
    external: LanguageModel | None,
    *,
    micro_batch_tokens: int,
    offload: bool = False,
) -> LocalTeacher | None:
    """The teacher that a method's rule asks for, built once a stage, before the first step. None for no teacher."""
    common: dict[str, Any] = {"micro_batch_tokens": micro_batch_tokens, "student_device": student.device}
    if rule.kind == "none":
        return None
    if rule.kind == "external":
        if external is None:
            raise ConfigError(
                "This method's teacher is another model, and the stage names none. Set the stage's `teacher`."
            )
        check_same_tokens(student.tokenizer, external.tokenizer, (student.name, external.name))
        return LocalTeacher(lm=external, offload=offload, **common)
    if rule.kind == "self_live":
        return LocalTeacher(lm=student, **common)
    if rule.kind == "self_frozen" and student.adapters:
        return LocalTeacher(lm=student, base=True, **common)
    return LocalTeacher(lm=frozen_copy(student), follows=student, decay=rule.decay, **common)


def check_same_tokens(student: Any, teacher: Any, names: tuple[str, str] = ("the student", "the teacher")) -> None:
    """Same token, same id, in both tokenizers, or AlignmentError with how many differ and which.

    The heads may differ in width: rows beyond the tokenizer's largest id are padding on either side.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    moved = [t for t, i in _by_id(ours) if t in theirs and theirs[t] != i]
    only_student = [t for t, _ in _by_id(ours) if t not in theirs]
    only_teacher = [t for t, _ in _by_id(theirs) if t not in ours]
    if not (moved or only_student or only_teacher):
        return
    parts = [
        f"{len(tokens)} tokens {what} ({', '.join(repr(t) for t in tokens[:3])}{', ...' if len(tokens) > 3 else ''})"
        for tokens, what in (
            (moved, "have another id"),
            (only_student, "exist only in the student"),
            (only_teacher, "exist only in the teacher"),
        )
        if tokens
    ]
    raise AlignmentError(
        f"The tokenizers of {names[0]} ({len(ours)} tokens) and {names[1]} ({len(theirs)}) differ: "
        f"{'; '.join(parts)}. Token by token their distributions cannot be compared. Use a teacher of the student's "
        "family, or give both the same tokenizer files."
    )


def _by_id(vocabulary: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(vocabulary.items(), key=lambda item: item[1])


def shared_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all rows share, leaving each at least one of its own; 0 if too few to pay off."""
    ordered = sorted(list(row) for row in rows)
    first, last = ordered[0], ordered[-1]
    n = 0
    limit = min(len(row) for row in rows) - 1
    while n < limit and first[n] == last[n]:
        n += 1
    return n if n >= SHORTEST_SHARED_PREFIX else 0


def hidden_after_prefix(lm: LanguageModel, rows: Sequence[Sequence[int]], prefix: int, device: torch.device) -> Tensor:
    """Last hidden states [b, L - prefix, H] of right-padded rows whose first `prefix` tokens are the same.

    The prefix is read once, and its cache repeated for every row.
    """
    own = right_padded([row[prefix:] for row in rows], device)
    if prefix == 0:
        return lm.hidden(own)
    head = torch.tensor([list(rows[0][:prefix])], device=device)
    cache = lm.forward(head, use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(rows))
    return lm.forward(own, past_key_values=cache, use_cache=True).last_hidden_state


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[b, L] ids, zeros behind each row's end: a causal model's valid positions never see them."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *([0] * (longest - len(row)))] for row in rows], device=device)


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Row indices in groups of similar length, each at most `tokens` padded tokens (and at least one row)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _to(scores: Scores, device: torch.device) -> Scores:
    names = ("teacher_logp", "support_ids", "support_mask", "teacher_support_logp", "teacher_hidden")
    values: dict[str, Tensor | None] = {name: getattr(scores, name) for name in names}
    return replace(scores, **{k: v.to(device) for k, v in values.items() if v is not None})  # type: ignore[arg-type]
