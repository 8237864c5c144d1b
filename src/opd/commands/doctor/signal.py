"""Is there a signal, is it computed correctly, and where in the response is it?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from opd.commands.doctor.findings import Finding, skipped
from opd.commands.doctor.subject import Subject
from opd.evaluation.buckets import Buckets
from opd.evaluation.compare import Comparison, compare
from opd.models.language_model import LanguageModel
from opd.pieces.supports import sampled
from opd.teachers.local import LocalTeacher
from opd.types import ScoreRequest, Teacher

K = 16  # most likely tokens of each model: arXiv 2604.13016 section 3


# Nats by which two computations of one log-prob may differ through rounding. Our numbers: hundreds of times float32's
# rounding of logits around 30, and the precision of bfloat16's 8 bits there.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


FEW = 4  # prompts for checks in which more prompts add nothing


# arXiv 2604.13016 section 3.2: the studied pairs start at overlap ratios of 70.3 % to 75.7 %; a successful one rises
# from 72 % to 91 % (section 4.2); the tokens of the overlap hold 97 to 99 % of both masses (Fig. 18).
LOWEST_OVERLAP = 0.70


LOWEST_MASS = 0.97


# Nats per token; our threshold. arXiv 2604.13016 section 4.1: a small loss with a small gradient is no success.
NOTHING_TO_LEARN = 1e-3


# A bucket teaches little if its divergence is below this share of the strongest bucket's. Our threshold, for the effect
# of arXiv 2604.13016 section 6.1.
FADED = 0.1


BUCKET = 16  # tokens, doubled until sixteen buckets are enough


def compared(subject: Subject) -> Comparison:
    """Student and teacher at every token of one response per prompt."""
    firsts = subject.firsts
    return compare(
        subject.student,
        subject.teacher,
        firsts,
        subject.contexts(firsts),
        k=min(K, subject.student.vocabulary),
        temperature=subject.method.temperature,
        micro_batch_tokens=subject.spec.micro_batch_tokens,
    )


def tolerance(lm: LanguageModel) -> float:
    """Nats by which two computations of one log-prob may differ in the arithmetic of `lm`."""
    half = lm.autocast or next(lm.model.parameters()).dtype == torch.bfloat16
    return TOLERANCE["bfloat16" if half else "float32"]


def self_test(subject: Subject) -> Finding:
    """With the student as its own teacher on the same prompt, every log-ratio and every divergence is zero.

    The teacher's path renders the prompt again and uses its own batches, so a misaligned response shows up. The
    sampler's recorded log-probs are compared too, if its temperature was above 0.
    """
    rows, lm = subject.firsts[:FEW], subject.student
    temperature = subject.sampling.temperature
    itself = LocalTeacher(lm=lm, micro_batch_tokens=subject.spec.micro_batch_tokens, student_device=lm.device)
    got = compare(
        lm, itself, rows, [row.prompt for row in rows], k=1, temperature=temperature or 1.0, micro_batch_tokens=1
    )
    limit = tolerance(lm)
    numbers = {
        "tokens": len(got.step),
        "log_ratio_max": _largest(got.teacher_logp - got.student_logp),
        "reverse_kl_max": _largest(got.reverse_kl),
        "tolerance": limit,
    }
    recorded = [row.policy_logp[row.trained] for row in rows if row.policy_logp is not None]
    if temperature > 0 and len(recorded) == len(rows):
        numbers["sampler_difference_max"] = _largest(torch.cat(recorded) - got.student_logp)
    worst = max(value for name, value in numbers.items() if name.endswith("_max"))
    says = (
        f"Student as its own teacher: log-ratios up to {numbers['log_ratio_max']:.2g}, exact KL up to "
        f"{numbers['reverse_kl_max']:.2g} nats over {numbers['tokens']} tokens"
    )
    if "sampler_difference_max" in numbers:
        says += f", the sampler's record {numbers['sampler_difference_max']:.2g} apart"
    if worst <= limit:
        return Finding(name="signal/self_test", level="ok", says=f"{says} (tolerance {limit:g}).", numbers=numbers)
    return Finding(
        name="signal/self_test",
        level="stop",
        says=f"{says}, and rounding explains {limit:g}: scores are not those of the sampled tokens.",
        numbers=numbers,
        remedy=f"Set models.{subject.spec.train}.attn_implementation: eager and dtype: float32; if the numbers stay, "
        "report the model.",
        study="arXiv 2605.11182 eq. 1: value and gradient are zero at q = p",
    )


def repeatability(subject: Subject) -> Finding:
    """Whether the teacher's scores of the same responses repeat, also in other batches."""
    rows = subject.firsts[:FEW]
    contexts, temperature = subject.contexts(rows), subject.method.temperature

    def scores(teacher: Teacher) -> Tensor:
        request = ScoreRequest(support=sampled(), temperature=temperature)
        scores = teacher.score(rows, contexts, request)
        return torch.cat(
            [one.teacher_logp[row.trained.to(one.teacher_logp.device)] for one, row in zip(scores, rows, strict=True)]
        )

    first, again = scores(subject.teacher), scores(subject.teacher)
    alone = scores(replace(subject.teacher, micro_batch_tokens=1))  # one row per batch
    limit = tolerance(subject.teacher.lm)
    numbers = {
        "tokens": len(first),
        "not_finite": int((~first.isfinite()).sum()),
        "tolerance": limit,
    }
    if numbers["not_finite"]:
        says = f"{numbers['not_finite']} of {len(first)} of the teacher's log-probs are not finite"
    else:
        numbers |= {"again_max": _largest(again - first), "other_batches_max": _largest(alone - first)}
        says = (
            f"The teacher's scores of {len(rows)} responses: {numbers['again_max']:.2g} nats apart when scored again, "
            f"{numbers['other_batches_max']:.2g} in batches of one"
        )
        if max(numbers["again_max"], numbers["other_batches_max"]) <= limit:
            text = f"{says} (tolerance {limit:g})."
            return Finding(name="signal/repeatability", level="ok", says=text, numbers=numbers)
    return Finding(
        name="signal/repeatability",
        level="stop",
        says=f"{says} (tolerance {limit:g}): the student would learn noise.",
        numbers=numbers,
        remedy=f"Set models.{subject.teacher_name}.dtype: float32 and attn_implementation: eager; a model that routes "
        "tokens by their batch cannot be a teacher.",
        study="docs/numerics.md: a step does not depend on how it is split",
    )


def strength(subject: Subject, comparison: Comparison) -> Finding:
    """The distance between teacher and student on the student's tokens."""
    log_ratio = comparison.teacher_logp - comparison.student_logp
    numbers = {
        "tokens": len(comparison.step),
        "reverse_kl": _mean(comparison.reverse_kl),
        "forward_kl": _mean(comparison.forward_kl),
        "log_ratio": _mean(log_ratio),
        "negative_share": _mean((log_ratio < 0).float()),
        "entropy_gap": _mean((comparison.teacher_entropy - comparison.student_entropy).abs()),
    }
    says = (
        f"Exact reverse KL {numbers['reverse_kl']:.3g} nats per token over {numbers['tokens']} tokens, entropy gap "
        f"{numbers['entropy_gap']:.3g} nats, {numbers['negative_share']:.0%} of the one-token rewards negative."
    )
    if numbers["reverse_kl"] >= NOTHING_TO_LEARN:
        return Finding(name="signal/strength", level="ok", says=says, numbers=numbers)
    if subject.maximises_divergence:
        return Finding(
            name="signal/strength",
            level="change",
            says=f"{says} Teacher and student agree: the method has no divergence to increase.",
            numbers=numbers,
            remedy="Give the teacher more to read: a larger sampling.n, so that a group has a right response, or the "
            "data's column that options.solution names.",
            study="arXiv 2605.11609 eq. 6: the push comes from what a solution changes",
        )
    return Finding(
        name="signal/strength",
        level="stop",
        says=f"{says} The teacher predicts what the student predicts already.",
        numbers=numbers,
        remedy=f"Set the stage's teacher to a model that differs from {subject.spec.train}, or give its context more.",
        study="arXiv 2604.13016 section 4.1: a small loss with a small gradient is nothing to learn",
    )


def overlap(subject: Subject, comparison: Comparison) -> Finding:
    """Whether both models prefer the same tokens, compared with the pairs studied in arXiv 2604.13016."""
    if subject.maximises_divergence:
        return skipped("signal/overlap", "The method maximises the divergence from its teacher, not the overlap.")
    if subject.student.vocabulary <= 2 * K:
        return skipped(
            "signal/overlap",
            f"The vocabulary has {subject.student.vocabulary} tokens, so the {K} most likely ones of any two models "
            "overlap.",
        )
    numbers = {
        "k": comparison.k,
        "overlap_ratio": _mean(comparison.overlap / comparison.k),
        "student_mass_on_overlap": _mean(comparison.student_mass_on_overlap),
        "teacher_mass_on_overlap": _mean(comparison.teacher_mass_on_overlap),
        "sampled_outside_teacher_top": _mean(comparison.outside_teacher_top.float()),
    }
    mass = min(numbers["student_mass_on_overlap"], numbers["teacher_mass_on_overlap"])
    says = (
        f"{numbers['overlap_ratio']:.0%} of the top {K} tokens are shared; they hold "
        f"{numbers['student_mass_on_overlap']:.1%} of the student's and {numbers['teacher_mass_on_overlap']:.1%} of "
        f"the teacher's mass (studied pairs: from {LOWEST_OVERLAP:.0%}, masses from {LOWEST_MASS:.0%})."
    )
    # A low ratio over improbable tokens is noise, so the masses have to be low too (2604.13016 app. C.2).
    if numbers["overlap_ratio"] >= LOWEST_OVERLAP or mass >= LOWEST_MASS:
        return Finding(name="signal/overlap", level="ok", says=says, numbers=numbers)
    return Finding(
        name="signal/overlap",
        level="change",
        says=says,
        numbers=numbers,
        remedy="Add a stage before this one, method: sft with options.source: teacher on other prompts, and run opd "
        "doctor again.",
        study="`opd study cold_start`; arXiv 2604.13016 sections 3.2, 4.2 and 5.1: a cold start on teacher responses "
        "raises a low overlap",
    )


def by_position(comparison: Comparison) -> Finding:
    """Reverse KL by position in the response, and the position from which it is faded. The level is always ok.

    A small KL does not tell a student that failed early from one that has finished; `headroom.probe` decides.
    """
    buckets = Buckets.over(BUCKET, int(comparison.step.max()) + 1)
    bucket = buckets.of(comparison.step)
    rows = [
        {"from": b * buckets.width, "tokens": int(chosen.sum()), "reverse_kl": _mean(comparison.reverse_kl[chosen])}
        for b in range(buckets.count)
        if bool((chosen := bucket == b).any())
    ]
    strongest = max(row["reverse_kl"] for row in rows)
    alive = [row for row in rows if row["reverse_kl"] >= FADED * strongest]
    numbers: dict[str, object] = {"buckets": rows}
    says = f"Reverse KL by position, in buckets of {buckets.width}: "
    says += ", ".join(f"{row['reverse_kl']:.2g}" for row in rows) + " nats"
    if alive[-1] is rows[-1]:
        return Finding(name="signal/by_position", level="ok", says=f"{says}; not faded at the end.", numbers=numbers)
    faded_from = alive[-1]["from"] + buckets.width
    numbers["faded_from"] = faded_from
    return Finding(
        name="signal/by_position",
        level="ok",
        says=f"{says}; below a tenth of its maximum from token {faded_from} on.",
        numbers=numbers,
    )


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def _largest(values: Tensor) -> float:
    """The largest absolute value; NaN if any value is NaN."""
    return values.double().abs().max().item()
