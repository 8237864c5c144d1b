"""Gaussian walks on a line: many small policies at once, as batches of matrices (arXiv 2603.25562 appendix E).

Shapes: R policies, n walks, T = HORIZON steps, H hidden units. Positions have no unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

STARTS, TARGETS = (2.0, -2.0), (-3.0, 3.0)  # of the two mirrored tasks


HORIZON = 20


LARGEST_LOG_SIGMA = 1.0


Network: TypeAlias = list[Tensor]  # three layers of R networks: weights [R, in, out] and biases [R, 1, out]


@torch.no_grad()
def rollout(
    network: Network, floor: Tensor, task: int, walks: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """States [R, walks, HORIZON + 1, 3] (task, position, share of elapsed time) and steps [R, walks, HORIZON]."""
    rows = len(floor)
    position = torch.full((rows, walks), STARTS[task])
    states, actions = [_state(task, position, 0)], []
    for t in range(HORIZON):
        mean, log_sigma = moments(outputs(network, states[-1][:, :, None])[1][:, :, 0], floor[:, None])
        action = mean + log_sigma.exp() * torch.randn(rows, walks, generator=generator)
        position = position + action
        actions.append(action)
        states.append(_state(task, position, t + 1))
    return torch.stack(states, 2), torch.stack(actions, 2)


def outputs(network: Network, states: Tensor) -> tuple[Tensor, Tensor]:
    """Last hidden layer [R, n, T, H] and outputs [R, n, T, 2] of R networks at `states` [R, n, T, 3]."""
    w1, b1, w2, b2, w3, b3 = network
    rows, walks, steps = states.shape[:3]
    hidden = torch.tanh(torch.baddbmm(b1, states.reshape(rows, walks * steps, 3), w1))
    hidden = torch.tanh(torch.baddbmm(b2, hidden, w2))
    out = torch.baddbmm(b3, hidden, w3)
    return hidden.view(rows, walks, steps, -1), out.view(rows, walks, steps, 2)


def moments(out: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log sigma, each [...], of outputs [..., 2]; `floor` broadcasts."""
    return out[..., 0], torch.maximum(out[..., 1].clamp(max=LARGEST_LOG_SIGMA), floor)


def log_prob(out: Tensor, actions: Tensor, floor: Tensor) -> Tensor:
    """log density [R, n, T] of `actions`."""
    mean, log_sigma = moments(out, floor[:, None, None])
    return -0.5 * ((actions - mean) / log_sigma.exp()).square() - log_sigma - 0.5 * math.log(2 * math.pi)


def discounted(values: Tensor, gamma: Tensor) -> Tensor:
    """sum_{t' >= t} gamma^(t' - t) values_t' over the last axis, [R, n, T]; `gamma` [R]."""
    total = torch.zeros_like(values[..., 0])
    out: list[Tensor] = []
    for t in reversed(range(values.shape[-1])):
        total = values[..., t] + gamma[:, None] * total
        out.append(total)
    return torch.stack(out[::-1], -1)


def new_network(seeds: Sequence[int], width: int) -> Network:
    """One network per seed, stacked; uniform within 1/sqrt(inputs), as torch's linear layers."""
    layers: list[Network] = []
    for seed in seeds:
        generator = generator_of(seed, 0)
        one: Network = []
        for fan_in, fan_out in ((3, width), (width, width), (width, 2)):
            for shape in ((fan_in, fan_out), (1, fan_out)):
                one.append((2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan_in))
        layers.append(one)
    return [torch.stack(same) for same in zip(*layers, strict=True)]


def between_micro_batches(hidden: Tensor, at_output: Tensor, parts: int) -> Tensor:
    """(1/M) sum_m ||g_m - mean||^2 of the output layer's gradient, [R].

    `hidden` [R, n, T, H] feeds the output layer, `at_output` [R, n, T, 2] is each walk's gradient at its output; a
    micro-batch's gradient is the mean over its walks; M is `parts`.
    """
    rows, walks = hidden.shape[:2]
    each = walks // parts
    h = torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1).reshape(rows, parts, -1, hidden.shape[-1] + 1)
    d = at_output.reshape(rows, parts, -1, 2)
    grads = h.transpose(-1, -2) @ d / each  # [R, M, H + 1, 2]
    return (grads - grads.mean(1, keepdim=True)).square().sum((2, 3)).mean(1)


def _state(task: int, position: Tensor, t: int) -> Tensor:
    return torch.stack([torch.full_like(position, float(task)), position, torch.full_like(position, t / HORIZON)], -1)


def generator_of(*seed: int) -> torch.Generator:
    """A generator seeded by a tuple of numbers."""
    return torch.Generator().manual_seed(sum(part * 1_000_003**i for i, part in enumerate(seed)))
