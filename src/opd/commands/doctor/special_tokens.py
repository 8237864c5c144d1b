"""Log-ratios on special tokens and end tokens, which a few tokens may dominate.

arXiv 2603.25562 section 4.3: the student is sure of a token (-0.07 and 0.00 nats), the teacher never writes it there
(-19.16 and -58.71), and these few tokens carry most of the signal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opd.commands.doctor.findings import Finding
from opd.commands.doctor.subject import Subject
from opd.commands.doctor.tokenizers import SPECIAL_TOKENS, special_ids
from opd.evaluation.compare import Comparison
from opd.types import Rollout

# Our thresholds, between the paper's ordinary log-ratios (-1.2 to 0.2 nats) and those of broken tokens (-19 and -58).
SUSPECT_LOG_RATIO = -5.0


BROKEN_LOG_RATIO = -10.0


SURE = math.log(0.5)  # least log-prob of a token that the student is sure of; on others it may simply be wrong; ours


FEW = 4  # prompts to which the teacher writes responses, to see its end tokens


def special_tokens(subject: Subject, comparison: Comparison) -> Finding:
    """The log-ratio on special and end tokens that the student is sure of, against that of all other tokens.

    If ends are improbable under the teacher, it writes a few responses. If those end with the student's end tokens, the
    student ends at the wrong place, which it can learn; if not, training would teach the student never to end.
    """
    log_ratio = comparison.teacher_logp - comparison.student_logp
    ends, special = kinds_of(subject.firsts, special_ids(subject.student.tokenizer))
    sure = comparison.student_logp >= SURE
    groups = {"end": log_ratio[ends & sure], "special": log_ratio[special & sure], "rest": log_ratio[~ends & ~special]}
    numbers = {name: float(values.double().median()) for name, values in groups.items() if len(values)}
    numbers |= {f"{name}_tokens": len(values) for name, values in groups.items()}
    measured = [f"{name} {numbers[name]:.2f}" for name in groups if name in numbers]
    says = f"Median log-ratio in nats: {', '.join(measured)}."
    least = SUSPECT_LOG_RATIO + min(numbers.get("rest", 0.0), 0.0)
    low = [name for name in ("end", "special") if numbers.get(name, 0.0) <= least]
    alike = None
    if "end" in low:
        alike = ends_alike(subject)
        if alike is not None:
            numbers["teacher_ends_alike"] = alike
            says += f" Of the teacher's own responses {alike:.0%} end with a token that ends the student's."
        if alike:
            low.remove("end")
            says += " The student ends at the wrong place, which it can learn."
    if not low:
        return Finding(name="signal/special_tokens", level="ok", says=says, numbers=numbers)
    broken = alike == 0.0 and numbers["end"] <= BROKEN_LOG_RATIO
    return Finding(
        name="signal/special_tokens",
        level="stop" if broken else "change",
        says=says
        + (" Training would teach the student never to end." if broken else " Few tokens would dominate the signal."),
        numbers=numbers,
        remedy=f"Give models.{subject.spec.train} and models.{subject.teacher_name} one chat_template and one "
        "end-of-sequence token, or use local_support_matching with options.mask_tokens for them.",
        study=SPECIAL_TOKENS,
    )


def ends_alike(subject: Subject) -> float | None:
    """The share of a few finished teacher responses in which the last token is also a stop token of the student.

    None if the teacher finishes no response within the limit.
    """
    ends = subject.teacher_ends(subject.prompts[:FEW])
    return sum(end in subject.student.stop_ids for end in ends) / len(ends) if ends else None


def kinds_of(rollouts: Sequence[Rollout], special: frozenset[int]) -> tuple[Tensor, Tensor]:
    """Two masks over all trained tokens in order, [N] bool each: last of a finished response; other special tokens.

    Each turn of a conversation that the environment has answered is finished too.
    """
    ends, others = [torch.zeros(0, dtype=torch.bool)], [torch.zeros(0, dtype=torch.bool)]
    known = torch.tensor(sorted(special), dtype=torch.long)
    for rollout in rollouts:
        ids, turn = rollout.response_ids.cpu(), rollout.turn.cpu()
        end = torch.zeros(len(ids), dtype=torch.bool)
        end[:-1] = turn[1:] > turn[:-1]
        end[-1:] = rollout.finished
        trained = rollout.trained.cpu()
        ends.append(end[trained])
        others.append((torch.isin(ids, known) & ~end)[trained])
    return torch.cat(ends), torch.cat(others)
