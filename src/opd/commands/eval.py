"""`opd eval`: evaluate one model on held-out prompts, beside a teacher if one is given, and on tasks of lm-eval."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd.data.prompts import load_selected
from opd.errors import ConfigError
from opd.evaluation.divergence import exact_divergence
from opd.evaluation.evaluate import HeldOut, measure, student_samplers
from opd.evaluation.tasks import Tasks, load_tasks, run_tasks
from opd.files import expanded, unfit, write_atomically
from opd.models.language_model import LanguageModel
from opd.models.loading import load_model
from opd.models.paths import resolved_path
from opd.models.vocabularies import on_common_tokens
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
class Own:
    """What is measured on the user's own held-out prompts."""

    prompts: list[Prompt]
    sampling: Sampling
    reward: Reward | None
    notes: list[str]  # about the data


def evaluate_model(
    model: str,
    *,
    data: Mapping[str, Any] | None = None,
    reward: Mapping[str, Any] | None = None,
    tasks: Tasks | None = None,
    sampling: Mapping[str, Any] | None = None,
    teacher: str | None = None,
    seed: int = 0,
    micro_batch_tokens: int = 4096,
    say: Callable[[str], None] | None = None,
) -> Evaluated:
    """Evaluate the model at path `model` on held-out prompts, on tasks of lm-eval, or on both.

    With `teacher`, also its exact divergence from it on the held-out prompts. `data`, `reward` and `sampling` are
    sections of a recipe; of `sampling` the keys that are given take the place of a task's own settings. `say` receives
    the warnings about the data that `opd check` prints. Raises the errors of `opd.errors`.
    """
    say = say or _silent
    section = parse_section(SamplingSection, sampling or {}, "sampling")
    own = None if data is None else _own(data, reward, section)
    for path, name, where in ((model, "model", "opd eval MODEL"), (teacher, "teacher", "opd eval --teacher")):
        if path is not None:
            resolved_path(ModelSpec(path=path), name, where)  # fails before loading and sampling
    loaded = None if tasks is None else load_tasks(tasks)
    lm = load_model(ModelSpec(path=model), name="model", where="opd eval MODEL")
    others: dict[str, LanguageModel] = {}
    if teacher is not None:  # loaded first: the model is measured on the tokens that both have
        other = load_model(ModelSpec(path=teacher), name="teacher", where="opd eval --teacher")
        lm, others = on_common_tokens(lm, {"teacher": other})
    for note in (*(own.notes if own else ()), *lm.notes, *(note for other in others.values() for note in other.notes)):
        say(note)
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


def _silent(text: str) -> None:
    pass


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
    measured = measure(held_out, student_samplers(held_out, lm))
    found.metrics.update({key.removeprefix("eval/sampled/"): value for key, value in measured.metrics.items()})
    rollouts = measured.rollouts["sampled"]
    found.rows.extend(
        {
            "task": None,
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
    for other in others.values():
        scorer = local_teacher(TeacherRule(kind="external"), lm, other, micro_batch_tokens=tokens)
        assert scorer is not None
        found.metrics.update(exact_divergence(lm, scorer, rollouts, same_prompt(), micro_batch_tokens=tokens))


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


def refuse_combination(
    *,
    data: str | None,
    reward: str | None,
    options: Sequence[str] | None,
    tasks: Tasks,
    teacher: str | None,
    responses: str | None,
) -> None:
    """Raise ConfigError for options that say nothing together, and for a file that cannot be written."""
    if data is None and not tasks.names:
        raise ConfigError(
            "opd eval got neither held-out prompts nor --tasks. Give a file of prompts, or tasks of lm-eval, e.g. "
            "--tasks gsm8k."
        )
    if options and reward is None:
        raise ConfigError(
            f"opd eval got --option {' --option '.join(options)}, but options belong to a reward, and --reward is not "
            "given. Name it, e.g. --reward max_words, or leave --option out."
        )
    if reward is not None and data is None:
        raise ConfigError(
            f"opd eval got --reward {reward} without held-out prompts, and the tasks of lm-eval have metrics of their "
            "own. Give a file of prompts, or leave --reward out."
        )
    if teacher is not None and data is None:
        raise ConfigError(
            f"opd eval got --teacher {teacher} without held-out prompts, and the divergence from a teacher is measured "
            "on those. Give a file of prompts, or leave --teacher out."
        )
    for name, value in (("--fewshot", tasks.fewshot), ("--task-folder", tasks.folder)):
        if value is not None and not tasks.names:
            raise ConfigError(f"opd eval got {name} {value} without --tasks. Name the tasks, or leave {name} out.")
    if responses is not None and (why := unfit(expanded(responses))):
        raise ConfigError(f"--responses {responses} {why}. Give the path of a file in an existing folder.")
