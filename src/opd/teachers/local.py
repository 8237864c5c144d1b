"""Teachers with weights in this process: another model, or the student itself."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from opd.errors import ConfigError
from opd.models.adapters import adds_nothing
from opd.models.forward import batches, response_states
from opd.models.head import Head
from opd.models.language_model import LanguageModel, evaluating, frozen_copy
from opd.models.render import render
from opd.models.ticks import counting
from opd.models.vocabularies import check_same_tokens
from opd.parallel import whole_tensor
from opd.pieces.supports import sampled, top_k
from opd.teachers.scoring import parted, teacher_scores
from opd.types import Prompt, Record, Rollout, ScoreRequest, Scores, Teacher, TeacherRule


@dataclass(slots=True, kw_only=True)
class LocalTeacher(Teacher):
    """A `Teacher` over a model in this process.

    `follows`: the student that the teacher averages after each step, with `decay`. `base`: score with the
    student's model, its adapter switched off. `offload`: keep the weights on the CPU between calls.
    """

    lm: LanguageModel
    micro_batch_tokens: int
    student_device: torch.device
    follows: LanguageModel | None = None
    decay: float = 1.0
    base: bool = False
    offload: bool = False
    is_student: bool = False
    average: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def name(self) -> str:
        """The model's name in the recipe."""
        return self.lm.name

    def head(self, teacher_id: str | None = None) -> Head:
        """The teacher's head, on the student's device; the same for every row."""
        head = self.lm.head().detached()
        bias = None if head.bias is None else head.bias.to(self.student_device)
        return replace(head, weight=head.weight.to(self.student_device), bias=bias)

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], request: ScoreRequest) -> list[Scores]:
        """Scores aligned to each rollout's response tokens; `contexts` are rendered with the teacher's own template.

        Raises DataError for a row longer than the model's positions.
        """
        rendered = [render(c, self.lm.tokenizer, self.lm.template_options) for c in contexts]
        return self.score_after(rendered, rollouts, request)

    @torch.no_grad()
    def score_after(
        self, prompt_ids: Sequence[Sequence[int]], rollouts: Sequence[Rollout], request: ScoreRequest
    ) -> list[Scores]:
        """`score` after given ids, one sequence per rollout, which the teacher reads as they are."""
        responses = [rollout.response_ids.tolist() for rollout in rollouts]
        lengths = [len(response) for response in responses]
        self.lm.check_length(
            max(len(ids) + length for ids, length in zip(prompt_ids, lengths, strict=True)),
            "Lower max_completion_length, or shorten the teacher's context.",
        )
        scores: list[Scores | None] = [None] * len(rollouts)
        with self.at_work() as head, counting("responses scored", len(rollouts)) as count:
            device = self.lm.device
            for indices in batches(self.lm, prompt_ids, lengths, self.micro_batch_tokens):
                states = response_states(self.lm, [prompt_ids[i] for i in indices], [responses[i] for i in indices])
                own = [lengths[i] for i in indices]
                # The tokens of the whole batch at once: with few rows a product reads the output layer for little.
                hidden = torch.cat([states.of(place, length) for place, length in enumerate(own)])
                ids = torch.cat([rollouts[i].response_ids for i in indices]).to(device)
                top = student_top([rollouts[i] for i in indices], request, device)
                found = _to(teacher_scores(head, hidden, ids, request, top), self.student_device)
                for i, score in zip(indices, parted(found, own), strict=True):
                    scores[i] = score
                count.add(len(indices), tokens=sum(lengths[i] for i in indices))
        return [score for score in scores if score is not None]

    @contextlib.contextmanager
    def at_work(self) -> Iterator[Head]:
        """The head, with the model ready to score: on its device, in eval mode, without the student's adapter."""
        adapter_off: Any = self.lm.model.disable_adapter() if self.base else contextlib.nullcontext()  # type: ignore[operator]
        # Do not call `to` on a model that stays: it would break the gathered weights of a sharded model.
        moved = placed(self.lm, self.student_device) if self.offload else contextlib.nullcontext()
        with evaluating(self.lm.model), adapter_off, moved:
            yield self.lm.head()

    @torch.no_grad()
    def after_step(self) -> None:
        """teacher <- decay teacher + (1 - decay) student, in float32: in bfloat16 rounding would lose small steps."""
        if self.follows is None or self.decay == 1.0:
            return
        mine = dict(self.lm.model.named_parameters())
        for name, parameter in self.follows.trainable().items():
            average = self.average.setdefault(name, mine[name].float().clone())
            average.lerp_(whole_tensor(parameter.detach()).float(), 1.0 - self.decay)
            mine[name].copy_(average)

    @torch.no_grad()
    def jumped(self, by: Mapping[str, Tensor]) -> None:
        """Apply the same jump to an EMA teacher, so that it lags the student as it did."""
        if self.follows is None or self.decay == 1.0:
            return
        mine = dict(self.lm.model.named_parameters())
        for name, change in by.items():
            average = self.average.setdefault(name, mine[name].float().clone())
            average.add_(whole_tensor(change).float())
            mine[name].copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        """The average of an EMA teacher, in float32; empty for a teacher with fixed weights."""
        return self.average

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the average, and the weights from it."""
        mine = dict(self.lm.model.named_parameters())
        self.average = {name: value.to(mine[name].device) for name, value in state.items()}
        for name, value in self.average.items():
            mine[name].copy_(value)


def with_record(
    student: LanguageModel,
    rollouts: Sequence[Rollout],
    record: Record,
    *,
    temperature: Callable[[Rollout], float],
    micro_batch_tokens: int,
    policy: bool = False,
) -> list[Rollout]:
    """The rollouts with the student's values named in `record` at each token, also for responses of other writers.

    `temperature` is the student's sampling temperature, as in the sampler's records. `policy`: also replace
    `policy_logp`, for a writer that knows its tokens' log-probs after truncation alone.
    """
    missing: defaultdict[float, list[int]] = defaultdict(list)
    for i, rollout in enumerate(rollouts):
        top = record.top_k and rollout.student_top_ids is None
        if policy or top or (record.entropy and rollout.student_entropy is None):
            missing[temperature(rollout)].append(i)
    out = list(rollouts)
    view = LocalTeacher(lm=student, micro_batch_tokens=micro_batch_tokens, student_device=student.device)
    support = top_k(record.top_k, by="teacher") if record.top_k else sampled()
    for tempered, indices in missing.items():
        absent = [rollouts[i] for i in indices]
        request = ScoreRequest(support=support, temperature=tempered, entropy=record.entropy)
        scores = view.score(absent, [r.prompt for r in absent], request)
        for i, score in zip(indices, scores, strict=True):
            out[i] = replace(out[i], student_top_ids=score.support_ids, student_entropy=score.teacher_entropy)
            if policy:
                out[i] = replace(out[i], policy_logp=score.teacher_logp.cpu())
    return out


@torch.no_grad()
def log_probs(lm: LanguageModel, ids: Sequence[int], temperature: float = 1.0) -> Tensor:
    """The log-probs [T - 1] of the tokens of a sequence after the first, on the CPU."""
    with evaluating(lm.model):
        hidden = response_states(lm, [[ids[0]]], [list(ids[1:])]).of(0, len(ids) - 1)
        request = ScoreRequest(support=sampled(), temperature=temperature)
        return teacher_scores(lm.head(), hidden, torch.tensor(ids[1:]).to(lm.device), request).teacher_logp.cpu()


@contextlib.contextmanager
def placed(lm: LanguageModel, device: torch.device) -> Iterator[None]:
    """Move the model to `device`, and back afterwards, also after an error."""
    home = lm.device
    lm.model.to(device)
    try:
        yield
    finally:
        lm.model.to(home)


def local_teacher(
    rule: TeacherRule,
    student: LanguageModel,
    external: LanguageModel | None,
    *,
    micro_batch_tokens: int,
    offload: bool = False,
) -> LocalTeacher:
    """The local teacher of a method's rule, built once per stage, before the first step. Raises ConfigError.

    Not for a rule without a teacher: see `cross_tokenizer.teacher_by_rule`.
    """
    common: dict[str, Any] = {"micro_batch_tokens": micro_batch_tokens, "student_device": student.device}
    assert rule.kind != "none", "NoTeacher is the teacher of a method without one"
    if rule.kind in ("external", "peer"):
        if external is None:
            raise ConfigError(
                "This method needs another model as its teacher, but the stage names none. Set the stage's `teacher`."
            )
        if rule.tokenizer == "students":
            check_same_tokens(student.tokenizer, external.tokenizer, (student.name, external.name))
            assert student.vocabulary == external.vocabulary, "see vocabularies.on_common_tokens"
        return LocalTeacher(lm=external, offload=offload, **common)
    if rule.kind == "self_live":
        return LocalTeacher(lm=student, is_student=True, **common)
    if rule.kind == "self_frozen" and student.adapters and adds_nothing(student.model):
        return LocalTeacher(lm=student, is_student=True, base=True, **common)
    return LocalTeacher(lm=frozen_copy(student), follows=student, decay=rule.decay, **common)


def student_top(rollouts: Sequence[Rollout], request: ScoreRequest, device: torch.device) -> Tensor | None:
    """The student's most likely tokens [N, k] at the tokens of all rollouts; None if the support does not read them."""
    if not (k := request.support.student_top_k):
        return None
    recorded = [rollout.student_top_ids for rollout in rollouts]
    known = [ids[:, :k] for ids in recorded if ids is not None]
    assert len(known) == len(recorded), "the support reads the student's top-k, which some responses lack"
    return torch.cat(known).to(device)


def _to(scores: Scores, device: torch.device) -> Scores:
    values: dict[str, Tensor | None] = {field.name: getattr(scores, field.name) for field in fields(scores)}
    return replace(scores, **{k: v.to(device) for k, v in values.items() if v is not None})  # type: ignore[arg-type]
