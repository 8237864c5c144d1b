"""`opd eval`: evaluate one model on held-out prompts, beside a teacher if one is given, and on tasks of lm-eval.

The prompts and settings are the user's own, or those of a recipe's stage.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from opd.data.prompts import load_selected
from opd.errors import ConfigError, nearest
from opd.evaluation.divergence import exact_divergence
from opd.evaluation.evaluate import HeldOut, kl_setting, measure, student_samplers
from opd.evaluation.tasks import Tasks, load_tasks, run_tasks
from opd.files import expanded, write_atomically
from opd.models.language_model import LanguageModel
from opd.models.loading import device_of, load_model
from opd.models.paths import resolved_path
from opd.models.vocabularies import on_common_tokens
from opd.pieces.contexts import same_prompt
from opd.recipe.load import parse_section
from opd.recipe.schema import DataSection, ModelSpec, Recipe, RewardSection, SamplingSection, StageSpec, section_of
from opd.rewards.base import check_readable, unfit_to_measure, unscored_answers, unscored_line
from opd.rewards.registry import reward_of
from opd.runs.prepare import prepare_held_out
from opd.teachers.local import local_teacher
from opd.types import Prompt, Reward, Rollout, Sampling, TeacherRule


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
    check_paths(model, teacher)
    loaded = None if tasks is None else load_tasks(tasks)
    lm, others = loaded_models(ModelSpec(path=model), teacher)
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


def evaluate_as_stage(
    model: str,
    recipe: Recipe,
    *,
    stage: str | None = None,
    limit: int | None = None,
    teacher: str | None = None,
    seed: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Evaluated:
    """Measure the model at path `model` as a stage of a recipe measures its student: `evaluate` of that stage.

    Prompts, environment, reward, sampling settings and random numbers are the stage's, so a model that the stage saved
    has the numbers of its last evaluation. The model has the template, data type and device of the recipe's student.
    Metrics are named SETTING/WHAT, with tasks TASK/SETTING/WHAT. `limit`: of the prompts of each task. `seed`: the
    default is the recipe's. With `teacher`, also the exact divergence from it, both models reading the same prompt.
    Raises the errors of `opd.errors`.
    """
    say = say or _silent
    spec = _measured_stage(recipe, stage)
    exams, notes = prepare_held_out(spec, recipe.seed if seed is None else seed)
    student = section_of(recipe, spec.train)
    device_of(student, f"models.{spec.train}")  # a wrong one is named by its key
    check_paths(model, teacher)
    lm, others = loaded_models(_as_student(student, model), teacher)
    for note in (*notes, *lm.notes, *(note for other in others.values() for note in other.notes)):
        say(note)
    found = Evaluated(metrics={}, rows=[])
    for task, held_out in exams.items():
        some = replace(held_out, prompts=held_out.prompts[:limit])
        _add(some, lm, others, spec.micro_batch_tokens, found, task=task)
    return found


def _measured_stage(recipe: Recipe, name: str | None) -> StageSpec:
    """The stage of this name; default: the last that evaluates. Raises ConfigError."""
    known = {stage.name: stage for stage in recipe.stages}
    able = [stage.name for stage in recipe.stages if any(part.evaluate for part in stage.by_task.values())]
    if name is not None and name not in known:
        raise ConfigError(
            f"opd eval got --stage {name}, and the recipe has no such stage.{nearest(name, known)} It has "
            f"{', '.join(known)}."
        )
    if not able or (name is not None and name not in able):
        what = "no stage of this one has an" if name is None else f"stage {name!r} has no"
        raise ConfigError(
            f"opd eval measures a model as a stage of the recipe does, and {what} `evaluate` section. "
            + (f"Stages with one: {', '.join(able)}." if able else "Add one, or give DATA and --reward instead.")
        )
    return known[able[-1] if name is None else name]


def _as_student(student: ModelSpec, path: str) -> ModelSpec:
    """The recipe's student with the weights and the tokenizer of `path`."""
    kept = ("dtype", "autocast", "device", "attn_implementation", "trust_remote_code", "chat_template")
    return ModelSpec(
        path=path, template_options=student.template_options, **{name: getattr(student, name) for name in kept}
    )


def check_paths(model: str, teacher: str | None) -> None:
    """Raise ConfigError or DataError for paths without a model, before anything is loaded or sampled."""
    for path, name, where in ((model, "model", "opd eval MODEL"), (teacher, "teacher", "opd eval --teacher")):
        if path is not None:
            resolved_path(ModelSpec(path=path), name, where)


def loaded_models(model: ModelSpec, teacher: str | None) -> tuple[LanguageModel, dict[str, LanguageModel]]:
    """The model, and the teacher by name if there is one; the model is measured on the tokens that both have."""
    lm = load_model(model, name="model", where="opd eval MODEL")
    if teacher is None:
        return lm, {}
    other = load_model(ModelSpec(path=teacher), name="teacher", where="opd eval --teacher")
    return on_common_tokens(lm, {"teacher": other})


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
    _add(held_out, lm, others, tokens, found, prefix="eval/sampled/")


def _add(
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
                "tokens": len(one.own_ids),
                "finished": one.finished,
                "metrics": {} if one.reward is None else {"reward": one.reward},
                **({} if one.talk is None else {"turns": turns_of(one, lm.tokenizer)}),
            }
            for one in rollouts
        )
    compared = measured.rollouts[kl_setting(held_out.sampling)]
    for other in others.values():
        scorer = local_teacher(TeacherRule(kind="external"), lm, other, micro_batch_tokens=tokens)
        assert scorer is not None
        divergences = exact_divergence(lm, scorer, compared, same_prompt(), micro_batch_tokens=tokens)
        found.metrics.update({f"{label}{name}": value for name, value in divergences.items()})


def turns_of(rollout: Rollout, tokenizer: Any) -> list[dict[str, Any]]:
    """The turns of a conversation: the texts that the environment and the student wrote, the reward, failed calls."""
    assert rollout.talk is not None
    by_turn = zip(rollout.talk.turn_rewards, rollout.talk.turn_errors, strict=True)

    def text(turn: int, *, heard: bool) -> str:
        assert rollout.talk is not None
        return tokenizer.decode(rollout.response_ids[(rollout.turn == turn) & (rollout.talk.heard == heard)].tolist())

    return [
        {"environment": text(i, heard=True), "student": text(i, heard=False), "reward": reward, "errors": errors}
        for i, (reward, errors) in enumerate(by_turn)
    ]


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
