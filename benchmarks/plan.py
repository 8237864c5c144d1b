"""The memory that `opd plan` computes against the measured memory of real steps, by phase.

    python benchmarks/plan.py [--quick]

Every case is a step of the library in float32 on the CPU: 8 prompts of 32 tokens, 64 new tokens each, a teacher of 26M.
Measured is the highest resident size in each phase of the second step above the size before the models were made.

The formulas count live memory. glibc keeps freed blocks below 32 MB for later ones, so there resident memory is that of
several phases together. The worker `returned` runs with MALLOC_MMAP_THRESHOLD_=65536, with which every block above
64 KiB goes back to the system when it is freed; `kept` runs with glibc's own settings.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import opd_side
import torch
from common import PeakMemory, Record, measured, resident, say, serve, workers
from layouts import markdown
from workload import SIZES, causal_lm, language_model, prompts, tokenizer

from opd.commands.plan.formulas import Shape
from opd.commands.plan.step import PHASES, Student, TeacherModel, Work, memory
from opd.loss.step import gradient, scored
from opd.methods.reverse_kl import reverse_kl
from opd.methods.topk_reverse_kl import topk_reverse_kl
from opd.models.head import chunk_rows
from opd.samplers.hf import ROWS
from opd.teachers.scoring import CHUNKS_AT_ONCE
from opd.types import Sampling

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 32, 64
TEACHER = "26M"
MIB = 2**20
SIZES_ALONE = 4  # cases that also run with glibc's settings
PLAIN: Record = {"student": "26M", "k": 0, "checkpointing": False, "autocast": False, "tokens": 4096}
CASES: list[Record] = [
    PLAIN | {"student": "5M"},
    PLAIN | {"student": "11M"},
    PLAIN,
    PLAIN | {"student": "135M"},
    PLAIN | {"checkpointing": True},
    PLAIN | {"tokens": 190},  # two rows a micro-batch
    PLAIN | {"k": 32},
    PLAIN | {"autocast": True},
]
ALLOCATORS: dict[str, dict[str, str]] = {"returned": {"MALLOC_MMAP_THRESHOLD_": "65536"}, "kept": {}}
MEASURED = ("sampling", "scoring", "training", "update")


def shape_of(size: str) -> Shape:
    """The shape of one of the benchmarks' models."""
    one = SIZES[size]
    return Shape(
        layers=one.layers,
        hidden=one.hidden,
        heads=one.heads,
        key_value_heads=one.key_value_heads or one.heads,
        head_dim=one.head_dim or one.hidden // one.heads,
        intermediate=one.intermediate,
        vocabulary=one.vocabulary,
        tied=True,
    )


def work_of(case: Record) -> Work:
    """The case as the formulas see it."""
    shape, teacher = shape_of(case["student"]), shape_of(TEACHER)
    rows = chunk_rows(shape.vocabulary, torch.device("cpu"))
    return Work(
        student=Student(
            shape=shape,
            width=4,
            trained=shape.parameters,
            autocast=case["autocast"],
            checkpointing=case["checkpointing"],
        ),
        teachers=(TeacherModel(name="teacher", place="here", shape=teacher, width=4),),
        support="top_k" if case["k"] else "full",
        k=case["k"],
        by_position=False,
        prompts=PROMPTS,
        n=1,
        prompt_tokens=PROMPT_TOKENS,
        context_tokens=PROMPT_TOKENS,
        response_tokens=NEW_TOKENS,
        micro_batch_tokens=case["tokens"],
        devices=1,
        rows_at_once=ROWS,
        chunk_rows=rows,
        chunk_copies=1 if case["k"] else 2,
        scoring_rows=CHUNKS_AT_ONCE * rows,
        on_cpu=True,
    )


def predicted(case: Record) -> dict[str, float]:
    """Bytes by measured phase: `training` is the larger of loss and backward, `update` has the backward's gradients."""
    parts = memory(work_of(case))
    totals = {phase: sum(getattr(part, phase) for part in parts) for phase in PHASES}
    lasting = ("weights", "teacher's weights", "moments", "gradients", "teacher's hidden states", "scores")
    update = sum(part.backward for part in parts if part.name in lasting)
    return {
        "sampling": totals["sampling"],
        "scoring": totals["scoring"],
        "training": max(totals["loss"], totals["backward"]),
        "update": update,
    }


def measured_step(case: Record) -> Record:
    """Bytes by phase, above the memory before the models."""
    gc.collect()
    base, tok = resident(), tokenizer()
    model = causal_lm(case["student"], seed=1)
    if case["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lm = language_model(model, tok, autocast=case["autocast"])
    teacher = language_model(causal_lm(TEACHER, seed=2), tok)
    method = topk_reverse_kl(k=case["k"], by="teacher", form="tail") if case["k"] else reverse_kl()
    mine = opd_side.side(method, lm, teacher, Sampling(max_completion_length=NEW_TOKENS))
    step_prompts = prompts(PROMPTS, PROMPT_TOKENS, tok)
    phases(mine, step_prompts, 0, case["tokens"], base)  # makes the moments
    return phases(mine, step_prompts, 1, case["tokens"], base)


def phases(mine: opd_side.Side, step_prompts: list[Any], number: int, tokens: int, base: int) -> Record:
    """One step; the highest resident size of each phase above `base`."""
    out: Record = {}

    def begin() -> PeakMemory:
        gc.collect()
        return PeakMemory()

    def end(name: str, peak: PeakMemory) -> None:
        out[name] = peak.start - base + peak.above_start()

    peak = begin()
    rollouts = mine.sampler(step_prompts, seed=(0, number))
    end("sampling", peak)
    peak = begin()
    contexts = mine.method.context(rollouts)
    phase_a = scored(mine.method, mine.teacher, rollouts, contexts, mine.method.request(), mine.student.device)
    end("scoring", peak)
    peak = begin()
    gradient(mine.method, mine.student, mine.teacher, phase_a, tokens)
    end("training", peak)
    peak = begin()
    mine.optimiser.clip()
    mine.method.update(mine.optimiser)
    end("update", peak)
    return out


def worker() -> None:
    # Libraries that load at the first step, and memory that threads keep, are no part of a later one.
    measured_step(PLAIN | {"student": "1M"})
    serve(measured_step)


def named(case: Record) -> str:
    options = {
        "top 32": case["k"],
        "checkpointing": case["checkpointing"],
        "autocast": case["autocast"],
        "micro-batches": case["tokens"] < PLAIN["tokens"],
    }
    return ", ".join([case["student"], *(name for name, on in options.items() if on)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small case, to try the code")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker()
        return
    with measured("plan", options.quick) as result:
        result["cases"] = []
        for allocator, environment in ALLOCATORS.items():
            with workers(__file__, ["opd"], environment=environment) as started:
                for case in CASES[: 1 if options.quick else len(CASES) if environment else SIZES_ALONE]:
                    row = {"case": case, "allocator": allocator, "measured": started["opd"].ask(case)}
                    row["predicted"] = predicted(case)
                    result["cases"].append(row)
                    say(f"{allocator}, {named(case)}: {'; '.join(cells(row))}")
    say(table(result["cases"]))


def cells(row: Record) -> list[str]:
    """Predicted / measured MiB = their ratio, by phase; last the step's peak.

    A phase that fits in memory that the process already held grows by nothing: it has no ratio.
    """
    found = [(row["predicted"][name], row["measured"][name]) for name in MEASURED]
    found.append((max(row["predicted"].values()), max(row["measured"].values())))
    return [f"{mine / MIB:.0f} / {own / MIB:.0f} = {f'{mine / own:.2f}' if own > 0 else '-'}" for mine, own in found]


def table(rows: list[Record]) -> str:
    """The table of docs/scale.md."""
    head = ["student", "memory", *MEASURED, "peak"]
    return markdown([head, *([named(row["case"]), row["allocator"], *cells(row)] for row in rows)])


if __name__ == "__main__":
    main()
