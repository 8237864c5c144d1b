"""`opd eval`: evaluate one model on held-out prompts, beside a teacher if one is given, and on tasks of lm-eval.

The prompts and settings are the user's own; `eval_stage` measures as a recipe's stage does.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
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
from opd.runs.measured import Reads, check_measured
from opd.teachers.local import local_teacher
from opd.types import Prompt, Reward, Rollout, Sampling, TeacherRule


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
class Read:
    """A model, the settings of its section, and the name of its chat template in remedies."""

    subject: Subject
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    template: str = "the chat template of its tokenizer"

    def load(self) -> LanguageModel:
        return self.subject.load(**self.settings)

    def before(self, loaded: LanguageModel | None) -> Reads | None:
        """How the model reads; None for one that is not `loaded` and has its tokenizer with its weights."""
        if loaded is not None:
            return Reads.of(loaded, self.template)
        spec = ModelSpec(path=self.subject.path, **self.settings)
        return Reads.before(spec, self.subject.name, self.subject.where, self.template)


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """What is measured on the user's own held-out prompts."""

    prompts: list[Prompt]
    sampling: Sampling
    reward: Reward | None
    notes: list[str]  # about the data

    def held_out(self, seed: int, limited_by: str) -> HeldOut:
        """The evaluation; `limited_by` names what limits the length of a response."""
        return HeldOut(
            prompts=self.prompts,
            sampling={"sampled": self.sampling},
            reward=self.reward,
            seed=seed,
            pass_at=[k for k in (1, 2, 4, 8, 16, 32, 64) if k <= self.sampling.n],
            limited_by=limited_by,
        )


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
    read, beside = Read(subject=model), None if teacher is None else Read(subject=teacher)
    for one in (model, teacher):
        if one is not None:
            one.check()
    loaded = None if tasks is None else load_tasks(tasks)
    if own is not None:
        found, lm = measured(own, read, beside, seed=seed, tokens=micro_batch_tokens, say=say)
    else:
        found = Evaluated(metrics={}, rows=[])
        lm, others, _ = loaded_models(read, beside, {}, chat="")
        tell(say, [], lm, others)
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
    model: Read, teacher: Read | None, exams: Mapping[str, HeldOut], *, chat: str
) -> tuple[LanguageModel, dict[str, LanguageModel], list[str]]:
    """(the model, the teacher by name if there is one, warnings); the model is measured on the tokens that both have.

    What both read in the `exams` is checked by `check_measured`, before weights are loaded, except for a model whose
    tokenizer comes with them. Raises the errors of that and of `load_model`.
    """
    both = [model] if teacher is None else [model, teacher]
    for one in both:
        one.subject.check()
    objects = {one.subject.name: one.load() for one in both if one.subject.path is None}
    known = [one.before(objects.get(one.subject.name)) for one in both] if exams else []
    early = [one for one in known if one is not None]
    notes = check_measured(early[0], early[1:], exams, chat=chat) if exams and len(early) == len(both) else []
    loaded = [objects.get(one.subject.name) or one.load() for one in both]
    if len(early) < len(known):
        late = [Reads.of(lm, one.template) for lm, one in zip(loaded, both, strict=True)]
        notes = check_measured(late[0], late[1:], exams, chat=chat)
    if teacher is None:
        return loaded[0], {}, notes
    return *on_common_tokens(loaded[0], {teacher.subject.name: loaded[1]}), notes


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


def measured(
    own: Own,
    model: Read,
    teacher: Read | None,
    *,
    seed: int,
    tokens: int = 4096,
    say: Callable[[str], None],
    chat: str = "add --chat",
    limited_by: str = "--max-completion-length",
) -> tuple[Evaluated, LanguageModel]:
    """The numbers and responses on the user's own prompts, and the model; `tokens`: of a forward pass.

    In remedies `chat` says how prompts become conversations, and `limited_by` names what limits the length of a
    response. Raises as `loaded_models`.
    """
    held_out = own.held_out(seed, limited_by)
    lm, others, notes = loaded_models(model, teacher, {"The held-out prompts": held_out}, chat=chat)
    tell(say, [*own.notes, *notes], lm, others)
    found = Evaluated(metrics={}, rows=[])
    add(held_out, lm, others, tokens, found, prefix="eval/sampled/")
    return found, lm


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
