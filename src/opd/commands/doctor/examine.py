"""All checks of one stage, in order: a later check needs the results of earlier ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from opd.commands.doctor import (
    bias,
    cliff,
    conversations,
    cost,
    engine,
    headroom,
    information,
    reward,
    signal,
    special_tokens,
    tokenizers,
)
from opd.commands.doctor.findings import Finding, Report, skipped
from opd.commands.doctor.subject import Subject, check_loadable, load, stage_to_examine, subject_of
from opd.errors import ConfigError
from opd.messages import is_chat
from opd.models.alignment import pair_of
from opd.models.language_model import LanguageModel
from opd.models.preview import tokenizer_of
from opd.recipe.schema import Recipe, StageSpec, origin_of
from opd.runs.build import comparable
from opd.runs.prepare import Given, Prepared, prepare
from opd.runs.same_model import check_base_weights
from opd.runs.talks import check_talks
from opd.runs.tokenizers import check_tokenizers


def examine(
    recipe: Recipe,
    *,
    stage: str | None = None,
    task: str | None = None,
    prompts: int = 16,
    seed: int | None = None,
    given: Given | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Will this teacher teach this student? Examines one stage before its first step; no weight is changed.

    `stage`: default the first with a teacher (the student itself counts). `task`: one of the stage's tasks. `prompts`:
    number of its prompts to sample. `seed`: default the recipe's. `say` receives the name of the current check. Raises
    what `opd check` raises, and ConfigError for a stage without a teacher or with models from an unfinished stage.
    """
    if prompts < 1:
        raise ConfigError(f"opd doctor examines a sample of at least 1 prompt; got --prompts {prompts}.")
    started, given = time.perf_counter(), given or Given()
    seed = recipe.seed if seed is None else seed
    spec = stage_to_examine(recipe, stage, given, task)
    check_loadable(recipe, spec)
    prepared = prepare(spec, given, recipe.seed)
    say("the reward")
    audited = reward.reward_audit(spec, prepared.tasks[None])
    return Report(
        recipe=recipe.name,
        stage=spec.name if task is None else f"{spec.name}, task {task}",
        prompts=min(prompts, len(prepared.tasks[None].prompts)),
        seed=seed,
        findings=(audited, *findings(recipe, spec, prepared, given, prompts, seed, say)),
        seconds=time.perf_counter() - started,
    )


def findings(
    recipe: Recipe,
    spec: StageSpec,
    prepared: Prepared,
    given: Given,
    prompts: int,
    seed: int,
    say: Callable[[str], None],
) -> list[Finding]:
    """The findings of all checks. If the tokenizers differ and load without weights, no weight is loaded."""
    say("tokenizers")
    if prepared.method.teacher.tokenizer == "any":
        return of_two_tokenizers(recipe, spec, prepared, given, prompts, seed, say)
    found = map_without_weights(recipe, spec, given)
    student: LanguageModel | None = None
    externals: dict[str, LanguageModel] = {}
    if not found:
        check_tokenizers(recipe, spec, prepared, given.models)
        say("models")
        student, externals = load(recipe, spec, given)
        if (external := externals.get(str(spec.teacher))) is not None:
            found = [tokenizers.same_map(student.tokenizer, external.tokenizer, (spec.train, str(spec.teacher)))]
    if found and found[0].level == "stop":
        return [*found, skipped("everything else", "Different tokens cannot be compared position by position.")]
    if student is None:
        check_tokenizers(recipe, spec, prepared, given.models)
        say("models")
        student, externals = load(recipe, spec, given)
    student, externals = comparable(spec, prepared.method, student, externals)
    check_tokenizers(recipe, spec, prepared, {spec.train: student, **externals})
    check_base_weights(recipe, spec, prepared.method, Given(models={spec.train: student, **externals}))
    check_talks(recipe, spec, prepared, student)
    say("the student's responses")
    subject = subject_of(recipe, spec, prepared, student, externals, given, prompts=prompts, seed=seed)
    found += of_tokens(subject)
    if subject.rules is not None:
        found.append(conversations.environment(subject))
    found += of_signal(subject, say)
    found += of_knowledge(subject, say)
    say("one step")
    return [*found, cost.cost(subject), *engine.engine(subject)]


def of_two_tokenizers(
    recipe: Recipe,
    spec: StageSpec,
    prepared: Prepared,
    given: Given,
    prompts: int,
    seed: int,
    say: Callable[[str], None],
) -> list[Finding]:
    """The findings about a teacher with its own tokenizer: rewards of texts, and the cost of a step."""
    check_tokenizers(recipe, spec, prepared, given.models)
    say("models")
    student, externals = comparable(spec, prepared.method, *load(recipe, spec, given))
    say("the student's responses")
    subject = subject_of(recipe, spec, prepared, student, externals, given, prompts=prompts, seed=seed)
    say("rewards of both")
    judgement = headroom.judged(subject)
    external = externals[str(spec.teacher)]  # only an external teacher has its own tokenizer
    sides = tokenizers.Side.of(student, spec.train), tokenizers.Side.of(external, str(spec.teacher))
    aligned = pair_of(
        student.tokenizer,
        external.tokenizer,
        chat=is_chat(subject.prompts),
        options=(student.template_options, external.template_options),
    )
    found = [
        tokenizers.paired_endings(*sides, aligned.ends),
        headroom.headroom(subject, judgement),
        information.transfer(subject, judgement),
    ]
    why = "The teacher has its own tokenizer, and these checks compare position by position."
    found += [
        skipped(
            "tokens",
            f"{why} Endings are compared. `opd check` says how many tokens both share; see also units/coverage in the "
            "metrics.",
        ),
        skipped("signal", why),
        skipped("headroom/continuation", "A teacher with its own tokenizer cannot continue from the student's tokens."),
        skipped("information/disagreement", why),
    ]
    say("one step")
    return [*found, cost.cost(subject), *engine.engine(subject)]


def map_without_weights(recipe: Recipe, spec: StageSpec, given: Given) -> list[Finding]:
    """The comparison of both tokenizers; empty if one cannot be loaded without its model."""
    if spec.teacher is None or spec.teacher == spec.train:
        return []
    both: list[Any] = []
    for name in (spec.train, spec.teacher):
        lm: LanguageModel | None = given.models.get(name)
        both.append(lm.tokenizer if lm is not None else tokenizer_of(origin_of(recipe, name), name))
    return [] if None in both else [tokenizers.same_map(both[0], both[1], (spec.train, spec.teacher))]


def of_tokens(subject: Subject) -> list[Finding]:
    """Findings about tokenizers, templates and output layers."""
    lm, other = subject.student, subject.external
    widths = tokenizers.head_widths(lm.vocabulary, len(lm.head().weight), len((other or lm).head().weight))
    if other is None:
        says = "The student is its own teacher: one tokenizer, one template, one ending."
        return [widths, Finding(name="tokens/same", level="ok", says=says)]
    ours, theirs = tokenizers.Side.of(lm, subject.spec.train), tokenizers.Side.of(other, subject.teacher_name)
    chat = is_chat(subject.prompts)
    return [
        widths,
        tokenizers.templates(ours, theirs, subject.prompts),
        tokenizers.thinking(ours, theirs, subject.prompts),
        tokenizers.endings(ours, theirs, chat=chat),
        tokenizers.splits(ours, theirs, [rollout.text for rollout in subject.firsts]),
    ]


def of_signal(subject: Subject, say: Callable[[str], None]) -> list[Finding]:
    """Findings about the measured log-probs."""
    say("self-test and repeatability")
    found = [signal.self_test(subject), signal.repeatability(subject)]
    if found[-1].numbers.get("not_finite"):
        return [*found, skipped("signal/comparison", "The teacher's scores are not finite.")]
    say("student and teacher, token by token")
    comparison = signal.compared(subject)
    return [
        *found,
        signal.strength(subject, comparison),
        signal.overlap(subject, comparison),
        signal.by_position(comparison),
        *([] if subject.rules is None else [conversations.by_turn(subject, comparison)]),
        special_tokens.special_tokens(subject, comparison),
        bias.truncation(subject),
        *([] if subject.base is None else [cliff.cliff(subject)]),
    ]


def of_knowledge(subject: Subject, say: Callable[[str], None]) -> list[Finding]:
    """Findings about knowledge: rewards of both models, continuations, and privileged information."""
    say("rewards of both")
    judgement = headroom.judged(subject)
    found = [headroom.headroom(subject, judgement)]
    say("continuations")
    found.append(headroom.probe(subject, judgement))
    say("privileged information")
    return [*found, information.disagreement(subject), information.transfer(subject, judgement)]
