"""Local support matching: reverse KL on the teacher's top-k tokens, both distributions renormalised on them.

Fu et al., "Revisiting On-Policy Distillation: Empirical Failure Modes and Simple Fixes", arXiv 2603.25562, eq. 6-8
(the method), App. G.3 (variants), section 4 (masking of special tokens).

    bar-p = p/P_S, bar-q = q/Q_S on S = TopK(q, K)
    L = (1 / sum_i |o_i|) sum_i sum_t sum_S bar-p (log bar-p - log bar-q)                                 (eq. 8)

| paper | here |
|---|---|
| K | `k`; 32 in the paper's Table A1 |
| S, teacher's or student's | `by` |
| V1, the method | the defaults |
| V2, V3: the sampled token joins S | `sampled_token="in_support"` with `by="student"`, `by="teacher"` |
| V4, V5: EMA-PG, no renormalisation | `sampled_token="tail"` with `by="student"`, `by="teacher"` |
| r, s (App. G.3) | p/sg[p] and sg[p/mu] in `signals.reverse_kl_with_sampled_tail` |
| s clipped | `ratio_bounds` of s; not clipped by default; `(1, 1)` is the code without `use_kl_iw` |
| special-token mask, off by default | `mask_tokens`; the paper's are "<", "think", "<\\|im_end\\|>" |
| top-p 0.9 of the rollouts, G = 8 | the recipe's `sampling: {top_p: 0.9, n: 8}` |

Masked tokens leave the loss and its denominator, as in the released code; `weights.mask_tokens` would keep them in the
denominator. P_S is not controlled (eq. 6-8 have no gradient outside S): watch support/student_mass. V4 and V5 without
bounds have an unbiased value; their gradient has the extra term grad P_S, which pushes mass out of S.

Differs from the paper: the recipe sets the sampling, so set top-p 0.9 there. The released code averages by response
where eq. 8 averages over tokens (`average="sequence"` follows the code), and makes two updates per batch, here one. It
masks each id of a text of several tokens separately; here only the whole sequence is masked.
"""

from typing import Literal

from opd.errors import ConfigError
from opd.method import Method
from opd.pieces import filters, normalise, signals, supports
from opd.types import Average


def local_support_matching(
    k: int = 32,
    by: Literal["teacher", "student"] = "teacher",
    sampled_token: Literal["left_out", "in_support", "tail"] = "left_out",
    ratio_bounds: tuple[float, float] | None = None,
    mask_tokens: tuple[str | tuple[int, ...], ...] = (),
    mask: Literal["first", "every"] = "first",
    average: Average = "token",
    temperature: float = 1.0,
) -> Method:
    """Match the shape on the teacher's k most likely tokens; `mask_tokens` are texts or ids that are not trained."""
    tail = sampled_token == "tail"
    if ratio_bounds is not None and not tail:
        raise ConfigError(
            f"`ratio_bounds` clip the importance ratio of the sampled token in the tail, but sampled_token is "
            f"{sampled_token!r}, without a ratio; got {list(ratio_bounds)}. Set sampled_token: tail, or leave them out."
        )
    return Method(
        filter=filters.without_tokens(mask_tokens, mask) if mask_tokens else filters.everything(),
        support=supports.for_renormalised(supports.top_k(k, by=by, with_sampled=sampled_token != "left_out")),
        signal=signals.reverse_kl_with_sampled_tail(ratio_bounds) if tail else signals.divergence(form="renormalised"),
        normalise=normalise.per(average),
        temperature=temperature,
    )
