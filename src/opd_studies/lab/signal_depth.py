"""Does the teacher's log-ratio tell right tokens from wrong ones? By part of a response.

A token is right if the worked response has the same token at this position. The score is the sampled token's
log q - log p; the measure is the area under the ROC curve, the probability that a right token scores above a wrong one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opd.maths.statistics import auroc
from opd_studies.lab.lab import Pair, Task

HELD_OUT = 200  # prompts


SAMPLES = 2  # responses per prompt


WIDTH = 2  # tokens; a right response to a row of five digits has six


PARTS = ("tokens 1 and 2", "tokens 3 and 4", "tokens from 5", "before an error", "after an error")


def by_depth(pair: Pair, task: Task, seed: int, longest: int) -> dict[str, float]:
    """The accuracy of the student's responses at temperature 1 before training, and the AUROC by part.

    `before an error`: tokens with only right tokens before them, including the first wrong one.
    """
    from opd.data.prompts import load_prompts
    from opd.evaluation.compare import compare
    from opd.models.loading import load_model
    from opd.recipe.schema import DataSection, ModelSpec
    from opd.rewards.registry import one_by_one
    from opd.samplers.hf import TransformersSampler
    from opd.teachers.local import local_teacher
    from opd.types import Sampling, TeacherRule

    student = load_model(ModelSpec(path=str(pair.student), device="cpu"), name="student")
    other = load_model(ModelSpec(path=str(pair.teacher), device="cpu"), name="teacher")
    teacher = local_teacher(TeacherRule(kind="external"), student, other, micro_batch_tokens=4096)
    assert teacher is not None
    prompts = load_prompts(DataSection(**task.rows(HELD_OUT, part="held_out")))
    sampling = Sampling(max_completion_length=longest, n=SAMPLES)
    written = TransformersSampler(lm=student, sampling=sampling)(prompts, seed=(seed, 0))
    seen = compare(student, teacher, written, [rollout.prompt for rollout in written], k=1)
    right = [right_tokens(r.response_ids.tolist(), worked_ids(r.prompt.response, student.tokenizer)) for r in written]
    reward = one_by_one(task.reward)
    scores = seen.teacher_logp - seen.student_logp
    ok = torch.tensor([one for row in right for one in row])
    clean = torch.tensor([all(row[:t]) for row in right for t in range(len(row))])
    return {
        "sampled accuracy": sum(reward(r.prompt, r.text) for r in written) / len(written),
        **areas(scores, ok, seen.step, clean),
    }


def worked_ids(response: str | None, tokenizer: Any) -> list[int]:
    """Token ids of the worked response, with the end token."""
    assert response is not None, "the data function writes every response"
    return [*tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def right_tokens(ids: list[int], worked: list[int]) -> list[bool]:
    """Whether each token of a response equals the worked response's at its position; False after its end."""
    return [t < len(worked) and token == worked[t] for t, token in enumerate(ids)]


def areas(scores: Tensor, right: Tensor, step: Tensor, clean: Tensor) -> dict[str, float]:
    """The AUROC of each of PARTS, from columns over all tokens, [N] each; NaN for a part without both kinds."""
    third = (step // WIDTH).clamp(max=2)
    chosen = dict(zip(PARTS, [*(third == i for i in range(3)), clean, ~clean], strict=True))
    found = {name: auroc(scores[part].numpy(), right[part].numpy()) for name, part in chosen.items()}
    return {f"AUROC, {name}": float("nan") if area is None else area for name, area in found.items()}
