"""The plan of a recipe as lines of text."""

from __future__ import annotations

from collections.abc import Sequence

from opd.commands.plan.devices import BANDWIDTH, COMPUTE, LINK, NODE, Device
from opd.commands.plan.flow import seconds, traffic
from opd.commands.plan.recipe import Lengths, work_of
from opd.commands.plan.step import PHASES, Work, memory, peak
from opd.files import GIB
from opd.recipe.schema import Recipe


def plan_recipe(recipe: Recipe, device: Device, devices: int, lengths: Lengths) -> list[str]:
    """Lines on every stage. Raises the errors of `opd check`, and ConfigError for a model whose config is not known."""
    from opd.runs.checks import check_stages
    from opd.runs.prepare import Given

    checked = check_stages(recipe, Given(), processes=devices)
    lines = [device_line(device, devices)]
    for spec in recipe.stages:
        work, notes = work_of(recipe, spec, checked.prepared[spec.name], devices, lengths)
        lines += ["", f"stage {spec.name}: {spec.method}", *described(work), *(f"  {note}" for note in notes)]
        lines += ["", *memory_lines(work, device), "", *traffic_lines(work), "", *seconds_lines(work, device)]
    return [*lines, "", ASSUMED]


ASSUMED = (
    f"Computed from configs, not measured. Seconds are with {COMPUTE:.0%} of the peak rate, {BANDWIDTH:.0%} of the "
    f"bandwidth and {LINK:.0%} of a link, which are assumed: see docs/scale.md."
)


def device_line(device: Device, devices: int) -> str:
    link = f", a link of {device.link(devices) / 1e9:g} GB/s" if devices > 1 else ""
    nodes = f" on {-(-devices // NODE)} nodes" if devices > NODE else ""
    return (
        f"{devices} x {device.name}{nodes}: {device.memory / GIB:.1f} GiB, {device.bfloat16_tflops:g} TFLOPS in "
        f"bfloat16 ({device.float32_tflops:g} in float32), {device.bandwidth_gbs:g} GB/s{link}"
    )


def described(work: Work) -> list[str]:
    """The sizes that the tables are for."""
    student = work.student
    micros, each = work.micros
    kind = "autocast" if student.autocast else "float32" if student.width == 4 else "bfloat16"
    adapter = f", LoRA of {count(student.trained)}" if student.lora else ""
    again = ", gradient checkpointing" if student.checkpointing else ""
    lines = [f"  student: {count(student.shape.parameters)} parameters, {kind}{adapter}{again}"]
    for one in work.teachers:
        size = "a model" if one.shape is None else f"{count(one.shape.parameters)} parameters"
        lines.append(f"  {one.name} scores: {size}, {PLACES[one.place]}")
    lines.append(
        f"  a step: {work.prompts} prompts x {work.n} responses, {work.prompt_tokens} + {work.response_tokens} tokens; "
        f"per device {work.rows} rows in {micros} micro-batches of {each}"
    )
    return lines


PLACES = {
    "here": "whole on every device",
    "offloaded": "on every device while it scores",
    "servers": "on its servers, which are not counted",
    "student": "the student's own weights",
    "average": "a copy and its float32 average on every device",
}


def memory_lines(work: Work, device: Device) -> list[str]:
    """GiB per device by part and phase, or MiB where the peak is below one GiB."""
    parts = memory(work)
    phase, most = peak(parts)
    unit, each = ("GiB", GIB) if most >= GIB else ("MiB", 2**20)
    rows = [[part.name, *(f"{getattr(part, phase) / each:.2f}" for phase in PHASES)] for part in parts]
    totals = [f"{sum(getattr(part, phase) for part in parts) / each:.2f}" for phase in PHASES]
    fits = "fits" if most <= device.memory else "does not fit"
    return [
        *table([f"{unit} per device", *PHASES], [*rows, ["total", *totals]]),
        f"  peak {most / each:.2f} {unit}, in the phase {phase}: {fits} in {device.memory / GIB:.1f} GiB",
    ]


def traffic_lines(work: Work) -> list[str]:
    """Bytes per response token and per step, all devices."""
    flows = traffic(work)
    if not flows:
        return ["  nothing leaves the device"]
    rows = [[one.name, "-" if one.per_token is None else f"{one.per_token:,.0f}", size(one.per_step)] for one in flows]
    return table(["sent", "bytes per token", "per step"], rows)


def seconds_lines(work: Work, device: Device) -> list[str]:
    """Seconds of the busiest device, at least."""
    times = seconds(work, device)
    rows = [[one.name, f"{one.seconds:.3g}", one.limit] for one in times]
    lines = table(["phase", "seconds, at least", "limited by"], rows)
    total = sum(one.seconds for one in times)
    lines.append(f"  a step: at least {total:.3g} s, {work.tokens / total:,.0f} response tokens per second")
    return lines


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns, the first to the left."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "  " + "  ".join([row[0].ljust(len(first)), *others])

    return [line(row) for row in [head, *rows]]


def count(number: float) -> str:
    """A number of parameters: 596M, 1.7B."""
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M" if number >= 1e6 else f"{number:,.0f}"


def size(number: float) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f} B"
