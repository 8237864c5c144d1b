"""GRPO: reinforcement learning from a reward, each response relative to its group.

Shao et al., "DeepSeekMath", arXiv 2402.03300, eq. 3. Dr.GRPO: Liu et al., arXiv 2503.20783, section 3.2.

    A_i = (r_i - mean r) / std r                       over the group of responses to one prompt
    L   = -(1/G) sum_i (1/|y_i|) sum_t min(rho_t A_i, clip(rho_t, 1 - e, 1 + e') A_i),   rho_t = p(y_t) / mu(y_t)

| paper | here |
|---|---|
| G | `sampling.n` of the recipe |
| pi_old | `sampler` (`sampler_logp`: after temperature and truncation) |
| e, e' | `clip_low`, `clip_high` |
| std + epsilon (TRL 1e-4, verl 1e-6) | `epsilon` |
| dual clip, c (arXiv 1912.09729; 3 in verl) | `dual_clip`: where A < 0, min(rho, c) |
| Dr.GRPO: no std, constant length | `variant="dr_grpo"`, `length` |

Differs from the paper: no KL to a reference model (its coefficient is 0 in DAPO and Dr.GRPO); one update per batch, so
that clipping binds only if truncated sampling makes the ratio differ from 1.
"""

from typing import Literal

from opd.errors import ConfigError
from opd.method import Method
from opd.pieces import credit, normalise, signals, supports, teacher_rules


def grpo(
    variant: Literal["grpo", "dr_grpo"] = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    length: int | None = None,
    temperature: float = 1.0,
    dual_clip: float | None = None,
    epsilon: float = 1e-4,
) -> Method:
    """Reinforcement learning with group-relative advantages; `length` is Dr.GRPO's constant divisor in tokens."""
    if variant == "dr_grpo" and length is None:
        raise ConfigError("dr_grpo divides by a constant number of tokens: set `length`, e.g. max_completion_length.")
    return Method(
        teacher=teacher_rules.no_teacher(),
        support=supports.no_support(),
        credit=credit.group_reward(divide_by_std=variant == "grpo", epsilon=epsilon),
        signal=signals.policy_gradient(signals.credit, clip=(clip_low, clip_high), dual_clip=dual_clip),
        normalise=normalise.per(length if variant == "dr_grpo" and length else "sequence"),
        temperature=temperature,
    )
