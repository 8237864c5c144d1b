"""Time and memory of a step, measured on one step without its update. No weight is changed."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from opd.commands.doctor.findings import Finding
from opd.commands.doctor.subject import Subject
from opd.data.order import shuffled
from opd.files import GIB
from opd.loss.step import gradient, scored, written
from opd.models.experts import coefficient_of
from opd.stage.optimisers import state_bytes
from opd.stage.stopwatch import peak_bytes
from opd.types import ReservedStep


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step without its update: seconds by part, tokens, and the gradient norm."""

    prompts: int
    tokens: int
    generate: float
    score: float
    train: float
    grad_norm: float


def cost(subject: Subject) -> Finding:
    """Time of a step, scaled to the recipe's prompts per step, and memory with the optimiser's moments.

    The time is an upper estimate: sampling costs less per prompt in larger batches, and a first step includes warm-up.
    On a CPU the peak is that of this process, on a GPU that of torch's allocations.
    """
    spec, device = subject.spec, subject.student.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = one_step(subject)
    peak = peak_bytes(device)
    moments = state_bytes(subject.student.trainable(), spec.optimizer, subject.student.tables)
    there = total_bytes(device)
    factor = spec.prompts_per_step / step.prompts
    seconds = factor * (step.generate + step.score + step.train)
    numbers = {
        "measured_prompts": step.prompts,
        "measured_tokens": step.tokens,
        "generate_s": factor * step.generate,
        "score_s": factor * step.score,
        "train_s": factor * step.train,
        "step_s": seconds,
        "stage_s": seconds * spec.steps,
        "grad_norm": step.grad_norm,
        "peak_bytes": peak,
        "moments_bytes": moments,
        "memory_bytes": there,
    }
    says = (
        f"A step of {spec.prompts_per_step} prompts takes about {seconds:.1f} s (writing {numbers['generate_s']:.1f}, "
        f"scoring {numbers['score_s']:.1f}, gradient {numbers['train_s']:.1f}; measured on {step.prompts}), all "
        f"{spec.steps} about {numbers['stage_s'] / 60:.0f} minutes; {(peak + moments) / GIB:.1f} GiB of memory at the "
        f"peak with the optimiser's moments, of {there / GIB:.0f}."
    )
    if peak + moments <= there:
        return Finding(name="cost/step", level="ok", says=says, numbers=numbers)
    return Finding(
        name="cost/step",
        level="change",
        says=f"{says} This does not fit.",
        numbers=numbers,
        remedy=f"Set a smaller micro_batch_tokens (now {spec.micro_batch_tokens}), models.{spec.train}.lora, "
        f"gradient_checkpointing: true, or models.{subject.teacher_name}.offload: true.",
        study="docs/performance.md: what limits the memory of a step",
    )


def one_step(subject: Subject) -> Step:
    """Lines 1 to 8 of the training loop on a few of the recipe's prompts; then drops the gradients.

    Raises DataError for an empty response, TrainingError when no token is trained, as the loop does.
    """
    spec, method, student, teacher = subject.spec, subject.method, subject.student, subject.step_teacher
    count = min(spec.prompts_per_step, len(subject.prompts))
    prompts = shuffled(subject.prompts, first=0, count=count, seed=subject.seed)
    started = _now(subject)
    rollouts = written(method, prompts, subject.writers(), subject.rewarded, (subject.seed, ReservedStep.DOCTOR))
    wrote = _now(subject)
    phase_a = scored(method, teacher, rollouts, method.context(rollouts), method.request(), device=student.device)
    rated = _now(subject)
    try:
        balance = coefficient_of(student.model, spec.router_aux_loss, spec.where(None))
        gradient(method, student, teacher, phase_a, spec.micro_batch_tokens, router_aux_loss=balance)
        squares = [p.grad.double().square().sum().item() for p in student.trainable().values() if p.grad is not None]
    finally:
        student.model.zero_grad(set_to_none=True)
    return Step(
        prompts=count,
        tokens=int(phase_a.batch.mask.sum()),
        generate=wrote - started,
        score=rated - wrote,
        train=_now(subject) - rated,
        grad_norm=sum(squares) ** 0.5,
    )


def total_bytes(device: torch.device) -> int:
    """Total memory of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _now(subject: Subject) -> float:
    if subject.student.device.type == "cuda":
        torch.cuda.synchronize(subject.student.device)
    return time.perf_counter()
