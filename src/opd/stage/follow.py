"""The same few held-out prompts at every sample file: how the response to one prompt changes while a stage trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Any

from opd.evaluation.evaluate import student_samplers
from opd.models.language_model import LanguageModel
from opd.parallel import World
from opd.recipe.schema import SamplesSection
from opd.stage.exams import Exam
from opd.stage.looks import columns_or_note
from opd.stage.progress import Progress
from opd.stage.samples import NOTHING, read_by, sample_rows
from opd.types import Prompt, ReservedStep, Rollout, Sampler

LONGEST = 256  # tokens of a response: it is sampled one token after the other, beside the training


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """A prompt, its evaluation, and a greedy sampler of the student with the length of that evaluation."""

    prompt: Prompt
    exam: Exam
    sampler: Sampler


def prompts_to_follow(exams: Sequence[Exam], student: LanguageModel, count: int) -> list[Followed]:
    """The first held-out prompts, of several tasks in turn; none without held-out rows."""
    each: list[list[Followed]] = []
    for exam in exams:
        longest = max(exam.held_out.sampling.values(), key=lambda one: one.max_completion_length)
        limit = min(longest.max_completion_length, LONGEST)
        greedy = replace(longest, temperature=0.0, top_p=1.0, top_k=0, n=1, max_completion_length=limit)
        (sampler,) = student_samplers(replace(exam.held_out, sampling={"greedy": greedy}), student).values()
        each.append([Followed(prompt=prompt, exam=exam, sampler=sampler) for prompt in exam.held_out.prompts[:count]])
    mixed = chain.from_iterable(zip_longest(*each))
    return [one for one in mixed if one is not None][:count]


def rows_of_followed(
    followed: Sequence[Followed],
    student: LanguageModel,
    samples: SamplesSection,
    *,
    step: int,
    temperature: float,
    micro_batch_tokens: int,
    world: World,
    progress: Progress,
) -> list[dict[str, Any]]:
    """One row per prompt, on every process; each process samples some. They have no reward and are not trained on."""
    rows: list[dict[str, Any]] = []
    positions = world.positions(range(len(followed)))
    for exam in dict.fromkeys(id(followed[i].exam) for i in positions):
        own = [followed[i] for i in positions if id(followed[i].exam) == exam]
        own[0].sampler.sync(step)
        written = own[0].sampler([one.prompt for one in own], seed=(own[0].exam.held_out.seed, ReservedStep.FOLLOW))
        rows += _rows(own[0].exam, written, student, samples, temperature, micro_batch_tokens, progress)
    order = {(followed[i].prompt.task, followed[i].prompt.id): n for n, i in enumerate(positions)}
    rows.sort(key=lambda row: order[row["task"], row["prompt_id"]])
    return world.in_order(positions, rows)


def _rows(
    exam: Exam,
    written: list[Rollout],
    student: LanguageModel,
    samples: SamplesSection,
    temperature: float,
    micro_batch_tokens: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    reads = exam.reads_alone
    contexts = exam.context(written) if reads else [one.prompt for one in written]
    read = [NOTHING] * len(written)
    if reads and exam.reader is not None:
        read = read_by({one.prompt.teacher_id: exam.reader for one in written}, written, contexts)
    columns = columns_or_note(
        f"{'' if exam.task is None else exam.task + ', '}the prompts of `follow`",
        progress,
        student,
        exam.scorer if reads else None,
        written,
        contexts,
        k=samples.top_k,
        temperature=temperature,
        micro_batch_tokens=micro_batch_tokens,
        exact=True,
    )
    rows = sample_rows(written, student.tokenizer, teacher_reads=read, extract=exam.extracted)
    return [{**row, **more, "pick": "follow"} for row, more in zip(rows, columns, strict=True)]
