"""On-policy distillation with extrapolation: after 1, 2, 4, 8, ... updates the weights jump along their own change.

"Learning to Foresee", arXiv 2605.11739, EffOPD; released code caiyuchen-ustc/EffOPD.

    D_n = W_{2^n} - W_{2^(n-1)},   D_0 = W_1 - W_init
    candidates W_{2^n} + 2k D_n, k = 1..5, in turn, until one does not validate better; the best stays

| paper | here |
|---|---|
| W | the trained weights; with LoRA the factors A and B separately |
| 2k, k = 1..5 | `candidates` |
| val: reward on 50 training prompts | `validate_by="reward"`, `prompts`; `teacher_kl` is minus the exact reverse KL |
| weights of attention and MLP, by name (released code) | `move="released"`, `updates.RELEASED_NAMES` |
| val(candidate) >= val(best) (the formula; prose and code: strictly better) | `ties` |
| OPD | the sampled-token policy gradient, as in method `opd` |

The coefficient is 2k, not 2^k. W_{2^(n-1)} are the weights kept there, after the jump. A higher learning rate leaves
less to save: compare at a tuned learning rate.

The released code moves every parameter whose name has a part such as attn or mlp: biases, q and k norms and
`post_attention_layernorm` jump too, other norms and embeddings do not. `move="matrices"` is ours: matrices alone.

Differs from the paper: an equal candidate is not taken unless `ties` is set, as in its prose and code, unlike its
formula. With LoRA the product BA of extrapolated factors differs from the extrapolated product by a second-order term.
"""

from typing import Literal

from opd.method import Method
from opd.pieces import normalise, signals, updates
from opd.types import Average


def eff_opd(
    candidates: int = 5,
    prompts: int = 50,
    validate_by: Literal["reward", "teacher_kl"] = "reward",
    move: updates.Moved = "all",
    ties: bool = False,
    average: Average = "sequence",
    temperature: float = 1.0,
) -> Method:
    """The sampled log-ratio as the advantage, and jumps of the weights that validation accepts."""
    return Method(
        signal=signals.sampled_reverse_kl(),
        normalise=normalise.per(average),
        update=updates.extrapolation(by=validate_by, prompts=prompts, candidates=candidates, ties=ties, move=move),
        memory={"extrapolation": updates.kept_weights()},
        temperature=temperature,
    )
