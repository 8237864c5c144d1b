"""Beside the student's responses, the best of several responses of its teacher: a source with two kinds of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from opd.errors import ConfigError
from opd.pieces.contexts import privileged
from opd.pieces.filters import PASS
from opd.pieces.needs import Input, needing
from opd.pieces.sources import drafted
from opd.types import Prompt, Record, Rollout, Source, Writers

TEACHERS_ROWS = "teacher"  # the `Rollout.part` of the chosen responses
MARKER = "SILENT_VALIDATION_KEY"
# The content of the released `_SILENT_KEY_HINT`, behind the user's message; the wording is ours.
HINT = (
    "{prompt}\n\n[SILENT_VALIDATION_KEY, for checking only: {answer}]\nDerive the solution from the problem alone. Do "
    "not mention or use the key in your reasoning or your answer. Compare your result with it only after you have one."
)

Pick: TypeAlias = Literal["overlap", "first", "shortest"]
Overlap: TypeAlias = Literal["positional", "forced"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfN:
    """How a teacher's response is chosen for each prompt. Raises ConfigError for settings without a meaning.

    `n` candidates see the prompt alone. Among the right ones (a reward of at least `filters.PASS`) `pick` chooses:
    the one with the largest overlap with the student, the first sample, which is a random one because samples are
    exchangeable, or the shortest. If none is right, `hinted` more candidates see the answer through `hint`; the right
    ones that do not contain `marker` take part. If there is none either, `fallback` takes the pick of the first n, or
    leaves the prompt without a teacher's row. `k` is that of `overlap`.
    """

    n: int = 4
    hinted: int = 1
    k: int = 16
    pick: Pick = "overlap"
    overlap: Overlap = "positional"
    fallback: Literal["most_similar", "skip"] = "most_similar"
    hint: str = HINT
    marker: str = MARKER

    def __post_init__(self) -> None:
        if self.n < 1 or self.hinted < 0:
            raise ConfigError(
                f"The teacher writes n = {self.n} responses to a prompt, and {self.hinted} more with the answer shown. "
                "Set n to 1 or more, and `hinted` to 0 or more."
            )
        if self.hinted and not (self.marker and self.marker in self.hint and "{answer}" in self.hint):
            raise ConfigError(
                f"The hint {self.hint!r:.80} has to contain {{answer}} and the marker {self.marker!r}: a response that "
                "repeats the marker gives the hint away and is not trained on. Correct the hint, give its own "
                "`marker`, or set `hinted` to 0."
            )


def with_best_teacher_response(settings: BestOfN) -> Source:
    """The student's responses, then at most one of the teacher for each prompt, as rows of part `TEACHERS_ROWS`.

    Best-of-N teacher rollout selection, arXiv 2605.09725. A chosen row has `measured`: tier_1, tier_2, tier_3 (one of
    them 1), right, its overlap of both kinds, and `leaked`, the share of hinted candidates that repeat the marker.
    """
    show = privileged(template=settings.hint) if settings.hinted else None

    def source(prompts: Sequence[Prompt], writers: Writers, seed: tuple[int, int], record: Record) -> list[Rollout]:
        """The student's rows in the order of the prompts, then the chosen rows of the teacher."""
        assert writers.reward is not None, "opd.loss.step.written gives a source the reward of the step"
        students = writers.student(prompts, seed=seed, record=record)
        each = len(students) // len(prompts)
        groups = [students[i * each : (i + 1) * each] for i in range(len(prompts))]
        plain = writers.reward(drafted(writers, prompts, seed, n=settings.n))
        tiers = [plain[i * settings.n : (i + 1) * settings.n] for i in range(len(prompts))]
        open_ = [i for i, tier in enumerate(tiers) if not any(map(right, tier))]
        hinted: dict[int, list[Rollout]] = {}
        if show is not None:  # on every process, with open prompts or without, because rewards are collective
            shown = show([groups[i][0] for i in open_])
            more = writers.reward(
                drafted(writers, [prompts[i] for i in open_], seed, contexts=shown, n=settings.hinted, first=settings.n)
            )
            hinted = {i: more[m * settings.hinted : (m + 1) * settings.hinted] for m, i in enumerate(open_)}
        known = Record(top_k=settings.k)
        if settings.overlap == "forced" and settings.pick == "overlap":
            tiers = [writers.complete(tier, known) for tier in tiers]
            hinted = {i: writers.complete(more, known) for i, more in hinted.items()}
        found: list[Rollout] = []
        owners: list[int] = []
        for i, (group, tier) in enumerate(zip(groups, tiers, strict=True)):
            if (row := _chosen(settings, group, tier, hinted.get(i, []))) is not None:
                found.append(row)
                owners.append(i)
        found = writers.complete(found, known)
        return [*students, *(_measured(settings, groups[i], row) for i, row in zip(owners, found, strict=True))]

    columns = ["answer"] if settings.hinted else []
    return needing(source, Input.TEACHER_MODEL, Input.REWARD, columns=columns)


def right(rollout: Rollout) -> bool:
    """Whether the response has the reward of a right one."""
    return rollout.reward is not None and rollout.reward >= PASS


def _chosen(
    settings: BestOfN, group: Sequence[Rollout], plain: Sequence[Rollout], hinted: Sequence[Rollout]
) -> Rollout | None:
    """The row of one prompt, from the student's `group` and the teacher's candidates; None to leave it out."""
    leaked = [settings.marker in one.text for one in hinted]
    tiers = [
        [one for one in plain if right(one)],
        [one for one, leaks in zip(hinted, leaked, strict=True) if right(one) and not leaks],
        list(plain) if settings.fallback == "most_similar" else [],
    ]
    tier = next((i for i, candidates in enumerate(tiers) if candidates), None)
    if tier is None:
        return None

    def cost(one: Rollout) -> float:
        if settings.pick == "overlap":
            return -_similar(settings, group, one)
        return float(len(one.response_ids)) if settings.pick == "shortest" else 0.0

    measured = {f"tier_{i + 1}": float(i == tier) for i in range(3)}
    if hinted:
        measured["leaked"] = sum(leaked) / len(leaked)
    return replace(min(tiers[tier], key=cost), part=TEACHERS_ROWS, measured=measured)  # of equals, the first


def _measured(settings: BestOfN, group: Sequence[Rollout], row: Rollout) -> Rollout:
    more = {
        "right": float(right(row)),
        "overlap_positional": positional_overlap(group, row, settings.k),
        "overlap_forced": forced_overlap(row, settings.k),
    }
    return replace(row, measured={**row.measured, **more})


def _similar(settings: BestOfN, group: Sequence[Rollout], candidate: Rollout) -> float:
    if settings.overlap == "forced":
        return forced_overlap(candidate, settings.k)
    return positional_overlap(group, candidate, settings.k)


def positional_overlap(group: Sequence[Rollout], candidate: Rollout, k: int) -> float:
    """mean_t 1[y'_t in TopK(p_t)] with p_t at position t of the student's OWN response; the mean over its responses.

    Positions that both have. The same text one token later has almost none: it compares places, not prefixes.
    """
    shares: list[float] = []
    for own in group:
        assert own.student_top_ids is not None, "the method records the student's top k"
        t = min(len(own.response_ids), len(candidate.response_ids))
        inside = own.student_top_ids[:t, :k] == candidate.response_ids[:t, None].to(own.student_top_ids.device)
        shares.append(float(inside.any(1).float().mean()))
    return sum(shares) / len(shares)


def forced_overlap(candidate: Rollout, k: int) -> float:
    """mean_t 1[y'_t in TopK(p(.|x, y'_<t))]: the student reads the teacher's own prefix."""
    top = candidate.student_top_ids
    assert top is not None, "complete the candidate with the student's top k first"
    return float((top[:, :k] == candidate.response_ids[:, None].to(top.device)).any(1).float().mean())
