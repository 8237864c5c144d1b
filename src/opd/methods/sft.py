"""Supervised fine-tuning, and sequence-level distillation when the teacher writes the responses.

Kim and Rush, "Sequence-Level Knowledge Distillation", arXiv 1606.07947, eq. 7 (teacher's responses). Filters of the
teacher's responses: Zhu et al., arXiv 2605.11182 App. A.23 (correct responses); Li et al., arXiv 2604.13016 App. C.1
and released code (finished responses without loops). Both precede on-policy distillation on other prompts.

    L = -(1/N) sum_t log p(y_t | x, y_<t)          y from the data, or y ~ q(. | x)

| paper | here |
|---|---|
| y in the corpus; y-hat from the teacher | `source`: dataset, teacher |
| p(y_t \\| x, y_<t) | `student_logp` |
| attempts at a prompt (2604.13016: up to 3) | `teacher_sampling: {n: 3}`; the first that passes `keep` is trained |
| correct (2605.11182); not degenerate, with a boxed answer (2604.13016) | `keep`, `must_contain` |
| prompts of this stage and of the next | `data: {skip, limit}` |

Differs from the paper: `teacher_sampling` samples the teacher's responses; 1606.07947 uses beam search. All attempts at
a prompt are written together and filtered in the step that trains them.
"""

from typing import Literal

from opd.errors import ConfigError
from opd.method import Method
from opd.pieces import normalise, signals, sources, supports, teacher_rules
from opd.pieces.filters import clean, correct, everything, first_passing
from opd.types import Filter


def sft(
    source: Literal["dataset", "teacher"] = "dataset",
    keep: Literal["all", "correct", "clean", "both"] = "all",
    must_contain: str | None = None,
) -> Method:
    """Train on given responses: `source` is the data's `response` column, or the stage's teacher.

    `keep` selects the responses to train on; `must_contain` is a text that a clean response contains, e.g. "boxed".
    """
    return Method(
        source=sources.dataset() if source == "dataset" else sources.teacher_writes(),
        filter=_filter(keep, must_contain),
        teacher=teacher_rules.no_teacher(),
        support=supports.no_support(),
        signal=signals.nll(),
        normalise=normalise.per("token"),
    )


def _filter(keep: str, must_contain: str | None) -> Filter:
    if must_contain is not None and keep not in ("clean", "both"):
        raise ConfigError(
            f"`must_contain: {must_contain}` is a condition on clean responses, but `keep: {keep}` does not select "
            "clean responses. Set keep: clean or keep: both."
        )
    if keep == "all":
        return everything()
    tests = {"correct": [correct()], "clean": [clean(must_contain)], "both": [correct(), clean(must_contain)]}
    return first_passing(*tests[keep])
