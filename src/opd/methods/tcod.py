"""TCOD: a curriculum of turns. At first only an agent's first turns are trained, later more of them.

"TCOD: Exploring Temporal Curriculum in On-Policy Distillation for Multi-turn Autonomous Agents", arXiv 2604.24005.

    k(s) = min(k_0 + floor(s / eta), k_max)               turns that are trained in step s = 0, 1, ...
    L    = -(1/N) sum_{t in the first k(s) turns} sg[log q(y_t) - log p(y_t)] log p(y_t)

| paper | here |
|---|---|
| k_0, eta, k_max | `first`, `every` (steps per turn), `most`; `filters.turns_up_to` |
| front to back, back to front | `end`: the first k turns, or the last k |
| pi_T, pi_theta | q `teacher_logp`, p `student_logp` |
| N, trained tokens of the step | `average="token"` |

Direction: towards the teacher. Turns that are not trained have no gradient and are not in N. A response of one turn is
trained whole: without an environment this is plain distillation. It combines with other methods, `method: sod+tcod`.

Differs from the paper: there the student acts for k turns alone (front to back), or after a demonstration of the turns
before (back to front). Here it acts to the end, and turns that are not trained cost their generation. Of the paper the
abstract and a summary of the released code were read, and `first`, `every` and `most` are ours.
"""

from typing import Literal

from opd.method import Method
from opd.pieces import filters, normalise, signals
from opd.types import Average


def tcod(
    first: int = 1,
    every: int = 20,
    most: int = 16,
    end: Literal["front", "back"] = "front",
    average: Average = "token",
    temperature: float = 1.0,
) -> Method:
    """The sampled log-ratio on a number of turns that grows by one every `every` steps."""
    return Method(
        signal=signals.sampled_reverse_kl(),
        filter=filters.turns_up_to(first, every, most, end),
        normalise=normalise.per(average),
        temperature=temperature,
    )
