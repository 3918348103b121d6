"""What of a checkpoint is in the main file, and what in a rank's own."""

from pathlib import Path

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_entropy.strategies.save import Save

WHOLE = {"state_dict": {"w": torch.ones(2)}, "hyper_parameters": {"lr": 1.0}, "loops": {"batch": 3}}
HERE = {**WHOLE, "state_dict": {"w": torch.ones(1)}, "loops": {"batch": 4}}


def test_the_main_file_has_the_whole_and_a_ranks_own_has_its_parts(tmp_path: Path) -> None:
    save = Save(TorchCheckpointIO(), WHOLE, HERE, tmp_path / "at.ckpt", None, alone=False, sharded=False)
    assert save.own({"rng": 1, "parameters": [["w"]]}) == {
        "checkpoint": {"loops": {"batch": 4}},
        "rng": 1,
        "parameters": [["w"]],
    }
    save.write({"replicas": 2})
    written = torch.load(tmp_path / "at.ckpt", weights_only=True)
    assert written["replicas"] == 2 and written["loops"] == {"batch": 3} and written["state_dict"]["w"].numel() == 2
    save.write()
    assert torch.load(tmp_path / "at.ckpt", weights_only=True).keys() == WHOLE.keys()
