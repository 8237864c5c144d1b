"""On-policy self-distillation (OPSD): the teacher is the student itself, given privileged information.

Zhu et al., "The Many Faces of On-Policy Distillation", arXiv 2605.11182, eq. 1 with I, and App. A.3 (teachers).

    L = (1/B) sum_i (1/T_i) sum_t D( p(. | x, y_<t) , sg[ p_teacher(. | x, I, y_<t) ] ),        y ~ p(. | x)

| paper | here |
|---|---|
| I, a rule that all prompts share: system prompt, constitution, preference | `system`, `examples` |
| I, only the final answer | `information="answer"`, from the data's `answer` |
| I, the full solution | `information="solution"`, from the data's `privileged_context` |
| I, a hint in the think block | `information="hint"`, a `prefill` of the teacher's answer |
| I, a summarised history | `information="history"`, from the data's `privileged_context`: earlier attempts in summary |
| I, verifier feedback | `information="feedback"`: the student's own attempt and the reward's verdict |
| I in other words | `template`, `prefill`, with the fields of `contexts.privileged` |
| theta^(0), bar-theta, theta | `teacher`: frozen (the paper's default), ema with `decay`, live |
| I is an image, e.g. with a mark on it | `images`: the teacher sees `privileged_images` in place of `images` |
| another teacher | `teacher="external"`: the stage's `teacher` reads I |
| l_t | `divergence` in `form` on the `k` most likely tokens (20 in Table 1) `by` intersection, teacher, student |
| l_t on the whole vocabulary | `k=None`: exact, and our recommendation, since the teacher is in this process |

An I that is the same rule for every prompt can be internalised. With a different I for every prompt the optimum is the
normalised geometric mean of the teachers (eq. 10-11), which may follow none of them.

Differs from the paper: positions with an empty intersection have no loss and stay in the mean. The texts of
`information` are ours (`contexts.INFORMATION`). With feedback the teacher reads the response that it scores.
`information="verified"` and `peers` are the context of arXiv 2605.11609; the control there trains towards it. With
`peers` the `privileged_context` is a right response of the group, if any, else the data's. Without either, the teacher
reads only the prompt and the response is counted (`context/unsolved`).
"""

from typing import Literal

from opd.method import Method
from opd.pieces import contexts, normalise, signals, solutions, supports, teacher_rules
from opd.types import Average, ChosenBy


def context_distillation(
    system: str | None = None,
    examples: list[tuple[str, str]] | None = None,
    template: str | None = None,
    prefill: str | None = None,
    information: Literal["answer", "solution", "hint", "history", "feedback", "verified"] | None = None,
    peers: bool = False,
    images: bool = False,
    teacher: Literal["frozen", "live", "ema", "external"] = "frozen",
    decay: float = 0.99,
    divergence: Literal["reverse_kl", "forward_kl", "generalised_jsd", "skew_kl"] = "reverse_kl",
    k: int | None = 20,
    by: ChosenBy = "intersection",
    form: Literal["raw", "stop_gradient", "renormalised", "tail"] = "renormalised",
    average: Average = "sequence",
    temperature: float = 1.0,
) -> Method:
    """Train a model to behave without the information as it does with it; `k=None` is the whole vocabulary."""
    found = solutions.from_peers() if peers else None
    scored = supports.full() if k is None else supports.top_k(k, by=by)
    return Method(
        context=contexts.informed(
            information,
            system=system,
            examples=examples or (),
            template=template,
            prefill=prefill,
            solutions=found,
            images=images,
        ),
        memory={} if found is None else {"unsolved": solutions.counted(found)},
        teacher=teacher_rules.external() if teacher == "external" else teacher_rules.self_taught(teacher, decay),
        support=supports.for_renormalised(scored, ", or form: tail") if form == "renormalised" else scored,
        signal=signals.divergence(divergence, form=form),
        normalise=normalise.per(average),
        temperature=temperature,
    )
