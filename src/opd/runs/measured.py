"""What a model and a teacher read as a stage's evaluation measures them, checked as `tokenizers` checks a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from opd.evaluation.evaluate import HeldOut, kl_setting
from opd.models.language_model import LanguageModel, check_ids
from opd.models.preview import known_positions, known_rows, tokenizer_of
from opd.models.render import render_checked
from opd.models.vocabularies import check_same_tokens
from opd.recipe.schema import ModelSpec, StageSpec
from opd.runs.lengths import LengthCheck, refuse_if_too_long
from opd.runs.tokenizers import absent_tokens, check_differ, template_lines, unused_template
from opd.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """How a model reads: `template` names its chat template in remedies, `options` are those of the template."""

    name: str
    template: str
    tokenizer: Any
    options: Mapping[str, Any]
    rows: float  # of its layers; infinite if its config does not say
    positions: float  # likewise

    @classmethod
    def of(cls, lm: LanguageModel, template: str) -> Reads:
        """That of a loaded model."""
        return cls(
            name=lm.name,
            template=template,
            tokenizer=lm.tokenizer,
            options=lm.template_options,
            rows=lm.rows,
            positions=lm.positions,
        )

    @classmethod
    def before(cls, spec: ModelSpec, name: str, where: str, template: str) -> Reads | None:
        """That of a model whose weights are not loaded; None if its tokenizer comes with them.

        `where` names its path in messages. Raises ConfigError for a tokenizer that cannot be loaded.
        """
        tokenizer = tokenizer_of(spec, name, where)
        if tokenizer is None:
            return None
        return cls(
            name=name,
            template=template,
            tokenizer=tokenizer,
            options=spec.template_options,
            rows=known_rows(spec, name, tokenizer),
            positions=known_positions(spec, name, tokenizer),
        )

    def rendered(self, prompts: Sequence[Prompt], limit: int | None) -> list[list[int]]:
        """The ids of the prompts, checked; at most `limit` tokens each. Raises ConfigError or DataError."""
        ids = render_checked(prompts, self.tokenizer, max_prompt_length=limit, template_options=self.options)
        check_ids(self.name, self.tokenizer, ids, self.rows, "prompt")
        check_differ(self.name, prompts, ids, template=self.template)
        return ids

    def lines(self, prompts: Sequence[Prompt]) -> list[str]:
        """Warnings about tokens that the model lacks, and about what its template does with the prompts."""
        return [
            *absent_tokens(self.name, self.tokenizer, self.rows),
            *template_lines(self.name, self.tokenizer, prompts, self.options, template=self.template),
        ]


def check_measured(
    model: Reads, teachers: Sequence[Reads], spec: StageSpec, exams: Mapping[str | None, HeldOut]
) -> list[str]:
    """Render the held-out prompts for the model and the teachers, compare their tokens and lengths. Returns warnings.

    The responses of `kl_setting` are those that a teacher reads.

    Raises DataError, ConfigError, or AlignmentError for tokenizers that cannot be compared.
    """
    prompts = [prompt for held_out in exams.values() for prompt in held_out.prompts]
    own = _by_exam(model.rendered(prompts, spec.max_prompt_length), exams)
    lines = [*model.lines(prompts), *unused_template(model.name, model.tokenizer, prompts)]
    for task, held_out in exams.items():
        check_room(model, held_out, own[task], list(held_out.sampling), spec.where(task), writes=True)
    for teacher in teachers:
        check_same_tokens(model.tokenizer, teacher.tokenizer, (model.name, teacher.name))
        theirs = _by_exam(teacher.rendered(prompts, None), exams)
        lines += teacher.lines(prompts)
        for task, held_out in exams.items():
            compared = [kl_setting(held_out.sampling)]
            check_room(teacher, held_out, theirs[task], compared, spec.where(task), writes=False)
    return lines


def _by_exam(ids: Sequence[Sequence[int]], exams: Mapping[str | None, HeldOut]) -> dict[str | None, list[int]]:
    """The lengths of the rendered prompts of all evaluations, in order, by task."""
    lengths = map(len, ids)
    return {task: list(islice(lengths, len(held_out.prompts))) for task, held_out in exams.items()}


def check_room(
    model: Reads, held_out: HeldOut, lengths: Sequence[int], settings: Sequence[str], where: str, *, writes: bool
) -> None:
    """Refuse responses of the `settings` too long for the model's positions behind prompts of these `lengths`.

    Raises DataError.
    """
    for setting in settings:
        check = LengthCheck(
            model=model.name,
            where=where,
            key=held_out.limited_by.format(setting=setting),
            tokens=held_out.sampling[setting].max_completion_length,
            prompts=held_out.prompts,
            lengths=lengths,
            writes=writes,
        )
        refuse_if_too_long(check, lengths, model.positions)
