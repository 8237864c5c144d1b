"""Privileged information: one rule for all prompts, or a fact about each? Only a rule can be internalised.

arXiv 2605.11182 eq. 10-11 and Fig. 3: over contexts I of one prompt, the student converges to the normalised geometric
mean of the teachers, and the loss -log Z remains. The data has one context per prompt, so each prompt is also read with
the privileged columns of other prompts; the teacher's change under them is specific to the instance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from opd.commands.doctor.findings import Finding, skipped
from opd.commands.doctor.headroom import Judged, by_prompt
from opd.commands.doctor.subject import Subject
from opd.evaluation.compare import compare
from opd.evaluation.disagreement import mean_disagreement
from opd.maths.intervals import paired_interval
from opd.pieces.needs import Input, Trait, needs_of
from opd.rewards.base import rewarded
from opd.types import Context, Prompt, Rollout

OTHERS = 3  # number of other prompts that lend a prompt their columns


# Shares of the loss that no student can remove. Our thresholds: arXiv 2605.11182 gives none; its rules (Fig. 5 to 7)
# have 0, its answers (Fig. 3) most of the loss.
MOSTLY_SHARED = 0.1


MOSTLY_INSTANCE = 0.5


REMEDY = (
    "Put a rule that holds for all prompts into options.system or examples and leave {privileged_context} out of "
    "options.template, or set the stage's teacher to a model trained on the task (method: grpo)."
)


STUDY = (
    "`opd study privileged`; arXiv 2605.11182 eq. 10-11, Fig. 3 and 5 to 7: fixed rules are internalised, answers and "
    "solutions are not"
)


def disagreement(subject: Subject) -> Finding:
    """-log Z per token between each prompt's own privileged columns and those of other prompts, against the loss.

    The loss is the mean KL(student || teacher) over the same contexts. -log Z is its minimum, so their ratio is the
    share of the loss that training cannot remove.
    """
    name = "information/disagreement"
    why, rows, swapped = privileged_rows(subject)
    if why:
        return skipped(name, why)
    if all(_shown(each) == _shown(subject.contexts(rows)) for each in swapped):
        return _the_same(name, subject, rows)
    contexts = [list(several) for several in zip(subject.contexts(rows), *swapped, strict=True)]
    method, tokens = subject.method, subject.spec.micro_batch_tokens
    floor = max(
        mean_disagreement(subject.teacher, rows, contexts, temperature=method.temperature), 0.0
    )  # rounding may make it negative
    losses = [
        compare(
            subject.student, subject.teacher, rows, each, k=1, temperature=method.temperature, micro_batch_tokens=tokens
        ).reverse_kl
        for each in zip(*contexts, strict=True)
    ]
    loss = sum(values.double().mean().item() for values in losses) / len(losses)
    share = min(floor / loss, 1.0) if loss > 0 else 0.0
    numbers = {"contexts": len(contexts[0]), "minus_log_z": floor, "loss": loss, "share": share}
    says = (
        f"With the privileged information of {len(contexts[0]) - 1} other prompts in turn, -log Z is {floor:.3g} of "
        f"the loss's {loss:.3g} nats per token: {share:.0%} cannot be learned"
    )
    if share < MOSTLY_INSTANCE:
        kind = "a rule shared by prompts" if share < MOSTLY_SHARED else "partly a shared rule, partly a fact per prompt"
        return Finding(name=name, level="ok", says=f"{says}. It is {kind}.", numbers=numbers)
    return Finding(
        name=name,
        level="change",
        says=f"{says}. It is a fact about each prompt.",
        numbers=numbers,
        remedy=REMEDY,
        study=STUDY,
    )


def transfer(subject: Subject, judgement: Judged | str) -> Finding:
    """Whether the teacher stays as good with another prompt's privileged columns: then a student can learn its gain.

    Compares rewards of the teacher's responses with their own context, with another prompt's, and of the student's.
    """
    name = "information/transfer"
    if isinstance(judgement, str):
        return skipped(name, judgement)
    why, rows, swapped = privileged_rows(subject)
    if why:
        return skipped(name, why)
    if [r.prompt for r in judgement.student if r.sample == 0] != [row.prompt for row in rows]:
        return skipped(name, "Rewards were measured on held-out prompts, and this check needs the stage's prompts.")
    if _shown(swapped[0]) == _shown(subject.contexts(rows)):
        return _the_same(name, subject, rows)
    elsewhere = by_prompt(
        rewarded(judgement.reward, subject.teacher_responses([r.prompt for r in rows], fixed(swapped[0])))
    )
    own, ours = by_prompt(judgement.teacher), by_prompt(judgement.student)
    own_gain, other_gain = (paired_interval(scores, ours) for scores in (own, elsewhere))
    numbers = {**own_gain.numbers("own_gain"), **other_gain.numbers("other_gain")}
    says = f"The teacher gains {own_gain} over the student with a prompt's own information, {other_gain} with another's"
    lost = own_gain.low > 0 and other_gain.high < own_gain.mean and other_gain.mean < 0.5 * own_gain.mean
    if not lost:
        return Finding(name=name, level="ok", says=f"{says}.", numbers=numbers)
    return Finding(
        name=name,
        level="stop",
        says=f"{says}: the teacher knows the answer, not how to find it.",
        numbers=numbers,
        remedy=REMEDY,
        study=STUDY,
    )


def _the_same(name: str, subject: Subject, rows: Sequence[Rollout]) -> Finding:
    if Trait.READS_ATTEMPT in needs_of(subject.method.context):
        return skipped(name, "The teacher reads only the student's attempt: other prompts have no column to lend.")
    says = "Every prompt has the same privileged information: -log Z is 0, and it transfers by construction."
    return Finding(name=name, level="ok", says=says, numbers={"prompts": len(rows)})


def privileged_rows(subject: Subject) -> tuple[str, list[Rollout], list[list[Prompt]]]:
    """The reason to skip ("" if none), the responses, and their contexts with columns of each of `OTHERS` prompts."""
    rows = subject.firsts
    if subject.maximises_divergence:
        return "The method maximises the divergence from its teacher: there is no loss to remove.", rows, []
    if Input.GROUP in needs_of(subject.method.context):
        return "The teacher reads other responses to its prompt, and other prompts have none to it.", rows, []
    if _shown(subject.contexts(rows)) == _shown([row.prompt for row in rows]):
        return "The teacher reads what the student reads: there is no privileged information.", rows, []
    if len(rows) < 2:
        return "Privileged information is compared between prompts, and there is only one prompt.", rows, []
    others = range(1, min(OTHERS, len(rows) - 1) + 1)
    return "", rows, [subject.contexts(with_columns_of(rows, shift)) for shift in others]


def with_columns_of(rows: Sequence[Rollout], shift: int) -> list[Rollout]:
    """The responses, each prompt with the privileged columns of the prompt `shift` places later (cyclic)."""
    out: list[Rollout] = []
    for i, row in enumerate(rows):
        other = rows[(i + shift) % len(rows)].prompt
        columns = {name: getattr(other, name) for name in ("privileged_context", "answer", "response")}
        out.append(replace(row, prompt=replace(row.prompt, **columns)))
    return out


def fixed(contexts: Sequence[Prompt]) -> Context:
    """A context piece that returns the given context of each prompt, by id."""
    by_id = {context.id: context for context in contexts}
    return lambda rollouts: [by_id[rollout.prompt.id] for rollout in rollouts]


def _shown(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts without columns that no model reads."""
    return [replace(prompt, answer=None, response=None, privileged_context=None, metadata={}) for prompt in prompts]
