"""Check sequence lengths against the models' positions before weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from opd.evaluation.evaluate import kl_setting
from opd.models.language_model import LanguageModel
from opd.models.positions import check_positions
from opd.models.preview import known_positions
from opd.models.render import render
from opd.pieces.contexts import same_prompt
from opd.pieces.needs import Input, Trait, needs_of
from opd.recipe.schema import Recipe, StageSpec, TaskSection, origin_of
from opd.types import Prompt, teachers_in

if TYPE_CHECKING:
    from opd.runs.prepare import Prepared


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthCheck:
    """One check: `model` reads prompts with responses of up to `tokens` tokens, a number set by the recipe's `key`.

    `writes`: the model writes the responses, so it never reads the last token.
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
    responses: Sequence[int],
    tokenizers: Mapping[str, Any],
    given: Mapping[str, LanguageModel],
) -> None:
    """Refuse responses too long for the positions of student or teacher. Raises DataError.

    `lengths`: those of `prepared.all_prompts` in the student's tokens. `responses`: those of the data's responses to
    the first of them, if a writer reads them. Models with an unknown number of positions pass.
    """
    known = {
        name: given[name].positions if name in given else known_positions(origin_of(recipe, name), name, tokenizer)
        for name, tokenizer in tokenizers.items()
    }
    if responses:
        read = [before + own - 1 for before, own in zip(lengths, responses, strict=False)]  # the last is not read
        room = known.get(spec.train, math.inf)
        check_positions(
            f"{spec.where(None)}: {spec.train}",
            max(read),
            room,
            f"{sum(n > room for n in read)} of {len(read)} responses of the data are too long with their prompts; the "
            f"longest is that to prompt {read.index(max(read))}. Leave them out, or use a model with more positions.",
        )
    for check in length_checks(spec, prepared, lengths):
        positions = known.get(check.model, math.inf)
        spare = positions + check.writes - check.tokens  # for the prompt
        if max(check.lengths) <= spare:
            continue
        own_lengths = check.lengths
        if check.model != spec.train:  # its template and special tokens may differ
            options = origin_of(recipe, check.model).template_options
            own_lengths = [len(render(prompt, tokenizers[check.model], options)) for prompt in check.prompts]
        refuse_if_too_long(check, own_lengths, positions)


def refuse_if_too_long(check: LengthCheck, lengths: Sequence[int], positions: float) -> None:
    """Raise DataError if the model has too few `positions`. `lengths`: of the prompts, in its own tokens."""
    spare = positions + check.writes - check.tokens  # for the prompt
    if max(lengths) <= spare:
        return
    over = sum(length > spare for length in lengths)
    extreme = f"even the shortest has {min(lengths)}" if over == len(lengths) else f"the longest has {max(lengths)}"
    room = int(positions) + check.writes - max(lengths)
    remedies = [f"Lower {check.key} to {room}"] if room > 0 else []
    remedies += ["leave out the longest prompts"] if over < len(lengths) or room <= 0 else []
    remedy = ", or ".join([*remedies, "use a model with more positions"])
    check_positions(
        f"{check.where}: {check.model}",
        max(lengths) + check.tokens - check.writes,
        positions,
        f"{over} of {len(lengths)} prompts are too long for responses of up to {check.tokens} tokens "
        f"({check.key}); {extreme}. {remedy[0].upper()}{remedy[1:]}.",
    )


def length_checks(spec: StageSpec, prepared: Prepared, lengths: Sequence[int]) -> Iterator[LengthCheck]:
    """All checks of a stage with known lengths.

    Left out: a teacher with its own tokenizer, or with a context other than the prompt.
    """
    method, remaining = prepared.method, iter(lengths)
    of_training = {name: list(islice(remaining, len(task.prompts))) for name, task in prepared.tasks.items()}
    needs = needs_of(method.source)
    student_writes = Trait.OFF_POLICY not in needs or needs.student_writes
    same = method.context is same_prompt() and method.teacher.tokenizer == "students"
    for name, part in spec.by_task.items():
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
            yield LengthCheck(model=spec.train, writes=True, **about)
            if same:
                yield from (LengthCheck(model=name, writes=False, **about) for name in teachers_in(scorer))
            if spec.base is not None:
                yield LengthCheck(model=spec.base, writes=False, **about)
        if Input.TEACHER_MODEL in needs and part.teacher is not None and method.teacher.tokenizer == "students":
            section = part.teacher_sampling or part.sampling
            yield LengthCheck(
                model=part.teacher,
                where=where,
                key=f"{'sampling' if part.teacher_sampling is None else 'teacher_sampling'}.max_completion_length",
                tokens=section.max_completion_length,
                prompts=prompts,
                lengths=of_training[name],
                writes=True,
            )
    for name, part in spec.by_task.items():
        held_out = prepared.tasks[name].held_out
        if part.evaluate is None or held_out is None:
            continue
        of_held_out = list(islice(remaining, len(held_out.prompts)))
        scorer = _scorer(spec, part, method.teacher.kind) or part.teacher
        compared = kl_setting(part.evaluate.sampling) if part.evaluate.kl and same else None
        for setting, section in part.evaluate.sampling.items():
            about = {
                "where": spec.where(name),
                "key": f"evaluate.sampling.{setting}.max_completion_length",
                "tokens": section.max_completion_length,
                "prompts": held_out.prompts,
                "lengths": of_held_out,
            }
            yield LengthCheck(model=spec.train, writes=True, **about)
            if same and part.evaluate.teacher:
                yield from (LengthCheck(model=name, writes=True, **about) for name in teachers_in(scorer))
            if setting == compared:
                yield from (LengthCheck(model=name, writes=False, **about) for name in teachers_in(scorer))


def _scorer(spec: StageSpec, part: TaskSection, kind: str) -> str | None:
    """The model of the method's teacher: the student itself, the task's `teacher`, or None."""
    if kind == "none":
        return None
    return part.teacher if kind == "external" else spec.train
