"""Is the teacher better than the student, and how deep into the student's responses can it still help?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from opd.commands.doctor.findings import Finding, skipped
from opd.commands.doctor.subject import Subject, sample_of
from opd.evaluation.continuation import Continuation, Depth, continuation
from opd.maths.intervals import SHARE, Interval, bounds_of, mean_interval, paired_interval
from opd.maths.statistics import pass_at_k
from opd.models.render import render
from opd.pieces.needs import Trait, needs_of
from opd.rewards.base import rewarded, unfit_to_measure
from opd.types import Prompt, Reward, Rollout

# Depths of the probe as shares of the response limit (ours). arXiv 2604.13016 section 6.1: gains of .37, .27, .15 and
# .02 over the student after 1K, 4K, 8K and 16K of its tokens. A gain below `GONE` times the gain from the prompt counts
# as gone (there: .02 / .37 = 6 %).
DEPTHS = (1 / 16, 1 / 4, 1 / 2, 3 / 4)


GONE = 0.1


FEWEST = 4  # a depth that fewer responses reach is left out


WORTH_CUTTING = 0.1  # a limit is recommended if it cuts at least this share of the student's tokens; ours


NEW_KNOWLEDGE = (
    "`opd study teacher_choice` and `reverse`; arXiv 2604.13016 sections 3.2 and 3.3: a teacher without new knowledge "
    "closed 5 to 16 % of the gap, and a weaker one pulled the student down to its own level"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Rewarded responses of student and teacher to the same prompts; responses to one prompt are adjacent."""

    reward: Reward
    student: list[Rollout]
    teacher: list[Rollout]

    @property
    def binary(self) -> bool:
        return all(r.reward in (0.0, 1.0) for r in (*self.student, *self.teacher))


def judged(subject: Subject) -> Judged | str:
    """Both models' responses with rewards, or the reason why none could be computed.

    Uses the stage's reward on the sampled prompts. Otherwise uses the evaluation's reward: on the sampled prompts if
    they have all columns of the held-out ones (a reward may not declare what it reads), else on as many held-out ones.
    """
    if subject.maximises_divergence:
        return "The method maximises the divergence from its teacher, so the teacher need not be better."
    if Trait.READS_ATTEMPT in needs_of(subject.method.context):
        return "The teacher reads the response that it scores, so it cannot write its own."
    prompts, rollouts, held_out = subject.prompts, subject.rollouts, subject.held_out
    reward = subject.reward
    if reward is None or unfit_to_measure(reward):
        if held_out is None or held_out.reward is None:
            return without_reward(subject)
        reward = held_out.reward
        if missing_for(reward.needs | filled_in(held_out.prompts), prompts):
            prompts = sample_of(held_out.prompts, len(prompts), subject.seed)
            if missing := missing_for(needs_of(subject.method.context).columns, prompts):
                return f"The teacher reads {', '.join(missing)}, which the held-out prompts do not have."
            rollouts = subject.student_responses(prompts)
    student, teacher = rewarded(reward, rollouts), rewarded(reward, subject.teacher_responses(prompts))
    failed = [one.unjudged for one in (*student, *teacher) if one.reward is None]
    if failed:
        return f"The reward failed on {len(failed)} of {len(student) + len(teacher)} responses: {failed[0]}"
    return Judged(reward=reward, student=student, teacher=teacher)


def without_reward(subject: Subject) -> str:
    """Why accuracy cannot be measured where the evaluation has no reward either."""
    if subject.has_judge_reward:
        return "The stage's reward needs a judge, which the doctor does not call, and its evaluation has no reward."
    if subject.reward is not None:
        unfit = unfit_to_measure(subject.reward)
        return f"The stage's reward is {subject.reward.name!r}, {unfit}. Its evaluation has no reward."
    return "The stage has no reward, and neither has its evaluation: accuracy cannot be measured."


def filled_in(prompts: Sequence[Prompt]) -> frozenset[str]:
    """The columns that every prompt has, among `answer` and the metadata."""
    names = {"answer", *(name for prompt in prompts for name in prompt.metadata)}
    return frozenset(names) - frozenset(missing_for(frozenset(names), prompts))


def missing_for(columns: frozenset[str], prompts: Sequence[Prompt]) -> list[str]:
    """The columns that at least one prompt lacks."""

    def has(prompt: Prompt, name: str) -> bool:
        return getattr(prompt, name, None) is not None or prompt.metadata.get(name) is not None

    return sorted(name for name in columns if not all(has(prompt, name) for prompt in prompts))


def headroom(subject: Subject, judgement: Judged | str) -> Finding:
    """The teacher's mean reward against the student's, with intervals over prompts, and pass@k of the student.

    The level follows the paired difference: 0 or negative: stop; an interval that contains 0: change.
    """
    if isinstance(judgement, str):
        return skipped("headroom/accuracy", judgement)
    ours, theirs = by_prompt(judgement.student), by_prompt(judgement.teacher)
    student, teacher = (_interval(scores) for scores in (ours, theirs))
    gap = paired_interval(theirs, ours)
    numbers = {
        "prompts": len(ours),
        "responses_a_prompt": len(ours[0]),
        **student.numbers("student"),
        **teacher.numbers("teacher"),
        **gap.numbers("gap"),
    }
    says = f"Mean reward of the student {student}, of the teacher {teacher}, paired difference {gap}"
    if judgement.binary and (k := len(ours[0])) > 1:
        solved = mean_interval([pass_at_k(k, int(sum(s)), k) for s in ours], SHARE)
        numbers |= solved.numbers(f"student_pass@{k}")
        numbers["only_teacher"] = sum(any(t) and not any(s) for s, t in zip(ours, theirs, strict=True))
        says += (
            f"; pass@{k} of the student {solved}, and {numbers['only_teacher']} of "
            f"{len(ours)} prompts only the teacher solved"
        )
    if gap.mean <= 0:
        return Finding(
            name="headroom/accuracy",
            level="stop",
            says=f"{says}. The teacher is no better than the student.",
            numbers=numbers,
            remedy=_better_teacher(subject),
            study=NEW_KNOWLEDGE,
        )
    if gap.low <= 0:
        return Finding(
            name="headroom/accuracy",
            level="change",
            says=f"{says}. {len(ours)} prompts are too few to tell whether the teacher is better.",
            numbers=numbers,
            remedy=f"Run opd doctor again with a larger --prompts, or: {_better_teacher(subject)}",
            study=NEW_KNOWLEDGE,
        )
    return Finding(name="headroom/accuracy", level="ok", says=f"{says}.", numbers=numbers)


def probe(subject: Subject, judgement: Judged | str) -> Finding:
    """The teacher's gain after prefixes of the student's responses, by depth, and the response limit that follows."""
    name = "headroom/continuation"
    if isinstance(judgement, str):
        return skipped(name, judgement)
    if subject.rules is not None:
        return skipped(name, "A conversation is not continued from its middle: the environment's state is not copied.")
    if not judgement.binary:
        return skipped(name, "The probe counts right and wrong responses, but this reward is not always 0 or 1.")
    rollouts = [rollout for rollout in judgement.student if rollout.sample == 0]
    found = probed(subject, rollouts, judgement.reward)
    depths = [depth for one in found for depth in one.depths if depth.responses >= FEWEST]
    if not depths:
        return skipped(name, f"Fewer than {FEWEST} responses reach a depth of the probe.")
    cap = subject.sampling.max_completion_length
    wanted = quantile([len(r.response_ids) for r in judgement.teacher], 0.9)
    first = found[0].alone.mean - found[0].student.mean
    limit = response_limit(first, depths, wanted)
    rows = [
        {"depth": d.depth, "responses": d.responses, "gain": d.gain, "continuing": d.continuing.mean,
         "low": d.continuing.low, "high": d.continuing.high, "student": d.student.mean,
         "right_wrong": d.transitions.right_wrong, "wrong_right": d.transitions.wrong_right}
        for d in depths
    ]  # fmt: skip
    cut_share = 0.0 if limit is None else share_after(rollouts, limit)
    numbers: dict[str, object] = {"gain_alone": first, "depths": rows, "teacher_length_p90": wanted, "limit": cap}
    says = f"The teacher gains {first:+.2f} over the student from the prompt"
    says += "".join(f", {depth.gain:+.2f} after {depth.depth} of its tokens" for depth in depths)
    if limit is None or cut_share < WORTH_CUTTING:
        return Finding(name=name, level="ok", says=f"{says}.", numbers=numbers)
    return Finding(
        name=name,
        level="change",
        says=f"{says}: after token {limit} of {cap}, where {cut_share:.0%} of the student's tokens are, the teacher "
        f"does not help, and 90 % of its own responses end by token {wanted}.",
        numbers={**numbers, "recommended": limit, "behind": cut_share},
        remedy=f"Set sampling.max_completion_length to {limit}.",
        study="`opd study prefixes` and `length`; arXiv 2604.13016 section 6.1: the teacher's gain fades with depth, "
        "and longer responses collapse late",
    )


def probed(subject: Subject, rollouts: Sequence[Rollout], reward: Reward) -> list[Continuation]:
    """The continuation probe at `DEPTHS`, in as few calls as the teacher's number of positions allows."""
    cap = subject.sampling.max_completion_length
    contexts = subject.contexts(rollouts)
    lm = subject.teacher.lm
    longest = max(len(render(context, lm.tokenizer, lm.template_options)) for context in contexts)
    by_room: dict[int, list[int]] = {}
    for depth in sorted({max(1, round(share * cap)) for share in DEPTHS}):
        room = int(min(cap, lm.positions - longest - depth))
        if room > 0:
            by_room.setdefault(room, []).append(depth)
    found: list[Continuation] = []
    with subject.on_device():
        for room, depths in by_room.items():
            sampling = replace(subject.sampling, n=1, max_completion_length=room)
            found.append(
                continuation(
                    subject.teacher, rollouts, depths, reward, sampling=sampling, contexts=contexts, seed=subject.seed
                )
            )
    return found


def response_limit(gain_alone: float, depths: Sequence[Depth], wanted: int) -> int | None:
    """The depth in tokens from which the teacher's gain stays below the threshold, at least `wanted`.

    None if the teacher gains nothing from the prompt, or still gains at the largest depth.
    """
    if gain_alone <= 0:
        return None
    alive = [depth.depth for depth in depths if depth.gain >= GONE * gain_alone]
    beyond = [depth.depth for depth in depths if not alive or depth.depth > max(alive)]
    return max(int(min(beyond)), wanted) if beyond else None


def share_after(rollouts: Sequence[Rollout], limit: int) -> float:
    """The share of the responses' tokens that a length limit would cut off."""
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    return sum(max(length - limit, 0) for length in lengths) / sum(lengths)


def by_prompt(rollouts: Sequence[Rollout]) -> list[list[float]]:
    """Rewards grouped by prompt, in order."""
    groups: dict[int, list[float]] = {}
    for rollout in rollouts:
        assert rollout.reward is not None
        groups.setdefault(rollout.prompt.id, []).append(rollout.reward)
    return list(groups.values())


def quantile(lengths: Sequence[int], share: float) -> int:
    """The smallest length that at least `share` of the lengths do not exceed."""
    return sorted(lengths)[math.ceil(share * len(lengths)) - 1]


def _interval(scores: Sequence[Sequence[float]]) -> Interval:
    """The mean over prompts of scores [prompts][samples], with its 95 % interval."""
    means = [sum(group) / len(group) for group in scores]
    return mean_interval(means, bounds_of(score for group in scores for score in group))


def _better_teacher(subject: Subject) -> str:
    if subject.self_taught:
        return "Give the teacher more than the student reads (options.system, examples or template), or another method."
    return (
        f"Set the stage's teacher (now {subject.teacher_name!r}) to a model that has learned something new, e.g. "
        f"{subject.spec.train} itself after a stage of method: grpo."
    )
