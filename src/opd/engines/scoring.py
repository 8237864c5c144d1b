"""What a method's scores need of a teacher's servers, and what no server computes. Known before a server answers."""

from __future__ import annotations

from opd.types import ScoreRequest

WIDER = 4  # times k, in place of scores by position


def top_of(request: ScoreRequest, by_position: bool, vocabulary: int) -> int | None:
    """The number of most likely tokens to request for each token; None if scores by position say all."""
    support = request.support
    listed = max(support.k if support.kind == "top_k" and support.by != "student" else 0, request.top_k)
    if not support.student_top_k:
        return listed
    return (listed or None) if by_position else max(listed, min(WIDER * support.student_top_k, vocabulary))


def by_position(request: ScoreRequest) -> int:
    """The number of given tokens to score at each position: the student's top k and the sampled one; 0 for none."""
    return request.support.student_top_k + 1 if request.support.student_top_k else 0


def refusal(request: ScoreRequest) -> str | None:
    """Why no server computes `request`; None if servers do."""
    if request.support.reads_states:
        return (
            "a server gives log-probs of single tokens, and this method reads the teacher's whole distribution. Use "
            "`topk_reverse_kl` with `form: tail`, or another method of the sampled token or a top k"
        )
    if request.temperature != 1.0:
        return (
            f"vLLM scores given tokens at temperature 1 whatever the request says, and this method's teacher has "
            f"temperature {request.temperature:g}. Set the method's `temperature` to 1"
        )
    if request.entropy:
        return "a server does not give the entropy of the teacher's distribution, which a piece of this method reads"
    return None
