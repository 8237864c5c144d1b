"""Is lambda below the limit at which strict formats break? From structural tokens under teacher and base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd.commands.doctor.findings import Finding, skipped
from opd.commands.doctor.subject import Subject, sample_of
from opd.evaluation.compare import whole
from opd.maths.extrapolation import largest_strength
from opd.pieces.extrapolation import ExtrapolationPiece, extrapolation_of
from opd.teachers.local import LocalTeacher
from opd.types import Prompt, Rollout

NAME = "extrapolation/cliff"
STUDY = "arXiv 2605.08737: lambda* in closed form; opd.maths.extrapolation derives it"

FEWEST = 8  # positions of a class of tokens; fewer say little about its mean. Our threshold.

TILE = 64  # positions whose distributions are held at once, in float64

CONTENT = -1  # the class of a token that is not structural


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassOfTokens:
    """Equal tokens, such as "," and ", ", where the teacher's most likely token is one of them."""

    text: str
    positions: int
    teacher: float  # mean mass p
    base: float  # mean mass b

    @property
    def measurable(self) -> bool:
        """Whether both log-odds are finite."""
        return 0.0 < self.teacher < 1.0 and 0.0 < self.base < 1.0

    def numbers(self, bound: float) -> dict[str, Any]:
        """For the report; a lambda* that is infinite or undefined is None."""
        limit = largest_strength(self.teacher, self.base, bound) if self.measurable else None
        finite = limit is not None and self.teacher > self.base
        return {
            "text": self.text,
            "positions": self.positions,
            "teacher": self.teacher,
            "base": self.base,
            "lambda_star": limit if finite else None,
        }


def cliff(subject: Subject) -> Finding:
    """lambda against the least lambda* of the classes of structural tokens, on the student's held-out responses.

    Without held-out prompts the responses are those to the sample of training prompts, which no step has trained.
    """
    asked = extrapolation_of(subject.method.signal)
    if asked is None:
        return skipped(NAME, "The method does not go beyond its teacher.")
    if asked.strength <= 1.0:
        says = f"lambda is {asked.strength:g}, and the target is not beyond the teacher."
        return Finding(name=NAME, level="ok", says=says, numbers={"lambda": asked.strength})
    if asked.clip != "teacher/student":
        why = f"lambda* is the limit of a weight that bounds the teacher's ratio, and the clip is {asked.clip}."
        return skipped(NAME, why)
    assert subject.base is not None, "checked: a method that reads a base has one"
    held_out = subject.held_out.prompts if subject.held_out is not None else []
    prompts = sample_of(held_out, len(subject.prompts), subject.seed) if held_out else []
    rollouts = subject.student_responses(prompts) if prompts else subject.firsts
    found = measured(subject, rollouts)
    where = f"{len(rollouts)} {'held-out responses' if prompts else 'responses to training prompts'}"
    return judged(asked, found, where)


def judged(asked: ExtrapolationPiece, found: Sequence[ClassOfTokens], where: str) -> Finding:
    """The finding from the measured classes."""
    enough = [one for one in found if one.positions >= FEWEST]
    sure = [one for one in enough if not one.measurable]
    rows = sorted((one.numbers(asked.bound) for one in enough), key=lambda row: row["lambda_star"] or float("inf"))
    limits = [row["lambda_star"] for row in rows if row["lambda_star"] is not None]
    numbers: dict[str, Any] = {
        "lambda": asked.strength,
        "bound": asked.bound,
        "classes": rows,
        "classes_with_few_positions": len(found) - len(enough),
        "classes_with_mass_0_or_1": len(sure),
    }
    left = "".join(
        f" {len(some)} {what} left out ({', '.join(repr(one.text) for one in some[:3])})."
        for some, what in (
            ([one for one in found if one.positions < FEWEST], f"classes with fewer than {FEWEST} positions are"),
            (sure, "classes with a mass of exactly 0 or 1, whose lambda* is undefined, are"),
        )
        if some
    )
    if not enough:
        return skipped(NAME, f"On {where} no class of structural tokens has {FEWEST} positions.{left}")
    if not limits:
        says = f"On {where} no structural token is likelier under the teacher than under the base: lambda has no limit."
        return Finding(name=NAME, level="ok", says=says + left, numbers=numbers)
    least = rows[0]
    numbers["lambda_star"] = least["lambda_star"]
    says = (
        f"On {where} the least lambda* is {least['lambda_star']:.3f}, of {least['text']!r} ({least['positions']} "
        f"positions, p {least['teacher']:.5f}, b {least['base']:.5f}, c {asked.bound:g}); lambda is {asked.strength:g}."
        f"{left}"
    )
    if asked.strength <= least["lambda_star"]:
        return Finding(name=NAME, level="ok", says=says, numbers=numbers)
    if asked.allow_cliff:
        return Finding(name=NAME, level="ok", says=f"{says} options.allow_cliff allows it.", numbers=numbers)
    return Finding(
        name=NAME,
        level="stop",
        says=f"{says} Beyond it the weight no longer restores the class's rivals: strict formats break.",
        numbers=numbers,
        remedy=f"Set options.strength to at most {least['lambda_star']:.2f}, raise options.bound, or set "
        "options.allow_cliff: true.",
        study=STUDY,
    )


def classes_of(subject: Subject) -> tuple[Tensor, list[str]]:
    """(the class of each token, [V] int64, CONTENT for most; the classes' texts).

    Structural tokens are those without a letter or digit: punctuation, white space, and special tokens. Equal ones
    differ in surrounding white space only. The tokens that end a response are one class.
    """
    lm = subject.student
    special = {*lm.tokenizer.all_special_ids, *lm.tokenizer.added_tokens_decoder}
    names: dict[str, int] = {}
    found: list[int] = []
    for i in range(lm.vocabulary):
        if i in lm.stop_ids:
            key = "(the end)"
        elif i in special:
            key = str(lm.tokenizer.convert_ids_to_tokens(i))
        else:
            key = _structure(lm.tokenizer.decode([i]))
        found.append(names.setdefault(key, len(names)) if key else CONTENT)
    return torch.tensor(found), list(names)


def _structure(text: str) -> str:
    """The class of a token's text; empty for content, and for a part of a character."""
    if not text or "\ufffd" in text or any(one.isalnum() for one in text):
        return ""
    return text.strip() or ("(line break)" if "\n" in text else "(space)")


@torch.no_grad()
def measured(
    subject: Subject, rollouts: Sequence[Rollout], classes: tuple[Tensor, list[str]] | None = None
) -> list[ClassOfTokens]:
    """The classes that the teacher finds likely somewhere, with mean masses at those positions.

    `classes`: the class of each token and the classes' texts; default: `classes_of`.
    """
    assert subject.base is not None
    class_of, texts = classes or classes_of(subject)
    sums = torch.zeros(len(texts), 3, dtype=torch.float64)  # positions, p, b
    states = [
        _states(subject.teacher, rollouts, subject.contexts(rollouts), subject.method.temperature),
        _states(subject.base, rollouts, [rollout.prompt for rollout in rollouts], subject.method.temperature),
    ]
    heads = subject.teacher.head(), subject.base.head()
    for teacher, base in zip(*(one.split(TILE) for one in states), strict=True):
        masses: list[Tensor] = []
        modal = torch.empty(0, dtype=torch.long)
        for head, hidden in zip(heads, (teacher, base), strict=True):
            p = (head.logits(hidden).double() / subject.method.temperature).softmax(-1).cpu()  # [n, V]
            if not masses:
                modal = class_of[p.argmax(-1)]
            by_class = torch.zeros(len(p), len(texts) + 1, dtype=torch.float64)
            masses.append(by_class.index_add_(1, class_of % (len(texts) + 1), p))  # content is the last column
        here = (modal != CONTENT).nonzero()[:, 0]
        at = modal[here]
        values = torch.stack([torch.ones(len(here), dtype=torch.float64), *(one[here, at] for one in masses)], 1)
        sums.index_add_(0, at, values)
    return [
        ClassOfTokens(text=text, positions=int(n), teacher=p / n, base=b / n)
        for text, (n, p, b) in zip(texts, sums.tolist(), strict=True)
        if n
    ]


def _states(
    teacher: LocalTeacher, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], temperature: float
) -> Tensor:
    """The hidden states [N, H] that predict the trained tokens."""
    scores = teacher.score(rollouts, contexts, whole(temperature))
    kept: list[Tensor] = []
    for score, rollout in zip(scores, rollouts, strict=True):
        assert score.teacher_hidden is not None
        kept.append(score.teacher_hidden[rollout.trained.to(score.teacher_hidden.device)])
    return torch.cat(kept)
