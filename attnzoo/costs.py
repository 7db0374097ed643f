"""Cost formulas: arithmetic in the library's letters, evaluated without `eval`.

An exhibit states its costs as text, `costs={"cache numbers per token": "2 * K * H"}`, so that they can be
read, printed and evaluated for any sizes. A formula may use numbers, letters, `+ - * / // % **`,
parentheses, and the functions `min max ceil floor sqrt log2`.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping

LETTERS: Mapping[str, str] = {
    "B": "batch",
    "T": "queries (sequence length)",
    "S": "keys (memory length)",
    "N": "query heads",
    "K": "kv heads",
    "G": "query heads per kv head, N / K",
    "H": "head width",
    "Hv": "value width of a head",
    "D": "model width",
    "F": "feed-forward width",
    "V": "vocabulary",
    "L": "layers",
}
"""Every letter that any formula may use without further ado, and what it counts."""

_OPERATORS: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_FUNCTIONS: Mapping[str, tuple[Callable[..., float], int | None]] = {  # name -> (function, arguments it takes)
    "min": (min, None),
    "max": (max, None),
    "ceil": (math.ceil, 1),
    "floor": (math.floor, 1),
    "sqrt": (math.sqrt, 1),
    "log2": (math.log2, 1),
}
_LARGEST_BITS = 1000  # of a power; keeps 9**9**9 from running for ever


def sizes(
    *,
    B: int = 1,
    T: int = 1024,
    S: int | None = None,
    N: int = 8,
    K: int | None = None,
    H: int | None = None,
    Hv: int | None = None,
    D: int = 512,
    F: int | None = None,
    V: int = 32_000,
    L: int = 6,
) -> dict[str, int]:
    """A value for every letter of `LETTERS`; what is not given follows from the rest.

    Defaults: S = T, K = N, H = D / N, Hv = H, F = 4 D, and always G = N / K.
    Raises ValueError when a size is not a positive integer, when K does not divide N, or when H is not
    given and N does not divide D.
    """
    if H is None:
        if N > 0 and D % N:
            raise ValueError(f"D={D} does not divide into N={N} heads: give the head width H, or a D that is a multiple of {N}")
        H = D // max(N, 1)
    K = N if K is None else K
    values = {
        "B": B,
        "T": T,
        "S": T if S is None else S,
        "N": N,
        "K": K,
        "H": H,
        "Hv": H if Hv is None else Hv,
        "D": D,
        "F": 4 * D if F is None else F,
        "V": V,
        "L": L,
    }
    for letter, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{letter} ({LETTERS[letter]}) must be a positive integer, got {value!r}")
    if N % K:
        raise ValueError(f"K={K} kv heads do not divide N={N} query heads: give a divisor of {N}")
    return {**values, "G": N // K}


def letters(formula: str) -> frozenset[str]:
    """The letters that `formula` uses. Raises ValueError if it is not arithmetic."""
    tree = _parse(formula)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = (n for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in called)
    return frozenset(name.id for name in names)


def evaluate(formula: str, values: Mapping[str, float]) -> float:
    """The value of `formula` with each letter replaced by `values[letter]`.

    Returns an int when the result is a whole number.
    Raises ValueError, quoting the formula, for anything that is not arithmetic, for a letter without a
    value, and for arithmetic that has no result (a division by zero, an overflow).

    >>> evaluate("2 * K * H", {"K": 2, "H": 64})
    256
    """
    missing = sorted(letters(formula) - values.keys())
    if missing:
        raise ValueError(f"formula {formula!r}: no value for {', '.join(missing)}")
    try:
        result = _value(_parse(formula), values, formula)
        return int(result) if result == int(result) else result
    except (ArithmeticError, TypeError) as error:
        raise ValueError(f"formula {formula!r}: {error}") from None


def _parse(formula: str) -> ast.expr:
    """The formula as a tree in which every node is known to be arithmetic."""
    try:
        tree = ast.parse(formula.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"formula {formula!r}: not arithmetic ({error.msg})") from None
    _check(tree, formula)
    return tree


def _check(node: ast.AST, formula: str) -> None:
    match node:
        case ast.Constant(value=bool() | str() | bytes() | complex() | None):
            raise ValueError(f"formula {formula!r}: {node.value!r} is not a real number")
        case ast.Constant(value=int() | float()) | ast.Name():
            return
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            _check(operand, formula)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            _check(left, formula)
            _check(right, formula)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            count = _FUNCTIONS[name][1]
            if not args or (count is not None and len(args) != count):
                raise ValueError(f"formula {formula!r}: {name} takes {count or 'some'} argument(s), got {len(args)}")
            for arg in args:
                _check(arg, formula)
        case _:
            raise ValueError(
                f"formula {formula!r}: {ast.unparse(node)!r} is not allowed; use numbers, letters, "
                f"+ - * / // % **, parentheses and {', '.join(_FUNCTIONS)}"
            )


def _value(node: ast.expr, values: Mapping[str, float], formula: str) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Name(id=letter):
            return values[letter]
        case ast.UnaryOp(op=op, operand=operand):
            inner = _value(operand, values, formula)
            return -inner if isinstance(op, ast.USub) else inner
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _value(left, values, formula), _value(right, values, formula)
            if isinstance(op, ast.Pow) and abs(b) * math.log2(abs(a) + 2) > _LARGEST_BITS:
                raise ValueError(f"formula {formula!r}: {a} ** {b} is too large")
            return _OPERATORS[type(op)](a, b)
        case ast.Call(func=ast.Name(id=name), args=args):
            try:
                return _FUNCTIONS[name][0](*(_value(arg, values, formula) for arg in args))
            except ValueError as error:  # sqrt and log2 outside their domain
                raise ValueError(f"formula {formula!r}: {name}: {error}") from None
    raise AssertionError(f"unchecked node {ast.dump(node)}")
