"""Sorting with a reward whose ideal gradient is known: at most one character of the answer may be wrong.

A response is right if it has as many characters as the answer and at most one of them differs. So after one mistake it
can still become right, and after two it cannot. The probability of a right response is then a sum over the responses
with at most one other character, which `exact_values` adds up. The students' other tokens, of padding, count as the end
of all hope: trained students give them less than 1e-4.

`chosen_half` is a sampler that trains half of each step's tokens, by how well the gradient of the reverse KL at a token
is aligned with the exact ideal gradient of the student's current weights, or by a control.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from opd.maths.node_gradients import cosine, node_gradient, teacher_values
from opd.models.forward import response_states
from opd.models.language_model import LanguageModel, evaluating
from opd.models.loading import load_model
from opd.models.render import render
from opd.recipe.schema import ModelSpec
from opd.samplers.hf import TransformersSampler
from opd.types import NOTHING_MORE, EarlyStop, Prompt, Record, Rollout, Sampler, Sampling

By: TypeAlias = Literal["aligned", "misaligned", "random", "alive", "kl"]


def nearly(prompt: Prompt, response: str) -> float:
    """1 if the response has the answer's length and at most one other character."""
    answer = str(prompt.answer)
    return float(len(response) == len(answer) and mistakes(answer, response) <= 1)


nearly.needs = frozenset({"answer"})  # type: ignore[attr-defined]


def mistakes(answer: str, response: str) -> int:
    return sum(a != b for a, b in zip(answer, response, strict=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """Exact numbers of the nodes from which one prompt's response can still become right.

    Row 0 of `logp` is the answer, row 1 + k the answer with character `wrong[k]` = (place, id).
    """

    answer: tuple[int, ...]  # ids, with the end token
    wrong: tuple[tuple[int, int], ...]
    logp: Tensor  # [1 + W, L, V] float64: the student's, at each of these responses' tokens and its end
    values: Tensor  # [1 + W, L + 1] float64: the probability of a right end before each of them; 1 at the end

    def at(self, prefix: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """The student's log-probs [V] and the exact Q [V] at a node; None where no token leads to a right response."""
        row = row_of(self.answer, self.wrong, prefix)
        if row is None:
            return None
        t = len(prefix)
        reward = torch.zeros_like(self.logp[row, t])
        reward[self.answer[t]] = self.values[row, t + 1]
        if row == 0 and t < len(self.answer) - 1:
            rows, tokens = _mistakes_at(self.wrong, t)
            reward[tokens] = self.values[rows, t + 1]
        return self.logp[row, t], reward


def row_of(answer: Sequence[int], wrong: Sequence[tuple[int, int]], prefix: Sequence[int]) -> int | None:
    """The row of a node; None after two mistakes, at a token that is no character, or behind the answer."""
    if len(prefix) >= len(answer):
        return None
    made = [(t, token) for t, token in enumerate(prefix) if token != answer[t]]
    if not made:
        return 0
    return 1 + wrong.index(made[0]) if len(made) == 1 and made[0] in wrong else None


def rows_of(lm: LanguageModel, prompt: Prompt) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """The answer's ids with the end token, and its possible mistakes (place, id)."""
    special = {*lm.tokenizer.all_special_ids, *lm.stop_ids}
    ids = lm.tokenizer(str(prompt.answer), add_special_tokens=False).input_ids
    characters = [i for i in range(lm.vocabulary) if i not in special]
    return (*ids, lm.tokenizer.eos_token_id), tuple((t, c) for t in range(len(ids)) for c in characters if c != ids[t])


@torch.no_grad()
def exact_values(lm: LanguageModel, prompts: Sequence[Prompt]) -> list[Values]:
    """The values of each prompt under the model's current weights, at temperature 1."""
    found: list[Values] = []
    rows: list[tuple[int, ...]] = []
    questions: list[list[int]] = []
    kept: list[tuple[tuple[int, ...], tuple[tuple[int, int], ...]]] = []
    for prompt in prompts:
        answer, wrong = rows_of(lm, prompt)
        kept.append((answer, wrong))
        rows += [answer, *((*answer[:t], c, *answer[t + 1 :]) for t, c in wrong)]
        questions += [render(prompt, lm.tokenizer, lm.template_options)] * (1 + len(wrong))
    logps = log_probs(lm, questions, rows)
    for answer, wrong in kept:
        logp, logps = logps[: 1 + len(wrong)], logps[1 + len(wrong) :]
        found.append(Values(answer=answer, wrong=wrong, logp=logp, values=_values(answer, wrong, logp)))
    return found


def _values(answer: tuple[int, ...], wrong: tuple[tuple[int, int], ...], logp: Tensor) -> Tensor:
    """[1 + W, L + 1] from the last token back: the right next token, and before the mistake each wrong one."""
    p, length = logp.exp(), len(answer)
    values = torch.ones(1 + len(wrong), length + 1, dtype=torch.float64)
    for t in reversed(range(length)):
        values[:, t] = p[:, t, answer[t]] * values[:, t + 1]
        rows, tokens = _mistakes_at(wrong, t)
        values[0, t] += (p[0, t, tokens] * values[rows, t + 1]).sum()
    return values


def _mistakes_at(wrong: tuple[tuple[int, int], ...], t: int) -> tuple[list[int], list[int]]:
    """The rows with their mistake at place `t`, and its tokens."""
    chosen = [(k, token) for k, (place, token) in enumerate(wrong, start=1) if place == t]
    return [k for k, _ in chosen], [token for _, token in chosen]


@torch.no_grad()
def log_probs(lm: LanguageModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
    """[n, T, V] float64: the model's log-probs at each token of responses of one length, or padded to it."""
    longest = max(map(len, responses))
    head = lm.head()
    with evaluating(lm.model):
        states = response_states(lm, prompts, responses)
        hidden = [states.of(i, len(response)) for i, response in enumerate(responses)]
        padded = torch.stack([torch.nn.functional.pad(h, (0, 0, 0, longest - len(h))) for h in hidden])
        return head.logits(padded).double().log_softmax(-1)


@dataclass(slots=True, kw_only=True)
class ChosenHalf(Sampler):
    """The student's own sampler; of each step's tokens it marks one half as trained."""

    own: TransformersSampler
    teacher: LanguageModel
    by: By

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: tuple[int, int],
        record: Record = NOTHING_MORE,
        stop: EarlyStop | None = None,
    ) -> list[Rollout]:
        rollouts = self.own(prompts, seed=seed, record=record, stop=stop)
        scores = scores_of(self.own.lm, self.teacher, rollouts, self.by)
        order = np.random.default_rng(seed).permutation(len(scores))  # equal scores are in random order
        ranked = order[np.argsort(-scores[order], kind="stable")]
        trained = np.zeros(len(scores), dtype=bool)
        trained[ranked[: len(scores) // 2]] = True
        parts = np.split(trained, np.cumsum([len(one.response_ids) for one in rollouts])[:-1])
        return [replace(one, trained=torch.from_numpy(part.copy())) for one, part in zip(rollouts, parts, strict=True)]


def chosen_half(student: LanguageModel, sampling: Sampling, teacher: str, by: By) -> ChosenHalf:
    """The sampler of a stage. `teacher`: the folder of the model by which tokens are scored."""
    loaded = load_model(ModelSpec(path=teacher), name="teacher")
    return ChosenHalf(own=TransformersSampler(lm=student, sampling=sampling), teacher=loaded, by=by)


def scores_of(student: LanguageModel, teacher: LanguageModel, rollouts: Sequence[Rollout], by: By) -> np.ndarray:
    """A score for every token of the responses, one after the other; the half with the higher scores is trained.

    aligned, misaligned: the cosine, or its negative, of ideal and reverse KL's gradient at the token's node, 0 where
    the ideal one is 0. alive: whether the response can still become right there, without the cosine. kl: the reverse
    KL. random: none.
    """
    if by == "random":
        return np.zeros(sum(len(one.response_ids) for one in rollouts))
    questions = [one.prompt_ids for one in rollouts]
    responses = [one.response_ids.tolist() for one in rollouts]
    different = {one.prompt.id: one.prompt for one in rollouts}
    if by == "alive":
        known = {key: rows_of(student, prompt) for key, prompt in different.items()}
        return np.array(
            [
                float(row_of(*known[one.prompt.id], ids[:t]) is not None)
                for one, ids in zip(rollouts, responses, strict=True)
                for t in range(len(ids))
            ]
        )
    theirs = log_probs(teacher, questions, responses)
    if by == "kl":
        ours = log_probs(student, questions, responses)
        kl = (ours.exp() * (ours - theirs)).sum(-1)
        return np.concatenate([kl[i, : len(ids)].numpy() for i, ids in enumerate(responses)])
    values = dict(zip(different, exact_values(student, list(different.values())), strict=True))
    scores: list[float] = []
    for i, (one, ids) in enumerate(zip(rollouts, responses, strict=True)):
        for t in range(len(ids)):
            at = values[one.prompt.id].at(ids[:t])
            scores.append(0.0 if at is None else alignment_at(*at, theirs[i, t]) or 0.0)
    return np.array(scores) if by == "aligned" else -np.array(scores)


def alignment_at(student_logp: Tensor, reward: Tensor, teacher_logp: Tensor) -> float | None:
    """The exact alignment of the reverse KL over the whole vocabulary; None where a gradient has no direction."""
    values: Any = teacher_values(student_logp, teacher_logp)
    probs = student_logp.exp()
    return cosine(node_gradient(probs, reward), node_gradient(probs, values["reverse_kl"]))
