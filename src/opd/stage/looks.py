"""What sample files and held-out files show of both models besides the numbers of the loss.

One more forward of each model over a few rows, without gradient and without random numbers of the run: training has the
same numbers with it and without. Where an evaluation measures a divergence, its own forward is read (`OnTheWay`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opd.errors import DataError, TeacherError
from opd.evaluation.divergence import divergence_by_token
from opd.loss.step import PhaseA
from opd.maths.divergences import reverse_kl
from opd.maths.largest import largest
from opd.maths.overlap import entropy
from opd.method import Method
from opd.models.language_model import LanguageModel
from opd.models.shown import texts_alone, token_texts
from opd.parallel import World
from opd.recipe.schema import StageSpec
from opd.stage.picks import Candidate, picked
from opd.stage.progress import Progress
from opd.teachers.scoring import rank_of
from opd.teachers.seen import Seen, has_states, seen_by_student, seen_by_teacher
from opd.types import Prompt, Rollout, Teacher

AT_ONCE = 4  # micro-batches whose hidden states are in memory together


@dataclass(frozen=True, slots=True, kw_only=True)
class Looks:
    """Columns by the number of the row in the method's own batch, and whole rows of the prompts that are followed."""

    rows: Mapping[int, Mapping[str, Any]] = field(default_factory=dict[int, Mapping[str, Any]])
    followed: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OnTheWay:
    """The columns of the first `rows` responses, from the pass that measures the divergence of both models on them.

    `look` is a `divergence.Look`. Only entropies, ranks and likely tokens are computed besides.
    """

    k: int
    rows: int
    tiles: list[dict[str, Tensor]] = field(default_factory=list[dict[str, Tensor]], init=False)

    def look(self, place: Tensor, step: Tensor, ids: Tensor, ours: Tensor, theirs: Tensor) -> None:
        """Keep what the columns need of a tile's tokens, if they are of these rows."""
        if not bool((wanted := place < self.rows).any()):
            return
        if not bool(wanted.all()):
            place, step, ids, ours, theirs = (values[wanted] for values in (place, step, ids, ours, theirs))
        tile = {"place": place, "step": step, "signal": reverse_kl(ours, theirs)}
        for whose, logp in (("student", ours), ("teacher", theirs)):
            tile |= {f"{whose}_{name}": value for name, value in _numbers_at(logp, ids, self.k).items()}
        self.tiles.append({name: value.cpu() for name, value in tile.items()})

    def columns(self, rollouts: Sequence[Rollout], tokenizer: Any) -> dict[int, dict[str, Any]]:
        """The columns by the response's place in `rollouts`; none for one with a token that was not compared."""
        if not self.tiles:
            return {}
        kept = {name: torch.cat([tile[name] for tile in self.tiles]) for name in self.tiles[0]}
        out: dict[int, dict[str, Any]] = {}
        for place in sorted(set(kept["place"].tolist())):
            found = {name: values[kept["place"] == place] for name, values in kept.items()}
            if len(found["step"]) == len(rollouts[place].response_ids):
                order = found["step"].argsort()
                out[place] = _compared({name: values[order] for name, values in found.items()}, tokenizer)
        return out


def _numbers_at(logp: Tensor, ids: Tensor, k: int) -> dict[str, Tensor]:
    """A model's numbers, as `Seen` names them, from its log-probs [n, V] at the tokens `ids` [n]."""
    values, top = largest(logp, k) if (k := min(k, logp.shape[1])) else (logp[:, :0], ids.new_zeros(len(ids), 0))
    own = ids[:, None]
    return {
        "logp": logp.gather(-1, own)[:, 0],
        "entropy": entropy(logp),
        "rank": rank_of(logp, own),
        "top_ids": top,
        "top_logp": values,
    }


def _compared(found: Mapping[str, Tensor], tokenizer: Any) -> dict[str, Any]:
    """The columns of one response; both models have the tokens of `tokenizer`."""
    student, teacher = (
        Seen(
            tokenizer=tokenizer,
            logp=found[f"{whose}_logp"],
            entropy=found[f"{whose}_entropy"],
            rank=found[f"{whose}_rank"],
            top_ids=found[f"{whose}_top_ids"],
            top_logp=found[f"{whose}_top_logp"],
        )
        for whose in ("student", "teacher")
    )
    logps = {"policy_logp": numbers(student.logp), "teacher_logp": numbers(teacher.logp)}
    return {**_of_student(student), **_of_teacher(teacher), **logps, "signal": numbers(found["signal"])}


def looks_at(
    spec: StageSpec,
    method: Method,
    student: LanguageModel,
    teacher: Teacher,
    phase_a: PhaseA,
    world: World,
    seed: tuple[int, int],
    progress: Progress,
) -> dict[int, dict[str, Any]]:
    """The columns of this process's picked rows, by their numbers. The picks are those of all processes' rows."""
    rollouts = phase_a.batch.rollouts
    mine = [Candidate(key, length, ratio) for key, length, ratio in _candidates(phase_a, world.rank)]
    chosen = picked([one for part in world.gather(mine) for one in part], spec.samples.rows, seed)
    rows = [i for i, one in enumerate(mine) if one.key in chosen]
    columns = columns_or_note(
        f"{spec.name}: the samples of step {seed[1] + 1}",
        progress,
        student,
        teacher,
        [rollouts[i] for i in rows],
        [phase_a.contexts[i] for i in rows],
        k=spec.samples.top_k,
        temperature=method.temperature,
        micro_batch_tokens=spec.micro_batch_tokens,
    )
    return {i: {"pick": chosen[mine[i].key], **one} for i, one in zip(rows, columns, strict=True)}


def columns_or_note(
    what: str,
    progress: Progress,
    student: LanguageModel,
    teacher: Teacher | None,
    rollouts: Sequence[Rollout],
    contexts: Sequence[Prompt],
    **how: Any,
) -> list[dict[str, Any]]:
    """`columns_of_models`; of a model that cannot read the rows, or a server that does not answer, a note and none.

    No number of training or of an evaluation needs these columns, so their absence ends no run.
    """
    for one in [None] if teacher is None else [teacher, None]:
        try:
            return columns_of_models(student, one, rollouts, contexts, **how)
        except (DataError, TeacherError) as error:
            whose = "the student" if one is None else one.name
            progress.note(f"{what}: the file has no columns of {whose}: {error}")
    return [{} for _ in rollouts]


def _candidates(phase_a: PhaseA, rank: int) -> list[tuple[tuple[int, ...], int, float | None]]:
    """(key, length, mean log-ratio of the trained tokens or None) of each of this process's own responses."""
    batch = phase_a.batch
    out: list[tuple[tuple[int, ...], int, float | None]] = []
    for i, rollout in enumerate(batch.rollouts):
        known = (batch.teacher_logp[i] - batch.policy_logp[i])[batch.mask[i]]
        mean = float(known.mean()) if len(known) else float("nan")
        out.append(
            (
                (rollout.prompt.id, rollout.sample, rank, i),
                len(rollout.response_ids),
                None if mean != mean else mean,
            )
        )
    return out


def columns_of_models(
    student: LanguageModel,
    teacher: Teacher | None,
    rollouts: Sequence[Rollout],
    contexts: Sequence[Prompt],
    *,
    k: int,
    temperature: float = 1.0,
    micro_batch_tokens: int,
    exact: bool = False,
) -> list[dict[str, Any]]:
    """The columns of both models' own choices, by row; of a teacher that does not tell them null.

    `exact`: also both log-probs, and as `signal` the exact reverse KL per token where both vocabularies are one.
    `teacher` None: the student's alone.
    """
    out: list[dict[str, Any]] = []
    for rows in _in_parts([len(one.response_ids) for one in rollouts], AT_ONCE * micro_batch_tokens):
        part = [rollouts[i] for i in rows], [contexts[i] for i in rows]
        out += _columns(student, teacher, *part, k, temperature, micro_batch_tokens, exact)
    return out


def _in_parts(lengths: Sequence[int], most: int) -> list[list[int]]:
    """The rows in order, in parts of at most `most` tokens or one row: the states of a part are in memory."""
    parts: list[list[int]] = []
    tokens = 0
    for i, length in enumerate(lengths):
        tokens += length
        if not parts or tokens > most:
            parts.append([])
            tokens = length
        parts[-1].append(i)
    return parts


def _columns(
    student: LanguageModel,
    teacher: Teacher | None,
    rollouts: Sequence[Rollout],
    contexts: Sequence[Prompt],
    k: int,
    temperature: float,
    micro_batch_tokens: int,
    exact: bool,
) -> list[dict[str, Any]]:
    """`columns_of_models` of some rows."""
    states = exact and teacher is not None and all(has_states(teacher.of(r.prompt.teacher_id)) for r in rollouts)
    ours = seen_by_student(
        student, rollouts, k=k, temperature=temperature, micro_batch_tokens=micro_batch_tokens, states=states
    )
    theirs: list[Seen | None] = [None] * len(rollouts)
    if teacher is not None:
        theirs = seen_by_teacher(teacher, rollouts, contexts, k=k, temperature=temperature, states=states)
    out = [
        {**_of_student(one), **({} if two is None else _of_teacher(two))} for one, two in zip(ours, theirs, strict=True)
    ]
    if not exact:
        return out
    for row, one, two, rollout in zip(out, ours, theirs, rollouts, strict=True):
        row["policy_logp"] = numbers(own(one.logp, rollout))
        row["teacher_logp"] = None if two is None else numbers(own(two.logp, rollout))
    by_teacher: dict[str | None, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        by_teacher.setdefault(rollout.prompt.teacher_id, []).append(i)
    if teacher is None:
        return out
    for name, rows in by_teacher.items():
        seen = {i: (ours[i], theirs[i]) for i in rows}
        for i, signal in _signals(student, teacher, name, seen, temperature).items():
            out[i]["signal"] = numbers(own(signal, rollouts[i]))
    return out


def _signals(
    student: LanguageModel,
    teacher: Teacher,
    name: str | None,
    seen: Mapping[int, tuple[Seen, Seen | None]],
    temperature: float,
) -> dict[int, Tensor]:
    """The exact reverse KL [T] of the rows of one teacher that have both models' hidden states, by row.

    One pass over all: a product with few rows costs the reading of the output layer.
    """
    pairs = {i: (a.hidden, b.hidden) for i, (a, b) in seen.items() if b is not None}
    both = {i: (a, b) for i, (a, b) in pairs.items() if a is not None and b is not None}
    if not both:
        return {}
    hidden = [torch.cat(states) for states in zip(*both.values(), strict=True)]
    signal = divergence_by_token(student.head(), hidden[0], teacher.head(name), hidden[1], temperature)
    return dict(zip(both, signal.split([len(a) for a, _ in both.values()]), strict=True))


def _of_student(seen: Seen) -> dict[str, Any]:
    return {"student_entropy": numbers(seen.entropy), **_top("student", seen)}


def _of_teacher(seen: Seen) -> dict[str, Any]:
    row = {
        "teacher_entropy": _known(seen, numbers(seen.entropy)),
        "teacher_rank": _known(seen, None if seen.rank is None else seen.rank.tolist()),
        **{name: _known(seen, values) for name, values in _top("teacher", seen).items()},
    }
    if seen.units is not None:
        names = ("student_start", "student_end", "teacher_start", "teacher_end")
        row["units"] = [dict(zip(names, unit, strict=True)) for unit in seen.units]
        row["teacher_tokens"] = token_texts([seen.own_ids], seen.tokenizer)[0]
    return row


def _known(seen: Seen, values: list[Any] | None) -> list[Any] | None:
    """The values by token, with None for tokens that the model has no numbers of."""
    if values is None or seen.inside is None:
        return values
    return [value if there else None for value, there in zip(values, seen.inside.tolist(), strict=True)]


def _top(whose: str, seen: Seen) -> dict[str, Any]:
    """The most likely tokens of each position: ids, log-probs and texts; empty if there are none."""
    if seen.top_ids is None or seen.top_logp is None or not seen.top_ids.shape[1]:
        return {}
    ids: list[list[int]] = seen.top_ids.tolist()
    texts = texts_alone({i for row in ids for i in row}, seen.tokenizer)
    return {
        f"{whose}_top_ids": ids,
        f"{whose}_top_logp": seen.top_logp.tolist(),
        f"{whose}_top_tokens": [[texts[i] for i in row] for row in ids],
    }


def own(values: Tensor | None, rollout: Rollout) -> Tensor | None:
    """Values by token [T], NaN at the tokens of an environment, which no model is scored on."""
    if values is None or rollout.talk is None:
        return values
    return values.masked_fill(rollout.talk.heard.to(values.device), float("nan"))


def numbers(values: Tensor | None) -> list[float | None] | None:
    """A list with None for NaN; None if there is no number at all."""
    if values is None:
        return None
    listed = [None if value != value else value for value in values.tolist()]
    return listed if any(value is not None for value in listed) else None
