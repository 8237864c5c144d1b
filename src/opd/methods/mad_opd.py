"""MAD-OPD: several teachers debate each prompt, and all of them score the student's response, weighed by confidence.

Multi-agent debate OPD, arXiv 2605.01347, eq. 5-10.

    H    the transcript of R rounds: K teachers answer alone, then read all earlier turns and answer again
    w_k  = softmax_k( c_k / 100 / tau ),        c_k in 0..100, stated by k in the last round
    L    = (1/B) sum_i sum_k w_k (1/T_i) sum_t D( q_k(. | x, H, y_<t) , p(. | x, y_<t) ),        y ~ p(. | x)
    D    = beta KL(q_k||m) + (1 - beta) KL(p||m),  m = beta q_k + (1 - beta) p;  beta = 1: KL(p||q_k);  0: KL(q_k||p)

At beta = 1 the K passes are one: sum_k w_k KL(p||q_k) = KL(p||g) - log Z, g = prod_k q_k^w_k / Z, one output layer. At
beta = 0 they are one arithmetic mean. The loss here is that of the mean: lower by what only the teachers disagree on.

| paper | here |
|---|---|
| K teachers | the stage's `teacher: one+other`; K = 1 is OPD with the teacher's own deliberation as privileged text |
| H, R = 2 | `rounds`; 0 is no debate: the teachers read the prompt and weigh the same |
| c_k, `<<CONFIDENCE=N>>` | `tag`, a regular expression; the last one of a turn counts |
| tau | `tau` |
| beta: 1 for code, .5 for agents | `beta` |
| debate at temperature .7 | the stage's `teacher_sampling` |
| student at .7, top-p .8, top-k 20 | the stage's `sampling`: a full-vocabulary loss stays right under truncation |

Missing confidence: `missing="uniform"`, as the release does it: one teacher without makes the row's weights equal;
"zero": that teacher has weight 0. A teacher without any answer has weight 0 with either. A row without a teacher is
left out and counted. Metrics: debate/... of `pieces.debate.Debates`.

Differs from the paper: the texts are ours (`debate.Rules`). Differs from the released code (6c7a66a): a loss per token
is not clamped at 0; tokens that the student did not write, such as a tool's, are not trained; vocabularies are cut
before any softmax for all models (`models.vocabularies`); `temperature` is used. The student's response is not shown to
the debaters, as in the release's default. Repetition penalty: none.
"""

from typing import Any

from opd.errors import ConfigError
from opd.method import Method
from opd.pieces import debate, normalise, signals, supports, teacher_rules
from opd.types import Average, Mixture


def mad_opd(
    beta: float = 1.0,
    rounds: int = 2,
    tau: float = 1.0,
    missing: debate.Missing = "uniform",
    opening: str | None = None,
    reply: str | None = None,
    reads: str | None = None,
    turn: str | None = None,
    tag: str | None = None,
    average: Average = "sequence",
    temperature: float = 1.0,
) -> Method:
    """Several teachers of one row, which debate first; `rounds=0` is the mixture alone."""
    mixture: Mixture = "geometric" if beta == 1.0 else "arithmetic" if beta == 0.0 else "each"
    texts = {"opening": opening, "reply": reply, "reads": reads, "turn": turn, "tag": tag}
    given = {name: text for name, text in texts.items() if text is not None}
    if given and not rounds:
        raise ConfigError(f"`rounds: 0` is no debate, so nothing would read {' and '.join(given)}. Leave them out.")
    pieces: dict[str, Any] = {}
    if rounds:
        rules = debate.Rules(rounds=rounds, tau=tau, missing=missing, **given)
        pieces = {
            "source": debate.debated(rules),
            "context": debate.after_debate(rules),
            "memory": {"debate": debate.counted(rules)},
        }
    return Method(
        teacher=teacher_rules.several(mixture),
        support=supports.full(),
        signal=signals.jsd_and_limits(beta),
        normalise=normalise.per(average),
        temperature=temperature,
        **pieces,
    )
