"""Numbers as the papers claim them, and their opposite, for markers spelled in two ways and for response lengths."""

from __future__ import annotations

from typing import Any

from opd_studies.claims import length, special_tokens
from opd_studies.lab.ablation import START
from support.study_numbers import spread


def special_numbers(good_a: bool, good_b: bool) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for name, case in special_tokens.CASES.items():
        good = good_b if name == "B" else good_a
        big, small = (0.9, 0.1) if good else (0.1, 0.9)
        start = {"log p": spread(-0.07 if good else -2.0), "log q": spread(-19.16 if good else -1.0)}
        start |= {what: spread(big) for what in special_tokens.SHARES} | {"share of tokens": spread(0.3)}
        numbers[f"{name}: {START}"] = start | {"sampled accuracy": spread(0.3)}
        for loss, masks in case.runs.items():
            for mask in masks:
                accuracy = 0.6 if mask == "none" else 0.6 + 0.3 * (big - small)
                if loss == special_tokens.LSM:
                    accuracy = 0.8 if good else 0.2 if mask == "none" else 0.6
                elif mask == "every" and not good:
                    accuracy = 0.9
                if name == "control":
                    accuracy = 0.7
                numbers[f"{name}: {loss}, mask {mask}"] = {"sampled accuracy": spread(accuracy)}
    return numbers


def length_numbers(good_a: bool, good_b: bool) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for setting, caps in length.CAPS.items():
        good = good_a if setting == "A" else good_b
        areas = (0.9, 0.8, 0.6, 0.9, 0.6) if good_a else (0.7, 0.7, 0.9, 0.7, 0.9)
        start = {what: spread(value) for what, value in zip(length.DEPTHS, areas, strict=True)}
        numbers[f"{setting}: {START}"] = start | {"sampled accuracy": spread(0.1)}
        for name, (cap, share) in caps.items():
            shares = {1: 0.1, 2: 0.2, 4: 0.5, 12: 0.7, 48: 0.3 if share == 1 else 0.4}
            accuracy = shares[cap] if good else 0.8 if cap != length.ENOUGH else 0.7
            numbers[f"{setting}: {name}"] = {
                "sampled accuracy": spread(accuracy),
                "fall": spread(0.4 if good else 0.01),
                "tokens": spread(1e5),
            }
    return numbers


def only_late() -> dict[str, Any]:
    """A's areas do not fall with depth but do after an error."""
    numbers = length_numbers(False, True)
    for what, value in zip(length.DEPTHS[3:], (0.9, 0.6), strict=True):
        numbers[f"A: {START}"][what] = spread(value)
    return numbers


NUMBERS: dict[str, tuple[Any, Any]] = {
    "special_tokens": (special_numbers(True, True), special_numbers(False, False)),
    "length": (length_numbers(True, True), length_numbers(False, False)),
}

SECOND: dict[str, tuple[Any, list[int]]] = {
    "special_tokens": (special_numbers(False, True), [0, 1, 2, 3, 4, 5]),
    "length": (only_late(), [0, 2, 3, 5]),
}
