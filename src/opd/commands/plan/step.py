"""A step in numbers: its sizes, and memory per device by part and phase. No torch.

A phase's memory is the sum of its column; the peak is the largest. Phases: sampling and scoring (phase A, no gradient),
the loss of a micro-batch (its forward is kept), and the end of its backward.

With N devices FSDP2 shards weights, gradients and moments by N. For sampling and scoring every device holds the whole
student (`World.gathered`), and a teacher in the process is whole on every device. In training a device holds its shard,
the parts outside of the layers whole, and two layers whole, this one and the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from opd.commands.plan import formulas
from opd.commands.plan.formulas import BFLOAT16, FLOAT32, Shape

PHASES = ("sampling", "scoring", "loss", "backward")
DRAWING = 3  # copies of a decode step's logits on a GPU: logits, probabilities, and those padded to whole blocks
ENTRY = 13  # bytes of an entry of a support in a batch: id, log-prob, mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    shape: Shape
    width: int  # bytes of a weight
    trained: int  # parameters; with LoRA those of the adapter
    lora: bool = False
    autocast: bool = False
    checkpointing: bool = False
    copies: int = 0  # of the trained weights that a method keeps
    layer_width: float | None = None  # bytes of a weight inside the layers; None: `width`, less if it has 4 bits
    moments: float | None = None  # bytes of an optimiser per trained parameter; None: two of `width`, AdamW's

    @property
    def computes(self) -> int:
        """Bytes of an activation."""
        return BFLOAT16 if self.autocast else self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherModel:
    """`place`: where its weights are. The student itself has none; an average has float32 weights beside its own."""

    name: str
    place: Literal["here", "offloaded", "servers", "student", "average"]
    shape: Shape | None  # None: of a server, whose config is not known
    width: int
    layer_width: float | None = None  # as of Student


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A stage's step, and the devices that share it."""

    student: Student
    teachers: tuple[TeacherModel, ...]
    support: str
    k: int
    by_position: bool  # a served teacher also scores tokens that the student chose
    prompts: int
    n: int
    prompt_tokens: int
    context_tokens: int  # of the prompt that the teacher reads
    response_tokens: int
    micro_batch_tokens: int
    devices: int
    writer: Literal["here", "engine", "other"] = "here"
    servers: int = 0  # of the engine
    adapter_alone: bool = False  # what they get of a student with LoRA
    rows_at_once: int = 64  # of the sampler
    chunk_rows: int = 1024  # of a loss
    chunk_copies: int = 2
    scoring_rows: int = 1024  # of a teacher's scores
    on_cpu: bool = False
    gathers: bool = True  # False: what a trainer would need that never holds the whole student; not built

    @property
    def rows(self) -> int:
        """Responses of the device with the most."""
        return math.ceil(self.prompts / self.devices) * self.n

    @property
    def tokens(self) -> int:
        """Response tokens of a step, all devices."""
        return self.prompts * self.n * self.response_tokens

    @property
    def length(self) -> int:
        """Tokens that the student reads of a row: all but the response's last."""
        return self.prompt_tokens + self.response_tokens - 1

    @property
    def micros(self) -> tuple[int, int]:
        """(micro-batches, rows in each) of a device."""
        return formulas.batches_of_rows(self.rows, self.length, self.micro_batch_tokens)

    @property
    def local(self) -> list[tuple[TeacherModel, Shape]]:
        """The teachers that compute on this device."""
        return [(one, one.shape) for one in self.teachers if one.place != "servers" and one.shape is not None]


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one part in the four phases."""

    name: str
    sampling: float = 0.0
    scoring: float = 0.0
    loss: float = 0.0
    backward: float = 0.0

    @property
    def most(self) -> float:
        return max(self.sampling, self.scoring, self.loss, self.backward)


def memory(work: Work) -> list[Part]:
    """The parts of a device's memory; those of zero bytes are left out."""
    parts = [*_weights(work), *_teachers(work), *_phase_a(work), *_training(work)]
    return [part for part in parts if part.most]


def peak(parts: list[Part]) -> tuple[str, float]:
    """(the phase with the most memory, its bytes)."""
    totals = {phase: sum(getattr(part, phase) for part in parts) for phase in PHASES}
    phase = max(totals, key=lambda name: totals[name])
    return phase, totals[phase]


def _always(name: str, size: float) -> Part:
    return Part(name, size, size, size, size)


def _weights(work: Work) -> list[Part]:
    student, count = work.student, work.devices
    shape, width = student.shape, student.width
    adapter = student.trained * width if student.lora else 0
    all_of_it = formulas.weights_bytes(shape, width, student.layer_width) + adapter
    shard, layers = all_of_it / count, 2 * shape.layer * width
    whole = all_of_it if count == 1 else shard + all_of_it * work.gathers
    training = all_of_it if count == 1 else min(shard + shape.outside * width + layers, shard + all_of_it)
    parts = [
        Part("weights", whole, whole, training, training),
        _always("moments", student.trained * (2 * width if student.moments is None else student.moments) / count),
        _always("copies of the weights", student.copies * student.trained * width / count),
    ]
    if student.autocast:
        cast = formulas.cast_weights(shape, checkpointing=False)
        kept = formulas.cast_weights(shape, checkpointing=student.checkpointing)
        parts.append(Part("bfloat16 copies of weights", cast * (work.writer == "here"), 0, kept, 0))
    return parts


def _teachers(work: Work) -> list[Part]:
    weights, scoring, states = 0.0, 0.0, 0.0
    tokens = work.rows * work.response_tokens
    head = 0.0
    for one, shape in work.local:
        own = formulas.weights_bytes(shape, one.width, one.layer_width)
        if one.place == "here":
            weights += own
        elif one.place == "average":
            weights += own + FLOAT32 * work.student.trained
        elif one.place == "offloaded":
            scoring += own
            head += shape.output * one.width if work.support in ("full", "units") else 0
        states += tokens * formulas.states_bytes(shape.hidden, one.width) if work.support in ("full", "units") else 0
    entries = work.k + 1 if work.support == "top_k" else 1
    scores = 0 if not work.teachers else tokens * (ENTRY * entries)
    return [
        Part("teacher's weights", weights, weights + scoring, weights + head, weights + head),
        Part("teacher's hidden states", 0, states, states, states),
        Part("scores", 0, scores, scores, scores),
    ]


def _phase_a(work: Work) -> list[Part]:
    """Sampling and scoring: the cache, the logits, one layer at work, prepacked weights on a CPU."""
    student, shape = work.student, work.student.shape
    at_once = min(work.rows, work.rows_at_once) if work.writer == "here" else 0
    width = student.computes
    cache = formulas.cache_size(shape, at_once, work.prompt_tokens + work.response_tokens, width)
    prompts = math.ceil(at_once / work.n) * work.prompt_tokens
    drawn = at_once * shape.vocabulary * FLOAT32 * (1 if work.on_cpu else DRAWING)
    packs = work.on_cpu and at_once and width == FLOAT32 and work.devices == 1
    packed = FLOAT32 * (shape.layers * (shape.layer - 2 * shape.hidden) + shape.output) if packs else 0
    reading, logits = 0, 0
    for one, of_teacher in work.local:
        length = work.context_tokens + work.response_tokens - 1
        _, each = formulas.batches_of_rows(work.rows, length, work.micro_batch_tokens)
        reading = max(reading, formulas.working_memory(of_teacher, each * length, one.width))
        if work.support not in ("full", "units"):
            rows = min(each * work.response_tokens, work.scoring_rows)
            logits = max(logits, rows * of_teacher.vocabulary * FLOAT32)
    _, each = work.micros
    backward = formulas.working_memory(shape, each * work.length, width)
    return [
        Part("KV cache", sampling=cache),
        Part("prepacked weights", sampling=packed),
        Part("logits of a token or chunk", drawn, logits, _chunk(work)),
        Part("one layer at work", formulas.working_memory(shape, prompts, width), reading, backward),
    ]


def _chunk(work: Work) -> float:
    """The logits of a loss's chunk, of one model or both."""
    rows = min(work.micros[1] * work.response_tokens, work.chunk_rows)
    return rows * work.student.shape.vocabulary * FLOAT32 * work.chunk_copies


def _training(work: Work) -> list[Part]:
    student, shape = work.student, work.student.shape
    micros, each = work.micros
    gradients = student.trained * student.width / work.devices
    activations = formulas.saved_activations(
        shape,
        each * work.length,
        width=student.width,
        autocast=student.autocast,
        checkpointing=student.checkpointing,
    )
    ends = 2 * FLOAT32 * each * work.response_tokens * shape.hidden
    head = 0 if student.lora else FLOAT32 * shape.output
    again = shape.tied or micros > 1 or work.devices > 1
    layer = shape.layer * student.width if work.devices > 1 and not student.lora else 0
    return [
        Part("gradients", 0, 0, gradients * (micros > 1), gradients + layer),
        Part("output layer's gradient", 0, 0, head, head * again),
        Part("activations", 0, 0, activations, 0),
        Part("last states and their gradient", 0, 0, ends, ends),
    ]
