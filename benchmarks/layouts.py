"""The computed tables of docs/scale.md: bytes per token, layouts from 1 GPU to 64 nodes, parts against limits.json.

    python benchmarks/layouts.py

Nothing here runs a model; `benchmarks/limits.py` measured the memory of a step by part. The formulas are those of
`opd plan`. Shapes are Qwen3's as published; 70B has Llama 3's layers with Qwen3's vocabulary, so that every teacher
has the student's tokens. Responses have 2,048 tokens after 512.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from opd.commands.plan import formulas
from opd.commands.plan.devices import DEVICES, LINK, NETWORK_GBS, NODE
from opd.commands.plan.flow import seconds, traffic
from opd.commands.plan.formulas import BFLOAT16, FLOAT32, Shape
from opd.commands.plan.step import Student, TeacherModel, Work, memory, peak
from opd.commands.plan.tables import size
from opd.files import GIB

VOCABULARY = 151_936
CHUNK_ENTRIES = 2**27  # of a loss on a GPU, `models.head.GPU_FACTOR` times those of a CPU
RATES = (1.25e9, 12.5e9, 50e9)  # bytes per second of 10, 100 and 400 Gbit/s
GPU = DEVICES["h100"]
K = 64
MIB = 2**20


def _dense(layers: int, hidden: int, heads: int, intermediate: int, *, tied: bool = False, norms: bool = True) -> Shape:
    return Shape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_value_heads=8,
        head_dim=128,
        intermediate=intermediate,
        vocabulary=VOCABULARY,
        tied=tied,
        head_norms=norms,
    )


SHAPES = {
    "0.6B": _dense(28, 1024, 16, 3072, tied=True),
    "1.7B": _dense(28, 2048, 16, 6144, tied=True),
    "8B": _dense(36, 4096, 32, 12_288),
    "32B": _dense(64, 5120, 64, 25_600),
    "70B": _dense(80, 8192, 64, 28_672, norms=False),
    "235B": replace(_dense(94, 4096, 64, 1536), key_value_heads=4, experts=128, experts_per_token=8),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`teacher_here`: in every process; else on servers, with the top K by position. `rank`: of LoRA, or 0."""

    student: str
    teacher: str
    devices: int
    teacher_here: bool = False
    offload: bool = False
    rank: int = 0


LAYOUTS = [
    Layout(student="0.6B", teacher="1.7B", devices=1, teacher_here=True),
    Layout(student="1.7B", teacher="8B", devices=1, teacher_here=True, offload=True),
    Layout(student="8B", teacher="32B", devices=1, rank=16),
    Layout(student="1.7B", teacher="8B", devices=8, teacher_here=True),
    Layout(student="8B", teacher="32B", devices=8),
    Layout(student="32B", teacher="235B", devices=8, rank=16),
    Layout(student="8B", teacher="235B", devices=16),
    Layout(student="32B", teacher="235B", devices=32),
    Layout(student="32B", teacher="235B", devices=128),
    Layout(student="70B", teacher="235B", devices=64),
    Layout(student="70B", teacher="235B", devices=512),
]


def work_of(layout: Layout) -> Work:
    """The layout's step today: 4 responses per device, at least 64; full weights in float32 with autocast."""
    shape, lora = SHAPES[layout.student], layout.rank > 0
    sizes = (shape.hidden, shape.head_dim * shape.heads, shape.head_dim * shape.key_value_heads, shape.intermediate)
    hidden, q, kv, mlp = sizes
    matrices = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (mlp, hidden), (mlp, hidden), (hidden, mlp)]
    trained = formulas.lora_parameters(matrices * shape.layers, layout.rank) if lora else shape.parameters
    place = "servers" if not layout.teacher_here else "offloaded" if layout.offload else "here"
    teacher = TeacherModel(name=layout.teacher, place=place, shape=SHAPES[layout.teacher], width=BFLOAT16)
    return Work(
        student=Student(
            shape=shape,
            width=BFLOAT16 if lora else FLOAT32,
            trained=trained,
            lora=lora,
            autocast=not lora,
            checkpointing=True,
        ),
        teachers=(teacher,),
        support="full" if layout.teacher_here else "top_k",
        k=K,
        by_position=not layout.teacher_here,
        prompts=max(64, 4 * layout.devices),
        n=1,
        prompt_tokens=512,
        context_tokens=512,
        response_tokens=2048,
        micro_batch_tokens=8192,
        devices=layout.devices,
        chunk_rows=CHUNK_ENTRIES // VOCABULARY,
        chunk_copies=2 if layout.teacher_here else 1,
        scoring_rows=CHUNK_ENTRIES // VOCABULARY,
    )


def on_paper(work: Work) -> Work:
    """The same step with responses from an engine and without whole weights in any process, which is not built.

    With LoRA the engine gets the adapter alone.
    """
    return replace(work, writer="engine", servers=1, gathers=False, adapter_alone=work.student.lora)


def teacher_gpus(shape: Shape) -> int:
    """The fewest GPUs, a power of two, that hold the teacher in bfloat16 in 0.8 of their memory; 0.8 is assumed."""
    return 2 ** math.ceil(math.log2(max(1.0, shape.parameters * BFLOAT16 / (0.8 * GPU.memory))))


def served_seconds(work: Work, shape: Shape) -> float:
    """Scoring a step on `teacher_gpus`, by arithmetic, divided over them."""
    alone = replace(
        work,
        teachers=(TeacherModel(name="teacher", place="here", shape=shape, width=BFLOAT16),),
        devices=1,
    )
    return next(one.seconds for one in seconds(alone, GPU) if one.name == "scoring") / teacher_gpus(shape)


def memory_rows() -> list[list[str]]:
    rows = [["student", "teacher", "GPUs", "peak today", "fits", "peak on paper", "fits", "teacher's GPUs"]]
    for layout in LAYOUTS:
        work = work_of(layout)
        kind = f"{layout.student}, LoRA" if layout.rank else layout.student
        where = "" if not layout.teacher_here else " offloaded" if layout.offload else " beside it"
        cells = [kind, f"{layout.teacher}{where}", gpus(layout.devices)]
        for one in (work, on_paper(work)):
            phase, most = peak(memory(one))
            cells += [f"{most / GIB:.1f} GiB, {phase}", "yes" if most <= GPU.memory else "**no**"]
        cells.append("-" if layout.teacher_here else str(teacher_gpus(SHAPES[layout.teacher])))
        rows.append(cells)
    return rows


def time_rows() -> list[list[str]]:
    rows = [["student", "teacher", "GPUs", "tokens", "sampling", "scoring", "training", "weights", "teacher's scores"]]
    for layout in LAYOUTS:
        work, teacher = work_of(layout), SHAPES[layout.teacher]
        found = {one.name: f"{one.seconds:.3g} s, {one.limit}" for one in seconds(work, GPU)}
        if not layout.teacher_here:
            found["scoring"] = f"{served_seconds(work, teacher):.3g} s on {teacher_gpus(teacher)}"
        flows = {one.name: one.per_step for one in traffic(on_paper(work))}
        weights = flows["weights to an engine's servers"]
        update = f"{size(weights)}, {weights / (LINK * NETWORK_GBS * 1e9):.2g} s"
        scores = sum(value for name, value in flows.items() if layout.teacher in name)
        kind = f"{layout.student}, LoRA" if layout.rank else layout.student
        start = [kind, layout.teacher, gpus(layout.devices), f"{work.tokens:,}"]
        rows.append([*start, *(found[name] for name in ("sampling", "scoring", "training")), update, size(scores)])
    return rows


def limits_work() -> Work:
    """The step of limits_memory.py: SmolLM2's shapes in float32, the student's own model as its teacher."""
    shape = Shape(
        layers=30,
        hidden=576,
        heads=9,
        key_value_heads=3,
        head_dim=64,
        intermediate=1536,
        vocabulary=49_152,
        tied=True,
    )
    return Work(
        student=Student(shape=shape, width=FLOAT32, trained=shape.parameters),
        teachers=(TeacherModel(name="student", place="student", shape=shape, width=FLOAT32),),
        support="full",
        k=0,
        by_position=False,
        prompts=8,
        n=1,
        prompt_tokens=32,
        context_tokens=32,
        response_tokens=64,
        micro_batch_tokens=4096,
        devices=1,
        chunk_rows=2**22 // shape.vocabulary,
        on_cpu=True,
    )


# A part of limits.json: the part of the formulas, and its phase.
LIMITS = {
    "weights": ("weights", "loss"),
    "prepacked weights": ("prepacked weights", "sampling"),
    "KV cache": ("KV cache", "sampling"),
    "activations": ("activations", "loss"),
    "logits chunks": ("logits of a token or chunk", "loss"),
    "head gradient": ("output layer's gradient", "loss"),
    "gradients": ("gradients", "backward"),
    "moments": ("moments", "loss"),
}


def limits_rows() -> list[list[str]]:
    """Predicted bytes of a part of a step of 135M over those that results/limits.json has."""
    found = json.loads((Path(__file__).parent / "results" / "limits.json").read_text())["memory"]
    measured = {row["part"]: row["bytes"] for row in found}
    parts = memory(limits_work())
    computed = {
        name: next(getattr(one, phase) for one in parts if one.name == part) for name, (part, phase) in LIMITS.items()
    }
    computed["whole step"] = peak(parts)[1]
    rows = [["part", "predicted MiB", "measured MiB", "ratio"]]
    for name, value in computed.items():
        rows.append([name, f"{value / MIB:.0f}", f"{measured[name] / MIB:.0f}", f"{value / measured[name]:.2f}"])
    return rows


def gpus(devices: int) -> str:
    return str(devices) if devices <= NODE else f"{devices} ({devices // NODE} nodes)"


def signal_rows() -> list[list[str]]:
    """Bytes of each kind of signal per response token, and the tokens per second that fill a link."""
    request, answer = formulas.by_position_bytes(K, VOCABULARY)
    kinds = {
        "sampled token, JSON": formulas.sampled_bytes(),
        "top 20, JSON": formulas.top_k_bytes(20),
        f"top {K}, JSON": formulas.top_k_bytes(K),
        f"{K} given ids by position: request": request,
        f"{K} given ids by position: answer, base64": answer,
        "hidden state of 8B, bfloat16 (in one process only)": formulas.states_bytes(4096, BFLOAT16),
        "whole distribution, float32 (never sent)": formulas.distribution_bytes(VOCABULARY),
    }
    rows = [["signal", "bytes per token", *(f"{rate * 8 / 1e9:g} Gbit/s" for rate in RATES)]]
    return [
        *rows,
        *([name, f"{value:,.0f}", *(f"{rate / value:,.0f}" for rate in RATES)] for name, value in kinds.items()),
    ]


def weight_rows() -> list[list[str]]:
    """Bytes of an update, and its seconds over each link; with LoRA the merged weights are sent too."""
    rows = [["student", "parameters", "float32", "bfloat16", *(f"{rate * 8 / 1e9:g} Gbit/s" for rate in RATES)]]
    for name in list(SHAPES)[:-1]:
        count = SHAPES[name].parameters
        times = [f"{count * FLOAT32 / rate:.3g} s" for rate in RATES]
        rows.append([name, f"{count:,}", size(count * FLOAT32), size(count * BFLOAT16), *times])
    return rows


def markdown(rows: list[list[str]]) -> str:
    head, *others = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *others])


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for title, rows in (
        ("signals", signal_rows()),
        ("weights", weight_rows()),
        ("memory", memory_rows()),
        ("seconds", time_rows()),
        ("parts", limits_rows()),
    ):
        print(f"{title}\n\n{markdown(rows)}\n")


if __name__ == "__main__":
    main()
