"""A landscape from the command line: arithmetic in x, and nothing else."""

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from simpleeval import InvalidExpression, SimpleEval

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


def parse(expression: str) -> Callable[[Array], Array]:
    """Turn an expression in x into a function, by a parser that knows arithmetic and ``FUNCTIONS`` and nothing else.

    Args:
        expression: of ``x``, ``pi``, ``e``, numbers, + - * / ** and the names in ``FUNCTIONS``.

    Returns:
        The function, from an array to an array of the same shape.

    Raises:
        ValueError: on anything else (an attribute, an index, a keyword, an unknown name).

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
        ast.Pow: np.float_power,  # of integers Python's own power would compute for ever
        ast.USub: operator.neg,
        ast.UAdd: operator.pos,
    }
    grammar = (ast.Expr, ast.BinOp, ast.UnaryOp, ast.Call, ast.Name, ast.Constant)
    functions = {name: _fixed_arity(ufunc) for name, ufunc in FUNCTIONS.items()}
    allowed = f"f may use x, pi, e, numbers, + - * / ** and {', '.join(FUNCTIONS)}, got {expression!r}"

    def function(x: Array) -> Array:
        names = {"x": x, "pi": math.pi, "e": math.e}
        evaluator = SimpleEval(operators=arithmetic, functions=functions, names=names)
        # simpleeval's own grammar has attributes, and an array's methods write files.
        evaluator.nodes = {node: rule for node, rule in evaluator.nodes.items() if node in grammar}
        try:
            ast.parse(expression.strip(), mode="eval")  # one expression, no statement
            with np.errstate(all="ignore"):
                return np.asarray(evaluator.eval(expression), dtype=np.float64) + np.zeros_like(x)
        except (InvalidExpression, SyntaxError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"{allowed}: {error}") from None

    function(np.array([1.0, 2.0]))
    return function


def _fixed_arity(ufunc: np.ufunc) -> Callable[..., Any]:
    """A ufunc without its ``out`` argument."""

    def function(*values: Any) -> Any:
        if len(values) != ufunc.nin:
            raise TypeError(f"{ufunc.__name__} takes {ufunc.nin} arguments, got {len(values)}")
        return ufunc(*values)

    return function
