"""Writers other than the student: a teacher, and the data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from opd.messages import text_after
from opd.models.language_model import LanguageModel
from opd.models.references import Reference, reference_of
from opd.models.render import encode_response, render_checked
from opd.models.vocabularies import same_ids
from opd.pieces.sources import in_order
from opd.samplers.hf import TransformersSampler
from opd.types import NOTHING_MORE, Context, EarlyStop, Prompt, Record, Rollout, Sampler, Sampling, Talk, Writer


@dataclass(slots=True, kw_only=True)
class TeacherWriter(Writer):
    """Responses of a teacher that reads `context`, as rollouts of a student that reads only the prompt.

    They have no `sampler_logp`, because the student did not write them. The text of a teacher with another tokenizer is
    encoded again with the student's. A response ends with a token that ends the student's. `base` switches an adapter
    off. `led` puts a sampler into conversations with the stage's environment.
    """

    teacher: LanguageModel
    student: LanguageModel
    sampling: Sampling
    context: Context
    base: bool = False
    max_prompt_length: int | None = None
    led: Callable[[Sampler], Sampler] | None = None

    def __call__(self, prompts: Sequence[Prompt], *, seed: tuple[int, int]) -> list[Rollout]:
        written = self.own(prompts, seed=seed)
        return for_student(self.student, self.teacher, prompts, written, self.max_prompt_length)

    def own(self, prompts: Sequence[Prompt], *, seed: tuple[int, int]) -> list[Rollout]:
        """The same responses as the teacher writes them: in its tokens, with its end token, to what it reads."""
        bare = [_rollout(prompt, [], [], finished=True) for prompt in prompts]
        contexts = self.context(bare)
        off: Any = self.teacher.model.disable_adapter() if self.base else contextlib.nullcontext()  # type: ignore[operator]
        sampler: Sampler = TransformersSampler(lm=self.teacher, sampling=self.sampling)
        with off:
            return (sampler if self.led is None else self.led(sampler))(contexts, seed=seed)


KEPT_TOKENS = 1_000_000  # of responses of the data in memory, at most about 60 bytes each


@dataclass(slots=True, kw_only=True)
class ReferenceWriter(Writer):
    """The data's responses, ended as the student's end; of several turns the assistant's are trained.

    A response is rendered once, not in every epoch: in a stage of short conversations that is most of the time. The
    first `KEPT_TOKENS` tokens are kept.
    """

    student: LanguageModel
    max_prompt_length: int | None = None
    kept: dict[int, tuple[Prompt, Reference]] = field(default_factory=dict[int, "tuple[Prompt, Reference]"], init=False)
    kept_tokens: int = field(default=0, init=False)

    def __call__(self, prompts: Sequence[Prompt], *, seed: tuple[int, int]) -> list[Rollout]:
        read = render_checked(
            prompts,
            self.student.tokenizer,
            max_prompt_length=self.max_prompt_length,
            template_options=self.student.template_options,
        )
        responses = [self._reference(prompt) for prompt in prompts]
        self.student.check_ids(read, [response.ids for response in responses])
        longest = max((len(ids) + len(one.ids) - 1 for ids, one in zip(read, responses, strict=True)), default=0)
        self.student.check_length(longest, "Leave the longest responses of the data out, or use a model with more.")
        return [
            _of_reference(_rollout(prompt, ids, response.ids, finished=True), response, self.student.tokenizer)
            for prompt, ids, response in zip(prompts, read, responses, strict=True)
        ]

    def _reference(self, prompt: Prompt) -> Reference:
        """The data's response, as `reference_of`."""
        of, found = self.kept.get(prompt.id, (None, None))
        if found is not None and of is prompt:
            return found
        student = self.student
        found = reference_of(prompt, student.tokenizer, student.endings, student.template_options)
        if self.kept_tokens < KEPT_TOKENS:
            self.kept_tokens += len(found.ids)
            self.kept[prompt.id] = prompt, found
        return found


def for_student(
    student: LanguageModel,
    teacher: LanguageModel,
    prompts: Sequence[Prompt],
    written: Sequence[Rollout],
    max_prompt_length: int | None = None,
) -> list[Rollout]:
    """Responses of a teacher, equally many to each prompt, as rollouts of a student that reads the prompts.

    They have no `sampler_logp` and end as `TeacherWriter` says. Raises DataError for a prompt that is too long.
    """
    read = render_checked(
        prompts, student.tokenizer, max_prompt_length=max_prompt_length, template_options=student.template_options
    )
    each = len(written) // max(1, len(prompts))
    assert each * len(prompts) == len(written), f"{len(written)} responses to {len(prompts)} prompts"
    rollouts = [
        replace(
            rollout,
            prompt=prompts[i // each],
            prompt_ids=tuple(read[i // each]),
            sampler_logp=None,
            policy_logp=None,
            student_top_ids=None,
            student_entropy=None,
        )
        for i, rollout in enumerate(written)
    ]
    if same_ids(student, teacher):
        rollouts = [ended_as_by(student, teacher, rollout) for rollout in rollouts]
    else:
        rollouts = [in_tokens_of(student, rollout) for rollout in rollouts]
    student.check_ids(read, [rollout.response_ids.tolist() for rollout in rollouts])
    return rollouts


def in_tokens_of(student: LanguageModel, rollout: Rollout) -> Rollout:
    """The response in the student's tokens; without an end token if it was cut."""
    endings = student.endings
    end = endings.after(rollout.prompt)
    if rollout.text or end is None:  # without an end token, an error
        ids = encode_response(rollout.text, rollout.prompt, student.tokenizer, endings)
    else:
        ids = [end]
    ids = ids if rollout.finished or len(ids) == 1 else ids[:-1]
    n = len(ids)
    return replace(
        rollout,
        response_ids=torch.tensor(ids),
        trained=torch.ones(n, dtype=torch.bool),
        turn=torch.zeros(n, dtype=torch.long),
    )


def ended_as_by(student: LanguageModel, teacher: LanguageModel, rollout: Rollout) -> Rollout:
    """The response with the student's end token in place of the teacher's, if that one does not end the student's."""
    last, end = int(rollout.response_ids[-1]), student.endings.after(rollout.prompt)
    if end is None or last not in teacher.stop_ids - student.stop_ids:
        return rollout
    return replace(rollout, response_ids=torch.cat([rollout.response_ids[:-1], torch.tensor([end])]))


def _rollout(prompt: Prompt, prompt_ids: list[int], ids: list[int], *, finished: bool, text: str = "") -> Rollout:
    return Rollout(
        prompt=prompt,
        sample=0,
        prompt_ids=tuple(prompt_ids),
        response_ids=torch.tensor(ids, dtype=torch.long),
        trained=torch.ones(len(ids), dtype=torch.bool),
        turn=torch.zeros(len(ids), dtype=torch.long),
        finished=finished,
        text=text,
    )


def _of_reference(rollout: Rollout, response: Reference, tokenizer: Any) -> Rollout:
    """The rollout with the data's text, and with the turns of a response that has several."""
    prompt = rollout.prompt
    if not prompt.turns:
        return replace(rollout, text=prompt.response or "")
    own = torch.tensor(response.own)
    text = text_after(rollout.prompt_ids, response.ids[:-1], tokenizer)
    talk = Talk(heard=~own, last_text=prompt.response or "")
    return replace(rollout, text=text, trained=own, turn=torch.tensor(response.turn), talk=talk)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterByTask(Writer):
    """Passes each prompt to the writer of its task; responses come in the order of the prompts."""

    writers: Mapping[str | None, Writer]

    def __call__(self, prompts: Sequence[Prompt], *, seed: tuple[int, int]) -> list[Rollout]:
        return in_prompts_order(prompts, lambda task, mine: self.writers[task](mine, seed=seed))


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerByTask(Sampler):
    """Passes each prompt to the sampler of its task; responses come in the order of the prompts."""

    samplers: Mapping[str | None, Sampler]

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: tuple[int, int],
        record: Record = NOTHING_MORE,
        stop: EarlyStop | None = None,
    ) -> list[Rollout]:
        return in_prompts_order(
            prompts, lambda task, mine: self.samplers[task](mine, seed=seed, record=record, stop=stop)
        )

    def sync(self, version: int) -> None:
        """Call it on each."""
        for sampler in self.samplers.values():
            sampler.sync(version)

    def pop_requests(self) -> dict[str, float]:
        """Those of one: samplers on servers share them."""
        return next(iter(self.samplers.values())).pop_requests()


def in_prompts_order(
    prompts: Sequence[Prompt], write: Callable[[str | None, list[Prompt]], list[Rollout]]
) -> list[Rollout]:
    """`write(task, its prompts)` for each task of the prompts; the responses in the order of `prompts`."""
    return in_order([prompt.task for prompt in prompts], lambda task, own: write(task, [prompts[i] for i in own]))


def writer_by_task(writers: Mapping[str | None, Writer]) -> Writer:
    """One writer for all tasks of a stage; for a stage without tasks, its only writer."""
    return writers[None] if None in writers else WriterByTask(writers=writers)


def sampler_by_task(samplers: Mapping[str | None, Sampler]) -> Sampler:
    """One sampler for all tasks of a stage; for a stage without tasks, its only sampler."""
    return samplers[None] if None in samplers else SamplerByTask(samplers=samplers)
