"""Units and words of scale in a final answer, which math-verify drops: `5 km`, `5 m` and `5 million` are 5.

Two known units that differ make two answers differ, also where one could be converted: a text without a unit, or with a
unit that is not in the table, is compared by its number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

SCALES: Mapping[str, int] = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
# A unit and its other spellings; `pounds` is left out, because it is of money and of mass.
SPELLINGS: Mapping[str, str] = {
    "mm": "millimeter millimeters millimetre millimetres",
    "cm": "centimeter centimeters centimetre centimetres",
    "m": "meter meters metre metres",
    "km": "kilometer kilometers kilometre kilometres",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "s": "sec secs second seconds",
    "min": "mins minute minutes",
    "h": "hr hrs hour hours",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "years",
    "mg": "milligram milligrams",
    "g": "gram grams",
    "kg": "kilogram kilograms",
    "oz": "ounce ounces",
    "ml": "milliliter milliliters millilitre millilitres",
    "l": "liter liters litre litres",
    "mph": "mi/h",
    "km/h": "kph kmh kmph",
    "m/s": "mps",
    "$": "dollar dollars",
    "cent": "cents",
    "\u20ac": "euro euros",
    "\u00a3": "",
    "\u00a5": "yen",
    "%": "percent",
    "\u00b0": "degree degrees deg",
    "rad": "radian radians",
}
UNITS = {word: unit for unit, words in SPELLINGS.items() for word in (unit, *words.split())}
POWERS = {"square": "2", "sq": "2", "squared": "2", "\u00b2": "2", "cubic": "3", "cubed": "3", "\u00b3": "3"}

_NUMBER = r"\d[\d,]*(?:\.\d+)?|\.\d+"
_SCALED = re.compile(
    rf"(?P<number>(?<![\w.,^_])(?:{_NUMBER}))(?:\s|\\[,;:! ]|~|-)*(?P<text>\\(?:text|mathrm|mbox)\s*\{{\s*)?"
    rf"(?P<scale>{'|'.join(SCALES)})s?\b",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)")
_QUANTITY = re.compile(
    rf"[-+]?\s*(?P<money>[$\u20ac\u00a3\u00a5]?)\s*[-+]?\s*(?:{_NUMBER})(?:\s*/\s*\d+)?\s*"
    r"(?P<before>square|sq\.?|cubic)?\s*"
    r"(?P<unit>[%\u00b0$\u20ac\u00a3\u00a5]|[A-Za-z]+(?:/[A-Za-z]+)?|[A-Za-z]+ per hour)?"
    r"\s*(?P<after>squared|cubed|\u00b2|\u00b3|\^\s*\{?\s*[23]\s*\}?)?\.?",
    re.IGNORECASE,
)


def without_scales(text: str) -> str:
    r"""The text with `3 million` and `3\text{ million}` as 3000000."""
    while (match := _SCALED.search(text)) is not None:
        value = Decimal(match["number"].replace(",", "")) * SCALES[match["scale"].lower()]
        rest = text[match.end() :]
        if match["text"]:
            rest = rest.removeprefix("}") if rest.startswith("}") else match["text"].rstrip() + rest
        text = text[: match.start()] + f"{value.normalize():f}" + rest
    return text


def unit_of(text: str) -> str | None:
    """The unit of a text that is a number with a unit of the table, with its power: `cm^2`; None for any other text."""
    plain = _DEGREES.sub("\u00b0", _MARKUP.sub(r" \1 ", text).replace("\\$", "$").replace("\\%", "%"))
    match = _QUANTITY.fullmatch(re.sub(r"\\[,;:! ]|~", " ", plain).strip())
    if match is None:
        return None
    word = (match["money"] or match["unit"] or "").lower()
    unit = {"miles per hour": "mph", "kilometers per hour": "km/h"}.get(word) or UNITS.get(word)
    raised = match["before"] or match["after"]
    if unit is None or not raised:
        return unit
    power = POWERS.get(raised.lower().rstrip(".")) or re.sub(r"\D", "", raised)
    return f"{unit}^{power}"
