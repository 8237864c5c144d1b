"""The loss alone: forward and backward on random hidden states, time and peak memory, against the peers.

    python benchmarks/loss.py [--quick | --full]

Inputs are student and teacher hidden states [N, H] and heads [V, H], float32. Gradients are with respect to the
student's hidden states and head. The grid varies V and N around a base, and includes the large point of the table of
goals (V = 151,936, N = 2,048, on a GPU 4,096, H = 1,024). The point V = 49,152, N = 512, H = 576 is also run with one
thread. `--quick` runs one small point with every contestant, `--full` every combination.

Peak memory is above the inputs and the head's gradient [V, H], which every contestant must return. Each contestant is a
process; at each point they take turns on the same random inputs, created again for every turn.

opd, each with its own published method:
* `full`: reverse KL on the whole vocabulary, `reverse_kl`;
* `full_generic`: the same function as a user's signal, so that no closed form applies;
* `skew`: a divergence without a closed form;
* `top32_tail`, `top32_stop_gradient`, `top32_renormalised`: `topk_reverse_kl`, student's side, given teacher scores;
* `sampled`: the policy gradient of the sampled token, `opd`, student's side, given teacher scores.

Peers of `full`, all full-vocabulary reverse KL:
* `trl`: the chunked divergence of `DistillationTrainer`, with its own tile sizes (4,096 tokens x 32,768 of the
  vocabulary);
* `trl_tuned`: the same with tiles for a CPU, 256 x 4,096 (trl_tiles.py), on CPUs only;
* `liger`: `LigerFusedLinearJSDLoss(beta=1)`, soft loss alone, its own chunk of 1,024 tokens. It is plain torch, so it
  runs on the CPU; `compiled=False`;
* `liger_compiled`: with its default, after an untimed call that compiles for the shape (`compile_seconds`). It is at
  that one point alone, because every shape is compiled anew. Where torch.compile fails, the result has its error;
* `naive`: both logits, both log-softmaxes, the sum, autograd.

Peers of `sampled`, the same policy gradient on TRL's chunked log-prob kernel, which its GRPO uses:
* `trl_sampled`: with its own tiles;
* `trl_sampled_tuned`: with tiles for a CPU.

A ratio to TRL is taken between contestants that compute the same function. They must agree on loss and gradient within
1e-4, or the benchmark fails. The two largest points have only the contestants of the table of goals; with `--full`
every point has all. A combination that needs more than an estimated 12 GiB is skipped and marked in the result.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import trl_tiles
from common import (
    DEVICE,
    GIB,
    ON_GPU,
    THREADS,
    PeakMemory,
    Record,
    calibrate,
    measured,
    say,
    serve,
    spread,
    take_turns,
    timed,
    workers,
)
from torch import Tensor

from opd.loss.collate import MicroBatch
from opd.loss.token_loss import loss_at
from opd.method import Method
from opd.methods.opd import opd as sampled_opd
from opd.methods.reverse_kl import reverse_kl
from opd.methods.topk_reverse_kl import topk_reverse_kl
from opd.models.head import Head
from opd.pieces import signals

TABLE = (151_936, 4096 if ON_GPU else 2048, 1024)
MAIN = (49_152, 512, 576)  # with one thread too, and the compiled peer
SMALL = (4096, 64, 64)
TUNED = () if ON_GPU else ("trl_tuned",)
GOALS = ("full", "top32_renormalised", "trl", *TUNED)  # at every point
SIDES = (*GOALS, "liger", "naive")  # at every point but the largest
LARGE = 1e11  # V x N x H
SAMPLED = ("sampled", "trl_sampled", *(() if ON_GPU else ("trl_sampled_tuned",)))
FORMS = ("full_generic", "skew", "top32_tail", "top32_stop_gradient", *SAMPLED)  # at the points that compare supports
# Contestants that compute one function; PEERS has TRL's among them. Its tuned variant is named `<peer>_tuned`.
SAME_FUNCTION = (("full", "full_generic", "trl", "trl_tuned", "liger", "liger_compiled", "naive"), SAMPLED)
PEERS = {name: peer for names, peer in zip(SAME_FUNCTION, ("trl", "trl_sampled"), strict=True) for name in names}
K = 32
LOGIT_STD = 3.0  # both heads; about the spread of a trained model's logits
LARGEST_GIB = 60.0 if ON_GPU else 12.0
TOLERANCE = 2e-3 if ON_GPU else 1e-4  # TF32 has ten bits

Inputs = dict[str, Tensor]
Loss = Callable[[Inputs], Tensor]


def inputs(V: int, N: int, H: int) -> Inputs:
    """Random hidden states and heads; the teacher's are the student's plus noise, as after some training."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.empty(shape, device=DEVICE).normal_(std=std, generator=generator)

    head = normal(V, H, std=LOGIT_STD / H**0.5)
    hidden = normal(N, H, std=1.0)
    return {
        "teacher_hidden": hidden + normal(N, H, std=0.3),
        "teacher_head": head.clone(),
        "hidden": hidden.requires_grad_(),
        "head": head.requires_grad_(),
        "token_ids": torch.randint(V, (N,), generator=generator, device=DEVICE),
        "support_ids": torch.randint(V // K, (N, K), generator=generator, device=DEVICE)
        + torch.arange(K, device=DEVICE) * (V // K),
        "teacher_support_logp": normal(N, K, std=1.0).log_softmax(-1) - 0.2,
        "teacher_logp": normal(N, std=1.0) - 5.0,
    }


# --- opd --------------------------------------------------------------------------------------------------------------


def methods() -> dict[str, Method]:
    known = signals.divergence("reverse_kl")
    return {
        "full": reverse_kl(),
        "full_generic": replace(reverse_kl(), signal=lambda tokens: known(tokens)),
        "skew": replace(reverse_kl(), signal=signals.divergence("skew_kl", alpha=0.1)),
        **{
            f"top32_{form}": topk_reverse_kl(k=K, by="teacher", form=form)
            for form in ("tail", "stop_gradient", "renormalised")
        },
        "sampled": sampled_opd(),
    }


def opd_loss(method: Method, hidden: Tensor, head: Head, micro: MicroBatch, teacher_head: Head) -> Tensor:
    """Mean over tokens of the method's signal at `hidden` [N, H], through opd's fused scoring."""
    loss, _ = loss_at(method, hidden, head, micro, len(hidden), teacher_head)
    return loss


def opd_side(method: Method) -> Loss:
    def loss(x: Inputs) -> Tensor:
        V, N = x["head"].shape[0], len(x["hidden"])
        one, zero = torch.ones(N, device=DEVICE), torch.zeros(N, device=DEVICE)
        top_k = method.support.kind == "top_k"
        micro = MicroBatch(
            rollouts=(),
            row=torch.zeros(N, dtype=torch.long, device=DEVICE),
            step=torch.arange(N, device=DEVICE),
            token_ids=x["token_ids"],
            share=one,
            sampler_logp=x["teacher_logp"],
            policy_logp=x["teacher_logp"],
            teacher_logp=x["teacher_logp"],
            advantage=zero,
            weight=one,
            support_ids=x["support_ids"] if top_k else None,
            support_mask=torch.ones(N, K, dtype=torch.bool, device=DEVICE) if top_k else None,
            teacher_support_logp=x["teacher_support_logp"] if top_k else None,
            teacher_hidden=x["teacher_hidden"] if method.support.kind == "full" else None,
        )
        head = Head(weight=x["head"], bias=None, vocabulary=V)
        teacher_head = Head(weight=x["teacher_head"], bias=None, vocabulary=V)
        return opd_loss(method, x["hidden"], head, micro, teacher_head)

    return loss


# --- Peers ------------------------------------------------------------------------------------------------------------


def trl_side(tuned: bool) -> Loss:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    if tuned:
        trl_tiles.set_tiles()

    def loss(x: Inputs) -> Tensor:
        mask = torch.ones(1, len(x["hidden"]), dtype=torch.long, device=DEVICE)
        hidden, teacher = x["hidden"][None], x["teacher_hidden"][None]
        return _chunked_divergence_loss(hidden, teacher, x["head"], x["teacher_head"], mask, beta=1.0)[0]

    return loss


def trl_sampled_side(tuned: bool) -> Loss:
    """-sg[log q - log p] log p of the sampled tokens, without the entropy and the other values of the kernel."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    if tuned:
        trl_tiles.set_tiles()
    size = utils._CHUNKED_LOGPROB_CHUNK_SIZE

    def loss(x: Inputs) -> Tensor:
        chosen = x["hidden"], x["head"], None, x["token_ids"]
        logp = ChunkedLogProbFunction.apply(*chosen, 1.0, size, None, 1.0, ())[0]
        return -((x["teacher_logp"] - logp.detach()) * logp).mean()

    return loss


def liger_side(compiled: bool) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled)
    return lambda x: fused(x["hidden"], x["head"], x["teacher_hidden"], x["teacher_head"], x["token_ids"])


def naive_side() -> Loss:
    def loss(x: Inputs) -> Tensor:
        student = (x["hidden"] @ x["head"].T).log_softmax(-1)
        with torch.no_grad():
            teacher = (x["teacher_hidden"] @ x["teacher_head"].T).log_softmax(-1)
        return (student.exp() * (student - teacher)).sum(-1).mean()

    return loss


def side(name: str) -> Loss:
    peers: dict[str, Callable[[], Loss]] = {
        "trl": lambda: trl_side(tuned=False),
        "trl_tuned": lambda: trl_side(tuned=True),
        "trl_sampled": lambda: trl_sampled_side(tuned=False),
        "trl_sampled_tuned": lambda: trl_sampled_side(tuned=True),
        "liger": lambda: liger_side(compiled=False),
        "liger_compiled": lambda: liger_side(compiled=True),
        "naive": naive_side,
    }
    return peers[name]() if name in peers else opd_side(methods()[name])


def estimated_gib(name: str, V: int, N: int, H: int) -> float:
    """GiB of the inputs, the head's gradient, and a contestant's known needs."""
    logits = {"naive": 7 * N * V, "liger": 6 * min(N, 1024) * V, "liger_compiled": 6 * min(N, 1024) * V}
    own = logits.get(name, 6 * min(N, 4096) * 32768 if name in ("trl", "trl_sampled") else 2**28)
    return 4 * (own + 3 * V * H + 3 * N * H) / GIB


# --- The race ---------------------------------------------------------------------------------------------------------


def worker(name: str) -> None:
    loss_of_side = side(name)
    if name != "liger_compiled":  # its warm-up compiles for one shape
        loss_and_gradient(loss_of_side, *SMALL)

    def work(point: Record) -> Record:
        where = point["V"], point["N"], point["H"]
        if name != "liger_compiled":
            return loss_and_gradient(loss_of_side, *where)
        started = time.perf_counter()
        try:
            loss_of_side(inputs(*where)).detach()
        except torch._dynamo.exc.TorchDynamoException as error:  # the result says why
            return {"skipped": f"torch.compile: {type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        seconds = time.perf_counter() - started
        return {**loss_and_gradient(loss_of_side, *where), "compile_seconds": seconds}

    serve(work)


def loss_and_gradient(loss_of_side: Loss, V: int, N: int, H: int) -> Record:
    """Seconds, peak memory and values of one forward and backward."""
    x = inputs(V, N, H)
    memory = PeakMemory()
    out: Record = {}
    with timed(out, "total"):
        with timed(out, "forward"):
            loss = loss_of_side(x)
        with timed(out, "backward"):
            loss.backward()
    head_gradient, hidden_gradient = x["head"].grad, x["hidden"].grad
    assert head_gradient is not None
    assert hidden_gradient is not None
    out["peak_bytes"] = max(0, memory.above_start() - head_gradient.nbytes)
    out["loss"] = loss.item()
    out["head_gradient"] = head_gradient.norm().item()
    out["hidden_gradient"] = hidden_gradient.norm().item()
    return out


def grid(which: str) -> list[Record]:
    """The points, smallest first; `rounds` falls with the work, `names` are the contestants."""
    sizes, lengths, widths = (32_000, 49_152, 151_936, 262_144), (512, 1024, 2048, 4096, 8192), (576, 1024)
    if which == "full":
        points = {(V, N, H) for V in sizes for N in lengths for H in widths}
    elif which == "quick":
        points = {SMALL}
    elif ON_GPU:
        points = {TABLE, (151_936, 16_384, 1024)}
    else:
        points = {TABLE, *((V, 512, 576) for V in sizes), (32_000, 2048, 576)}
    out: list[Record] = []
    for V, N, H in sorted(points, key=math.prod):
        work = V * N * H
        every = which != "default" or ON_GPU
        forms = FORMS if every or (N == 512 and V in (49_152, 151_936)) else ()
        names = [*(SIDES if every or work < LARGE else GOALS), *forms]
        if (V, N, H) in (MAIN, SMALL):
            names.append("liger_compiled")
        rounds = 5 if ON_GPU else 2 if work < 3e10 else 1
        out.append({"V": V, "N": N, "H": H, "threads": THREADS, "rounds": rounds, "names": names})
        if (V, N, H) in (MAIN, SMALL) and not ON_GPU:
            out.append({**out[-1], "threads": 1, "rounds": 1, "names": [*SIDES, *SAMPLED]})
    return out


def run_point(started: dict[str, Any], point: Record) -> list[Record]:
    """Rows of one point: each contestant's times, peak memory and values, or the reason why it was skipped."""
    where = {key: point[key] for key in ("V", "N", "H", "threads")}
    need = {name: estimated_gib(name, point["V"], point["N"], point["H"]) for name in point["names"]}
    able = {name: started[name] for name in point["names"] if need[name] <= LARGEST_GIB}
    rows: list[Record] = [
        {"name": name, **where, "skipped": f"needs about {need[name]:.0f} GiB"}
        for name in point["names"]
        if name not in able
    ]
    rate = calibrate(0.3)
    for name, answers in take_turns(able, where, point["rounds"]).items():
        if "skipped" in answers[0]:
            rows.append({"name": name, **where, "skipped": answers[0]["skipped"]})
            continue
        times = {part: spread([a[part] for a in answers]) for part in ("forward", "backward", "total", "total_cpu")}
        peak = max(a["peak_bytes"] for a in answers)
        values = {key: answers[0][key] for key in ("loss", "head_gradient", "hidden_gradient")}
        compiling = {key: answers[0][key] for key in ("compile_seconds",) if key in answers[0]}
        rows.append({"name": name, **where, **times, "peak_bytes": peak, **values, **compiling, "gflops": rate})
    for names in SAME_FUNCTION:
        check_agreement([row for row in rows if row["name"] in names and "skipped" not in row])
    return rows


def check_agreement(rows: list[Record]) -> None:
    for row in rows[1:]:
        for key in ("loss", "head_gradient", "hidden_gradient"):
            gap = abs(row[key] / rows[0][key] - 1)
            assert gap <= TOLERANCE, f"{row['name']} and {rows[0]['name']} differ in {key} by {gap:.2e}: {row}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", dest="grid", action="store_const", const="quick", default="default")
    which.add_argument("--full", dest="grid", action="store_const", const="full", help="every combination: hours")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    with measured("loss", options.grid == "quick") as result:
        result["rows"] = []
        points = grid(options.grid)
        names = list(dict.fromkeys(name for point in points for name in point["names"]))
        with workers(__file__, names) as started:
            for point in points:
                for row in run_point(started, point):
                    result["rows"].append(row)
                    sizes = f"V {row['V']:7} N {row['N']:5} H {row['H']:5}"
                    label = f"{sizes} threads {row['threads']} {row['name']:20}"
                    cost = (
                        f"{row['total']['median']:7.3f} s {row['peak_bytes'] / GIB:6.2f} GiB" if "total" in row else ""
                    )
                    say(f"{label} {cost or row['skipped']}")


if __name__ == "__main__":
    main()
