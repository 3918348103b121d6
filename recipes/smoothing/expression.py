"""A landscape from the command line: arithmetic in x, and nothing else."""

import ast
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from simpleeval import InvalidExpression, SimpleEval

from recipes.limits import shorten

Array = NDArray[np.float64]

FUNCTIONS: dict[str, np.ufunc] = {
    "abs": np.abs,
    "cos": np.cos,
    "exp": np.exp,
    "log": np.log,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "sin": np.sin,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
}


# Many times what a landscape needs, and little enough to be read and computed in milliseconds.
LENGTH = 1000  # characters
DEPTH = 50  # operations within each other


def parse(expression: str) -> Callable[[Array], Array]:
    """Turn an expression in x into a function, by a parser that knows arithmetic and ``FUNCTIONS`` and nothing else.

    Args:
        expression: of ``x``, ``pi``, ``e``, numbers, + - * / ** and the names in ``FUNCTIONS``; at most ``LENGTH``
            characters, with at most ``DEPTH`` operations within each other.

    Returns:
        The function, from an array to an array of the same shape.

    Raises:
        ValueError: on anything else (an attribute, an index, a keyword, an unknown name), or if it is too long or deep.

    Example:
        >>> parse("x**2 + 1")(np.array([0.0, 2.0]))
        array([1., 5.])
        >>> parse("x.__class__")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: f may use ..., got 'x.__class__': Sorry, Attribute is not available in this evaluator
    """
    arithmetic = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: np.divide,
        ast.Pow: np.float_power,
        ast.USub: operator.neg,
        ast.UAdd: operator.pos,
    }
    grammar = (ast.Expr, ast.BinOp, ast.UnaryOp, ast.Call, ast.Name, ast.Constant)
    functions = {name: _fixed_arity(ufunc) for name, ufunc in FUNCTIONS.items()}
    allowed = f"f may use x, pi, e, numbers, + - * / ** and {', '.join(FUNCTIONS)}, got {shorten(repr(expression))}"
    if len(expression) > LENGTH:
        raise ValueError(f"f must have at most {LENGTH} characters, got {len(expression)}: {shorten(expression)}")
    try:
        tree = ast.parse(expression.strip(), mode="eval").body  # one expression, no statement
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{allowed}: {error}") from None
    if sum(1 for _ in _levels(tree)) > DEPTH:
        raise ValueError(f"f must have at most {DEPTH} operations within each other, got {shorten(expression)}")

    def function(x: Array) -> Array:
        names = {"x": x, "pi": math.pi, "e": math.e}
        evaluator = SimpleEval(operators=arithmetic, functions=functions, names=names)
        # simpleeval's own grammar has attributes, and an array's methods write files.
        evaluator.nodes = {node: rule for node, rule in evaluator.nodes.items() if node in grammar}
        evaluator.nodes[ast.Constant] = _number
        try:
            with np.errstate(all="ignore"):
                value = evaluator.eval(expression, previously_parsed=tree)
                return np.asarray(value, dtype=np.float64) + np.zeros_like(x)
        except (InvalidExpression, TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(f"{allowed}: {error}") from None

    function(np.array([1.0, 2.0]))
    return function


def _levels(tree: ast.expr) -> Iterator[list[ast.expr]]:
    """Yield the expressions of a tree level by level, from the whole to the innermost."""
    level = [tree]
    while level:
        yield level
        level = [child for node in level for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]


def _number(node: ast.Constant) -> float:
    """Return a literal as a float: Python's integers grow without bound."""
    if type(node.value) not in (int, float):
        raise TypeError(f"{shorten(node.value)} is not a number")
    return float(node.value)


def _fixed_arity(ufunc: np.ufunc) -> Callable[..., Any]:
    """Return a ufunc without its ``out`` argument."""

    def function(*values: Any) -> Any:
        if len(values) != ufunc.nin:
            raise TypeError(f"{ufunc.__name__} takes {ufunc.nin} arguments, got {len(values)}")
        return ufunc(*values)

    return function
