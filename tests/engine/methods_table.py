"""Every method and every optimizer that the engine's contract is tested with."""

import functools
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
    "muon": part(torch.optim.Muon, lr=1e-2),
    "adafactor": part(torch.optim.Adafactor, lr=1e-2),
    "lbfgs": part(torch.optim.LBFGS, lr=0.1, max_iter=3),
    "lbfgs_wolfe": part(torch.optim.LBFGS, max_iter=3, line_search_fn="strong_wolfe"),
}


METHODS: dict[str, le.Relaxation] = {
    "default": le.Relaxation(),
    "lookahead": le.lookahead(3),
    "entropy_sgd": le.entropy_sgd(3, 0.5, 1e-2),
    "entropy_sgd_coupled": le.entropy_sgd(3, 0.5, 1e-2, coupled=True, reset_momentum=True),
    "entropy_sgd_quiet": le.entropy_sgd(3, le.Scoping(0.5, 0.1), 0.0, outer_lr=0.7),
    "explicit": le.Relaxation(inner_steps=3, gamma=0.5, explicit=True),
    "hamilton_jacobi": le.hamilton_jacobi(3, 0.5),
    "hamilton_jacobi_auto": le.hamilton_jacobi(3, "auto"),
    "heat": le.heat(1, 1e4),
    "heat_averaged": le.heat(3, 1e4),
    "heat_filter": le.heat(3, 1e4, scale="filter"),
    "two_timescale": le.two_timescale(0.5),
    "elastic_sgd": le.elastic_sgd(3, 0.5),
    "local_sgd": le.local_sgd(3),
    "diloco": le.diloco(3),
    "parle": le.parle(3),
}


def usable(name: str, relaxation: le.Relaxation) -> bool:
    return not (
        name.startswith("lbfgs")
        and (relaxation.coupled or relaxation.explicit or (relaxation.perturb and relaxation.inner_steps > 1))
    )
