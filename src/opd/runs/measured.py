"""What a model and a teacher read when they are measured, checked as `tokenizers` checks what a run's models read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd.evaluation.evaluate import HeldOut, kl_setting
from opd.models.language_model import LanguageModel, check_ids
from opd.models.preview import known_positions, known_rows, tokenizer_of
from opd.models.render import render_checked
from opd.models.vocabularies import check_same_tokens
from opd.recipe.schema import ModelSpec
from opd.runs.lengths import LengthCheck, refuse_if_too_long
from opd.runs.tokenizers import absent_tokens, check_differ, template_lines, unknown_in_prompts, unused_template
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


def check_measured(model: Reads, teachers: Sequence[Reads], exams: Mapping[str, HeldOut], *, chat: str) -> list[str]:
    """Render the held-out prompts for the model and the teachers, compare their tokens and lengths. Returns warnings.

    `exams` go by the start of their messages. The responses of `kl_setting` are those that a teacher reads. `chat`: how
    prompts become conversations.

    Raises DataError, ConfigError, or AlignmentError for tokenizers that cannot be compared.
    """
    prompts = [prompt for held_out in exams.values() for prompt in held_out.prompts]
    read: list[list[int]] = []
    for where, held_out in exams.items():
        own = model.rendered(held_out.prompts, held_out.max_prompt_length)
        check_room(model, held_out, list(map(len, own)), list(held_out.sampling), where, writes=True)
        read += own
    lines = [*model.lines(prompts), *unused_template(model.name, model.tokenizer, prompts, chat=chat)]
    lines += unknown_in_prompts(model.name, model.tokenizer, prompts, read, model.options)
    for teacher in teachers:
        check_same_tokens(model.tokenizer, teacher.tokenizer, (model.name, teacher.name))
        for where, held_out in exams.items():
            theirs = list(map(len, teacher.rendered(held_out.prompts, None)))
            check_room(teacher, held_out, theirs, [kl_setting(held_out.sampling)], where, writes=False)
        lines += teacher.lines(prompts)
    return lines


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
