"""Reentrant activation checkpointing is refused by name, before anything is measured."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_entropy.diagnostics as D
from tests.diagnostics import tiny

pytestmark = [
    *tiny.LIGHTNING_ADVICE,
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
]
WAY_OUT = r"knows backward\(\) alone: call torch.utils.checkpoint.checkpoint\(..., use_reentrant=False\)"


class Reentrant(tiny.TinyModule):
    """A net that runs a part, its first or its last layer or a function, under checkpointing."""

    def __init__(self, part: str = "last", reentrant: bool = True) -> None:
        super().__init__()
        self.part, self.reentrant = part, reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.part == "first":
            return self.net[1:](checkpoint(self.net[0], x, use_reentrant=self.reentrant))
        h = self.net[:4](x)
        last: Any = self.net[4]
        if self.part == "function":
            weight, bias = last.weight, last.bias
            return checkpoint(lambda h: h @ weight.T + bias, h, use_reentrant=self.reentrant)
        return checkpoint(last, h, use_reentrant=self.reentrant)


@pytest.mark.parametrize(
    ("part", "named"),
    [("last", "its part 'net.4', Linear,"), ("first", "its part 'net.0', Linear,"), ("function", "a part of it")],
)
@pytest.mark.parametrize("estimate", [D.hessian_spectrum, D.gradient_noise, D.local_entropy])
def test_it_is_refused_by_name(estimate: Any, part: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} runs under reentrant activation checkpointing, which {WAY_OUT}"):
        estimate(Reentrant(part), tiny.data(dtype=torch.float32))


def test_the_way_out_is_one() -> None:
    plain = tiny.TinyModule()
    saving = Reentrant(reentrant=False)
    saving.load_state_dict(plain.state_dict())
    a, b = (D.hessian_spectrum(net, tiny.data(dtype=torch.float32)).largest for net in (plain, saving))
    assert a == pytest.approx(b, rel=1e-5)


def test_a_profile_needs_no_gradients() -> None:
    assert len(D.flatness_profile(Reentrant(), tiny.data(dtype=torch.float32), [0.1]).rises) == 1


def test_no_hook_is_left() -> None:
    net = Reentrant()
    with pytest.raises(ValueError, match="reentrant"):
        D.hessian_spectrum(net, tiny.data(dtype=torch.float32))
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_a_frozen_teacher_under_no_grad_is_none() -> None:
    class Taught(tiny.TinyModule):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Linear(5, 3).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                shift = self.teacher(x)
            return super().forward(x) + shift

    assert D.hessian_spectrum(Taught(), tiny.data(dtype=torch.float32)).largest > 0


def test_as_a_callback_it_warns_and_the_fit_goes_on(tmp_path: Path) -> None:
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[D.HessianSpectrum(every_n_epochs=1, figures=False)],
    )
    with pytest.warns(UserWarning, match=f"HessianSpectrum of Reentrant has failed: .*'net.4', Linear, .*{WAY_OUT}"):
        trainer.fit(Reentrant(), datamodule=tiny.TinyData())
    assert trainer.global_step == 12
