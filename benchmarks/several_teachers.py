"""What a second teacher of a row costs: a step of `mad_opd` at beta = 1 with one and with two teachers, in turns.

Student 5M, teachers 26M, float32, 49,152 tokens; 8 prompts of 32 tokens with responses of 128, already written.

    python benchmarks/several_teachers.py [--quick]

A step here is scoring, loss and backward: what the second teacher adds to. `forward` is the work that a second teacher
cannot do without: its forward over the same sequences, and one product of the responses' states with its output layer,
in plain torch. Printed are the seconds of CPU of one thread, and

    extra = (step of two - step of one) / forward          1 is the second teacher alone
    two   = (step of two - step of one + forward) / (2 forward)

and the peak of memory of the loss and its backward above what lies before them, which the second teacher should not
change but for its hidden states.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from common import PeakMemory, Record, machine, say, spread, timed
from workload import causal_lm, language_model, prompts, tokenizer

from opd.loss.step import gradient, scored
from opd.method import Method
from opd.methods import build
from opd.models.language_model import LanguageModel
from opd.samplers.hf import TransformersSampler
from opd.teachers.local import LocalTeacher
from opd.teachers.mixed import MixedTeacher
from opd.types import Rollout, Sampling

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 32, 128
STUDENT, TEACHER = "5M", "26M"
ROUNDS = 7
QUICK = {"PROMPTS": 2, "NEW_TOKENS": 8, "ROUNDS": 2}
LIMIT = 1.15  # of `two`
MICRO_BATCH_TOKENS = 4096


def mixed(student: LanguageModel, teachers: list[LanguageModel]) -> MixedTeacher:
    return MixedTeacher(
        teachers={
            f"teacher {k}": LocalTeacher(lm=lm, micro_batch_tokens=MICRO_BATCH_TOKENS, student_device=student.device)
            for k, lm in enumerate(teachers)
        },
        mixture="geometric",
    )


def step(method: Method, student: LanguageModel, teacher: MixedTeacher, rollouts: list[Rollout]) -> Record:
    """The seconds of one step, and the peak memory of its loss and backward."""
    parts: Record = {}
    with timed(parts, "total"):
        contexts = method.context(rollouts)
        phase_a = scored(method, teacher, rollouts, contexts, method.request(), device=student.device)
        memory = PeakMemory()
        loss, _ = gradient(method, student, teacher, phase_a, MICRO_BATCH_TOKENS)
    student.model.zero_grad(set_to_none=True)
    return {**parts, "loss": loss, "peak_bytes": memory.above_start()}


@torch.no_grad()
def forward(lm: LanguageModel, rollouts: list[Rollout]) -> Record:
    """A teacher's forward over the sequences, and its logits at the responses' tokens."""
    parts: Record = {}
    ids = torch.tensor([[*one.prompt_ids, *one.response_ids.tolist()] for one in rollouts])
    before = len(rollouts[0].prompt_ids)
    with timed(parts, "total"):
        hidden = lm.hidden(ids)[:, before - 1 : -1]
        head = lm.head()
        for rows in hidden.reshape(-1, hidden.shape[-1]).split(256):
            head.logits(rows)
    return parts


def contestants() -> dict[str, Callable[[], Record]]:
    """What is raced, by name."""
    tok = tokenizer()
    student = language_model(causal_lm(STUDENT, seed=1), tok)
    teachers = [language_model(causal_lm(TEACHER, seed=seed).requires_grad_(False), tok) for seed in (2, 3)]
    method = build("mad_opd", {"rounds": 0})
    sampler = TransformersSampler(lm=student, sampling=Sampling(max_completion_length=NEW_TOKENS))
    written = sampler(prompts(PROMPTS, PROMPT_TOKENS, tok), seed=(0, 0))
    longest = min(len(one.response_ids) for one in written)
    rollouts = [shortened(one, longest) for one in written]
    one, two = mixed(student, teachers[:1]), mixed(student, teachers)
    return {
        "one": lambda: step(method, student, one, rollouts),
        "two": lambda: step(method, student, two, rollouts),
        "forward": lambda: forward(teachers[1], rollouts),
    }


def shortened(rollout: Rollout, length: int) -> Rollout:
    """The first tokens of a response, so that all are equally long."""

    cut: dict[str, Any] = {name: getattr(rollout, name)[:length] for name in ("response_ids", "trained", "turn")}
    return replace(rollout, **cut, sampler_logp=None, policy_logp=None)


def race(rounds: int) -> dict[str, list[Record]]:
    """All contestants in turns, after one round to warm up."""
    works = contestants()
    found: dict[str, list[Record]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            row = work()
            if number:
                found[name].append(row)
    return found


def summary(found: dict[str, list[Record]]) -> Record:
    """The ratios of this file's docstring, from the medians of CPU seconds; bytes of memory."""
    cpu = {name: [row["total_cpu"] for row in rows] for name, rows in found.items()}
    one, two, alone = (median(cpu[name]) for name in ("one", "two", "forward"))
    return {
        "cpu": {name: spread(values) for name, values in cpu.items()},
        "extra": (two - one) / alone,
        "two": (two - one + alone) / (2 * alone),
        "limit": LIMIT,
        "peak_bytes": {name: median(row["peak_bytes"] for row in found[name]) for name in ("one", "two")},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    if parser.parse_args().quick:
        globals().update(QUICK)
    torch.set_num_threads(1)
    say(f"{machine()['cpu']}, one thread")
    result = summary(race(ROUNDS))
    for name, one in result["cpu"].items():
        say(f"{name:8} {one['median']:.3f} s of CPU ({one['low']:.3f} to {one['high']:.3f})")
    say(f"extra {result['extra']:.3f}, two {result['two']:.3f} (at most {LIMIT})")
    peak = result["peak_bytes"]
    say(f"peak of loss and backward: one {peak['one'] / 2**20:.1f} MiB, two {peak['two'] / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
