"""`opd eval`: evaluate one model on held-out prompts, with its exact divergence from a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from opd.data.prompts import load_selected
from opd.errors import ConfigError
from opd.evaluation.divergence import exact_divergence
from opd.evaluation.evaluate import HeldOut, measure, student_samplers
from opd.models.language_model import LanguageModel
from opd.models.loading import load_model
from opd.models.paths import resolved_path
from opd.models.vocabularies import on_common_tokens
from opd.pieces.contexts import same_prompt
from opd.recipe.load import parse_section
from opd.recipe.schema import DataSection, ModelSpec, RewardSection, SamplingSection
from opd.rewards.base import unfit_to_measure, unscored_answers, unscored_line
from opd.rewards.registry import reward_of
from opd.teachers.local import local_teacher
from opd.types import Sampling, TeacherRule


def evaluate_model(
    model: str,
    *,
    data: Mapping[str, Any],
    reward: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
    teacher: str | None = None,
    seed: int = 0,
    micro_batch_tokens: int = 4096,
    say: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """Evaluate the model at path `model` on held-out prompts; with `teacher`, also its exact divergence from it.

    `data`, `reward` and `sampling` are sections of a recipe. `say` receives the warnings about the data that
    `opd check` prints. Raises the errors of `opd.errors`.
    """
    section = parse_section(SamplingSection, sampling or {}, "sampling")
    settings = Sampling(**{**section.model_dump(), "stop": tuple(section.stop)})
    measured_by = None if reward is None else reward_of(parse_section(RewardSection, reward, "reward"))
    if measured_by is not None and (unfit := unfit_to_measure(measured_by)):
        raise ConfigError(f"The reward is {measured_by.name!r}, {unfit}. Use a reward that scores each response alone.")
    data_section = parse_section(DataSection, data, "data")
    prompts, reports = load_selected(data_section, require=[] if measured_by is None else sorted(measured_by.needs))
    for path, name, where in ((model, "model", "opd eval MODEL"), (teacher, "teacher", "opd eval --teacher")):
        if path is not None:
            resolved_path(ModelSpec(path=path), name, where)  # fails before loading and sampling
    if say is not None:
        for report in reports:
            say(str(report))
        if count := unscored_answers(prompts, frozenset(), measured_by):
            say(unscored_line(count, "held-out"))
    lm = load_model(ModelSpec(path=model), name="model", where="opd eval MODEL")
    others: dict[str, LanguageModel] = {}
    if teacher is not None:  # loaded first: the model is measured on the tokens that both have
        other = load_model(ModelSpec(path=teacher), name="teacher", where="opd eval --teacher")
        lm, others = on_common_tokens(lm, {"teacher": other})
    if say is not None:
        for note in (*lm.notes, *(note for other in others.values() for note in other.notes)):
            say(note)
    held_out = HeldOut(
        prompts=prompts,
        sampling={"sampled": settings},
        reward=measured_by,
        seed=seed,
        pass_at=[k for k in (1, 2, 4, 8, 16, 32, 64) if k <= settings.n],
        limited_by="--max-completion-length",
    )
    measured = measure(held_out, student_samplers(held_out, lm))
    metrics = {key.removeprefix("eval/sampled/"): value for key, value in measured.metrics.items()}
    for other in others.values():
        scorer = local_teacher(TeacherRule(kind="external"), lm, other, micro_batch_tokens=micro_batch_tokens)
        assert scorer is not None
        metrics |= exact_divergence(
            lm, scorer, measured.rollouts["sampled"], same_prompt(), micro_batch_tokens=micro_batch_tokens
        )
    return metrics
