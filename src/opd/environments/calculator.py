"""A calculator: arithmetic from its syntax tree, without `eval`, with limits on the size of numbers."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any, TypeAlias

Number: TypeAlias = int | float

LONGEST = 500  # characters of an expression
BITS = 4096  # of an integer
DEEPEST = 50  # of parentheses in each other
SIGNS = {"^": "**", "\u00d7": "*", "\u00f7": "/", "\u2212": "-"}  # that a model may write

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(math, name) for name in ("sqrt", "exp", "log", "log2", "log10", "sin", "cos", "tan", "floor")},
    "ceil": math.ceil,
    "abs": abs,
    "round": round,
    "min": min,
    "max": max,
    "gcd": math.gcd,
}
_NAMES: dict[str, float] = {"pi": math.pi, "e": math.e}


def calculator(expression: str) -> str:
    """Computes an arithmetic expression, e.g. 2*(3+4) or sqrt(2)/3.

    Args:
        expression: The expression, with + - * / // % **, parentheses, and functions such as sqrt, log, abs, min, max.
    """
    text = str(expression).strip()
    for sign, operator_ in SIGNS.items():
        text = text.replace(sign, operator_)
    if len(text) > LONGEST:
        raise ValueError(f"the expression has {len(text)} characters, at most {LONGEST} are computed")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        raise ValueError(f"{text[:80]!r} is no arithmetic expression") from error
    value = _value(tree.body, 0)
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)


def _value(node: ast.AST, depth: int) -> Number:
    if depth > DEEPEST:
        raise ValueError(f"the expression is nested more than {DEEPEST} deep")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _checked(node.value)
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand, depth + 1))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, depth + 1), _value(node.right, depth + 1)
        if isinstance(node.op, ast.Pow):
            return _checked(_power(left, right))
        if type(node.op) in _BINARY:
            return _checked(_BINARY[type(node.op)](left, right))
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _FUNCTIONS
        and not node.keywords
    ):
        return _checked(_FUNCTIONS[node.func.id](*(_value(one, depth + 1) for one in node.args)))
    raise ValueError(
        f"{ast.unparse(node)[:80]!r} is not computed: numbers, + - * / // % **, and {', '.join(_FUNCTIONS)}"
    )


def _power(base: Number, exponent: Number) -> Number:
    """`base ** exponent`, which is not computed if it is larger than `BITS` bits."""
    if isinstance(base, int) and isinstance(exponent, int):
        if abs(base) > 1 and exponent * max(1, abs(base).bit_length() - 1) > BITS:
            raise ValueError(f"a power has more than {BITS} bits")
        return base**exponent
    return math.pow(base, exponent)


def _checked(value: Any) -> Number:
    """A finite number of at most `BITS` bits. Raises ValueError."""
    if isinstance(value, int):
        if value.bit_length() > BITS:
            raise ValueError(f"a number has more than {BITS} bits")
        return value
    if not math.isfinite(value):
        raise ValueError("the result is not a finite number")
    return float(value)
