"""Responses with what was read before them, and their per-token numbers, as rows of a Parquet file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opd.loss.step import PhaseA
from opd.messages import text_of
from opd.models.language_model import LanguageModel
from opd.models.render import render
from opd.models.shown import text_of_ids, token_texts
from opd.stage.images import box_of
from opd.stage.looks import numbers, own
from opd.types import Image, Prompt, Rollout


@dataclass(frozen=True, slots=True)
class Read:
    """What a teacher read before a response: the text with its special tokens, and the images."""

    text: str | None = None
    images: tuple[Image, ...] = ()


NOTHING = Read()


def sample_rows(
    rollouts: Sequence[Rollout],
    tokenizer: Any,
    *,
    teacher_reads: Sequence[Read],
    by_teacher: bool = False,
    extract: Callable[[Rollout], str | None] = lambda _: None,
    **columns: Any,
) -> list[dict[str, Any]]:
    """Rollouts as flat rows for a Parquet file. `tokenizer` is the student's; `teacher_reads` comes from `read_by`.

    `by_teacher`: a teacher wrote the responses, and the student reads nothing. `extract`: what the reward compared.
    """
    texts = {ids: text_of_ids(ids, tokenizer) for ids in {r.prompt_ids for r in rollouts}}
    responses = [r.response_ids.tolist() for r in rollouts]
    tokens = token_texts(responses, tokenizer)
    return [
        {
            **columns,
            "task": r.prompt.task,
            "prompt_id": r.prompt.id,
            "sample": r.sample,
            "part": r.part,
            "prompt": last_text(r.prompt),
            "prompt_messages": messages_text(r.prompt),
            "answer": answer_text(r.prompt.answer),
            "student_reads": None if by_teacher else texts[r.prompt_ids],
            "teacher_reads": teacher_reads[i].text,
            "images": None if by_teacher else r.prompt.images or None,
            "teacher_images": teacher_reads[i].images or None,
            "box": box_of(r.prompt),
            "response": r.text,
            "extracted": extract(r),
            "reward": r.reward,
            "finished": r.finished,
            "sampler_version": r.sampler_version,
            "response_ids": responses[i],
            "response_tokens": tokens[i],
            "trained": r.trained.tolist(),
            "turn": r.turn.tolist(),
            "turn_rewards": None if r.talk is None else list(r.talk.turn_rewards),
            "turn_errors": None if r.talk is None else list(r.talk.turn_errors),
            "conversation": counts_text(r),
            "sampler_logp": None if r.sampler_logp is None else r.sampler_logp.tolist(),
            "policy_logp": None if r.policy_logp is None else r.policy_logp.tolist(),
        }
        for i, r in enumerate(rollouts)
    ]


def rows_of(
    phase_a: PhaseA,
    tokenizer: Any,
    readers: Mapping[str | None, LanguageModel],
    extract: Callable[[Rollout], str | None] = lambda _: None,
) -> list[dict[str, Any]]:
    """The step's responses with their per-token numbers. `tokenizer` is the student's, `readers` as for `read_by`."""
    batch = phase_a.batch
    reads = read_by(readers, batch.rollouts, phase_a.contexts)
    rows = sample_rows(batch.rollouts, tokenizer, teacher_reads=reads, extract=extract)
    for i, row in enumerate(rows):
        t = len(batch.rollouts[i].response_ids)
        teacher_logp = batch.teacher_logp[i, :t]
        row["teacher_logp"] = numbers(own(teacher_logp, batch.rollouts[i]))
        row["signal"] = None if phase_a.signal is None else numbers(phase_a.signal[i, :t])
        row["weight"] = None if batch.weight is None else batch.weight[i, :t].tolist()
        row["advantage"] = None if batch.advantage is None else _first(batch.advantage[i, :t]).tolist()
    return rows


def _first(advantage: Tensor) -> Tensor:
    """The advantages of a response, [T]: the first number of each token, if there are several."""
    return advantage if advantage.dim() == 1 else advantage[:, 0]


def read_by(
    readers: Mapping[str | None, LanguageModel], rollouts: Sequence[Rollout], contexts: Sequence[Prompt]
) -> list[Read]:
    """What the teacher read before each response; `NOTHING` without a reader.

    `readers`: the teachers' models by `Prompt.teacher_id`. `contexts`: the method's, by rollout.
    """
    found: list[Read] = []
    before: tuple[Any, ...] | None = None
    for rollout, context in zip(rollouts, contexts, strict=True):
        lm = readers.get(rollout.prompt.teacher_id)
        shown = (context.content, context.images)
        rendered_from = (id(lm), *shown, context.prefill, context.tools, context.chat_template_kwargs)
        if lm is None:
            found.append(NOTHING)
        elif rendered_from == before:  # the responses of a group often have one context
            found.append(found[-1])
        else:
            ids = render(context, lm.tokenizer, lm.template_options)
            found.append(Read(text_of_ids(ids, lm.tokenizer), context.images))
        before = rendered_from
    return found


def messages_text(prompt: Prompt) -> str | None:
    """The conversation as JSON; None for a prompt that is a text."""
    if isinstance(prompt.content, str):
        return None
    return json.dumps([dict(message) for message in prompt.content], ensure_ascii=False, default=str)


def answer_text(answer: Any) -> str | None:
    """The answer of the data as a text, JSON where it is none."""
    return answer if answer is None or isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)


def counts_text(rollout: Rollout) -> str | None:
    """What happened in a conversation with an environment: its counts that are not 0, as JSON."""
    if rollout.talk is None:
        return None
    return json.dumps({name: number for name, number in rollout.talk.counts.items() if number})


def last_text(prompt: Prompt) -> str | None:
    """The text of the prompt, of a conversation that of its last message; None for a message without text."""
    if isinstance(prompt.content, str):
        return prompt.content
    return text_of(prompt.content[-1]["content"])
