"""A stage with an environment: does the student use it, and does the teacher's signal last over the turns?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from opd.commands.doctor.findings import Finding
from opd.commands.doctor.subject import Subject
from opd.environments.conversations import talked
from opd.evaluation.compare import Comparison
from opd.pieces.turns import MUTED, TurnWeights

STUDY = "`opd study agent_errors`; arXiv 2605.07725: after a mistake student and teacher are farther apart"

# Shares from which a change is recommended; ours.
FAILED = 0.5  # calls that failed, of all calls
CUT = 0.5  # conversations that the limit of tokens ended
MOSTLY_MUTED = 0.5  # turns after the first whose weight is below `MUTED`


def environment(subject: Subject) -> Finding:
    """How the student's conversations went: turns, calls, errors, and what ended them. One response per prompt."""
    rows = subject.firsts
    counts = {name.removeprefix("environment/"): number for name, number in talked(rows).items()}
    numbers = {"conversations": len(rows), **{name: number / len(rows) for name, number in counts.items()}}
    calls, failed = counts["tool_calls"], counts["tool_errors"]
    ends = ("done", "turn_limit", "token_limit", "stopped", "refused", "rewritten", "hung")
    says = (
        f"{len(rows)} conversations with {subject.environment}: {numbers['turns']:.1f} turns, "
        f"{numbers['own_tokens']:.0f} tokens of the student and {numbers['heard_tokens']:.0f} of the environment. "
        "Ended by "
        + ", ".join(f"{name} {numbers[name]:.0%}" for name in ends if numbers[name])
        + (f". {failed:.0f} of {calls:.0f} calls failed" if calls else "")
        + "."
    )
    raised, stage = counts["errors"] + counts["timeouts"], f"stages.{subject.spec.name}"
    changes = (
        (
            raised > 0,
            f"{raised:.0f} actions raised or took too long.",
            f"Correct the environment, or raise {stage}.environment.timeout_s.",
        ),
        (
            _unused(subject, numbers),
            "The student wrote one turn without a call in each: the environment takes no part.",
            "Add a stage before this one, method: sft on conversations with calls; check the prompt's text and "
            f"{stage}.environment.format.",
        ),
        (
            failed > FAILED * calls,
            "Most calls fail.",
            "Add a stage before this one, method: sft on right calls.",
        ),
        (
            numbers["token_limit"] > CUT,
            "Most are cut.",
            f"Raise {stage}.sampling.max_completion_length, which counts the environment's tokens too.",
        ),
    )
    found = [(what, remedy) for wrong, what, remedy in changes if wrong]
    if not found:
        return Finding(name="environment/conversations", level="ok", says=says, numbers=numbers)
    return Finding(
        name="environment/conversations",
        level="change",
        says=" ".join([says, *(what for what, _ in found)]),
        numbers=numbers,
        remedy=" ".join(remedy for _, remedy in found),
        study=STUDY,
    )


def _unused(subject: Subject, numbers: Mapping[str, float]) -> bool:
    """Whether the student offered tools calls none of them; one turn of a game, or one that is cut, is no such sign."""
    assert subject.rules is not None
    acted = numbers["tool_calls"] + numbers["tool_errors"] + numbers["errors"] + numbers["timeouts"]
    offered = bool(subject.prompts[0].tools or subject.rules.environment.tools)
    return offered and numbers["turns"] <= 1 and not acted and numbers["token_limit"] <= CUT


def by_turn(subject: Subject, comparison: Comparison) -> Finding:
    """Reverse KL and |log q - log p| by turn, and for a method that weighs turns the share that is muted."""
    apart = turn_divergences(subject, comparison)
    turn = turns_of(subject)
    rows = [
        {
            "turn": k,
            "conversations": int((~apart[:, k].isnan()).sum()),
            "reverse_kl": float(comparison.reverse_kl[turn == k].double().mean()),
            "log_ratio_size": float(apart[:, k].nanmean()),
        }
        for k in range(apart.shape[1])
        if bool((turn == k).any())
    ]
    says = "Reverse KL by turn: " + ", ".join(f"{row['reverse_kl']:.2g}" for row in rows) + " nats"
    numbers: dict[str, object] = {"turns": rows}
    made = [one for one in subject.method.make_memory().values() if isinstance(one, TurnWeights)]
    if not made or apart.shape[1] < 2:
        return Finding(name="signal/by_turn", level="ok", says=f"{says}.", numbers=numbers)
    weights = made[0].of(apart)[:, 1:]
    known = weights[~weights.isnan()]
    muted = float((known < MUTED).double().mean()) if len(known) else 0.0
    numbers |= {"weight": float(known.double().mean()) if len(known) else 1.0, "muted": muted}
    says += f"; the method's mean weight of later turns is {numbers['weight']:.2g}, and {muted:.0%} are below {MUTED:g}"
    if muted <= MOSTLY_MUTED:
        return Finding(name="signal/by_turn", level="ok", says=f"{says}.", numbers=numbers)
    return Finding(
        name="signal/by_turn",
        level="change",
        says=f"{says}: both models agree on the first turn, and the others are hardly distilled.",
        numbers=numbers,
        remedy=(
            "Use method: opd." if made[0].reference == "batch" else "Set options.reference: batch, or use method: opd."
        ),
        study=STUDY,
    )


def turns_of(subject: Subject) -> Tensor:
    """The turn of each trained token of the first responses, in order, [N]."""
    return torch.cat([one.turn[one.trained].cpu() for one in subject.firsts])


def turn_divergences(subject: Subject, comparison: Comparison) -> Tensor:
    """d_k = mean over turn k of |log q - log p|, [rows, turns] in nats per token; NaN for a turn without a token."""
    turn, row = turns_of(subject), comparison.row
    size = (comparison.teacher_logp - comparison.student_logp).abs()
    total = torch.zeros(len(subject.firsts), int(turn.max()) + 1, dtype=size.dtype)
    count = torch.zeros_like(total)
    total.index_put_((row, turn), size, accumulate=True)
    count.index_put_((row, turn), torch.ones_like(size), accumulate=True)
    return total / count
