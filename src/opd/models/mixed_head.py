"""The output layers of several teachers as one, for teachers that score the same row with weights of their own.

With weights w_k of a row that sum to 1, logits z_k = m_k W_k h_k and a temperature T, their normalised geometric mean

    g = softmax( sum_k w_k z_k / T ) = softmax( [m_1 W_1 ... m_K W_K] [w_1 h_1; ...; w_K h_K] / T )

is one output layer of width sum_k H_k: the weights move into the hidden states, and the log-normalisers of the q_k
cancel in that of g. The layers are not joined in memory: their products are added in one buffer. This form is exact
with any temperature, with multipliers, and with vocabularies cut to the same tokens. A bias or a soft cap would not get
the weight of its row, so the logits of a layer that has one are made in a second buffer and weighed there: exact, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from opd.models.head import UNWRITTEN, Head, log_normaliser
from opd.models.products import prefers_onednn
from opd.types import Mixture


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedHead:
    """A `TeacherHead` of K output layers. `hidden` is what `join` makes: the K states side by side, then K weights.

    For `each`, the logits are those of the arithmetic mean; the loss compares with the layers in turn (`passes`).
    """

    heads: tuple[Head, ...]
    mixture: Mixture

    @property
    def vocabulary(self) -> int:
        """V, the same for all."""
        return self.heads[0].vocabulary

    @property
    def folded(self) -> tuple[bool, ...]:
        """Whether the weights of each layer are in its hidden states."""
        linear = (head.bias is None and head.softcap is None for head in self.heads)
        return tuple(self.mixture == "geometric" and one for one in linear)

    def join(self, states: Sequence[Tensor], weights: Tensor) -> Tensor:
        """K states [N, H_k] and weights [N, K] that sum to 1 -> [N, sum H_k + K].

        The dtype is that of the states, or float32 if a weight stays beside them: bfloat16 would round it.
        """
        kept = states[0].dtype if all(self.folded) else torch.float32
        dtype = reduce(torch.promote_types, (state.dtype for state in states), kept)
        columns = [
            state.to(dtype) * (weights[:, k : k + 1].to(dtype) * head.multiplier) if fold else state.to(dtype)
            for k, (state, head, fold) in enumerate(zip(states, self.heads, self.folded, strict=True))
        ]
        return torch.cat([*columns, weights.to(dtype)], 1)

    def parts(self, hidden: Tensor) -> tuple[list[Tensor], Tensor]:
        """What `join` joined: the states by layer, folded ones with their weights in them, and the weights [N, K]."""
        widths = [head.weight.shape[1] for head in self.heads]
        *states, weights = hidden.split([*widths, len(widths)], -1)
        return states, weights

    def passes(self, hidden: Tensor) -> Iterator[tuple[Head, Tensor, Tensor]]:
        """The layers, each with its states [N, H_k] and its weight [N]; of an `each` mixture."""
        assert self.mixture == "each"
        states, weights = self.parts(hidden)
        for k, head in enumerate(self.heads):
            yield head, states[k], weights[:, k]

    def logits_at(self, hidden: Tensor, temperature: float) -> Tensor:
        """[N, sum H_k + K] -> [N, V] in float32, divided by the temperature."""
        out = torch.empty(len(hidden), self.vocabulary, device=hidden.device)
        logits = self.project_into(out, hidden, temperature)
        self.finish_(logits, temperature)
        return logits

    def project_into(self, out: Tensor, hidden: Tensor, temperature: float) -> Tensor:
        """The logits of [n, sum H_k + K] into the first n rows of `out` [>= n, V]; returns these rows.

        A geometric mean is divided by the temperature in `finish_`; probabilities are mixed at the temperature.
        """
        states, weights = self.parts(hidden)
        if self.mixture == "geometric":
            return self._geometric(out[: len(hidden)], states, weights)
        return self._arithmetic(out[: len(hidden)], states, weights, temperature)

    def finish_(self, logits: Tensor, temperature: float) -> None:
        """Divide the logits of a geometric mean by the temperature, in place."""
        if self.mixture == "geometric" and temperature != 1.0:
            logits.div_(temperature)
        if (unwritten := self.heads[0].unwritten) is not None:  # the same tokens for all
            logits.index_fill_(-1, unwritten, UNWRITTEN)

    def _geometric(self, rows: Tensor, states: Sequence[Tensor], weights: Tensor) -> Tensor:
        """sum_k w_k z_k."""
        layers = sorted(
            zip(self.heads, states, self.folded, range(len(states)), strict=True), key=lambda one: not one[2]
        )
        for number, (head, state, fold, k) in enumerate(layers):
            if not fold:
                own = head.logits(state).mul_(weights[:, k : k + 1])
                rows = rows.copy_(own) if number == 0 else rows.add_(own)
            elif number == 0:
                head.project_into(rows, state)
            elif head.weight.dtype == rows.dtype == torch.float32 and not prefers_onednn():
                rows.addmm_(state.float(), head.weight[: head.vocabulary].t())
            else:
                rows.add_(head.into(rows, state))
        return rows

    def _arithmetic(self, rows: Tensor, states: Sequence[Tensor], weights: Tensor, temperature: float) -> Tensor:
        """log sum_k w_k softmax(z_k / T), which is normalised."""
        more = torch.empty_like(rows)
        for k, (head, state) in enumerate(zip(self.heads, states, strict=True)):
            own = head.project_into(rows if k == 0 else more, state)
            head.finish_(own, temperature)
            own.sub_(log_normaliser(own)).add_(weights[:, k : k + 1].to(own.dtype).log())
            if k > 0:
                torch.logaddexp(rows, own, out=rows)
        return rows
