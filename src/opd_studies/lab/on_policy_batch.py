"""Both models' distributions at tokens that the student samples, and gradients of the student's output layer.

The gradient of a batch with respect to the output layer is G = sum_n g_n h_n' over its tokens n, where g_n is the
gradient at the logits and h_n the hidden state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd_studies.lab.lab import Pair, Task
from opd_studies.worlds.truncated_forms import on_support

if TYPE_CHECKING:
    from opd.models.language_model import LanguageModel
    from opd.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class OnPolicyBatch:
    """One pair at the student's own prefixes, float64."""

    student: Tensor  # [N, V] logits
    teacher: Tensor  # [N, V] log-probs
    hidden: Tensor  # [N, H] of the student


def write_batch(pair: Pair, seed: int, task: Task, responses: int) -> OnPolicyBatch:
    """Sample responses of a pair's student and compute both models at every token."""
    from opd.data.prompts import load_prompts
    from opd.models.loading import load_model
    from opd.recipe.schema import DataSection, ModelSpec
    from opd.samplers.hf import TransformersSampler
    from opd.types import Sampling

    student = load_model(ModelSpec(path=str(pair.student), device="cpu"), name="student")
    teacher = load_model(ModelSpec(path=str(pair.teacher), device="cpu"), name="teacher")
    prompts = load_prompts(DataSection(**task.rows(responses, seed=3)))
    sampler = TransformersSampler(lm=student, sampling=Sampling(max_completion_length=task.longest))
    return batch_at(student, teacher, sampler(prompts, seed=(seed, 0)))


@torch.no_grad()
def batch_at(student: LanguageModel, teacher: LanguageModel, rollouts: Sequence[Rollout]) -> OnPolicyBatch:
    """Both models at every token of the responses."""
    from opd.models.forward import response_states

    ids = [rollout.response_ids.tolist() for rollout in rollouts]
    states: list[Tensor] = []
    for lm in (student, teacher):
        found = response_states(lm, [rollout.prompt_ids for rollout in rollouts], ids)
        states.append(torch.cat([found.of(i, len(one)) for i, one in enumerate(ids)]))
    return OnPolicyBatch(
        student=student.head().logits(states[0]).double(),
        teacher=teacher.head().logits(states[1]).double().log_softmax(-1),
        hidden=states[0].double(),
    )


def logit_gradient(form: str, batch: OnPolicyBatch, inside: Tensor) -> Tensor:
    """d loss / d logits [N, V] of a form of the reverse KL on the support `inside` [N, V] bool."""
    z = batch.student.clone().requires_grad_()
    (grad,) = torch.autograd.grad(on_support(form, z.log_softmax(-1), batch.teacher, inside).sum(), z)
    return grad


def output_norm(grad: Tensor, batch: OnPolicyBatch) -> float:
    """Norm of the output layer's gradient sum_n g_n h_n', from the gradients `grad` at the logits [N, V]."""
    return float((grad.T @ batch.hidden).norm())
