"""The floors of the house: what may import what. The linter bans the worst; this is the whole rule."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_entropy"

VALUES = {"relaxation", "schedules", "presets", "functional", "checks", "pde"}
ENGINE = {
    "slots", "outer", "step_hooks", "noise", "auto_gamma", "replicas", "compiled", "inner_outer", "perturbed", "attach",
    "module_hooks",
}  # fmt: skip
DRIVER = {"loops"}
MATHS = {"torch", "numpy", "scipy"}

# Room: (what it may import of the package, what of the world beside the standard library).
RULES = {
    **dict.fromkeys(VALUES, (VALUES, MATHS)),
    **{name: (VALUES | ENGINE, {"torch"}) for name in ENGINE},
    "loops": (VALUES | ENGINE, {"torch", "lightning"}),
    "callbacks": (VALUES | ENGINE | DRIVER, {"torch", "lightning"}),
    "batchnorm": (VALUES | ENGINE | DRIVER, {"torch", "lightning"}),
    "strategies": (VALUES | ENGINE | DRIVER | {"strategies"}, {"torch", "lightning", "numpy"}),
    "diagnostics": (
        VALUES | ENGINE | {"diagnostics"},
        {"torch", "lightning", "torchmetrics", "numpy", "scipy", "matplotlib", "yaml", "jsonargparse"},
    ),
}
STANDARD = set(__import__("sys").stdlib_module_names)


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from lightning_entropy import presets` names rooms, `from lightning_entropy.presets import x` one.
            whole = node.module == "lightning_entropy"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if whole else {str(node.module)}
    return names


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_what_stands_below_is_imported(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    inside, outside = RULES[room]
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "lightning_entropy":
            assert rest.partition(".")[0] in inside, f"{room} must not import {name}"
        else:
            assert top in outside or top in STANDARD, f"{room} must not import {name}"
        assert not name.startswith("torch.distributed") or room == "strategies", f"{room} must not import {name}"
