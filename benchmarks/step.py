"""A whole training step against TRL: student 5M, teacher 26M, reverse KL on the full vocabulary, float32.

On a GPU: student 0.6B, teacher 1.7B of Qwen3's shapes with 151,936 tokens, 32 prompts; the student's weights in float32
with bfloat16 autocast, the teacher's in bfloat16.

    python benchmarks/step.py [--quick]

8 prompts of 32 tokens, 128 new tokens each; every response has its full length on every side. One step is: sample the
responses, score them with the teacher, forward, backward, clip, AdamW. The contestants:

* `opd`: the parts of opd's loop, in its order, without writing files;
* `trl_distillation`, `trl_gkd`: TRL's trainers as users get them, see peers.py;
* `trl_tuned`: `trl_distillation` with tile sizes for a CPU, 256 tokens x 4,096 of the vocabulary (trl_tiles.py), raced
  on CPUs only;
* `bare`: no generation, no divergence, no optimiser: the teacher's forward with logits, the student's forward with
  logits and a backward through them from a given gradient, in plain torch, on the same number of tokens. Logits are
  computed at the response's positions only. It is the minimum work of the training part (all of a step but generation
  and the optimiser).

Steps are interleaved. On CPUs three races follow one another: with all threads; with one thread; and beside one busy
process (waiting.py), where the threads of every contestant wait asleep (OMP_WAIT_POLICY=passive), its best setting
there.

Peak memory is from the first race, above the process's memory with models and trainer built, before the first step,
so it includes gradients and the optimiser's state. The sides divide a step differently: opd computes the head's
gradient inside `loss`, so its `backward` is the rest of the model.

Before the timing, one process gives the same sequences to all three sides, and compares loss and full parameter
gradient.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import opd_side
import torch
import trl_tiles
from common import DEVICE, ON_GPU, PeakMemory, Record, measured, say, serve, spread, take_turns, timed, workers
from torch import Tensor
from waiting import beside
from workload import causal_lm, language_model, prompts, tokenizer

from opd.methods.reverse_kl import reverse_kl
from opd.types import Sampling

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 32 if ON_GPU else 8, 32, 128
STUDENT, TEACHER = ("0.6B", "1.7B") if ON_GPU else ("5M", "26M")
LEARNING_RATE = 1e-5
TOLERANCE = 1e-4  # in float32, on a GPU too
TRAINERS = ("trl_distillation", *(() if ON_GPU else ("trl_tuned",)), "trl_gkd")
CONTESTANTS = ("opd", *TRAINERS, "bare")
PAIRED = ("opd", "trl_distillation", "trl_tuned")  # with one thread
BESIDE_BUSY = ("opd", "trl_tuned")
ROUNDS, MORE_ROUNDS = 4, 3  # timed steps of each contestant, after one to warm up: in the first race, in the others
QUICK: Record = {"PROMPTS": 2, "NEW_TOKENS": 8, "ROUNDS": 1, "MORE_ROUNDS": 1}


def pair() -> tuple[Any, Any, Any]:
    """(student, teacher, tokenizer), the same on every side."""
    teacher = causal_lm(TEACHER, seed=2, device=DEVICE).requires_grad_(False)
    return causal_lm(STUDENT, seed=1, device=DEVICE), teacher, tokenizer()


def racing_pair() -> tuple[Any, Any, Any]:
    """The pair for the timing: on a GPU with the teacher in bfloat16."""
    student, teacher, tok = pair()
    return student, teacher.bfloat16() if ON_GPU else teacher, tok


def opd_worker() -> None:
    student, teacher, tok = racing_pair()
    sampling = Sampling(max_completion_length=NEW_TOKENS)
    learner = language_model(student, tok, autocast=ON_GPU)
    mine = opd_side.side(reverse_kl(), learner, language_model(teacher, tok), sampling, LEARNING_RATE)
    step_prompts = prompts(PROMPTS, PROMPT_TOKENS, tok)
    memory: PeakMemory | None = None
    steps = itertools.count()

    def work(_: Record) -> Record:
        nonlocal memory
        memory = memory or PeakMemory()
        parts = opd_side.step(mine, step_prompts, seed=(0, next(steps)))
        return {**parts, "peak_bytes": memory.above_start()}

    serve(work)


def trl_worker(name: str) -> None:
    import peers

    student, teacher, tok = racing_pair()
    if name == "trl_tuned":
        trl_tiles.set_tiles()
    build = peers.gkd_trainer if name == "trl_gkd" else peers.distillation_trainer
    trainer = build(student, teacher, tok, prompts(PROMPTS, PROMPT_TOKENS, tok), NEW_TOKENS, LEARNING_RATE)
    peers.run(trainer, "generate_on_policy_outputs" if name == "trl_gkd" else "_prepare_inputs")


def bare_worker() -> None:
    student, teacher, tok = racing_pair()
    work_of_bare = bare(student, teacher, tok)
    memory: PeakMemory | None = None

    def work(_: Record) -> Record:
        nonlocal memory
        memory = memory or PeakMemory()
        return {**work_of_bare(), "peak_bytes": memory.above_start()}

    serve(work)


def bare(student: Any, teacher: Any, tok: Any) -> Callable[[], Record]:
    """The minimum work of the training part, as a function that does it once and returns its seconds."""
    length, width = PROMPT_TOKENS + NEW_TOKENS, student.config.vocab_size
    ids = torch.randint(len(tok), (PROMPTS, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    where = slice(PROMPT_TOKENS - 1, PROMPT_TOKENS + NEW_TOKENS - 1)
    gradient = torch.randn(PROMPTS, NEW_TOKENS, width, device=DEVICE) / (PROMPTS * NEW_TOKENS)

    @torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=ON_GPU)
    def logits(model: Any) -> Tensor:
        return model.lm_head(model.model(input_ids=ids, use_cache=False).last_hidden_state[:, where])

    def work() -> Record:
        parts: Record = {}
        with timed(parts, "total"):
            with timed(parts, "teacher"), torch.no_grad():
                logits(teacher)
            with timed(parts, "loss"):
                out = logits(student)
            with timed(parts, "backward"):
                out.backward(gradient.to(out.dtype))
        student.zero_grad()
        return parts

    return work


def check_worker() -> None:
    """Loss and full gradient of every side on the same sequences, in float32."""
    import peers

    torch.set_float32_matmul_precision("highest")
    student, teacher, tok = pair()
    models = {name: copy.deepcopy(student) for name in ("opd", *TRAINERS)}
    step_prompts = prompts(PROMPTS, PROMPT_TOKENS, tok)
    sampling = Sampling(max_completion_length=NEW_TOKENS)
    mine = opd_side.side(reverse_kl(), language_model(models["opd"], tok), language_model(teacher, tok), sampling)
    rollouts = mine.sampler(step_prompts, seed=(0, 0))
    ids = torch.stack([torch.tensor([*r.prompt_ids, *r.response_ids.tolist()]) for r in rollouts]).to(DEVICE)
    losses = {"opd": opd_side.training_part(mine, rollouts, {})}
    whole, tuned = trl_tiles.tiles(), trl_tiles.CPU_TILES
    for name in TRAINERS:
        build, loss_fn = peers.check_side(name)
        trl_tiles.set_tiles(*(tuned if name == "trl_tuned" else whole))
        trainer = build(models[name], teacher, tok, step_prompts, NEW_TOKENS, LEARNING_RATE, exact=True)
        loss = loss_fn(trainer, ids, PROMPT_TOKENS)
        loss.backward()
        losses[name] = loss.item()
    gradients = {name: torch.cat([p.grad.flatten() for p in model.parameters()]) for name, model in models.items()}

    def difference(name: str) -> Record:
        gap = (gradients[name] - gradients["opd"]).norm() / gradients["opd"].norm()
        return {"loss": abs(losses[name] / losses["opd"] - 1), "gradient": float(gap)}

    answer = {"losses": losses, "relative_difference": {name: difference(name) for name in models if name != "opd"}}
    serve(lambda _: answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and one round, to try the code")
    parser.add_argument("--worker", choices=(*CONTESTANTS, "check"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        globals().update(QUICK)
    if options.worker:
        start = {"opd": opd_worker, "bare": bare_worker, "check": check_worker}
        start.get(options.worker, functools.partial(trl_worker, options.worker))()
        return
    flags = ["--quick"] if options.quick else []
    with measured("step", options.quick) as result:
        with workers(__file__, ["check"], *flags) as started:
            result["check"] = started["check"].ask({})
        say(f"relative differences to opd on the same sequences: {result['check']['relative_difference']}")
        worst = max(value for gaps in result["check"]["relative_difference"].values() for value in gaps.values())
        assert worst <= TOLERANCE, f"the sides do not compute the same loss: they differ by {worst:.2e}"
        races(result, flags)
    for title in ("rows", "one_thread", "busy"):
        for name, row in result.get(title, {}).items():
            times = ", ".join(f"{part} {row[part]['median']:.2f}" for part in (*PARTS, "total_cpu") if part in row)
            say(f"{title:10} {name:18} {times} s; peak {row['peak_bytes'] / 2**30:.2f} GiB")


def races(result: Record, flags: list[str]) -> None:
    """Fill in `rows` (all threads, quiet) and, on CPUs, `one_thread` and `busy`."""
    with workers(__file__, CONTESTANTS, *flags) as started:
        result["rows"] = summaries(take_turns(started, {}, ROUNDS + 1))
        if ON_GPU:
            return
        paired = {name: started[name] for name in PAIRED}
        result["one_thread"] = summaries(take_turns(paired, {"threads": 1}, MORE_ROUNDS + 1))
    asleep = {"OMP_WAIT_POLICY": "passive"}
    with beside("busy"), workers(__file__, BESIDE_BUSY, *flags, environment=asleep) as started:
        result["busy"] = summaries(take_turns(started, {}, MORE_ROUNDS + 1))


PARTS = ("total", "generate", "teacher", "loss", "backward", "optimiser")


def summaries(turns: dict[str, list[Record]]) -> Record:
    return {name: summary(answers) for name, answers in turns.items()}


def summary(answers: list[Record]) -> Record:
    """Median and range of each part over the answers after the first; the peak over all of them."""
    timed_answers = answers[1:]
    names = [part for part in (*PARTS, *(f"{part}_cpu" for part in PARTS)) if part in timed_answers[0]]
    out: Record = {part: spread([a[part] for a in timed_answers]) for part in names}
    out["training"] = spread([sum(a.get(part, 0.0) for part in ("teacher", "loss", "backward")) for a in timed_answers])
    out["peak_bytes"] = max(a["peak_bytes"] for a in answers)
    if "loss_value" in answers[0]:
        out["first_loss"] = answers[0]["loss_value"]
    return out


if __name__ == "__main__":
    main()
