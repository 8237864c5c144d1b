"""BRTS: plain distillation beside a forward KL on the best of several responses of the teacher.

"On-Policy Distillation with Best-of-N Teacher Rollout Selection", arXiv 2605.09725, eq. 2-5; the released code
(BWGZK-keke/BRTS, 3885b18).

    L     = L_stu + lambda L_tea
    L_stu = mean over y ~ p   of KL(p || q) on the student's k most likely tokens
    L_tea = mean over y'      of KL(q || p) on the teacher's k most likely tokens
    y'    : of N teacher responses the right one with the largest overlap (tier 1); else one written with the answer
            shown, if it is right (tier 2); else the one with the largest overlap (tier 3)
    overlap(y') = mean_t 1[y'_t in TopK(p_t)], p_t at position t of the student's own response

| paper | here |
|---|---|
| pi_S, pi_T | p `student_support_logp`, q `teacher_support_logp` |
| lambda; 10 in the paper, .05 in the code | `weight` |
| N; up to 4 in the paper, 2 in the code | `n`; sampled with the recipe's `teacher_sampling`, T .7 and top-p .95 |
| K = 16 | `k`, also of the overlap |
| tier 2; one response | `hinted`, `hint`, `marker`; 0: no tier 2 |
| tier 3, `most_similar` or `skip` | `fallback` |
| `AUX_TEACHER_CTX_KD_WEIGHT_MODE` of the code | `form: released_teacher_topk`, or its default `released_student_p` |

Every divergence has form `tail`. The two means have a denominator each: the tokens of all student rows, and of all
teacher rows. Rows of the teacher are part `teacher` of the step, with metrics part/teacher/...: the tiers' shares, the
positional overlap and the overlap with the student on the teacher's own prefix (`overlap: forced` selects by it). The
positional one compares places: the same text one token later has almost none.

Both released forms have the policy gradient form on student rows, as in rethinking_opd. `released_teacher_topk` is
KL(q/Q_S || p), whose minimum is the teacher cut off at its k. `released_student_p` weighs log p - log q by the
student's own share: its gradient is that of log P_S, so no teacher is in it, and it pushes mass out of the student's k.
The released launchers switch L_tea off.

Differs from the paper: one teacher response for a prompt, compared with all of the student's responses to it, where
the code draws candidates for each of them. The end token counts in the overlap, where the code takes it for padding.
A tier-2 response that repeats the marker is not taken. Not here: the code's selection by index, and its switch
SELECT_BY_OVERLAP, which lets the teacher read the selected response in place of the student's.
"""

from typing import Literal

from opd.method import Method, Part
from opd.pieces import best_of_n, normalise, signals, supports


def brts(
    n: int = 4,
    weight: float = 10.0,
    k: int = 16,
    hinted: int = 1,
    pick: best_of_n.Pick = "overlap",
    overlap: best_of_n.Overlap = "positional",
    fallback: Literal["most_similar", "skip"] = "most_similar",
    form: Literal["paper", "released_teacher_topk", "released_student_p"] = "paper",
    hint: str = best_of_n.HINT,
    marker: str = best_of_n.MARKER,
    temperature: float = 1.0,
) -> Method:
    """The student's own responses, and one right response of the teacher for each prompt."""
    chosen = best_of_n.BestOfN(
        n=n, hinted=hinted, k=k, pick=pick, overlap=overlap, fallback=fallback, hint=hint, marker=marker
    )
    own, teachers = {
        "paper": (signals.divergence("reverse_kl"), signals.divergence("forward_kl")),
        "released_teacher_topk": (signals.support_policy_gradient(), signals.weighed_log_ratio("teacher")),
        "released_student_p": (signals.support_policy_gradient(), signals.weighed_log_ratio("student")),
    }[form]
    teacher_rows = Method(
        support=supports.top_k(k, by="student" if form == "released_student_p" else "teacher"),
        signal=teachers,
        normalise=normalise.per("token"),
        temperature=temperature,
    )
    return Method(
        source=best_of_n.with_best_teacher_response(chosen),
        support=supports.top_k(k, by="student"),
        signal=own,
        normalise=normalise.per("token"),
        temperature=temperature,
        parts={best_of_n.TEACHERS_ROWS: Part(method=teacher_rows, factor=weight)},
    )
