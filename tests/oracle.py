"""Reference formulas in plain Python float64: lists, loops and `math`, written from the papers.

Nothing here imports torch, numpy or opd, so that a mistake of the library cannot be repeated by the reference.

Notation. p is the student, q the teacher, both over a vocabulary V at one position; z are the student's logits,
p = softmax(z); l(v) = log p(v) - log q(v). S is a support: a list of token ids, or the list of the full-vocabulary
log-probabilities of those tokens. P_S and Q_S are the masses on S, bar-p and bar-q the distributions renormalised
on S, sg[.] a stop-gradient. The teacher is always under sg.

Papers: GKD = arXiv 2306.13649; DistiLLM = arXiv 2402.03898; Many Faces = arXiv 2605.11182; Rethinking = arXiv
2604.13016; Revisiting = arXiv 2603.25562; PPO = arXiv 1707.06347; GRPO = arXiv 2402.03300; Dr. GRPO = arXiv 2503.20783;
Codex = arXiv 2107.03374; AntiSD = arXiv 2605.11609; SimCT = arXiv 2605.07711; ULD = arXiv 2402.12030; GOLD = TRL,
experimental/gold.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Hashable, Sequence

Logps = Sequence[float]
Divergence = Callable[[Logps, Logps], float]
Slope = Callable[[float, float], float]

# ---------------------------------------------------------------------------------------------------------------------
# Probabilities


def logsumexp(values: Sequence[float]) -> float:
    """log sum_v exp(x_v), shifted by the largest; -inf for nothing."""
    top = max(values, default=-math.inf)
    if top == -math.inf:
        return -math.inf
    return top + math.log(math.fsum(math.exp(value - top) for value in values))


def log_softmax(logits: Sequence[float]) -> list[float]:
    """log p(v) = z_v - log sum_u exp(z_u)."""
    total = logsumexp(logits)
    return [logit - total for logit in logits]


def softmax(logits: Sequence[float]) -> list[float]:
    """p(v) = exp(z_v) / sum_u exp(z_u)."""
    return [math.exp(value) for value in log_softmax(logits)]


def mass(logps: Logps) -> float:
    """P_S = sum_{v in S} p(v)."""
    return math.fsum(math.exp(value) for value in logps)


def log_tail(logps: Logps) -> float:
    """log(1 - P_S), the bucket of everything outside S; -inf when S holds all the mass."""
    inside = mass(logps)
    return math.log1p(-inside) if inside < 1.0 else -math.inf


def renormalise(logps: Logps) -> list[float]:
    """log bar-p(v) = log p(v) - log P_S: Many Faces eq. 14-15, Revisiting eq. 6-7."""
    total = logsumexp(logps)
    return [value - total for value in logps]


def _times(probability: float, value: float) -> float:
    """probability * value with 0 * (anything) = 0, the limit of x log x."""
    return 0.0 if probability == 0.0 else probability * value


def _log_mixture(weight: float, first: float, second: float) -> float:
    """log(weight * exp(first) + (1 - weight) * exp(second))."""
    return logsumexp([math.log(weight) + first, math.log1p(-weight) + second])


# ---------------------------------------------------------------------------------------------------------------------
# Divergences: sums over the tokens that are passed. On a support they are the RAW form.


def reverse_kl(student_logp: Logps, teacher_logp: Logps) -> float:
    """KL(p||q) = sum_v p(v) (log p(v) - log q(v)). Many Faces eq. 3; Rethinking eq. 4."""
    return math.fsum(_times(math.exp(s), s - t) for s, t in zip(student_logp, teacher_logp, strict=True))


def forward_kl(student_logp: Logps, teacher_logp: Logps) -> float:
    """KL(q||p) = sum_v q(v) (log q(v) - log p(v)). GKD section 2."""
    return math.fsum(_times(math.exp(t), t - s) for s, t in zip(student_logp, teacher_logp, strict=True))


def generalised_jsd(student_logp: Logps, teacher_logp: Logps, beta: float = 0.5) -> float:
    """beta KL(q||m) + (1-beta) KL(p||m), m = beta q + (1-beta) p. GKD section 2 (P is the teacher there)."""
    terms: list[float] = []
    for s, t in zip(student_logp, teacher_logp, strict=True):
        m = _log_mixture(beta, t, s)
        terms.append(beta * _times(math.exp(t), t - m))
        terms.append((1.0 - beta) * _times(math.exp(s), s - m))
    return math.fsum(terms)


def skew_kl(student_logp: Logps, teacher_logp: Logps, alpha: float = 0.1, direction: str = "forward") -> float:
    """forward: KL(q || alpha q + (1-alpha) p); reverse: KL(p || alpha p + (1-alpha) q). DistiLLM section 3."""
    terms: list[float] = []
    for s, t in zip(student_logp, teacher_logp, strict=True):
        first, second = {"forward": (t, s), "reverse": (s, t)}[direction]
        terms.append(_times(math.exp(first), first - _log_mixture(alpha, first, second)))
    return math.fsum(terms)


# ---------------------------------------------------------------------------------------------------------------------
# Derivative of one token's term f(p, q) with respect to p. A divergence on a list is sum_v f(p(v), q(v)).


def reverse_kl_slope(p: float, q: float) -> float:
    """d/dp [p log(p/q)] = log(p/q) + 1. Many Faces eq. 3 before the +1 drops."""
    return math.log(p / q) + 1.0


def forward_kl_slope(p: float, q: float) -> float:
    """d/dp [q log(q/p)] = -q/p."""
    return -q / p


def generalised_jsd_slope(p: float, q: float, beta: float = 0.5) -> float:
    """d/dp of the term of GKD's JSD: (1-beta) log(p/m); the derivatives of m sum to (1-beta)(1 - m/m) = 0."""
    return (1.0 - beta) * math.log(p / (beta * q + (1.0 - beta) * p))


def skew_kl_slope(p: float, q: float, alpha: float = 0.1, direction: str = "forward") -> float:
    """forward: -(1-alpha) q/m, m = alpha q + (1-alpha) p; reverse: log(p/m) + 1 - alpha p/m, m = alpha p + (1-alpha) q.

    DistiLLM section 3.
    """
    if direction == "forward":
        return -(1.0 - alpha) * q / (alpha * q + (1.0 - alpha) * p)
    m = alpha * p + (1.0 - alpha) * q
    return math.log(p / m) + 1.0 - alpha * p / m


# ---------------------------------------------------------------------------------------------------------------------
# Values on a truncated support: full-vocabulary log-probs of the tokens of S


def reverse_kl_raw(student_logp: Logps, teacher_logp: Logps) -> float:
    """TOPK-RAW: sum_{v in S} p(v) l(v). Many Faces eq. 6. At least -Q_S/e, may be negative."""
    return math.fsum(_times(math.exp(s), s - t) for s, t in zip(student_logp, teacher_logp, strict=True))


def reverse_kl_stop_gradient(student_logp: Logps, teacher_logp: Logps) -> float:
    """SG-TOPK: -sum_{v in S} p(v) [log q(v) - sg(log p(v))]. Many Faces eq. 12; its value is that of TOPK-RAW."""
    return -math.fsum(_times(math.exp(s), t - s) for s, t in zip(student_logp, teacher_logp, strict=True))


def reverse_kl_renormalised(student_logp: Logps, teacher_logp: Logps) -> float:
    """RENORM: sum_{v in S} bar-p(v) (log bar-p(v) - log bar-q(v)). Many Faces eq. 14-16; Revisiting eq. 6-8."""
    student_mass, teacher_mass = logsumexp(student_logp), logsumexp(teacher_logp)
    return math.fsum(
        _times(math.exp(s - student_mass), (s - student_mass) - (t - teacher_mass))
        for s, t in zip(student_logp, teacher_logp, strict=True)
    )


def reverse_kl_tail(student_logp: Logps, teacher_logp: Logps) -> float:
    """TAIL: sum_{v in S} p(v) l(v) + (1-P_S) log((1-P_S)/(1-Q_S)).

    Tail-augmented Top-K of Many Faces section 2: the exact KL of the coarser vocabulary S + {everything else}.
    """
    inside = reverse_kl_raw(student_logp, teacher_logp)
    student_tail, teacher_tail = log_tail(student_logp), log_tail(teacher_logp)
    return inside + _times(math.exp(student_tail), student_tail - teacher_tail)


def raw(divergence: Divergence, student_logp: Logps, teacher_logp: Logps) -> float:
    """sum_{v in S} f(p(v), q(v)): the terms of S only, with full-vocabulary probabilities. Many Faces eq. 6."""
    return divergence(student_logp, teacher_logp)


def stop_gradient(divergence: Divergence, student_logp: Logps, teacher_logp: Logps) -> float:
    """The value of `raw`; the gradient is that of `raw` minus f'(q, q) grad P_S. Many Faces eq. 12-13 is f' = 1."""
    return divergence(student_logp, teacher_logp)


def renormalised(divergence: Divergence, student_logp: Logps, teacher_logp: Logps) -> float:
    """sum_{v in S} f(bar-p(v), bar-q(v)). Many Faces eq. 14-16 and Revisiting eq. 6-8 for any f."""
    return divergence(renormalise(student_logp), renormalise(teacher_logp))


def tail(divergence: Divergence, student_logp: Logps, teacher_logp: Logps) -> float:
    """sum_{v in S} f(p(v), q(v)) + f(1-P_S, 1-Q_S). Many Faces section 2 (tail-augmented Top-K) for any f.

    A bucket without mass on either side adds nothing; it is left out, as log 0 - log 0 has no value.
    """
    student_tail, teacher_tail = log_tail(student_logp), log_tail(teacher_logp)
    if student_tail == -math.inf and teacher_tail == -math.inf:
        return divergence(student_logp, teacher_logp)
    return divergence([*student_logp, student_tail], [*teacher_logp, teacher_tail])


FORMS: dict[str, Callable[[Divergence, Logps, Logps], float]] = {
    "raw": raw,
    "stop_gradient": stop_gradient,
    "renormalised": renormalised,
    "tail": tail,
}


# ---------------------------------------------------------------------------------------------------------------------
# Gradients dL/dz_j in the student's logits. `student` and `teacher` are logits over V, `support` the ids of S.


def _log_ratios(student: Sequence[float], teacher: Sequence[float]) -> list[float]:
    """l(v) = log p(v) - log q(v)."""
    return [s - t for s, t in zip(log_softmax(student), log_softmax(teacher), strict=True)]


def grad_mass(student: Sequence[float], support: Sequence[int]) -> list[float]:
    """dP_S/dz_j = p_j (1{j in S} - P_S)."""
    p = softmax(student)
    inside = math.fsum(p[v] for v in support)
    return [p[j] * ((j in support) - inside) for j in range(len(p))]


def grad_full(student: Sequence[float], teacher: Sequence[float]) -> list[float]:
    """FULL, sum_V p l: p_j (l_j - KL). Many Faces eq. 3."""
    p, ratios = softmax(student), _log_ratios(student, teacher)
    value = math.fsum(p_v * l_v for p_v, l_v in zip(p, ratios, strict=True))
    return [p_j * (l_j - value) for p_j, l_j in zip(p, ratios, strict=True)]


def grad_full_forward_kl(student: Sequence[float], teacher: Sequence[float]) -> list[float]:
    """FULL-FKL, sum_V q (log q - log p): p_j - q_j. GKD section 2, Hinton et al. (arXiv 1503.02531)."""
    return [p_j - q_j for p_j, q_j in zip(softmax(student), softmax(teacher), strict=True)]


def grad_sampled_policy_gradient(student: Sequence[float], teacher: Sequence[float], token: int) -> list[float]:
    """K1-PG of one token y, -sg[log q(y) - log p(y)] log p(y): l(y) (1{j=y} - p_j). Many Faces eq. 4-5."""
    p, ratios = softmax(student), _log_ratios(student, teacher)
    return [ratios[token] * ((j == token) - p[j]) for j in range(len(p))]


def grad_sampled_policy_gradient_mean(student: Sequence[float], teacher: Sequence[float]) -> list[float]:
    """E_{y~p} of the K1-PG gradient, by enumeration of y. Many Faces eq. 4-5; equals FULL's gradient."""
    p = softmax(student)
    each = [grad_sampled_policy_gradient(student, teacher, y) for y in range(len(p))]
    return [math.fsum(p[y] * each[y][j] for y in range(len(p))) for j in range(len(p))]


def grad_sampled_loss_mean(student: Sequence[float]) -> list[float]:
    """E_{y~p} of the gradient of K1-LOSS log p(y) - log q(y), by enumeration of y: sum_y p(y) (1{j=y} - p_j) = 0.

    Rethinking eq. 3 differentiated as it stands, which is a mistake.
    """
    p = softmax(student)
    return [math.fsum(p[y] * ((j == y) - p[j]) for y in range(len(p))) for j in range(len(p))]


def grad_topk_raw(student: Sequence[float], teacher: Sequence[float], support: Sequence[int]) -> list[float]:
    """TOPK-RAW: p_j [(l_j + 1) 1{j in S} - sum_S p (l + 1)]. Many Faces eq. 6-9."""
    p, ratios = softmax(student), _log_ratios(student, teacher)
    inside = math.fsum(p[v] * (ratios[v] + 1.0) for v in support)
    return [p[j] * ((ratios[j] + 1.0 if j in support else 0.0) - inside) for j in range(len(p))]


def grad_topk_stop_gradient(student: Sequence[float], teacher: Sequence[float], support: Sequence[int]) -> list[float]:
    """SG-TOPK: p_j [l_j 1{j in S} - sum_S p l]. Many Faces eq. 12-13."""
    p, ratios = softmax(student), _log_ratios(student, teacher)
    inside = math.fsum(p[v] * ratios[v] for v in support)
    return [p[j] * ((ratios[j] if j in support else 0.0) - inside) for j in range(len(p))]


def grad_renormalised(student: Sequence[float], teacher: Sequence[float], support: Sequence[int]) -> list[float]:
    """RENORM: 1{j in S} bar-p_j (bar-l_j - D), D the value; 0 outside S. Many Faces eq. 14-16; Revisiting eq. 6-8."""
    bar_p = renormalise([log_softmax(student)[v] for v in support])
    bar_q = renormalise([log_softmax(teacher)[v] for v in support])
    value = math.fsum(math.exp(s) * (s - t) for s, t in zip(bar_p, bar_q, strict=True))
    gradient = [0.0] * len(student)
    for v, s, t in zip(support, bar_p, bar_q, strict=True):
        gradient[v] = math.exp(s) * (s - t - value)
    return gradient


def grad_tail(student: Sequence[float], teacher: Sequence[float], support: Sequence[int]) -> list[float]:
    """TAIL: p_j (c_j - sum_V p c), c_j = l_j on S and log((1-P_S)/(1-Q_S)) elsewhere. Many Faces section 2."""
    p, q, ratios = softmax(student), softmax(teacher), _log_ratios(student, teacher)
    outside = math.log(
        math.fsum(p[v] for v in range(len(p)) if v not in support)
        / math.fsum(q[v] for v in range(len(q)) if v not in support)
    )
    coefficients = [ratios[v] if v in support else outside for v in range(len(p))]
    mean = math.fsum(p_v * c_v for p_v, c_v in zip(p, coefficients, strict=True))
    return [p_j * (c_j - mean) for p_j, c_j in zip(p, coefficients, strict=True)]


def support_weights(student_logp: Logps, teacher_logp: Logps, weights: str, normalised: bool) -> list[float]:
    """w(v) of P2-CODE: p, q or 1 on S, divided by their sum over S or not. Rethinking, released code (weight modes)."""
    chosen = {"student": student_logp, "teacher": teacher_logp, "none": [0.0] * len(student_logp)}[weights]
    return [math.exp(value) for value in (renormalise(chosen) if normalised else chosen)]


def weighed_log_ratio(student: Sequence[float], teacher: Sequence[float], ids: Sequence[int], weights: str) -> float:
    """The released teacher-context losses of BRTS (arXiv 2605.09725), dp_actor.py, on the tokens `ids`."""
    s, t = log_softmax(student), log_softmax(teacher)
    masses = [math.exp((t if weights == "teacher" else s)[v]) for v in ids]
    sign = 1.0 if weights == "teacher" else -1.0
    return sum(m / sum(masses) * sign * (t[v] - s[v]) for v, m in zip(ids, masses, strict=True))


def grad_weighed_log_ratio(
    student: Sequence[float], teacher: Sequence[float], ids: Sequence[int], weights: str
) -> list[float]:
    """With the weights fixed: -+ (w_j - p_j), because the weights sum to 1 and d log p_v / dz_j = [v=j] - p_j."""
    s, t = log_softmax(student), log_softmax(teacher)
    masses = {v: math.exp((t if weights == "teacher" else s)[v]) for v in ids}
    total, sign = sum(masses.values()), -1.0 if weights == "teacher" else 1.0
    return [sign * (masses.get(j, 0.0) / total - math.exp(s[j])) for j in range(len(student))]


def support_policy_gradient(
    student_logp: Logps, teacher_logp: Logps, weights: str = "student", normalised: bool = True
) -> float:
    """P2-CODE's value at ratio 1: -sum_S A(v), A = sg[-w(v) l(v)]. Rethinking, released code of eq. 5."""
    w = support_weights(student_logp, teacher_logp, weights, normalised)
    return math.fsum(w_v * (s - t) for w_v, s, t in zip(w, student_logp, teacher_logp, strict=True))


def grad_support_policy_gradient(
    student: Sequence[float],
    teacher: Sequence[float],
    support: Sequence[int],
    weights: str = "student",
    normalised: bool = True,
) -> list[float]:
    """P2-CODE, -sum_S A(v) ratio(v): sum_S w(v) l(v) (1{j=v} - p_j), the sum over v written out.

    Rethinking, released code of eq. 5: A(v) = sg[-w(v) l(v)], ratio = exp(log p - sg log p). With student weights,
    normalised, it equals SG-TOPK / P_S.
    """
    p, ratios = softmax(student), _log_ratios(student, teacher)
    inside, q = [log_softmax(student)[v] for v in support], [log_softmax(teacher)[v] for v in support]
    w = dict(zip(support, support_weights(inside, q, weights, normalised), strict=True))
    return [math.fsum(w[v] * ratios[v] * ((j == v) - p[j]) for v in support) for j in range(len(p))]


def ema_pg(
    student: Sequence[float],
    teacher: Sequence[float],
    support: Sequence[int],
    token: int,
    sampler_logp: float,
    bounds: tuple[float, float] = (0.0, math.inf),
) -> float:
    """EMA-PG of one sampled token y: sum_S p l + s 1[y not in S] r (log p(y) - log q(y)), s = p(y)/mu(y), r = 1.

    Revisiting App. G.3 (V4, V5); s is clipped to `bounds`.
    """
    s, t = log_softmax(student), log_softmax(teacher)
    head = math.fsum(math.exp(s[v]) * (s[v] - t[v]) for v in support)
    if token in support:
        return head
    ratio = min(max(math.exp(s[token] - sampler_logp), bounds[0]), bounds[1])
    return head + ratio * (s[token] - t[token])


def grad_ema_pg(
    student: Sequence[float],
    teacher: Sequence[float],
    support: Sequence[int],
    token: int,
    sampler_logp: float,
    bounds: tuple[float, float] = (0.0, math.inf),
) -> list[float]:
    """dEMA-PG/dz_j: TOPK-RAW's on S, and s l(y) (1{j=y} - p_j) through r = p(y)/sg[p(y)] if y is not in S."""
    head = grad_topk_raw(student, teacher, support)
    if token in support:
        return head
    p, ratios = softmax(student), _log_ratios(student, teacher)
    scale = min(max(p[token] / math.exp(sampler_logp), bounds[0]), bounds[1]) * ratios[token]
    return [head[j] + scale * ((j == token) - p[j]) for j in range(len(p))]


def grad_on_support(
    slope: Slope, form: str, student: Sequence[float], teacher: Sequence[float], support: Sequence[int]
) -> list[float]:
    """dL/dz_j of any divergence sum f(p, q) on S, from f' = `slope` and dp_v/dz_j = p_v (1{v=j} - p_j).

    raw            p_j [f'_j 1{j in S} - sum_S p f']                         Many Faces eq. 6-9
    stop_gradient  the same with f' - f'(q, q), f'(q, q) the slope at p = q   Many Faces eq. 12-13
    renormalised   1{j in S} bar-p_j [f'(bar-p_j) - sum_S bar-p f'(bar-p)]   Many Faces eq. 14-16
    tail           p_j (c_j - sum_V p c), c = f' on S, f'(1-P_S, 1-Q_S) off   Many Faces section 2
    """
    p, q = softmax(student), softmax(teacher)
    everything = range(len(p))
    if form == "renormalised":
        student_mass, teacher_mass = math.fsum(p[v] for v in support), math.fsum(q[v] for v in support)
        bar_p = {v: p[v] / student_mass for v in support}
        slopes = {v: slope(bar_p[v], q[v] / teacher_mass) for v in support}
        mean = math.fsum(bar_p[v] * slopes[v] for v in support)
        return [bar_p[j] * (slopes[j] - mean) if j in support else 0.0 for j in everything]
    if form == "tail":
        outside = [v for v in everything if v not in support]
        bucket = slope(math.fsum(p[v] for v in outside), math.fsum(q[v] for v in outside)) if outside else 0.0
        coefficients = [slope(p[v], q[v]) if v in support else bucket for v in everything]
    else:
        shift = {"raw": 0.0, "stop_gradient": slope(0.5, 0.5)}[form]
        coefficients = [slope(p[v], q[v]) - shift if v in support else 0.0 for v in everything]
    mean = math.fsum(p[v] * coefficients[v] for v in everything)
    return [p[j] * (coefficients[j] - mean) for j in everything]


# ---------------------------------------------------------------------------------------------------------------------
# Policy gradient, credit and metrics


def policy_gradient(
    logp: float,
    old_logp: float,
    advantage: float,
    clip: tuple[float, float] | None = None,
    dual: float | None = None,
) -> tuple[float, float]:
    """(loss, dloss/dlogp) of one token: -min(rho A, clip(rho, 1-low, 1+high) A), rho = exp(logp - old_logp).

    PPO eq. 7; GRPO eq. 3 and its asymmetric clip (low, high). Without `clip`, -rho A. The clipped branch is constant.
    `dual` is dual-clip PPO's c: where A < 0 the gain is at least c A, and constant there.
    """
    ratio = math.exp(logp - old_logp)
    free = ratio * advantage
    if clip is None:
        return -free, -free
    low, high = clip
    held = min(max(ratio, 1.0 - low), 1.0 + high) * advantage
    if dual is not None and advantage < 0 and ratio > dual:
        return -dual * advantage, 0.0
    return (-free, -free) if free <= held else (-held, 0.0)


def extrapolated_advantage(student_logp: float, teacher_logp: float, base_logp: float, strength: float) -> float:
    """lambda log(q/b) - log(p/b) at the sampled token. Extrapolation Cliff; G-OPD."""
    return strength * (teacher_logp - base_logp) - (student_logp - base_logp)


def extrapolation(teacher: Sequence[float], base: Sequence[float], strength: float) -> list[float]:
    """q^lambda b^(1 - lambda) / Z from logits, as a product of probabilities. Extrapolation Cliff."""
    weights = [
        math.pow(q, strength) * math.pow(b, 1.0 - strength)
        for q, b in zip(softmax(teacher), softmax(base), strict=True)
    ]
    return [w / math.fsum(weights) for w in weights]


def largest_strength(p: float, b: float, bound: float) -> float:
    """The lambda at which the tail of q^lambda b^(1 - lambda) is (1 - p)/c, by bisection. Extrapolation Cliff."""
    low, high = 1.0, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        head, tail = middle * math.log(p / b) + math.log(b), middle * math.log((1 - p) / (1 - b)) + math.log(1 - b)
        odds = math.exp(tail - head)
        low, high = (middle, high) if odds / (1 + odds) > (1 - p) / bound else (low, middle)
    return low


def value_baseline(student: Sequence[float], teacher: Sequence[float], support: Sequence[int]) -> float:
    """V = -sum_S bar-p (log bar-p - log bar-q), bar the distributions renormalised on S; S = V: -KL(p||q). vOPD."""
    s, t = (
        renormalise([log_softmax(student)[v] for v in support]),
        renormalise([log_softmax(teacher)[v] for v in support]),
    )
    return -math.fsum(math.exp(a) * (a - b) for a, b in zip(s, t, strict=True))


def optimal_baseline(student: Sequence[float], teacher: Sequence[float]) -> float:
    """b* = E_y[||e_y - p||^2 r(y)] / E_y ||e_y - p||^2, r = log q - log p, every norm written out. vOPD, section 1."""
    p, ratios = softmax(student), _log_ratios(student, teacher)
    norms = [math.fsum(((j == y) - p[j]) ** 2 for j in range(len(p))) for y in range(len(p))]
    return -math.fsum(p[y] * norms[y] * ratios[y] for y in range(len(p))) / math.fsum(
        p[y] * norms[y] for y in range(len(p))
    )


def group_advantage(rewards: Sequence[float], epsilon: float = 1e-4, scale: bool = True, ddof: int = 1) -> list[float]:
    """GRPO: (r_i - mean) / (std + epsilon) in one group; `scale=False` is Dr. GRPO: r_i - mean.

    GRPO section 4.1.2; Dr. GRPO section 3.2. The paper does not say which std: `ddof` 1 divides the squares by G - 1,
    0 by G. A group of one has no spread: its advantage is 0.
    """
    mean = math.fsum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if not scale:
        return centred
    freedom = len(rewards) - ddof
    deviation = math.sqrt(math.fsum(value * value for value in centred) / freedom) if freedom > 0 else 0.0
    return [value / (deviation + epsilon) for value in centred]


def order_gap(right: Sequence[float], wrong: Sequence[float], statistic: str) -> float:
    """mean_{S+} G - mean_{S-} G, or the smallest of all differences G+ - G-. Uni-OPD, scripts and eq. 9-11."""
    if statistic == "mean":
        return math.fsum(right) / len(right) - math.fsum(wrong) / len(wrong)
    return min(a - b for a in right for b in wrong)


def order_shifts(
    scores: Sequence[float], right: Sequence[bool], delta: float, statistic: str = "mean", side: str = "both"
) -> list[float]:
    """What is added to every token of each response of one group. Uni-OPD."""
    ups = [g for g, passed in zip(scores, right, strict=True) if passed]
    downs = [g for g, passed in zip(scores, right, strict=True) if not passed]
    if not ups or not downs:
        return [0.0] * len(scores)
    lacking = max(0.0, delta - order_gap(ups, downs, statistic))
    up = {"both": lacking / 2, "correct_up": lacking, "incorrect_down": 0.0}[side]
    return [up if passed else up - lacking for passed in right]


def order_left_out(
    scores: Sequence[float], right: Sequence[bool], delta: float, keep: float, statistic: str = "mean"
) -> list[bool]:
    """The responses of one group that the greedy mask leaves out: every single removal is tried. Uni-OPD, code."""
    out = [False] * len(scores)
    if all(right) or not any(right):
        return out

    def gap_without(removed: Sequence[bool]) -> float:
        left = [i for i in range(len(scores)) if not removed[i]]
        return order_gap([scores[i] for i in left if right[i]], [scores[i] for i in left if not right[i]], statistic)

    while gap_without(out) < delta:
        tries: list[tuple[float, bool, int]] = []
        for i in range(len(scores)):
            of_class = [j for j in range(len(scores)) if right[j] == right[i]]
            staying = sum(not out[j] for j in of_class)
            if not out[i] and staying > max(1, math.floor(keep * len(of_class))):
                tries.append((gap_without([*out[:i], True, *out[i + 1 :]]), right[i], -i))
        if not tries or max(tries)[0] <= gap_without(out):
            return out
        out[-max(tries)[2]] = True
    return out


def sized_advantage(
    student: Sequence[float],
    teacher: Sequence[float],
    k: int,
    token: int,
    advantage: float,
    share: float,
    bound: float = 0.2,
) -> float:
    """A ((1 - l) + l m): VISD's code. The support is the teacher's k most likely tokens and the sampled one."""
    ids = {*sorted(range(len(teacher)), key=lambda v: -teacher[v])[:k], token}
    p, q = (math.exp(z[token]) / math.fsum(math.exp(z[v]) for v in ids) for z in (student, teacher))
    sign = (advantage > 0) - (advantage < 0)
    size = min(max((q / p) ** sign, 1 - bound), 1 + bound)
    return advantage * ((1 - share) + share * size)


def anti_advantage(log_ratio: float, reward_advantage: float, strength: float, shape: str = "jsd") -> float:
    """A^seq - lambda phi(u), u = log q(y) - log p(y), phi(u) = (log(1 + e^u) - log 2) / 2, or u. AntiSD eq. 2 and 6."""
    phi = {"jsd": 0.5 * (logsumexp([0.0, log_ratio]) - math.log(2.0)), "reverse_kl": log_ratio}[shape]
    return reward_advantage - strength * phi


def grad_jsd(student: Sequence[float], teacher: Sequence[float]) -> list[float]:
    """dJSD(p||q)/dz_j = p_j (f_j - sum_V p f), f = log(p/m) / 2 and m = (p + q) / 2: AntiSD Lemma 4."""
    p, q = softmax(student), softmax(teacher)
    slopes = [0.5 * math.log(2.0 * a / (a + b)) for a, b in zip(p, q, strict=True)]
    mean = math.fsum(a * f for a, f in zip(p, slopes, strict=True))
    return [a * (f - mean) for a, f in zip(p, slopes, strict=True)]


def entropy_gate(medians: Sequence[float], most: float = 0.5, share: float = 0.93, warm_up: int = 5) -> list[float]:
    """lambda by step: 0 in the warm-up, then g lambda_max. AntiSD eq. 7; H_warm as the mean of the warm-up is ours."""
    warm = math.fsum(medians[:warm_up]) / len(medians[:warm_up])
    strengths, state = [0.0] * len(medians[:warm_up]), 1
    for median in medians[warm_up:]:
        if state == 0 and median >= warm:
            state = 1
        elif state == 1 and median < share * warm:
            state = 0
        strengths.append(state * most)
    return strengths


def perplexity_gate(
    steps: Sequence[tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]]],
    warm_up: int = 5,
    share: float = 0.93,
    again: float = 1.07,
    most: float = 0.5,
) -> list[list[float]]:
    """lambda by step and response. A step is (log q, log p) by response and token. AntiSD, released code.

    The state of a step is decided from the mean perplexity of the step before it, without spikes, after the warm-up.
    """
    warm: list[float] = []
    target, on, previous = 0.0, True, None
    out: list[list[float]] = []
    for number, (teacher, _) in enumerate(steps):
        perplexities = [math.exp(-math.fsum(row) / len(row)) for row in teacher]
        mean = math.fsum(perplexities) / len(perplexities)
        if number < warm_up:
            warm += [mean] if mean < 3.0 else []
            out.append([0.0] * len(perplexities))
            continue
        if target == 0.0:
            target = max(share * (sorted(warm)[len(warm) // 2] if warm else mean), 1.01)
        if previous is not None and on and previous < target:
            on = False
        elif previous is not None and not on and previous > target / share * again:
            on = True
        kept = [x for x in perplexities if x <= 3.0]
        previous = math.fsum(kept) / len(kept) if kept else None
        wanted = [min(max(0.2 * math.log(min(max(x / target, 0.5), 3.0)), 0.0), most) for x in perplexities]
        out.append([value if on and x <= 3.0 else 0.0 for value, x in zip(wanted, perplexities, strict=True)])
    return out


def reference_deviation(steps: Sequence[tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]]]) -> float:
    """sigma: the mean over steps of the deviation (n - 1) of all log-ratios of a step. AntiSD, released code."""
    deviations: list[float] = []
    for teacher, student in steps:
        u = [t - s for row in zip(teacher, student, strict=True) for t, s in zip(*row, strict=True)]
        mean = math.fsum(u) / len(u)
        deviations.append(math.sqrt(math.fsum((x - mean) ** 2 for x in u) / (len(u) - 1)) if len(u) > 1 else 0.0)
    return max(math.fsum(deviations) / len(deviations), 1e-6)


def released_anti_term(u: Sequence[float], sigma: float, shape: str = "jsd") -> list[float]:
    """-phi standardised over one response, with outlying and large u moderated. AntiSD, released code."""
    moderate = [0.0 if abs(x) > 2.0 * sigma else min(max(x, -5.0), 5.0) for x in u]
    raw = [anti_advantage(x, 0.0, 1.0, shape) for x in moderate]
    mean = math.fsum(raw) / len(raw)
    deviation = max(math.sqrt(math.fsum((x - mean) ** 2 for x in raw) / len(raw)), 1e-6)
    return [min(max((x - mean) / deviation, -5.0), 5.0) for x in raw]


def lower_median(values: Sequence[float]) -> float:
    """The value in the middle; of an even number the lower of the two."""
    return sorted(values)[(len(values) - 1) // 2]


def next_right(samples: Sequence[int], rewards: Sequence[float], of: int) -> int | None:
    """The place of the solution that the response at place `of` gets in its group: walk up the samples, round the end.

    AntiSD section 4 (a right response of the group); which one is ours.
    """
    highest = max(samples)
    for distance in range(1, highest + 1):
        wanted = (samples[of] + distance) % (highest + 1)
        if wanted == samples[of]:
            continue
        places = [place for place, sample in enumerate(samples) if sample == wanted]
        if places and rewards[places[0]] >= 1.0:
            return places[0]
    return None


def discounted_by_turn(rewards: Sequence[float], trained: Sequence[bool], gamma: float) -> list[float]:
    """`discounted` of each run of trained tokens alone, 0 on the others: the released code of Revisiting."""
    out: list[float] = []
    for mine, run in itertools.groupby(range(len(rewards)), key=lambda t: trained[t]):
        places = list(run)
        out += discounted([rewards[t] for t in places], gamma) if mine else [0.0] * len(places)
    return out


def early(ratios: Sequence[float], gamma: float, epsilon: float = 1e-8) -> list[float]:
    """w_t a_t with w_t = 1 + gamma (1 - sum_{j < t} |a_j| / sum_j |a_j|). IW-OPD, Algorithm 1."""
    total = max(math.fsum(abs(a) for a in ratios), epsilon)
    return [(1 + gamma * (1 - math.fsum(abs(b) for b in ratios[:t]) / total)) * a for t, a in enumerate(ratios)]


def turn_weights(apart: Sequence[float], epsilon: float, bound: float, reference: float | None = None) -> list[float]:
    """SOD: w_1 = 1, w_k = min(prod_{u < k} (d_u + epsilon) / (d_{u+1} + epsilon), 1 + bound), in the paper's form.

    `reference` replaces d_1 in the weights after the first.
    """
    d = [apart[0] if reference is None else reference, *apart[1:]]
    product, out = 1.0, [1.0]
    for u in range(len(d) - 1):
        product *= (d[u] + epsilon) / (d[u + 1] + epsilon)
        out.append(min(product, 1.0 + bound))
    return out


def proximal(groups: Sequence[Sequence[Sequence[float]]], alpha: float) -> list[list[list[float]]]:
    """TOP-D, eq. 8: from log q - log p by group, response and token, the z-scores of r_t + the mean of later r."""
    out: list[list[list[float]]] = []
    for group in groups:
        returns: list[list[float]] = []
        for ratios in group:
            r = [math.log(alpha * math.exp(u) + 1 - alpha) for u in ratios]
            returns.append(
                [a + (math.fsum(r[t + 1 :]) / len(r[t + 1 :]) if r[t + 1 :] else 0.0) for t, a in enumerate(r)]
            )
        flat = [value for row in returns for value in row]
        mean = math.fsum(flat) / len(flat)
        spread = math.sqrt(math.fsum((value - mean) ** 2 for value in flat) / (len(flat) - 1)) if len(flat) > 1 else 0.0
        out.append([[(value - mean) / spread if spread > 0 else 0.0 for value in row] for row in returns])
    return out


def within_bounds(logp: float, old_logp: float, advantage: float, least: float, most: float) -> tuple[float, float]:
    """MOPD, eq. 7-8: (loss, dloss/dlogp) of -w A log p, w = p/mu within the bounds and 0 outside, constant."""
    ratio = math.exp(logp - old_logp)
    weight = ratio if least <= ratio <= most else 0.0
    return -weight * advantage * logp, -weight * advantage


def grad_forward_kl_tail(student: Sequence[float], teacher: Sequence[float], support: Sequence[int]) -> list[float]:
    """sum_T q log(q/p) + (1-Q) log((1-Q)/(1-P)): p_j - q_j in T, p_j (Q - P) / (1 - P) elsewhere. verl issue 7856."""
    p, q = softmax(student), softmax(teacher)
    rest_p = math.fsum(p[v] for v in range(len(p)) if v not in support)
    rest_q = math.fsum(q[v] for v in range(len(q)) if v not in support)
    return [p[j] - q[j] if j in support else p[j] * (rest_p - rest_q) / rest_p for j in range(len(p))]


def clipped(divergence: Divergence, most: float) -> Divergence:
    """OPSD's code: each token adds at most `most`."""
    return lambda student, teacher: math.fsum(
        min(divergence([s], [t]), most) for s, t in zip(student, teacher, strict=True)
    )


def clipped_slope(divergence: Divergence, slope: Slope, most: float) -> Slope:
    """Its slope: none for a token at the bound."""
    return lambda p, q: slope(p, q) if divergence([math.log(p)], [math.log(q)]) <= most else 0.0


def discounted(rewards: Sequence[float], gamma: float) -> list[float]:
    """sum_{t' >= t} gamma^(t' - t) r_t', the sum written out for every t. Revisiting eq. 3."""
    n = len(rewards)
    return [math.fsum(gamma ** (later - t) * rewards[later] for later in range(t, n)) for t in range(n)]


def pass_at_k(correct: Sequence[bool], k: int) -> float:
    """E over the C(n, k) subsets of k of the n samples of [any is correct], every subset visited. Codex eq. 1."""
    subsets = list(itertools.combinations(correct, k))
    return math.fsum(any(subset) for subset in subsets) / len(subsets)


def repeat_ratio(tokens: Sequence[Hashable], n: int = 3) -> float:
    """Share of tokens whose n-gram (the n tokens that end there) already occurred in the response.

    Many Faces, released diagnostics (n = 3, Fig. 4). Tokens without a full n-gram count as not repeated; 0 when empty.
    """
    repeated = 0
    for end in range(n, len(tokens) + 1):
        gram = tuple(tokens[end - n : end])
        earlier = [tuple(tokens[other - n : other]) for other in range(n, end)]
        repeated += gram in earlier
    return repeated / len(tokens) if tokens else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Diagnostics


def top(logps: Logps, k: int) -> list[int]:
    """The k most likely tokens, the first first."""
    return sorted(range(len(logps)), key=lambda v: -logps[v])[:k]


def overlap_ratio(student: Logps, teacher: Logps, k: int) -> float:
    """|TopK(p) and TopK(q)| / k. Rethinking eq. 6."""
    return len(set(top(student, k)) & set(top(teacher, k))) / k


def overlap_advantage(student: Logps, teacher: Logps, k: int) -> float | None:
    """(1/|S|) sum_S bar-p (log bar-q - log bar-p), S in both top k. Rethinking eq. 7; None for no S."""
    both = sorted(set(top(student, k)) & set(top(teacher, k)))
    if not both:
        return None
    p, q = renormalise([student[v] for v in both]), renormalise([teacher[v] for v in both])
    return math.fsum(math.exp(s) * (t - s) for s, t in zip(p, q, strict=True)) / len(both)


def entropy(logps: Logps) -> float:
    """-sum_v p(v) log p(v)."""
    return -math.fsum(_times(math.exp(value), value) for value in logps)


def auroc(scores: Sequence[float], right: Sequence[bool]) -> float:
    """The share of (right, wrong) pairs whose right one scores higher, a tie being half a pair."""
    pairs = [
        (a, b) for a, r in zip(scores, right, strict=True) if r for b, s in zip(scores, right, strict=True) if not s
    ]
    return math.fsum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


def effective_share(weights: Sequence[float]) -> float:
    """(sum w)^2 / sum w^2 / n. Many Faces, released off-policy report."""
    return math.fsum(weights) ** 2 / math.fsum(w * w for w in weights) / len(weights)


def top_share(values: Sequence[float], share: float) -> float:
    """The part of the sum of positives that the largest `share` of all values hold. Revisiting, first failure."""
    chosen = sorted(values, reverse=True)[: math.ceil(share * len(values))]
    return math.fsum(v for v in chosen if v > 0) / math.fsum(v for v in values if v > 0)


def effective_prompts(shares: Sequence[float]) -> float:
    """n over the ratio of the variance of the shares to that of right-or-wrong samples of the same mean.

    With half a prompt that is always right and half a prompt that is always wrong.
    """
    weighted = [(1.0, share) for share in shares] + [(0.5, 0.0), (0.5, 1.0)]
    total = math.fsum(weight for weight, _ in weighted)
    mean = math.fsum(weight * share for weight, share in weighted) / total
    variance = math.fsum(weight * (share - mean) ** 2 for weight, share in weighted) / total
    return len(shares) * mean * (1 - mean) / variance


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the two neighbours in order: the place is share (n - 1)."""
    ordered, place = sorted(values), share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def expected_reverse_kl(student: Logps, teachers: Sequence[Logps]) -> float:
    """E_I KL(p || p_I) over teachers alike. Many Faces eq. 10."""
    return math.fsum(reverse_kl(student, teacher) for teacher in teachers) / len(teachers)


# ---------------------------------------------------------------------------------------------------------------------
# Several teachers of one row: MAD-OPD = arXiv 2605.01347


def mixed_loss(
    divergence: Divergence, student: Sequence[float], teachers: Sequence[Sequence[float]], weights: Sequence[float]
) -> float:
    """sum_k w_k D(q_k, p) from logits. MAD-OPD eq. 10; in K passes."""
    p = log_softmax(student)
    return math.fsum(w * divergence(p, log_softmax(teacher)) for w, teacher in zip(weights, teachers, strict=True))


def grad_mixed_loss(
    slope: Slope, student: Sequence[float], teachers: Sequence[Sequence[float]], weights: Sequence[float]
) -> list[float]:
    """d/dz_j of `mixed_loss`: the weighted sum of the K gradients."""
    every = list(range(len(student)))
    parts = [grad_on_support(slope, "raw", student, teacher, every) for teacher in teachers]
    return [math.fsum(w * part[j] for w, part in zip(weights, parts, strict=True)) for j in every]


def geometric_mean(teachers: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """log g with g = prod_k q_k^w_k / Z."""
    logps = [log_softmax(teacher) for teacher in teachers]
    return log_softmax([math.fsum(w * q[v] for w, q in zip(weights, logps, strict=True)) for v in range(len(logps[0]))])


def arithmetic_mean(teachers: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """log m with m = sum_k w_k q_k."""
    qs = [softmax(teacher) for teacher in teachers]
    return [math.log(math.fsum(w * q[v] for w, q in zip(weights, qs, strict=True))) for v in range(len(qs[0]))]


def confidence_weights(confidences: Sequence[float | None], tau: float, missing: str) -> list[float]:
    """w_k = softmax_k(c_k / 100 / tau); without some c_k: "uniform" gives all 1 / K, "zero" gives those teachers 0."""
    if missing == "uniform" and any(c is None for c in confidences):
        return [1 / len(confidences)] * len(confidences)
    powers = [0.0 if c is None else math.exp(c / 100 / tau) for c in confidences]
    total = math.fsum(powers)
    return [power / total if total else 0.0 for power in powers]


# ---------------------------------------------------------------------------------------------------------------------
# Rubrics: ROPD


def rubric_reward(points: Sequence[float], met: Sequence[int], epsilon: float = 1e-8) -> float:
    """R_i = sum_k w_k v_ik / (sum_k w_k + epsilon). ROPD = arXiv 2605.07396."""
    gained = math.fsum(w * v for w, v in zip(points, met, strict=True))
    return gained / (math.fsum(points) + epsilon)


def hash_order(uid: str, answers: Sequence[tuple[str, int, str]]) -> list[int]:
    """Answers (source, index, text) sorted by sha256 over uid, source, index and text, as in ROPD's released code."""
    digests = [
        (hashlib.sha256(json.dumps([uid, source, index, text]).encode()).digest(), i)
        for i, (source, index, text) in enumerate(answers)
    ]
    return [i for _, i in sorted(digests)]


# ---------------------------------------------------------------------------------------------------------------------
# Drift: Prune-OPD = arXiv 2605.07804


def top_p_accepts(teacher: Logps, token: int, k: int, p: float) -> bool:
    """Whether a token is among the teacher's most likely ones that first have the mass p, or its k if they never do.

    The released code of Prune-OPD.
    """
    total = 0.0
    inside: list[int] = []
    for v in top(teacher, k):
        if total >= p:
            break
        total += math.exp(teacher[v])
        inside.append(v)
    return token in inside


def trust(lost: Sequence[bool], drop: float) -> list[float]:
    """W_t = clip(1 - drop #{j <= t : lost_j}, 0, 1)."""
    out: list[float] = []
    count = 0
    for one in lost:
        count += one
        out.append(min(1.0, max(0.0, 1.0 - drop * count)))
    return out


def budgets(
    start: int,
    steps: Sequence[Sequence[int]],
    least: int,
    most: int,
    step: int,
    margin: int,
    share: float,
    patience: int,
) -> list[int]:
    """The budget after each step, of which the effective lengths are given."""
    budget, missed = start, 0
    out: list[int] = []
    for lengths in steps:
        goal = max(least, budget - margin)
        hits = [length for length in lengths if length >= goal]
        if len(hits) / len(lengths) >= share:
            budget, missed = min(budget + step, most), 0
        else:
            missed += 1
            if missed >= patience:
                budget, missed = max(budget - step, least), 0
        out.append(budget)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Two tokenizers. A position of a model is its logits there; `shared` are pairs (student id, teacher id) of one token.


def aligned_units(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[tuple[list[int], list[int]]]:
    """(student tokens, teacher tokens) between neighbouring places where both have read the same text. SimCT."""
    cuts = [
        (i, j)
        for i in range(len(student) + 1)
        for j in range(len(teacher) + 1)
        if b"".join(student[:i]) == b"".join(teacher[:j])
    ]
    return [(list(range(a, c)), list(range(b, d))) for (a, b), (c, d) in itertools.pairwise(cuts)]


def unit_scores(
    positions: Sequence[Sequence[float]], ids: Sequence[int], common: Sequence[int], span: bool
) -> list[float]:
    """s(u) of the common tokens at the first position, and of the unit itself: the mean log-prob. SimCT eq. 6-9."""
    first = log_softmax(positions[0])
    scores = [first[v] for v in common]
    if span:
        scores.append(math.fsum(log_softmax(z)[v] for z, v in zip(positions, ids, strict=True)) / len(ids))
    return scores


def unit_kl(
    student: Sequence[Sequence[float]],
    student_ids: Sequence[int],
    teacher: Sequence[Sequence[float]],
    teacher_ids: Sequence[int],
    shared: Sequence[tuple[int, int]],
) -> float:
    """KL(q_S || q_T), both a softmax of the scores over U. SimCT eq. 6-9."""
    span = not (len(student_ids) == len(teacher_ids) == 1 and (student_ids[0], teacher_ids[0]) in shared)
    p = log_softmax(unit_scores(student, student_ids, [s for s, _ in shared], span))
    q = log_softmax(unit_scores(teacher, teacher_ids, [t for _, t in shared], span))
    return reverse_kl(p, q)


def merged(positions: Sequence[Sequence[float]], ids: Sequence[int]) -> list[float]:
    """The first position's distribution times the probabilities of the tokens behind it. GOLD."""
    rest = math.prod(softmax(z)[v] for z, v in zip(positions[1:], ids[1:], strict=True))
    return [p * rest for p in softmax(positions[0])]


def rank_distance(p: Sequence[float], q: Sequence[float]) -> float:
    """sum_i |p_(i) - q_(i)|, both in falling order, the shorter filled up with zeros. ULD."""
    ordered = itertools.zip_longest(sorted(p, reverse=True), sorted(q, reverse=True), fillvalue=0.0)
    return math.fsum(abs(a - b) for a, b in ordered)


def grad_rank_distance(student: Sequence[float], teacher: Sequence[float]) -> list[float]:
    """d/dz_j of it: p_j (s_j - sum_v p_v s_v), s_v the sign of p_v less the teacher's probability of the same rank."""
    p, q = softmax(student), sorted(softmax(teacher), reverse=True)
    sign = [0.0] * len(p)
    for rank, v in enumerate(sorted(range(len(p)), key=lambda v: -p[v])):
        gap = p[v] - (q[rank] if rank < len(q) else 0.0)
        sign[v] = math.copysign(1.0, gap) if gap else 0.0
    mean = math.fsum(a * s for a, s in zip(p, sign, strict=True))
    return [a * (s - mean) for a, s in zip(p, sign, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# A tree of responses: Unmasking OPD = arXiv 2605.10889. `logits[node]` of a node, the tuple of the tokens before it.

Tree = dict[tuple[int, ...], list[float]]


def success(tree: Tree, rewards: dict[tuple[int, ...], float], node: tuple[int, ...] = ()) -> float:
    """The mean reward of responses that pass the node: sum_j P_j Q_j; of a whole response its reward."""
    if node in rewards:
        return rewards[node]
    return math.fsum(p * success(tree, rewards, (*node, j)) for j, p in enumerate(softmax(tree[node])))


def reach(tree: Tree, node: tuple[int, ...]) -> float:
    """The probability that a response passes the node."""
    return math.prod(softmax(tree[node[:t]])[j] for t, j in enumerate(node))


def node_gradient(probs: Sequence[float], values: Sequence[float]) -> list[float]:
    """P_j (f_j - sum_k P_k f_k)."""
    mean = math.fsum(p * f for p, f in zip(probs, values, strict=True))
    return [p * (f - mean) for p, f in zip(probs, values, strict=True)]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
