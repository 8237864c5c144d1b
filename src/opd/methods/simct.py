"""Reverse KL to a teacher with another tokenizer, on the smallest pieces of text that both tokenisations share.

"SimCT: Recovering Lost Supervision for Cross-Tokenizer On-Policy Distillation", arXiv 2605.07711, eq. 6-9; released
code sunjie279/SimCT-.

    A        = pieces of text between common token ends; u = (v_1 .. v_k), with a k for each model
    U        = (V_T and V_S) + A
    s_M(u|c) = (1/k) sum_j log p_M(v_j | c, v_<j),   q_M = softmax_U s_M
    L        = (1 / tokens) sum_u KL(q_S || sg q_T)

| paper | here |
|---|---|
| pi_S, pi_T | p `student_*`, q `teacher_*` |
| A | `alignment.retokenise`; a row of `Tokens` is a unit, at the position of its first student token |
| V_T and V_S | `Head.shared`: tokens of equal bytes, special tokens of equal names, tokens that end a response |
| U at a unit | the shared tokens at its first position, and the unit if it is not one of them: `supports.units` |
| q_S, q_T | form `renormalised` |
| SimpleOPD: only shared tokens | `spans=False` |

With one tokenizer every token is a unit and U the vocabulary: the exact reverse KL. Merging units can only lower it. A
unit's weight is the mean of its tokens' weights. A unit with an untrained token is left out.

Differs from the paper: not in the formula. The released code uses raw logits as s_M, which its softmax does not
normalise at each position. It aligns greedily on single decoded tokens, which merges a mismatch with the following text
and loses the last token. It has a column for every span of the response, empty except for the row's own span. It leaves
out rows on which the teacher has less than half of its mass: `least_mass=0.5`.
"""

from opd.method import Method
from opd.pieces import normalise, signals, supports, teacher_rules
from opd.types import Average


def simct(
    spans: bool = True,
    least_mass: float = 0.0,
    average: Average = "token",
    temperature: float = 1.0,
) -> Method:
    """Compare units of both tokenizers; without `spans`, only units that are one token of both vocabularies."""
    return Method(
        teacher=teacher_rules.external(tokenizer="any"),
        support=supports.units("column" if spans else "none", least_mass=least_mass),
        signal=signals.divergence("reverse_kl", form="renormalised"),
        normalise=normalise.per(average),
        temperature=temperature,
    )
