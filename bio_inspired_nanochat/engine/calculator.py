"""The calculator that a model may call: arithmetic on numbers and counting of substrings, over a whitelist of syntax.

An expression is parsed, never evaluated by Python: only the nodes listed here have a meaning, and sizes are bounded before
each operation, so no input runs long or takes memory.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable

LONGEST = 200  # characters of an expression
DEEPEST = 30  # levels of nesting
LARGEST = 10**50  # of any number
HIGHEST_POWER = 200
MOST_TEXT = 1000  # characters of a text that is searched

_BINARY: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type, Callable] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
Number = int | float


class _Refused(ValueError):
    """The expression is not one of the calculator's."""


def calculate(expression: str) -> str | None:
    """The value of an arithmetic expression as text, or None for everything else, including overflow and division by zero.

    Known: numbers (thousands may be grouped by commas), + - * / // % **, brackets, and `"text".count("part")`.
    """
    text = expression.strip()
    if not 0 < len(text) <= LONGEST:
        return None
    try:
        tree = ast.parse(_ungrouped(text), mode="eval")
        value = _value(tree.body, DEEPEST)
    except (_Refused, SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    return format(value, ".12g") if isinstance(value, float) else str(value)


def _ungrouped(text: str) -> str:
    """Without the commas between the thousands of a number; texts in quotes stay as they are."""
    return text if "'" in text or '"' in text else re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def _value(node: ast.expr, levels: int) -> Number:
    if levels == 0:
        raise _Refused
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _bounded(number)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand, levels - 1))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left, levels - 1), _value(right, levels - 1))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(_BINARY[type(op)](_value(left, levels - 1), _value(right, levels - 1)))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ) if part and len(text) <= MOST_TEXT:
            return text.count(part)
    raise _Refused


def _power(base: Number, exponent: Number) -> Number:
    if abs(exponent) > HIGHEST_POWER or (abs(base) > 1 and exponent * math.log10(abs(base)) > math.log10(LARGEST)):
        raise _Refused
    value = base**exponent
    if isinstance(value, complex):
        raise _Refused
    return _bounded(value)


def _bounded(value: Number) -> Number:
    if not math.isfinite(value) or abs(value) > LARGEST:
        raise _Refused
    return value
