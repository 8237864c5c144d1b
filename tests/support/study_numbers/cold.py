"""Numbers as the papers claim them, and their opposite, for the studies of cold starts and of prompts."""

from __future__ import annotations

from typing import Any

from opd_studies.claims import cold_start, prompts
from support.study_numbers import spread


def cold_start_numbers(good_a: bool, good_b: bool) -> cold_start.Numbers:
    def seen(good: bool) -> dict[str, list[float]]:
        high, low = (0.8, 0.2) if good else (0.2, 0.8)
        shares = ("accuracy", "overlap ratio", "student mass on overlap", "teacher mass on overlap")
        return {**{what: spread(high) for what in shares}, "entropy gap": spread(low)}

    def curve(good: bool) -> dict[int, list[float]]:
        return {updates: spread(0.8 if good else 0.2) for updates in (100, 125, 150)}

    numbers = cold_start.Numbers(
        seen={
            cold_start.BASE: {what: spread(0.5) for what in seen(True)},
            cold_start.COLD: seen(good_a),
            cold_start.SFT: {**seen(good_b), "accuracy": spread(0.5)},
        },
        teacher_nll={cold_start.BASE: spread(0.64), cold_start.COLD: spread(0.335 if good_a or good_b else 0.9)},
        accuracy={},
        overlap={},
    )
    for setting, good in (("A", good_a), ("B", good_b)):
        for name, better in ((cold_start.both(setting), good), (cold_start.alone(setting), not good)):
            numbers.seen[name] = seen(better)
            numbers.accuracy[name] = curve(better)
    return numbers


def prompt_numbers(good_a: bool, good_b: bool) -> dict[str, prompts.Numbers]:
    return {"A": prompts_of(good_a), "B": prompts_of(good_b)}


def prompts_of(good: bool) -> prompts.Numbers:
    def seen(accuracy: float, ratio: float = 0.5, mass: float = 0.5, entropy: float = 0.5) -> dict[str, list[float]]:
        masses = {f"{model} mass on overlap": spread(mass) for model in ("student", "teacher")}
        return {
            "accuracy": spread(accuracy),
            "overlap ratio": spread(ratio),
            "student entropy": spread(entropy),
            **masses,
        }

    own, other, mixed = ((0.8, 0.5, 0.99, 0.1), (0.4, 0.7, 0.9, 0.4), (0.7, 0.6, 0.95, 0.2))
    if not good:
        own, other, mixed = other, own, (0.7, 0.6, 0.95, 0.2)
    return {
        prompts.START: {kind: seen(0.2) for kind in prompts.KINDS},
        "own": {"own": seen(*own), "content": seen(own[0] / 2)},
        "other template": {"own": seen(other[0]), "template": seen(other[0])},
        "other content": {"own": seen(other[0] / 2), "content": seen(*other)},
        "mixed content": {"own": seen(*mixed)},
        prompts.TEACHER: {"own": seen(0.95)},
    }


NUMBERS: dict[str, tuple[Any, Any]] = {
    "cold_start": (cold_start_numbers(True, True), cold_start_numbers(False, False)),
    "prompts": (prompt_numbers(True, True), prompt_numbers(False, False)),
}

SECOND: dict[str, tuple[Any, list[int]]] = {
    "cold_start": (cold_start_numbers(False, True), [0, 1, 2, 3]),
    "prompts": (prompt_numbers(False, True), [0, 1, 2, 3, 4]),
}
