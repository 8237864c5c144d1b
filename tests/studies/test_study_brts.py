"""The study of the best of N responses: its verdicts on numbers as claimed and their opposite."""

from __future__ import annotations

from support.study_numbers import spread

from opd_studies.claims import brts
from opd_studies.lab.ablation import Numbers

GOOD = {
    brts.PLAIN: 0.2,
    brts.MORE: 0.3,
    brts.ONE: 0.35,
    brts.ONE_TIER_2: 0.4,
    brts.TWO: 0.5,
    brts.RANDOM: 0.55,
    brts.SHORTEST: 0.6,
    brts.FOUR: 0.7,
}


def setting(name: str, good: bool) -> Numbers:
    return {arm: {"sampled accuracy": spread(GOOD[arm] if good else 1 - GOOD[arm])} for arm in brts.ARMS[name]}


def numbers(a: bool, b: bool) -> dict[str, Numbers]:
    return {"A": setting("A", a), "B": setting("B", b)}


def test_judge_follows_numbers():
    assert {one.verdict for one in brts.judge(numbers(True, True))} == {"holds"}
    assert "holds" not in {one.verdict for one in brts.judge(numbers(False, False))}
    assert "holds in B only" in {one.verdict for one in brts.judge(numbers(False, True))}
