"""The load of a mixture's experts in a training step, and the loss that balances it.

The loss of Switch Transformers (arXiv 2101.03961 eq. 4 to 6) with the conventions of transformers'
`load_balancing_loss_func`: the layers are pooled, and a token counts once for each of its k experts. Over R places
(tokens times routers), with c_e choices of expert e and probabilities p = softmax(router logits),

    loss = E sum_e f_e P_e        f_e = c_e / R        P_e = (1 / R) sum_n p_n(e)        k if all are chosen equally
    d/dz_n(j) = (E / R) p_n(j) (f_j - sum_e f_e p_n(e))

f has no gradient, so with the f of the whole step the loss is a sum over places: its value and gradient depend neither
on the micro-batches nor on the number of processes. f takes a forward without gradient over the step's micro-batches
beforehand, unless there is only one.

The tokens are those of the step's trained sequences, prompt and response without its last token, each once per
sequence: neither padding nor the sharing of prefixes changes a number. f counts the experts that ran, which are not the
largest p where a bias (DeepSeek-V3) or a group limits the choice; transformers then counts the largest p.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from opd.errors import TrainingError
from opd.loss.collate import MicroBatch
from opd.maths.metrics import Columns, Metrics
from opd.models.experts import Decisions, Recording, Router, recorded, routers_of
from opd.models.forward import reads_of, response_states
from opd.models.language_model import LanguageModel
from opd.models.root import Root
from opd.parallel import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Fractions:
    """f of a whole step: `choices` [E], the sum over all routers, divided by the number of places R."""

    choices: Tensor
    places: float

    def part(self, decisions: Sequence[Decisions]) -> Tensor:
        """The part of the loss of these decisions, with gradient."""
        mass = torch.stack([one.mass.to(self.choices.device) for one in decisions]).sum(0)
        return len(mass) * (self.choices.to(mass.dtype) / self.places * mass).sum() / self.places


@dataclass(slots=True)
class Balance:
    """What a watched forward leaves: its part of the balancing loss, times its factor; None without one."""

    loss: Tensor | None = None


@dataclass(slots=True, kw_only=True)
class ExpertLoad:
    """The choices of a step's routers, summed over this process's micro-batches. A dense student has none."""

    routers: Sequence[Router]
    factor: float = 0.0  # of the balancing loss
    fractions: Fractions | None = None  # None: those of the one micro-batch
    choices: dict[str, Tensor] = field(default_factory=dict[str, Tensor])  # [E] by router
    unread: set[str] = field(default_factory=set[str])
    loss: float = 0.0  # the balancing loss without its factor

    @staticmethod
    def of(
        student: LanguageModel, micros: Sequence[MicroBatch | None], factor: float, root: Root, world: World
    ) -> ExpertLoad:
        """The load of a step before its first micro-batch; with a `factor`, its fractions f."""
        routers = routers_of(student.model)
        fractions = None
        if factor and (len(micros) > 1 or world.size > 1):
            fractions = whole_fractions(student, routers, micros, root, world)
        return ExpertLoad(routers=routers, factor=factor, fractions=fractions)

    @contextlib.contextmanager
    def watched(self, student: LanguageModel, micro: MicroBatch) -> Iterator[Balance]:
        """Count the choices of the micro-batch's forward inside the block. Raises TrainingError: see `check_read`."""
        balance = Balance()
        if not self.routers:
            yield balance
            return
        reads = reads_of(student, *micro.sequences)
        with recorded(self.routers, reads, logits=self.factor > 0) as recording:
            yield balance
        add_choices(self.choices, recording)
        self.unread |= recording.unread
        if self.factor:
            check_read(recording)
            part = (self.fractions or fractions_of(recording)).part(recording.decisions)
            self.loss += part.item()
            balance.loss = self.factor * part

    def metrics(self) -> Metrics:
        """Metrics experts/... of the step; empty for a dense student."""
        metrics = Metrics()
        for layer, router in enumerate(self.routers):
            if router.name in self.choices:
                counts = self.choices[router.name].tolist()
                metrics.rows(load_summary, layer=[layer] * len(counts), expert=[*range(len(counts))], choices=counts)
        if self.unread:
            metrics.max("experts/unread", len(self.unread))
        if self.factor and self.choices:
            metrics.sum("experts/balance_loss", self.loss)
        return metrics


def whole_fractions(
    student: LanguageModel, routers: Sequence[Router], micros: Sequence[MicroBatch | None], root: Root, world: World
) -> Fractions | None:
    """f of the whole step: every process reads its micro-batches without gradient. None if there is no micro-batch."""
    pooled: list[tuple[Tensor, float]] = []
    with torch.no_grad():
        for micro in micros:
            recording = root(_read, student, routers, micro)
            if recording is not None:
                check_read(recording)
                found = fractions_of(recording)
                pooled.append((found.choices.cpu(), found.places))
    parts = [part for of_process in world.gather(pooled) for part in of_process]
    if not parts:
        return None
    choices = torch.stack([choices for choices, _ in parts]).sum(0)
    return Fractions(choices=choices.to(student.device), places=sum(places for _, places in parts))


def _read(student: LanguageModel, routers: Sequence[Router], micro: MicroBatch | None) -> Recording | None:
    """The decisions of a micro-batch's forward, without logits. None is read, too, because forwards are collective."""
    if micro is None:
        student.hidden(torch.zeros(1, 1, dtype=torch.long, device=student.device))
        return None
    with recorded(routers, reads_of(student, *micro.sequences)) as recording:
        response_states(student, *micro.sequences)
    return recording


def fractions_of(recording: Recording) -> Fractions:
    """f of the decisions of one forward."""
    first = recording.decisions[0].chosen.device
    choices = torch.stack([one.counts.to(first) for one in recording.decisions]).sum(0)
    return Fractions(choices=choices, places=float(sum(int(one.reads.sum()) for one in recording.decisions)))


def add_choices(choices: dict[str, Tensor], recording: Recording) -> None:
    """Add the choices of a forward, by router, in place."""
    for one in recording.decisions:
        choices[one.router] = one.counts + choices[one.router] if one.router in choices else one.counts


def check_read(recording: Recording) -> None:
    """Raise TrainingError if a router's result cannot be read, and if layers have different numbers of experts."""
    experts = sorted({one.experts for one in recording.decisions})
    if len(experts) == 1 and not recording.unread:
        return
    why = f"layers have {' and '.join(map(str, experts))} experts" if len(experts) > 1 else "their results are unknown"
    raise TrainingError(
        f"The stage sets router_aux_loss, and opd cannot pool the routers of this model: {why} "
        f"({', '.join(sorted(recording.unread)) or 'all routers were read'}). Leave router_aux_loss out."
    )


def load_summary(columns: Columns) -> dict[str, float]:
    """The load of experts, from rows (layer, expert, choices).

    `load_max`: the largest share of a layer's choices that one expert has, times the number of its experts.
    `unused_share`: the share of experts, over all layers, without a choice. `entropy`: the mean over layers of the
    entropy of the choices, divided by log E.
    """
    load_max, unused, entropies, experts = 0.0, 0, list[float](), 0
    for layer in np.unique(columns["layer"]):
        here = columns["layer"] == layer
        choices = np.bincount(columns["expert"][here].astype(int), weights=columns["choices"][here])
        share = choices / choices.sum()
        taken = share[share > 0]
        load_max = max(load_max, float(share.max()) * len(share))
        unused += int((choices == 0).sum())
        experts += len(share)
        entropies.append(float(-(taken * np.log(taken)).sum() / np.log(max(2, len(share)))))
    return {
        "experts/load_max": load_max,
        "experts/unused_share": unused / experts,
        "experts/entropy": float(np.mean(entropies)),
    }
