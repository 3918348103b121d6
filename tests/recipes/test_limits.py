"""Input that would cost hours or all memory is an error at once, on every command line of the recipes."""

import re
import time
from functools import partial

import numpy as np
import pytest
from torch import nn
from torch.optim import SGD

from recipes import gradient_noise, hessian, quickstart
from recipes.allcnn import AllCNN
from recipes.classifier import Classifier, Piecewise
from recipes.compare.__main__ import _parse
from recipes.compare.methods import Method
from recipes.data import ImageData
from recipes.lenet import LeNet
from recipes.limits import LENGTH, argument, check
from recipes.resnet import ResNet18
from recipes.smoothing.__main__ import main as smooth
from recipes.smoothing.expression import parse
from recipes.smoothing.talk import setup
from recipes.wide_resnet import WideResNet


@pytest.fixture(autouse=True)
def in_less_than_a_second():
    start = time.process_time()
    yield
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("*".join(["9" * 4000] * 100), "at most 1000 characters, got 400099"),
        ("-" * 100_000 + "x", "at most 1000 characters, got 100001"),
        ("(" * 100_000 + "x" + ")" * 100_000, "at most 1000 characters"),
        ("sin(" * 100_000, "at most 1000 characters"),
        ("+".join(["x"] * 501), "at most 1000 characters, got 1001"),
        ("-" * 999 + "x", "at most 50 operations within each other"),
        ("+".join(["x"] * 400), "at most 50 operations within each other"),
        ("abs(" * 60 + "x" + ")" * 60, "at most 50 operations within each other"),
        ("(" * 490 + "x" + ")" * 490, "f may use x, .*too many nested parentheses"),
        ("[" * 490 + "x" + "]" * 490, "f may use x"),
        ("9" * 999, "f may use x, .*too large to convert to float"),
        ("True + x", "f may use x, .*True is not a number"),
        ("1j * x", "f may use x, .*1j is not a number"),
    ],
)
def test_a_landscape_has_a_length_and_a_depth(expression, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse(expression)
    assert len(str(caught.value)) < 300


def test_integers_of_a_landscape_do_not_grow():
    # Python's own would have 200,000 digits after 50 squares of a 17-bit number, and none of them fit an array.
    squared = "x*0 + " + "*".join(["99999999999999999999"] * 45)
    np.testing.assert_array_equal(parse(squared)(np.ones(2)), np.full(2, np.inf))
    with pytest.raises(ValueError, match=r"f must be finite on \[-3, 3\], got inf"):
        setup(parse(squared))
    for tower in ("9**9**9**9 + x", "1e400 * x**0", "x**-9**9**9 * 0"):
        with pytest.raises(ValueError, match="f must be finite on"):
            setup(parse(tower))


def test_a_landscape_may_be_as_deep_as_the_limit():
    x = np.linspace(0.5, 2, 7)
    np.testing.assert_array_equal(parse("-" * 49 + "x")(x), -x)
    with pytest.raises(ValueError, match="at most 50 operations"):
        parse("-" * 50 + "x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--domain", "0", "1e-9"], "domain must lie in .* and be 0.01 wide or more, got 0.0 1e-09"),
        (["--domain", "0", "1e300"], "domain must lie in "),
        (["--domain", "0", "1e400"], "domain must be finite and increasing, got 0.0 inf"),
        (["--domain", "nan", "1"], "domain must be finite and increasing, got nan 1.0"),
        (["--f", "1e300*x"], r"f must be in \[-1e\+12, 1e\+12\], got -3e\+300"),
        (["--f", "x" * 2000], "f must have at most 1000 characters, got 2000"),
    ],
)
def test_the_smoothing_refuses(arguments, message, tmp_path, capsys):
    refused(partial(smooth, ["--out", str(tmp_path / "never.png"), *arguments]), message, capsys)


def refused(call, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        call()
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


# A number below, one above, and what is no number, for every option that has limits.
OPTIONS = {
    quickstart.main: ["--train-size", "--epochs", "--seeds"],
    hessian.main: ["--images", "--epochs", "--examples", "--probes", "--steps", "--seed"],
    gradient_noise.main: ["--images", "--epochs", "--examples", "--memory", "--seed"],
    _parse: [
        *("--seeds", "--epochs", "--lrs", "--n_train", "--n_val", "--batch_size", "--crop", "--width", "--depth"),
        *("--dropout", "--weight_decay", "--warmup", "--points", "--workers"),
    ],
}
WRONG = ["-1", "1000000000000", "1e400", "nan", "inf", "9**9**9", "9" * 100_000, "(" * 1000, ""]


@pytest.mark.parametrize(
    ("main", "option"),
    [(main, option) for main, options in OPTIONS.items() for option in options],
    ids=lambda value: value if isinstance(value, str) else value.__module__,
)
def test_every_number_of_a_command_line_has_limits(main, option, capsys):
    for value in WRONG:
        refused(
            partial(main, [*(["lenet"] if main is _parse else []), f"{option}={value}"]),
            rf"argument {option}: must be (an integer|a number) in \[\S+, \S+\], got\b",
            capsys,
        )


def test_the_limits_hold_at_their_ends():
    whole, real = argument(int, 1, 100), argument(float, 0, 1)
    assert (whole("1"), whole("100"), real("0"), real("1")) == (1, 100, 0.0, 1.0)
    for value in (1, 100):
        check("width", value, 1, 100)
    for value in (0, 101, float("nan"), float("inf"), 9**99):
        with pytest.raises(ValueError, match=r"width must be in \[1, 100\], got ") as caught:
            check("width", value, 1, 100)
        assert len(str(caught.value)) < 40 + LENGTH


@pytest.mark.parametrize(
    "method",
    [
        "entropy_sgd:gamma=" + "(" * 150,
        "entropy_sgd:gamma=" + "-" * 150 + "1",
        "entropy_sgd:gamma=" + "9" * 100_000,
        "entropy_sgd:gamma=9**9**9",
        "entropy_sgd:gamma=1e400",
        "entropy_sgd:gamma=nan",
        "entropy_sgd:inner_steps=1e400",
        "elastic_entropy:replicas=1000000",
        "elastic_sgd:replicas=" + "9" * 150,
        "heat_filter:gamma=nan",
        "heat_filter:gamma=1e400",
        "ema:memory=nan",
        "ema:memory=1e400",
        "swa:start=nan",
        "swa:lr_scale=1e400",
        "sam:rho=1e400",
        "sam:rho=nan",
        "sam:rho=0",
    ],
)
def test_a_method_refuses(method):
    with pytest.raises(ValueError, match="must") as caught:
        Method.parse(method)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WideResNet(600_000_004), r"depth must be in \[10, 1000\], got 600000004"),
        (lambda: ResNet18(0), r"width must be in \[1, 1000\], got 0"),
        (lambda: WideResNet(16, 10**9), r"width must be in \[1, 1000\], got 1000000000"),
        (lambda: WideResNet(16, dropout=float("nan")), r"dropout must be in \[0, 1\], got nan"),
        (lambda: AllCNN(width=10**9), r"width must be in \[1, 1000\], got 1000000000"),
        (lambda: AllCNN(dropout=float("nan")), r"dropout must be in \[0, 1\], got nan"),
        (lambda: LeNet(dropout=float("nan")), r"dropout must be in \[0, 1\], got nan"),
        (lambda: Classifier(nn.Identity(), SGD, sharpness=float("nan")), r"sharpness must be in \[0, 1000\], got nan"),
        (lambda: Piecewise((1.0, float("nan")), (1,)), "values must be finite, got "),
        (lambda: ImageData("random", crop=10**12), r"crop must be in \[0, 1000\], got 1000000000000"),
        (lambda: ImageData("random", batch_size=10**12), r"batch_size must be in \[1, 1000000\], got 1000000000000"),
        (
            lambda: ImageData("random", seed=10**400),
            r"seed must be in .*, got 1000000000000000000000000000000000000\.\.\.",
        ),
    ],
)
def test_the_configs_classes_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()
