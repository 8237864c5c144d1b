"""`opd eval`: evaluate one model on held-out prompts, beside a teacher if one is given, and on tasks of lm-eval.

The prompts and settings are the user's own; `eval_stage` measures as a recipe's stage does.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.data.prompts import load_selected
from opd.errors import ConfigError
from opd.evaluation.divergence import exact_divergence
from opd.evaluation.evaluate import HeldOut, kl_setting, measure, student_samplers
from opd.evaluation.tasks import Tasks, load_tasks, run_tasks
from opd.files import expanded, write_atomically
from opd.models.language_model import LanguageModel
from opd.models.loading import load_model
from opd.models.paths import resolved_path
from opd.models.vocabularies import on_common_tokens
from opd.models.wrapping import wrap
from opd.pieces.contexts import same_prompt
from opd.recipe.load import parse_section
from opd.recipe.schema import DataSection, ModelSpec, RewardSection, SamplingSection
from opd.rewards.base import check_readable, unfit_to_measure, unscored_answers, unscored_line
from opd.rewards.registry import reward_of
from opd.teachers.local import local_teacher
from opd.types import Prompt, Reward, Sampling, TeacherRule


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """`metrics` by name, and `rows`, one per response (of tasks without responses one per prompt), for a file."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to measure, or the teacher beside it: `given` is a path, or a model object with its `tokenizer`."""

    name: str
    given: Any
    where: str  # the name of the path in messages
    tokenizer: Any = None

    @property
    def path(self) -> str | None:
        """None for an object."""
        return str(self.given) if isinstance(self.given, str | Path) else None

    def check(self) -> None:
        """Raise ConfigError or DataError for a path without a model, before anything is loaded or sampled."""
        if self.path is not None:
            resolved_path(ModelSpec(path=self.path), self.name, self.where)

    def load(self, **settings: Any) -> LanguageModel:
        """The model, with these `settings` of a section.

        Of them an object has the chat template, its options and autocast; its weights stay as and where they are.
        Raises the errors of `load_model`.
        """
        if self.path is not None:
            return load_model(ModelSpec(path=self.path, **settings), name=self.name, where=self.where)
        tokenizer, template = self.tokenizer, settings.get("chat_template")
        if tokenizer is not None and template is not None:
            tokenizer = copy.deepcopy(tokenizer)  # the caller's keeps its own template
            tokenizer.chat_template = template
        read = {key: settings[key] for key in ("template_options", "autocast") if key in settings}
        return wrap(self.given, tokenizer, name=self.name, **read)


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """What is measured on the user's own held-out prompts."""

    prompts: list[Prompt]
    sampling: Sampling
    reward: Reward | None
    notes: list[str]  # about the data


def silent(text: str) -> None:
    """Says nothing."""


def evaluate_model(
    model: Subject,
    *,
    data: Mapping[str, Any] | None = None,
    reward: Mapping[str, Any] | None = None,
    tasks: Tasks | None = None,
    sampling: Mapping[str, Any] | None = None,
    teacher: Subject | None = None,
    seed: int = 0,
    micro_batch_tokens: int = 4096,
    say: Callable[[str], None] = silent,
) -> Evaluated:
    """Evaluate a model on held-out prompts, on tasks of lm-eval, or on both.

    With `teacher`, also its exact divergence from it on the held-out prompts. `data`, `reward` and `sampling` are
    sections of a recipe; of `sampling` the keys that are given take the place of a task's own settings. `say` receives
    the warnings about the data that `opd check` prints. Raises the errors of `opd.errors`.
    """
    section = parse_section(SamplingSection, sampling or {}, "sampling")
    own = None if data is None else _own(data, reward, section)
    for one in (model, teacher):
        if one is not None:
            one.check()
    loaded = None if tasks is None else load_tasks(tasks)
    lm, others = loaded_models(model, teacher)
    tell(say, own.notes if own else (), lm, others)
    found = Evaluated(metrics={}, rows=[])
    if own is not None:
        _measure(own, lm, others, seed, micro_batch_tokens, found)
    if tasks is not None and loaded is not None:
        from opd.evaluation.harness import HarnessModel, Override

        given = {key: getattr(section, key) for key in section.model_fields_set & Override.__dataclass_fields__.keys()}
        results = run_tasks(tasks, loaded, HarnessModel(lm, Override(**given), seed, micro_batch_tokens))
        found.metrics.update(results.metrics)
        found.rows.extend(results.rows)
    return found


def tell(
    say: Callable[[str], None], notes: Iterable[str], lm: LanguageModel, others: Mapping[str, LanguageModel]
) -> None:
    """Say each of the notes once: these, and those of the models."""
    for note in dict.fromkeys([*notes, *(note for one in (lm, *others.values()) for note in one.notes)]):
        say(note)


def loaded_models(
    model: Subject, teacher: Subject | None, settings: Mapping[str, Any] = {}, of_teacher: Mapping[str, Any] = {}
) -> tuple[LanguageModel, dict[str, LanguageModel]]:
    """The model, and the teacher by name if there is one; the model is measured on the tokens that both have.

    `settings` and `of_teacher` are of their sections.
    """
    lm = model.load(**settings)
    return (lm, {}) if teacher is None else on_common_tokens(lm, {teacher.name: teacher.load(**of_teacher)})


def _own(data: Mapping[str, Any], reward: Mapping[str, Any] | None, section: SamplingSection) -> Own:
    """The held-out prompts and their reward, with notes about them."""
    measured_by = None if reward is None else reward_of(parse_section(RewardSection, reward, "reward"))
    data_section = parse_section(DataSection, data, "data")
    needs = [] if measured_by is None else sorted(measured_by.needs)
    prompts, reports = load_selected(data_section, require=needs)
    return own_of(prompts, measured_by, section, [str(report) for report in reports])


def own_of(prompts: list[Prompt], reward: Reward | None, section: SamplingSection, notes: list[str]) -> Own:
    """Held-out prompts, their reward and how responses are drawn. Raises ConfigError for a reward of groups or judges.

    Raises DataError for rows that the reward cannot read.
    """
    if reward is not None and (why := unfit_to_measure(reward)):
        raise ConfigError(f"The reward is {reward.name!r}, {why}. Use a reward that scores each response alone.")
    check_readable(reward, prompts, "The held-out prompts")
    if count := unscored_answers(prompts, frozenset(), reward):
        notes = [*notes, unscored_line(count, "held-out")]
    settings = Sampling(**{**section.model_dump(), "stop": tuple(section.stop)})
    return Own(prompts=prompts, sampling=settings, reward=reward, notes=notes)


def measured(own: Own, lm: LanguageModel, others: Mapping[str, LanguageModel], seed: int, tokens: int) -> Evaluated:
    """The numbers and responses of a model on the user's own prompts; `tokens`: of a forward pass."""
    found = Evaluated(metrics={}, rows=[])
    _measure(own, lm, others, seed, tokens, found)
    return found


def _measure(
    own: Own, lm: LanguageModel, others: Mapping[str, LanguageModel], seed: int, tokens: int, found: Evaluated
) -> None:
    """Add the numbers and responses of the user's own prompts."""
    held_out = HeldOut(
        prompts=own.prompts,
        sampling={"sampled": own.sampling},
        reward=own.reward,
        seed=seed,
        pass_at=[k for k in (1, 2, 4, 8, 16, 32, 64) if k <= own.sampling.n],
        limited_by="--max-completion-length",
    )
    add(held_out, lm, others, tokens, found, prefix="eval/sampled/")


def add(
    held_out: HeldOut,
    lm: LanguageModel,
    others: Mapping[str, LanguageModel],
    tokens: int,
    found: Evaluated,
    *,
    task: str | None = None,
    prefix: str = "eval/",
) -> None:
    """Add the numbers, whose names lose `prefix`, and the responses of an evaluation."""
    measured = measure(held_out, student_samplers(held_out, lm))
    label = "" if task is None else f"{task}/"
    found.metrics.update({f"{label}{key.removeprefix(prefix)}": value for key, value in measured.metrics.items()})
    for setting, rollouts in measured.rollouts.items():
        found.rows.extend(
            {
                "task": task,
                "setting": setting,
                "prompt_id": one.prompt.id,
                "sample": one.sample,
                "prompt": one.prompt.content,
                "target": one.prompt.answer,
                "response": one.text,
                "tokens": len(one.response_ids),
                "finished": one.finished,
                "metrics": {} if one.reward is None else {"reward": one.reward},
            }
            for one in rollouts
        )
    compared = measured.rollouts[kl_setting(held_out.sampling)]
    for other in others.values():
        scorer = local_teacher(TeacherRule(kind="external"), lm, other, micro_batch_tokens=tokens)
        assert scorer is not None
        divergences = exact_divergence(lm, scorer, compared, same_prompt(), micro_batch_tokens=tokens)
        found.metrics.update({f"{label}{name}": value for name, value in divergences.items()})


def output(found: Evaluated, model: str, *, as_json: bool, responses: str | None) -> list[str]:
    """The lines to print: one per number, or JSON, where a number that is not finite is null.

    With `responses` the rows are also written to that file, as JSON lines. Raises RunError when it cannot be written.
    """
    if responses is not None:
        lines = (json.dumps(row, ensure_ascii=False, default=str) for row in found.rows)
        write_atomically(expanded(responses), "".join(f"{line}\n" for line in lines))
    if not as_json:
        return [f"{name:24} {value:.4g}" for name, value in found.metrics.items()]
    finite = {name: value if math.isfinite(value) else None for name, value in found.metrics.items()}
    return [json.dumps({"model": model, "metrics": finite}, indent=1)]
