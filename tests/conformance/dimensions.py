"""Dimensions as src/models/data/vllm.json has them: `C // 2`, `ceil(C * 4 / 32)`."""

import ast
import math
import operator
from fractions import Fraction

OPERATIONS = {ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv, ast.Div: lambda a, b: Fraction(a) / b}


def dimension(text: str, sizes: dict[str, int]) -> int:
    """What `text` comes to, where the letters stand for `sizes`. It is read as arithmetic, never run: anything else is an error."""

    def value(node: ast.expr) -> int | Fraction:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name) if name in sizes:
                return sizes[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
                return OPERATIONS[type(op)](value(left), value(right))
            case ast.Call(func=ast.Name(id="ceil"), args=[argument], keywords=[]):
                return math.ceil(value(argument))
        raise ValueError(f"{text!r}: {ast.unparse(node)!r} is no dimension")

    result = value(ast.parse(text, mode="eval").body)
    if not isinstance(result, int):
        raise ValueError(f"{text!r} is no whole number")
    return result


if __name__ == "__main__":
    known = {"R": 5, "C": 70, "G": 32, "E": 4}
    given = {"R": 5, "2": 2, "C // G": 2, "ceil(C * 4 / 32)": 9, "E": 4}
    assert {text: dimension(text, known) for text in given} == given
    for wrong in ("Q", "C / 32", "__import__('os')", "C ** 9", "'a'", "(lambda: 1)()", "ceil(C, 2)", "R if R else C"):
        try:
            found = dimension(wrong, known)
        except ValueError:
            continue
        raise SystemExit(f"{wrong!r} is taken for {found}")
    print("dimensions are read, and nothing else is")
