"""On-policy distillation with the sampled token: the policy gradient of the reverse KL.

Zhu et al., "The Many Faces of On-Policy Distillation", arXiv 2605.11182, eq. 4-5; also arXiv 2604.13016 eq. 3 and
arXiv 2603.25562 eq. 2 (the token-level estimator) and eq. 3 (with discounted future rewards).

    A_t = sg[log q(y_t | x, y_<t) - log p(y_t | x, y_<t)]
    A_t = sg[sum_{t' >= t} gamma^(t' - t) (log q(y_t') - log p(y_t'))]                  with gamma > 0
    L   = -(1/B) sum_i (1/T_i) sum_t A_t log p(y_t | x, y_<t),        y ~ p

| paper | here |
|---|---|
| pi_T, q | `teacher_logp` |
| pi, p | `student_logp` |
| A_t | `signals.log_ratio`; with gamma > 0 `credit.discounted` |
| gamma (2603.25562 eq. 3) | `gamma`; 0 is the paper's baseline |
| the sum ends at the end of a turn (its released code) | `across_turns=False` |
| sampled token + mask (2603.25562 Table 1) | `mask_tokens`, texts or lists of ids; see `local_support_matching` |
| 1/T_i (2605.11182 eq. 1), 1/sum T_i (2603.25562 eq. 8) | `average`: sequence, token |

The expected gradient over y_t is exactly the gradient of KL(p||q) at the prefix, with the variance of one sample.
Rollouts with top-p < 1 are not drawn from p; `importance=True` multiplies by p(y_t) / mu(y_t), which restores the
gradient on the tokens that truncation kept.

With gamma = 1 and a sum over tokens the expected gradient is that of the KL between whole responses: an early token
gets credit for all later tokens. The variance grows with the length (2603.25562 eq. 1-3). With tools the released code
ends the sum at an untrained token, so that a turn has no credit for later turns; here it goes on by default.

The log-ratio is not clipped, as in slime (THUDM/slime, which adds it to the advantage of any estimator) and in the
released code of 2605.11182, a fork of slime, which sets it to 0 where the teacher's server gives no log-prob. The
released code of 2603.25562 can clip it to +-5 (`clip_log_ratio`, off by default).

Differs from the paper: with gamma = 0, p in A_t is the student during the update, not the log-prob recorded during
sampling; on policy they are equal up to rounding. With gamma > 0 it is the record: the sum needs the whole response.
"""

from typing import Literal

from opd.errors import ConfigError
from opd.method import Method
from opd.pieces import credit, filters, normalise, signals
from opd.types import Average


def opd(
    average: Average = "sequence",
    importance: bool = False,
    gamma: float = 0.0,
    mask_tokens: tuple[str | tuple[int, ...], ...] = (),
    mask: Literal["first", "every"] = "first",
    temperature: float = 1.0,
    across_turns: bool = True,
) -> Method:
    """The log-ratio of each sampled token as its advantage; `gamma` adds the discounted log-ratios of later tokens.

    With `across_turns` these include the tokens of later turns.
    """
    if gamma == 0.0 and not across_turns:
        raise ConfigError(
            "across_turns=False ends the sum of later log-ratios at the end of a turn, but gamma is 0: there is no "
            "sum. Set gamma above 0, or leave across_turns out."
        )
    advantage = signals.log_ratio if gamma == 0.0 else signals.credit
    plain = gamma == 0.0 and not importance
    return Method(
        filter=filters.without_tokens(mask_tokens, mask) if mask_tokens else filters.everything(),
        credit=credit.no_credit() if gamma == 0.0 else credit.discounted(gamma, across_turns=across_turns),
        signal=signals.sampled_reverse_kl() if plain else signals.policy_gradient(advantage, importance=importance),
        normalise=normalise.per(average),
        temperature=temperature,
    )
