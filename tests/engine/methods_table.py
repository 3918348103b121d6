"""Every method and every optimizer that the engine's contract is tested with."""

import functools
import inspect
from collections.abc import Callable

import torch

import lightning_entropy as le

Make = Callable[..., torch.optim.Optimizer]


part = functools.partial


OPTIMIZERS: dict[str, Make] = {
    "sgd": part(torch.optim.SGD, lr=0.1),
    "sgd_momentum": part(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2, foreach=False),
    "sgd_nesterov_foreach": part(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd_fused": part(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "adam": part(torch.optim.Adam, lr=1e-2),
    "adam_amsgrad_foreach": part(torch.optim.Adam, lr=1e-2, amsgrad=True, foreach=True),
    "adam_fused": part(torch.optim.Adam, lr=1e-2, fused=True),
    "adam_tensor_lr": lambda params: torch.optim.Adam(params, lr=torch.tensor(1e-2)),
    "adamw": part(torch.optim.AdamW, lr=1e-2),
    "adamw_fused": part(torch.optim.AdamW, lr=1e-2, fused=True),
    "nadam": part(torch.optim.NAdam, lr=1e-2),
    "radam": part(torch.optim.RAdam, lr=1e-2),
    "adamax": part(torch.optim.Adamax, lr=1e-2),
    "adadelta": part(torch.optim.Adadelta, lr=1.0),
    "adagrad": part(torch.optim.Adagrad, lr=1e-2),
    "adagrad_fused": part(torch.optim.Adagrad, lr=1e-2, fused=True),
    "asgd": part(torch.optim.ASGD, lr=1e-2),
    "rmsprop": part(torch.optim.RMSprop, lr=1e-3, momentum=0.9),
    "rprop": part(torch.optim.Rprop, lr=1e-3),
    "adafactor": part(torch.optim.Adafactor, lr=1e-2),
    "lbfgs": part(torch.optim.LBFGS, lr=0.1, max_iter=3),
    "lbfgs_wolfe": part(torch.optim.LBFGS, max_iter=3, line_search_fn="strong_wolfe"),
}
if hasattr(torch.optim, "Muon"):  # since torch 2.9
    OPTIMIZERS["muon"] = part(torch.optim.Muon, lr=1e-2)

# By the preset that makes them; what no preset makes is under "Relaxation". A preset without a row fails a test.
TABLE: dict[str, dict[str, le.Relaxation]] = {
    "Relaxation": {
        "default": le.Relaxation(),
        "explicit": le.Relaxation(inner_steps=3, gamma=0.5, explicit=True),
        "smoothed": le.Relaxation(inner_steps=3, gamma=0.5, noise=1e-2, average=0.75, width=1e-2),
        "smoothed_filter": le.Relaxation(
            inner_steps=2, gamma=0.5, width=le.Scoping(1e-2, 0.1), scale="filter", outer_lr=0.5, outer_momentum=0.5
        ),
        "smoothed_two_timescale": le.Relaxation(gamma=0.5, width=1e-2, reset=False, outer_lr=0.1),
        "smoothed_late": le.Relaxation(
            inner_steps=2, gamma=le.Pull(le.Warmup(0.5, 2)), width=le.Starting(0.1, at=1), scale="relative"
        ),
    },
    "lookahead": {"lookahead": le.lookahead(3)},
    "smoothed_lookahead": {"smoothed_lookahead": le.smoothed_lookahead(3)},
    "entropy_sgd": {
        "entropy_sgd": le.entropy_sgd(3, 0.5, 1e-2),
        "entropy_sgd_coupled": le.entropy_sgd(3, 0.5, 1e-2, coupled=True, reset_momentum=True),
        "entropy_sgd_quiet": le.entropy_sgd(3, le.Scoping(0.5, 0.1), 0.0, outer_lr=0.7),
    },
    "hamilton_jacobi": {
        "hamilton_jacobi": le.hamilton_jacobi(3, 0.5),
        "hamilton_jacobi_pull": le.hamilton_jacobi(3, le.Pull(0.5)),
    },
    "heat": {
        "heat": le.heat(1, 1e4),
        "heat_averaged": le.heat(3, 1e4),
        "heat_filter": le.heat(3, 1e4, scale="filter"),
        "heat_relative": le.heat(2, width=0.1, scale="relative"),
    },
    "two_timescale": {"two_timescale": le.two_timescale(0.5)},
    "elastic_sgd": {"elastic_sgd": le.elastic_sgd(3, 0.5)},
    "local_sgd": {"local_sgd": le.local_sgd(3)},
    "diloco": {"diloco": le.diloco(3)},
    "streaming_diloco": {
        "streaming_diloco": le.streaming_diloco(3, 2, 1),
        "streaming_late": le.streaming_diloco(3, 2, 2, 0.0),
    },
    "snoo": {"snoo": le.snoo(3)},
    "palsgd": {"palsgd": le.palsgd(3, le.Pull(0.5))},
    "gpa": {"gpa": le.gpa(0.9)},
    "parle": {"parle": le.parle(3)},
}
METHODS: dict[str, le.Relaxation] = {name: relaxation for rows in TABLE.values() for name, relaxation in rows.items()}


def exported_presets() -> dict[str, Callable[..., le.Relaxation]]:
    """The functions of the package that return a relaxation, by name."""
    functions = {name: getattr(le, name) for name in le.__all__ if inspect.isfunction(getattr(le, name))}
    return {name: f for name, f in functions.items() if inspect.signature(f).return_annotation is le.Relaxation}


def perturbs(relaxation: le.Relaxation) -> bool:
    """Whether the gradients are taken at perturbed weights."""
    return relaxation.perturb or relaxation.width != 0


def usable(name: str, relaxation: le.Relaxation) -> bool:
    """Whether the optimizer takes the method: LBFGS refuses some."""
    return not (
        name.startswith("lbfgs")
        and (relaxation.coupled or relaxation.explicit or (relaxation.perturb and relaxation.inner_steps > 1))
    )
