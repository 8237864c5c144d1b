"""What can be known, before any weight is loaded, of what models read: how long it gets, and through which template."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from opd.models.language_model import LanguageModel, check_positions
from opd.models.preview import known_positions
from opd.models.render import render
from opd.pieces.contexts import same_prompt
from opd.pieces.needs import Input, Trait, needs_of
from opd.recipe.schema import Recipe, SamplingSection, StageSpec, TaskSection, origin_of
from opd.types import Prompt

if TYPE_CHECKING:
    from opd.runs.prepare import Prepared


# --- how long it gets ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A model that reads prompts with responses of up to `tokens` tokens; `key` of the recipe sets that number.

    `writes`: it writes them, so that it never reads the last token.
    """

    model: str
    where: str
    key: str
    tokens: int
    prompts: Sequence[Prompt]
    lengths: Sequence[int]  # of the prompts, in the student's tokens
    writes: bool


def check_lengths(
    recipe: Recipe,
    spec: StageSpec,
    prepared: Prepared,
    lengths: Sequence[int],
    tokenizers: Mapping[str, Any],
    given: Mapping[str, LanguageModel],
) -> None:
    """Refuse responses that student or teacher would have no positions for. Raises DataError.

    `lengths` are those of `prepared.all_prompts` in the student's tokens. What cannot be known without weights passes.
    """
    known = {
        name: given[name].positions if name in given else known_positions(origin_of(recipe, name), name, tokenizer)
        for name, tokenizer in tokenizers.items()
    }
    for reading in readings(spec, prepared, lengths):
        positions = known.get(reading.model, math.inf)
        spare = positions + reading.writes - reading.tokens  # for a prompt
        if max(reading.lengths) <= spare:
            continue
        read = reading.lengths
        if reading.model != spec.train:  # its template and special tokens may be others
            options = origin_of(recipe, reading.model).template_options
            read = [len(render(prompt, tokenizers[reading.model], options)) for prompt in reading.prompts]
        _check_room(reading, read, positions, spare)


def _check_room(reading: Reading, lengths: Sequence[int], positions: float, spare: float) -> None:
    over = sum(length > spare for length in lengths)
    who = f"even the shortest has {min(lengths)}" if over == len(lengths) else f"the longest has {max(lengths)}"
    room = int(positions) + reading.writes - max(lengths)
    remedies = [f"Lower {reading.key} to {room}"] if room > 0 else []
    remedies += ["leave out the longest prompts"] if over < len(lengths) or room <= 0 else []
    remedy = ", or ".join([*remedies, "use a model that knows more positions"])
    check_positions(
        f"{reading.where}: {reading.model}",
        max(lengths) + reading.tokens - reading.writes,
        positions,
        f"{over} of {len(lengths)} prompts are too long for responses of up to {reading.tokens} tokens "
        f"({reading.key}); {who}. {remedy[0].upper()}{remedy[1:]}.",
    )


def readings(spec: StageSpec, prepared: Prepared, lengths: Sequence[int]) -> Iterator[Reading]:
    """Who reads which prompts with how long responses, as far as that is certain.

    A teacher that reads something other than the prompt, or in other tokens, is left out.
    """
    method, left = prepared.method, iter(lengths)
    of_training = {name: list(islice(left, len(task.prompts))) for name, task in prepared.tasks.items()}
    needs = needs_of(method.source)
    student_writes = Trait.OFF_POLICY not in needs or needs.student_writes
    same = method.context is same_prompt() and method.teacher.tokenizer == "students"
    for name, part in spec.parts.items():
        prompts, where = prepared.tasks[name].prompts, spec.where(name)
        scorer = _scorer(spec, part, method.teacher.kind)
        if student_writes:
            tokens = min(part.sampling.max_completion_length, needs.response_tokens or math.inf)
            about: dict[str, Any] = {
                "where": where,
                "key": "sampling.max_completion_length",
                "tokens": int(tokens),
                "prompts": prompts,
                "lengths": of_training[name],
            }
            yield Reading(model=spec.train, writes=True, **about)
            if same and scorer is not None:
                yield Reading(model=scorer, writes=False, **about)
        if Input.TEACHER_MODEL in needs and part.teacher is not None and method.teacher.tokenizer == "students":
            section = part.teacher_sampling or part.sampling
            yield Reading(
                model=part.teacher,
                where=where,
                key=f"{'sampling' if part.teacher_sampling is None else 'teacher_sampling'}.max_completion_length",
                tokens=section.max_completion_length,
                prompts=prompts,
                lengths=of_training[name],
                writes=True,
            )
    for name, part in spec.parts.items():
        held_out = prepared.tasks[name].held_out
        if part.evaluate is None or held_out is None:
            continue
        of_held_out = list(islice(left, len(held_out.prompts)))
        scorer = _scorer(spec, part, method.teacher.kind) or part.teacher
        compared = drawn(part.evaluate.sampling) if part.evaluate.kl and same else None
        for setting, section in part.evaluate.sampling.items():
            about = {
                "where": spec.where(name),
                "key": f"evaluate.sampling.{setting}.max_completion_length",
                "tokens": section.max_completion_length,
                "prompts": held_out.prompts,
                "lengths": of_held_out,
            }
            yield Reading(model=spec.train, writes=True, **about)
            if same and scorer is not None and part.evaluate.teacher:
                yield Reading(model=scorer, writes=True, **about)
            if scorer is not None and setting == compared:
                yield Reading(model=scorer, writes=False, **about)


def _scorer(spec: StageSpec, part: TaskSection, kind: str) -> str | None:
    """The model behind a method's teacher: the student itself, the one that a task names, or none."""
    if kind == "none":
        return None
    return part.teacher if kind == "external" else spec.train


def drawn(sampling: Mapping[str, SamplingSection]) -> str:
    """Of which setting's responses an evaluation takes the divergence, as `held_out.Exam.drawn` does."""
    return next((name for name, section in sampling.items() if section.temperature > 0), next(iter(sampling)))
