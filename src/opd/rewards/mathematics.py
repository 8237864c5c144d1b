"""The reward `math_verify`: is the final answer of a response the answer of the row, as text, number or mathematics?

The final answer is read here: the last box, the part after `####`, after "the answer is", or the last line. Texts and
plain numbers are compared here, and everything else by the package math-verify, which reads a plain text as LaTeX:
there `Paris` is a product of five letters, `1e-3` is e - 3 and `12 000` is 12 times 0.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from opd.errors import ConfigError, DataError
from opd.plugins import _import_extra
from opd.rewards.base import TIMED_OUT, FunctionReward
from opd.rewards.calls import interrupted
from opd.rewards.quantities import unit_of, without_scales
from opd.types import Prompt

TOLERANCE = Fraction(1, 10**6)  # of two numbers; times the larger of them where that is below 1
LONGEST_NUMBER = 300  # characters; Python refuses to convert integers of thousands of digits

BOLD = re.compile(r"(?<![\w*)])\*\*(?=\S)([^*\n]+)(?<=\S)\*\*(?![\w*(])")
MARKER = re.compile(r"\banswer\b(?:\s+is\b|\s+should\s+be\b)?\s*[:=]?", re.IGNORECASE)
SENTENCE_END = re.compile(r"\.(?:\s|$)|\n")
ANSWER_TAG = re.compile(r"<answer\s*>", re.IGNORECASE)
CHOICE = re.compile(r"(?<=[\d}])\s*,?\s+(?:or|and)\s+(?=[-\d\\])")
BASE = re.compile(r"[0-9A-Za-z]+\s*_\s*\{?\s*(\d+)\s*\}?")
RELATION = re.compile(r"[<>\u2264\u2265\u2260]=?|!=|\\(?:leq?|geq?|neq?|lt|gt)(?![A-Za-z])")
SAME_RELATION = {
    **dict.fromkeys(("<=", "\\le", "\\leq"), "\u2264"),
    **dict.fromkeys((">=", "\\ge", "\\geq"), "\u2265"),
    **dict.fromkeys(("!=", "\\ne", "\\neq"), "\u2260"),
    "\\lt": "<",
    "\\gt": ">",
}
PRIME = re.compile(r"(?<=[\w)}])(?:'(?!\d)|\^?\s*\{?\\prime\}?)|\u2032")
APART = re.compile(r"\d+(?: +\d+)+")
BRACE = re.compile(r"\\f?boxed\s*\{|(?<!\\)[{}]")
ENCLOSED = re.compile(
    r"\$\$(?P<a>[^$]+)\$\$|\$(?P<b>[^$]+)\$|\\\((?P<c>(?:(?!\\\)).)+)\\\)|\\\[(?P<d>(?:(?!\\\]).)+)\\\]"
    r"|\\(?:text|textbf|textit|mathrm|mathbf|mathit|mbox)\s*\{(?P<e>[^{}]*)\}|`(?P<f>[^`]+)`",
    re.DOTALL,
)
GROUP = r"(?:,|\{,\}|\\[,!; ]|[ \u00a0\u2009\u202f])"  # what separates groups of three digits
NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:\\?\$|[€£¥])?\s*(?P<sign2>[-+]?)(?:"
    rf"(?P<whole>\d+)(?:\s+|\s*\+\s*)(?P<over>\d+)\s*/\s*(?P<under>\d+)"
    rf"|(?P<numerator>\d+)\s*/\s*(?P<denominator>\d+)"
    rf"|(?P<decimal>(?:[1-9]\d{{0,2}}(?:{GROUP}\d{{3}})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE](?P<exponent>[-+]?\d{{1,3}}))?"
    rf")\s*(?P<percent>\\?%)?"
)
WORDS = re.compile(r"[^\W\d_]+(?:[ '\u2019-]+[^\W\d_]+)*")
LONG = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")  # a word that is no LaTeX command
FUNCTIONS = frozenset({"sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt"})
CONSTANTS = frozenset({"pi", "infty", "theta", "alpha", "beta", "gamma", "lambda", "mu", "sigma", "phi"})
NAMES = FUNCTIONS | CONSTANTS
COMMAND = re.compile(r"(?<![\\A-Za-z])(" + "|".join(sorted(NAMES - {"sqrt"})) + r")(?![A-Za-z])")
SYMBOLS = NAMES | {"e", "i", "\u03c0"}  # these are numbers, so they are not compared as text


def math_verify(timeout_s: float = 5) -> FunctionReward:
    r"""1 if the final answer of the response equals the answer: as text, as number, or by math-verify.

    The final answer is the last \boxed{...}; else the rest of the line after the last `####`; else what follows the
    last "answer", "answer is" or "answer:", up to the end of the sentence; else the last line. If that is prose,
    math-verify searches the whole response. Of a response with `<answer>` tags the last one's content counts; else what
    follows `</think>`. An answer of letters alone is compared as text, without spaces, and from
    two letters on without case. Plain numbers (`\$72`, `12 000`, `1 1/2`, `1e-3`, `50%`) are equal up to `TOLERANCE`;
    50% equals 50 and 0.5, `3 million` 3000000. Two known units that differ (`5 km`, `5 m`), two bases of digits, and a
    different relation or number of primes make a response wrong. docs/rewards.md has a table of answers and responses.

    A response whose comparison takes longer than `timeout_s` seconds of this process's CPU time (so the load of the
    machine does not matter) gets 0 and is counted: `rollout/rewards_timed_out`. 0 means no limit. The limit is a
    signal, which only the main thread can receive: other threads have no limit.
    """
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 <= timeout_s < 1e6:
        raise ConfigError(f"The reward 'math_verify' got `timeout_s: {timeout_s!r}`. Give seconds, 0 for no limit.")
    verifier = _import_extra("math_verify", "math")
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limits, of wall time, are off

    def reward(prompt: Prompt, response: str) -> float:
        if why := unreadable(prompt):
            raise DataError(f"Prompt {prompt.id}: {why}. Fill the column.")
        try:
            with interrupted(timeout_s, OutOfTime, cpu=True) if timeout_s else nullcontext():
                return float(same_answer(str(prompt.answer), response, lambda a, b: equal(verifier, a, b)))
        except OutOfTime:
            return TIMED_OUT

    def unreadable(prompt: Prompt) -> str | None:
        return None if str("" if prompt.answer is None else prompt.answer).strip() else "its `answer` is empty"

    return FunctionReward(
        name="math_verify",
        function=reward,
        needs=frozenset({"answer"}),
        unreadable=unreadable,
        correctness=True,
        extract=lambda _, text: final_answer(without_scales(answered(text))).text,
    )


def same_answer(answer: str, response: str, equal: Callable[[str, str], bool]) -> bool:
    """Whether the final answer of `response` is `answer`. `equal` compares texts of mathematics, the answer first."""
    if answer.strip() == response.strip():
        return True
    answer, response = without_scales(answer), without_scales(answered(response))
    gold, found = final_answer(answer), final_answer(response)
    wanted, given = gold.text, found.text
    if compact(wanted) == compact(given):
        return True
    if differ_in_notation(wanted, given):
        return False
    if is_words(wanted):
        return words_equal(wanted, given)
    ours, theirs = number_of(wanted), number_of(given)
    if ours is not None and theirs is not None:
        return ours.equals(theirs)
    if not found.marked and (is_prose(given) or re.search(r"\w", given) is None):
        given = bare(response)
    return equal(_mathematics(wanted, ours), _mathematics(given, theirs))


def equal(verifier: Any, answer: str, given: str) -> bool:
    """math-verify's verdict on two texts, each LaTeX between dollars or prose; False if one holds no mathematics."""
    gold = verifier.parse(answer, parsing_timeout=None)
    target = verifier.parse(given, parsing_timeout=None) if gold else []
    return bool(gold and target) and bool(verifier.verify(gold, target, timeout_seconds=None, raise_on_error=False))


@dataclass(frozen=True, slots=True)
class Final:
    """The final answer of a text, without mark-up; `marked`: it stood in a box."""

    text: str
    marked: bool = False


def final_answer(text: str) -> Final:
    """The final answer of a response, or of an answer that has more than the answer."""
    box = last_box(text)
    if box is not None:
        return Final(bare(box), marked=True)
    plain = BOLD.sub(r"\1", text.strip())
    if "####" in plain:
        return Final(bare(plain.rpartition("####")[2].strip().partition("\n")[0]))
    markers = list(MARKER.finditer(plain))
    tail = plain[markers[-1].end() :].strip() if markers else ""
    if tail:
        return Final(bare(CHOICE.sub(", ", SENTENCE_END.split(tail)[0])))
    lines = [line for line in plain.splitlines() if line.strip()]
    return Final(bare(lines[-1] if lines else ""))


def answered(response: str) -> str:
    """The part of a response that answers: what the last `<answer>` holds; else what follows the last `</think>`."""
    opened = list(ANSWER_TAG.finditer(response))
    if opened:
        return re.split(r"</answer\s*>", response[opened[-1].end() :], maxsplit=1, flags=re.IGNORECASE)[0]
    after = response.rpartition("</think>")[2]
    return after if after.strip() else response


def differ_in_notation(wanted: str, given: str) -> bool:
    """Whether two texts differ in something that math-verify drops: units, bases, primes, `>`, a space in digits."""
    units = {unit_of(wanted), unit_of(given)} - {None}
    bases = {match[1] for text in (wanted, given) if (match := BASE.fullmatch(text))}
    relations = [match and SAME_RELATION.get(match[0], match[0]) for match in map(RELATION.match, (wanted, given))]
    primes = [0 if is_prose(text) else len(PRIME.findall(text)) for text in (wanted, given)]
    apart = any(APART.fullmatch(text) and number_of(text) is None for text in (wanted, given))
    return len(units) > 1 or len(bases) > 1 or relations[0] != relations[1] or primes[0] != primes[1] or apart


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed{...} that is closed; None without one."""
    opened: list[tuple[int, bool]] = []  # where the content of each open brace begins, and whether it is a box's
    last, content = -1, None
    for match in BRACE.finditer(text):
        if match[0].endswith("{"):
            opened.append((match.end(), len(match[0]) > 1))
        elif opened:
            start, of_box = opened.pop()
            if of_box and start > last:
                last, content = start, text[start : match.start()]
    return content


def bare(text: str) -> str:
    """The text without white space, bold, a full stop, and the dollars, quotes or \\text{} around all of it."""
    while True:
        dashed = re.sub(r"^\s*\N{EN DASH}(?=[\d.\\])", "-", text.replace("\N{MINUS SIGN}", "-"))
        inner = BOLD.sub(r"\1", dashed.strip()).rstrip(".,;: \n").strip('" ')
        inner = inner.strip("' ") if inner.startswith("'") else inner  # the last one alone is a prime
        if match := ENCLOSED.fullmatch(inner):
            inner = next(part for part in match.groups() if part is not None)
        if inner == text:
            return text
        text = inner


def compact(text: str) -> str:
    """The text without white space, but for one space between digits: `1 2` is not 12."""
    return re.sub(r"(?<!\d) +| +(?!\d)", "", re.sub(r"\s+", " ", text))


def is_words(text: str) -> bool:
    """Whether a text has letters alone, so that it would be read as a product: `Paris`, `yes`, `B`, `New York`."""
    letter = re.fullmatch(r"\(?([^\W\d_])\)?", text)
    if letter is not None:
        return letter[1] not in SYMBOLS
    return WORDS.fullmatch(text) is not None and LONG.search(text) is not None and text not in SYMBOLS


def words_equal(wanted: str, given: str) -> bool:
    """Whether two texts are the same words. One letter keeps its case and may be a choice's label: `(B) Paris`."""
    ours, theirs = re.sub(r"[\W_]+", "", wanted), re.sub(r"[\W_]+", "", given)
    if len(ours) > 1:
        return ours.casefold() == theirs.casefold()
    label = re.match(r"\(?([^\W\d_])(?:\)|[.:](?=\s))", given)
    return ours == (label[1] if label else theirs)


def is_prose(text: str) -> bool:
    """Whether a text has words besides the names of functions and constants."""
    return any(word not in NAMES for word in LONG.findall(re.sub(r"\\[a-z]+\s*\{[^{}]*\}", "", text)))


@dataclass(frozen=True, slots=True)
class Number:
    """A plain number as it is written, without its percent sign."""

    value: Fraction
    percent: bool
    latex: str

    def equals(self, other: Number) -> bool:
        """Whether both are equal up to the tolerance; a percentage also equals its value divided by 100."""
        if near(self.value, other.value):
            return True
        if self.percent == other.percent:
            return False
        one, two = (self, other) if self.percent else (other, self)
        return near(one.value / 100, two.value)


def near(one: Fraction, other: Fraction) -> bool:
    """Whether two numbers differ by at most `TOLERANCE`, times the larger of them where that is below 1."""
    return abs(one - other) <= TOLERANCE * min(Fraction(1), max(abs(one), abs(other)))


def number_of(text: str) -> Number | None:
    """The number that a whole text is; None if it is anything else."""
    match = NUMBER.fullmatch(text) if len(text) <= LONGEST_NUMBER else None
    if match is None or (match["sign"] and match["sign2"]):
        return None
    minus = "-" if "-" in (match["sign"], match["sign2"]) else ""
    over, under = match["over"] or match["numerator"], match["under"] or match["denominator"]
    if over is not None:
        if int(under) == 0:
            return None
        value = int(match["whole"] or 0) + Fraction(int(over), int(under))
        latex = rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    else:
        written = Decimal(re.sub(GROUP, "", match["decimal"]) + "e" + (match["exponent"] or "0"))
        value, latex = Fraction(written), format(written, "f")
    return Number(-value if minus else value, match["percent"] is not None, minus + latex)


def _mathematics(text: str, number: Number | None) -> str:
    """The text as math-verify reads it: LaTeX and plain mathematics between dollars, prose as it is."""
    if number is not None:
        return f"${number.latex}{chr(92) + '%' if number.percent else ''}$"
    text = re.sub(r"(?<=\d)(?:\{,\}|\\[,!])(?=\d{3}(?!\d))", "", text)
    if "$" in text.replace("\\$", "") or "\\(" in text or "\\[" in text:
        return text
    text = text.replace("\\$", "")
    if is_prose(text):
        return text
    return "$" + COMMAND.sub(r"\\\1", text) + "$"


class OutOfTime(BaseException):
    """The end of the time of a comparison. No Exception: sympy and its parsers catch those."""
