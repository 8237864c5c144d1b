"""What a step sends, by kind, and its seconds by phase, at least. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from opd.commands.plan import formulas
from opd.commands.plan.devices import BANDWIDTH, COMPUTE, LINK, Device
from opd.commands.plan.formulas import BFLOAT16, FLOAT32
from opd.commands.plan.step import Work

# --- bytes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Flow:
    """One kind of signal: bytes per response token (None: it does not grow with them), and per step."""

    name: str
    per_token: float | None
    per_step: float


def traffic(work: Work) -> list[Flow]:
    """What leaves a device in a step, over all devices."""
    flows: list[Flow] = []
    student, shape = work.student, work.student.shape
    if work.writer == "engine":
        sent = student.trained * FLOAT32 if work.adapter_alone else shape.parameters * student.width
        flows.append(Flow("weights to an engine's servers", None, sent * work.servers))
    for one in work.teachers:
        if one.place == "servers":
            flows += [Flow(f"{name} ({one.name})", size, size * work.tokens) for name, size in _served(work)]
    if work.devices > 1:
        micros, _ = work.micros
        one_gather = formulas.gather_bytes(shape.parameters, student.width, work.devices) * work.devices
        flows.append(Flow("weights gathered for sampling and scoring", None, one_gather * work.gathers))
        gradients = formulas.gather_bytes(student.trained, student.width, work.devices) * work.devices
        flows.append(Flow("weights and gradients in training", None, micros * (2 * one_gather + gradients)))
    return flows


def _served(work: Work) -> list[tuple[str, float]]:
    request, answer = formulas.by_position_bytes(work.k, work.student.shape.vocabulary)
    flows: list[tuple[str, float]] = []
    if work.by_position:
        flows += [("ids to the teacher", request), ("log-probs by position", answer)]
    if work.support == "top_k" and not work.by_position:
        flows.append((f"top {work.k} in JSON", formulas.top_k_bytes(work.k)))
    if work.support == "sampled":
        flows.append(("sampled log-probs in JSON", formulas.sampled_bytes()))
    return flows


# --- seconds ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds of a phase on the busiest device, and what limits it."""

    name: str
    seconds: float
    limit: str


def seconds(work: Work, device: Device) -> list[Time]:
    """Sampling, scoring and training: each the largest of arithmetic, memory and link, at assumed shares of the peaks.

    A lower bound: launches of kernels, files, requests and waiting are not counted.
    """
    times = [_training_time(work, device)]
    if work.local:
        times.insert(0, _scoring_time(work, device))
    if work.writer == "here":
        times.insert(0, _sampling_time(work, device))
    return times


def _rate(device: Device, width: int) -> float:
    return COMPUTE * 1e12 * (device.bfloat16_tflops if width == BFLOAT16 else device.float32_tflops)


def _head_rate(device: Device, width: int, autocast: bool) -> float:
    """Of the output layer, which under autocast computes in TF32."""
    return COMPUTE * 1e12 * device.tf32_tflops if autocast else _rate(device, width)


def _longest(name: str, arithmetic: float, bytes_moved: float, link: float, device: Device) -> Time:
    found = {"arithmetic": arithmetic, "memory": bytes_moved / (BANDWIDTH * device.bandwidth_gbs * 1e9), "link": link}
    limit = max(found, key=lambda kind: found[kind])
    return Time(name, found[limit], limit)


def _sampling_time(work: Work, device: Device) -> Time:
    """Decode steps: each reads the weights and the cache once for all rows that are written together."""
    student, shape = work.student, work.student.shape
    width = student.computes
    at_once = min(work.rows, work.rows_at_once)
    turns = math.ceil(work.rows / at_once)
    middle = work.prompt_tokens + work.response_tokens / 2
    cache = formulas.cache_size(shape, at_once, 1, width) * middle
    weights = formulas.weight_traffic(shape.read(at_once), shape.output, width, student.layer_width, at_once)
    moved = turns * work.response_tokens * (weights + cache)
    prompts = formulas.layers_flops(shape, work.rows // work.n, work.prompt_tokens)
    tokens = work.rows * work.response_tokens
    arithmetic = (prompts + 2.0 * shape.active * tokens) / _rate(device, width)
    arithmetic += formulas.output_flops(shape, tokens) / _head_rate(device, width, student.autocast)
    link = formulas.gather_bytes(shape.parameters, student.width, work.devices) * work.gathers
    return _longest("sampling", arithmetic, moved, link / (LINK * device.link(work.devices)), device)


def _scoring_time(work: Work, device: Device) -> Time:
    arithmetic, moved = 0.0, 0.0
    length = work.context_tokens + work.response_tokens - 1
    for one, shape in work.local:
        micros, each = formulas.batches_of_rows(work.rows, length, work.micro_batch_tokens)
        arithmetic += formulas.layers_flops(shape, work.rows, length) / _rate(device, one.width)
        if work.support not in ("full", "units"):
            head = formulas.output_flops(shape, work.rows * work.response_tokens)
            arithmetic += head / _head_rate(device, one.width, False)
        whole, tokens = shape.parameters, each * length
        moved += micros * formulas.weight_traffic(whole, shape.outside, one.width, one.layer_width, tokens)
    return _longest("scoring", arithmetic, moved, 0.0, device)


def _training_time(work: Work, device: Device) -> Time:
    """Layers: `training_factor` forwards. Output layer: forward and both gradients; the teacher's forward with it."""
    student, shape = work.student, work.student.shape
    micros, each = work.micros
    factor = formulas.training_factor(checkpointing=student.checkpointing, all_weights=not student.lora)
    tokens = work.rows * work.response_tokens
    arithmetic = factor * formulas.layers_flops(shape, work.rows, work.length) / _rate(device, student.computes)
    head = (2 + (not student.lora)) * formulas.output_flops(shape, tokens)
    if work.support in ("full", "units"):
        head += sum(formulas.output_flops(one, tokens) for _, one in work.local)
    arithmetic += head / _head_rate(device, student.computes, student.autocast)
    # Gradient read, weights and moments read and written.
    optimiser = 7 * student.trained * student.width / work.devices
    whole, at_once = shape.parameters, each * work.length
    weights = formulas.weight_traffic(whole, shape.outside, student.computes, student.layer_width, at_once)
    moved = micros * factor * weights + optimiser
    gathers = formulas.gather_bytes(shape.parameters, student.width, work.devices)
    reduced = formulas.gather_bytes(student.trained, student.width, work.devices)
    link = micros * (2 * gathers + reduced) / (LINK * device.link(work.devices))
    return _longest("training", arithmetic, moved, link, device)
