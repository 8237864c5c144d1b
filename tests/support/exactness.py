"""How far the library's sampling, scoring, gradient and saved model are from plain forwards of one row at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opd import methods
from opd.models import saving
from opd.models.language_model import LanguageModel
from opd.pieces.supports import sampled
from opd.samplers.hf import TransformersSampler
from opd.types import Rollout, Sampling, ScoreRequest
from support.models import full_logits, prompts_of, step, teacher_of

# Four lengths. A prompt of more than 16 tokens is read once for its responses, with gradient.
PROMPTS = ("abcab", "hgfedcbahgfedcbahgfedcba", "abcabcdefghijkabcabcdefghijkpqrstu", "hgfedcbahgfedcbahgfedcbax")
RESPONSE = 8
STEPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Exactness:
    """The largest differences over STEPS steps of reverse_kl: log-probs in nats, the gradient relative to its norm."""

    sampler: float  # the record of the sampled tokens against a fresh forward of the row
    teacher: float  # scores of a batch against a forward of the row
    gradient: float  # against autograd through forwards of one row at a time
    saved: float  # the saved folder's logits against the live model's

    @property
    def exact(self) -> bool:
        return max(self.sampler, self.teacher, self.saved) <= 1e-5 and self.gradient <= 1e-4


def exactness(student: LanguageModel, teacher: LanguageModel) -> Exactness:
    """Measure it. The student trains two steps."""
    method = methods.build("reverse_kl", {})
    scorer = teacher_of(method, student, teacher, micro_batch_tokens=10**6)
    sampling = Sampling(max_completion_length=RESPONSE, n=2)
    sampler = TransformersSampler(lm=student, sampling=sampling)
    optimiser = torch.optim.SGD(student.trainable().values(), lr=1e-2)
    worst = [0.0, 0.0, 0.0]
    for number in range(STEPS):
        rollouts = sampler(prompts_of(*PROMPTS), seed=(0, number))
        scores = scorer.score(rollouts, [r.prompt for r in rollouts], ScoreRequest(support=sampled()))
        got = step(method, student, scorer, rollouts, micro_batch_tokens=400)
        with torch.no_grad():
            for rollout, score in zip(rollouts, scores, strict=True):
                ids = rollout.response_ids[:, None]
                mine = log_probs(student, rollout).gather(-1, ids)[:, 0]
                its = log_probs(teacher, rollout).gather(-1, ids)[:, 0]
                assert rollout.policy_logp is not None
                worst[0] = max(worst[0], largest(rollout.policy_logp, mine))
                worst[1] = max(worst[1], largest(score.teacher_logp, its))
        expected = autograd(student, teacher, rollouts)
        worst[2] = max(worst[2], relative(got.grads, expected))
        for name, parameter in student.trainable().items():
            parameter.grad = expected[name].clone()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return Exactness(sampler=worst[0], teacher=worst[1], gradient=worst[2], saved=saved_difference(student, rollouts))


def log_probs(lm: LanguageModel, rollout: Rollout) -> Tensor:
    """[T, V], of the row alone, in eval()."""
    return full_logits(lm.causal_lm.eval(), rollout.prompt_ids, rollout.response_ids, lm.vocabulary).log_softmax(-1)


def autograd(student: LanguageModel, teacher: LanguageModel, rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """The gradient of (1/B) sum_i (1/T_i) sum_t KL(p || q)."""
    for rollout in rollouts:
        p = log_probs(student, rollout)
        with torch.no_grad():
            q = log_probs(teacher, rollout)
        divergence = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1).mean() / len(rollouts)
        divergence.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in student.trainable().items()}
    student.model.zero_grad(set_to_none=True)
    return grads


def saved_difference(lm: LanguageModel, rollouts: Sequence[Rollout]) -> float:
    """Between the log-probs of the live model and of the one that transformers loads from its folder, in nats."""
    from transformers import AutoModelForCausalLM

    saving.check_type(lm)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        saving.save(lm, Path(folder))
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        again: nn.Module = model.eval()
        return max(
            largest(
                log_probs(lm, rollout),
                full_logits(again, rollout.prompt_ids, rollout.response_ids, lm.vocabulary).log_softmax(-1),
            )
            for rollout in rollouts
        )


def largest(a: Tensor, b: Tensor) -> float:
    return float(torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf).max())


def relative(got: Any, expected: dict[str, Tensor]) -> float:
    """The norm of the difference over the norm of `expected`."""
    square = sum(float((got[name].double() - grad.double()).square().sum()) for name, grad in expected.items())
    norm = sum(float(grad.double().square().sum()) for grad in expected.values())
    return (square / norm) ** 0.5
