"""CoPD: several models learn from their own rewards, and from each other on the others' data; their mean is kept.

"Co-Evolving Policy Distillation", arXiv 2604.27083, Algorithm 1.

    phase I    S_RL steps:  model k makes GRPO steps on its own data D_k
    phase II   S_OPD steps: model k makes a step of both
               native  GRPO on D_k
               cross   x ~ D_j, y ~ p_k(.|x),  A_t = beta_k sg[log p_j(y_t) - log p_k(y_t)]
    at the end theta = mean_k theta_k

| paper | here |
|---|---|
| pi_k | p, the trained model: `train`, then each of `peers` |
| pi_j | q, another model of the stage as it is before the step (`teacher_rules.peer`) |
| S_RL, S_OPD; 1.5 : 1 in the paper | `alone`, `together`, a cycle that repeats |
| beta_k | `beta`: the factor of the cross term, part `taught` |
| clip .2 / .28 | `clip_low`, `clip_high`, of both terms |
| all j, or a hub | `topology` of the stage |
| merge | the mean of whole weights, which the stage saves |

All models have their gradient before any is updated, so the order of the models changes nothing. A model that is
updated before the others have read it is another teacher: then the second model's logits differ after one step. Each
term is a mean over its own responses, so the number of rows does not weigh it. With LoRA the mean is that of the
products B A, not of the factors.

Differs from the paper: it does not give beta_k (here: 1 for all), the absolute numbers of steps, the loss around A_t of
the cross term (here: the native term's, clipped, a mean per response) or the weights of the merge (here: equal). The
appendix writes distillation as a forward KL; the sampled log-ratio of the algorithm is the reverse KL's.
"""

from opd.method import Method, Part
from opd.pieces import credit, normalise, peers, signals, supports, teacher_rules


def copd(
    beta: float = 1.0,
    alone: int = 6,
    together: int = 4,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    temperature: float = 1.0,
    epsilon: float = 1e-4,
) -> Method:
    """GRPO on a model's own data, and distillation from its peers on theirs; `epsilon` is added to GRPO's deviation."""
    clip = (clip_low, clip_high)
    taught = Method(
        support=supports.sampled(),
        signal=signals.policy_gradient(signals.log_ratio, clip=clip),
        normalise=normalise.per("sequence"),
        temperature=temperature,
    )
    return Method(
        source=peers.own_and_peers(alone, together),
        teacher=teacher_rules.peer(),
        support=supports.no_support(),
        credit=credit.group_reward(epsilon=epsilon),
        signal=signals.policy_gradient(signals.credit, clip=clip),
        normalise=normalise.per("sequence"),
        temperature=temperature,
        parts={peers.TAUGHT: Part(method=taught, factor=beta)},
    )
