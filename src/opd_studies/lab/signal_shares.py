"""The share of a first batch's signal on the tokens of a marker, and both models' log-probs there.

The sampled token's gradient at the logits is -A_t (e_y - p) with A_t = log q(y_t) - log p(y_t) (arXiv 2603.25562 eq.
2), local support matching's that of the renormalised reverse KL on the teacher's top K (eq. 6-8). A group of tokens has
the output layer's gradient G = sum_t g_t h_t', and the markers' share is ||G_markers|| / (||G_markers|| + ||G_rest||).
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_studies.lab.lab import Pair, Task
from opd_studies.lab.on_policy_batch import OnPolicyBatch, batch_at, logit_gradient, output_norm

HELD_OUT = 200  # prompts


@torch.no_grad()
def of_markers(pair: Pair, task: Task, marker: str, seed: int, *, k: int) -> dict[str, float]:
    """The numbers of `shares` on 200 held-out prompts, with the student's responses at temperature 1.

    Log-probs are means over the markers' first tokens. Also the sampled accuracy of the student, and of the teacher
    that continues after the student's marker.
    """
    from opd.data.prompts import load_prompts
    from opd.models.loading import load_model
    from opd.pieces.token_sequences import covered
    from opd.recipe.schema import DataSection, ModelSpec
    from opd.rewards.registry import one_by_one
    from opd.samplers.hf import TransformersSampler
    from opd.types import Sampling

    student = load_model(ModelSpec(path=str(pair.student), device="cpu"), name="student")
    teacher = load_model(ModelSpec(path=str(pair.teacher), device="cpu"), name="teacher")
    prompts = load_prompts(DataSection(**task.rows(HELD_OUT, part="held_out")))
    sampling = Sampling(max_completion_length=task.longest)
    written = TransformersSampler(lm=student, sampling=sampling)(prompts, seed=(seed, 0))
    spelled = student.tokenizer(marker, add_special_tokens=False).input_ids
    taught = TransformersSampler(lm=teacher, sampling=sampling)(
        prompts, seed=(seed, 1), prefixes=[spelled] * len(prompts)
    )
    reward = one_by_one(task.reward)
    batch = batch_at(student, teacher, written)
    ids = [rollout.response_ids.tolist() for rollout in written]
    y = torch.tensor([token for one in ids for token in one])
    on_marker = torch.tensor([here for one in ids for here in covered(one, [spelled], "every")])
    return {
        "sampled accuracy": sum(reward(r.prompt, r.text) for r in written) / len(written),
        "teacher after marker": sum(reward(r.prompt, r.text) for r in taught) / len(taught),
        "own marker": sum(one[: len(spelled)] == spelled for one in ids) / len(ids),
        **shares(batch, y, on_marker, first=on_marker & (y == spelled[0]), k=k),
    }


def shares(batch: OnPolicyBatch, y: Tensor, on_marker: Tensor, *, first: Tensor, k: int) -> dict[str, float]:
    """The numbers of tokens `y` [N]. Masks [N], bool: `on_marker`, and `first`, the first token of each marker."""
    logp = batch.student.log_softmax(-1)
    ours, theirs = (values.gather(1, y[:, None])[:, 0] for values in (logp, batch.teacher))
    advantage = theirs - ours
    sampled = advantage[:, None] * (logp.exp() - torch.nn.functional.one_hot(y, logp.shape[1]))
    inside = torch.zeros_like(logp, dtype=torch.bool).scatter(-1, batch.teacher.topk(k, dim=-1).indices, True)
    with torch.enable_grad():
        matched = logit_gradient("renormalised", batch, inside)
    return {
        "log p": float(ours[first].mean()),
        "log q": float(theirs[first].mean()),
        "share of tokens": float(on_marker.double().mean()),
        "share of log-ratio": float(advantage.abs()[on_marker].sum() / advantage.abs().sum()),
        "share of gradient": _share(sampled, on_marker, batch),
        "share of gradient, local support matching": _share(matched, on_marker, batch),
    }


def _share(grad: Tensor, chosen: Tensor, batch: OnPolicyBatch) -> float:
    """The share of the chosen tokens in the output layer's gradient, from that of the logits [N, V]."""
    inside = output_norm(grad * chosen[:, None], batch)
    return inside / (inside + output_norm(grad * ~chosen[:, None], batch))
