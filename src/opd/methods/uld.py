"""Universal logit distillation: two tokenizers, with distributions compared by rank.

"Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs", arXiv 2402.12030; on-policy and
with merged tokens: GOLD, in TRL (huggingface/trl, experimental/gold).

    L = (1 / tokens) sum_u sum_i |p_(i) - q_(i)|       p_(1) >= p_(2) >= ..., q likewise

| paper | here |
|---|---|
| p, q, in falling order | p `student_*`, q `teacher_*`; the shorter one is padded with zeros |
| a merged group of tokens (GOLD) | a unit: the first position's distribution times the other tokens' probabilities |
| `use_extended_uld` (GOLD) | always: units are cut as in method `simct` |
| `uld_use_hybrid_loss`, `beta` (GOLD) | `matched`: shared tokens by a divergence, the others by rank |

The loss ignores the identity of tokens: the same probabilities on other tokens give the same loss.

Differs from the paper: no cross-entropy on data, and the student writes the responses. Units are counted by student
tokens, where GOLD takes the mean over the units of each response.
"""

from typing import Literal

from opd.method import Method
from opd.pieces import normalise, signals, supports, teacher_rules
from opd.types import Average


def uld(
    matched: Literal["none", "generalised_jsd", "reverse_kl", "forward_kl"] = "none",
    average: Average = "token",
    temperature: float = 1.0,
) -> Method:
    """Sorted probabilities of both models; `matched` compares the tokens of both vocabularies directly."""
    return Method(
        teacher=teacher_rules.external(tokenizer="any"),
        support=supports.units("product"),
        signal=signals.by_rank(None if matched == "none" else matched),
        normalise=normalise.per(average),
        temperature=temperature,
    )
