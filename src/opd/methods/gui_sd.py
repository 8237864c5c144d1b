"""GUI-SD: a model that clicks learns from itself, shown the answer as a box in the picture.

"GUI-SD", arXiv 2605.00642; released code zhangyan-ucas/GUI-SD-code (e029ab5).

    L = (1/N) sum_t w_pos(t) w_ent(t) KL( p(. | x, y_<t) || sg q(. | c, y_<t) ),      y ~ p(. | x)
    w_pos = min(n - k, cap) for digit k = 0 ... n-1 of a number of n digits, r for another token
    w_ent = 1 - H(q) / log V
    c: x with a green box on the target, pixels times exp(-d^2 / 2 s^2), d the distance to it, and a hint in words

| paper | here |
|---|---|
| pi_T, moving average of the student, .95 | q, `teacher_rules.self_ema`, `decay` |
| c; box, line of 5 pixels; fade | `boxes.boxed`: the data's `box` in pixels; `width`; `fade` |
| hint mode none, hint, gt | `hint`; `box` is ours: the box without words, so student and teacher read equal words |
| w_pos; cap, r = 0.1 | `digits`, `weights.place_values`; `cap` (3 is ours), `other` |
| w_ent | `entropy`, `weights.certain` |
| N, the number of tokens | `normalise.per("token")`; the weights are not divided by their mean |

Because only N divides, the weights change the step size, too: their mean over "(512,7)" is 1.04 by digits. A comparison
needs a control with equal weights of the same mean. With `hint="none"` the teacher reads what the student reads.

Differs from the paper: nothing in the formula. The released code differs from it, and from here: its average moves with
every micro-batch (.95^16 = .44 in a step with its 16), here once per step; its script sets uniform weights of tokens
(`digits=False` here); its temperature of the KL is 1. The paper's text says a red box, the code draws a green one. The
words of `gt` are ours, and the other masks of the code (zoom, crop) are not here.
"""

from opd.method import Method
from opd.pieces import boxes, normalise, signals, supports, teacher_rules, weights
from opd.types import Average


def gui_sd(
    hint: boxes.Hint = "hint",
    width: int = 5,
    fade: bool = True,
    digits: bool = True,
    entropy: bool = True,
    cap: float = 3.0,
    other: float = 0.1,
    decay: float = 0.95,
    average: Average = "token",
    temperature: float = 1.0,
) -> Method:
    """Reverse KL to the self that sees the target marked, weighed by places of digits and the teacher's certainty."""
    by_place = [weights.place_values(cap, other)] if digits else []
    by_entropy = [weights.certain()] if entropy else []
    return Method(
        context=boxes.boxed(hint, width=width, fade=fade),
        teacher=teacher_rules.self_ema(decay),
        support=supports.full(),
        weight=weights.times(*by_place, *by_entropy) if by_place or by_entropy else weights.every_token(),
        signal=signals.divergence("reverse_kl"),
        normalise=normalise.per(average),
        temperature=temperature,
    )
