"""Time and memory of a method's signal: the teacher's scores, the loss, and its gradients, from both hidden states.

Two implementations of the same functions. `plain`: all logits [N, V] of both models in memory, differentiated by
autograd, as in released code. `fused`: this library's passes over parts of the vocabulary. The student's top-k tokens
are found while it samples; the time of finding them counts, the logits of sampling do not.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import process_time

import torch
from torch import Tensor

from opd.method import Method
from opd.methods.opd import opd
from opd.methods.reverse_kl import reverse_kl
from opd.methods.topk_reverse_kl import topk_reverse_kl
from opd.methods.vopd import vopd

SAMPLED, BASELINE, LOSS, FULL = "sampled token", "top-k baseline", "top-k loss", "full reverse KL"


PLAIN, FUSED = "plain", "fused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Tokens, vocabulary, hidden size and k."""

    tokens: int = 512
    vocabulary: int = 32_768
    hidden: int = 256
    k: int = 100  # the default of `vopd`


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Hidden states [N, H] and output layers [V, H] of both models, sampled tokens [N], logits of sampling [N, V]."""

    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    ids: Tensor
    sampled_from: Tensor


def method_of(name: str, k: int) -> Method:
    """The library's method of that name."""
    methods: dict[str, Callable[[], Method]] = {
        SAMPLED: lambda: opd(average="token"),
        BASELINE: lambda: vopd(k=k),
        LOSS: lambda: topk_reverse_kl(k=k, by="student", form="renormalised", average="token"),
        FULL: lambda: reverse_kl(average="token"),
    }
    return methods[name]()


def states_of(seed: int, shape: Shape) -> States:
    """Random states; the teacher's are the student's plus noise, and logits have a standard deviation of 3."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float) -> Tensor:
        return torch.empty(size).normal_(std=std, generator=generator)

    head = normal(shape.vocabulary, shape.hidden, std=3.0 / shape.hidden**0.5)
    hidden = normal(shape.tokens, shape.hidden, std=1.0)
    logits = hidden @ head.T
    return States(
        teacher_hidden=hidden + normal(shape.tokens, shape.hidden, std=0.3),
        teacher_head=head.clone(),
        hidden=hidden.clone().requires_grad_(),
        head=head.requires_grad_(),
        ids=torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0],
        sampled_from=logits,
    )


def plain(name: str, x: States, k: int) -> Tensor:
    """The loss, mean over tokens, by plain torch operations on all logits."""
    student = x.hidden @ x.head.T
    with torch.no_grad():
        teacher = x.teacher_hidden @ x.teacher_head.T
    if name == FULL:
        mine, theirs = student.log_softmax(-1), teacher.log_softmax(-1)
        return (mine.exp() * (mine - theirs)).sum(-1).mean()
    if name == LOSS:
        top = x.sampled_from.topk(k, dim=-1).indices
        mine, theirs = (logits.gather(-1, top).log_softmax(-1) for logits in (student, teacher))
        return (mine.exp() * (mine - theirs)).sum(-1).mean()
    at = x.ids[:, None]
    logp = (student.gather(-1, at) - student.logsumexp(-1, keepdim=True))[:, 0]
    advantage = (teacher.gather(-1, at) - teacher.logsumexp(-1, keepdim=True))[:, 0] - logp.detach()
    if name == BASELINE:
        top = x.sampled_from.topk(k, dim=-1).indices
        mine, theirs = (logits.detach().gather(-1, top).log_softmax(-1) for logits in (student, teacher))
        advantage = advantage + (mine.exp() * (mine - theirs)).sum(-1)
    return -(advantage * logp).mean()


def fused(name: str, x: States, k: int) -> Tensor:
    """The same loss through the library: the teacher's scores of the method's request, then its loss."""
    from opd.loss.collate import MicroBatch
    from opd.loss.token_loss import loss_at
    from opd.models.head import Head
    from opd.teachers.scoring import teacher_scores

    method = method_of(name, k)
    heads = [Head(weight=weight, bias=None, vocabulary=len(weight)) for weight in (x.head, x.teacher_head)]
    top = x.sampled_from.topk(k, dim=-1).indices if method.support.student_top_k else None
    scores = teacher_scores(heads[1], x.teacher_hidden, x.ids, method.request(), top)
    n = len(x.ids)
    one = torch.ones(n)
    micro = MicroBatch(
        rollouts=(),
        row=torch.zeros(n, dtype=torch.long),
        step=torch.arange(n),
        token_ids=x.ids,
        share=one,
        sampler_logp=torch.zeros(n),
        policy_logp=torch.zeros(n),
        teacher_logp=scores.teacher_logp,
        advantage=torch.zeros(n),
        weight=one,
        support_ids=scores.support_ids,
        support_mask=scores.support_mask,
        teacher_support_logp=scores.teacher_support_logp,
        teacher_hidden=scores.teacher_hidden,
    )
    return loss_at(method, x.hidden, heads[0], micro, n, heads[1])[0]


IMPLEMENTATIONS: dict[str, Callable[[str, States, int], Tensor]] = {PLAIN: plain, FUSED: fused}


def gradients(implementation: str, name: str, x: States, k: int) -> tuple[Tensor, Tensor]:
    """The loss' gradients with respect to the student's hidden states [N, H] and output layer [V, H]."""
    loss = IMPLEMENTATIONS[implementation](name, x, k)
    hidden, head = torch.autograd.grad(loss, [x.hidden, x.head])
    return hidden, head


def seconds(implementation: str, names: Sequence[str], seed: int, shape: Shape, rounds: int) -> dict[str, float]:
    """CPU seconds of each method on one thread: the median of `rounds`, in which the methods take turns."""
    x = states_of(seed, shape)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds + 1):  # the first round warms up
            for name in names:
                start = process_time()
                gradients(implementation, name, x, shape.k)
                times[name].append(process_time() - start)
    finally:
        torch.set_num_threads(threads)
    return {name: median(each[1:]) for name, each in times.items()}


def peak_mib(runs: Sequence[tuple[str, str, int, Shape]]) -> list[float]:
    """Peak resident MiB above the states and the head's gradient of (implementation, method, seed, shape).

    Each runs in a process of its own, whose memory no other run has touched. Linux only.
    """
    peaks: list[float] = []
    for run in runs:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            peaks.append(pool.submit(_peak, *run).result())
    return peaks


def _peak(implementation: str, name: str, seed: int, shape: Shape) -> float:
    torch.set_num_threads(1)
    small = Shape(tokens=8, vocabulary=256, hidden=16, k=8)
    gradients(implementation, name, states_of(seed, small), small.k)
    x = states_of(seed, shape)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # making the states needed more memory than they take
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = _status("VmRSS")
    _, head = gradients(implementation, name, x, shape.k)
    return (_status("VmHWM") - before - head.nbytes) / 2**20


def _status(name: str) -> int:
    """Bytes of a line of this process' status. Linux alone has it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
