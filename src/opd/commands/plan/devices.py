"""Devices: memory, peak rates and links, as their makers publish them.

Source: NVIDIA's public datasheets (B200 in HGX; H200, H100 and A100 in SXM; L40S; the GeForce RTX 4090 of the Ada
architecture paper). Rates are without sparsity. The efficiencies are assumptions, not measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from opd.errors import ConfigError, nearest

COMPUTE = 0.4  # share of a peak rate that products of a model reach; assumed
BANDWIDTH = 0.6  # share of the memory's bandwidth; assumed
LINK = 0.7  # share of a link's bandwidth; assumed
NODE = 8  # devices that a fast link joins
NETWORK_GBS = 50.0  # per device between nodes, one direction: a port of 400 Gbit/s each; assumed


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator. `link_gbs`: one direction, inside a node.

    A datasheet's GB is read as 10^9 bytes. That leaves about 6 % of the memory for the context of CUDA and for gaps.
    """

    name: str
    memory_gb: float
    bfloat16_tflops: float
    tf32_tflops: float
    float32_tflops: float
    bandwidth_gbs: float
    link_gbs: float

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.memory_gb * 1e9

    def link(self, devices: int) -> float:
        """Bytes per second of one device's link, in one direction; that of the network from two nodes on."""
        return (self.link_gbs if devices <= NODE else min(self.link_gbs, NETWORK_GBS)) * 1e9


def _device(name: str, memory: float, rates: tuple[float, float, float], bandwidth: float, link: float) -> Device:
    half, tf32, full = rates
    return Device(
        name=name,
        memory_gb=memory,
        bfloat16_tflops=half,
        tf32_tflops=tf32,
        float32_tflops=full,
        bandwidth_gbs=bandwidth,
        link_gbs=link,
    )


DEVICES: Mapping[str, Device] = {
    one.name: one
    for one in (
        _device("b200", 180, (2250, 1100, 75), 8000, 900),
        _device("h200", 141, (989, 494, 67), 4800, 450),
        _device("h100", 80, (989, 494, 67), 3350, 450),
        _device("a100-80", 80, (312, 156, 19.5), 2039, 300),
        _device("a100-40", 40, (312, 156, 19.5), 1555, 300),
        _device("l40s", 48, (362, 183, 91.6), 864, 32),
        _device("rtx-4090", 24, (165, 82.6, 82.6), 1008, 32),
    )
}


def device_of(
    name: str, *, memory_gib: float | None = None, tflops: float | None = None, bandwidth_gbs: float | None = None
) -> Device:
    """The device of this name, with other numbers in place of its own. `tflops`: of every precision.

    Raises ConfigError for an unknown name, and for a number that is not above 0.
    """
    if name not in DEVICES:
        raise ConfigError(
            f"--gpu is {name!r}, which is not in the table: {', '.join(DEVICES)}.{nearest(name, DEVICES)} For another "
            "device give --memory-gib, --tflops and --bandwidth-gbs beside the most similar name."
        )
    for option, value in (("memory-gib", memory_gib), ("tflops", tflops), ("bandwidth-gbs", bandwidth_gbs)):
        if value is not None and not value > 0:
            raise ConfigError(f"--{option} is {value:g}, and a device has more than 0.")
    found = DEVICES[name]
    if memory_gib is not None:
        found = replace(found, memory_gb=memory_gib * 2**30 / 1e9)
    if bandwidth_gbs is not None:
        found = replace(found, bandwidth_gbs=bandwidth_gbs)
    if tflops is not None:
        found = replace(found, bfloat16_tflops=tflops, tf32_tflops=tflops, float32_tflops=tflops)
    return found
