"""Compare student and teacher at every token of some responses, over the whole vocabulary.

    S_p, S_q  the k most likely tokens of student and teacher at a position
    overlap   their intersection

The log-probs of both models are computed tile by tile (`head.paired_log_probs`); each tile keeps a few numbers per
token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.errors import ConfigError
from opd.evaluation.buckets import Buckets
from opd.maths.divergences import forward_kl, reverse_kl
from opd.maths.metrics import Metrics
from opd.maths.overlap import entropy, overlap_advantage, overlap_mass, rank, shared
from opd.maths.statistics import repeated
from opd.models.forward import batches, response_states
from opd.models.head import Head, TeacherHead, paired_log_probs
from opd.models.language_model import LanguageModel, evaluating
from opd.pieces.supports import full
from opd.types import Prompt, Rollout, ScoreRequest, Teacher

# Columns that looping text changes; their means are also reported for repeated and for other tokens (arXiv 2605.11182,
# released diagnostics).
BY_REPETITION = ("log_ratio", "student_logp", "teacher_logp", "teacher_rank", "reverse_kl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One entry per trained token, [N], on the CPU. Log-probs, entropies and divergences are in nats.

    `row`: index of the rollout as passed. `step`: position in its response. `overlap`: how many of the k tokens are in
    both lists; where it is 0, `overlap_advantage` is undefined, stored as 0 and left out of means. `repeated`: the
    3-gram that ends here occurred before in the response.
    """

    k: int
    row: Tensor
    step: Tensor
    repeated: Tensor  # bool
    student_logp: Tensor  # of the sampled token
    teacher_logp: Tensor  # of the sampled token
    teacher_rank: Tensor  # of the sampled token among S_q, from 1; k + 1 if it is not in it
    outside_student_top: Tensor  # bool: the sampled token is not in S_p
    outside_teacher_top: Tensor  # bool: the sampled token is not in S_q
    overlap: Tensor
    overlap_advantage: Tensor  # arXiv 2604.13016 eq. 7
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_mass_on_student_top: Tensor
    student_mass_on_teacher_top: Tensor
    student_mass_on_overlap: Tensor  # arXiv 2604.13016 eq. 9
    teacher_mass_on_student_top: Tensor
    teacher_mass_on_teacher_top: Tensor
    teacher_mass_on_overlap: Tensor  # arXiv 2604.13016 eq. 10
    reverse_kl: Tensor  # exact
    forward_kl: Tensor  # exact

    def columns(self) -> dict[str, Tensor]:
        """The columns to average, by name, [N] each."""
        made = {
            "log_ratio": self.teacher_logp - self.student_logp,
            "overlap_ratio": self.overlap / self.k,  # arXiv 2604.13016 eq. 6
            "entropy_gap": (self.teacher_entropy - self.student_entropy).abs(),  # arXiv 2604.13016 eq. 8
        }
        return made | {name: getattr(self, name).double() for name in AVERAGED}

    def metrics(self, buckets: Buckets, prefix: str = "compare/") -> Metrics:
        """Means over all tokens, by bucket of positions, and for `BY_REPETITION` by whether the token repeats.

        Their names are `prefix` and then NAME, NAME/from_00064, NAME/repeated or NAME/fresh. A mean over no token is
        left out.
        """
        metrics = Metrics()
        some_overlap = self.overlap > 0
        for name, values in self.columns().items():
            exists = some_overlap if name == "overlap_advantage" else torch.ones_like(some_overlap)
            v = values[exists]
            metrics.mean(prefix + name, v.sum().item(), len(v))
            buckets.add_means(metrics, prefix + name, v, self.step[exists])
            if name in BY_REPETITION:
                for kind, chosen in (("repeated", self.repeated), ("fresh", ~self.repeated)):
                    metrics.mean(f"{prefix}{name}/{kind}", values[chosen].sum().item(), int(chosen.sum()))
        return metrics

    def summary(self, bucket: int = 64) -> dict[str, float]:
        """`metrics` as numbers by name; `bucket` is the smallest width of a bucket in tokens (`Buckets.over`)."""
        longest = int(self.step.max()) + 1 if len(self.step) else 1
        numbers = self.metrics(Buckets.over(bucket, longest)).reduce()
        return {name.removeprefix("compare/"): value for name, value in numbers.items()}


MEASURED = tuple(name for name in Comparison.__dataclass_fields__ if name not in ("k", "row", "step", "repeated"))


AVERAGED = ("repeated", *(name for name in MEASURED if name != "overlap"))


def check_k(k: int, vocabulary: int) -> None:
    """Raise ConfigError unless 1 <= k <= vocabulary."""
    if not 1 <= k <= vocabulary:
        raise ConfigError(
            f"A comparison uses the k most likely tokens of each model: k is {k}, and the vocabulary has "
            f"{vocabulary} tokens. Set diagnostics.k to a number in 1..{vocabulary}."
        )


def whole(temperature: float = 1.0) -> ScoreRequest:
    """A request for the teacher's whole distribution at each token."""
    return ScoreRequest(support=full(), temperature=temperature, sampled=False)


def check_comparable(teacher: Teacher, setting: str) -> None:
    """Raise ConfigError for a teacher without its whole distribution, which `setting` needs."""
    if why := teacher.refuses(whole()):
        raise ConfigError(
            f"{setting} compares student and teacher over the whole vocabulary at each of the student's tokens, and "
            f"{teacher.name} does not support this: {why}. Turn the comparison off, or use a teacher of the student's "
            "family and another method."
        )


@torch.no_grad()
def compare(
    student: LanguageModel,
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    contexts: Sequence[Prompt],
    *,
    k: int = 16,
    temperature: float = 1.0,
    micro_batch_tokens: int = 4096,
) -> Comparison:
    """Compare both models at every trained token of `rollouts`; the teacher reads `contexts` (one per rollout).

    `temperature` divides the logits of both. k = 16 as in arXiv 2604.13016. Costs one forward pass of each model and
    two output-layer products per token; the teacher's hidden states of all tokens are kept. Raises ConfigError for a k
    out of range, DataError for a sequence longer than a model's positions.
    """
    check_k(k, student.vocabulary)
    indices = [i for i, rollout in enumerate(rollouts) if bool(rollout.trained.any())]
    if not indices:
        return _joined([], k)
    chosen = [rollouts[i] for i in indices]
    scores = teacher.score(chosen, [contexts[i] for i in indices], whole(temperature))
    heads = student.head().detached(), teacher.head()
    parts: list[dict[str, Tensor]] = []
    for batch, student_NH in _states(student, chosen, micro_batch_tokens):
        steps = [_trained_steps(chosen[j]) for j in batch]
        teacher_NH = torch.cat([_at(scores[j].teacher_hidden, at) for j, at in zip(batch, steps, strict=True)])
        ids = torch.cat([_at(chosen[j].response_ids, at) for j, at in zip(batch, steps, strict=True)])
        part = _measured(heads, student_NH, teacher_NH, ids.to(student_NH.device), k, temperature)
        part["row"] = torch.cat([torch.full_like(at, indices[j]) for j, at in zip(batch, steps, strict=True)])
        part["step"] = torch.cat(steps)
        again = [torch.tensor(repeated(chosen[j].response_ids.tolist())) for j in batch]
        part["repeated"] = torch.cat([_at(values, at) for values, at in zip(again, steps, strict=True)])
        parts.append(part)
    return _joined(parts, k)


def _trained_steps(rollout: Rollout) -> Tensor:
    """Positions of the trained tokens, on the CPU."""
    return rollout.trained.nonzero()[:, 0].cpu()


def _at(values: Tensor | None, steps: Tensor) -> Tensor:
    """[T, ...] -> [n, ...]: the values at positions `steps` of a response."""
    assert values is not None
    return values[steps.to(values.device)]


def _states(
    student: LanguageModel, rollouts: Sequence[Rollout], micro_batch_tokens: int
) -> Iterator[tuple[list[int], Tensor]]:
    """By batch: indices of its rollouts, and the student's hidden states [N, H] that predict their trained tokens."""
    prompts = [rollout.prompt_ids for rollout in rollouts]
    responses = [rollout.response_ids.tolist() for rollout in rollouts]
    lengths = [len(response) for response in responses]
    with evaluating(student.model):
        for batch in batches(student, prompts, lengths, micro_batch_tokens):
            states = response_states(student, [prompts[j] for j in batch], [responses[j] for j in batch])
            own = [_at(states.of(place, lengths[j]), _trained_steps(rollouts[j])) for place, j in enumerate(batch)]
            yield batch, torch.cat(own)


def _measured(
    heads: tuple[Head, TeacherHead], student_NH: Tensor, teacher_NH: Tensor, ids: Tensor, k: int, temperature: float
) -> dict[str, Tensor]:
    """The columns of `MEASURED` at hidden states of the same N positions."""
    parts: list[dict[str, Tensor]] = []
    start = 0
    for pair in paired_log_probs(heads[0], student_NH, heads[1], teacher_NH, temperature):
        parts.append(_of_tile(*pair, ids[start : start + len(pair[0])], k))
        start += len(pair[0])
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _of_tile(student_nV: Tensor, teacher_nV: Tensor, ids: Tensor, k: int) -> dict[str, Tensor]:
    """The columns of `MEASURED` from both models' log-probs and the sampled ids [n]."""
    student_top, teacher_top = student_nV.topk(k).indices, teacher_nV.topk(k).indices
    p_on_student, q_on_student = student_nV.gather(1, student_top), teacher_nV.gather(1, student_top)
    p_on_teacher, q_on_teacher = student_nV.gather(1, teacher_top), teacher_nV.gather(1, teacher_top)
    in_both = shared(student_top, teacher_top)
    teacher_rank = rank(ids, teacher_top)
    return {
        "student_logp": student_nV.gather(1, ids[:, None])[:, 0],
        "teacher_logp": teacher_nV.gather(1, ids[:, None])[:, 0],
        "teacher_rank": teacher_rank,
        "outside_student_top": rank(ids, student_top) > k,
        "outside_teacher_top": teacher_rank > k,
        "overlap": in_both.sum(1),
        "overlap_advantage": overlap_advantage(p_on_student, q_on_student, in_both),
        "student_entropy": entropy(student_nV),
        "teacher_entropy": entropy(teacher_nV),
        "student_mass_on_student_top": p_on_student.exp().sum(1),
        "student_mass_on_teacher_top": p_on_teacher.exp().sum(1),
        "student_mass_on_overlap": overlap_mass(p_on_student, in_both),
        "teacher_mass_on_student_top": q_on_student.exp().sum(1),
        "teacher_mass_on_teacher_top": q_on_teacher.exp().sum(1),
        "teacher_mass_on_overlap": overlap_mass(q_on_student, in_both),
        "reverse_kl": reverse_kl(student_nV, teacher_nV),
        "forward_kl": forward_kl(student_nV, teacher_nV),
    }


def _joined(parts: Sequence[dict[str, Tensor]], k: int) -> Comparison:
    """One Comparison, sorted by rollout and position."""
    kinds = {"row": torch.long, "step": torch.long, "teacher_rank": torch.long, "overlap": torch.long}
    kinds |= dict.fromkeys(("repeated", "outside_student_top", "outside_teacher_top"), torch.bool)
    joined: dict[str, Tensor] = {}
    for name in ("row", "step", "repeated", *MEASURED):
        none = torch.empty(0, dtype=kinds.get(name, torch.float32))
        joined[name] = torch.cat([none, *(part[name] for part in parts)])
    order = (joined["row"] * (int(joined["step"].max()) + 1) + joined["step"]).argsort() if parts else slice(None)
    return Comparison(k=k, **{name: values[order] for name, values in joined.items()})
