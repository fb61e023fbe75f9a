"""When a grounding answer counts as right: the rules of IAA's `compute_precision.py`, exactly.

An answer is cut at "; ". Each piece is read as a Python expression, mapped from fractions of the
centre-padded square to pixels, and compared with the true box; the first piece with an IoU of 0.5
or more is a hit, and the rest is not looked at. A piece that cannot be read before that makes the
answer a miss, even if a right box follows; ";" without a space does not separate. Brackets are not
needed, and numbers after the fourth are ignored.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from data_pipelines.conversation.pictures import unframe_box

THRESHOLD = 0.5

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
# Everything that reading or computing with a strange expression may raise.
_UNREADABLE = (
    SyntaxError, ValueError, TypeError, IndexError, KeyError, ArithmeticError, MemoryError,
    RecursionError,
)  # fmt: skip


def hits(answer: str, box: Sequence[float], width: int, height: int) -> bool:
    """Whether an answer finds `box` (x1, y1, x2, y2 in pixels) in a picture of this size."""
    try:
        for piece in answer.split("; "):
            if iou(unframe_box(read_numbers(piece), width, height), box) >= THRESHOLD:
                return True
    except _UNREADABLE:
        return False
    return False


def read_numbers(piece: str) -> tuple[float, float, float, float]:
    """The first four numbers of one piece of an answer.

    Reads what Python's `eval` reads as a list, a tuple or a dict of numbers, arithmetic with
    + - * / // % included; powers, names and calls are refused (`eval` would run them).

    Raises:
      SyntaxError, ValueError, TypeError, IndexError, KeyError, ArithmeticError, MemoryError or
      RecursionError: it is none of these.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # "[1](2)" and the like
        value = _value(ast.parse(piece.lstrip(" \t"), mode="eval").body)
    numbers = tuple(value[i] for i in range(4))
    if any(isinstance(n, complex) or not isinstance(n, int | float) for n in numbers):
        raise TypeError(f"expected four numbers, found {numbers!r}")
    return numbers


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | complex() | str() | bytes()):
            return node.value
        case ast.List(elts=parts):
            return [_value(part) for part in parts]
        case ast.Tuple(elts=parts):
            return tuple(_value(part) for part in parts)
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {
                _value(k): _value(v) for k, v in zip(keys, values, strict=True) if k is not None
            }
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_number(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_number(left), _number(right))
    raise ValueError(f"expected numbers, found {type(node).__name__}")


def _number(node: ast.expr) -> int | float | complex:
    value = _value(node)
    if isinstance(value, int | float | complex):
        return value
    raise TypeError(f"expected a number, found {type(value).__name__}")


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union, boxes (x1, y1, x2, y2) as they are: areas may be negative.

    Raises:
      ZeroDivisionError: two boxes without a union.
    """
    left, right = max(a[0], b[0]), min(a[2], b[2])
    top, bottom = max(a[1], b[1]), min(a[3], b[3])
    if left >= right or top >= bottom:
        return 0.0
    shared = (right - left) * (bottom - top)
    return shared / (_area(a) + _area(b) - shared)


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
