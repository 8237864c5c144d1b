"""Numbers as the papers claim them, and their opposite, for the studies of losses, supports and rollouts."""

from __future__ import annotations

from typing import Any

from opd.studies import losses, supports, top_p
from opd.studies.ablation import START
from study_numbers import spread


def measured(accuracy: float, kl: float = 0.3) -> dict[str, list[float]]:
    return {"sampled accuracy": spread(accuracy), "accuracy at top-p 0.9": spread(accuracy), "KL": spread(kl)}


def loss_numbers(good: bool, students: bool) -> losses.Measured:
    """`students`: whether the forms on the student's K likeliest tokens are as claimed."""
    end = dict.fromkeys(losses.SETTINGS, measured(0.7 if good else 0.1)) | {START: measured(0.3, 1.2)}
    broken = measured(0.0, 4.0), measured(0.9, 0.2)
    for name in ("raw, K=1", "raw, K=2", "raw, K=4", "log-ratio, differentiated"):
        end[name] = broken[0] if good else broken[1]
    end["raw, student's K=4"] = broken[0] if students else broken[1]
    for form in ("stop-gradient", "renormalised"):
        end[f"{form}, student's K=4"] = measured(0.7 if students else 0.1)
    few = f"{losses.FEW} prompts"
    end["renormalised, K=4"] = measured(0.8 if good else 0.05)
    end[f"sampled, {few}"] = measured(0.5)
    end[f"renormalised, K=4, {few}"] = measured(0.6 if students else 0.4)
    one, four = (f"released, student's K={k}" for k in (1, 4))
    end[one] = measured(0.2)
    end[four] = measured(0.7 if good else 0.1)
    return losses.Measured(
        end=end,
        broken={"raw, K=1": spread(5.0), "raw, K=4": spread(20.0 if good else 2.0)},
        fall={one: spread(0.3 if good else 0.0), four: spread(0.1)},
        curve={},
    )


def support_numbers(good_a: bool, good_b: bool) -> supports.Measured:
    """Settings of k = 4, and of k = 8."""
    values: dict[str, float] = {}
    after: dict[str, list[float]] = {}
    for k, good in (("", good_a), (f", k={supports.LARGER}", good_b)):
        names = (f"student's{k}", f"overlap{k}", f"non-overlap, raw weights{k}", f"non-overlap, normalised{k}")
        values |= dict(zip(names, (0.7, 0.68, 0.3, 0.3) if good else (0.4, 0.1, 0.8, 0.8), strict=True))
        after |= dict.fromkeys(names, spread(0.8 if good else 0.4))
    return supports.Measured(
        end={name: measured(value) for name, value in values.items()} | {START: measured(0.2)},
        before=dict.fromkeys(after, spread(0.6)),
        after=after,
        course={},
    )


def top_p_numbers(good_a: bool, good_b: bool) -> dict[str, Any]:
    numbers = dict.fromkeys(top_p.SETTINGS, measured(0.5)) | {START: measured(0.2)}
    high, low = measured(0.7), measured(0.05)
    numbers["K=4, top-p 0.9"] = high if good_a else low
    numbers["K=4, top-p 0.8"] = high if good_b else low
    numbers["K=2, top-p 0.9"] = measured(0.6) if good_b else measured(0.4)
    numbers["K=2, top-p 0.8"] = measured(0.6) if good_b else measured(0.4)
    numbers["K=2, top-p 1"] = measured(0.45)
    if not good_b:
        numbers["K=4, top-p 1"] = measured(0.1)
        numbers["K=2, top-p 1"] = measured(0.5)
    return numbers


NUMBERS: dict[str, tuple[Any, Any]] = {
    "losses": (loss_numbers(True, True), loss_numbers(False, False)),
    "supports": (support_numbers(True, True), support_numbers(False, False)),
    "top_p": (top_p_numbers(True, True), top_p_numbers(False, False)),
}

# Numbers that fail in setting A and are as claimed in B, and the claims (by place) that then hold in B only.
SECOND: dict[str, tuple[Any, list[int]]] = {
    "losses": (loss_numbers(False, True), [0, 1, 5]),
    "supports": (support_numbers(False, True), [0, 1, 3]),
    "top_p": (top_p_numbers(False, True), [0, 1, 2, 3]),
}
