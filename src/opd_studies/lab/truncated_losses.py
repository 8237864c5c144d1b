"""Settings shared by the studies of truncated losses: sorting five digits, its training, sampling and losses."""

from __future__ import annotations

from typing import Any

from opd_studies.lab.ablation import Setting, Size
from opd_studies.lab.lab import SORTERS

REWARDED: dict[str, Any] = {"reward": {"name": SORTERS.task.reward}}  # so that every step logs its sampled accuracy


LONGEST = SORTERS.task.longest


# The evaluation of arXiv 2603.25562, in addition to the usual two.
SAMPLING = {
    "sampled": {"temperature": 1, "max_completion_length": LONGEST},
    "nucleus": {"temperature": 1, "top_p": 0.9, "max_completion_length": LONGEST},
    "greedy": {"temperature": 0, "max_completion_length": LONGEST},
}


SIZE = Size(steps=100, prompts_per_step=32, evaluate={"sampling": SAMPLING})


SAMPLED_TOKEN = Setting(method="opd", stage=REWARDED)


def truncated(form: str, k: int, by: str = "teacher", **stage: Any) -> Setting:
    """A truncated reverse KL, averaged over each response's tokens first, as in the other methods here."""
    stage = {**REWARDED, **stage}
    if form == "released":
        options = {"k": k, "by": by, "form": form, "average": "sequence"}
        return Setting(method="rethinking_opd", options=options, stage=stage)
    return Setting(method="topk_reverse_kl", options={"k": k, "by": by, "form": form.replace("-", "_")}, stage=stage)
