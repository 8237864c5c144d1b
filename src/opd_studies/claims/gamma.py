"""Future rewards in the credit of a token: gradient variance and drift against gamma, on Gaussian navigation.

Fu et al., arXiv 2603.25562 eq. 3 and appendix E: g_gamma = sum_t (sum_{t' >= t} gamma^(t' - t) r_t') grad log pi_t
with the cost r_t = log pi(y_t) - log q(y_t). A policy walks on a line in 20 Gaussian steps; on each of two mirrored
tasks a teacher is trained with REINFORCE, and one student is distilled from both in turn.

The paper does not give the teacher's reward, the optimiser or the smallest sigma of a policy. Here: reward
-|position - target| - 0.1 |step|, Adam, and a floor on log sigma, which decides the result: -1.5 in setting A, -5 in
setting B (nearly deterministic policies). To fit five minutes, policies have 32 hidden units (the paper: about 60) and
600 iterations of distillation (the paper: 2,000). All networks of all seeds, gammas and settings are one batch of
matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_studies.lab.lab import Lab
from opd_studies.page import report
from opd_studies.page.outcome import Check, Finding, Outcome, finding, over_seeds, short
from opd_studies.worlds.gaussian_walks import (
    HORIZON,
    TARGETS,
    Network,
    between_micro_batches,
    discounted,
    generator_of,
    log_prob,
    new_network,
    outputs,
    rollout,
)

USE = (
    "Keep `gamma: 0` in method `opd`. A larger gamma raised the gradient's variance in A and left students far "
    "from the targets in B; no gamma brought them clearly nearer."
)


FLOORS = {"A": -1.5, "B": -5.0}  # log sigma


GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)


MICRO_BATCHES = 8  # the variance is the spread of their gradients


# Thresholds, in log10, because seeds differ by orders of magnitude.
SLOPE = 0.0  # log10 variance per unit of gamma


MORE = math.log10(3.0)  # log10 of the variance at gamma 1 over that at 0


ARRIVED = 0.0  # log10 of the distance from the target at the end: less than 1


FARTHER = math.log10(2.0)  # log10 of the distance at gamma 1 over that at 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds, widths and lengths."""

    seeds: Sequence[int] = (42, 43, 2026, 1, 2, 3, 4, 5)
    width: int = 32
    teacher_iterations: int = 250
    teacher_batch: int = 64
    iterations: int = 600
    batch: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """The measurements, by setting."""

    variance: dict[str, Tensor]  # [seeds, gammas] late: the median over the last fifth of iterations
    distance: dict[str, Tensor]  # [seeds, gammas] mean |end - target| over both tasks
    teacher_distance: dict[str, Tensor]  # [seeds]
    curve: dict[str, Tensor]  # [iterations, gammas] variance, median over seeds
    paths: dict[str, Tensor]  # [tasks, gammas, HORIZON + 1] mean position, first seed


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Train teachers, then students for every gamma, in both settings; see the file's docstring."""
    size = size or Size()
    numbers = measure(size, lab)
    return Outcome(
        setup=(
            f"{len(size.seeds)} seeds, policies 3-{size.width}-{size.width}-2 with tanh; teachers by REINFORCE, "
            f"{size.teacher_iterations} iterations of {size.teacher_batch} walks; students "
            f"{size.iterations} iterations of {size.batch} walks, tasks in turn. Floor of log sigma: "
            f"A {FLOORS['A']}, B {FLOORS['B']}. Variance of the output layer's gradient between {MICRO_BATCHES} "
            "micro-batches."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers."""
    return (
        finding(
            "The variance of the gradient grows with gamma",
            "2603.25562 eq. 1-3, appendix E",
            _variance_checks(numbers.variance["A"]),
            _variance_checks(numbers.variance["B"]),
        ),
        finding(
            "Token-level credit (gamma 0) reaches the targets, sequence-level credit (gamma 1) drifts to wrong places",
            "2603.25562 appendix E",
            _drift_checks(numbers.distance["A"]),
            _drift_checks(numbers.distance["B"]),
        ),
    )


def _variance_checks(variance: Tensor) -> list[Check]:
    """Checks on variances [seeds, gammas]: the slope of log10 in gamma, and gamma 1 against 0."""
    logs = variance.log10()
    gamma = torch.tensor(GAMMAS, dtype=logs.dtype)
    centred = gamma - gamma.mean()
    slopes = (logs * centred).sum(1) / centred.square().sum()
    return [
        Check(what="slope of log10 variance in gamma", interval=over_seeds(slopes.tolist()), above=SLOPE),
        Check(
            what="log10 of variance at gamma 1 over 0",
            interval=over_seeds((logs[:, -1] - logs[:, 0]).tolist()),
            above=MORE,
        ),
    ]


def _drift_checks(distance: Tensor) -> list[Check]:
    """Checks on distances [seeds, gammas]: gamma 0 arrives, gamma 1 ends farther away."""
    logs = distance.log10()
    return [
        Check(what="log10 of distance at gamma 0", interval=over_seeds(logs[:, 0].tolist()), below=ARRIVED),
        Check(
            what="log10 of distance at gamma 1 over 0",
            interval=over_seeds((logs[:, -1] - logs[:, 0]).tolist()),
            above=FARTHER,
        ),
    ]


def measure(size: Size, lab: Lab) -> Numbers:
    """Train everything. Rows of students are settings x seeds x gammas, of teachers tasks x settings x seeds."""
    settings, seeds, gammas = len(FLOORS), len(size.seeds), len(GAMMAS)
    floors = torch.tensor([list(FLOORS.values())]).T.expand(settings, seeds).reshape(-1)  # [settings x seeds]
    lab.note("training teachers")
    teachers = [train_teacher(task, floors, size) for task in range(2)]
    row = torch.arange(settings * seeds).repeat_interleave(gammas)  # the teacher of each student
    gamma = torch.tensor(GAMMAS).repeat(settings * seeds)
    theirs = [[weight[row] for weight in teacher] for teacher in teachers]
    start = new_network([seed for _ in FLOORS for seed in size.seeds for _ in GAMMAS], size.width)
    lab.note("distilling students")
    student, variance = distil(start, theirs, floors[row], gamma, size)
    shape = (settings, seeds, gammas)
    late = variance[-max(1, size.iterations // 5) :].median(0).values.view(shape)
    curve = variance.view(-1, *shape).median(2).values
    walks = [rollout(student, floors[row], task, 64, generator_of(9, task))[0] for task in range(2)]
    taught = [rollout(teachers[task], floors, task, 64, generator_of(9, task))[0] for task in range(2)]
    distance = torch.stack([_distance(s, task) for task, s in enumerate(walks)]).mean(0).view(shape)
    teacher_distance = torch.stack([_distance(s, task) for task, s in enumerate(taught)]).mean(0)
    mean_path = torch.stack([s[..., 1].mean(1) for s in walks]).view(2, *shape, HORIZON + 1)
    return Numbers(
        variance=_by_setting(late),
        distance=_by_setting(distance),
        teacher_distance=_by_setting(teacher_distance.view(settings, seeds)),
        curve={name: curve[:, i] for i, name in enumerate(FLOORS)},
        paths={name: mean_path[:, i, 0] for i, name in enumerate(FLOORS)},
    )


def train_teacher(task: int, floor: Tensor, size: Size) -> Network:
    """Train networks, one per entry of `floor` [R], by REINFORCE with returns standardised over walks at each step."""
    network = new_network([10_000 * (task + 1) + seed for _ in FLOORS for seed in size.seeds], size.width)
    optimiser = torch.optim.Adam([weight.requires_grad_() for weight in network], lr=3e-3)
    generator = generator_of(1, task)
    for _ in range(size.teacher_iterations):
        states, actions = rollout(network, floor, task, size.teacher_batch, generator)
        position = states[:, :, 1:, 1]
        reward = -(position - TARGETS[task]).abs() - 0.1 * actions.abs()
        ahead = discounted(reward, torch.ones_like(floor))
        advantage = (ahead - ahead.mean(1, keepdim=True)) / (ahead.std(1, keepdim=True) + 1e-6)
        logp = log_prob(outputs(network, states[:, :, :-1])[1], actions, floor)
        optimiser.zero_grad()
        (-(advantage * logp).sum(2).mean(1).sum()).backward()
        optimiser.step()
    return [weight.detach() for weight in network]


def distil(
    student: Network, teachers: list[Network], floor: Tensor, gamma: Tensor, size: Size
) -> tuple[Network, Tensor]:
    """Descend g_gamma with Adam; `floor`, `gamma` [R]. Also returns the gradient variances, [iterations, R]."""
    optimiser = torch.optim.Adam([weight.requires_grad_() for weight in student], lr=1e-3)
    generator = generator_of(2, 0)
    variance: list[Tensor] = []
    for iteration in range(size.iterations):
        task = iteration % 2
        states, actions = rollout(student, floor, task, size.batch, generator)
        seen = states[:, :, :-1]
        hidden, out = outputs(student, seen)
        logp = log_prob(out, actions, floor)
        with torch.no_grad():
            cost = logp - log_prob(outputs(teachers[task], seen)[1], actions, floor)
            ahead = discounted(cost, gamma)
        loss = (ahead * logp).sum(2).mean(1).sum()  # rows are independent: the sum has each row's own gradient
        *grads, at_output = torch.autograd.grad(loss, [*student, out])
        variance.append(between_micro_batches(hidden.detach(), at_output * size.batch, MICRO_BATCHES))
        for weight, grad in zip(student, grads, strict=True):
            weight.grad = grad
        optimiser.step()
    return [weight.detach() for weight in student], torch.stack(variance)


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """Medians over seeds by setting and gamma."""
    rows: list[tuple[str, ...]] = [("setting", "gamma", "late variance", "distance from the target", "the teacher's")]
    for name in FLOORS:
        for i, gamma in enumerate(GAMMAS):
            values = (numbers.variance[name][:, i], numbers.distance[name][:, i], numbers.teacher_distance[name])
            rows.append((name, f"{gamma:g}", *(short(float(value.median())) for value in values)))
    return tuple(rows)


def draw(numbers: Numbers) -> report.Figure:
    """Variance by iteration, distance by gamma, mean walks of the first seed."""
    figure, axes = report.figure(3, len(FLOORS))
    for (name, floor), (left, middle, right) in zip(FLOORS.items(), axes, strict=True):
        for i, (gamma, colour) in enumerate(zip(GAMMAS, report.COLOURS, strict=False)):
            curve = numbers.curve[name][:, i]
            smooth = curve.unfold(0, min(20, len(curve)), 1).median(-1).values
            left.plot(smooth, color=colour, label=f"gamma {gamma:g}")
            for task in range(2):
                right.plot(numbers.paths[name][task, i], color=colour)
        left.set(yscale="log", xlabel="iteration", ylabel="gradient variance, squared norm")
        left.set_title(f"{name}: log sigma >= {floor:g}, median of seeds")
        for seed in numbers.distance[name]:
            middle.plot(GAMMAS, seed, "o-", color="#999999", linewidth=0.6, markersize=3)
        middle.plot(GAMMAS, numbers.distance[name].median(0).values, color="black", label="median of seeds")
        middle.axhline(float(numbers.teacher_distance[name].median()), color=report.COLOURS[2], label="teachers")
        middle.set(yscale="log", xlabel="gamma", ylabel="distance from target, units of position", xticks=GAMMAS)
        for target in TARGETS:
            right.axhline(target, color="black", linewidth=0.7, linestyle=":")
        right.set(xlabel="step of the walk", ylabel="mean position (first seed)")
    axes[0][0].legend(fontsize=7)
    axes[0][1].legend(fontsize=7)
    return figure


def _distance(states: Tensor, task: int) -> Tensor:
    return (states[:, :, -1, 1] - TARGETS[task]).abs().mean(1)


def _by_setting(values: Tensor) -> dict[str, Tensor]:
    return {name: values[i].double() for i, name in enumerate(FLOORS)}
