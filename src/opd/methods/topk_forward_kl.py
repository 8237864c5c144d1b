"""Forward KL on the teacher's k most likely tokens, with one entry for all others.

verl-project/verl issue 7856, `forward_kl_topk_tail`; the entry for the rest is that of "Tail-Aware Top-k On-Policy
Distillation", arXiv 2608.14728, whose loss is the reverse KL: `topk_reverse_kl` with `by="teacher"` and `form="tail"`.

    tail           L_t = sum_T q log(q/p) + (1 - Q) log((1 - Q) / (1 - P)),        Q = sum_T q, P = sum_T p
    raw            L_t = sum_T q log(q/p)
    stop_gradient  the value of raw; the gradient is that of sum_T q log(q/p) + P
    renormalised   L_t = sum_T q/Q log((q/Q) / (p/P))
    tail           dL/dz_j = p_j - q_j in T,   p_j (Q - P) / (1 - P) elsewhere

| paper | here |
|---|---|
| T, the top-k of the teacher | `support_ids` [N, K] |
| k | `k` |
| P, Q | student's and teacher's mass, logged as support/student_mass and support/teacher_mass |
| forward_kl_topk of verl | `form="raw"`, there clamped at 0 per token |

Direction: towards the teacher; q has no gradient. In `tail` the gradient in T is that of the whole vocabulary, and the
other tokens are moved alike, in proportion to their probability. It is never negative, at most KL(q||p), and 0 exactly
where p = q on T. `raw` has its minimum at p = q/Q on T, nothing outside: the student loses the teacher's tail. It is
negative where P exceeds Q by enough; verl's clamp then takes the gradient away (in 89 % of that issue's steps on some
token). `renormalised` does not control P.

The rest 1 - P is computed from float32 log-probs: below about 1e-6 rounding removes the gradient on it.

Differs from the paper: the direction of the KL, see above. The responses are the student's. k is 20, as in
`topk_reverse_kl`; the mean is over the tokens of the step.
"""

from typing import Literal

from opd.method import Method
from opd.pieces import normalise, signals, supports
from opd.types import Average


def topk_forward_kl(
    k: int = 20,
    form: Literal["tail", "raw", "stop_gradient", "renormalised"] = "tail",
    average: Average = "token",
    temperature: float = 1.0,
) -> Method:
    """A truncated forward KL: k numbers per position instead of V."""
    scored = supports.top_k(k, by="teacher")
    return Method(
        support=supports.for_renormalised(scored, ", or form: tail") if form == "renormalised" else scored,
        signal=signals.divergence("forward_kl", form=form),
        normalise=normalise.per(average),
        temperature=temperature,
    )
